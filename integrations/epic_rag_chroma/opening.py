"""Opening an index for writing: its collection, rows and words, mended or made again where they must be."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from epic_rag.errors import ChromaServerError
from epic_rag_chroma.folder import BROKEN_FOLDER, CHROMA_FOLDER
from epic_rag_chroma.graph import graph_fits
from epic_rag_chroma.keywords import KeywordIndex
from epic_rag_chroma.manifest import IndexState, Manifest
from epic_rag_chroma.records import RecordStore, RecordsUnavailableError
from epic_rag_chroma.running import Running, is_running
from epic_rag_chroma.server import is_in_doubt
from epic_rag_chroma.writer import IndexWriter, chroma_errors, recover

if TYPE_CHECKING:
    from epic_rag_chroma.store import ChunkStore

__all__ = ["open_for_writing"]

logger = logging.getLogger(__name__)

# How often a run makes a server's collection again before it says that the server is of no use.
_REMAKES = 5


def open_for_writing(index_dir: Path, state: IndexState, torn: frozenset[str]) -> tuple[IndexWriter, Manifest]:
    """What to write to and what it holds; made anew, or mended, where they must be."""
    store = _open_collection(index_dir, state, torn)
    if store is None:
        return _make_collection(index_dir, state, torn)
    writer = _writer(index_dir, state, store, RecordStore.open, torn)
    try:
        manifest = Manifest.load(index_dir)
        with chroma_errors(index_dir):
            rows, stored = writer.records.count(), store.count()
        if (
            is_running(index_dir)
            or manifest is None
            or not manifest.complete
            or manifest.collection != store.id
            or not manifest.chunks == rows == stored == writer.keywords.count()
        ):
            if rows == 0 and stored > 0:
                writer.fill_records()
            manifest = recover(writer.records, store.id)
            writer.reconcile()
    except BaseException:
        writer.close()
        raise
    return writer, manifest


def _writer(
    index_dir: Path,
    state: IndexState,
    store: ChunkStore,
    open_records: Callable[[Path, str], RecordStore],
    torn: frozenset[str],
) -> IndexWriter:
    records: RecordStore | None = None
    try:
        records = open_records(index_dir, store.id)
        keywords = KeywordIndex.open(index_dir, store.id)
    except BaseException:
        if records is not None:
            records.close()
        store.close()
        raise
    if state.chroma is None:
        return IndexWriter(index_dir, store, records, keywords, Running(index_dir, store.id, torn))
    running = Running(index_dir, store.id, torn, on_server=True)
    return IndexWriter(index_dir, store, records, keywords, running, partial(_remade, index_dir, state, torn))


def _remade(
    index_dir: Path, state: IndexState, torn: frozenset[str], collection: str, error: ChromaServerError
) -> IndexWriter:
    """Make another collection on a server from the rows of one whose graph is in doubt.

    Args:
        index_dir: The index folder.
        state: The index.
        torn: The ids of those that have been in doubt before.
        collection: Its id.
        error: What raised the doubt; raised again if there is no end to it.
    """
    if len(torn) >= _REMAKES:
        raise error
    logger.warning("%s; its collection is made again from the index's own rows", str(error).partition(";")[0])
    writer, _ = _make_collection(index_dir, replace(state, collection=collection), torn)
    now = IndexState.load(index_dir, any_version=True)
    if now is not None and now.collection == collection:
        replace(now, collection=writer.store.id).save(index_dir)
    return writer


def _open_collection(index_dir: Path, state: IndexState, torn: frozenset[str]) -> ChunkStore | None:
    """The collection that counts; None if there is none, or none that can be used."""
    if state.collection is None:
        return None
    if state.collection in torn or (state.chroma is None and not graph_fits(index_dir, state.collection)):
        logger.warning("Chroma's files were left half written; they are made again from the index's own rows")
        return None
    from epic_rag_chroma.client import WRITER_PATIENCE
    from epic_rag_chroma.store import ChunkStore

    place = state.place(index_dir)
    try:
        store = ChunkStore.open(place, state.collection, patience=WRITER_PATIENCE)
        if store is None:
            if state.chroma is None:
                _set_aside(index_dir)
            return None
        try:
            if store.fingerprint == state.fingerprint:
                store.count()  # makes Chroma read its files
                if state.chroma is not None:
                    store.probe()
                return store
        except BaseException:
            store.close()
            raise
        store.close()
    except ChromaServerError as error:
        if not is_in_doubt(error):
            raise
        logger.warning("%s; its collection is made again from the index's own rows", str(error).partition(";")[0])
    except Exception as error:  # Chroma raises whatever its bindings do
        logger.warning("%s; its collection is made again from the rows", error)
        if state.chroma is None:
            _set_aside(index_dir)
    return None


def _make_collection(index_dir: Path, state: IndexState, torn: frozenset[str]) -> tuple[IndexWriter, Manifest]:
    """A new collection with the rows of the one before, if that had any under the same model."""
    from epic_rag_chroma.store import ChunkStore

    with chroma_errors(index_dir):
        store = ChunkStore.create(
            state.place(index_dir),
            source=state.source,
            model=state.model,
            fingerprint=state.fingerprint,
            truncate_dim=state.truncate_dim,
        )
    before = None
    if state.collection is not None:
        torn |= {state.collection}
        with suppress(RecordsUnavailableError):
            before = RecordStore.open_reading(index_dir, state.collection)
    if before is None:
        writer = _writer(index_dir, state, store, RecordStore.open, torn)
        return writer, Manifest(store.id)
    try:
        writer = _writer(index_dir, state, store, before.copy_to, torn)
    finally:
        before.close()
    try:
        writer.fill_collection()
        return writer, recover(writer.records, store.id)
    except BaseException:
        writer.close()
        raise


def _set_aside(index_dir: Path) -> None:
    """Move Chroma's files out of the way if they are no database; if they are one, they may hold other collections."""
    database = index_dir / CHROMA_FOLDER / "chroma.sqlite3"
    if not database.exists() or (database.is_file() and _is_database(database)):
        return
    broken = index_dir / BROKEN_FOLDER
    shutil.rmtree(broken, ignore_errors=True)
    os.replace(index_dir / CHROMA_FOLDER, broken)
    logger.warning("%s is no database; it was moved to %s", database, broken)


def _is_database(path: Path) -> bool:
    try:
        connection = sqlite3.connect(path)
        try:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
        finally:
            connection.close()
    except sqlite3.OperationalError:
        return True  # locked, or not to be opened now: nothing that a new one would mend
    except sqlite3.DatabaseError:
        return False
