"""benchmarks/reader.py: the table and the bars of a run with a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import reader
from bench_common import run_main


def test_it_measures_each_size(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reader.py", "--model", str(tiny_checkpoint), "--sizes", "1,1000", "--runs", "2", "--output"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path)])
    assert run_main(reader.parser(), reader.measure) == 0
    bars = {bar["what"]: bar for bar in json.loads((tmp_path / "reader.json").read_text())["bars"]}
    assert set(bars) == {
        "seconds to build a bank of 1,000 embedded pairs",
        "seconds of a query with 1 demonstrations / without",
        "seconds of a query with 1,000 demonstrations / without",
    }
    build = bars["seconds to build a bank of 1,000 embedded pairs"]
    assert (build["limit"], build["at_most"]) == (5.0, True)
    assert build["value"] > 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["1", "1,000"]
