"""How much the commands say on stderr: `--quiet`, `--verbose`, or neither."""

from __future__ import annotations

import enum

import typer

__all__ = ["Verbosity", "ask", "reset", "verbosity"]


class Verbosity(enum.Enum):
    """Errors only; notes, warnings and progress as well; what is read and done as well."""

    QUIET = "--quiet"
    NORMAL = ""
    VERBOSE = "--verbose"


class _State:
    """What was asked for so far, and whether it was on the command line, which outdoes a configuration file."""

    level = Verbosity.NORMAL
    firm = False


def verbosity() -> Verbosity:
    """Return what counts for the command that runs."""
    return _State.level


def ask(level: Verbosity, *, firm: bool) -> None:
    """Take note of an option.

    Raises:
        typer.BadParameter: The command line asks for both.
    """
    if firm and _State.firm and _State.level is not level:
        raise typer.BadParameter(f"{level.value} and {_State.level.value} exclude each other; give one of them")
    if firm or not _State.firm:
        _State.level, _State.firm = level, firm


def reset() -> None:
    """Begin a new command line."""
    _State.level, _State.firm = Verbosity.NORMAL, False
