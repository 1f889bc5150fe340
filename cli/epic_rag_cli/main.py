"""The Typer app and the entry point: which commands there are, and what becomes of an error.

0    done
1    an error: one line with the facts and the command to run next
2    the command line itself is wrong
130  interrupted (Ctrl-C)
"""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, cast

import typer

from epic_rag.errors import EpicError
from epic_rag_cli.commands import bank, config, eval, index, models, query, status, train
from epic_rag_cli.commands import eval as ablate
from epic_rag_cli.commands import status as clear
from epic_rag_cli.commands import train as mine
from epic_rag_cli.config import add_command, help_when_alone, new_app
from epic_rag_cli.terminal import USAGE_ERROR, Interrupted, QueryCommand, debugging, emit, message, quieten, reset

__all__ = ["PROGRAM", "app", "main", "run"]


PROGRAM = "epic-rag"


def _version(wanted: bool) -> None:
    if wanted:
        from epic_rag import __version__

        emit([f"{PROGRAM} {__version__}"])
        raise typer.Exit


def epic_rag(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Search your documents by meaning, with an encoder that learns from examples.

    `index` reads a folder and stores its passages as vectors; `query` finds the passages that answer a
    question. Nothing leaves the machine, unless you name a Chroma server elsewhere.

    Examples:
        epic-rag index docs
        epic-rag query 'how do I undo the last commit?' --index-dir docs/.epic-rag
    """
    help_when_alone(context)


app = new_app(PROGRAM, epic_rag, program=True)
add_command(app, "index", index.index, configured=True)
add_command(app, "query", query.query, configured=True, cls=QueryCommand)
add_command(app, "status", status.status, configured=True)
add_command(app, "clear", clear.clear, configured=True)
add_command(app, "config", config.config, configured=True)
add_command(app, "eval", eval.eval_command)
add_command(app, "mine", mine.mine)
add_command(app, "train", train.train)
add_command(app, "ablate", ablate.ablate)
app.add_typer(models.app)
app.add_typer(bank.app)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; every error becomes one line on stderr.

    Args:
        arguments: The command line without the program's name; None for the process's own.
    """
    reset()
    try:
        # Without standalone mode Typer returns the status of `typer.Exit` and leaves errors to us.
        return _status(app(None if arguments is None else list(arguments), prog_name=PROGRAM, standalone_mode=False))
    except USAGE_ERROR as error:
        message("error", _usage_line(error))
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        message("error", str(error) or "interrupted")
        return 130
    except typer.Abort:
        message("error", "nothing was done: the question was not answered; run the command again")
        return 1
    except EpicError as error:
        message("error", str(error))
        return 1
    except SystemExit as error:
        # What Typer and rich do about a reader that has gone away while they print.
        return _status(error.code)
    except Exception as error:
        if debugging():
            raise
        message("error", _unexpected_line(error))
        return 1


def main() -> None:
    """The `epic-rag` console script."""
    quieten()
    _ensure_streams()
    status = run()
    # Python looks for garbage once more before it ends, among all that torch and transformers have made, which takes
    # as long as importing them. The memory goes anyway.
    gc.freeze()
    sys.exit(status)


def _status(result: object) -> int:
    if result == 130:
        # Typer makes this of a KeyboardInterrupt; a command that can say more raises Interrupted.
        message("error", "interrupted")
    return result if isinstance(result, int) else 0


def _usage_line(error: Exception) -> str:
    """Return a usage error and where to read on: "Missing argument 'TEXT'; see `epic-rag query --help`"."""
    parts = cast(Any, error)
    command = parts.ctx.command_path if parts.ctx is not None else PROGRAM
    # Some versions of Typer let pydantic look at a value, which puts these words before Typer's own.
    text = parts.format_message().rstrip(".").replace(": Value error, ", ": ")
    return f"{text}{'' if text.endswith('?') else ';'} see `{command} --help`"


def _unexpected_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f"{os.fspath(error.filename)!s}: " if isinstance(error.filename, (str, os.PathLike)) else ""
        return f"{place}{error.strerror}; make it accessible, or give another path, and run the command again"
    what = f"{type(error).__name__}: {error}"
    return f"this should not happen ({what}); run the command again with EPIC_RAG_DEBUG=1 for the traceback"


def _ensure_streams() -> None:
    """Make both streams take any text; they can be closed (`>&-`) or lack characters in their encoding."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open for the life of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
