"""`epic-rag query`: the passages that answer a question, many questions, or one after the other."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epic_rag.errors import EpicError
from epic_rag_cli.asking import Asked, Asker
from epic_rag_cli.defaults import DEFAULT_DTYPE, DEFAULT_HITS
from epic_rag_cli.locate import find_index
from epic_rag_cli.options import Bank, Chroma, Device, Dtype, IndexDir, Json, Mode, Model, Strategy, Task
from epic_rag_cli.output import emit, emit_json, message
from epic_rag_cli.text import plural, printable
from epic_rag_cli.usage import usage_error

if TYPE_CHECKING:
    from epic_rag_chroma import Hit
    from epic_rag_cli.batch import BatchQuery

__all__ = ["query"]

_STDIN = "-"
# So many queries are encoded at once, and answered before the next are read by the model.
_BATCH = 256


def query(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT",
            help="What to look for, in your own words; `-` reads it from standard input. Without it, on a terminal: "
            "one query after the other.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--top-k", metavar="N", min=1, help="How many passages.")] = DEFAULT_HITS,
    mode: Mode = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="CONDITION",
            help="Only passages whose metadata satisfies it: 'lang=python', 'kind!=pdf', 'page>=3'; can be repeated.",
        ),
    ] = None,
    path: Annotated[
        list[str] | None,
        typer.Option(
            "--path",
            metavar="PATTERN",
            help="Only files that match, as in .gitignore: 'guide/**', '*.md'; can be repeated, and one must match.",
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="TIME",
            help="Only files that changed since: an age (12h, 7d, 2w) or a date (2026-01-31).",
        ),
    ] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show near-duplicates, too, instead of folding them into the best one.")
    ] = False,
    task: Task = None,
    bank: Bank = None,
    num_demonstrations: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--num-demonstrations",
            metavar="N",
            min=0,
            help="How many demonstrations the encoder sees.",
            show_default="all of --bank, none without it",
        ),
    ] = None,
    strategy: Strategy = None,
    rerank: Annotated[
        str | None,
        typer.Option(
            "--rerank",
            metavar="MODEL",
            help="Put the best passages in order with a cross-encoder: a folder or a Hugging Face name.",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="FILE",
            help='Answer each line {"query": "..."} of a file, or of standard input (`-`); an "id" comes back as '
            "`query_id`.",
        ),
    ] = None,
    open_number: Annotated[
        int | None,
        typer.Option(
            "--open",
            metavar="[N]",
            min=1,
            help="Open hit N (the best without a number) in $VISUAL or $EDITOR at its line; a PDF in its viewer.",
        ),
    ] = None,
    model: Model = None,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = None,
    as_json: Json = False,
    as_json_lines: Annotated[bool, typer.Option("--jsonl", help="Print each hit as one line of JSON.")] = False,
    index_dir: IndexDir = None,
    chroma: Chroma = None,
) -> None:
    """Print the passages that answer a question, best first.

    Each hit has its rank, the numbers that it is ranked by (cosine: question and passage as vectors; bm25: words that
    they share), the file with first and last line or the page, and the headings above it. Near-duplicates are named
    under the best of them. Demonstrations of your own change what is found at once, with no new index.
    Without TEXT on a terminal, queries are typed one after the other and the model stays loaded; `:help` lists what
    can be changed in between.

    Examples:
        epic-rag query 'how do I undo the last commit?'
        epic-rag query 'undo the last commit' -k 3 --json
        epic-rag query 'undo the last commit' --bank docs --num-demonstrations 4
        epic-rag query 'commit' --mode keyword --path '*.md' --since 30d
    """
    if as_json and as_json_lines:
        raise usage_error("--json and --jsonl exclude each other; give one of them")
    if batch is not None and (text is not None or open_number is not None):
        raise usage_error(f"--batch excludes {'TEXT' if text is not None else '--open'}; give one of them")
    if text is None and batch is None and not _is_conversation(as_json or as_json_lines):
        raise usage_error("Missing argument 'TEXT'")
    queries = _read(text, batch)
    asked = Asked(
        k=k,
        task=task,
        bank=bank,
        num_demonstrations=num_demonstrations,
        strategy=strategy,
        mode=mode,
        where=tuple(where or ()),
        paths=tuple(path or ()),
        since=since,
        show_all=show_all,
        rerank=rerank,
    )
    asked.arguments()  # a filter that cannot be understood is found before anything is opened
    if asked.by == "keyword" and bank is not None:
        message("note", "keyword search reads no demonstrations; --bank changes nothing")
    folder = find_index(index_dir)
    from epic_rag_chroma import ChromaIndexer
    from epic_rag_cli.loading import encoder_for, without_collections

    with ChromaIndexer(
        folder, encoder=encoder_for(model, dtype, device), chroma=chroma, dtype=dtype, device=device
    ) as indexer:
        asker = Asker(indexer, folder)
        if not queries:
            from epic_rag_cli.interactive import Session

            Session(asker, indexer.status(), asked).run()
        elif batch is not None:
            _answer_batch(asker, queries, asked, as_json=as_json, as_json_lines=as_json_lines)
        else:
            with without_collections():
                hits = asker.one(queries[0].text, asked)
            _answer(asker, hits, queries[0].text, asked, as_json=as_json, as_json_lines=as_json_lines)
            if open_number is not None and hits:
                _open(hits, open_number)


def _is_conversation(wants_json: bool) -> bool:
    """Whether somebody sits there who can be asked for queries."""
    return not wants_json and all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _read(text: str | None, batch: str | None) -> list[BatchQuery]:
    """Return the queries that are given; none means that they will be typed."""
    from epic_rag_cli.batch import BatchQuery, read_batch, read_stdin

    if batch is not None:
        return read_batch(batch)
    if text is None:
        return []
    said = read_stdin() if text == _STDIN else text
    if not said.strip():
        where = "standard input" if text == _STDIN else "it"
        raise typer.BadParameter(f"{where} is empty", param_hint="'TEXT'")
    return [BatchQuery(said.strip() if text == _STDIN else said)]


def _answer(asker: Asker, hits: list[Hit], text: str, asked: Asked, *, as_json: bool, as_json_lines: bool) -> None:
    if not as_json and not as_json_lines:
        asker.show(hits, text, asked)
        return
    if as_json:
        emit_json(asker.answer(hits, text, asked))
    else:
        _emit_lines(hits, text, {})
    if not hits:
        asker.tell_nothing(asked)


def _answer_batch(
    asker: Asker, queries: Sequence[BatchQuery], asked: Asked, *, as_json: bool, as_json_lines: bool
) -> None:
    answers: list[dict[str, Any]] = []
    for number, (each, hits) in enumerate(_answered(asker, queries, asked)):
        if as_json:
            answers.append({**asker.answer(hits, each.text, asked), "query_id": each.id})
        elif as_json_lines:
            _emit_lines(hits, each.text, {"query_id": each.id})
        else:
            _emit_heading(each, first=number == 0)
            asker.show(hits, each.text, asked)
    if as_json:
        emit_json(answers)


def _answered(asker: Asker, queries: Sequence[BatchQuery], asked: Asked) -> Iterator[tuple[BatchQuery, list[Hit]]]:
    for start in range(0, len(queries), _BATCH):
        part = queries[start : start + _BATCH]
        yield from zip(part, asker.many([each.text for each in part], asked), strict=True)


def _emit_lines(hits: Sequence[Hit], text: str, more: dict[str, Any]) -> None:
    for hit in hits:
        emit_json({"query": text, **more, **dataclasses.asdict(hit)}, one_line=True)


def _emit_heading(each: BatchQuery, *, first: bool) -> None:
    from rich.text import Text

    heading = Text(printable(each.text), style="bold underline")
    if each.id is not None:
        heading = Text(f"{printable(str(each.id))}  ", style="dim") + heading
    emit([heading] if first else [Text(), heading])


def _open(hits: Sequence[Hit], number: int) -> None:
    if number > len(hits):
        raise EpicError(f"there is no hit {number} to open, only {plural(len(hits), 'hit')}; give -k a larger number")
    from epic_rag_cli.editor import open_hit

    open_hit(hits[number - 1])
