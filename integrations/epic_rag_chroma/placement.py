"""Moving an index: from its folder to a server, from one server to another, and back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from epic_rag.errors import ChromaServerError, IndexStateError
from epic_rag_chroma.checks import check_place
from epic_rag_chroma.folder import CHROMA_FOLDER
from epic_rag_chroma.known_servers import require_known
from epic_rag_chroma.server import ChromaServer, ServerPlace, new_place

if TYPE_CHECKING:
    from epic_rag_chroma.manifest import IndexState

__all__ = ["leave", "place_for_writing"]

logger = logging.getLogger(__name__)


def place_for_writing(
    index_dir: Path,
    old: IndexState | None,
    asked: ChromaServer | str | None,
    paths: Sequence[Path],
    *,
    rebuild: bool,
) -> ServerPlace | None:
    """Where a run of the indexer stores vectors: a place on a server, or None for the index folder.

    A server that has moved, or is reached by another name now, is followed: what tells is that the other address has
    the index's collection.

    Args:
        index_dir: The index folder.
        old: The index, if there is one.
        asked: What `asked_server` says.
        paths: What is to be indexed, for the message.
        rebuild: Whether the index is made anew, which is the time to move it.

    Raises:
        IndexMismatchError: If the index is elsewhere and is not made anew.
        ChromaServerError: If the server cannot be used; better known now than after a model has been loaded.
    """
    # Where nothing has been stored, an address may be corrected.
    if old is not None and old.collection is not None and not rebuild:
        if isinstance(asked, ChromaServer) and old.chroma is not None and asked != old.chroma.server:
            moved = replace(old.chroma, server=asked)
            require_known(index_dir, asked, is_named=True)
            if _has(moved, old.collection):
                logger.info("the index's collection is on %s now", moved)
                return moved
        check_place(index_dir, old, asked, paths)
    place = new_place(asked, None if old is None else old.chroma, is_new=old is None)
    if place is not None:
        require_known(index_dir, place.server, is_named=asked is not None)
        from epic_rag_chroma.client import ServerClient

        ServerClient(place.server).close()
    return place


def leave(index_dir: Path, old: IndexState | None, new: ServerPlace | None) -> None:
    """Delete what an index has where it no longer is.

    Args:
        index_dir: The index folder.
        old: The index before the run.
        new: Where it is now.
    """
    if new is not None:
        with suppress(FileNotFoundError):
            shutil.rmtree(index_dir / CHROMA_FOLDER)
    place = None if old is None else old.chroma
    if place is None or (new is not None and new.index_id == place.index_id):
        return
    from epic_rag_chroma.store import ChunkStore

    try:
        require_known(index_dir, place.server, is_named=False)
        ChunkStore.delete_all(place)
    except (ChromaServerError, IndexStateError) as error:
        logger.warning("the old collections of the index with the id %s stay: %s", place.index_id, error)


def _has(place: ServerPlace, collection: str | None) -> bool:
    from epic_rag_chroma.store import ChunkStore

    store = ChunkStore.open(place, collection)
    if store is None:
        return False
    store.close()
    return True
