"""`benchmarks/min_cosine.py`: questions with an answer against questions about something else."""

from __future__ import annotations

import json
from pathlib import Path

import min_cosine
import pytest

from epic_rag.errors import DataError
from tests.conftest import make_encoder


def test_shares_of_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_encoder(causal=False).save_pretrained(tmp_path / "model")
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        # A question that is its passage has cosine 1 at home.
        rows = [{"query": f"{file.stem} {n}", "positive": f"{file.stem} {n}"} for n in range(9)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = ["--pairs", *map(str, files), "--model", str(tmp_path / "model"), "--queries", "4"]
    arguments += ["--limits=-1,0.9999,1.1", "--passages", "8"]
    assert min_cosine.measure(min_cosine.parser().parse_args(arguments)) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert ("% of 8" in header, len(lines)) == (True, 3)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][1:] == ["100.0", "100.0"]
    assert (cells[1][1], float(cells[1][2]) < 100) == ("100.0", True)
    assert cells[2][1:] == ["0.0", "0.0"]
    with pytest.raises(DataError, match="names one file"):
        min_cosine.measure(min_cosine.parser().parse_args(arguments[:2]))
