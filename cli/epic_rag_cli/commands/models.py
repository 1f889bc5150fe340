"""`epic-rag models`: the checkpoints that ship with the package."""

from __future__ import annotations

import dataclasses

from epic_rag_cli.options import Json
from epic_rag_cli.output import columns, emit, emit_json, message
from epic_rag_cli.text import size

__all__ = ["models"]


def models(as_json: Json = False) -> None:
    """List the models that need no download.

    --model also takes a checkpoint folder or a Hugging Face name.

    Examples:
        epic-rag models
        epic-rag models --json
    """
    from epic_rag.checkpoints import list_checkpoints

    found = list_checkpoints()
    if as_json:
        emit_json([{**dataclasses.asdict(info), "path": str(info.path)} for info in found])
    elif found:
        rows = [
            (
                "*" if info.default else " ",
                info.name,
                f"{info.dimension} dimensions",
                f"{info.parameters / 1e6:.1f}M parameters",
                size(info.size_bytes),
                info.description,
            )
            for info in found
        ]
        emit(columns(rows, styles=("green", "bold")))
    else:
        message("note", "no model ships with this installation; give --model a checkpoint folder or a hub name")
