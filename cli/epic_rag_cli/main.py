"""The Typer app and the entry point: the list of commands, and the exit status of each error.

0    done
1    an error: one line with the facts and a remedy
2    a wrong command line
130  interrupted (Ctrl-C)
"""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from epic_rag.errors import EpicError
from epic_rag.files import describe_os_error
from epic_rag_cli.commands import ask, bank, config, embed, eval, index, mcp, models, query, serve, status, train
from epic_rag_cli.config import load, option_keys
from epic_rag_cli.options import (
    CONFIG_HELP,
    CONFIG_VARIABLE,
    Command,
    configure,
    new_group,
    quiet,
    require_command,
    verbose,
)
from epic_rag_cli.terminal import (
    USAGE_ERROR,
    Interrupted,
    debugging,
    emit,
    message,
    reset_verbosity,
    silence_libraries,
)

__all__ = ["PROGRAM", "app", "main", "run"]

PROGRAM = "epic-rag"

app = new_group(PROGRAM)


def _version(wanted: bool) -> None:
    if wanted:
        from epic_rag import __version__

        emit([f"{PROGRAM} {__version__}"])
        raise typer.Exit


@app.callback()
def epic_rag(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", envvar=CONFIG_VARIABLE, is_eager=True, callback=configure, help=CONFIG_HELP
        ),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", is_eager=True, callback=quiet, help="Print errors and data only. Also after a command."
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            is_eager=True,
            callback=verbose,
            help="Also report what is read, embedded and reused. Also after a command.",
        ),
    ] = False,
) -> None:
    """Search your documents by meaning, with an encoder that learns from examples.

    `index` reads a folder and stores its text in chunks as vectors; `query` finds the chunks that answer a question.
    Nothing leaves the machine, unless you name a Chroma server elsewhere.

    Examples:
        epic-rag index docs
        epic-rag query 'how do I undo the last commit?' --index-dir docs/.epic-rag
    """
    require_command(context)


for _name, _function, _class in (
    ("index", index.index, Command),
    ("query", query.query, query.QueryCommand),
    ("ask", ask.ask, Command),
    ("embed", embed.embed, Command),
    ("serve", serve.serve, Command),
    ("mcp", mcp.mcp, Command),
    ("status", status.status, Command),
    ("clear", status.clear, Command),
    ("config", config.config, Command),
    ("eval", eval.eval_command, Command),
    ("mine", train.mine, Command),
    ("train", train.train, Command),
    ("ablate", eval.ablate, Command),
):
    app.command(_name, cls=_class)(_function)
app.add_typer(models.app)
app.add_typer(bank.app)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; every error becomes one line on stderr.

    Args:
        arguments: The command line without the program's name; None for the process's own.
    """
    reset_verbosity()
    try:
        # Without standalone mode Typer returns the status of `typer.Exit` and leaves errors to us.
        result = app(None if arguments is None else list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except USAGE_ERROR as error:
        return _report_usage_error(cast(Any, error))
    except (Interrupted, KeyboardInterrupt) as error:
        message("error", str(error) or "Interrupted.")
        return 130
    except typer.Abort:
        message("error", "Aborted.")
        return 1
    except EpicError as error:
        message("error", str(error))
        return 1
    except SystemExit as error:  # raised by Typer and rich when the reader of a pipe has gone away
        result = error.code
    except Exception as error:
        if debugging():
            raise
        message("error", _unexpected_line(error))
        return 1
    if result == 130:  # Typer's status for a KeyboardInterrupt
        message("error", "Interrupted.")
    return result if isinstance(result, int) else 0


def main() -> None:
    """Run the `epic-rag` console script."""
    silence_libraries()
    # Both streams may be closed (`>&-`) or lack characters in their encoding.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open for the life of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    status = run()
    # Skip Python's last garbage collection, which takes as long as the import of torch and transformers.
    gc.freeze()
    sys.exit(status)


def _report_usage_error(error: Any) -> int:
    # Some versions of Typer let pydantic convert a value, which adds these words.
    text = error.format_message().rstrip(".").replace(": Value error, ", ": ")
    context, option = error.ctx, getattr(error, "param", None)
    source = context.get_parameter_source(option.name) if context is not None and option is not None else None
    if option is not None and source is not None and source.name == "DEFAULT_MAP":
        key = next(key for key, known in option_keys(context.command).items() if known is option)
        given = context.params.get("config_file") or context.obj
        origin = load(context, given).origins[context.info_name][option.name]
        message("error", f"{origin}: {key} is {context.default_map[option.name]!r}. {text}.")
        return 1
    command = context.command_path if context is not None else PROGRAM
    message("error", f"{text}{'' if text.endswith('?') else '.'} See `{command} --help`.")
    return 2


def _unexpected_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"The command needs {error.name}, which is not installed. Run `pip install 'epic-rag[all]'`."
    if isinstance(error, OSError) and error.strerror:
        return f"{describe_os_error(error)}. Make it accessible or use another path, then run the command again."
    fact = f"{type(error).__name__}: {error}"
    return f"Unexpected error ({fact}). Run the command again with EPIC_RAG_DEBUG=1 for the traceback."
