"""Rankings for a query, over all chunks or over those that pass the filters.

Filters are exact: the k best of the chunks that pass, in their right order, if there are k. The way there depends on
how many pass. First more of the ranking is read than is wanted, which is enough where most chunks pass. Otherwise all
chunks' metadata are read once, and those that pass are ranked: a few by computing every cosine, many by Chroma, which
skips what is not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from epic_rag_chroma.filters import Filter

if TYPE_CHECKING:
    from epic_rag_chroma.keywords import KeywordIndex
    from epic_rag_chroma.records import Record

__all__ = ["Candidate", "Candidates", "Ranking", "Rows"]

Vector = npt.NDArray[np.float32]
Ranking = list[tuple[str, float]]
"""Ids with scores, best first, equal ones in the order of their ids."""

# Where the filters leave no more chunks than that, every one is looked at: a graph search is quicker and misses some.
_LOOK_AT_ALL = 10_000
# How much more of a ranking is read at first than is wanted.
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
        cosine: Cosine with the query; None if it was not computed.
        bm25: BM25 score; None where no word of the query occurs in it.
        rerank_score: What the reranker gave.
        duplicates: Where near-duplicates are.
    """

    id: str
    text: str
    metadata: Mapping[str, Any]
    cosine: float | None = None
    bm25: float | None = None
    rerank_score: float | None = None
    duplicates: list[str] = field(default_factory=list)

    @property
    def score(self) -> float:
        """The cosine, or the BM25 score where there is none."""
        return self.cosine if self.cosine is not None else self.bm25 or 0.0


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
