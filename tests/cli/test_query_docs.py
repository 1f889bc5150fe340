"""The examples of docs/query.md run, in order, in a shell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "query.md"


def test_the_examples_run(tiny_checkpoint: Path) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) == 5
    Path("bin").mkdir()
    for name, command in (
        ("epic-rag", f"exec {sys.executable} -m epic_rag_cli"),
        ("python", f"exec {sys.executable}"),
        ("an-editor", "echo opened"),
    ):
        Path("bin", name).write_text(f'#!/bin/sh\n{command} "$@"\n')
        Path("bin", name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        # Words alone are quick; the vectors of a tiny random model would say nothing.
        env={
            **os.environ,
            "EPIC_RAG_MODEL": str(tiny_checkpoint),
            "EPIC_RAG_MODE": "keyword",
            "EDITOR": "an-editor",
            "PATH": f"{Path('bin').absolute()}{os.pathsep}{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    out = done.stdout
    assert out.startswith("5 added, ")
    assert re.search(r"^    also in (old/)?undo\.txt:1$", out, flags=re.M)
    assert re.search(r"^1  bm25 \d+\.\d\d  history\.py:1-2  parent_of$", out, flags=re.M)
    assert re.search(rf"^opened {re.escape(str(Path.cwd()))}/manual/", out, flags=re.M)
    hits = [json.loads(line) for line in out.splitlines() if line.startswith('{"')]
    assert [(hit["query"], hit["query_id"]) for hit in hits] == [("undo a commit", 1), ("parent of a commit", 2)]
    assert re.search(r"/manual/history\.py:1 \d", out)
