from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import marks
import pytest


def test_the_script_runs_as_documented(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"query": "How do I undo it?", "positive": "a"},
        {"query": "how do we undo it", "positive": "a"},
        {"query": "treatments for ataxia 31", "positive": "b"},
        {"query": "treatments for ataxia 34", "positive": "c"},
        {"query": "The treatments for ataxia 34", "positive": "d"},
    ]
    (tmp_path / "small.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "small.jsonl.gz").write_bytes(gzip.compress((tmp_path / "small.jsonl").read_bytes()))
    arguments = [
        "--data",
        str(tmp_path),
        "--files",
        "small",
        "--model",
        str(tiny_checkpoint),
        "--output",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["marks.py", *arguments])
    assert marks.main() == 0
    table = capsys.readouterr().out
    assert (tmp_path / "out" / "marks.md").read_text() == table
    (row,) = [line for line in table.splitlines() if line.startswith("| small")]
    assert [cell.strip() for cell in row.split("|")[3:5]] == ["0", "4: 50%"]


def test_groups_by_key() -> None:
    assert marks.same_by_key(["a", "b", "a"]) == [[2], [], [0]]
