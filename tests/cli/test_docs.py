"""The help: every command has examples, they run, and docs/cli.md says what the app does."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from epic_rag_cli.docs import command_help, commands, markdown

from epic_rag.checkpoints import DEFAULT_CHECKPOINT

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
        "docs/cli.md differs from the app; run `python -m epic_rag_cli.docs > docs/cli.md`"
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


def test_short_help_is_the_long_one(cli: Any) -> None:
    assert cli("query", "-h").out == cli("query", "--help").out


@pytest.mark.parametrize("example", [example for _, example in EXAMPLES])
def test_example_runs(
    cli: Any, example: str, indexed: Path, pairs: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the examples speak of: a folder docs with an index, a file, a file of pairs, a bank; docs again in docs.
    monkeypatch.setenv("EPIC_RAG_MODEL", str(tiny_checkpoint))
    Path("notes.md").write_text("# Notes\n\nOf today.\n")
    Path(".epic-rag").symlink_to(indexed / ".epic-rag")
    if "mybank" in example and "--out mybank" not in example:
        assert cli("bank", "build", pairs, "--out", "mybank", "--task", "docs").status == 0
    if "runs/mine/final" in example:
        assert cli("models", "export", DEFAULT_CHECKPOINT, "runs/mine/final").status == 0
    if "grid.yaml" in example:
        terms = [f'{{"query": "term {number}", "positive": "what {number} means"}}\n' for number in range(12)]
        Path("terms.jsonl").write_text("".join(terms))
        Path("grid.yaml").write_text(GRID)
    program, *arguments = shlex.split(example)
    assert program == "epic-rag"
    result = cli(*arguments)
    assert result.status == 0, result.err
    assert result.out or arguments[0] == "clear", result.err
