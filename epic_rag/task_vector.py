"""Demonstrations as one vector: where passages lie, seen from their queries.

The passages of a task do not lie around its queries but beside them, all on much the same side. So k demonstrations
with query vectors q_i and passage vectors p_i say which way a query has to go:

    t = 1/k sum_i (p_i - q_i)
    q1 = normalise(q0 + s k / (k + n) g t)        s = 0.7, n = 2

where q0 is the query without demonstrations. The sum has the form of Rocchio's relevance feedback (Rocchio 1971) with
other queries' passages in the place of the query's own; the name is that of Hendel et al. 2023, "In-Context Learning
Creates Task Vectors", whose vector stands for demonstrations in the same way. It is no part of EPIC, and needs no
training: only vectors that are good without demonstrations. `benchmarks/task_vector.py` compares values of s.

g is how sure it is that the pairs belong together. With m and d the mean and the standard deviation of the cosines of
queries with *other* demonstrations' passages, and a the mean cosine of a query with its own,

    z = (a - m) / d * sqrt(k),        g = 0 up to z = 2, 1 from z = 4, linear between

(d is taken as 0.05 where it is less). Passages that fit their queries no better than other ones say nothing, and
leave the query where it was. One demonstration has nothing to be compared with: g = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from epic_rag.demonstrations import DemonstrationBank, unit_rows
from epic_rag.errors import PromptError
from epic_rag.prompt import Strategy

__all__ = ["QUERY_STRATEGIES", "QueryStrategy", "known_strategy", "moved", "task_vector"]

QueryStrategy = Literal[Strategy, "task-vector"]
"""How demonstrations reach a query: before it, in one of the ways of a prompt, or as a task vector."""
QUERY_STRATEGIES: tuple[QueryStrategy, ...] = ("epic", "text", "none", "task-vector")

Vectors = npt.NDArray[np.float32]

_STRENGTH = 0.7
_PRIOR = 2
_UNSURE, _SURE = 2.0, 4.0
_LEAST_SPREAD = 0.05
# Cosine from which two passages are one: a label that is shown twice is no other demonstration's passage.
_SAME_PASSAGE = 0.9999


def known_strategy(name: object) -> QueryStrategy:
    """The strategy of this name.

    Raises:
        PromptError: If there is none.
    """
    for strategy in QUERY_STRATEGIES:
        if name == strategy:
            return strategy
    raise PromptError(f"strategy is {name!r}, known are {', '.join(QUERY_STRATEGIES)}; choose one of them")


def task_vector(pairs: Vectors, *, strength: float = _STRENGTH) -> Vectors:
    """What is added to a query's unit vector.

    Args:
        pairs: (k, 2, dim) unit vectors of demonstrations: query, passage; k at least 1.
        strength: s of the formula.

    Returns:
        (dim,) float32; zero where nothing tells the pairs from chance.

    Example:
        >>> pairs = np.eye(4, dtype=np.float32).reshape(2, 2, 4)  # queries that have nothing of their passages
        >>> task_vector(pairs).tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    k = len(pairs)
    queries, passages = pairs[:, 0], pairs[:, 1]
    weight = strength * k / (k + _PRIOR) * _certainty(queries, passages)
    result: Vectors = (weight * (passages - queries).mean(axis=0)).astype(np.float32)
    return result


def moved(vectors: Vectors, banks: Sequence[DemonstrationBank], fingerprint: str) -> Vectors:
    """Queries moved by the task vectors of their demonstrations.

    Args:
        vectors: (n, dim) unit vectors of the queries without demonstrations.
        banks: What each query is shown.
        fingerprint: The encoder's.

    Returns:
        (n, dim) float32 unit rows.

    Raises:
        FingerprintError: If a bank has no vectors of this encoder.
    """
    shifts = {id(bank): task_vector(bank.require(fingerprint)) for bank in banks}
    return unit_rows(vectors + np.stack([shifts[id(bank)] for bank in banks]))


def _certainty(queries: Vectors, passages: Vectors) -> float:
    k = len(queries)
    # einsum and not a product: numpy's threads would go on spinning for a while, in the way of torch's.
    other = np.einsum("id,jd->ij", passages, passages) < _SAME_PASSAGE  # (k, k)
    if not other.any():
        return 1.0
    cosines = np.einsum("id,jd->ij", queries, passages)  # (k, k)
    chance = cosines[other]
    spread = max(float(chance.std()), _LEAST_SPREAD)
    z = (float(cosines.diagonal().mean()) - float(chance.mean())) / spread * np.sqrt(k)
    return float(np.clip((z - _UNSURE) / (_SURE - _UNSURE), 0.0, 1.0))
