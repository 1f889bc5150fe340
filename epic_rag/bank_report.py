"""Expected gain of a bank of demonstrations, by cross-validation on its own pairs.

The pairs are dealt into folds. Each fold's queries are moved by the pairs of the other folds and ranked, so that no
query sees its own passage. They are ranked among the bank's passages and, if given, the passages of an index, where the
gain is what a user of that index can expect. Wrong pairs are those whose passage fits its query no better than the
passages of other pairs do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epic_rag.demonstrations import DemonstrationBank
from epic_rag.errors import BankError
from epic_rag.metrics import ndcg_at_k
from epic_rag.reader import DemonstrationReader, Evidence
from epic_rag.task_vector import apply_task_vector

__all__ = ["LEAST_PAIRS", "BankReport", "evaluate_bank"]

Vectors = npt.NDArray[np.float32]

LEAST_PAIRS = 10
"""Pairs from which an expected gain is computed."""
_FOLDS = 5
_SAMPLES = 2000
_MISFIT = 1.0
_SAME_PASSAGE = 0.9999


@dataclass(frozen=True)
class BankReport:
    """Expected gain of a bank, times 100 as in tables.

    Attributes:
        pairs: Number of pairs.
        base: nDCG@10 without demonstrations.
        base_recall: Share of queries whose passage is among the first ten without demonstrations, 0 to 1.
        gain: Mean gain in nDCG@10 by the pairs of the other folds.
        low: Lower end of its 95% interval (paired bootstrap over queries).
        high: Upper end.
        misfits: Indices of pairs whose passage fits no better than another's, worst first.
    """

    pairs: int
    base: float
    base_recall: float
    gain: float
    low: float
    high: float
    misfits: tuple[int, ...]

    @property
    def verdict(self) -> str:
        """One sentence about the bank's use."""
        if self.high < 0:
            return "It makes results worse."
        if self.low > 0:
            return "It improves results."
        if self.base_recall >= 0.95:
            return f"Base recall@10 is {self.base_recall:.2f}: there is little to gain."
        return "No gain can be told from chance."


def evaluate_bank(
    bank: DemonstrationBank,
    fingerprint: str,
    *,
    reader: DemonstrationReader | None = None,
    corpus: Vectors | None = None,
) -> BankReport:
    """Compute the expected gain of a bank.

    Args:
        bank: Embedded, with `LEAST_PAIRS` pairs or more.
        fingerprint: The encoder's, whose vectors are used.
        reader: Reader of the demonstrations; None for the task vector.
        corpus: (m, dim) unit vectors of an index's passages, in which the bank's passages may occur again.

    Raises:
        BankError: If the bank has too few pairs.
        FingerprintError: If it was not embedded with this encoder.
    """
    n = len(bank)
    if n < LEAST_PAIRS:
        raise BankError(f"The bank has {n} pairs. An expected gain needs {LEAST_PAIRS} or more.")
    pairs = bank.embeddings_for(fingerprint)
    queries, passages = pairs[:, 0], pairs[:, 1]

    def move(shown: Vectors, asked: Vectors) -> Vectors:
        if reader is None:
            return apply_task_vector(asked, [shown] * len(asked))
        return reader.prepare(shown).apply(asked)

    moved = _cross_validated(pairs, bank, move)
    documents = passages if corpus is None else np.concatenate([passages, corpus])
    # Equal passages are all right: a label, or the same passage in the index.
    relevant = [np.flatnonzero(row > _SAME_PASSAGE).tolist() for row in passages @ documents.T]
    copies = [rows[1:] for rows in relevant]
    first = [rows[:1] for rows in relevant]
    base = ndcg_at_k(queries, documents, first, excluded=copies)
    gains = 100 * (ndcg_at_k(moved, documents, first, excluded=copies) - base)
    samples = np.random.default_rng(0).integers(n, size=(_SAMPLES, n))
    low, high = np.percentile(gains[samples].mean(axis=1), [2.5, 97.5])
    fits = Evidence.of(queries, passages).fits
    worst = [int(row) for row in np.argsort(fits, kind="stable") if fits[row] < _MISFIT]
    return BankReport(
        pairs=n,
        base=float(100 * base.mean()),
        base_recall=float((base > 0).mean()),
        gain=float(gains.mean()),
        low=float(low),
        high=float(high),
        misfits=tuple(worst),
    )


def _cross_validated(pairs: Vectors, bank: DemonstrationBank, move: Callable[[Vectors, Vectors], Vectors]) -> Vectors:
    """Move each query by the pairs of the other folds; pairs with the same query are in one fold."""
    numbers: dict[str, int] = {}
    groups = np.array([numbers.setdefault(item.query, len(numbers)) for item in bank.demonstrations])
    folds = np.random.default_rng(0).permutation(len(numbers))[groups] % min(_FOLDS, len(numbers))
    moved: Vectors = pairs[:, 0].copy()
    for fold in np.unique(folds):
        asked, shown = folds == fold, folds != fold
        if shown.any():
            moved[asked] = move(pairs[shown], pairs[asked, 0])
    return moved
