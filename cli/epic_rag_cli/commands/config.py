"""`epic-rag config`: the defaults that configuration files and the environment set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from epic_rag_cli.config import COMMANDS, load, option_keys
from epic_rag_cli.options import ConfigFile, Json, Quiet, Verbose
from epic_rag_cli.results import display_path
from epic_rag_cli.terminal import columns, emit, emit_json, message

__all__ = ["config"]


def config(
    context: typer.Context,
    every: Annotated[bool, typer.Option("--all", help="Also show options that have their default.")] = False,
    as_json: Json = False,
    config_file: ConfigFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the options that configuration files and the environment set.

    The configuration files are the user's config.toml and the project's: epic-rag.toml, or [tool.epic-rag] in
    pyproject.toml, in the working directory or the nearest folder above it. --config names one that replaces both.

    Examples:
        epic-rag config
        epic-rag config --all --json
    """
    program: Any = context.find_root().command
    given = config_file or context.obj
    settings = load(context, given)
    rows = []
    for name in COMMANDS:
        command = program.commands[name]
        # Parse an empty command line, so that click itself decides the precedence.
        parsed = command.make_context(name, [] if given is None else ["--config", str(given)], parent=context.parent)
        for key, option in option_keys(command).items():
            source = parsed.get_parameter_source(option.name).name
            if key == "config" or (source == "DEFAULT" and not every):
                continue
            origin = settings.origins[name].get(option.name)
            named = {"ENVIRONMENT": str(option.envvar), "DEFAULT_MAP": str(origin)}.get(source, "default")
            value = parsed.params[option.name]
            if key in ("index-dir", "bank") and len(value or ()) < 2:  # seldom several
                value = value[0] if value else None
            rows.append({"command": name, "option": key, "value": _plain(value), "source": named})
    if as_json:
        files = [str(file.absolute()) for file in settings.files]
        emit_json({"file": files[-1] if files else None, "files": files, "values": rows})
        return
    if rows:
        shown = [(f"{row['command']} --{row['option']}", _text(row["value"]), _source(row["source"])) for row in rows]
        emit(columns(shown, styles=("bold",)))
    if not settings.files:
        message("note", "No configuration file. Write epic-rag.toml here, or pass a file to --config.")


def _plain(value: Any) -> Any:
    """Return an option's value as JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, list) else str(value)


def _source(source: str) -> str:
    return display_path(source) if os.path.isabs(source) else source
