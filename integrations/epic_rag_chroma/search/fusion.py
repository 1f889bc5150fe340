"""Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): one ranking from several.

A chunk's score is the sum of 1 / (5 + rank) over the rankings that contain it, ranks counted from 1. Only ranks count,
so cosines and BM25 scores, whose scales differ, need not be compared. The usual constant is 60; `benchmarks/hybrid.py`
compares constants and depths, docs/results.md has its table.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["FUSION_DEPTH", "RANK_CONSTANT", "fuse"]

RANK_CONSTANT = 5
FUSION_DEPTH = 100
"""Depth to which each ranking is read."""


def fuse(*rankings: Sequence[str], constant: int = RANK_CONSTANT) -> list[tuple[str, float]]:
    """Fuse rankings of ids.

    Args:
        rankings: Ids, best first, each at most once in a ranking.
        constant: Added to each rank; the larger, the less the first ranks stand out.

    Returns:
        All ids with their scores, best first; equal scores in alphabetical order.
    """
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, row_id in enumerate(ranking, start=1):
            scores[row_id] = scores.get(row_id, 0.0) + 1.0 / (constant + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))
