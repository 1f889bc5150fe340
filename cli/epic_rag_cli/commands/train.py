"""`epic-rag train` and `epic-rag mine`: train an encoder, and add hard negatives to training pairs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epic_rag_cli.options import Json, Model, Quiet, Verbose
from epic_rag_cli.results import display_path
from epic_rag_cli.terminal import Interrupted, emit, emit_json, message, plural, printable, usage_error

if TYPE_CHECKING:
    from epic_rag.training import Trainer, TrainingConfig

__all__ = ["mine", "train"]


def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML or JSON file, the name of a shipped recipe, or `reader` to fit a reader of demonstrations.",
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Override a setting, for instance steps=200 or tasks.faq.weight=2; can be repeated.",
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
        typer.Option("--no-resume", help="Start over and delete the checkpoints of an earlier run in the folder."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="With `reader`: a name from `epic-rag models`, a checkpoint folder or a Hugging Face name.",
            show_default="EPIC_RAG_MODEL, or the default model",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="PATH", help="With `reader`: a file of pairs, or a folder of them."),
    ] = None,
    exclude: Annotated[
        str | None,
        typer.Option("--exclude", metavar="NAME,...", help="With `reader`: files and sources to leave out."),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option("--cache-dir", metavar="DIR", help="With `reader`: keep vectors here; a later run continues."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train an encoder and print the folder of the result.

    The same command resumes an interrupted run from its newest checkpoint. If the configuration has no model,
    training starts from the model of EPIC_RAG_MODEL or the default model. docs/training.md explains every setting and
    how to train on your own pairs; the examples train on pairs.jsonl in the working directory.

    Examples:
        epic-rag train own-data --set data=. --set 'tasks=[pairs]'
        epic-rag train own-data --set data=. --set 'tasks=[pairs]' --set steps=20 -o runs/quick --json
    """
    if config == "reader":
        if settings or no_resume:
            raise usage_error("`train reader` takes neither --set nor --no-resume. Leave them out.")
        _train_reader(model or os.environ.get("EPIC_RAG_MODEL") or None, data, exclude, cache_dir, output, as_json)
        return
    given = {"--model": model, "--data": data, "--exclude": exclude, "--cache-dir": cache_dir}
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise usage_error(f"{wrong[0]} belongs to `epic-rag train reader`. Use --set for a recipe.")
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
        return
    if as_json:
        losses = [entry["loss"] for entry in trainer.metrics if "loss" in entry]
        emit_json({"checkpoint": str(final), "steps": trainer.step, "loss": losses[-1] if losses else None})
    else:
        emit([printable(str(final))])


def _train_reader(
    model: str | None, data: Path | None, exclude: str | None, cache: Path | None, output: Path | None, as_json: bool
) -> None:
    """Fit a reader and write it into `output`, or into the model's folder if that is the user's own."""
    from tqdm.auto import tqdm

    from epic_rag import EpicEncoder
    from epic_rag.checkpoints import is_shipped, resolve
    from epic_rag.embedding_model import is_remote, split_onnx
    from epic_rag.training.reader_training import ReaderTrainingOptions, train_reader

    if data is None:
        raise usage_error("`train reader` needs pairs. Pass --data FILE or FOLDER.")
    if output is None and is_remote(model):
        raise usage_error("A remote model has no folder. Pass --output DIR, and put ?reader=DIR behind its name.")
    onnx = split_onnx(model)
    if output is None and is_shipped(resolve(model if onnx is None else onnx[0])):
        raise usage_error("A shipped model stays as it is. Pass --output DIR for the reader.")
    encoder = EpicEncoder.from_pretrained(model, dtype="auto")
    with tqdm(disable=not sys.stderr.isatty()) as bar:

        def progress(stage: str, done: int, total: int) -> None:
            if done <= 1:
                bar.reset(total)
                bar.set_description(stage)
            bar.update(done - bar.n)

        try:
            reader, record = train_reader(
                encoder,
                data,
                ReaderTrainingOptions(),
                excluded=[] if exclude is None else [name.strip() for name in exclude.split(",")],
                cache=cache,
                progress=progress,
            )
        except KeyboardInterrupt:
            raise Interrupted(
                "Interrupted. Run the same command again; with --cache-dir, embedded tasks are kept."
            ) from None
    target = encoder.folder if output is None else output
    assert target is not None  # only a remote model has no folder
    target.mkdir(parents=True, exist_ok=True)
    file = reader.save(target)
    if as_json:
        emit_json({"reader": str(file), **record})
    else:
        emit([printable(str(file))])


class _Notes(logging.Handler):
    """Log handler that prints the trainer's records as notes, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        # Warnings and errors are printed by the handler of all packages.
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

    at = f"Interrupted at step {trainer.step} of {run.steps}." if trainer is not None else "Interrupted."
    newest = latest_checkpoint(Path(run.output))
    if newest is None:
        return f"{at} Nothing was saved (save_every is {run.save_every}). Run the same command again to start over."
    return f"{at} {display_path(newest)} is complete. Run the command again without --no-resume to continue from it."


def mine(
    pairs: Annotated[
        Path,
        typer.Argument(metavar="PAIRS", help='Lines {"query": "...", "positive": "..."}: a .jsonl or .jsonl.gz file.'),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="The file to write; gzipped if it ends in .gz."),
    ],
    model: Model = None,
    negatives: Annotated[
        int,
        typer.Option(
            "--negatives",
            "-n",
            metavar="N",
            help="Negatives per row. Existing ones are kept and count.",
        ),
    ] = 7,
    depth: Annotated[int, typer.Option("--depth", metavar="N", help="Candidates of a ranking.")] = 100,
    skip_top: Annotated[
        int, typer.Option("--skip-top", metavar="N", help="Skip the first N candidates of a ranking.")
    ] = 0,
    margin: Annotated[
        float,
        typer.Option(
            "--margin",
            metavar="SHARE",
            help="Drop candidates that score above this share of the positive's score, as likely false negatives.",
        ),
    ] = 0.95,
    absolute_margin: Annotated[
        float | None,
        typer.Option(
            "--absolute-margin",
            metavar="X",
            help="Also drop candidates that score above the positive's score minus X.",
        ),
    ] = None,
    no_margin: Annotated[
        bool,
        typer.Option("--no-margin", help="Drop no candidate for its score."),
    ] = False,
    sampling: Annotated[
        str,
        typer.Option(
            "--sampling",
            metavar="NAME",
            help="Choice among the remaining candidates: the best (top) or a random draw (random).",
        ),
    ] = "top",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the draws.")] = 0,
    corpus: Annotated[
        Path | None,
        typer.Option(
            "--corpus",
            metavar="FILE",
            help='More candidates: a file of lines {"text": "..."}, optionally with "title".',
            show_default="the positives of PAIRS only",
        ),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            "--instruction",
            metavar="TEXT",
            help="The instruction: what to retrieve for a query.",
            show_default="from instructions.json beside PAIRS, or the model's own",
        ),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Encode passages like queries, for a symmetric task.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Add hard negatives to a file of training pairs, and print the file written.

    Hard negatives are passages that resemble the answer but do not answer the query. They come from the other rows'
    positives and from --corpus. Never negatives of a row are its positive, positives of rows with the same query or
    group, the query itself, and passages with the same text as one of these.

    Examples:
        epic-rag mine pairs.jsonl --out mined.jsonl
        epic-rag mine pairs.jsonl --out mined.jsonl.gz --margin 0.9 --sampling random --json
    """
    if no_margin and absolute_margin is not None:
        raise usage_error("--no-margin and --absolute-margin exclude each other. Use one of them.")

    from epic_rag.training.mining import MiningOptions, mine_file

    options = MiningOptions(
        negatives=negatives,
        depth=depth,
        skip_top=skip_top,
        margin=None if no_margin else margin,
        absolute_margin=absolute_margin,
        sampling=sampling,  # type: ignore[arg-type]  # checked there
        seed=seed,
        symmetric=symmetric,
        instruction=instruction,
    )
    try:
        report = mine_file(pairs, out, options, model=model, corpus=corpus, show_progress=sys.stderr.isatty())
    except KeyboardInterrupt:
        raise Interrupted(
            f"Interrupted. {display_path(out)} is unchanged. Run the same command again to start over."
        ) from None
    message(
        "note",
        f"{plural(report.rows, 'row')}, {plural(report.mined, 'negative')} added from "
        f"{plural(report.documents, 'passage')}, {plural(report.short, 'row')} with fewer than {negatives}.",
    )
    if as_json:
        emit_json({"file": str(out), **report.to_dict()})
    else:
        emit([printable(str(out))])
