"""Reciprocal rank fusion."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_rag_chroma.search.fusion import fuse


@pytest.mark.parametrize(
    ("rankings", "expected"),
    [
        ([], []),
        ([["a", "b"], []], [("a", 1 / 6), ("b", 1 / 7)]),
        (  # equal scores in alphabetical order
            [["a", "b", "c"], ["b", "a", "d"]],
            [("a", 1 / 6 + 1 / 7), ("b", 1 / 6 + 1 / 7), ("c", 1 / 8), ("d", 1 / 8)],
        ),
        ([["x", "b"], ["b", "y"]], [("b", 1 / 6 + 1 / 7), ("x", 1 / 6), ("y", 1 / 7)]),
        (  # twice at rank 6 (2/11) is better than once at rank 1 (1/6); with the usual constant of 60 as well
            [list("abcdez"), list("fghijz")],
            [("z", 2 / 11), *((each, 1 / (6 + rank)) for rank, pair in enumerate(["af", "bg", "ch", "di", "ej"]) for each in pair)],
        ),
        (  # twice at rank 8 (2/13) is not; with a constant of 60 it would be
            [list("abcdeklz"), list("fghijmnz")],
            [
                ("a", 1 / 6),
                ("f", 1 / 6),
                ("z", 2 / 13),
                *((each, 1 / (7 + rank)) for rank, pair in enumerate(["bg", "ch", "di", "ej", "km", "ln"]) for each in pair),
            ],
        ),
    ],
)  # fmt: skip
def test_scores(rankings: list[list[str]], expected: list[tuple[str, float]]) -> None:
    fused = fuse(*rankings)

    assert [each for each, _ in fused] == [each for each, _ in expected]
    assert [score for _, score in fused] == pytest.approx([score for _, score in expected], abs=1e-9)


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), max_size=4), st.integers(0, 100))
def test_all_ids_with_falling_scores(rankings: list[list[str]], constant: int) -> None:
    fused = fuse(*rankings, constant=constant)

    assert {each for each, _ in fused} == {each for ranking in rankings for each in ranking}
    assert fused == sorted(fused, key=lambda item: (-item[1], item[0]))
