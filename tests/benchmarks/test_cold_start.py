"""`benchmarks/cold_start.py` on a small index: its pages, its processes, and what it writes."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import cold_start
import pytest

from epic_rag.errors import EpicError
from tests.conftest import make_encoder


def test_pages_are_documentation(tmp_path: Path) -> None:
    cold_start.write_manual(tmp_path / "manual", chunks=30)
    files = sorted((tmp_path / "manual").iterdir())
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert len(text) == 30 * cold_start.CHARACTERS
    assert text.startswith("# ")
    assert "\n## " in text


def test_it_measures_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_encoder(causal=False).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(cold_start, "IMPORTS", "import json")
    once = cache(cold_start.run)  # each process runs once instead of three times
    monkeypatch.setattr(cold_start, "run", lambda command: once(tuple(command)))
    options = ["--model", str(tmp_path / "model"), "--chunks", "5", "--sizes", "10,20", "--runs", "2"]
    options += ["--large", str(tmp_path / "model")]
    cold_start.measure(cold_start.parser().parse_args([*options, "--output", str(tmp_path / "out")]))
    record = json.loads((tmp_path / "out" / "cold_start.json").read_text())
    assert {len(values) for values in record["seconds"].values()} == {2}
    assert len(record["seconds"]) == len(record["peak_bytes"]) == 15
    assert len(record["bars"]) == 8
    assert record["chunks"] > 0
    assert all(seconds > 0 for values in record["seconds"].values() for seconds in values)
    table = capsys.readouterr().out
    assert "| epic-rag query, 20 synthetic chunks" in table
    assert "| a further query in one process, ms" in table


def test_a_process_that_fails_is_an_error() -> None:
    with pytest.raises(EpicError, match=r"ended with status 3: no"):
        cold_start.run([sys.executable, "-c", "import sys; sys.stderr.write('no'); sys.exit(3)"])
    least = cold_start.run([sys.executable, "-c", "pass"])
    more = cold_start.run([sys.executable, "-c", "data = b'x' * 50_000_000; print('done')"])
    assert (least.out, more.out) == ("", "done\n")
    assert 45_000_000 < more.peak - least.peak < 60_000_000
    assert more.seconds > more.cpu / 2 > 0
