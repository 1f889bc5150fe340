"""`epic-rag status`: what an index holds."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from epic_rag.errors import EpicError
from epic_rag_cli.options import Chroma, IndexDir, Json
from epic_rag_cli.results import display_path, find_index
from epic_rag_cli.terminal import columns, emit, emit_json, message, plural, printable, size

if TYPE_CHECKING:
    from epic_rag_chroma import IndexStatus

__all__ = ["clear", "status"]


_STATES = {
    "running": "a run of `epic-rag index` goes on; what it has stored can be found already",
    "interrupted": "the last run did not end; what it stored can be found, and `epic-rag index` goes on from there",
}


def status(index_dir: IndexDir = None, chroma: Chroma = None, as_json: Json = False) -> None:
    """Show what an index holds.

    Its model and settings, the folders it covers, the number of files and passages, its size and the last
    run. Nothing is loaded for it, and no Chroma server is asked.

    Examples:
        epic-rag status
        epic-rag status --index-dir docs/.epic-rag --json
    """
    folder = find_index(index_dir)
    from epic_rag_chroma import ChromaIndexer

    state = ChromaIndexer(folder, chroma=chroma).status()
    if as_json:
        emit_json(dataclasses.asdict(state))
        return
    rows = [
        ("index", state.index_dir),
        *((("chroma", state.chroma),) if state.chroma else ()),
        *(("root", root) for root in state.roots),
        ("model", f"{state.model} ({state.fingerprint}, {state.dimension} dimensions)"),
        ("files", f"{state.files:,}"),
        *((("kinds", _kinds(state)),) if state.kinds else ()),
        ("passages", f"{state.chunks:,} of at most {state.settings.chunk_tokens} tokens"),
        *(("include", pattern) for pattern in state.settings.include),
        *(("exclude", pattern) for pattern in state.settings.exclude),
        *((("links", "followed"),) if state.settings.follow_links else ()),
        ("size", size(state.size_bytes)),
        ("updated", state.updated_at or "never"),
        *((("last run", _last_run(state.last_run)),) if state.last_run else ()),
        *((("state", _STATES[state.state]),) if state.state in _STATES else ()),
    ]
    emit(columns(rows, styles=("bold",)))


def _kinds(state: IndexStatus) -> str:
    """Return how many files of each kind there are, the most frequent first."""
    counted = sorted(state.kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {kind}" for kind, count in counted)


def _last_run(counts: dict[str, float]) -> str:
    # An index of another version may have noted other counts.
    words = ("added", "changed", "renamed", "deleted", "unchanged", "skipped")
    parts = [f"{int(counts[word]):,} {word}" for word in words if counts.get(word)]
    embedded = plural(int(counts.get("chunks_embedded", 0)), "passage")
    return f"{', '.join(parts) or 'nothing to do'}; {embedded} embedded in {counts.get('seconds', 0.0):.1f} s"


# --- from clear
# `epic-rag clear`: delete an index.


def clear(
    index_dir: IndexDir = None,
    chroma: Chroma = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete an index. The documents themselves are not touched.

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
        if not sys.stdin.isatty():
            raise EpicError(
                f"{shown} holds {state.chunks:,} passages of {state.files:,} files, and here is nobody to ask; "
                "run `epic-rag clear --yes` to delete it"
            )
        typer.confirm(f"Delete {shown} ({state.chunks:,} passages of {state.files:,} files)?", abort=True, err=True)
    indexer.clear()
    message("note", f"deleted {shown}")
