"""The query half of the indexer: from texts to hits, by vectors, by words, or by both.

query → vector → nearest chunks ┐
                                ├ reciprocal ranks → distinct passages → (reranker) → hits
query → terms  → BM25           ┘
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from epic_rag.errors import ConfigError
from epic_rag_chroma.errors import IndexStateError
from epic_rag_chroma.reading.document import HEADING_SEPARATOR
from epic_rag_chroma.search.deduplicate import Passage, distinct
from epic_rag_chroma.search.filters import Filter
from epic_rag_chroma.search.fusion import POOL, fuse
from epic_rag_chroma.search.request import SearchRequest
from epic_rag_chroma.search.reranking import RERANK_POOL, Reranker, load_reranker, scores
from epic_rag_chroma.store.database import BruteForceIndex, RecordStore, RecordsUnavailableError
from epic_rag_chroma.store.hnsw_files import hnsw_files_fit
from epic_rag_chroma.store.keyword_index import KeywordIndex, KeywordsUnavailableError
from epic_rag_chroma.store.layout import is_safe_relative_path, versions
from epic_rag_chroma.store.lock import try_chroma_lock
from epic_rag_chroma.store.paths import root_path
from epic_rag_chroma.types import Hit, SearchMode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from epic_rag_chroma.store.collection import ChunkStore
    from epic_rag_chroma.store.database import Record
    from epic_rag_chroma.store.keyword_index import KeywordIndex
    from epic_rag_chroma.store.state import IndexState

__all__ = [
    "Candidate",
    "Candidates",
    "Embedded",
    "Encode",
    "IndexView",
    "Ranking",
    "Rows",
    "Searcher",
    "instead_of",
]


# --- from candidates
# Rankings for a query, over all chunks or over those that pass the filters.
#
# Filters are exact: the k best of the chunks that pass, in their right order, if there are k. The way there depends on
# how many pass. First more of the ranking is read than is wanted, which is enough where most chunks pass. Otherwise all
# chunks' metadata are read once, and those that pass are ranked: a few by computing every cosine, many by Chroma, which
# skips what is not among them.

Vector = npt.NDArray[np.float32]
Ranking = list[tuple[str, float]]
"""Ids with scores, best first, equal ones in the order of their ids."""

# Where the filters leave no more chunks than that, every one is looked at: a graph search is quicker and misses some.
_LOOK_AT_ALL = 10_000
# How much more of a ranking is read at first than is request.
_GENEROUS = 4


class Rows(Protocol):
    """What a search needs of a collection."""

    def count(self) -> int:
        """Number of chunks."""

    def nearest(self, vector: Vector, k: int, allowed: Collection[str] | None = None) -> Ranking:
        """The chunks nearest to a vector (dim,) by cosine, of those that are allowed."""

    def get(self, ids: Collection[str]) -> dict[str, Record]:
        """Chunks by id; those that are not there are left out."""

    def scan(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All chunks: id and metadata."""

    def version(self) -> int:
        """Another number whenever the chunks may be others."""

    def close(self) -> None:
        """Let go of the files."""


@dataclass
class Candidate:
    """A chunk that may become a hit.

    Args:
        id: Its id.
        text: Its text.
        metadata: Its metadata.
        score: The score that it is ranked by.
        cosine: Cosine with the query; None if it was not computed.
        bm25: BM25 score; None where no word of the query occurs in it.
        rerank_score: What the reranker gave.
        duplicates: Where near-duplicates are.
    """

    id: str
    text: str
    metadata: Mapping[str, Any]
    score: float
    cosine: float | None = None
    bm25: float | None = None
    rerank_score: float | None = None
    duplicates: list[str] = field(default_factory=list)


class Candidates:
    """The rankings of an index as it is at one moment.

    Args:
        rows: The collection.
        words: Its words; None where only vectors are asked for.
        passes: The filters; None for all chunks.
        allowed: Ids of the chunks that pass, if they are known.
    """

    def __init__(
        self, rows: Rows, words: KeywordIndex | None, passes: Filter | None, allowed: frozenset[str] | None = None
    ) -> None:
        self._rows = rows
        self._words = words
        self._passes = passes
        self.allowed = allowed
        self._vectors: tuple[list[str], Vector | None] | None = None

    def dense(self, vector: Vector, k: int) -> Ranking:
        """The k nearest chunks that pass, with their cosines."""

        def ranked(count: int, allowed: Collection[str] | None) -> Ranking:
            if allowed is not None and len(allowed) <= _LOOK_AT_ALL:
                return self._every(allowed, vector)[:count]
            return self._rows.nearest(vector, count, allowed)

        return self._filtered(ranked, k)

    def _every(self, allowed: Collection[str], vector: Vector) -> Ranking:
        """All allowed chunks by their cosine."""
        if self._vectors is None:
            rows = self._rows.get(allowed)
            ids = sorted(rows)
            self._vectors = ids, np.stack([rows[each].vector for each in ids]) if ids else None
        ids, vectors = self._vectors
        if vectors is None:
            return []
        # Rounded, since equal rows of a matrix may differ in the last bit of their products.
        cosines = np.round(vectors @ vector, 6)  # (chunks,)
        return [(ids[place], float(cosines[place])) for place in np.argsort(-cosines, kind="stable")]

    def keyword(self, query: str, k: int) -> Ranking:
        """The k chunks that pass with the highest BM25 scores; fewer where fewer have a word of the query."""
        words = self._words
        return [] if words is None else self._filtered(lambda n, allowed: words.search(query, n, allowed), k)

    def bm25(self, query: str, ids: Collection[str]) -> dict[str, float]:
        """BM25 scores of some chunks; those without a word of the query are left out."""
        return {} if self._words is None or not ids else dict(self._words.search(query, len(ids), ids))

    def get(self, ids: Sequence[str]) -> dict[str, Record]:
        """Chunks by id."""
        return self._rows.get(ids)

    def _filtered(self, ranked: Callable[[int, Collection[str] | None], Ranking], k: int) -> Ranking:
        if self._passes is None:
            return ranked(k, None)
        if self.allowed is None:
            some = ranked(_GENEROUS * k, None)
            rows = self._rows.get([each for each, _ in some])
            passed = [(each, score) for each, score in some if each in rows and self._passes(rows[each].metadata)]
            if len(passed) >= k or len(some) < _GENEROUS * k:
                return passed[:k]
            self.allowed = frozenset(each for each, metadata in self._rows.scan() if self._passes(metadata))
        return ranked(k, self.allowed) if self.allowed else []


# --- from view
# The index as a reader sees it: the collection that counts, and its words, opened again when a run has ended.

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
                with self._rows.moment() if isinstance(self._rows, BruteForceIndex) else nullcontext():
                    answer = question(self._rows)
                # Rows that a run took away meanwhile have been left out, and what took their place was not seen.
                if isinstance(self._rows, BruteForceIndex) or versions(self._index_dir) == seen:
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
        from epic_rag_chroma.store.collection import ChunkStore

        if state.chroma is not None or state.collection is None:
            remote = ChunkStore.open(state.place(self._index_dir), state.collection)
            return None if remote is None else self._with_copy(remote)
        with try_chroma_lock(self._index_dir) as is_free:
            if is_free and hnsw_files_fit(self._index_dir, state.collection):
                try:
                    store = ChunkStore.open(self._index_dir, state.collection)
                    if store is not None:
                        store.count()  # makes Chroma read its files while nobody writes to them
                        return self._with_copy(store)
                except Exception as error:  # Chroma raises whatever its bindings do
                    logger.warning("%s; the next run of `epic-rag index` will make its files again", error)
        try:
            return BruteForceIndex(self._index_dir, state.collection)
        except RecordsUnavailableError as error:
            logger.warning("%s", error)
            return None

    def _open_plainly(self, state: IndexState) -> Rows | None:
        """The rows without Chroma, if they are there."""
        try:
            return BruteForceIndex(self._index_dir, state.collection or "")
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


# --- from query_vectors
# A query's vector that comes from something else than its text: other texts, or a vector that the caller has.

Encode: TypeAlias = Callable[[Sequence[str]], npt.NDArray[np.float32]]
Embedded: TypeAlias = "Sequence[str] | npt.NDArray[np.float32]"


def instead_of(encode: Encode, embedded: Sequence[Embedded | None], dimension: int) -> Encode:
    """Return a function that encodes queries, some of them by what replaces them.

    Args:
        encode: Turns queries into unit vectors (n, dim).
        embedded: For each query texts, at least one, whose vectors are averaged; or a vector (dim,) of any length; or
            None for the query itself.
        dimension: The dimension of the index.

    Raises:
        ConfigError: If there is no text, or the vector has another dimension or no direction.
    """
    replaced = [[each] if isinstance(each, str) else each for each in embedded]
    given: dict[int, npt.NDArray[np.float32]] = {}
    for place, each in enumerate(replaced):
        if isinstance(each, np.ndarray):
            if each.shape != (dimension,):
                shown = f"{each.size} numbers" if each.ndim == 1 else f"the shape {each.shape}"
                raise ConfigError(
                    f"the query's vector has {shown}, the vectors of the index have {dimension}; embed the query with "
                    "the model of the index, or give its text"
                )
            given[place] = _unit(each)
        elif each is not None and not list(each):
            raise ConfigError("there is no text to embed for the query; give at least one")

    def encode_replaced(queries: Sequence[str]) -> npt.NDArray[np.float32]:
        texts = {
            place: [query] if each is None else list(each)
            for place, (query, each) in enumerate(zip(queries, replaced, strict=True))
            if place not in given
        }
        flat = [text for several in texts.values() for text in several]
        encoded = encode(flat) if flat else np.empty((0, dimension), np.float32)
        vectors, start = dict(given), 0
        for place, several in texts.items():
            vectors[place] = _unit(encoded[start : start + len(several)].mean(axis=0))
            start += len(several)
        return np.stack([vectors[place] for place in range(len(queries))])

    return encode_replaced


def _unit(vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    length = float(np.linalg.norm(vector))
    if not 0 < length < np.inf:
        raise ConfigError(f"the query's vector has length {length}; it must have a direction")
    return (vector / length).astype(np.float32)


# How many passages are looked at for near-duplicates of the hits, at least.
_LOOKED_AT = 20


class Searcher:
    """Searches one index.

    Args:
        index_dir: The index folder.
        view: The index as it is read.
        lock: Held while the view is asked.
    """

    def __init__(self, index_dir: Path, view: IndexView, lock: threading.Lock) -> None:
        self._index_dir = index_dir
        self._view = view
        self._lock = lock
        self._rerankers: dict[str, Reranker] = {}
        # What the last filters let pass: those of an application are often the same for all its queries.
        self._allowed: dict[tuple[Rows, int, str], frozenset[str]] = {}

    def search(
        self, texts: Sequence[str], request: SearchRequest, encode: Callable[[Sequence[str]], npt.NDArray[np.float32]]
    ) -> list[list[Hit]]:
        """Search for some queries.

        Args:
            texts: The queries.
            wanted: What is request.
            encode: Turns queries into vectors (n, dim); not called in keyword mode.

        Returns:
            For each query its hits, best first.

        Raises:
            ConfigError: If a filter cannot be understood.
            CheckpointError: If the reranker cannot be loaded.
            KeywordsUnavailableError: If keyword mode is asked and there are no words.
        """
        passes = Filter(request.filters, self._index_dir) if request.filters else None
        reranker = None if request.reranker is None else self._reranker(request.reranker)
        vectors = None if request.mode == "keyword" or not texts else encode(texts)
        with self._lock:
            nothing: list[list[Candidate]] = [[] for _ in texts]
            found = self._view.ask(
                lambda rows: self._found(texts, vectors, request, passes, rows, reranker),
                nothing,
                by_vectors=vectors is not None,
            )
        # A crafted index could name any file of the machine.
        safe = [[row for row in hits if is_safe_relative_path(str(row.metadata.get("path", "")))] for hits in found]
        return [[self._hit(rank, row) for rank, row in enumerate(hits, start=1)] for hits in safe]

    def _reranker(self, given: str | os.PathLike[str] | Reranker) -> Reranker:
        if callable(given):
            return given
        name = os.fspath(given)
        if name not in self._rerankers:
            self._rerankers[name] = load_reranker(name)
        return self._rerankers[name]

    def _found(
        self,
        texts: Sequence[str],
        vectors: npt.NDArray[np.float32] | None,
        request: SearchRequest,
        passes: Filter | None,
        rows: Rows,
        reranker: Reranker | None,
    ) -> list[list[Candidate]]:
        mode = request.mode
        if mode == "hybrid":
            try:
                return self._found_by(mode, texts, vectors, request, passes, rows, reranker)
            except KeywordsUnavailableError as error:  # when the words are opened, or when the damage is met
                logger.warning("%s; searched by vectors alone", error)
                mode = "dense"
        return self._found_by(mode, texts, vectors, request, passes, rows, reranker)

    def _found_by(
        self,
        mode: SearchMode,
        texts: Sequence[str],
        vectors: npt.NDArray[np.float32] | None,
        request: SearchRequest,
        passes: Filter | None,
        rows: Rows,
        reranker: Reranker | None,
    ) -> list[list[Candidate]]:
        words = None if mode == "dense" else self._view.words()
        key = (rows, rows.version(), repr(request.filters))
        candidates = Candidates(rows, words, passes, self._allowed.get(key))
        found = []
        for place, text in enumerate(texts):
            query = _Query(candidates, mode, text, None if vectors is None else vectors[place])
            found.append(query.best(request.k, request.collapse, reranker))
        if candidates.allowed is not None:
            self._allowed = {key: candidates.allowed}
        return found

    def _hit(self, rank: int, found: Candidate) -> Hit:
        metadata = found.metadata
        first_line, page = _number(metadata.get("first_line")), _number(metadata.get("page"))
        return Hit(
            rank=rank,
            score=found.score,
            path=str(metadata.get("path", "")),
            first_line=first_line,
            last_line=_number(metadata.get("last_line")),
            page=page,
            heading_path=_headings(metadata),
            text=found.text,
            id=found.id,
            document_id=str(metadata.get("doc_id", "")),
            root=str(root_path(str(metadata.get("root", "")), self._index_dir)),
            kind=str(metadata.get("kind", "")),
            lang=str(metadata.get("lang", "")),
            cosine=found.cosine,
            bm25=found.bm25,
            rerank_score=found.rerank_score,
            duplicates=tuple(found.duplicates),
        )


class _Query:
    """One query to the index as it is at one moment."""

    def __init__(
        self, candidates: Candidates, mode: SearchMode, text: str, vector: npt.NDArray[np.float32] | None
    ) -> None:
        self._candidates = candidates
        self._mode = mode
        self._text = text
        self._vector = vector
        self._cosines: dict[str, float] = {}
        self._bm25: dict[str, float] = {}

    def best(self, k: int, collapse: bool, reranker: Reranker | None) -> list[Candidate]:
        """The k best passages, best first."""
        count = k if reranker is None else max(k, RERANK_POOL)
        found = self._distinct(count) if collapse else self._first(count)
        if reranker is not None:
            passages = ["\n".join((*_headings(each.metadata)[-1:], each.text)) for each in found]
            for each, score in zip(found, scores(reranker, self._text, passages), strict=True):
                each.score = each.rerank_score = score
            found.sort(key=lambda each: -each.score)
        found = found[:k]
        self._complete(found)
        return found

    def _first(self, count: int) -> list[Candidate]:
        ranking = self._ranking(max(count, POOL if self._mode == "hybrid" else 0))[:count]
        return list(self._rows(ranking))

    def _distinct(self, count: int) -> list[Candidate]:
        """The first distinct passages, each with its near-duplicates among those that were looked at."""
        depth = max(2 * count, POOL)
        while True:
            ranking = self._ranking(depth)
            kept: list[Candidate] = []
            passages: list[Passage] = []
            step = max(2 * count, _LOOKED_AT)
            for start in range(0, len(ranking), step):
                for each in self._rows(ranking[start : start + step]):
                    passage = Passage(each.text, "".join(_headings(each.metadata)[-1:]))
                    (same,) = distinct([passage], passages)
                    if same is None:
                        kept.append(each)
                        passages.append(passage)
                    else:
                        kept[same].duplicates.append(_place(each.metadata))
                if len(kept) >= count:
                    return kept[:count]
            if len(ranking) < depth:
                return kept
            depth *= 4

    def _ranking(self, depth: int) -> Ranking:
        """Ids with scores, at least `depth` of them if there are; notes the cosines and BM25 scores."""
        rankings: list[Ranking] = []
        if self._vector is not None and self._mode != "keyword":
            rankings.append(self._candidates.dense(self._vector, depth))
            self._cosines.update(rankings[-1])
        if self._mode != "dense":
            rankings.append(self._candidates.keyword(self._text, depth))
            self._bm25.update(rankings[-1])
        return rankings[0] if len(rankings) == 1 else fuse(*([each for each, _ in ranking] for ranking in rankings))

    def _rows(self, ranking: Ranking) -> Iterator[Candidate]:
        rows = self._candidates.get([each for each, _ in ranking])
        for each, score in ranking:
            if each in rows:  # or it was deleted a moment ago
                cosine = self._cosines.get(each)
                if cosine is None and self._vector is not None:
                    cosine = float(rows[each].vector @ self._vector)
                bounded = None if cosine is None else max(-1.0, min(1.0, cosine))
                text, metadata = rows[each].text, rows[each].metadata
                ranked_by = score if self._mode != "dense" or bounded is None else bounded
                yield Candidate(each, text, metadata, ranked_by, bounded, self._bm25.get(each))

    def _complete(self, found: Sequence[Candidate]) -> None:
        """Add the BM25 scores of what only the vectors found."""
        if self._mode == "hybrid":
            known = self._candidates.bm25(self._text, [each.id for each in found if each.bm25 is None])
            for each in found:
                each.bm25 = known.get(each.id, each.bm25)


def _headings(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    headings = str(metadata.get("heading_path", ""))
    return tuple(headings.split(HEADING_SEPARATOR)) if headings else ()


def _place(metadata: Mapping[str, Any]) -> str:
    """Where a chunk is, as "path:line" or "path:page 3"."""
    path = str(metadata.get("path", ""))
    page, line = _number(metadata.get("page")), _number(metadata.get("first_line"))
    if page is not None:
        return f"{path}:page {page}"
    return path if line is None else f"{path}:{line}"


def _number(value: object) -> int | None:
    return int(value) if isinstance(value, (int, float)) else None
