"""Expected gain of demonstrations, by cross-validation on their own pairs.

The pairs are dealt into folds. Each fold's queries are moved by the pairs of the other folds and ranked, so that no
query sees its own passage. They are ranked among all passages of the pairs and, if given, the passages of an index,
where the gain is what a user of that index can expect of a bank that is prepared against it. Wrong pairs are those
whose passage fits its query no better than the passages of other pairs do. `DemonstrationBank.evaluate` calls this
module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epic_rag.errors import BankError
from epic_rag.metrics import ndcg_at_k, unit_rows
from epic_rag.reader import DemonstrationReader, Evidence
from epic_rag.task_vector import apply_task_vector

__all__ = ["LEAST_PAIRS", "BankReport", "evaluate_pairs"]

Vectors = npt.NDArray[np.float32]

LEAST_PAIRS = 10
"""Pairs from which an expected gain is computed."""
_FOLDS = 5
_SAMPLES = 2000
_MISFIT = 1.0
_SAME_PASSAGE = 0.9999
_NEAR_PASSAGE = 0.97


@dataclass(frozen=True)
class BankReport:
    """Expected gain of a bank, times 100 as in tables.

    Attributes:
        pairs: Number of pairs.
        passages: Number of passages that queries are ranked among.
        base: nDCG@10 without demonstrations.
        base_recall: Share of queries whose passage is among the first ten without demonstrations, 0 to 1.
        gain: Mean gain in nDCG@10 by the pairs of the other folds.
        low: Lower end of its 95% interval (paired bootstrap over queries).
        high: Upper end.
        misfits: Indices of pairs whose passage fits no better than another's, worst first.
        repeated: Indices of pairs that repeat an earlier one.
    """

    pairs: int
    passages: int
    base: float
    base_recall: float
    gain: float
    low: float
    high: float
    misfits: tuple[int, ...]
    repeated: tuple[int, ...]

    @property
    def helps(self) -> bool:
        """Gain is above zero by more than chance."""
        return self.low > 0

    @property
    def harms(self) -> bool:
        """Gain is below zero by more than chance."""
        return self.high < 0

    @property
    def verdict(self) -> str:
        """One sentence about the bank's use."""
        if self.harms:
            return "It makes results worse."
        if self.helps:
            return "It improves results."
        if self.base_recall >= 0.95:
            return f"Base recall@10 is {self.base_recall:.2f}: there is little to gain."
        return "No gain can be told from chance."


def evaluate_pairs(
    pairs: Vectors,
    queries: Sequence[str],
    passages: Sequence[str],
    *,
    reader: DemonstrationReader | None = None,
    corpus: Vectors | None = None,
) -> BankReport:
    """Compute the expected gain of demonstrations.

    Args:
        pairs: (n, 3, dim) unit vectors: query, passage, and the query read as a document; n at least `LEAST_PAIRS`.
        queries: Their n queries; equal ones are in one fold.
        passages: Their n passages.
        reader: Reader of the demonstrations; None for the task vector.
        corpus: (m, d) unit vectors of an index's passages, d at most dim, in which passages of pairs may occur again.

    Raises:
        BankError: If there are too few pairs, or `corpus` has more dimensions.
    """
    n, kinds, dim = pairs.shape
    if n < LEAST_PAIRS:
        raise BankError(f"The bank has {n} pairs. An expected gain needs {LEAST_PAIRS} or more.")
    width = dim if corpus is None or not len(corpus) else corpus.shape[1]
    if width > dim:
        raise BankError(f"The passages have {width} dimensions, the bank has {dim}. Embed both with the same encoder.")
    numbers: dict[str, int] = {}
    groups = np.array([numbers.setdefault(query, len(numbers)) for query in queries])
    folds = np.random.default_rng(0).permutation(len(numbers))[groups] % min(_FOLDS, len(numbers))
    moved: Vectors = pairs[:, 0].copy()
    for fold in np.unique(folds):
        tested, shown = folds == fold, pairs[folds != fold]
        if len(shown) and reader is None:
            moved[tested] = apply_task_vector(pairs[tested, 0], [shown] * int(tested.sum()))
        elif len(shown) and reader is not None:
            moved[tested] = reader.prepare(shown, corpus).apply(pairs[tested, 0])
    if width < dim:
        moved, cut = unit_rows(moved[:, :width]), unit_rows(pairs.reshape(kinds * n, dim)[:, :width])
        pairs = cut.reshape(n, kinds, width)
    # Equal passages are all right: a label, or the same passage in the index, whose chunk has a heading before it.
    own = pairs[:, 1]
    copies = [set(np.flatnonzero(row > _SAME_PASSAGE).tolist()) for row in own @ own.T]
    documents = own
    if corpus is not None and len(corpus):
        documents = np.concatenate([own, corpus])
        for start in range(0, n, 256):
            for row, cosines in enumerate(own[start : start + 256] @ corpus.T, start):
                copies[row] |= set((n + np.flatnonzero(cosines > _NEAR_PASSAGE)).tolist())
    first = [[row] for row in range(n)]
    excluded = [sorted(found - {row}) for row, found in enumerate(copies)]
    base = ndcg_at_k(pairs[:, 0], documents, first, excluded=excluded)
    gains = 100 * (ndcg_at_k(moved, documents, first, excluded=excluded) - base)
    samples = np.random.default_rng(0).integers(n, size=(_SAMPLES, n))
    low, high = np.percentile(gains[samples].mean(axis=1), [2.5, 97.5])
    fits = Evidence.of(pairs[:, 0], own).fits
    known: dict[tuple[str, str], int] = {}
    repeated = [
        row for row, texts in enumerate(zip(queries, passages, strict=True)) if known.setdefault(texts, row) < row
    ]
    return BankReport(
        pairs=n,
        passages=len(documents),
        base=float(100 * base.mean()),
        base_recall=float((base > 0).mean()),
        gain=float(gains.mean()),
        low=float(low),
        high=float(high),
        misfits=tuple(int(row) for row in np.argsort(fits, kind="stable") if fits[row] < _MISFIT),
        repeated=tuple(repeated),
    )
