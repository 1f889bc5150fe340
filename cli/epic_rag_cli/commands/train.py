"""`epic-rag train`: train an encoder with EPIC."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epic_rag_cli.interrupt import Interrupted
from epic_rag_cli.locate import display_path
from epic_rag_cli.options import Json
from epic_rag_cli.output import emit, emit_json, message
from epic_rag_cli.text import printable

if TYPE_CHECKING:
    from epic_rag.training import Trainer, TrainingConfig

__all__ = ["train"]


def train(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="A YAML or JSON file, or the name of a shipped recipe."),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change a setting, for instance steps=200 or tasks.faq.weight=2; can be repeated.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="The run's folder.", show_default="the configuration's output"
        ),
    ] = None,
    no_resume: Annotated[
        bool,
        typer.Option("--no-resume", help="Start afresh; checkpoints of an earlier run in the folder are deleted."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train an encoder and print the folder of the result.

    A run that was interrupted goes on from its newest checkpoint when the same command is run again. Where the
    configuration names no model, training starts from the one in EPIC_RAG_MODEL, or from the default one.
    docs/training.md explains every setting and how to train on pairs of your own; the examples train on
    pairs.jsonl in the working directory.

    Examples:
        epic-rag train own-data --set data=. --set 'tasks=[pairs]'
        epic-rag train own-data --set data=. --set 'tasks=[pairs]' --set steps=20 -o runs/quick --json
    """
    from epic_rag.checkpoints import DEFAULT_CHECKPOINT
    from epic_rag.training import Trainer, load_recipe

    run = load_recipe(
        config,
        settings or (),
        output=None if output is None else str(output),
        default_model=os.environ.get("EPIC_RAG_MODEL") or DEFAULT_CHECKPOINT,
    )
    trainer: Trainer | None = None
    try:
        with _notes():
            trainer = Trainer(run)
            final = trainer.train(resume=not no_resume, show_progress=sys.stderr.isatty())
    except KeyboardInterrupt:
        raise Interrupted(_interrupted_line(run, trainer)) from None
    if not trainer.world.is_main:
        # One of several processes of a run; the first one speaks for all.
        return
    if as_json:
        losses = [entry["loss"] for entry in trainer.metrics if "loss" in entry]
        emit_json({"checkpoint": str(final), "steps": trainer.step, "loss": losses[-1] if losses else None})
    else:
        emit([printable(str(final))])


class _Notes(logging.Handler):
    """Prints what the trainer reports as notes, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        # What is more serious is printed for all of epic-rag already.
        if record.levelno < logging.WARNING:
            with tqdm.external_write_mode(file=sys.stderr):
                message("note", record.getMessage())


@contextmanager
def _notes() -> Iterator[None]:
    logger = logging.getLogger("epic_rag.training")
    handler, level = _Notes(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _interrupted_line(run: TrainingConfig, trainer: Trainer | None) -> str:
    from epic_rag.training import latest_checkpoint

    at = f"interrupted at step {trainer.step} of {run.steps}" if trainer is not None else "interrupted"
    newest = latest_checkpoint(Path(run.output))
    if newest is None:
        return f"{at}; nothing was saved, save_every is {run.save_every}; run the command again to start over"
    return f"{at}; {display_path(newest)} is good; run the command again without --no-resume to go on from it"
