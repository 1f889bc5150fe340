"""Reciprocal rank fusion."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_rag_chroma.search.fusion import RANK_CONSTANT, fuse

RANKINGS = st.lists(st.lists(st.sampled_from("abcdefghij"), unique=True), max_size=3)


@pytest.mark.parametrize(
    ("rankings", "fused"),
    [
        ([], []),
        ([["a", "b"], []], ["a", "b"]),
        ([["a", "b", "c"], ["b", "a", "d"]], ["a", "b", "c", "d"]),  # ties by id
        ([["x", "b"], ["b", "y"]], ["b", "x", "y"]),
        ([["a", "b", "c", "d"], ["d"]], ["d", "a", "b", "c"]),
    ],
)
def test_fuse(rankings: list[list[str]], fused: list[str]) -> None:
    assert fuse(*rankings) == fused


@given(RANKINGS)
def test_the_order_is_that_of_the_sums_of_reciprocal_ranks(rankings: list[list[str]]) -> None:
    every = {each for ranking in rankings for each in ranking}
    scores = {
        each: sum(1 / (RANK_CONSTANT + 1 + ranking.index(each)) for ranking in rankings if each in ranking)
        for each in every
    }
    fused = fuse(*rankings)
    assert set(fused) == every
    assert len(fused) == len(every)
    for better, worse in itertools.pairwise(fused):
        assert scores[better] > scores[worse] or (scores[better] == pytest.approx(scores[worse]))


@given(st.lists(st.text(), unique=True))
def test_one_ranking_stays_as_it_is(ranking: list[str]) -> None:
    assert fuse(ranking) == ranking
    assert fuse(ranking, ranking) == ranking
