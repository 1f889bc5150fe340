"""`epic-rag status` and `epic-rag clear`: show an index, or delete it."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from epic_rag.errors import EpicError
from epic_rag_cli.options import Chroma, ConfigFile, IndexDir, IndexDirs, Json, Quiet, Verbose
from epic_rag_cli.results import display_path, find_index, find_indexes
from epic_rag_cli.terminal import columns, emit, emit_json, message, plural, printable, size

if TYPE_CHECKING:
    from rich.text import Text

    from epic_rag_chroma import IndexStatus

__all__ = ["clear", "status"]

_STATES = {
    "running": "`epic-rag index` is running; what it has stored is searchable",
    "interrupted": "the last run was interrupted; what it stored is searchable, and `epic-rag index` continues it",
}
_COUNTS = ("added", "changed", "renamed", "deleted", "unchanged", "skipped")


def status(
    index_dir: IndexDirs = None,
    chroma: Chroma = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="PATH_OR_URL", help="Show the vectors and the last run of `epic-rag index --to` instead."
        ),
    ] = None,
    as_json: Json = False,
    config_file: ConfigFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what an index holds.

    Its model and settings, the folders it covers, the number of files and chunks, its size and the last run. No model
    is loaded, and no Chroma server is contacted.

    Examples:
        epic-rag status
        epic-rag status --index-dir docs/.epic-rag --json
        epic-rag status --index-dir docs --index-dir notes
        epic-rag status --to vectors
    """
    if to is not None:
        from epic_rag_cli.pipeline import show_run

        show_run(to, as_json=as_json)
        return
    from epic_rag_chroma import ChromaIndexer

    states = [ChromaIndexer(folder, chroma=chroma).status() for folder in find_indexes(index_dir)]
    if as_json:
        answers = [dataclasses.asdict(state) for state in states]
        emit_json(answers if len(answers) > 1 else answers[0])
        return
    for number, state in enumerate(states):
        emit([*([""] if number else []), *_table(state)])


def _table(state: IndexStatus) -> list[Text]:
    settings = state.settings
    rows = [("index", state.index_dir)]
    if state.chroma:
        rows.append(("chroma", state.chroma))
    rows += [("root", root) for root in state.roots]
    if state.parts is not None:
        rows.append(("parquet", state.parts))
    rows.append(("model", f"{state.model} ({state.fingerprint}, {state.dimension} dimensions)"))
    rows.append(("files", f"{state.files:,}"))
    if state.kinds:
        kinds = sorted(state.kinds.items(), key=lambda item: (-item[1], item[0]))
        rows.append(("kinds", ", ".join(f"{count:,} {kind}" for kind, count in kinds)))
    rows.append(("chunks", f"{state.chunks:,} of at most {settings.chunk_tokens} tokens"))
    rows += [("include", pattern) for pattern in settings.include]
    rows += [("exclude", pattern) for pattern in settings.exclude]
    if settings.follow_links:
        rows.append(("links", "followed"))
    rows.append(("size", size(state.size_bytes)))
    rows.append(("updated", state.updated_at or "never"))
    if run := state.last_run:
        counts = ", ".join(f"{int(run[word]):,} {word}" for word in _COUNTS if run.get(word)) or "nothing to do"
        embedded = plural(int(run.get("chunks_embedded", 0)), "chunk")
        rows.append(("last run", f"{counts}; {embedded} embedded in {run.get('seconds', 0.0):.1f} s"))
    if state.state in _STATES:
        rows.append(("state", _STATES[state.state]))
    return columns(rows, styles=("bold",))


def clear(
    index_dir: IndexDir = None,
    chroma: Chroma = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    config_file: ConfigFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Delete an index. The documents themselves stay.

    Examples:
        epic-rag clear --yes
        epic-rag clear --index-dir docs/.epic-rag --yes
    """
    folder = find_index(index_dir)
    from epic_rag_chroma import ChromaIndexer

    indexer = ChromaIndexer(folder, chroma=chroma)
    shown = printable(display_path(folder))
    if not yes:
        state = indexer.status()
        content = f"{shown} ({plural(state.chunks, 'chunk')} of {plural(state.files, 'file')})"
        if not sys.stdin.isatty():
            raise EpicError(f"Refusing to delete {content}: standard input is not a terminal. Pass --yes.")
        typer.confirm(f"Delete {content}?", abort=True, err=True)
    indexer.clear()
    message("note", f"Deleted {shown}.")
