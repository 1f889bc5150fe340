"""Near-duplicate detection."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_rag_chroma.search.deduplicate import ComparedText

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
def test_near_duplicates(one: str, other: str) -> None:
    assert ComparedText(one).is_near_duplicate(ComparedText(other))
    assert ComparedText(other).is_near_duplicate(ComparedText(one))


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
def test_different_texts(one: str, other: str) -> None:
    assert not ComparedText(one).is_near_duplicate(ComparedText(other))
    assert not ComparedText(other).is_near_duplicate(ComparedText(one))


def test_short_texts_are_compared_with_heading() -> None:
    assert not ComparedText("Returns: nothing", "open()").is_near_duplicate(ComparedText("Returns: nothing", "close()"))
    assert ComparedText("Returns: nothing", "open()").is_near_duplicate(ComparedText("returns nothing", "open"))
    assert ComparedText(LONG, "Chapter 1").is_near_duplicate(ComparedText(LONG, "Chapter 2"))


@given(st.text(), st.text())
def test_symmetric_and_reflexive(one: str, other: str) -> None:
    assert ComparedText(one).is_near_duplicate(ComparedText(one))
    assert ComparedText(one).is_near_duplicate(ComparedText(other)) == ComparedText(other).is_near_duplicate(
        ComparedText(one)
    )


def test_one_replaced_word_makes_another_text() -> None:
    random.seed(0)
    for _ in range(50):
        changed = LONG.split()
        changed[random.randrange(len(changed))] = "other"
        assert not ComparedText(LONG).is_near_duplicate(ComparedText(" ".join(changed)))
