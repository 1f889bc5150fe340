"""The query half of the indexer: from texts to hits, by vectors, by words, or by both.

query → vector → nearest chunks ┐
                                ├ reciprocal ranks → distinct passages → (reranker) → hits
query → terms  → BM25           ┘
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epic_rag.errors import ConfigError
from epic_rag_chroma import roots
from epic_rag_chroma.candidates import Candidate, Candidates, Ranking, Rows
from epic_rag_chroma.chunking import HEADING_SEPARATOR
from epic_rag_chroma.duplicates import Passage, distinct
from epic_rag_chroma.filters import Filter
from epic_rag_chroma.folder import lies_inside
from epic_rag_chroma.fusion import POOL, fuse
from epic_rag_chroma.keywords import KeywordsUnavailableError
from epic_rag_chroma.reranking import RERANK_POOL, Reranker, load_reranker, scores
from epic_rag_chroma.types import DEFAULT_MODE, SEARCH_MODES, Hit, SearchFilters, SearchMode
from epic_rag_chroma.view import IndexView

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Searcher", "Wanted"]

logger = logging.getLogger(__name__)

# How many passages are looked at for near-duplicates of the hits, at least.
_LOOKED_AT = 20


@dataclass(frozen=True)
class Wanted:
    """What a caller wants of a search.

    Args:
        k: The most hits.
        mode: How the index is searched; None for the default.
        filters: What hits must satisfy.
        collapse: Whether near-duplicates are folded into the best of them.
        reranker: What orders the best hits anew.

    Raises:
        ConfigError: If `k` is less than 1 or the mode is unknown.
    """

    k: int = 5
    mode: SearchMode | None = None
    filters: SearchFilters | None = None
    collapse: bool = True
    reranker: str | os.PathLike[str] | Reranker | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k is {self.k}; it must be at least 1")
        if self.mode is not None and self.mode not in SEARCH_MODES:
            raise ConfigError(f"unknown mode {self.mode!r}; known modes are {', '.join(SEARCH_MODES)}")

    @property
    def by(self) -> SearchMode:
        """The mode."""
        return self.mode or DEFAULT_MODE


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
        self, texts: Sequence[str], wanted: Wanted, encode: Callable[[Sequence[str]], npt.NDArray[np.float32]]
    ) -> list[list[Hit]]:
        """Search for some queries.

        Args:
            texts: The queries.
            wanted: What is wanted.
            encode: Turns queries into vectors (n, dim); not called in keyword mode.

        Returns:
            For each query its hits, best first.

        Raises:
            ConfigError: If a filter cannot be understood.
            CheckpointError: If the reranker cannot be loaded.
            KeywordsUnavailableError: If keyword mode is asked and there are no words.
        """
        passes = Filter(wanted.filters, self._index_dir) if wanted.filters else None
        reranker = None if wanted.reranker is None else self._reranker(wanted.reranker)
        vectors = None if wanted.by == "keyword" or not texts else encode(texts)
        with self._lock:
            nothing: list[list[Candidate]] = [[] for _ in texts]
            found = self._view.ask(
                lambda rows: self._found(texts, vectors, wanted, passes, rows, reranker),
                nothing,
                by_vectors=vectors is not None,
            )
        # A crafted index could name any file of the machine.
        safe = [[row for row in hits if lies_inside(str(row.metadata.get("path", "")))] for hits in found]
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
        wanted: Wanted,
        passes: Filter | None,
        rows: Rows,
        reranker: Reranker | None,
    ) -> list[list[Candidate]]:
        mode = wanted.by
        if mode == "hybrid":
            try:
                return self._found_by(mode, texts, vectors, wanted, passes, rows, reranker)
            except KeywordsUnavailableError as error:  # when the words are opened, or when the damage is met
                logger.warning("%s; searched by vectors alone", error)
                mode = "dense"
        return self._found_by(mode, texts, vectors, wanted, passes, rows, reranker)

    def _found_by(
        self,
        mode: SearchMode,
        texts: Sequence[str],
        vectors: npt.NDArray[np.float32] | None,
        wanted: Wanted,
        passes: Filter | None,
        rows: Rows,
        reranker: Reranker | None,
    ) -> list[list[Candidate]]:
        words = None if mode == "dense" else self._view.words()
        key = (rows, rows.version(), repr(wanted.filters))
        candidates = Candidates(rows, words, passes, self._allowed.get(key))
        found = []
        for place, text in enumerate(texts):
            query = _Query(candidates, mode, text, None if vectors is None else vectors[place])
            found.append(query.best(wanted.k, wanted.collapse, reranker))
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
            root=str(roots.where(str(metadata.get("root", "")), self._index_dir)),
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
                each.rerank_score = score
            found.sort(key=lambda each: -(each.rerank_score or 0.0))
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

    def _ranking(self, depth: int) -> list[str]:
        """Ids, best first, at least `depth` of them if there are; notes the scores that it comes by."""
        rankings: list[Ranking] = []
        if self._vector is not None and self._mode != "keyword":
            rankings.append(self._candidates.dense(self._vector, depth))
            self._cosines.update(rankings[-1])
        if self._mode != "dense":
            rankings.append(self._candidates.keyword(self._text, depth))
            self._bm25.update(rankings[-1])
        return fuse(*([each for each, _ in ranking] for ranking in rankings))

    def _rows(self, ids: Sequence[str]) -> Iterator[Candidate]:
        rows = self._candidates.get(ids)
        for each in ids:
            if each in rows:  # or it was deleted a moment ago
                cosine = self._cosines.get(each)
                if cosine is None and self._vector is not None:
                    cosine = float(rows[each].vector @ self._vector)
                bounded = None if cosine is None else max(-1.0, min(1.0, cosine))
                yield Candidate(each, rows[each].text, rows[each].metadata, bounded, self._bm25.get(each))

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
