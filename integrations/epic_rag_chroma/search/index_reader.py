"""Index reader: the rows, vectors and keywords of the current collection, reopened when a run has changed them.

Rows (text, metadata, vector) and keywords are read from SQLite. Nearest neighbours come from Chroma; while a run writes
to Chroma's files, after a run that died, and in a folder that is read-only, from a brute-force scan over the rows.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from epic_rag_chroma.errors import IndexStateError
from epic_rag_chroma.store.database import BruteForceIndex, RecordStore, RecordsUnavailableError
from epic_rag_chroma.store.hnsw_files import hnsw_files_fit
from epic_rag_chroma.store.keyword_index import KeywordIndex
from epic_rag_chroma.store.layout import file_versions
from epic_rag_chroma.store.lock import try_chroma_lock

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from epic_rag_chroma.store.collection import ChunkStore
    from epic_rag_chroma.store.database import Record
    from epic_rag_chroma.store.state import IndexState

    Vector: TypeAlias = npt.NDArray[np.float32]

__all__ = ["IndexReader", "Ranking", "VectorIndex"]

logger = logging.getLogger(__name__)

Ranking = list[tuple[str, float]]
"""Chunk ids with scores, best first, equal scores in the order of their ids."""

Answer = TypeVar("Answer")
_ATTEMPTS = 3


class VectorIndex(Protocol):
    """The chunks of a collection."""

    def nearest(self, vector: Vector, k: int, allowed: Collection[str] | None = None) -> Ranking:
        """Return the k chunks nearest to a vector (dim,) by cosine, among the allowed ones."""

    def get(self, ids: Collection[str]) -> dict[str, Record]:
        """Return chunks by id, without those that do not exist."""

    def scan(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield id and metadata of all chunks."""

    def version(self) -> int:
        """Return a number that changes with the chunks."""

    def close(self) -> None:
        """Close the files."""


class MirroredIndex:
    """Vectors in Chroma, rows in SQLite: Chroma takes many times as long to return a row.

    Args:
        store: The Chroma collection.
        records: The same rows in SQLite.
    """

    def __init__(self, store: ChunkStore, records: RecordStore) -> None:
        self._store = store
        self._records = records
        self.get = records.get
        self.scan = records.scan
        self.version = store.version

    def nearest(self, vector: Vector, k: int, allowed: Collection[str] | None = None) -> Ranking:
        """Return the nearest chunks, without rows that somebody else has added to the collection."""
        found = self._store.nearest(vector, k, allowed)
        known = self._records.known([row_id for row_id, _ in found])
        if len(known) < len(found) and allowed is None:
            foreign = max(0, self._store.count() - self._records.count())
            found = self._store.nearest(vector, k + foreign)
            known = self._records.known([row_id for row_id, _ in found])
        return [(row_id, score) for row_id, score in found if row_id in known][:k]

    def close(self) -> None:
        """Close the files."""
        self._records.close()
        self._store.close()


class IndexReader:
    """Reads an index for queries; opens it when it is first used and keeps it open. Thread-safe.

    Args:
        index_dir: The index folder.
        load_state: Returns the current content of `index.json`.
    """

    def __init__(self, index_dir: Path, load_state: Callable[[], IndexState]) -> None:
        self._index_dir = index_dir
        self._load_state = load_state
        self._lock = threading.Lock()
        self._index: VectorIndex | None = None
        self._keywords: KeywordIndex | None = None
        self._collection = ""
        self._has_chroma = True
        self._versions: tuple[object, ...] = ()

    def read(self, query: Callable[[VectorIndex], Answer], *, needs_vectors: bool = True) -> Answer | None:
        """Call a function with the current collection, which a rebuild in another process may swap at any moment.

        Args:
            query: Called with the open collection; called again if the collection was swapped meanwhile.
            needs_vectors: Whether the function calls `nearest`. If not, Chroma is not opened.

        Returns:
            The function's result; None for an index that has no collection yet.

        Raises:
            IndexNotFoundError: If there is no index.
            IndexStateError: If it cannot be read.
        """
        with self._lock:
            for attempt in range(_ATTEMPTS):
                versions = file_versions(self._index_dir)
                # An open Chroma client does not see what another process has written since.
                if self._index is None or versions != self._versions or (needs_vectors and not self._has_chroma):
                    self._close()
                    state = self._load_state()
                    if state.collection is None:
                        return None
                    self._index = self._open(state, state.collection, needs_vectors)
                    self._has_chroma, self._versions, self._collection = needs_vectors, versions, state.collection
                    if self._index is None:
                        if file_versions(self._index_dir) != versions:
                            continue
                        raise IndexStateError(
                            f"The collection of {self._index_dir} is missing. "
                            "Run `epic-rag index` with the indexed folder to rebuild it."
                        )
                is_snapshot = isinstance(self._index, BruteForceIndex)
                try:
                    with self._index.snapshot() if isinstance(self._index, BruteForceIndex) else nullcontext():
                        answer = query(self._index)
                    # Outside a snapshot, rows that a run has replaced meanwhile would be missing from the answer.
                    if is_snapshot or file_versions(self._index_dir) == versions:
                        return answer
                except Exception:
                    self._close()
                    if attempt + 1 == _ATTEMPTS or file_versions(self._index_dir) == versions:
                        raise
        raise IndexStateError(f"{self._index_dir} is being rebuilt. Run the query again.")

    def keywords(self) -> KeywordIndex:
        """Return the keyword index of the open collection; to be called by the function that `read` calls.

        Raises:
            KeywordsUnavailableError: If it is missing, broken or of another version.
        """
        if self._keywords is None:
            self._keywords = KeywordIndex.open_reading(self._index_dir, self._collection)
        return self._keywords

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Close the files and keep queries from reopening them in the meantime."""
        with self._lock:
            self._close()
            yield

    def _close(self) -> None:
        if self._keywords is not None:
            self._keywords.close()
            self._keywords = None
        if self._index is not None:
            self._index.close()
            self._index = None

    def _open(self, state: IndexState, collection: str, needs_vectors: bool) -> VectorIndex | None:
        if not needs_vectors:
            try:
                return BruteForceIndex(self._index_dir, collection)
            except RecordsUnavailableError:
                pass  # Chroma has the rows, too
        from epic_rag_chroma.store.collection import ChunkStore  # imports chromadb

        if state.chroma is not None:
            remote = ChunkStore.open(state.chroma, collection)
            return None if remote is None else self._mirrored(remote)
        with try_chroma_lock(self._index_dir) as is_free:
            if is_free and hnsw_files_fit(self._index_dir, collection):
                try:
                    store = ChunkStore.open(self._index_dir, collection)
                    if store is not None:
                        store.count()  # makes Chroma read its files while nobody writes to them
                        return self._mirrored(store)
                except Exception as error:  # Chroma raises whatever its bindings raise
                    logger.warning("%s The next run of `epic-rag index` rebuilds these files.", error)
        try:
            return BruteForceIndex(self._index_dir, collection)
        except RecordsUnavailableError as error:
            logger.warning("%s", error)
            return None

    def _mirrored(self, store: ChunkStore) -> VectorIndex:
        try:
            return MirroredIndex(store, RecordStore.open_reading(self._index_dir, store.id))
        except RecordsUnavailableError:
            return store
