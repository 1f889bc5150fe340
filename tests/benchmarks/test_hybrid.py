"""`benchmarks/hybrid.py` on a set of a few sentences: what it scores, and what it writes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import hybrid
import pytest

from epic_rag.errors import EpicError

PASSAGES = [f"passage about topic{number} and nothing else" for number in range(30)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A retrieval set whose queries name the topic, and a reranking set."""
    folder = tmp_path / "data"
    (folder / "topics" / "qrels").mkdir(parents=True)
    write_lines(folder / "topics" / "corpus.jsonl", [{"_id": f"d{n}", "text": t} for n, t in enumerate(PASSAGES)])
    write_lines(folder / "topics" / "queries.jsonl", [{"_id": f"q{n}", "text": f"topic{n}"} for n in range(5)])
    lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(5))]
    (folder / "topics" / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    (folder / "pairs").mkdir()
    rows = [
        {"query": "topic1", "positive": [PASSAGES[1]], "negative": PASSAGES[2:9]},
        {"query": "topic2", "positive": [PASSAGES[2]], "negative": [PASSAGES[1], *PASSAGES[3:9]]},
    ]
    write_lines(folder / "pairs" / "reranking.jsonl", rows)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_it_scores_three_modes_and_writes_the_tables(
    data: Path, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- begin hybrid -->\nold\n<!-- end hybrid -->\nafter\n")
    pairs = tmp_path / "pairs.jsonl.gz"
    with gzip.open(pairs, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"query": f"topic{n}", "positive": PASSAGES[n]}) + "\n" for n in range(5))
    options = ["--data", str(data), "--model", str(tiny_checkpoint), "--output", str(tmp_path / "out")]
    options += ["--pairs", str(pairs)]
    hybrid.run(hybrid.parser().parse_args([*options, "--document", str(document)]))
    record = json.loads((tmp_path / "out" / "hybrid.json").read_text())
    assert record["sets"] == ["topics", "pairs"]
    assert record["scores"]["keyword"] == [100.0, 100.0]
    assert record["scores"]["dense"][0] < 100.0
    assert record["scores"]["hybrid"][0] > record["scores"]["dense"][0]
    setting = hybrid.setting(hybrid.KEYWORD_WEIGHT, hybrid.LEAST_COVERAGE)
    assert record["scores"]["hybrid"] == record["scores"][setting]
    assert record["pairs_of_training"]["keyword"] == [100.0]
    assert record["repeated"] == {"topics": 0, "pairs": 0}
    written = document.read_text()
    assert written.startswith("before\n<!-- begin hybrid -->\n```text\npython benchmarks/hybrid.py")
    assert "| keyword | 100.00 | 100.00 | **100.00** |" in written
    assert "old" not in written
    assert written.endswith("<!-- end hybrid -->\nafter\n")
    assert "| keyword |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "none"], "no retrieval set"),
        (["--document", "page.md"], "has no markers `hybrid`"),
    ],
)
def test_what_it_cannot_do_it_says(
    data: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text("no markers\n")
    arguments = ["--data", str(data), "--model", str(tiny_checkpoint), *options]
    with pytest.raises(EpicError, match=message):
        hybrid.run(hybrid.parser().parse_args(arguments))
