"""Options whose value may be left out: `--open` is `--open 1`.

Typer has no such thing, so the value is put in before it reads the command line.
"""

from __future__ import annotations

import enum
import io
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

import typer
from typer.core import TyperCommand

from epic_rag.errors import EpicError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.text import Text

    from epic_rag_chroma import IndexProgress

__all__ = [
    "USAGE_ERROR",
    "IndexingProgress",
    "Interrupted",
    "QueryCommand",
    "Verbosity",
    "ask",
    "columns",
    "debugging",
    "emit",
    "emit_json",
    "hyperlinks",
    "json_text",
    "listen",
    "message",
    "plural",
    "printable",
    "quieten",
    "reset",
    "size",
    "terminal_width",
    "usage_error",
    "verbosity",
]


# --- from usage
# The error of a command line that is wrong, for what Typer itself does not check.

# Typer exports BadParameter but not its parent, click's UsageError, which lives in Typer itself in newer
# versions.
USAGE_ERROR = cast(type[Exception], typer.BadParameter.__bases__[0])


def usage_error(text: str) -> Exception:
    """Return an error that ends the command with status 2 and names the help to read."""
    return cast(Any, USAGE_ERROR)(text)  # type: ignore[no-any-return]


# --- from interrupt
# The error of a command that was interrupted and can say what it had done.


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """Ctrl-C; the message is one line that says what was done and how to go on."""


# --- from text
# Text that comes from documents, paths and messages, made fit for a terminal.
#
# A document may hold escape sequences that move the cursor, set the window title or hide text, and
# bidirectional controls that show a line in another order than it has. Nothing of that may reach a terminal: a
# character that is not ordinary text is written as its escape.

# C0 and C1 controls, line and paragraph separators, bidirectional controls, invisible operators, byte order
# marks, interlinear annotations, lone surrogates (undecodable bytes in file names) and tag characters. The
# joiners U+200C and U+200D stay: scripts and emoji need them, and they cannot reorder anything.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Return `text` as one safe line: runs of white space become a space, controls their escapes."""
    line = " ".join(text.split())
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), line)


def json_text(value: object, *, ascii_only: bool = False, one_line: bool = False) -> str:
    """Return `value` as JSON in which every control and invisible character is escaped.

    Args:
        value: Anything that `json.dumps` takes.
        ascii_only: Escape all that is not ASCII, for an output that cannot encode it.
        one_line: Write one line; otherwise it is indented.
    """
    text = json.dumps(value, ensure_ascii=ascii_only, indent=None if one_line else 2, allow_nan=False)
    # Inside strings json.dumps has escaped the line feeds, so a bare one is layout.
    return _UNSAFE.sub(lambda match: "\n" if match[0] == "\n" else json.dumps(match[0])[1:-1], text)


def plural(count: int, noun: str) -> str:
    """Return "1 file", "2 files"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(count: int) -> str:
    """Return a number of bytes for people: "512 B", "1.5 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


# --- from verbosity
# How much the commands say on stderr: `--quiet`, `--verbose`, or neither.


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


# --- from quiet
# Keeps the libraries beneath from talking on the user's terminal.
#
# Hugging Face's progress bars, Chroma's telemetry, deprecation warnings and the loggers of a dozen packages say
# nothing that a person who searches a folder could act on. What epic-rag's own packages log at WARNING or above (with
# `--verbose` at INFO, too) becomes one line on stderr. `EPIC_RAG_DEBUG=1` leaves everything as the libraries want it.

_OWN = ("epic_rag", "epic_rag_chroma", "epic_rag_cli")

# Read when the libraries are imported, so they have to be set before.
_ENVIRONMENT = {
    "ANONYMIZED_TELEMETRY": "False",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class _OwnMessages(logging.Handler):
    """Prints what epic_rag and its integrations log; drops what others do."""

    def emit(self, record: logging.LogRecord) -> None:
        wanted = record.levelno >= logging.WARNING or verbosity() is Verbosity.VERBOSE
        if wanted and record.name.partition(".")[0] in _OWN:
            message(record.levelname.lower(), record.getMessage())


def debugging() -> bool:
    """Return whether `EPIC_RAG_DEBUG` asks for tracebacks and the libraries' own messages."""
    return os.environ.get("EPIC_RAG_DEBUG", "") not in ("", "0")


def quieten() -> None:
    """Silence the libraries for this process; call before they are imported."""
    if debugging():
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # A handler on the root logger also keeps logging's last resort, which prints to stderr, from being used.
    logging.getLogger().addHandler(_OwnMessages(logging.WARNING))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def listen() -> None:
    """Have what epic-rag's own packages log at INFO printed, too, as long as that is what the command asks for."""
    root = logging.getLogger()
    handler = next((handler for handler in root.handlers if isinstance(handler, _OwnMessages)), None)
    if handler is None:
        if not debugging():
            return  # not our process: whoever runs the command has a say in what is logged
        handler = _OwnMessages()
        root.addHandler(handler)
    handler.setLevel(logging.INFO)
    for name in _OWN:
        logging.getLogger(name).setLevel(logging.INFO)


# --- from output
# The two streams: data goes to stdout, everything else to stderr.
#
# Every write to stdout is flushed here, so that a reader that has gone away (`| head`) or a full disk is
# noticed in this module and nowhere else.


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


# --- from progress
# The progress bar of `index`, on a terminal only, and the count that an interrupted run reports.


class IndexingProgress:
    """Takes the indexer's events; draws a bar on stderr where that is a terminal.

    With --verbose there is a line with the times of the stages instead, and with --quiet nothing. Use as a context
    manager and hand it over as the indexer's `progress`.
    """

    def __init__(self) -> None:
        self.last: IndexProgress | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stages: list[tuple[str, float]] = []

    def __enter__(self) -> IndexingProgress:
        if sys.stderr.isatty() and verbosity() is Verbosity.NORMAL:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                # markup=False: stage and path are text from outside.
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[path]}", markup=False, style="dim"),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None, path="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._stages and verbosity() is Verbosity.VERBOSE:
            ends = [*(start for _, start in self._stages[1:]), time.monotonic()]
            times = (f"{stage} {end - start:.2f} s" for (stage, start), end in zip(self._stages, ends, strict=True))
            message("info", f"times: {', '.join(times)}")

    def __call__(self, event: IndexProgress) -> None:
        """Show how far the indexer is."""
        if self.last is None or event.stage != self.last.stage:
            self._stages.append((event.stage, time.monotonic()))
        self.last = event
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                description=printable(event.stage),
                completed=event.done,
                total=event.total,
                path=printable(event.path or ""),
            )


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
