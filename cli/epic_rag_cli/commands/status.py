"""`epic-rag status`: what an index holds."""

from __future__ import annotations

import dataclasses

from epic_rag_cli.locate import find_index
from epic_rag_cli.options import IndexDir, Json
from epic_rag_cli.output import columns, emit, emit_json
from epic_rag_cli.text import size

__all__ = ["status"]


def status(index_dir: IndexDir = None, as_json: Json = False) -> None:
    """Show what an index holds.

    Its model and settings, the folders it covers, the number of files and passages, its size and the last
    run.

    Examples:
        epic-rag status
        epic-rag status --index-dir docs/.epic-rag --json
    """
    folder = find_index(index_dir)
    from epic_rag_chroma import ChromaIndexer

    state = ChromaIndexer(folder).status()
    if as_json:
        emit_json(dataclasses.asdict(state))
        return
    rows = [
        ("index", state.index_dir),
        *(("root", root) for root in state.roots),
        ("model", f"{state.model} ({state.fingerprint}, {state.dimension} dimensions)"),
        ("files", f"{state.files:,}"),
        ("passages", f"{state.chunks:,} of at most {state.settings.chunk_tokens} tokens"),
        *(("include", pattern) for pattern in state.settings.include),
        *(("exclude", pattern) for pattern in state.settings.exclude),
        ("size", size(state.size_bytes)),
        ("updated", state.updated_at or "never"),
    ]
    emit(columns(rows, styles=("bold",)))
