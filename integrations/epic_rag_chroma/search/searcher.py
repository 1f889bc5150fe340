"""Search: from queries to hits, by vectors, by keywords, or by both.

query -> vector -> nearest chunks ┐
                                  ├ fusion -> deduplication -> (reranker) -> passages -> hits
query -> terms  -> BM25           ┘

Filters are exact: the result is the k best of the chunks that pass, if there are k. First the ranking is read a few
times deeper than needed, which suffices where most chunks pass. Otherwise the metadata of all chunks is scanned once,
and those that pass are ranked.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from epic_rag.errors import ConfigError
from epic_rag_chroma.errors import IndexMismatchError, IndexStateError
from epic_rag_chroma.search.conditions import KNOWN_KEYS
from epic_rag_chroma.search.deduplicate import ComparedText
from epic_rag_chroma.search.filters import Filter
from epic_rag_chroma.search.fusion import FUSION_DEPTH, fuse
from epic_rag_chroma.search.marks import MarkedRanking, Marks, find_marks
from epic_rag_chroma.search.passages import Candidate, Passage, add_context, choose, join, number_of, section
from epic_rag_chroma.search.reranking import RERANK_DEPTH, Reranker, load_reranker, rerank_scores
from epic_rag_chroma.store.keyword_index import KeywordsUnavailableError
from epic_rag_chroma.store.layout import is_safe_relative_path
from epic_rag_chroma.store.paths import root_path
from epic_rag_chroma.store.state import stale_state
from epic_rag_chroma.store.tokenizer import ParsedQuery, parse_query, plain_query, possible_options
from epic_rag_chroma.types import Hit, Mark

if TYPE_CHECKING:
    from epic_rag import DemonstrationBank
    from epic_rag_chroma.search.index_reader import IndexReader, IndexSnapshot, Ranking
    from epic_rag_chroma.search.request import SearchRequest
    from epic_rag_chroma.store.database import Record

__all__ = ["Embedded", "Encode", "Searcher", "replace_queries"]

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
Encode: TypeAlias = Callable[[Sequence[str]], Vectors]
"""Queries in, unit vectors (n, dim) out."""
Embedded: TypeAlias = "str | Sequence[str] | npt.NDArray[np.float32]"
"""Replaces a query among the vectors: texts whose vectors are averaged, or a vector (dim,) of any length."""

# How much deeper than needed a ranking is read before the filters are applied to it.
_OVERSAMPLING = 4
# The minimum number of chunks that are compared for near-duplicates at a time.
_MIN_PAGE = 20
# The most chunks of a section before and after the one that was found.
_SECTION_CHUNKS = 50
_MARK_ORDER: Mapping[Mark | None, int] = {"right": 0, None: 1, "wrong": 2}


class Searcher:
    """Searches one index.

    Args:
        index_dir: The index folder.
        reader: Reads it.
        fusion_depth: How deep each ranking is read for fusion.
    """

    def __init__(
        self,
        index_dir: Path,
        reader: IndexReader,
        *,
        fusion_depth: int = FUSION_DEPTH,
    ) -> None:
        self._index_dir = index_dir
        self._reader = reader
        self._fusion_depth = fusion_depth
        self._rerankers: dict[str, Reranker] = {}
        # Chunks that passed the last filters: an application often uses the same filters for all its queries.
        self._allowed: dict[tuple[tuple[str, int], str], frozenset[int]] = {}

    def search(
        self,
        texts: Sequence[str],
        request: SearchRequest,
        encode: Encode,
        *,
        fingerprint: str | None = None,
        bank: DemonstrationBank | None = None,
    ) -> list[list[Hit]]:
        """Search for queries.

        Args:
            texts: The queries.
            request: Settings of the search.
            encode: Encodes the queries; not called in keyword mode.
            fingerprint: Fingerprint of the model that encodes them; None to search any index.
            bank: Its examples mark passages of queries that are asked again.

        Returns:
            The hits of each query, best first.

        Raises:
            ConfigError: If a filter is invalid.
            IndexMismatchError: If the index was rebuilt with another model while the queries were encoded.
            IndexStateError: If lines around a hit are requested of an index that an older version made.
            CheckpointError: If the reranker cannot be loaded.
            KeywordsUnavailableError: In keyword mode, if there is no keyword index.
        """
        passes = Filter(request.filters, self._index_dir) if request.filters else None
        reranker = None if request.reranker is None else self._reranker(request.reranker)
        parsed = [ParsedQuery(text, ()) for text in texts] if request.mode == "dense" else self._parsed(texts)
        vectors = None if request.mode == "keyword" or not texts else encode([query.text for query in parsed])
        marks = [Marks() if bank is None else find_marks(text, bank) for text in texts]

        def search(index: IndexSnapshot) -> list[list[Passage]]:
            if vectors is not None and fingerprint is not None:
                state = index.database.state()
                if state is None or state.fingerprint != fingerprint:
                    raise IndexMismatchError(
                        f"The index in {self._index_dir} was rebuilt with another model during the query. Repeat it."
                    )
            if passes is not None and passes.needs_files:
                passes.use_files(index.database.files())
            key = (index.database.version(), repr(request.filters))
            allowed = None if passes is None or passes.needs_files else self._allowed.get(key)
            if passes is not None and passes.front_matter_keys and allowed is None:
                known = index.database.front_matter_keys()
                for name in sorted(passes.front_matter_keys - known):
                    keys = ", ".join((*KNOWN_KEYS, *sorted(known)))
                    raise ConfigError(f"Cannot filter by {name!r}. The keys of this index are {keys}.")
            filtered = _FilteredIndex(index, passes, allowed)
            found = [
                self._search_one(
                    filtered.restricted(query, is_hybrid=vectors is not None),
                    query,
                    None if vectors is None else vectors[row],
                    request,
                    reranker,
                    marks[row],
                )
                for row, query in enumerate(parsed)
            ]
            needs_positions = bool(request.before or request.after or request.full_section)
            for hit in (hit for hits in found for hit in hits):
                if needs_positions and number_of(hit.best.row, "position") is None:
                    raise IndexStateError(
                        f"{self._index_dir} was made by an older version, which did not store the order of chunks. "
                        "Run `epic-rag index` to update it."
                    )
                metadata = hit.best.row.metadata
                root, path = str(metadata.get("root", "")), str(metadata.get("path", ""))
                entry = index.database.file((root, path))
                if entry is not None and entry.stamp is not None:
                    location = str(root_path(root, self._index_dir) / path)
                    hit.stale = stale_state(location, entry.stamp.size, entry.stamp.mtime_ns)
                if request.before or request.after:
                    add_context(hit, index.database.neighbours, request.before, request.after)
            if filtered.allowed is not None:
                self._allowed = {key: filtered.allowed}
            return found

        found = self._reader.read(search, needs_vectors=vectors is not None)
        return [[self._hit(rank, each) for rank, each in enumerate(hits, 1)] for hits in found]

    def _parsed(self, texts: Sequence[str]) -> list[ParsedQuery]:
        """Return the queries with their syntax read; options of commands are looked up in the index."""
        if any(map(possible_options, texts)):
            with suppress(KeywordsUnavailableError):
                return self._reader.read(
                    lambda index: [index.database.parsed(text) for text in texts], needs_vectors=False
                )
        return [parse_query(text) for text in texts]

    def _search_one(
        self,
        index: _FilteredIndex,
        query: ParsedQuery,
        vector: Vectors | None,
        request: SearchRequest,
        reranker: Reranker | None,
        marks: Marks,
    ) -> list[Passage]:
        """Return the k best passages of one query."""
        count = request.k if reranker is None else max(request.k, RERANK_DEPTH)
        depth = max(2 * count, self._fusion_depth)
        marked: Mapping[str, Mark] = {}
        section_of = (lambda row: section(row, index.neighbours, _SECTION_CHUNKS)) if request.full_section else None
        while True:
            cosines = {} if vector is None else dict(index.nearest(vector, depth))
            bm25 = {} if request.mode == "dense" else dict(index.match(query, depth, is_hybrid=vector is not None))
            is_hybrid = vector is not None and request.mode == "hybrid"
            ranking = list((cosines or bm25).items())
            if is_hybrid:
                ranking = fuse(list(cosines.items()), list(bm25.items()), index.attainable(query) if bm25 else 0.0)
            if marks:
                reordered = MarkedRanking(
                    marks, lambda ids: {row_id: row.text for row_id, row in index.get(ids).items()}
                )
                ranking = reordered.reorder(ranking, partial(index.match, is_hybrid=True))
                marked = reordered.marked
            found: list[Candidate] = []
            chosen: list[Passage] = []
            compared: list[ComparedText] = []
            page = max(2 * count, _MIN_PAGE)
            for start in range(0, len(ranking), page):
                rows = index.get([row_id for row_id, _ in ranking[start : start + page]])
                for row_id, score in ranking[start : start + page]:
                    row = rows.get(row_id)
                    # A row may have been deleted just now. And a crafted index could name any file of the machine.
                    if row is None or not is_safe_relative_path(str(row.metadata.get("path", ""))):
                        continue
                    cosine = None
                    if vector is not None:
                        cosine = max(-1.0, min(1.0, cosines.get(row_id, float(row.vector @ vector))))
                    if request.mode == "dense" and cosine is not None:
                        score = cosine
                    candidate = Candidate(row, score, cosine, bm25.get(row_id), marked=marked.get(row_id))
                    if reranker is None and not _reaches(candidate, request):
                        continue
                    if request.collapse:
                        mine = ComparedText(row.text, "".join(candidate.headings[-1:]))
                        same = (number for number, other in enumerate(compared) if other.is_near_duplicate(mine))
                        first = next(same, None)
                        if first is not None:
                            found[first].duplicates.append(candidate.location)
                            continue
                        compared.append(mine)
                    found.append(candidate)
                if reranker is not None:
                    if len(found) >= count:
                        break
                    continue
                chosen, is_final = _chosen(found, request, section_of)
                if is_final:
                    break
            enough = len(found) if reranker is not None else len(chosen)
            if enough >= count or len(ranking) < depth or _is_complete(request, cosines, bm25, reranker):
                break
            depth *= 4
        if reranker is not None:
            found = found[:count]
            texts = ["\n".join((*each.headings[-1:], each.row.text)) for each in found]
            for each, score in zip(found, rerank_scores(reranker, query.text, texts), strict=True):
                each.score = each.rerank_score = score
            found.sort(key=lambda each: (_MARK_ORDER[each.marked], -each.score))
            chosen, _ = _chosen([each for each in found if _reaches(each, request)], request, section_of)
        if is_hybrid:  # chunks that only the vectors found
            missing = index.bm25(query, [passage.best.row.id for passage in chosen if passage.bm25 is None])
            for passage in chosen:
                passage.bm25 = missing.get(passage.best.row.id, passage.bm25)
        return chosen

    def _reranker(self, given: str | os.PathLike[str] | Reranker) -> Reranker:
        if callable(given):
            return given
        name = os.fspath(given)
        if name not in self._rerankers:
            self._rerankers[name] = load_reranker(name)
        return self._rerankers[name]

    def _hit(self, rank: int, found: Passage) -> Hit:
        row = found.best.row
        metadata: Mapping[str, Any] = row.metadata
        text, _ = join(found.rows)
        return Hit(
            rank=rank,
            score=found.best.score,
            path=str(metadata.get("path", "")),
            first_line=min((line for each in found.rows if (line := number_of(each, "first_line"))), default=None),
            last_line=max((line for each in found.rows if (line := number_of(each, "last_line"))), default=None),
            page=number_of(row, "page"),
            heading_path=found.best.headings,
            text=text,
            id=row.id,
            document_id=str(metadata.get("doc_id", "")),
            root=str(root_path(str(metadata.get("root", "")), self._index_dir)),
            kind=str(metadata.get("kind", "")),
            lang=str(metadata.get("lang", "")),
            cosine=found.cosine,
            bm25=found.bm25,
            rerank_score=found.best.rerank_score,
            duplicates=tuple(found.duplicates),
            stale=found.stale,
            before=found.before,
            after=found.after,
            marked=found.best.marked,
        )


def _chosen(
    found: Sequence[Candidate], request: SearchRequest, section_of: Callable[[Record], list[Record]] | None
) -> tuple[list[Passage], bool]:
    merge = request.merge and request.collapse
    return choose(found, request.k, per_file=request.file_limit, merge=merge, section_of=section_of)


def _reaches(candidate: Candidate, request: SearchRequest) -> bool:
    """Return whether a chunk has the lowest score that is asked for."""
    if request.min_score is None:
        return True
    scores = (candidate.rerank_score, candidate.cosine, candidate.bm25)
    return next((score for score in scores if score is not None), -math.inf) >= request.min_score


def _is_complete(
    request: SearchRequest, cosines: Mapping[str, float], bm25: Mapping[str, float], reranker: Reranker | None
) -> bool:
    """Return whether all chunks that reach the lowest score are in the rankings already."""
    if request.min_score is None or reranker is not None:
        return False
    scores = cosines or bm25
    return not scores or min(scores.values()) < request.min_score


class _FilteredIndex:
    """The chunks of an index that pass the filters.

    Args:
        index: The index.
        passes: The filters; None for all chunks.
        allowed: Numbers of the chunks that pass, if known from an earlier search.
    """

    def __init__(self, index: IndexSnapshot, passes: Filter | None, allowed: frozenset[int] | None) -> None:
        self.get = index.database.get
        self.neighbours = index.database.neighbours
        self.allowed = allowed
        self._index = index
        self._passes = passes
        # Chunks that a query is restricted to, by its phrases and by what it excludes.
        self._restricted: frozenset[int] | None = None

    def restricted(self, query: ParsedQuery, *, is_hybrid: bool) -> _FilteredIndex:
        """Return the index without the chunks that a query excludes or that lack one of its phrases.

        Raises:
            KeywordsUnavailableError: See `match`.
        """
        self._restricted = None
        if query.has_syntax:
            with self._without_keywords(is_hybrid):
                required, excluded = self._index.database.restrict(query)
                allowed = frozenset(map(int, self._index.database.numbers())) if required is None else required
                if self._passes is not None:
                    allowed &= self._scanned(self._passes)
                self._restricted = allowed - excluded
        return self

    def nearest(self, vector: Vectors, k: int) -> Ranking:
        """Return the k nearest chunks that pass, with their cosines."""
        return self._filtered(lambda count, allowed: self._index.nearest(vector, count, allowed), k)

    def match(self, query: str | ParsedQuery, k: int, *, is_hybrid: bool) -> Ranking:
        """Return the k chunks that pass with the highest BM25 scores; a text has no syntax.

        Raises:
            KeywordsUnavailableError: If there is no keyword index of this version, unless the vectors are searched too.
        """
        parsed = plain_query(query) if isinstance(query, str) else query
        with self._without_keywords(is_hybrid):
            return self._filtered(lambda count, allowed: self._index.database.match(parsed, count, allowed), k)
        return []

    def bm25(self, query: ParsedQuery, ids: Collection[str]) -> dict[str, float]:
        """Return BM25 scores of chunks, without those that match no term of the query."""
        if not ids:
            return {}
        with suppress(KeywordsUnavailableError):
            return dict(self._index.database.match(query, len(ids), self._index.database.numbers_of(ids)))
        return {}

    def attainable(self, query: ParsedQuery) -> float:
        """Return the BM25 score of a chunk that has every word of the query."""
        return self._index.database.attainable(query)

    @contextmanager
    def _without_keywords(self, is_hybrid: bool) -> Iterator[None]:
        try:
            yield
        except KeywordsUnavailableError as error:
            if not is_hybrid:
                raise
            logger.warning("%s Searched by vectors only.", error)

    def _scanned(self, passes: Filter) -> frozenset[int]:
        if self.allowed is None:
            self.allowed = frozenset(number for number, metadata in self._index.database.scan() if passes(metadata))
        return self.allowed

    def _filtered(self, rank: Callable[[int, Collection[int] | None], Ranking], k: int) -> Ranking:
        if self._restricted is not None:
            return rank(k, self._restricted) if self._restricted else []
        if self._passes is None:
            return rank(k, None)
        if self.allowed is None:
            some = rank(_OVERSAMPLING * k, None)
            rows = self.get([row_id for row_id, _ in some])
            passed = [
                (row_id, score) for row_id, score in some if row_id in rows and self._passes(rows[row_id].metadata)
            ]
            if len(passed) >= k or len(some) < _OVERSAMPLING * k:
                return passed[:k]
        allowed = self._scanned(self._passes)
        return rank(k, allowed) if allowed else []


def replace_queries(encode: Encode, embedded: Sequence[Embedded | None], dimension: int) -> Encode:
    """Return a function that encodes queries by what replaces them.

    Args:
        encode: Encodes texts.
        embedded: One replacement for each query; None for the query itself.
        dimension: The dimension of the index.

    Raises:
        ConfigError: If a replacement has no text, or a vector has another dimension or the length 0.
    """
    given = [[each] if isinstance(each, str) else each for each in embedded]
    for each in given:
        if isinstance(each, np.ndarray) and each.shape != (dimension,):
            shown = f"{each.size} numbers" if each.ndim == 1 else f"the shape {each.shape}"
            raise ConfigError(
                f"The query's vector has {shown}, the vectors of the index have {dimension}. "
                "Embed the query with the model of the index, or pass its text."
            )
        if isinstance(each, np.ndarray):
            _unit(each)
        elif each is not None and not list(each):
            raise ConfigError("There is no text to embed for the query. Pass at least one.")

    def encode_replacements(queries: Sequence[str]) -> Vectors:
        texts: list[str] = []
        parts: list[slice | Vectors] = []
        for query, each in zip(queries, given, strict=True):
            if isinstance(each, np.ndarray):
                parts.append(_unit(each))
                continue
            start = len(texts)
            texts += [query] if each is None else each
            parts.append(slice(start, len(texts)))
        encoded = encode(texts) if texts else np.empty((0, dimension), np.float32)
        return np.stack([_unit(encoded[part].mean(axis=0)) if isinstance(part, slice) else part for part in parts])

    return encode_replacements


def _unit(vector: Vectors) -> Vectors:
    length = float(np.linalg.norm(vector))
    if not 0 < length < np.inf:
        raise ConfigError(f"The query's vector has length {length}. Pass one with a direction.")
    return (vector / length).astype(np.float32)
