"""Write what the long tests counted into docs/reliability.md.

    EPIC_RAG_SOAK=1 python -m pytest tests/soak
    python benchmarks/reliability.py

`make soak` runs both. The tests leave their counts in runs/soak, a JSON file each; a row whose test has not run at full
counts is left out, and nothing is written when there is none.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- begin soak -->", "<!-- end soak -->"

Facts = dict[str, Any]


def times(number: int, what: str) -> str:
    return f"{number:,} {what}"


def killed(facts: Facts) -> str:
    kills = facts["kills"]
    moments = ", ".join(f"{count} {name}" for name, count in sorted(kills["by_moment"].items()))
    return f"{times(kills['kills'], 'kills')} (by {moments}; {kills['while_chroma_wrote']} while Chroma wrote)"


OUTCOMES = ("refused", "died", "hung", "fitted")


def limited(name: str) -> Callable[[Facts], str]:
    def row(facts: Facts) -> str:
        outcomes = ", ".join(f"{facts[name][key]} {key}" for key in OUTCOMES if facts[name].get(key))
        return f"{times(facts[name]['runs'], 'runs')} ({outcomes})"

    return row


def concurrent(facts: Facts) -> str:
    each = facts["concurrent"]
    return (
        f"{each['seconds']:.0f} s: {each['runs']:,} runs, {each['queries']:,} queries, the slowest "
        f"{each['slowest_query_seconds']:.2f} s"
    )


def server(facts: Facts) -> str:
    return f"{times(facts['server_kills'], 'kills')}: {facts['lost_rows']} rows lost, {facts['wrong_hits']} wrong hits"


# File in runs/soak, what was done, its count, the test.
ROWS: Sequence[tuple[str, str, Callable[[Facts], str], str]] = (
    ("crash", "the indexer killed (`kill -9`) while files change", killed, "test_crash.py -k killed"),
    (
        "crash",
        "the indexer interrupted (Ctrl-C)",
        lambda facts: times(facts["interrupts"]["interrupts"], "interrupts"),
        "test_crash.py -k interrupted",
    ),
    ("crash", "no file may grow further (a full disk)", limited("RLIMIT_FSIZE"), "test_crash.py -k FSIZE"),
    ("crash", "no more memory to be had", limited("RLIMIT_AS"), "test_crash.py -k RLIMIT_AS"),
    ("processes", "2 indexers and 4 processes that ask, while files change", concurrent, "test_processes.py"),
    (
        "server",
        "the Chroma server killed and started again during a run",
        server,
        "test_server.py",
    ),
    (
        "fuzz",
        "damaged files read",
        lambda facts: f"{facts['files']:,} files of {facts['formats']} formats",
        "test_fuzz.py",
    ),
    ("walk", "small files in one folder", lambda facts: times(facts["files"], "files"), "test_walk.py"),
)


def table(folder: Path) -> str:
    """Return a row for each test that has run, as Markdown; empty without any."""
    lines = []
    for name, done, count, test in ROWS:
        try:
            counted = count(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        lines.append(f"| {done} | {counted} | `EPIC_RAG_SOAK=1 python -m pytest tests/soak/{test}` |")
    return "\n".join(["| | | |", "|---|---|---|", *lines]) if lines else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=Path, default=ROOT / "runs" / "soak", help="where the tests left their counts")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "reliability.md")
    options = parser.parse_args()
    rows = table(options.counts)
    if not rows:
        print(f"no counts in {options.counts}; run `make soak`", file=sys.stderr)
        return 1
    text = options.document.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        print(f"{options.document} has no {BEGIN} and {END}", file=sys.stderr)
        return 1
    options.document.write_text(f"{before}{BEGIN}\n{rows}\n{END}{after}", encoding="utf-8")
    print(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
