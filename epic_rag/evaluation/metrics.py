"""nDCG by brute force: every query against every document, no index in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["mean_and_error", "ndcg_at_k", "ndcg_of_scores"]


def ndcg_at_k(
    queries: npt.NDArray[np.float32],
    documents: npt.NDArray[np.float32],
    relevant: Sequence[Mapping[int, int] | Sequence[int]],
    *,
    k: int = 10,
    excluded: Sequence[Sequence[int]] | None = None,
) -> npt.NDArray[np.float64]:
    """Score each query's ranking by cosine.

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
    return ndcg_of_scores(_similarities(queries, documents), relevant, k=k, excluded=excluded)


def _similarities(
    queries: npt.NDArray[np.float32], documents: npt.NDArray[np.float32]
) -> Iterator[npt.NDArray[np.float32]]:
    # 256 queries at a time, so that the matrix of similarities stays small for any number of queries.
    for start in range(0, len(queries), 256):
        yield from queries[start : start + 256] @ documents.T


def ndcg_of_scores(
    scores: Iterable[npt.NDArray[np.float32]],
    relevant: Sequence[Mapping[int, int] | Sequence[int]],
    *,
    k: int = 10,
    excluded: Sequence[Sequence[int]] | None = None,
) -> npt.NDArray[np.float64]:
    """Score rankings that are given by a score for each document.

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
        found[index] = _ndcg(_best(row, k), grades, discounts)
    return found


def _best(similarities: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.intp]:
    """Rows of the k highest similarities, best first, equal ones in the order of the rows."""
    if len(similarities) > k:
        # Everything that ties with the k-th stays in, so that the stable sort decides and not the partition.
        threshold = np.partition(similarities, len(similarities) - k)[len(similarities) - k]
        candidates = np.flatnonzero(similarities >= threshold)
    else:
        candidates = np.arange(len(similarities))
    order = np.argsort(-similarities[candidates], kind="stable")[:k]
    best = candidates[order]
    return best[np.isfinite(similarities[best])]


def _ndcg(
    ranking: Sequence[int] | npt.NDArray[np.intp],
    grades: Mapping[int, int],
    discounts: npt.NDArray[np.float64],
) -> float:
    ideal = sorted((grade for grade in grades.values() if grade > 0), reverse=True)[: len(discounts)]
    if not ideal:
        return 0.0
    gains = [max(grades.get(int(document), 0), 0) for document in ranking]
    return float(gains @ discounts[: len(gains)]) / float(ideal @ discounts[: len(ideal)])


def mean_and_error(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean of some values and its standard error (0 for fewer than two values)."""
    if len(values) < 2:
        return float(np.mean(values)), 0.0
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
