"""The index as a reader sees it: the collection that counts, and its words, opened again when a run has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from epic_rag.errors import IndexStateError
from epic_rag_chroma.exact import ExactRows
from epic_rag_chroma.folder import versions
from epic_rag_chroma.graph import graph_fits
from epic_rag_chroma.keywords import KeywordIndex
from epic_rag_chroma.records import RecordStore, RecordsUnavailableError
from epic_rag_chroma.running import holds_chroma

if TYPE_CHECKING:
    from epic_rag_chroma.candidates import Ranking, Rows, Vector
    from epic_rag_chroma.manifest import IndexState
    from epic_rag_chroma.store import ChunkStore

__all__ = ["IndexView"]

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
_SWAP_ATTEMPTS = 3


class IndexView:
    """Opens an index for reading when it is asked, and keeps it open. One thread at a time.

    Args:
        index_dir: The index folder.
        state: Says what the index is now.
    """

    def __init__(self, index_dir: Path, state: Callable[[], IndexState]) -> None:
        self._index_dir = index_dir
        self._state = state
        self._rows: Rows | None = None
        self._words: KeywordIndex | None = None
        self._collection: str | None = None
        self._by_vectors = True
        self._seen: tuple[object, ...] = ()

    def ask(self, question: Callable[[Rows], Answer], empty: Answer, *, by_vectors: bool = True) -> Answer:
        """Ask the collection that counts now; a rebuild in another process may swap it at any moment.

        Args:
            question: Called with the open collection; called again if that was swapped meanwhile.
            empty: The answer of an index that has no collection yet.
            by_vectors: Whether the question is for what is nearest; without it, Chroma need not be opened.

        Raises:
            IndexNotFoundError: If there is no index.
            IndexStateError: If it cannot be read.
        """
        for attempt in range(_SWAP_ATTEMPTS):
            seen = versions(self._index_dir)
            # A live client does not see what another process has written since.
            if self._rows is None or seen != self._seen or (by_vectors and not self._by_vectors):
                self.close()
                state = self._state()
                if state.collection is None:
                    return empty
                self._rows = self._open(state) if by_vectors else self._open_plainly(state)
                self._by_vectors = by_vectors
                self._seen = seen
                self._collection = state.collection
                if self._rows is None:
                    if versions(self._index_dir) != seen:
                        continue
                    raise IndexStateError(
                        f"{self._index_dir} has lost its collection; run `epic-rag index` with the indexed folder to "
                        "make it again"
                    )
            try:
                with self._rows.moment() if isinstance(self._rows, ExactRows) else nullcontext():
                    answer = question(self._rows)
                # Rows that a run took away meanwhile have been left out, and what took their place was not seen.
                if isinstance(self._rows, ExactRows) or versions(self._index_dir) == seen:
                    return answer
            except Exception:
                self.close()
                if attempt + 1 == _SWAP_ATTEMPTS or versions(self._index_dir) == seen:
                    raise
        raise IndexStateError(f"{self._index_dir} is being rebuilt; run the query again")

    def words(self) -> KeywordIndex:
        """The words of the collection that is open; only for a question.

        Raises:
            KeywordsUnavailableError: If they are missing, broken or of another version.
        """
        if self._words is None:
            self._words = KeywordIndex.open_reading(self._index_dir, self._collection or "")
        return self._words

    def close(self) -> None:
        """Let go of the files; the next question opens them again."""
        if self._words is not None:
            self._words.close()
            self._words = None
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _open(self, state: IndexState) -> Rows | None:
        from epic_rag_chroma.store import ChunkStore

        if state.chroma is not None or state.collection is None:
            remote = ChunkStore.open(state.place(self._index_dir), state.collection)
            return None if remote is None else self._with_copy(remote)
        with holds_chroma(self._index_dir) as is_free:
            if is_free and graph_fits(self._index_dir, state.collection):
                try:
                    store = ChunkStore.open(self._index_dir, state.collection)
                    if store is not None:
                        store.count()  # makes Chroma read its files while nobody writes to them
                        return self._with_copy(store)
                except Exception as error:  # Chroma raises whatever its bindings do
                    logger.warning("%s; the next run of `epic-rag index` will make its files again", error)
        try:
            return ExactRows(self._index_dir, state.collection)
        except RecordsUnavailableError as error:
            logger.warning("%s", error)
            return None

    def _open_plainly(self, state: IndexState) -> Rows | None:
        """The rows without Chroma, if they are there."""
        try:
            return ExactRows(self._index_dir, state.collection or "")
        except RecordsUnavailableError:
            return self._open(state)

    def _with_copy(self, store: ChunkStore) -> Rows:
        try:
            return CopiedRows(store, RecordStore.open_reading(self._index_dir, store.id))
        except RecordsUnavailableError:
            return store


class CopiedRows:
    """A collection whose rows are read from the index's own copy: Chroma takes many times as long for a row.

    Args:
        store: Finds what is nearest.
        records: The copy.
    """

    def __init__(self, store: ChunkStore, records: RecordStore) -> None:
        self._store = store
        self._records = records
        self.count = records.count
        self.get = records.get
        self.scan = records.scan
        self.version = store.version

    def nearest(self, vector: Vector, k: int, allowed: Collection[str] | None = None) -> Ranking:
        """See `Rows.nearest`; rows that somebody else has put into the collection are passed over."""
        found = self._store.nearest(vector, k, allowed)
        known = self._records.known([each for each, _ in found])
        if len(known) < len(found) and allowed is None:
            foreign = max(0, self._store.count() - self._records.count())
            found = self._store.nearest(vector, k + foreign)
            known = self._records.known([each for each, _ in found])
        return [(each, score) for each, score in found if each in known][:k]

    def close(self) -> None:
        """Let go of the files."""
        self._records.close()
        self._store.close()
