"""Fusion of two rankings by their scores."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_rag_chroma.search.fusion import KEYWORD_WEIGHT, LEAST_COVERAGE, fuse

TOTAL = 1 + KEYWORD_WEIGHT


@pytest.mark.parametrize(
    ("dense", "keyword", "attainable", "expected"),
    [
        ([], [], 0.0, []),
        ([("a", 0.5), ("b", 0.4), ("c", 0.1)], [], 0.0, [("a", 1), ("b", 0.75), ("c", 0)]),
        ([], [("a", 4.0), ("b", 1.0)], 4.0, [("a", KEYWORD_WEIGHT), ("b", KEYWORD_WEIGHT / 4)]),
        # The best chunk has a quarter of the share from which on it would have the full weight.
        ([("a", 0.9), ("b", 0.1)], [("b", LEAST_COVERAGE)], 4.0, [("a", 1), ("b", KEYWORD_WEIGHT / 4)]),
        # The same chunk is first if it has all words.
        ([("a", 0.9), ("b", 0.1)], [("b", 1.0)], 1.0, [("b", KEYWORD_WEIGHT), ("a", 1)]),
        ([("a", 0.5), ("b", 0.5)], [], 0.0, [("a", 1), ("b", 1)]),
    ],
)
def test_scores(
    dense: list[tuple[str, float]],
    keyword: list[tuple[str, float]],
    attainable: float,
    expected: list[tuple[str, float]],
) -> None:
    assert fuse(dense, keyword, attainable) == [(each, pytest.approx(score / TOTAL)) for each, score in expected]


def test_chunks_below_the_depth_keep_the_order_of_their_cosines() -> None:
    dense = [(f"{chr(122 - n)}", 1 - n / 10) for n in range(6)]
    fused = fuse(dense, [], 0.0, depth=3)
    assert [row_id for row_id, _ in fused] == [row_id for row_id, _ in dense]
    assert [round(score * TOTAL, 3) for _, score in fused] == [1, 0.5, 0, 0, 0, 0]


ranking = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1), max_size=8).map(
    lambda scores: sorted(scores.items(), key=lambda item: (-item[1], item[0]))
)


@given(ranking, ranking, st.floats(0, 10))
def test_all_ids_with_falling_scores(
    dense: list[tuple[str, float]], keyword: list[tuple[str, float]], attainable: float
) -> None:
    fused = fuse(dense, keyword, attainable)
    assert {row_id for row_id, _ in fused} == {row_id for row_id, _ in [*dense, *keyword]}
    assert [score for _, score in fused] == sorted((score for _, score in fused), reverse=True)
    assert all(0 <= score <= 1 + 1e-9 for _, score in fused)
