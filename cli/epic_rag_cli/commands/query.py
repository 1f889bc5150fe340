"""`epic-rag query`: the passages that answer a question."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated

import typer

from epic_rag.errors import BankError
from epic_rag_cli.defaults import DEFAULT_HITS, DEFAULT_TASK
from epic_rag_cli.locate import display_path, find_index
from epic_rag_cli.options import IndexDir, Json, Model
from epic_rag_cli.output import emit, emit_json, message, terminal_width
from epic_rag_cli.text import printable, snippet

if TYPE_CHECKING:
    from rich.text import Text

    from epic_rag_chroma import Hit

__all__ = ["query"]

_INDENT = "    "
_SNIPPET_LINES = 3


def query(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for, in your own words.")],
    k: Annotated[int, typer.Option("-k", "--top-k", metavar="N", min=1, help="How many passages.")] = DEFAULT_HITS,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="The task whose instruction the encoder gets with the query.",
            show_default=f"{DEFAULT_TASK}, or what the bank says",
        ),
    ] = None,
    bank: Annotated[
        str | None,
        typer.Option(
            "--bank",
            metavar="BANK",
            help="Demonstrations: a name from `epic-rag bank list` or a bank folder.",
        ),
    ] = None,
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
    model: Model = None,
    as_json: Json = False,
    index_dir: IndexDir = None,
) -> None:
    """Print the passages that answer a question, best first.

    Each hit has its rank, the cosine between question and passage, the file with first and last line (or the
    page), and the headings above it. Demonstrations of your own change what is found at once, with no new
    index.

    Examples:
        epic-rag query 'how do I undo the last commit?'
        epic-rag query 'undo the last commit' -k 3 --json
        epic-rag query 'undo the last commit' --bank docs --num-demonstrations 4
    """
    if not text.strip():
        raise typer.BadParameter("it is empty", param_hint="'TEXT'")
    if bank is not None and os.path.isfile(bank):
        raise BankError(
            f"{bank} is a file, a bank is a folder; run `epic-rag bank build {bank} --out FOLDER "
            f"--task {task or DEFAULT_TASK}` and give --bank that folder"
        )
    folder = find_index(index_dir)
    from epic_rag_chroma import ChromaIndexer
    from epic_rag_cli.loading import encoder_for

    if task is None and bank is None:
        task = DEFAULT_TASK
    indexer = ChromaIndexer(folder, encoder=encoder_for(model))
    hits = indexer.query(text, k=k, task=task, bank=bank, num_demonstrations=num_demonstrations)
    if as_json:
        emit_json(
            {
                "query": text,
                "index_dir": str(folder),
                "task": task,
                "bank": bank,
                "hits": [dataclasses.asdict(hit) for hit in hits],
            }
        )
    elif hits:
        emit(_lines(hits, text))
    if not hits:
        message("note", f"{folder} holds no passages; run `epic-rag index PATH` to add some")


def location(hit: Hit) -> str:
    """Return where a passage is: `path:first-last`, `path:line`, `path:page 3` or the path alone.

    The path is one that can be opened from the working directory.
    """
    path = display_path(os.path.join(hit.root, hit.path)) if hit.root else hit.path
    if hit.page is not None:
        return f"{path}:page {hit.page}"
    if hit.first_line is None:
        return path
    if hit.last_line is None or hit.last_line == hit.first_line:
        return f"{path}:{hit.first_line}"
    return f"{path}:{hit.first_line}-{hit.last_line}"


def _lines(hits: list[Hit], text: str) -> list[Text]:
    import textwrap

    from rich.text import Text

    width = terminal_width() - len(_INDENT)
    rank_width = len(str(hits[-1].rank))
    lines = []
    for hit in hits:
        # Text objects, never markup: "[red]" in a document is four letters in brackets.
        line = Text()
        line.append(f"{hit.rank:>{rank_width}}  ", style="dim")
        line.append(f"{hit.score:.3f}  ", style="green")
        line.append(printable(location(hit)), style="bold cyan")
        if hit.heading_path:
            line.append("  " + printable(" > ".join(hit.heading_path)), style="magenta")
        lines.append(line)
        shown = snippet(hit.text, text, width * _SNIPPET_LINES - 10)
        wrapped = textwrap.wrap(shown, width, break_on_hyphens=False)
        lines.extend(Text(_INDENT + part) for part in wrapped)
        if hit is not hits[-1]:
            lines.append(Text())
    return lines
