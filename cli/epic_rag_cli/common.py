"""The options that stand before a command or after it: `--quiet`, `--verbose`, `--config`.

Each acts when it is read, before the command's own options are: what the configuration file says has to be known by
then, as their default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from epic_rag_cli.verbosity import Verbosity, ask

__all__ = ["CONFIG", "QUIET", "VERBOSE"]

_COMMAND_LINE = "COMMANDLINE"


def CONFIG(hidden: bool) -> tuple[Any, Any]:  # noqa: N802 - an option, made anew for each command
    """Return the annotation and the default of `--config`."""
    option = typer.Option(
        "--config",
        metavar="FILE",
        envvar="EPIC_RAG_CONFIG",
        is_eager=True,
        hidden=hidden,
        callback=_configure,
        help="The configuration file, instead of the nearest epic-rag.toml or pyproject.toml. Also after a command.",
    )
    return Annotated[Path | None, option], None


def QUIET(hidden: bool) -> tuple[Any, Any]:  # noqa: N802
    """Return the annotation and the default of `--quiet`."""
    option = typer.Option(
        "--quiet",
        "-q",
        is_eager=True,
        hidden=hidden,
        callback=_quiet,
        help="Print errors and data only. Also after a command.",
    )
    return Annotated[bool, option], False


def VERBOSE(hidden: bool) -> tuple[Any, Any]:  # noqa: N802
    """Return the annotation and the default of `--verbose`."""
    option = typer.Option(
        "--verbose",
        "-v",
        is_eager=True,
        hidden=hidden,
        callback=_verbose,
        help="Also say what is read, embedded and reused. Also after a command.",
    )
    return Annotated[bool, option], False


def _quiet(context: typer.Context, value: bool) -> bool:
    return _volume(context, "quiet", value, Verbosity.QUIET)


def _verbose(context: typer.Context, value: bool) -> bool:
    return _volume(context, "verbose", value, Verbosity.VERBOSE)


def _volume(context: typer.Context, name: str, value: bool, level: Verbosity) -> bool:
    if value and not context.resilient_parsing:
        source = context.get_parameter_source(name)
        ask(level, firm=source is not None and source.name == _COMMAND_LINE)
        if level is Verbosity.VERBOSE:
            from epic_rag_cli.quiet import listen

            listen()
    return value


def _configure(context: typer.Context, value: Path | None) -> Path | None:
    """Give the command's options the defaults that the configuration file says."""
    if context.resilient_parsing:  # completion: nothing is read or said
        return value
    from epic_rag_cli.config import READERS, load

    if context.parent is None:
        # The program's own; its commands read it.
        context.obj = value
        return value
    if value is None or not _is_own(context):
        value = context.parent.obj or value
    context.obj = value
    if context.info_name in READERS:
        settings = load(value).values.get(context.info_name or "", {})
        context.default_map = {name: setting.value for name, setting in settings.items()}
    return value


def _is_own(context: typer.Context) -> bool:
    """Whether `--config` stands after the command, which is nearer than before it or in the environment."""
    source = context.get_parameter_source("config_file")
    return source is not None and source.name == _COMMAND_LINE
