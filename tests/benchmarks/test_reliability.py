"""`benchmarks/reliability.py`: counts in, a table between two markers out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reliability.py"
DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
COUNTS = {
    "crash": {
        "kills": {"kills": 60, "by_moment": {"time": 40, "graph": 20}, "while_chroma_wrote": 17},
        "interrupts": {"interrupts": 30},
        "RLIMIT_FSIZE": {"runs": 20, "refused": 15, "fitted": 5},
    },
    "processes": {"concurrent": {"seconds": 60.0, "runs": 1234, "queries": 5678, "slowest_query_seconds": 0.5}},
    "walk": {"files": 100_000},
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_table_is_written_between_its_markers(tmp_path: Path) -> None:
    document = tmp_path / "reliability.md"
    document.write_text(DOCUMENT.read_text())
    for name, facts in COUNTS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(facts))
    (tmp_path / "fuzz.json").write_text("broken")
    for _ in range(2):  # and again in its place
        done = run("--counts", tmp_path, "--document", document)
        assert done.returncode == 0, done.stderr
    text = document.read_text()
    rows = text.partition("<!-- begin soak -->")[2].partition("<!-- end soak -->")[0].strip().splitlines()
    assert len(rows) == 2 + 5
    assert "60 kills (by 20 graph, 40 time; 17 while Chroma wrote)" in rows[2]
    assert "20 runs (15 refused, 5 fitted)" in rows[4]
    assert "60 s: 1,234 runs, 5,678 queries, the slowest 0.50 s" in rows[5]
    assert "100,000 files" in rows[6]
    assert text.count("begin soak") == 1


def test_nothing_is_written_without_counts(tmp_path: Path) -> None:
    document = tmp_path / "reliability.md"
    document.write_text("as it was")
    assert run("--counts", tmp_path, "--document", document).returncode == 1
    (tmp_path / "walk.json").write_text(json.dumps(COUNTS["walk"]))
    assert "has no <!-- begin soak -->" in run("--counts", tmp_path, "--document", document).stderr
    assert document.read_text() == "as it was"
