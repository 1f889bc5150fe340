"""`epic-rag mine`: add hard negatives to training pairs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epic_rag_cli.interrupt import Interrupted
from epic_rag_cli.locate import display_path
from epic_rag_cli.options import Json, Model
from epic_rag_cli.output import emit, emit_json, message
from epic_rag_cli.text import plural, printable

if TYPE_CHECKING:
    from epic_rag.training.mining_files import MiningReport

__all__ = ["mine"]


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

    from epic_rag.training.mining import MiningOptions
    from epic_rag.training.mining_files import mine_file

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
