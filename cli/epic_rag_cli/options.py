"""Options that several commands share, so that they read and behave alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["IndexDir", "Json", "Model"]

IndexDir = Annotated[
    Path | None,
    typer.Option(
        "--index-dir",
        metavar="DIR",
        envvar="EPIC_RAG_INDEX",
        help="The index folder. Without it: the nearest .epic-rag in the working directory and its parents.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        envvar="EPIC_RAG_MODEL",
        help="A name from `epic-rag models`, a checkpoint folder or a Hugging Face name.",
    ),
]
