"""The help: every command has examples, and docs/cli.md is current; tests/docs/test_pages.py runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from epic_rag_cli.docs import command_help, commands, markdown

ROOT = Path(__file__).parents[2]
EXAMPLES = [(name, example) for name, command in commands() for example in command_help(command)[1]]


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
