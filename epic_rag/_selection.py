"""Which demonstrations to show: rows of a bank, chosen by its queries' vectors; and vectors of length one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from epic_rag.errors import PromptError

__all__ = ["farthest_rows", "nearest_rows", "unit_rows"]

Matrix = npt.NDArray[np.float32]


def nearest_rows(vectors: Matrix, query: Matrix | None, k: int) -> list[int]:
    """The k rows nearest to a query by cosine, nearest last.

    Args:
        vectors: (rows, dim) unit vectors.
        query: (dim,) unit vector.
        k: How many, up to all.

    Raises:
        PromptError: If there is no query, or its width is another.
    """
    if query is None:
        raise PromptError("selection 'nearest' needs query_embedding and got none; pass the query's vector")
    vector = np.asarray(query, dtype=np.float32)
    if vector.shape != vectors.shape[1:]:
        raise PromptError(
            f"query_embedding has shape {vector.shape}, the bank's vectors have {vectors.shape[1:]}; "
            "encode one query with the same encoder at full width"
        )
    # The threads of a product by numpy's own library would go on spinning for a while, in the way of torch's.
    cosines = np.einsum("rd,d->r", vectors, vector)
    return [int(row) for row in np.argsort(-cosines, kind="stable")[:k]][::-1]


def farthest_rows(vectors: Matrix, k: int) -> list[int]:
    """Greedy farthest-point choice of k rows by cosine, from row 0 on.

    Args:
        vectors: (rows, dim) unit vectors.
        k: How many, up to all.
    """
    chosen: list[int] = [0][:k]
    while len(chosen) < k:
        closest = (vectors @ vectors[chosen].T).max(axis=1)
        closest[chosen] = np.inf
        chosen.append(int(closest.argmin()))
    return chosen


def unit_rows(vectors: Matrix) -> Matrix:
    """Each row (rows, dim) at length one; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Matrix = vectors / np.maximum(norms, 1e-12)
    return result
