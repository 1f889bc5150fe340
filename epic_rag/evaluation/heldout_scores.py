"""Scores of one model on held-out pairs: without demonstrations, with them, and with wrong ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from epic_rag.demonstrations import Demonstration
from epic_rag.evaluation.embedding import EmbeddingStore, QueryPrompt
from epic_rag.evaluation.heldout import HeldoutSplit, Pair, draw_demonstrations, mismatch
from epic_rag.evaluation.metrics import mean_and_error, ndcg_at_k
from epic_rag.prompt import Strategy

__all__ = ["CONDITIONS", "Comparison", "Condition", "HeldoutResult", "HeldoutScore", "score_heldout"]

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
        instruction: What the queries got; None for a plain model.
        queries: Number of test queries.
        documents: Number of documents.
        pool: Number of rows that demonstrations were drawn from.
        scores: By condition and k.
        seconds: Wall time.
    """

    name: str
    revision: str
    instruction: str | None
    queries: int
    documents: int
    pool: int
    scores: tuple[HeldoutScore, ...]
    seconds: float = field(compare=False)


def score_heldout(
    store: EmbeddingStore,
    split: HeldoutSplit,
    *,
    ks: Sequence[int],
    draws: int = 3,
    controls: bool = False,
    foreign_pool: Sequence[Pair] | None = None,
    plain: bool = False,
    strategy: Strategy = "epic",
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
    """
    started = time.monotonic()
    instruction = None if plain else split.instruction
    wanted = [] if plain else sorted({k for k in ks if k > 0})

    def score(demonstrations: Sequence[Demonstration]) -> _Scores:
        prompt = QueryPrompt(instruction, tuple(demonstrations), split.symmetric, strategy)
        # The documents of a symmetric task are queries without demonstrations, as in training.
        bare = QueryPrompt(instruction)
        documents = store.queries(split.documents, bare) if split.symmetric else store.documents(split.documents)
        return ndcg_at_k(store.queries(split.queries, prompt), documents, split.relevant, excluded=split.excluded)

    zero = score(())
    scores = [HeldoutScore("none", 0, float(zero.mean()), (float(zero.mean()),), 0.0)]
    for k in wanted:
        shown = {
            condition: np.stack([score(demonstrations) for demonstrations in variants])
            for condition, variants in _variants(split, k, draws, controls, foreign_pool).items()
        }
        scores += [_summary(condition, k, shown, zero) for condition in shown]
    return HeldoutResult(
        name=split.name,
        revision=split.revision,
        instruction=instruction,
        queries=len(split.queries),
        documents=len(split.documents),
        pool=len(split.pool),
        scores=tuple(scores),
        seconds=time.monotonic() - started,
    )


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
