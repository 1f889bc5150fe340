"""benchmarks/readers.py: words that another extractor finds and the readers do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import readers

FILES = {
    "a.json": '{"a": "Z\\u00fcrich\\nLuzern", "b": [1, "Bern"]}',
    "a.yaml": 'title: "K\\u00fcche"\nrooms:\n  - bath\n',
    "a.xml": "<a><b>caf&#233; &amp; bar</b></a>",
    "a.svg": "<svg xmlns='http://www.w3.org/2000/svg'><title>Plan</title><path d='M0 0'/><text>pump</text></svg>",
    "a.txt": "plain words\n",
    "b.txt": "\n",
}


def test_nothing_is_lacking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    assert readers.main([str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert {kind: (row["files"], row["words"], row["lacking"]) for kind, row in results.items()} == {
        "json": (1, 5, 0), "yaml": (1, 4, 0), "xml": (1, 2, 0), "svg": (1, 2, 0), "text": (2, 2, 0),
    }  # fmt: skip
    assert results["text"]["skipped"] == 1
    assert "| json | 1 | 0 | 1 | 0.0 | 5 | 0.00 |" in capsys.readouterr().out


def test_lacking_words_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one two two three\n")
    monkeypatch.setitem(readers.EXTRACTORS, "text", lambda name, data: "one two two two four")
    results, missing = readers.measure([tmp_path / "a.txt"])
    assert (results["text"].words, results["text"].lacking, missing) == (5, 2, set())
    assert results["text"].percent == 40
