"""The three places that hold an index's chunks, written to as one: rows, Chroma's collection, and words.

The rows (`records.py`) come first: they are written in transactions, and the other two follow from them. After a
crash, or when one of the others was lost, `reconcile` makes them say again what the rows say, without the model.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from epic_rag.errors import EpicError
from epic_rag_chroma.errors import ChromaServerError, IndexStateError
from epic_rag_chroma.store.database import Record, RecordStore
from epic_rag_chroma.store.hnsw_files import delete_orphaned_graphs
from epic_rag_chroma.store.keyword_index import KeywordIndex
from epic_rag_chroma.store.lock import DirtyMarker
from epic_rag_chroma.store.paths import DocumentKey
from epic_rag_chroma.store.server import may_be_corrupt
from epic_rag_chroma.store.state import Entry, Manifest

if TYPE_CHECKING:
    from epic_rag_chroma.store.collection import ChunkStore

__all__ = ["IndexWriter", "chroma_errors", "recover"]


logger = logging.getLogger(__name__)

_AT_ONCE = 500


class IndexWriter:
    """Writes chunks to all three places, and marks the run as begun before the first write. Close it.

    Args:
        index_dir: The index folder.
        store: The collection.
        records: Its rows.
        keywords: Its words.
        running: The mark of the run.
        remake: For a collection on a server, which may be restarted at any time: makes another one, from the rows, in
            the place of one whose graph is in doubt. Gets that one's id and what happened, which it raises again if
            this has gone on for too long.
    """

    def __init__(
        self,
        index_dir: Path,
        store: ChunkStore,
        records: RecordStore,
        keywords: KeywordIndex,
        running: DirtyMarker,
        remake: Callable[[str, ChromaServerError], IndexWriter] | None = None,
    ) -> None:
        self._index_dir = index_dir
        self.store = store
        self.records = records
        self.keywords = keywords
        self._running = running
        self._remake = remake
        self._left: list[RecordStore] = []

    def begin(self) -> None:
        """Mark the run as begun, before anything is unlike the manifest."""
        self._running.begin()

    def end(self) -> None:
        """Take the mark away: everything is written."""
        self.records.drop_tombstones()
        self._running.end()

    def write(self, records: Sequence[Record]) -> None:
        """Store rows; those that exist are replaced."""
        if not records:
            return
        self.begin()
        self.records.write(records)
        self._write_collection(records)
        self._write_words(records)

    def update_metadata(self, ids: Sequence[str], metadatas: Sequence[dict[str, Any]]) -> None:
        """Change rows' metadata; texts, vectors and words stay."""
        if not ids:
            return
        self.begin()
        self.records.update_metadata(ids, metadatas)
        with self._collection():
            self.store.update_metadata(ids, metadatas)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete rows."""
        if not ids:
            return
        self.begin()
        self.records.delete(ids)
        with self._collection():
            self.store.delete(ids)
        self.keywords.delete(ids)

    def ids_by_document(self, documents: Collection[str]) -> dict[str, set[str]]:
        """Ids of the rows of documents, by their `doc_id`."""
        return self.records.ids_by_document(documents)

    def vectors_by_hash(self, hashes: Collection[str]) -> dict[str, npt.NDArray[np.float32]]:
        """Vectors of what the model has read already, by `embedded_hash`."""
        return self.records.vectors_by_hash(hashes)

    def reconcile(self) -> None:
        """Make collection and words say what the rows say."""
        self.begin()
        wanted = dict(self.records.scan())
        stored = dict(self.store.scan())
        found = {row: metadata for row, metadata in stored.items() if row in wanted or _is_ours(metadata)}
        if len(stored) > len(found):
            logger.warning(
                "the collection has %d rows that epic-rag did not write; they are left alone, and no query finds them",
                len(stored) - len(found),
            )
        self._drop_from_collection([row for row in found if row not in wanted])
        # Only metadata can differ: an id follows from text and place. Chroma merges what it is given into what it has,
        # so a row with other keys goes first.
        other_keys = [row for row, metadata in found.items() if row in wanted and metadata.keys() != wanted[row].keys()]
        self._drop_from_collection(other_keys)
        for row in other_keys:
            del found[row]
        changed = [row for row, metadata in found.items() if row in wanted and metadata != wanted[row]]
        for start in range(0, len(changed), _AT_ONCE):
            some = changed[start : start + _AT_ONCE]
            with self._collection():
                self.store.update_metadata(some, [wanted[row] for row in some])
        for records in self._fetched([row for row in wanted if row not in found]):
            self._write_collection(records)
        words = self.keywords.ids()
        self.keywords.delete(sorted(words - wanted.keys()))
        for records in self._fetched([row for row in wanted if row not in words]):
            self._write_words(records)

    def fill_collection(self) -> None:
        """Write all rows to a collection that is empty, and see to the words."""
        self.begin()
        for records in self.records.pages():
            self._write_collection(records)
        self.keywords.delete(sorted(self.keywords.ids()))
        for records in self.records.pages():
            self._write_words(records)

    def fill_records(self) -> None:
        """Take all rows from the collection, whose copy is lost."""
        self.begin()
        for page in self.store.pages():
            self.records.write([Record(*row) for row in page if _is_ours(row[2])])

    def settle(self) -> None:
        """Let a server finish what it was given, while a run is there to mend what goes wrong."""
        if self._remake is not None and self._running.has_begun:
            with self._collection():
                self.store.probe()

    def forget_others(self) -> None:
        """Delete rows, words and graphs of the collections that this one has replaced."""
        while self._left:
            self._left.pop().close()
        RecordStore.delete_others(self._index_dir, self.store.id)
        KeywordIndex.delete_others(self._index_dir, self.store.id)
        delete_orphaned_graphs(self._index_dir)

    def publish(self) -> None:
        """Let the collection take the place of the one before."""
        with chroma_errors(self._index_dir):
            self.store.publish()

    def close(self) -> None:
        """Let go of the files."""
        self.store.close()
        self.records.close()
        self.keywords.close()
        while self._left:
            self._left.pop().close()

    def _become(self, other: IndexWriter) -> None:
        """Go on with another collection, which has all that this one should have."""
        self.store.close()
        self.keywords.close()
        self._left += [self.records, *other._left]  # somebody may be reading from them
        self.store, self.records, self.keywords = other.store, other.records, other.keywords
        self._running, self._remake = other._running, other._remake

    def _fetched(self, ids: list[str]) -> Iterator[list[Record]]:
        for start in range(0, len(ids), _AT_ONCE):
            yield list(self.records.get(ids[start : start + _AT_ONCE]).values())

    def _drop_from_collection(self, ids: list[str]) -> None:
        if ids:
            with self._collection():
                self.store.delete(ids)

    def _write_collection(self, records: Sequence[Record]) -> None:
        with self._collection():
            self.store.upsert(
                [record.id for record in records],
                np.stack([record.vector for record in records]),
                [record.text for record in records],
                [record.metadata for record in records],
            )

    def _write_words(self, records: Sequence[Record]) -> None:
        self.keywords.upsert(
            [record.id for record in records],
            [f"{record.metadata.get('heading_path', '')}\n{record.text}" for record in records],
            [str(record.metadata.get("doc_id", "")) for record in records],
        )

    @contextmanager
    def _collection(self) -> Iterator[None]:
        """Around each write to the collection. The rows have been written, so nothing is missed if it is remade."""
        try:
            with chroma_errors(self._index_dir), self._running.writing():
                yield
        except ChromaServerError as error:
            if self._remake is None or not may_be_corrupt(error):
                raise
            self._become(self._remake(self.store.id, error))


@contextmanager
def chroma_errors(index_dir: Path) -> Iterator[None]:
    """Turn what Chroma raises when it cannot write into an error that says what to do."""
    try:
        yield
    except (EpicError, MemoryError):
        raise
    except BaseException as error:
        from epic_rag_chroma.store.client import is_panic

        # Chroma raises whatever its bindings do: a full disk, a file that was taken away.
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise IndexStateError(
            f"Chroma cannot write to {index_dir} ({why}); what is stored stays: see to free space, memory and "
            "permissions, and run `epic-rag index` again"
        ) from error


def _is_ours(metadata: Mapping[str, Any]) -> bool:
    """Whether a row of the collection is one that a run wrote, and no copy that LlamaIndex made of it elsewhere."""
    names = ("root", "path", "doc_id", "content_hash", "embedded_hash")
    return all(name in metadata for name in names) and "_node_content" not in metadata


def recover(records: RecordStore, collection: str) -> Manifest:
    """Make a manifest from the rows of a collection.

    A file whose rows all belong to one content and are all there counts as that content. Any other gets an empty
    digest: it is read again, or its rows go if it is gone.
    """
    versions: dict[DocumentKey, Counter[tuple[str, int]]] = {}
    for _, metadata in records.scan():
        key = (str(metadata.get("root", "")), str(metadata.get("path", "")))
        version = (str(metadata.get("content_hash", "")), int(metadata.get("chunks", 0)))
        versions.setdefault(key, Counter())[version] += 1
    manifest = Manifest(collection)
    for key, counted in versions.items():
        (digest, total), rows = next(iter(counted.items()))
        whole = len(counted) == 1 and rows == total
        manifest.entries[key] = Entry(digest if whole else "", counted.total() if not whole else total)
    if versions:
        logger.info("made the manifest again from %d files", len(manifest.entries))
    return manifest
