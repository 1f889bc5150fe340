"""Scores of one arm of an ablation: on files never trained on, and on rows of trained tasks that training left out.

Both are scored by `score_heldout`, with the same controls. A trained task's demonstrations are rows that were trained
on; its test queries, their passages and whatever shares a group with them were not.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from epic_rag.errors import PromptError
from epic_rag.evaluation.embedding import EmbeddingStore
from epic_rag.evaluation.heldout import HeldoutSplit, Pair, assemble_split, query_rows, with_components
from epic_rag.evaluation.heldout_scores import Comparison, Condition, score_heldout
from epic_rag.evaluation.metrics import mean_and_error
from epic_rag.evaluation.prompts import normalised
from epic_rag.prompt import Strategy

if TYPE_CHECKING:
    from epic_rag.evaluation.ablation_grid import GridEvaluation
    from epic_rag.training.data import PairDataset

__all__ = ["ArmScores", "Part", "QueryScores", "Score", "score_arm", "split_of_task"]

Part = Literal["trained", "heldout"]


@dataclass(frozen=True)
class Score:
    """One line of an arm's scores, or a mean over tasks.

    Attributes:
        shown: How demonstrations were shown.
        part: "trained" (rows left out of training) or "heldout" (files never trained on).
        task: Name of the task or file; "mean" for a mean.
        condition: What was shown.
        k: How many demonstrations.
        ndcg_at_10: Mean over draws and queries, 0 to 1.
        standard_error: Of the mean, over queries.
        queries: Number of test queries.
        versus_zero: This minus k = 0, paired by query.
        versus_shuffled: Own demonstrations minus shuffled ones.
        versus_foreign: Own demonstrations minus another task's.
        versus_reference: This arm minus the reference arm, paired by query.
    """

    shown: Strategy
    part: Part
    task: str
    condition: Condition
    k: int
    ndcg_at_10: float
    standard_error: float
    queries: int
    versus_zero: Comparison | None = None
    versus_shuffled: Comparison | None = None
    versus_foreign: Comparison | None = None
    versus_reference: Comparison | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Score:
        """Read what `dataclasses.asdict` made of one."""
        comparisons = {name: value for name, value in values.items() if name.startswith("versus_")}
        return cls(
            **{
                **values,
                **{name: None if value is None else Comparison(**value) for name, value in comparisons.items()},
            }
        )


@dataclass(frozen=True)
class QueryScores:
    """nDCG@10 of single queries, for comparing two arms query by query.

    Attributes:
        queries: A hash of the test queries and their corpus: scores can be paired where it is equal.
        values: "own-8" and the like -> one mean over draws for each query.
    """

    queries: str
    values: dict[str, list[float]]


@dataclass
class ArmScores:
    """Everything that scoring an arm finds.

    Attributes:
        scores: Every task, condition and k.
        skipped: What could not be scored, and why: one line each.
        by_query: (shown, part, task) -> scores of single queries.
    """

    scores: list[Score] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    by_query: dict[tuple[str, str, str], QueryScores] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "scores": [asdict(score) for score in self.scores],
            "skipped": self.skipped,
            "by_query": [[*key, asdict(scores)] for key, scores in self.by_query.items()],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ArmScores:
        """Read what `to_json` made."""
        return cls(
            [Score.from_json(score) for score in values["scores"]],
            list(values["skipped"]),
            {(shown, part, task): QueryScores(**scores) for shown, part, task, scores in values["by_query"]},
        )

    def compared_with(self, reference: ArmScores, shown: Strategy) -> ArmScores:
        """The same scores with `versus_reference`.

        Args:
            reference: The other arm's scores.
            shown: Which of its strategies is the reference.
        """
        scores = [replace(score, versus_reference=self._versus(score, reference, shown)) for score in self.scores]
        return ArmScores(scores, self.skipped, self.by_query)

    def _versus(self, score: Score, reference: ArmScores, shown: Strategy) -> Comparison | None:
        ours = self.by_query.get((score.shown, score.part, score.task))
        theirs = reference.by_query.get((shown, score.part, score.task))
        key = _key(score.condition, score.k)
        # Another file, or other rows of it, cannot be paired.
        if ours is None or theirs is None or ours.queries != theirs.queries or key not in theirs.values:
            return None
        return Comparison(*mean_and_error(np.array(ours.values[key]) - np.array(theirs.values[key])))


def split_of_task(dataset: PairDataset, *, queries: int, documents: int) -> HeldoutSplit | None:
    """A retrieval test made of the rows that training left out.

    The pool of demonstrations is made of trained rows that share nothing with a test query. In a task with few targets
    (labels), where every label is in the pool, they share no query with one.

    Args:
        dataset: With held-out rows.
        queries: Most test queries.
        documents: Documents wanted in the corpus.

    Returns:
        The test; None if no held-out row can be asked.
    """
    pairs = with_components([(row.query, row.positive, row.group) for row in [*dataset.held_out, *dataset.rows]])
    held, trained = pairs[: len(dataset.held_out)], pairs[len(dataset.held_out) :]
    test = query_rows(held, queries)
    if not test:
        return None
    rest = list(trained)
    random.Random(f"ablation-{dataset.name}").shuffle(rest)
    if dataset.label_like:
        asked = {normalised(pair.query) for pair in test}
        pool = [pair for pair in rest if normalised(pair.query) not in asked]
    else:
        tested = {pair.component for pair in held}
        pool = [pair for pair in rest if pair.component not in tested]
    return assemble_split(
        dataset.name,
        test=test,
        rest=[*held, *rest],
        pool=pool,
        documents=documents,
        instruction=dataset.instruction or "",
        revision=dataset.sha256[:16],
        symmetric=dataset.symmetric,
    )


def score_arm(
    store: EmbeddingStore,
    splits: Mapping[Part, Sequence[HeldoutSplit]],
    evaluation: GridEvaluation,
    strategies: Sequence[Strategy],
) -> ArmScores:
    """Score an arm.

    Args:
        store: Embeddings of its final checkpoint.
        splits: The tests.
        evaluation: What is shown, and how often.
        strategies: How it is shown.
    """
    found = ArmScores()
    everything = [split for part in splits.values() for split in part]
    for shown in strategies:
        for part, tests in splits.items():
            # Foreign demonstrations are another task's of the same part, where there is one.
            ring = list(tests) if len(tests) > 1 else everything
            for split in tests:
                other = ring[(ring.index(split) + 1) % len(ring)]
                _score_split(found, store, split, other.pool if other is not split else None, part, shown, evaluation)
    return found


def _score_split(
    found: ArmScores,
    store: EmbeddingStore,
    split: HeldoutSplit,
    foreign: Sequence[Pair] | None,
    part: Part,
    shown: Strategy,
    evaluation: GridEvaluation,
) -> None:
    by_query: dict[str, npt.NDArray[np.float64]] = {}

    def observe(condition: Condition, k: int, scores: npt.NDArray[np.float64]) -> None:
        by_query[_key(condition, k)] = scores.mean(axis=0)

    for k in evaluation.num_demonstrations:
        what = f"{split.name} at k = {k}, shown as {shown}"
        if k > len(split.pool):
            found.skipped.append(f"{what}: {len(split.pool)} rows are free for demonstrations")
            continue
        try:
            result = score_heldout(
                store,
                split,
                ks=[k],
                draws=evaluation.draws,
                controls=evaluation.controls,
                foreign_pool=foreign if foreign is not None and len(foreign) >= k else None,
                strategy=shown,
                observe=observe,
            )
        except PromptError as error:
            # A fact about the strategy: texts take more positions than the model has.
            found.skipped.append(f"{what}: {error}")
            continue
        for score in result.scores:
            # k = 0 comes with every other k, for their differences.
            if score.k == k:
                mean, standard_error = mean_and_error(by_query[_key(score.condition, k)])
                found.scores.append(
                    Score(
                        *(shown, part, split.name, score.condition, k, mean, standard_error, len(split.queries)),
                        versus_zero=score.versus_zero,
                        versus_shuffled=score.versus_shuffled,
                        versus_foreign=score.versus_foreign,
                    )
                )
    ours = [score for score in found.scores if (score.shown, score.part, score.task) == (shown, part, split.name)]
    keys = [_key(score.condition, score.k) for score in ours]
    found.by_query[shown, part, split.name] = QueryScores(
        _test_hash(split), {key: [round(float(value), 6) for value in by_query[key]] for key in keys}
    )


def _key(condition: Condition, k: int) -> str:
    return f"{condition}-{k}"


def _test_hash(split: HeldoutSplit) -> str:
    return hashlib.sha256(json.dumps([split.queries, split.documents]).encode()).hexdigest()[:16]
