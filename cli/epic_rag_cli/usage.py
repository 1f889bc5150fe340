"""The error of a command line that is wrong, for what Typer itself does not check."""

from __future__ import annotations

from typing import Any, cast

import typer

__all__ = ["USAGE_ERROR", "usage_error"]

# Typer exports BadParameter but not its parent, click's UsageError, which lives in Typer itself in newer
# versions.
USAGE_ERROR = cast(type[Exception], typer.BadParameter.__bases__[0])


def usage_error(text: str) -> Exception:
    """Return an error that ends the command with status 2 and names the help to read."""
    return cast(Any, USAGE_ERROR)(text)  # type: ignore[no-any-return]
