"""Write an index: the rows in SQLite, Chroma's collection, and the keyword index, kept equal.

The rows are written first, in transactions, and the other two follow from them. After a crash, or when one of the
others was lost, `IndexWriter.reconcile` makes them equal to the rows again, without a model. `IndexWriter.open` opens
an index for writing and repairs it where needed: a collection whose files may be corrupt is replaced by a new one that
is filled from the rows.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from epic_rag.errors import EpicError
from epic_rag_chroma.errors import ChromaServerError, IndexStateError
from epic_rag_chroma.store.database import Record, RecordStore, RecordsUnavailableError
from epic_rag_chroma.store.hnsw_files import delete_orphaned_graphs, hnsw_files_fit
from epic_rag_chroma.store.keyword_index import KeywordIndex
from epic_rag_chroma.store.layout import BROKEN_FOLDER
from epic_rag_chroma.store.lock import DirtyMarker, is_dirty
from epic_rag_chroma.store.paths import CHROMA_FOLDER, DocumentKey
from epic_rag_chroma.store.server import may_be_corrupt
from epic_rag_chroma.store.state import Entry, IndexState, Manifest

if TYPE_CHECKING:
    from epic_rag_chroma.store.collection import ChunkStore

__all__ = ["IndexWriter", "manifest_from_rows"]

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 500
# A run replaces the collection on a server at most so often.
_MAX_REPLACEMENTS = 5


class IndexWriter:
    """Writes chunks to rows, collection and keyword index, and marks the index as dirty before the first write.

    On a server, which may be restarted at any time, a collection that may be corrupt is replaced during the run.

    Args:
        index_dir: The index folder.
        state: The index.
        corrupt: Ids of collections whose files may be corrupt.
        store: The collection.
        open_rows: Opens or creates the rows of a collection in the index folder.
    """

    def __init__(
        self,
        index_dir: Path,
        state: IndexState,
        corrupt: frozenset[str],
        store: ChunkStore,
        open_rows: Callable[[Path, str], RecordStore],
    ) -> None:
        self._index_dir = index_dir
        self._state = state
        self._corrupt = corrupt
        self.store = store
        rows: RecordStore | None = None
        try:
            self.rows = rows = open_rows(index_dir, store.id)
            self.keywords = KeywordIndex.open(index_dir, store.id)
        except BaseException:
            if rows is not None:
                rows.close()
            store.close()
            raise
        self._marker = DirtyMarker(index_dir, store.id, corrupt, on_server=state.chroma is not None)
        self._replaced_rows: list[RecordStore] = []

    @classmethod
    def open(cls, index_dir: Path, state: IndexState, corrupt: frozenset[str]) -> tuple[IndexWriter, Manifest]:
        """Open an index for writing, and repair or replace missing and corrupt parts.

        Returns:
            The writer, and the manifest of the index.
        """
        store = _open_collection(index_dir, state, corrupt)
        if store is None:
            return cls._create(index_dir, state, corrupt)
        writer = cls(index_dir, state, corrupt, store, RecordStore.open)
        try:
            manifest = Manifest.load(index_dir)
            with _chroma_errors(index_dir):
                rows, stored = writer.rows.count(), store.count()
            if (
                is_dirty(index_dir)
                or manifest is None
                or not manifest.complete
                or manifest.collection != store.id
                or not manifest.chunks == rows == stored == writer.keywords.count()
            ):
                if rows == 0 and stored > 0:
                    # The row file was lost: copy the rows from the collection.
                    writer.begin()
                    for page in store.pages():
                        writer.rows.write([Record(*row) for row in page if _is_ours(row[2])])
                manifest = manifest_from_rows(writer.rows, store.id)
                writer.reconcile()
        except BaseException:
            writer.close()
            raise
        return writer, manifest

    @classmethod
    def _create(cls, index_dir: Path, state: IndexState, corrupt: frozenset[str]) -> tuple[IndexWriter, Manifest]:
        """Create a collection, with the rows of the previous one if there is one."""
        from epic_rag_chroma.store.collection import ChunkStore

        with _chroma_errors(index_dir):
            store = ChunkStore.create(
                state.place(index_dir),
                source=state.source,
                model=state.model,
                fingerprint=state.fingerprint,
                truncate_dim=state.truncate_dim,
            )
        previous = None
        if state.collection is not None:
            corrupt |= {state.collection}
            with suppress(RecordsUnavailableError):
                previous = RecordStore.open_reading(index_dir, state.collection)
        if previous is None:
            return cls(index_dir, state, corrupt, store, RecordStore.open), Manifest(store.id)
        try:
            writer = cls(index_dir, state, corrupt, store, previous.copy_to)
        finally:
            previous.close()
        try:
            writer.begin()
            for records in writer.rows.pages():
                writer._write_collection(records)
            writer.keywords.delete(sorted(writer.keywords.ids()))
            for records in writer.rows.pages():
                writer._write_keywords(records)
            return writer, manifest_from_rows(writer.rows, store.id)
        except BaseException:
            writer.close()
            raise

    def begin(self) -> None:
        """Mark the index as dirty, before anything differs from the manifest."""
        self._marker.begin()

    def end(self) -> None:
        """Mark the index as clean: everything is written."""
        self.rows.drop_tombstones()
        self._marker.end()

    def write(self, records: Sequence[Record]) -> None:
        """Store chunks; existing ones are replaced."""
        if not records:
            return
        self.begin()
        self.rows.write(records)
        self._write_collection(records)
        self._write_keywords(records)

    def update_metadata(self, ids: Sequence[str], metadatas: Sequence[dict[str, Any]]) -> None:
        """Change the metadata of chunks; texts, vectors and keywords stay."""
        if not ids:
            return
        self.begin()
        self.rows.update_metadata(ids, metadatas)
        with self._collection_write():
            self.store.update_metadata(ids, metadatas)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete chunks."""
        if not ids:
            return
        self.begin()
        self.rows.delete(ids)
        with self._collection_write():
            self.store.delete(ids)
        self.keywords.delete(ids)

    def reconcile(self) -> None:
        """Make collection and keyword index equal to the rows."""
        self.begin()
        wanted = dict(self.rows.scan())
        stored = dict(self.store.scan())
        found = {row: metadata for row, metadata in stored.items() if row in wanted or _is_ours(metadata)}
        if len(stored) > len(found):
            logger.warning(
                "the collection has %d rows that epic-rag did not write; they are left alone, and no query finds them",
                len(stored) - len(found),
            )
        # Only metadata can differ, since an id is derived from text and file. Chroma merges new metadata into the old,
        # so a row with other keys is deleted first.
        other_keys = [row for row, metadata in found.items() if row in wanted and metadata.keys() != wanted[row].keys()]
        to_delete = [row for row in found if row not in wanted] + other_keys
        if to_delete:
            with self._collection_write():
                self.store.delete(to_delete)
        for row in other_keys:
            del found[row]
        changed = [row for row, metadata in found.items() if row in wanted and metadata != wanted[row]]
        for start in range(0, len(changed), _ROWS_AT_ONCE):
            some = changed[start : start + _ROWS_AT_ONCE]
            with self._collection_write():
                self.store.update_metadata(some, [wanted[row] for row in some])
        for records in self._records([row for row in wanted if row not in found]):
            self._write_collection(records)
        indexed = self.keywords.ids()
        self.keywords.delete(sorted(indexed - wanted.keys()))
        for records in self._records([row for row in wanted if row not in indexed]):
            self._write_keywords(records)

    def settle(self) -> None:
        """Flush pending writes on a server, so that a failure can still be repaired in this run."""
        if self._state.chroma is not None and self._marker.has_begun:
            with self._collection_write():
                self.store.probe()

    def publish(self) -> None:
        """Replace the previous collection by this one."""
        with _chroma_errors(self._index_dir):
            self.store.publish()

    def delete_replaced(self) -> None:
        """Delete rows, keywords and graph files of the collections that this one has replaced."""
        while self._replaced_rows:
            self._replaced_rows.pop().close()
        RecordStore.delete_others(self._index_dir, self.store.id)
        KeywordIndex.delete_others(self._index_dir, self.store.id)
        delete_orphaned_graphs(self._index_dir)

    def close(self) -> None:
        """Close the files."""
        self.store.close()
        self.rows.close()
        self.keywords.close()
        while self._replaced_rows:
            self._replaced_rows.pop().close()

    def _records(self, ids: list[str]) -> Iterator[list[Record]]:
        for start in range(0, len(ids), _ROWS_AT_ONCE):
            yield list(self.rows.get(ids[start : start + _ROWS_AT_ONCE]).values())

    def _write_collection(self, records: Sequence[Record]) -> None:
        with self._collection_write():
            self.store.upsert(
                [record.id for record in records],
                np.stack([record.vector for record in records]),
                [record.text for record in records],
                [record.metadata for record in records],
            )

    def _write_keywords(self, records: Sequence[Record]) -> None:
        self.keywords.upsert(
            [record.id for record in records],
            [f"{record.metadata.get('heading_path', '')}\n{record.text}" for record in records],
            [str(record.metadata.get("doc_id", "")) for record in records],
        )

    @contextmanager
    def _collection_write(self) -> Iterator[None]:
        """Guard a write to the collection, whose rows were written before, so that a replacement misses nothing."""
        try:
            with _chroma_errors(self._index_dir), self._marker.writing():
                yield
        except ChromaServerError as error:
            if self._state.chroma is None or not may_be_corrupt(error) or len(self._corrupt) >= _MAX_REPLACEMENTS:
                raise
            logger.warning("%s; its collection is rebuilt from the index's rows", _fact(error))
            self._replace_collection()

    def _replace_collection(self) -> None:
        """Replace a collection on a server that may be corrupt by a new one with all rows."""
        collection = self.store.id
        other, _ = IndexWriter._create(self._index_dir, replace(self._state, collection=collection), self._corrupt)
        saved = IndexState.load(self._index_dir, any_version=True)
        if saved is not None and saved.collection == collection:
            replace(saved, collection=other.store.id).save(self._index_dir)
        self.store.close()
        self.keywords.close()
        self._replaced_rows += [self.rows, *other._replaced_rows]  # callers may be reading from them
        self.store, self.rows, self.keywords = other.store, other.rows, other.keywords
        self._marker, self._state, self._corrupt = other._marker, other._state, other._corrupt


def manifest_from_rows(rows: RecordStore, collection: str) -> Manifest:
    """Rebuild the manifest from the rows of a collection.

    A file is complete if all its rows have the same content hash and none is missing. Any other file gets an empty
    digest, so it is read again, or its rows are deleted with it.
    """
    versions: dict[DocumentKey, Counter[tuple[str, int]]] = {}
    for _, metadata in rows.scan():
        key = (str(metadata.get("root", "")), str(metadata.get("path", "")))
        version = (str(metadata.get("content_hash", "")), int(metadata.get("chunks", 0)))
        versions.setdefault(key, Counter())[version] += 1
    manifest = Manifest(collection)
    for key, counted in versions.items():
        (digest, total), found = next(iter(counted.items()))
        complete = len(counted) == 1 and found == total
        manifest.entries[key] = Entry(digest if complete else "", total if complete else counted.total())
    if versions:
        logger.info("rebuilt the manifest of %d files from the rows", len(manifest.entries))
    return manifest


def _open_collection(index_dir: Path, state: IndexState, corrupt: frozenset[str]) -> ChunkStore | None:
    """Open the current collection; None if there is none, or if it is not usable."""
    if state.collection is None:
        return None
    if state.collection in corrupt or (state.chroma is None and not hnsw_files_fit(index_dir, state.collection)):
        logger.warning("Chroma's files are incomplete; they are rebuilt from the index's rows")
        return None
    from epic_rag_chroma.store.client import WRITER_PATIENCE
    from epic_rag_chroma.store.collection import ChunkStore

    try:
        store = ChunkStore.open(state.place(index_dir), state.collection, patience=WRITER_PATIENCE)
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
        if not may_be_corrupt(error):
            raise
        logger.warning("%s; its collection is rebuilt from the index's rows", _fact(error))
    except Exception as error:  # Chroma's bindings raise anything
        logger.warning("%s; its collection is rebuilt from the rows", error)
        if state.chroma is None:
            _set_aside(index_dir)
    return None


def _set_aside(index_dir: Path) -> None:
    """Move Chroma's files away if they are not a database; a valid database may hold other collections."""
    database = index_dir / CHROMA_FOLDER / "chroma.sqlite3"
    if not database.exists():
        return
    if database.is_file():
        try:
            connection = sqlite3.connect(database)
            try:
                if connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok":
                    return
            finally:
                connection.close()
        except sqlite3.OperationalError:  # locked, or it cannot be opened now: a new database would not help
            return
        except sqlite3.DatabaseError:
            pass
    broken = index_dir / BROKEN_FOLDER
    shutil.rmtree(broken, ignore_errors=True)
    os.replace(index_dir / CHROMA_FOLDER, broken)
    logger.warning("%s is not a database; it was moved to %s", database, broken)


@contextmanager
def _chroma_errors(index_dir: Path) -> Iterator[None]:
    """Turn the exceptions of Chroma's bindings into an `IndexStateError` with a remedy."""
    try:
        yield
    except (EpicError, MemoryError):
        raise
    except BaseException as error:
        from epic_rag_chroma.store.client import is_panic

        # The bindings raise anything: on a full disk, or for a file that was removed.
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise IndexStateError(
            f"Chroma cannot write to {index_dir} ({why}). Stored data is intact. Free disk space and memory or fix "
            "permissions, then run `epic-rag index` again."
        ) from error


def _fact(error: ChromaServerError) -> str:
    """Return the fact of an error message without the remedy."""
    return re.split(r"; |\. ", str(error))[0]


def _is_ours(metadata: Mapping[str, Any]) -> bool:
    """Return whether a row of the collection was written by a run, and is not a copy of one made by LlamaIndex."""
    names = ("root", "path", "doc_id", "content_hash", "embedded_hash")
    return all(name in metadata for name in names) and "_node_content" not in metadata
