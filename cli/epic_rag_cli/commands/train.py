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

from epic_rag_cli.options import Json, Model
from epic_rag_cli.results import display_path
from epic_rag_cli.terminal import Interrupted, emit, emit_json, message, plural, printable

if TYPE_CHECKING:
    from epic_rag.training import Trainer, TrainingConfig
    from epic_rag.training.mining import MiningReport

__all__ = ["mine", "train"]


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


# --- from mine
# `epic-rag mine`: add hard negatives to training pairs.


def mine(
    pairs: Annotated[
        Path,
        typer.Argument(metavar="PAIRS", help='Lines {"query": "...", "positive": "..."}: a .jsonl or .jsonl.gz file.'),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="The file to write; gzipped if it ends in .gz."),
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="Rank by words (bm25), by the model's vectors (dense), or take from both in turn (both).",
        ),
    ] = "both",
    model: Model = None,
    negatives: Annotated[
        int,
        typer.Option(
            "--negatives",
            "-n",
            metavar="N",
            help="How many negatives a row should have; those that it has already are kept and count.",
        ),
    ] = 7,
    depth: Annotated[
        int, typer.Option("--depth", metavar="N", help="How many places of a ranking are looked at.")
    ] = 100,
    skip_top: Annotated[
        int, typer.Option("--skip-top", metavar="N", help="Pass over the first N places of a ranking.")
    ] = 0,
    margin: Annotated[
        float,
        typer.Option(
            "--margin",
            metavar="SHARE",
            help="Leave out passages that the model scores above this share of the positive's score: many of them "
            "are answers, too.",
        ),
    ] = 0.95,
    absolute_margin: Annotated[
        float | None,
        typer.Option(
            "--absolute-margin",
            metavar="X",
            help="Leave out passages that the model scores above the positive's score minus X, too.",
        ),
    ] = None,
    no_margin: Annotated[
        bool,
        typer.Option("--no-margin", help="Leave out none for its score. With bm25, no model is needed then."),
    ] = False,
    sampling: Annotated[
        str,
        typer.Option("--sampling", metavar="NAME", help="Take the best of the rest (top), or draw among it (random)."),
    ] = "top",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the draws.")] = 0,
    corpus: Annotated[
        Path | None,
        typer.Option(
            "--corpus",
            metavar="FILE",
            help='Take negatives from here: lines {"text": "..."}, with a "title" if there is one.',
            show_default="the positives of PAIRS",
        ),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            "--instruction",
            metavar="TEXT",
            help="What to retrieve for a query.",
            show_default="from instructions.json beside PAIRS, or the model's own",
        ),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Encode passages like queries, for a task that is symmetric.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add hard negatives to a file of training pairs, and print the file written.

    Hard negatives are passages that look like the answer and are not. They come from the other rows' positives
    or from --corpus. A row's own positive, positives of rows with its query or group, the query itself, and
    passages with the text of one of these never become its negatives.

    Examples:
        epic-rag mine pairs.jsonl --out mined.jsonl
        epic-rag mine pairs.jsonl --out mined.jsonl.gz --method bm25 --no-margin --sampling random --json
    """
    if no_margin and absolute_margin is not None:
        raise typer.BadParameter("--absolute-margin is a margin; give one of the two", param_hint="'--no-margin'")

    from epic_rag.training.mining import MiningOptions, mine_file

    options = MiningOptions(
        method=method,
        negatives=negatives,
        depth=depth,
        skip_top=skip_top,
        margin=None if no_margin else margin,
        absolute_margin=absolute_margin,
        sampling=sampling,
        seed=seed,
        symmetric=symmetric,
        instruction=instruction,
    )
    try:
        report = mine_file(pairs, out, options, model=model, corpus=corpus, show_progress=sys.stderr.isatty())
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {display_path(out)} is what it was before; run the command again to start over"
        ) from None
    message("note", _line(report, negatives))
    if as_json:
        emit_json({"file": str(out), **report.to_dict()})
    else:
        emit([printable(str(out))])


def _line(report: MiningReport, wanted: int) -> str:
    return (
        f"{plural(report.rows, 'row')}, {plural(report.mined, 'negative')} added from "
        f"{plural(report.documents, 'passage')}; {plural(report.short, 'row')} with fewer than {wanted}; "
        f"{report.dropped_share:.1%} of {plural(report.candidates, 'candidate')} left out as likely false negatives"
    )
