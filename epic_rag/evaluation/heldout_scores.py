"""Scores of one model, or of BM25, on held-out pairs: without demonstrations, with them, and with wrong ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from epic_rag.demonstrations import Demonstration
from epic_rag.evaluation.bm25 import Bm25Index
from epic_rag.evaluation.embedding import EmbeddingStore, QueryPrompt, Vectors
from epic_rag.evaluation.heldout import Collection, HeldoutSplit, InstructionSource, Pair, draw_demonstrations, mismatch
from epic_rag.evaluation.metrics import mean_and_error, ndcg_at_k, ndcg_of_scores
from epic_rag.task_vector import QueryStrategy

__all__ = [
    "CONDITIONS",
    "Comparison",
    "Condition",
    "HeldoutResult",
    "HeldoutScore",
    "Observe",
    "score_heldout",
    "score_heldout_bm25",
]

logger = logging.getLogger(__name__)

Condition = Literal["none", "own", "shuffled", "foreign"]
CONDITIONS: dict[Condition, str] = {
    "none": "none",
    "own": "own",
    "shuffled": "own, passages shuffled",
    "foreign": "of another task",
}
"""What is shown to the model, and how the report calls it."""

_Scores = npt.NDArray[np.float64]
Observe = Callable[[Condition, int, _Scores], None]
"""Takes a condition, its k, and (draws, queries) scores."""


@dataclass(frozen=True)
class Comparison:
    """A paired difference of nDCG@10 over the test queries, averaged over draws first.

    Args:
        difference: Its mean.
        standard_error: Of the mean, over test queries.
    """

    difference: float
    standard_error: float


@dataclass(frozen=True)
class HeldoutScore:
    """nDCG@10 at one k under one condition.

    Args:
        condition: What is shown.
        k: How many.
        ndcg_at_10: Mean over draws and queries.
        draws: nDCG@10 of each draw of demonstrations.
        spread: Standard deviation over the draws (0 for one draw).
        versus_zero: This minus k = 0; None for k = 0 itself.
        versus_shuffled: Own demonstrations minus shuffled ones; None where that was not scored.
        versus_foreign: Own demonstrations minus another task's; None where that was not scored.
    """

    condition: Condition
    k: int
    ndcg_at_10: float
    draws: tuple[float, ...]
    spread: float
    versus_zero: Comparison | None = None
    versus_shuffled: Comparison | None = None
    versus_foreign: Comparison | None = None


@dataclass(frozen=True)
class HeldoutResult:
    """All scores of one model on one file.

    Args:
        name: The file's name.
        revision: A hash of the file.
        instruction: What the queries got, "" for none; None for a plain model and for BM25.
        queries: Number of test queries.
        documents: Number of documents.
        pool: Number of rows that demonstrations were drawn from.
        scores: By condition and k.
        seconds: Wall time.
        collection: What the queries were ranked in.
        instruction_source: Whose instruction it is; "plain" for a model that gets none at all.
    """

    name: str
    revision: str
    instruction: str | None
    queries: int
    documents: int
    pool: int
    scores: tuple[HeldoutScore, ...]
    seconds: float = field(compare=False)
    collection: Collection = "own"
    instruction_source: InstructionSource | Literal["plain"] = "own"


def score_heldout(
    store: EmbeddingStore,
    split: HeldoutSplit,
    *,
    ks: Sequence[int],
    draws: int = 3,
    controls: bool = False,
    foreign_pool: Sequence[Pair] | None = None,
    plain: bool = False,
    strategy: QueryStrategy = "epic",
    observe: Observe | None = None,
) -> HeldoutResult:
    """Score a model on held-out pairs.

    Args:
        store: The model's embeddings.
        split: The test.
        ks: Numbers of demonstrations; 0 is always scored, because differences are taken to it.
        draws: Draws of demonstrations for each k.
        controls: Also show shuffled demonstrations and, given `foreign_pool`, another task's.
        foreign_pool: Rows of another file.
        plain: No instruction and no demonstrations; `ks` above 0 are left out.
        strategy: How demonstrations are shown.
        observe: Called with the single queries' scores behind every line of the result, for example to compare two
            models query by query.
    """
    started = time.monotonic()
    instruction = None if plain else split.instruction
    wanted = [] if plain else sorted({k for k in ks if k > 0})
    documents = _documents(store, split, instruction)

    def score(demonstrations: Sequence[Demonstration]) -> _Scores:
        prompt = QueryPrompt(instruction, tuple(demonstrations), split.symmetric, strategy)
        return ndcg_at_k(store.queries(split.queries, prompt), documents, split.relevant, excluded=split.excluded)

    zero = score(())
    see = observe or (lambda condition, k, scores: None)
    see("none", 0, zero[None])
    scores = [_without(zero)]
    for k in wanted:
        shown = {
            condition: np.stack([score(demonstrations) for demonstrations in variants])
            for condition, variants in _variants(split, k, draws, controls, foreign_pool).items()
        }
        for condition, values in shown.items():
            see(condition, k, values)
            scores.append(_summary(condition, k, shown, zero))
    return _result(split, instruction, scores, started)


def score_heldout_bm25(split: HeldoutSplit) -> HeldoutResult:
    """Score BM25 on held-out pairs, at k = 0: it reads neither instructions nor demonstrations.

    Raises:
        MissingExtraError: bm25s is not installed.
    """
    started = time.monotonic()
    index = Bm25Index(split.documents)
    zero = ndcg_of_scores(index.found(split.queries), split.relevant, excluded=split.excluded)
    return _result(split, None, [_without(zero)], started)


def _documents(store: EmbeddingStore, split: HeldoutSplit, instruction: str | None) -> Vectors:
    """(m, dim) vectors of the corpus; texts that several corpora share are encoded once."""
    if split.symmetric:
        # The documents of a symmetric task are queries without demonstrations, as in training.
        return store.queries(split.documents, QueryPrompt(instruction))
    if not split.parts:
        return store.documents(split.documents)
    vectors = np.concatenate([store.documents(part) for part in split.parts])
    rows = {text: row for row, text in enumerate(text for part in split.parts for text in part)}
    return vectors[[rows[text] for text in split.documents]]


def _result(
    split: HeldoutSplit, instruction: str | None, scores: Sequence[HeldoutScore], started: float
) -> HeldoutResult:
    return HeldoutResult(
        name=split.name,
        revision=split.revision,
        instruction=instruction,
        queries=len(split.queries),
        documents=len(split.documents),
        pool=len(split.pool),
        scores=tuple(scores),
        seconds=time.monotonic() - started,
        collection=split.collection,
        instruction_source="plain" if instruction is None else split.instruction_source,
    )


def _without(zero: _Scores) -> HeldoutScore:
    """The line without demonstrations."""
    mean = float(zero.mean())
    return HeldoutScore("none", 0, mean, (mean,), 0.0)


def _variants(
    split: HeldoutSplit, k: int, draws: int, controls: bool, foreign_pool: Sequence[Pair] | None
) -> dict[Condition, list[list[Demonstration]]]:
    """For each condition the demonstrations of every draw."""
    rows = [draw_demonstrations(split.pool, k, seed=draw) for draw in range(draws)]
    variants: dict[Condition, list[list[Demonstration]]] = {"own": [_shown(drawn) for drawn in rows]}
    if controls:
        wrong = [mismatch(drawn, split.pool, seed=draw) for draw, drawn in enumerate(rows)]
        if all(item is not None for item in wrong):
            variants["shuffled"] = [item for item in wrong if item is not None]
        else:
            logger.warning("%s has no wrong passages to shuffle in at k = %d; left out", split.name, k)
        if foreign_pool is not None:
            variants["foreign"] = [_shown(draw_demonstrations(foreign_pool, k, seed=draw)) for draw in range(draws)]
    return variants


def _shown(rows: Sequence[Pair]) -> list[Demonstration]:
    return [Demonstration(row.query, row.passage) for row in rows]


def _summary(condition: Condition, k: int, shown: Mapping[Condition, _Scores], zero: _Scores) -> HeldoutScore:
    """One line of the report from (draws, queries) scores."""
    means = shown[condition].mean(axis=1)

    def versus(other: Condition) -> Comparison | None:
        if condition != "own" or other not in shown:
            return None
        return _compare(shown["own"], shown[other].mean(axis=0))

    return HeldoutScore(
        condition=condition,
        k=k,
        ndcg_at_10=float(means.mean()),
        draws=tuple(float(mean) for mean in means),
        spread=float(means.std(ddof=1)) if len(means) > 1 else 0.0,
        versus_zero=_compare(shown[condition], zero),
        versus_shuffled=versus("shuffled"),
        versus_foreign=versus("foreign"),
    )


def _compare(scores: _Scores, baseline: _Scores) -> Comparison:
    """Paired over queries: (draws, queries) scores, averaged over draws, minus (queries,) ones."""
    return Comparison(*mean_and_error(scores.mean(axis=0) - baseline))
