"""Unit vectors, nDCG of exact rankings, and means with standard errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["mean_and_error", "ndcg_at_k", "ndcg_of_scores", "unit_rows"]


def unit_rows(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scale each row of (rows, dim) to length one; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: npt.NDArray[np.float32] = vectors / np.maximum(norms, 1e-12)
    return result


def ndcg_at_k(
    queries: npt.NDArray[np.float32],
    documents: npt.NDArray[np.float32],
    relevant: Sequence[Mapping[int, int] | Sequence[int]],
    *,
    k: int = 10,
    excluded: Sequence[Sequence[int]] | None = None,
) -> npt.NDArray[np.float64]:
    """Score each query's ranking of all documents by cosine.

    The gain of a document is its grade, its discount log2(rank + 1), and the sum is divided by that of the
    best possible ranking: the same as trec_eval's ndcg_cut.

    Args:
        queries: (n, dim) unit rows.
        documents: (m, dim) unit rows.
        relevant: For each query its relevant documents' rows: a list (grade 1 each), or row -> grade.
        k: Ranks that count.
        excluded: For each query the document rows that are left out of its ranking; None for no such rows.

    Returns:
        (n,) float64 between 0 and 1; 0 for a query without relevant documents.
    """

    def scores() -> Iterator[npt.NDArray[np.float32]]:
        # Blocks of 256 queries bound the memory of the similarity matrix.
        for start in range(0, len(queries), 256):
            yield from queries[start : start + 256] @ documents.T

    return ndcg_of_scores(scores(), relevant, k=k, excluded=excluded)


def ndcg_of_scores(
    scores: Iterable[npt.NDArray[np.float32]],
    relevant: Sequence[Mapping[int, int] | Sequence[int]],
    *,
    k: int = 10,
    excluded: Sequence[Sequence[int]] | None = None,
) -> npt.NDArray[np.float64]:
    """Score rankings that are given by a score for each document; ties keep the order of the documents.

    Args:
        scores: For each query (m,) float32; a document with -inf is not found. The arrays are written to.
        relevant: As in `ndcg_at_k`.
        k: Ranks that count.
        excluded: As in `ndcg_at_k`.

    Returns:
        (n,) float64 between 0 and 1, as `ndcg_at_k`.
    """
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    found = np.zeros(len(relevant))
    for index, (row, rows) in enumerate(zip(scores, relevant, strict=True)):
        if excluded is not None:
            row[list(excluded[index])] = -np.inf
        grades = dict(rows) if isinstance(rows, Mapping) else dict.fromkeys(rows, 1)
        ideal = sorted((grade for grade in grades.values() if grade > 0), reverse=True)[:k]
        if ideal:
            gains = [max(grades.get(int(document), 0), 0) for document in _best_rows(row, k)]
            found[index] = float(gains @ discounts[: len(gains)]) / float(ideal @ discounts[: len(ideal)])
    return found


def _best_rows(scores: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.intp]:
    """Return the rows of the k highest finite scores, best first, equal ones in the order of the rows."""
    candidates = np.arange(len(scores))
    if len(scores) > k:
        # Everything that ties with the k-th stays in, so that the stable sort decides and not the partition.
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        candidates = np.flatnonzero(scores >= threshold)
    best = candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
    return best[np.isfinite(scores[best])]


def mean_and_error(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean of some values and its standard error (0 for fewer than two values)."""
    if len(values) < 2:
        return float(np.mean(values)), 0.0
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
