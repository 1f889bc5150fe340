"""The two streams: data goes to stdout, everything else to stderr.

Every write to stdout is flushed here, so that a reader that has gone away (`| head`) or a full disk is
noticed in this module and nowhere else.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

import typer

from epic_rag.errors import EpicError
from epic_rag_cli.text import json_text, printable
from epic_rag_cli.verbosity import Verbosity, verbosity

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["columns", "emit", "emit_json", "hyperlinks", "message", "terminal_width"]


def emit(lines: Iterable[Text | str]) -> None:
    """Print lines of data, styled where stdout is a terminal; nothing in them is read as markup.

    Lines are never wrapped or cut: a terminal does that itself, and a pipe wants them whole.

    Raises:
        EpicError: stdout cannot be written to (a full disk).
        typer.Exit: The reader has closed the pipe; it has what it wanted, so the status is 0.
    """
    # Imported here because --help has no need of it.
    from rich.console import Console

    buffer = _Buffer()
    console = Console(file=buffer, markup=False, emoji=False, highlight=False, soft_wrap=True)
    for line in lines:
        console.print(line)
    _write(buffer.getvalue())


def emit_json(value: object, *, one_line: bool = False) -> None:
    """Print `value` as JSON, and nothing else, on stdout; indented, or as one line of JSON lines."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "")
    _write(json_text(value, ascii_only=not encoding.startswith("utf"), one_line=one_line) + "\n")


def message(kind: str, text: str) -> None:
    """Print one `kind: text` line ("note", "warning", "error") on stderr; with --quiet only an error.

    A stderr that cannot be written to is no reason to stop.
    """
    if kind != "error" and verbosity() is Verbosity.QUIET:
        return
    try:
        sys.stderr.write(f"{kind}: {printable(text)}\n")
        sys.stderr.flush()
    except OSError:
        _point_to_nowhere(sys.stderr)


def columns(rows: Sequence[Sequence[str]], *, styles: Sequence[str] = ()) -> list[Text]:
    """Return the rows as lines with aligned columns; the last column is not padded.

    Args:
        rows: Cells of the same number in each row; they are made printable here.
        styles: A rich style for each column, from the left.
    """
    from rich.cells import cell_len
    from rich.text import Text

    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        line = Text()
        for number, cell in enumerate(row):
            padding = "" if number == len(row) - 1 else " " * (widths[number] - cell_len(cell) + 2)
            line.append(cell, style=styles[number] if number < len(styles) else "")
            line.append(padding)
        lines.append(line)
    return lines


def terminal_width(limit: int = 100) -> int:
    """Return how many columns text for reading fills: the terminal's (or `COLUMNS`), at most `limit`."""
    import shutil

    return max(40, min(shutil.get_terminal_size((limit, 24)).columns, limit))


def hyperlinks() -> bool:
    """Return whether stdout is a terminal that takes hyperlinks: one that does not know them ignores them, if it
    reads escape sequences at all.
    """
    return sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class _Buffer(io.StringIO):
    """Collects what rich prints; a terminal if stdout is one, so that rich styles it accordingly."""

    def isatty(self) -> bool:
        return sys.stdout.isatty()


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _point_to_nowhere(sys.stdout)
        raise typer.Exit(0) from None
    except OSError as error:
        _point_to_nowhere(sys.stdout)
        reason = error.strerror or str(error)
        raise EpicError(f"standard output cannot be written to ({reason}); send it elsewhere and try again") from None


def _point_to_nowhere(stream: TextIO) -> None:
    """Send what `stream` still holds to the null device, or Python reports the failed flush again at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
