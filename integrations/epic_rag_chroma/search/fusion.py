"""Reciprocal rank fusion: one ranking from several (Cormack, Clarke and Büttcher 2009).

A text's score is the sum of 1 / (5 + rank) over the rankings that have it. Only ranks count, so that a cosine and a
BM25 score, whose scales have nothing in common, need not be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["POOL", "RANK_CONSTANT", "fuse"]


RANK_CONSTANT = 5
# How far down each ranking is read. benchmarks/hybrid.py compares depths.
POOL = 100


def fuse(*rankings: Sequence[str], constant: int = RANK_CONSTANT) -> list[tuple[str, float]]:
    """Fuse rankings of ids.

    Args:
        rankings: Ids, best first, each at most once in a ranking.
        constant: What is added to a rank, from 1; the larger, the less the first ranks stand out.

    Returns:
        All ids with their scores, best first; equal ones in alphabetical order.
    """
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, each in enumerate(ranking, start=1):
            scores[each] = scores.get(each, 0.0) + 1.0 / (constant + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))
