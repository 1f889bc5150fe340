"""Task vector: demonstrations as one vector that is added to a query.

For a given task, passage embeddings are offset in a roughly common direction from those of queries that stand among
them. The offset is estimated from k demonstrations with passage vectors p_i and vectors b_i of their queries read as
documents, and added to the query:

    t = 1/k sum_i (p_i - b_i)
    q1 = normalise(q0 + s k / (k + n) g t)        s = 0.7, n = 2

where q0 is the query without demonstrations. The sum has the form of Rocchio's relevance feedback (Rocchio 1971) with
other queries' passages in the place of the query's own. The name is that of Hendel et al. 2023, "In-Context Learning
Creates Task Vectors". It needs no training. `benchmarks/task_vector.py` compares values of s; docs/results.md has the
gain on tasks that were never trained on (+1.2 to +4.6 nDCG@10 with eight demonstrations).

g is the confidence that the pairs belong together. With m and d the mean and the standard deviation of the cosines of
queries with *other* demonstrations' passages, and a the mean cosine of a query with its own passage,

    z = (a - m) / d * sqrt(k),        g = 0 up to z = 2, 1 from z = 4, linear between

(d is at least 0.05). Passages that fit their own queries no better than other queries leave a query where it was. A
single demonstration has nothing to be compared with: g = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from epic_rag.metrics import unit_rows

__all__ = ["apply_task_vector", "task_vector"]

Vectors = npt.NDArray[np.float32]

_STRENGTH = 0.7
_PRIOR = 2
_UNSURE, _SURE = 2.0, 4.0
_LEAST_SPREAD = 0.05
# Cosine from which two texts count as one: a label that occurs twice is not another demonstration's passage, and of two
# passages that answer one query neither is another query's.
_SAME = 0.9999


def task_vector(pairs: Vectors, *, strength: float = _STRENGTH) -> Vectors:
    """Compute the vector that is added to a query's unit vector.

    Args:
        pairs: (k, 3, dim) unit vectors of demonstrations: query, passage, and the query read as a document; k at least
            1. (k, 2, dim) stands for a model that reads queries as documents.
        strength: s of the formula.

    Returns:
        (dim,) float32; zero where the pairs cannot be told from random ones.

    Example:
        >>> pairs = np.eye(4, dtype=np.float32).reshape(2, 2, 4)  # queries that share nothing with their passages
        >>> task_vector(pairs).tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    k = len(pairs)
    queries, passages = pairs[:, 0], pairs[:, 1]
    as_documents = pairs[:, 2] if pairs.shape[1] > 2 else queries
    weight = strength * k / (k + _PRIOR) * _confidence(queries, passages)
    result: Vectors = (weight * (passages - as_documents).mean(axis=0)).astype(np.float32)
    return result


def apply_task_vector(vectors: Vectors, pairs: Sequence[Vectors]) -> Vectors:
    """Add to each query the task vector of its demonstrations.

    Args:
        vectors: (n, dim) unit vectors of the queries without demonstrations.
        pairs: For each query the vectors of its demonstrations, as in `task_vector`; queries may share one array.

    Returns:
        (n, dim) float32 unit rows.
    """
    shifts = {id(each): task_vector(each) for each in {id(each): each for each in pairs}.values()}
    return unit_rows(vectors + np.stack([shifts[id(each)] for each in pairs]))


def _confidence(queries: Vectors, passages: Vectors) -> float:
    k = len(queries)
    # einsum avoids BLAS: its worker threads busy-wait after a call and compete with torch's OpenMP threads.
    other = np.einsum("id,jd->ij", passages, passages) < _SAME  # (k, k)
    other &= np.einsum("id,jd->ij", queries, queries) < _SAME
    if not other.any():
        return 1.0
    cosines = np.einsum("id,jd->ij", queries, passages)  # (k, k)
    chance = cosines[other]
    spread = max(float(chance.std()), _LEAST_SPREAD)
    z = (float(cosines.diagonal().mean()) - float(chance.mean())) / spread * np.sqrt(k)
    return float(np.clip((z - _UNSURE) / (_SURE - _UNSURE), 0.0, 1.0))
