"""`epic-rag clear`: delete an index."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from epic_rag.errors import EpicError
from epic_rag_cli.locate import display_path, find_index
from epic_rag_cli.options import Chroma, IndexDir
from epic_rag_cli.output import message
from epic_rag_cli.text import printable

__all__ = ["clear"]


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
