"""Help and docs/cli.md: every command has examples, which tests/docs/test_pages.py runs, and the page is current."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli_pages import command_help, commands, markdown

ROOT = Path(__file__).parents[2]
EXAMPLES = [(name, example) for name, command in commands() for example in command_help(command)[1]]


def test_page_is_current() -> None:
    assert (ROOT / "docs/cli.md").read_text(encoding="utf-8") == markdown(), (
        "docs/cli.md differs from the commands. Run `python docs/generate_cli.py > docs/cli.md`."
    )


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_help_has_examples(cli: Any, name: str) -> None:
    result = cli(*name.split()[1:], "--help")
    assert (result.status, result.err) == (0, "")
    examples = [example for command, example in EXAMPLES if command == name]
    assert examples
    for example in examples:
        assert f"\n      {example}\n" in result.out, "the formatter has broken an example"
    assert max(map(len, result.out.splitlines())) <= 110


def test_short_option_of_help(cli: Any) -> None:
    assert cli("query", "-h").out == cli("query", "--help").out
