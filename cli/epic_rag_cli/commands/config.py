"""`epic-rag config`: what counts when an option is not given, and who says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from epic_rag_cli.config import READERS, CommandOption, Config, command_options, load
from epic_rag_cli.options import Json
from epic_rag_cli.results import display_path
from epic_rag_cli.terminal import columns, emit, emit_json, message

__all__ = ["config"]


def config(
    context: typer.Context,
    every: Annotated[bool, typer.Option("--all", help="Also show what has its default.")] = False,
    as_json: Json = False,
) -> None:
    """Show what options are set by the configuration file and the environment.

    The configuration file is epic-rag.toml, or [tool.epic-rag] in pyproject.toml, in the working directory or the
    nearest folder above it. --config names another.

    Examples:
        epic-rag config
        epic-rag config --all --json
    """
    given: Path | None = context.obj
    read = load(given)
    rows = [
        {"command": name, "option": option.key, **_value(read, name, option)}
        for name in READERS
        for option in command_options(name)
    ]
    rows = [row for row in rows if every or row["source"] != "default"]
    if as_json:
        emit_json({"file": None if read.path is None else str(read.path), "values": rows})
        return
    if rows:
        shown = [(f"{row['command']} --{row['option']}", _text(row["value"]), _source(row["source"])) for row in rows]
        emit(columns(shown, styles=("bold",)))
    if read.path is None:
        message("note", "no configuration file: no epic-rag.toml here or above, and --config is not given")


def _value(read: Config, name: str, option: CommandOption) -> dict[str, Any]:
    """Return what an option has when the command line does not say, and where that comes from."""
    said = os.environ.get(option.variable, "") if option.variable else ""
    if said:
        return {"value": said, "source": option.variable}
    setting = read.values.get(name, {}).get(option.name)
    if setting is not None:
        return {"value": setting.value, "source": str(read.path)}
    default = option.default
    return {"value": default if isinstance(default, (str, int, float, list)) else None, "source": "default"}


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _source(source: str) -> str:
    return display_path(source) if os.path.isabs(source) else source
