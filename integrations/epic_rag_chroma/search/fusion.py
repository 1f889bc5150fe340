"""Fusion of the rankings of a hybrid search, by their scores.

    score = (dense + 1.1 keyword) / 2.1

dense is the cosine, scaled so that the nearest chunk has 1 and the hundredth 0. keyword is the BM25 score as a share of
the best chunk's, or of 0.3 of what a chunk with every word of the query once would have, if that is more: if even the
best chunk shares only a weak word with the query, the keywords count little. Ranks alone (reciprocal rank fusion) do
not separate such a chunk from one that has all words. `benchmarks/hybrid.py` compares both, docs/search.md has its
table.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["FUSION_DEPTH", "KEYWORD_WEIGHT", "LEAST_COVERAGE", "fuse"]

FUSION_DEPTH = 100
"""Depth to which each ranking is read."""
KEYWORD_WEIGHT = 1.1
"""Weight of the keywords, relative to the vectors."""
LEAST_COVERAGE = 0.3
"""Share of the attainable BM25 score from which on the best chunk has the full weight."""


def fuse(
    dense: Sequence[tuple[str, float]],
    keyword: Sequence[tuple[str, float]],
    attainable: float,
    *,
    weight: float = KEYWORD_WEIGHT,
    coverage: float = LEAST_COVERAGE,
    depth: int = FUSION_DEPTH,
) -> list[tuple[str, float]]:
    """Fuse two rankings of ids.

    Args:
        dense: (id, cosine), best first.
        keyword: (id, BM25 score), best first.
        attainable: The BM25 score of a chunk that has every word of the query once; see `attainable_score`.
        weight: Weight of the keywords.
        coverage: Share of `attainable` that a chunk has to have for the full weight, unless another has more.
        depth: The rank of the dense ranking that counts as 0.

    Returns:
        All ids with their scores, from 0 to 1, best first; equal scores by cosine, then in alphabetical order.
    """
    scores: dict[str, float] = {}
    cosines = dict(dense)
    if dense:
        best, floor = dense[0][1], dense[min(depth, len(dense)) - 1][1]
        for row_id, cosine in dense:
            scores[row_id] = max(0.0, (cosine - floor) / (best - floor)) if best > floor else 1.0
    if keyword:
        full = max(keyword[0][1], coverage * attainable)
        for row_id, bm25 in keyword:
            scores[row_id] = scores.get(row_id, 0.0) + weight * (bm25 / full if full > 0 else 1.0)
    fused = ((row_id, score / (1.0 + weight)) for row_id, score in scores.items())
    return sorted(fused, key=lambda item: (-item[1], -cosines.get(item[0], -1.0), item[0]))
