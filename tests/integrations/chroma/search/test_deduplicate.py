"""Which passages are the same for a reader."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_rag_chroma.search.deduplicate import Passage, distinct

LONG = " ".join(f"word{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(60))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LONG, LONG),
        (LONG, LONG.upper().replace(" ", "\n  ")),
        (LONG, "“" + LONG.replace(" ", ", ") + "”!"),
        (LONG, LONG + " and a note"),
        ("Delete the folder.", "delete  the folder"),
        ("--- | ---", "---|---"),
    ],
)
def test_the_same(one: str, other: str) -> None:
    assert Passage(one).resembles(Passage(other))
    assert Passage(other).resembles(Passage(one))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LONG + " 2.0", LONG + " 2.1"),  # versions of a page
        (LONG, LONG + " 2.1"),
        (LONG + " of the request", LONG + " of the response"),  # settings that are described alike
        (LONG + " do that", LONG + " do not that"),
        (LONG, LONG[: len(LONG) // 2]),
        (LONG, " ".join(reversed(LONG.split()))),
        ("Delete the folder.", "Delete the file."),
        ("--- | ---", "+++ | +++"),
        ("", "a"),
    ],
)
def test_not_the_same(one: str, other: str) -> None:
    assert not Passage(one).resembles(Passage(other))
    assert not Passage(other).resembles(Passage(one))


def test_what_is_short_needs_its_heading() -> None:
    assert not Passage("Returns: nothing", "open()").resembles(Passage("Returns: nothing", "close()"))
    assert Passage("Returns: nothing", "open()").resembles(Passage("returns nothing", "open"))
    assert Passage(LONG, "Chapter 1").resembles(Passage(LONG, "Chapter 2"))


def test_distinct_names_the_first_that_is_resembled() -> None:
    texts = ["a b", "c d", "A B", "c  d", "e"]
    assert distinct([Passage(text) for text in texts]) == [None, None, 0, 1, None]
    assert distinct([Passage("e"), Passage("f"), Passage("F")], [Passage("d"), Passage("e")]) == [1, None, 2]


@given(st.text(), st.text())
def test_resemblance_is_mutual_and_reflexive(one: str, other: str) -> None:
    assert Passage(one).resembles(Passage(one))
    assert Passage(one).resembles(Passage(other)) == Passage(other).resembles(Passage(one))


def test_a_change_of_a_word_makes_another_passage_wherever_it_is() -> None:
    random.seed(0)
    for _ in range(50):
        changed = LONG.split()
        changed[random.randrange(len(changed))] = "other"
        assert not Passage(LONG).resembles(Passage(" ".join(changed)))
