"""Help and pages: docs/cli.md equals the commands, examples of every command and of docs/query.md run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli_pages import command_help, commands, markdown

ROOT = Path(__file__).parents[2]
EXAMPLES = [(name, example) for name, command in commands() for example in command_help(command)[1]]
GRID = """
recipe: {data: ., tasks: [pairs], batch_size: 2, max_demonstrations: 2}
budget: {steps: 2}
evaluation: {heldout: [terms], num_demonstrations: [0, 2]}
arms: {epic: {}, none: {strategy: none}}
"""


def test_documentation_is_current() -> None:
    assert (ROOT / "docs/cli.md").read_text(encoding="utf-8") == markdown(), (
        "docs/cli.md differs from the app; run `python docs/generate_cli.py > docs/cli.md`"
    )


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_help_has_an_example(cli: Any, name: str) -> None:
    result = cli(*name.split()[1:], "--help")
    assert (result.status, result.err) == (0, "")
    examples = [example for command, example in EXAMPLES if command == name]
    assert examples
    for example in examples:
        assert f"\n      {example}\n" in result.out, "the formatter has broken an example"
    assert max(map(len, result.out.splitlines())) <= 110


def test_short_option_of_help(cli: Any) -> None:
    assert cli("query", "-h").out == cli("query", "--help").out


@pytest.mark.parametrize("example", [example for _, example in EXAMPLES])
def test_example_runs(
    cli: Any, example: str, indexed: Path, pairs: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The examples use a folder docs with an index, a file, a file of pairs and a bank.
    monkeypatch.setenv("EPIC_RAG_MODEL", str(tiny_checkpoint))
    Path("notes.md").write_text("# Notes\n\nOf today.\n")
    Path(".epic-rag").symlink_to(indexed / ".epic-rag")
    if "mybank" in example and "--out mybank" not in example:
        assert cli("bank", "build", pairs, "--out", "mybank", "--task", "docs").status == 0
    if "grid.yaml" in example:
        terms = [f'{{"query": "term {number}", "positive": "what {number} means"}}\n' for number in range(12)]
        Path("terms.jsonl").write_text("".join(terms))
        Path("grid.yaml").write_text(GRID)
    program, *arguments = shlex.split(example)
    assert program == "epic-rag"
    result = cli(*arguments)
    assert result.status == 0, result.err
    assert result.out or arguments[0] == "clear", result.err


def test_examples_of_the_query_page(tiny_checkpoint: Path) -> None:
    blocks = re.findall(
        r"^```bash\n(.*?)^```$", (ROOT / "docs/query.md").read_text(encoding="utf-8"), flags=re.M | re.S
    )
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
        # Keyword mode loads no model in each of the processes.
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
