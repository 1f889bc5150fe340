"""Options whose value may be left out: `--open` is `--open 1`.

Typer has no such thing, so the value is put in before it reads the command line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

__all__ = ["QueryCommand"]

_NUMBER = re.compile(r"\d+")


class QueryCommand(TyperCommand):
    """A command on whose line `--open` may stand without a number."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line."""
        return super().parse_args(ctx, _filled(args, "--open", "1"))


def _filled(args: Sequence[str], option: str, value: str) -> list[str]:
    filled: list[str] = []
    for place, argument in enumerate(args):
        if argument == "--":  # what follows are no options
            return [*filled, *args[place:]]
        filled.append(argument)
        if argument == option and not _NUMBER.fullmatch("".join(args[place + 1 : place + 2])):
            filled.append(value)
    return filled
