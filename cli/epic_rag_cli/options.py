"""Options that several commands share, so that they read and behave alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from epic_rag.tasks import DEFAULT_TASK
from epic_rag_chroma import DEFAULT_MODE

__all__ = [
    "DEFAULT_DTYPE",
    "DEFAULT_HITS",
    "DEFAULT_TASK",
    "INDEX_FOLDER",
    "MAX_SKIPPED_SHOWN",
    "Bank",
    "Chroma",
    "ComputeDtype",
    "Device",
    "Dtype",
    "IndexDir",
    "Json",
    "Mode",
    "Model",
    "ShownBy",
    "Strategy",
    "Task",
    "complete_banks",
    "complete_dtypes",
    "complete_models",
    "complete_modes",
    "complete_strategies",
    "complete_tasks",
]


# --- from defaults
# What the commands do when nothing is said; each value in one place.

# The task whose instruction `query` gives the encoder when neither --task nor --bank is given.


DEFAULT_HITS = 5
"""How many passages `query` prints without -k."""

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
"""What a model can compute in."""

ShownBy = Literal["epic", "text", "none", "task-vector"]
"""How demonstrations reach a query; `epic_rag.task_vector` has the same names, and loads torch."""

DEFAULT_DTYPE: ComputeDtype = "auto"
"""What a model computes in without --dtype."""

INDEX_FOLDER = ".epic-rag"
"""The name of an index folder that stands in the folder it indexes."""

MAX_SKIPPED_SHOWN = 10
"""How many skipped files `index` names; of more, it says how many there are for each reason, and --json lists all."""


# --- from completion
# What the shell offers for an option's value: names that are known without loading anything.


def complete_models(incomplete: str) -> list[str]:
    """Return the models that ship with the package, and folders that hold a checkpoint."""
    from epic_rag.checkpoints import list_checkpoints

    return [*_starting([info.name for info in list_checkpoints()], incomplete), *_folders(incomplete, "config.json")]


def complete_banks(incomplete: str) -> list[str]:
    """Return the built-in banks, and folders that hold one."""
    from epic_rag.demonstrations import built_in_banks

    return [*_starting(list(built_in_banks()), incomplete), *_folders(incomplete, "bank.json")]


def complete_dtypes(incomplete: str) -> list[str]:
    """Return what a model can compute in."""
    return _starting(list(get_args(ComputeDtype)), incomplete)


def complete_tasks(incomplete: str) -> list[str]:
    """Return the tasks."""
    from epic_rag.tasks import list_tasks

    return _starting([task.name for task in list_tasks()], incomplete)


def complete_modes(incomplete: str) -> list[str]:
    """Return the ways to search."""
    from epic_rag_chroma import SEARCH_MODES

    return _starting(list(SEARCH_MODES), incomplete)


def complete_strategies(incomplete: str) -> list[str]:
    """Return the ways in which demonstrations reach a query."""
    return _starting(list(get_args(ShownBy)), incomplete)


def _starting(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _folders(incomplete: str, file: str) -> list[str]:
    """Return folders whose path begins like this: those that hold `file`, and with a slash those to look further in."""
    given, slash, _ = incomplete.rpartition("/")
    parent = Path(given or slash or ".")
    found = []
    try:
        for folder in sorted(parent.iterdir()):
            shown = f"{given}{slash}{folder.name}"
            hidden = folder.name.startswith(".") and not incomplete.rpartition("/")[2].startswith(".")
            if hidden or not shown.startswith(incomplete) or not folder.is_dir():
                continue
            found.append(shown if (folder / file).is_file() else f"{shown}/")
    except OSError:
        return []
    return found


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
