"""Collections of the few-shot evaluation: vectors of tasks, exact rankings, nDCG@10 by cosine and fused with BM25.

Rankings are fused as `epic-rag query` fuses them: cosines, scaled so that the nearest document has 1 and the hundredth
0, plus 1.5 times the share of the best BM25 score, or of half of the attainable one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from epic_rag.evaluation.bm25 import Bm25Index
from epic_rag.evaluation.embedding_store import EmbeddingStore, make_prompt
from epic_rag.evaluation.few_shot_methods import Centred
from epic_rag.evaluation.heldout import Collection, HeldoutSplit, in_collection, passage_key

__all__ = ["CollectionFamily", "TaskRanking", "TaskVectors", "families_of_tasks"]

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]
_DEPTH = 100
_KEYWORD_WEIGHT = 1.5
_LEAST_COVERAGE = 0.5
_CUT = 10
_DISCOUNTS = 1.0 / np.log2(np.arange(2, _CUT + 2))


class TaskVectors:
    """Vectors of one task, and the demonstrations of its draws."""

    def __init__(self, store: EmbeddingStore, split: HeldoutSplit, pool: Sequence[int] | None = None) -> None:
        self.split = split
        self.rows = list(range(len(split.pool))) if pool is None else list(pool)
        texts = [*split.queries, *(split.pool[row].query for row in self.rows)]
        vectors = store.queries(texts, make_prompt(split.instruction))
        self.queries = vectors[: len(split.queries)]
        self.documents = store.documents(split.documents)
        self.others = store.documents(split.other_queries)
        places = {passage_key(text): row for row, text in enumerate(split.documents)}
        self.passage_rows = np.array([places[passage_key(pair.passage)] for pair in split.pool])
        self.pairs = np.zeros((len(split.pool), 3, vectors.shape[1]), dtype=np.float32)
        self.pairs[self.rows, 0] = vectors[len(split.queries) :]
        self.pairs[:, 1] = self.documents[self.passage_rows]
        self.pairs[self.rows, 2] = store.documents([split.pool[row].query for row in self.rows])

    def draw(self, n: int, seed: int) -> Rows:
        """Return n rows of the pool; the first ones of a permutation that depends on seed and task alone."""
        return _drawn(self.split, n, seed)


def _drawn(split: HeldoutSplit, n: int, seed: int) -> Rows:
    order = list(range(len(split.pool)))
    random.Random(f"few-shot-{split.name}-{seed}").shuffle(order)
    return np.array(order[:n])


class TaskRanking:
    """A collection as the queries of one task see it: what is relevant, what keywords find, zero-shot scores.

    Args:
        split: The task with the collection's documents.
        place: Rows of the task's own documents.
        keywords: Index of the documents; None for rankings by cosine alone.
    """

    def __init__(self, split: HeldoutSplit, place: Rows, keywords: Bm25Index | None) -> None:
        queries, documents = len(split.queries), len(split.documents)
        self.place = place
        self.documents = documents
        # One more column stands for "no document", in rankings that are shorter than others.
        self._relevant = np.zeros((queries, documents + 1), dtype=bool)
        for query, rows in enumerate(split.relevant):
            self._relevant[query, list(rows)] = True
        self.excluded = tuple(
            np.array(pairs, dtype=np.intp)
            for pairs in zip(*((q, d) for q, rows in enumerate(split.excluded) for d in rows), strict=True)
        )
        counts = np.minimum(self._relevant.sum(axis=1), _CUT)
        self._ideal = np.concatenate([[np.inf], np.cumsum(_DISCOUNTS)])[counts]
        self._keywords: Rows | None = None
        if keywords is not None:
            scores = np.stack(list(keywords.scores(split.queries)))
            if self.excluded:
                scores[self.excluded] = -np.inf
            self._keywords, bm25 = _best(scores)
            full = np.maximum(bm25[:, 0], _LEAST_COVERAGE * keywords.attainable(split.queries))[:, None]
            with np.errstate(invalid="ignore", divide="ignore"):
                self._shares = np.where(np.isfinite(bm25), _KEYWORD_WEIGHT * bm25 / full, 0.0)
            self._sums = np.zeros((queries, documents + 1))
        self.zero: dict[str, npt.NDArray[np.float64]] = {}

    def ndcg(self, best: Rows, cosines: Vectors) -> dict[str, npt.NDArray[np.float64]]:
        """Return nDCG@10 of each query by kind of ranking, given the best documents and cosines (queries, depth)."""
        found = {"dense": self._score(best[:, :_CUT])}
        if self._keywords is not None:
            found["hybrid"] = self._score(self._fuse(best, cosines, self._keywords))
        return found

    def _fuse(self, dense: Rows, cosines: Vectors, lexical: Rows) -> Rows:
        """Return the first ten of both rankings by their sum, equal ones by cosine, then in the order of rows."""
        known = np.isfinite(cosines)
        highest = cosines[:, :1].astype(np.float64)
        floor = np.where(known, cosines, np.inf).min(axis=1, keepdims=True).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            scaled = np.where(highest > floor, (cosines - floor) / (highest - floor), 1.0)
        for ranking, scores in ((dense, np.where(known, scaled, 0.0)), (lexical, self._shares)):
            held = np.take_along_axis(self._sums, ranking, axis=1)
            np.put_along_axis(self._sums, ranking, held + scores, axis=1)
        self._sums[:, -1] = -1.0  # no document
        both = np.concatenate([dense, lexical], axis=1)
        nearness = np.concatenate([np.where(known, cosines, -1.0), np.full(lexical.shape, -1.0)], axis=1)
        order = np.argsort(both, axis=1, kind="stable")  # a document of both rankings stands twice, its cosine first
        both, nearness = np.take_along_axis(both, order, axis=1), np.take_along_axis(nearness, order, axis=1)
        values = np.take_along_axis(self._sums, both, axis=1)
        values[:, 1:][both[:, 1:] == both[:, :-1]] = -2.0
        np.put_along_axis(self._sums, both, 0.0, axis=1)
        best = np.lexsort((both, -nearness, -values), axis=1)[:, :_CUT]
        ranked: Rows = np.take_along_axis(both, best, axis=1)
        ranked[np.take_along_axis(values, best, axis=1) < 0] = self.documents
        return ranked

    def _score(self, ranked: Rows) -> npt.NDArray[np.float64]:
        hits = np.take_along_axis(self._relevant, ranked, axis=1)
        result: npt.NDArray[np.float64] = hits @ _DISCOUNTS[: ranked.shape[1]] / self._ideal
        return result


@dataclass
class CollectionFamily:
    """Collections that share documents: those of a smaller one are the first of the largest one.

    Args:
        documents: Vectors of the largest collection.
        rankings: By collection, the smallest first.
    """

    documents: Centred
    rankings: dict[Collection, TaskRanking] = field(default_factory=dict)

    def ndcg(self, scores: Vectors) -> Iterator[tuple[Collection, dict[str, npt.NDArray[np.float64]]]]:
        """Yield each collection's nDCG@10; (queries, documents of the largest collection) scores are written to."""
        last = list(self.rankings.values())[-1]
        if last.excluded:
            scores[last.excluded] = -np.inf
        # A larger collection's best documents are among those of the smaller one and of its further documents.
        kept, values = np.zeros((len(scores), 0), dtype=np.intp), np.zeros((len(scores), 0), dtype=np.float32)
        start = 0
        for collection, ranking in self.rankings.items():
            rows, found = _highest(scores[:, start : ranking.documents])
            kept = np.concatenate([kept, rows + start], axis=1)
            values = np.concatenate([values, found], axis=1)
            order = np.argsort(-values, axis=1, kind="stable")[:, :_DEPTH]  # equal ones in the order of the rows
            kept, values = np.take_along_axis(kept, order, axis=1), np.take_along_axis(values, order, axis=1)
            start = ranking.documents
            yield collection, ranking.ndcg(np.where(np.isfinite(values), kept, ranking.documents), values)

    def ndcg_in(self, collection: Collection, scores: Vectors) -> dict[str, npt.NDArray[np.float64]]:
        """Return one collection's nDCG@10; its (queries, documents) scores are written to."""
        ranking = self.rankings[collection]
        if ranking.excluded:
            scores[ranking.excluded] = -np.inf
        return ranking.ndcg(*_best(scores))


def families_of_tasks(
    tasks: Sequence[TaskVectors], collections: Sequence[Collection], *, bm25: bool = True
) -> Iterator[list[CollectionFamily]]:
    """Yield the collections of each task in turn, with their zero-shot scores.

    Args:
        tasks: All tasks, whose documents make the mixed collections.
        collections: Collections to rank in.
        bm25: Also fuse rankings with BM25.
    """
    splits = [task.split for task in tasks]
    both: tuple[Collection, ...] = ("pooled", "pooled-with-queries")
    mixed = [name for name in both if name in collections]
    merged = {name: in_collection(splits, name) for name in mixed}
    shared = Centred(_collect(tasks, merged[mixed[-1]], mixed[-1])) if mixed else None
    keywords = {name: Bm25Index(found[0].documents) if bm25 else None for name, found in merged.items()}
    for number, task in enumerate(tasks):
        families = []
        if "own" in collections:
            index = Bm25Index(task.split.documents) if bm25 else None
            ranking = TaskRanking(task.split, np.arange(len(task.split.documents)), index)
            families.append(CollectionFamily(Centred(task.documents), {"own": ranking}))
        if shared is not None:
            family = CollectionFamily(shared)
            for name in mixed:
                split = merged[name][number]
                family.rankings[name] = TaskRanking(split, _own_rows(task.split, split), keywords[name])
            families.append(family)
        for family in families:
            for collection, found in family.ndcg(task.queries @ family.documents.documents.T):
                family.rankings[collection].zero = found
        yield families


def _collect(vectors: Sequence[TaskVectors], merged: Sequence[HeldoutSplit], collection: Collection) -> Vectors:
    """Return the vectors of a collection of all tasks' documents, in its order."""
    by_key: dict[str, npt.NDArray[np.float32]] = {}
    others: dict[str, npt.NDArray[np.float32]] = {}
    for known in vectors:
        for text, vector in zip(known.split.documents, known.documents, strict=True):
            by_key.setdefault(passage_key(text), vector)
        if collection == "pooled-with-queries":
            others.update(zip(known.split.other_queries, known.others, strict=True))
    return np.stack(
        [by_key[passage_key(text)] if passage_key(text) in by_key else others[text] for text in merged[0].documents]
    )


def _own_rows(own: HeldoutSplit, merged: HeldoutSplit) -> npt.NDArray[np.intp]:
    rows = {passage_key(text): row for row, text in reversed(list(enumerate(merged.documents)))}
    return np.array([rows[passage_key(text)] for text in own.documents])


def _best(scores: npt.NDArray[np.float32]) -> tuple[Rows, Vectors]:
    """Return rows and scores of each query's best documents, best first, equal ones in the order of the rows.

    The number of documents, which is no row, stands for those that are not found, with the score -inf.
    """
    kept, values = _highest(scores)
    order = np.argsort(-values, axis=1, kind="stable")
    kept, values = np.take_along_axis(kept, order, axis=1), np.take_along_axis(values, order, axis=1)
    return np.where(np.isfinite(values), kept, scores.shape[1]), values


def _highest(scores: npt.NDArray[np.float32]) -> tuple[Rows, Vectors]:
    """Return rows and scores of each query's best documents, in the order of the rows."""
    import torch

    depth = min(_DEPTH, scores.shape[1])
    kept = np.sort(torch.topk(torch.from_numpy(scores), depth, dim=1, sorted=False).indices.numpy(), axis=1)
    return kept, np.take_along_axis(scores, kept, axis=1)
