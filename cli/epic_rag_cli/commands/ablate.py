"""`epic-rag ablate`: a grid of short trainings at equal budget, and their scores."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from epic_rag_cli.interrupt import Interrupted
from epic_rag_cli.options import Json
from epic_rag_cli.output import emit, emit_json, message
from epic_rag_cli.verbosity import Verbosity, verbosity

__all__ = ["ablate"]


def ablate(
    grid: Annotated[
        str, typer.Argument(metavar="GRID", help="A YAML or JSON file, or the name of a shipped grid: ablation.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Runs and results go here.", show_default="runs/GRID"),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="NAME,...", help="Train and score these arms.", show_default="all arms"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change a setting of all arms, for instance data=pairs, budget.steps=50 or evaluation.queries=100; "
            "can be repeated. An arm's own setting wins.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train the arms of a grid for an equal number of steps, tokens or minutes, and print their scores as a table.

    Every arm is scored on files that no arm trains on and on rows of trained tasks that training leaves out. DIR
    gets `ablation.json`, `ablation.md`, `plots/` and a checkpoint an arm. The same command goes on where it was
    stopped and trains only what is missing. docs/evaluation.md explains the file and the table; the examples take
    a grid.yaml in the working directory.

    Examples:
        epic-rag ablate grid.yaml --quiet
        epic-rag ablate grid.yaml --only epic --set budget.steps=3 -o runs/quick --json
    """
    from epic_rag.checkpoints import DEFAULT_CHECKPOINT
    from epic_rag.evaluation.ablation import failed_arms, load_grid, run_ablation
    from epic_rag.evaluation.request import split_names

    read = load_grid(
        grid,
        settings or (),
        output=output,
        default_model=os.environ.get("EPIC_RAG_MODEL") or DEFAULT_CHECKPOINT,
    )
    try:
        report = run_ablation(
            read,
            only=split_names(only or ""),
            progress=lambda line: message("note", line),
            show_progress=sys.stderr.isatty() and verbosity() is not Verbosity.QUIET,
            command=tuple(sys.argv),
        )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; what is done is in {read.folder}; run the same command again to go on"
        ) from None
    if as_json:
        emit_json(report.to_json())
    else:
        emit([report.to_markdown()])
    failure = failed_arms(report)
    if failure is not None:
        raise failure
