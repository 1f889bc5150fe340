"""The terminal: data on stdout, everything else on stderr, and text that is safe to print.

Text from documents may hold escape sequences that move the cursor, set the window title or hide text, and bidirectional
controls that show a line in another order than it has. `printable` and `json_text` escape them; `emit`, `emit_json`
and `message` are the only writers. `silence_libraries` keeps the output of other libraries away.
"""

from __future__ import annotations

import enum
import io
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, cast

import typer

from epic_rag.errors import DataError, EpicError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.text import Text

    from epic_rag_chroma import IndexProgress

__all__ = [
    "USAGE_ERROR",
    "IndexingProgress",
    "Interrupted",
    "Verbosity",
    "columns",
    "debugging",
    "emit",
    "emit_bytes",
    "emit_json",
    "emit_text",
    "encodable",
    "hyperlinks",
    "json_text",
    "log_info",
    "message",
    "plural",
    "printable",
    "request_verbosity",
    "reset_verbosity",
    "silence_libraries",
    "size",
    "stdin_bytes",
    "terminal_width",
    "usage_error",
    "verbosity",
]

# Typer exports BadParameter, but not its base class, click's UsageError, which newer versions carry themselves.
USAGE_ERROR = cast(type[Exception], typer.BadParameter.__bases__[0])


def usage_error(text: str) -> Exception:
    """Return an error that ends the command with status 2 and names the help to read."""
    return cast(Any, USAGE_ERROR)(text)  # type: ignore[no-any-return]


class Interrupted(Exception):  # noqa: N818 - not an error: the user pressed Ctrl-C
    """Ctrl-C in a command that reports what is done and how to continue."""


# C0 and C1 controls, line and paragraph separators, bidirectional controls, invisible operators, byte order
# marks, interlinear annotations, lone surrogates (undecodable bytes in file names) and tag characters. The
# joiners U+200C and U+200D stay: scripts and emoji need them, and they cannot reorder anything.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Return `text` as one safe line: white space becomes single spaces, controls are escaped."""
    line = " ".join(text.split())
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), line)


def json_text(value: object, *, ascii_only: bool = False, one_line: bool = False) -> str:
    """Return `value` as JSON with every control and invisible character escaped.

    Args:
        value: Anything that `json.dumps` takes.
        ascii_only: Escape all characters beyond ASCII.
        one_line: Return one line instead of indented ones.
    """
    text = json.dumps(value, ensure_ascii=ascii_only, indent=None if one_line else 2, allow_nan=False)
    # json.dumps escapes line feeds in strings, so a bare one is indentation.
    return _UNSAFE.sub(lambda match: "\n" if match[0] == "\n" else json.dumps(match[0])[1:-1], text)


def encodable(text: str) -> str:
    """Replace lone surrogates (undecodable bytes on the command line), which tokenizers reject."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def stdin_bytes() -> BinaryIO:
    """Return standard input as a stream of bytes.

    Raises:
        DataError: If it is closed.
    """
    if sys.stdin is None or not hasattr(sys.stdin, "buffer"):
        raise DataError("Standard input is closed. Pipe the text in, or pass it on the command line.")
    return sys.stdin.buffer


def plural(count: int, noun: str) -> str:
    """Return "1 file", "2 files"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(count: int) -> str:
    """Return a number of bytes as "512 B" or "1.5 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


class Verbosity(enum.Enum):
    """Verbosity of stderr: errors; also notes, warnings and progress; also every file and step."""

    QUIET = "--quiet"
    NORMAL = ""
    VERBOSE = "--verbose"


class _State:
    level = Verbosity.NORMAL
    explicit = False


def verbosity() -> Verbosity:
    """Return the verbosity of the running command."""
    return _State.level


def request_verbosity(level: Verbosity, *, explicit: bool) -> None:
    """Set the verbosity.

    Args:
        level: The verbosity.
        explicit: Whether it is on the command line, which takes precedence over a configuration file.

    Raises:
        typer.BadParameter: If the command line has both --quiet and --verbose.
    """
    if explicit and _State.explicit and _State.level is not level:
        raise typer.BadParameter(f"{level.value} and {_State.level.value} exclude each other. Use one of them.")
    if explicit or not _State.explicit:
        _State.level, _State.explicit = level, explicit


def reset_verbosity() -> None:
    """Return to the normal verbosity, before a new command line is parsed."""
    _State.level, _State.explicit = Verbosity.NORMAL, False


_PACKAGES = ("epic_rag", "epic_rag_chroma", "epic_rag_cli", "epic_rag_ray", "epic_rag_server")

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


class _PackageMessages(logging.Handler):
    """Log handler that prints the records of epic-rag's packages and drops all others."""

    def emit(self, record: logging.LogRecord) -> None:
        wanted = record.levelno >= logging.WARNING or verbosity() is Verbosity.VERBOSE
        if wanted and record.name.partition(".")[0] in _PACKAGES:
            message(record.levelname.lower(), record.getMessage())


def debugging() -> bool:
    """Return whether EPIC_RAG_DEBUG requests tracebacks and the libraries' own output."""
    return os.environ.get("EPIC_RAG_DEBUG", "") not in ("", "0")


def silence_libraries() -> None:
    """Turn off other libraries' progress bars, telemetry, warnings and logs; call it before they are imported.

    Records that epic-rag's packages log at WARNING or above (with --verbose: INFO) become lines on stderr.
    """
    if debugging():
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # A handler on the root logger also replaces logging's handler of last resort, which prints to stderr.
    logging.getLogger().addHandler(_PackageMessages(logging.WARNING))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def log_info() -> None:
    """Print what epic-rag's packages log at INFO."""
    root = logging.getLogger()
    handler = next((handler for handler in root.handlers if isinstance(handler, _PackageMessages)), None)
    if handler is None:
        if not debugging():
            return  # `run` was called by another program, which configures logging itself
        handler = _PackageMessages()
        root.addHandler(handler)
    handler.setLevel(logging.INFO)
    for name in _PACKAGES:
        logging.getLogger(name).setLevel(logging.INFO)


def emit(lines: Iterable[Text | str]) -> None:
    """Print lines of data, styled where stdout is a terminal. They are neither wrapped nor parsed as markup.

    Raises:
        EpicError: If stdout cannot be written to (a full disk).
        typer.Exit: If the reader has closed the pipe (`| head`), with status 0.
    """
    # Imported here because --help does not need it.
    from rich.console import Console

    buffer = _Buffer()
    console = Console(file=buffer, markup=False, emoji=False, highlight=False, soft_wrap=True)
    for line in lines:
        console.print(line)
    _write(buffer.getvalue())


def emit_json(value: object, *, one_line: bool = False) -> None:
    """Print `value` on stdout as JSON, indented or on one line. Errors are those of `emit`."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "")
    _write(json_text(value, ascii_only=not encoding.startswith("utf"), one_line=one_line) + "\n")


def emit_bytes(parts: Iterable[bytes]) -> None:
    """Write bytes to stdout. Errors are those of `emit`."""
    for part in parts:
        _write(part)


def emit_text(text: str) -> None:
    """Write running text to stdout at once; control characters but line ends and tabs are escaped.

    Errors are those of `emit`.
    """
    _write(_UNSAFE.sub(lambda match: match[0] if match[0] in "\n\t" else json.dumps(match[0])[1:-1], text))


def message(kind: str, text: str) -> None:
    """Print one `kind: text` line ("note", "warning", "error") on stderr; with --quiet only errors.

    A stderr that cannot be written to is ignored.
    """
    if kind != "error" and verbosity() is Verbosity.QUIET:
        return
    try:
        sys.stderr.write(f"{kind}: {printable(text)}\n")
        sys.stderr.flush()
    except OSError:
        _redirect_to_null(sys.stderr)


def columns(rows: Sequence[Sequence[str]], *, styles: Sequence[str] = ()) -> list[Text]:
    """Return the rows as lines with aligned columns; the last column is not padded.

    Args:
        rows: Cells, the same number in each row; they are made printable here.
        styles: A rich style for each of the first columns.
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
    """Return the number of columns for running text: the terminal's (or `COLUMNS`), at most `limit`."""
    return max(40, min(shutil.get_terminal_size((limit, 24)).columns, limit))


def hyperlinks() -> bool:
    """Return whether stdout is a terminal that reads escape sequences; one without hyperlinks ignores them."""
    return sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class _Buffer(io.StringIO):
    """Text that rich prints, styled as for stdout."""

    def isatty(self) -> bool:
        return sys.stdout.isatty()


def _write(data: str | bytes) -> None:
    try:
        if isinstance(data, bytes):
            sys.stdout.buffer.write(data)
        else:
            sys.stdout.write(data)
        sys.stdout.flush()
    except BrokenPipeError:
        _redirect_to_null(sys.stdout)
        raise typer.Exit(0) from None
    except OSError as error:
        _redirect_to_null(sys.stdout)
        reason = error.strerror or str(error)
        raise EpicError(f"Standard output cannot be written to ({reason}). Redirect it elsewhere.") from None


def _redirect_to_null(stream: TextIO) -> None:
    """Redirect `stream` to the null device: Python would report the failed flush again at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class IndexingProgress:
    """Progress bar of `index` on a terminal; with --verbose, a line with the duration of each stage.

    A context manager that is passed to the indexer as `progress`. `last` is the last event.
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
        """Show the event."""
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
