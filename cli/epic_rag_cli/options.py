"""Options that several commands share, so that they read and behave alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from epic_rag_chroma.types import DEFAULT_MODE
from epic_rag_cli.completion import (
    complete_banks,
    complete_dtypes,
    complete_models,
    complete_modes,
    complete_strategies,
    complete_tasks,
)
from epic_rag_cli.defaults import DEFAULT_TASK, ComputeDtype, ShownBy

__all__ = ["Bank", "Chroma", "Device", "Dtype", "IndexDir", "Json", "Mode", "Model", "Strategy", "Task"]

Bank = Annotated[
    str | None,
    typer.Option(
        "--bank",
        metavar="BANK",
        envvar="EPIC_RAG_BANK",
        autocompletion=complete_banks,
        help="Demonstrations: a name from `epic-rag bank list` or a bank folder.",
    ),
]
Chroma = Annotated[
    str | None,
    typer.Option(
        "--chroma",
        metavar="URL",
        help=(
            "A Chroma server for the vectors, as http://host:port; `folder` for the index folder. An index remembers "
            "where it is; a new one takes EPIC_RAG_CHROMA."
        ),
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME,...",
        envvar="EPIC_RAG_DEVICE",
        help="Where the model runs: cpu, cuda, mps, or several as cuda:0,cuda:1.",
        show_default="a GPU if there is one",
    ),
]
Dtype = Annotated[
    ComputeDtype,
    typer.Option(
        "--dtype",
        metavar="NAME",
        envvar="EPIC_RAG_DTYPE",
        autocompletion=complete_dtypes,
        help="What the model computes in; auto is float32, or bfloat16 where that is faster.",
    ),
]
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
Mode = Annotated[
    Literal["dense", "hybrid", "keyword"] | None,
    typer.Option(
        "--mode",
        metavar="MODE",
        envvar="EPIC_RAG_MODE",
        autocompletion=complete_modes,
        help="How to search: dense (by meaning), keyword (by words; loads no model) or hybrid (both).",
        show_default=DEFAULT_MODE,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        envvar="EPIC_RAG_MODEL",
        autocompletion=complete_models,
        help="A name from `epic-rag models`, a checkpoint folder or a Hugging Face name.",
    ),
]
Strategy = Annotated[
    ShownBy | None,
    typer.Option(
        "--strategy",
        metavar="NAME",
        autocompletion=complete_strategies,
        help="How demonstrations reach the query: epic (as vectors in its prompt), text (as texts), task-vector (as a "
        "move of its own vector) or none.",
        show_default="the checkpoint's",
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        envvar="EPIC_RAG_TASK",
        autocompletion=complete_tasks,
        help="The task whose instruction the encoder gets with the query.",
        show_default=f"{DEFAULT_TASK}, or what the bank says",
    ),
]
