"""Index reader: the database of an index, opened when it is first used and searched in snapshots.

Chunks and keywords are read from the database, nearest neighbours from an exact scan of its vectors. From
`CHROMA_FROM_CHUNKS` chunks on, queries without filters use Chroma's graph, as long as the mirror is complete and no run
is writing to it. A scan of 100,000 vectors takes 7 ms and Chroma 6 ms, but opening Chroma takes a new process a second
(benchmarks/README.md).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from epic_rag.errors import EpicError
from epic_rag_chroma.errors import IndexNotFoundError
from epic_rag_chroma.store.database import IndexDatabase
from epic_rag_chroma.store.lock import try_chroma_lock
from epic_rag_chroma.store.migration import check_migrated
from epic_rag_chroma.store.paths import DATABASE_FILE
from epic_rag_chroma.store.server import ServerPlace, require_known
from epic_rag_chroma.store.state import IndexState, MirrorState
from epic_rag_chroma.store.vectors import VectorSearch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["CHROMA_FROM_CHUNKS", "IndexReader", "IndexSnapshot", "Ranking"]

logger = logging.getLogger(__name__)

CHROMA_FROM_CHUNKS = 300_000
Ranking = list[tuple[str, float]]
"""Chunk ids with scores, best first, equal scores in the order of their ids."""

Answer = TypeVar("Answer")


class _Mirror(Protocol):
    def nearest(self, vector: npt.NDArray[np.float32], k: int) -> Ranking: ...
    def close(self) -> None: ...


class IndexSnapshot:
    """One state of an index, for the duration of a query.

    Args:
        database: The database, within a snapshot.
        vectors: Searches its vectors.
        mirror: The Chroma mirror of this state, if it is to be searched.
    """

    def __init__(self, database: IndexDatabase, vectors: VectorSearch, mirror: _Mirror | None) -> None:
        self.database = database
        self._vectors = vectors
        self._mirror = mirror

    def nearest(self, vector: npt.NDArray[np.float32], k: int, allowed: Collection[int] | None = None) -> Ranking:
        """Return the k chunks nearest to a vector (dim,) by cosine, among those with allowed numbers."""
        if self._mirror is None or allowed is not None:
            return self._vectors.nearest(vector, k, allowed)
        try:
            found = self._mirror.nearest(vector, k)
        except Exception as error:  # a run may have replaced the collection, and Chroma's bindings raise anything
            logger.info("Chroma is not searched. %s", error)
            return self._vectors.nearest(vector, k)
        known = self.database.get([row_id for row_id, _ in found])
        if len(known) < len(found):  # somebody else has added rows to the collection
            return self._vectors.nearest(vector, k)
        return found


class IndexReader:
    """Reads an index for queries. Thread-safe.

    Args:
        index_dir: The index folder.
        chroma_from_chunks: Number of chunks from which on Chroma is searched.
    """

    def __init__(self, index_dir: Path, *, chroma_from_chunks: int = CHROMA_FROM_CHUNKS) -> None:
        self._index_dir = index_dir
        self._path = index_dir / DATABASE_FILE
        self._chroma_from_chunks = chroma_from_chunks
        self._lock = threading.Lock()
        self._database: IndexDatabase | None = None
        self._stamp = (-1, -1, -1)
        self._vectors: VectorSearch | None = None
        self._mirror: _Mirror | None = None
        self._mirrored: tuple[tuple[str, int], MirrorState] | None = None

    def read(self, query: Callable[[IndexSnapshot], Answer], *, needs_vectors: bool = True) -> Answer:
        """Call a function with one state of the index.

        Args:
            query: Called with the open index.
            needs_vectors: Whether the function calls `nearest`.

        Returns:
            The function's result.

        Raises:
            IndexNotFoundError: If there is no index.
            IndexStateError: If it cannot be read.
        """
        with self._lock:
            database = self._open()
            with database.snapshot():
                if self._vectors is None:
                    self._vectors = VectorSearch(database)
                mirror = self._open_mirror(database) if needs_vectors else None
                return query(IndexSnapshot(database, self._vectors, mirror))

    def state(self) -> IndexState:
        """Return the settings of the index.

        Raises:
            IndexNotFoundError: If there is no index.
            IndexStateError: If it cannot be read.
        """
        with self._lock:
            state = self._open().state()
        if state is None:  # a run died before it stored anything
            check_migrated(self._index_dir)
            raise self.not_found()
        return state

    def not_found(self) -> IndexNotFoundError:
        """Return the error for a folder without an index."""
        return IndexNotFoundError(f"No index in {self._index_dir}. Run `epic-rag index PATH` to create one.")

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Close the files and keep queries from reopening them in the meantime."""
        with self._lock:
            self._close()
            yield

    def open(self) -> IndexDatabase:
        """Open the database once more, for reading; the caller closes it.

        Raises:
            IndexNotFoundError: If there is no index.
            IndexStateError: If it cannot be read.
        """
        if not self._path.exists():
            check_migrated(self._index_dir)
            raise self.not_found()
        return IndexDatabase.open_reading(self._path)

    def _open(self) -> IndexDatabase:
        try:
            info = self._path.stat()
            stamp = (info.st_ino, info.st_mtime_ns, info.st_size)
        except OSError:
            stamp = (-1, -1, -1)
        database = self._database
        if database is None or stamp[0] != self._stamp[0] or (database.is_immutable and stamp != self._stamp):
            self._close()
            self._database = database = self.open()
            self._stamp = stamp
        return database

    def _open_mirror(self, database: IndexDatabase) -> _Mirror | None:
        """Return the Chroma mirror if it is complete and worth searching."""
        mirror = database.mirror()
        version = (database.version(), mirror)
        if self._mirrored == version:
            return self._mirror
        # A client does not see what another process has written since.
        self._close_mirror()
        self._mirrored = version
        state = database.state()
        if state is None or not mirror.is_complete or database.count() < self._chroma_from_chunks:
            return None
        assert mirror.collection is not None
        from epic_rag_chroma.store.collection import open_collection  # imports chromadb

        try:
            if isinstance(state.chroma, ServerPlace):
                require_known(self._index_dir, state.chroma.server, is_named=False)
                self._mirror = open_collection(state.chroma, mirror.collection)
            else:
                with try_chroma_lock(self._index_dir) as is_free:
                    self._mirror = open_collection(self._index_dir, mirror.collection) if is_free else None
        except EpicError as error:
            logger.info("Chroma is not searched. %s", error)
        return self._mirror

    def _close_mirror(self) -> None:
        if self._mirror is not None:
            self._mirror.close()
        self._mirror = self._mirrored = None

    def _close(self) -> None:
        self._close_mirror()
        if self._database is not None:
            self._database.close()
        self._database = self._vectors = None
