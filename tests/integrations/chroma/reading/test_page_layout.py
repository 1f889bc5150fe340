"""Rows of a page: every run is in one row, and words are joined where the line ends with a hyphen."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag_chroma.reading.page_layout import Run, joined_lines, ordered_rows, words_of

places = st.floats(0, 600, allow_nan=False)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    left, bottom = draw(places), draw(places)
    text = draw(st.text("abc de", min_size=1, max_size=30).filter(str.strip))
    return Run(text, left, bottom, left + draw(st.floats(0.1, 300)), bottom + draw(st.floats(1, 40)))


@settings(max_examples=150, deadline=None)
@given(st.lists(runs(), max_size=40))
def test_no_run_is_lost_or_doubled(given_runs: list[Run]) -> None:
    rows = [row for row in ordered_rows(given_runs) if row is not None]
    assert Counter(run for row in rows for run in row) == Counter(given_runs)
    assert all(row == sorted(row, key=lambda run: run.left) for row in rows)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("ab- \x02", max_size=12), max_size=8))
def test_letters_survive_joining(lines: list[str]) -> None:
    joined = joined_lines(lines, lambda: words_of(lines))
    letters = "".join(lines).replace("-", "").replace("\x02", "").replace(" ", "")
    assert "".join(joined).replace("-", "").replace(" ", "") == letters
    assert "\x02" not in "".join(joined)


def test_an_initial_does_not_join_the_rows_beside_it() -> None:
    initial = Run("O", 50, 660, 80, 700)
    lines = [Run(f"line {number} of the story", 85, 688 - 13 * number, 300, 699 - 13 * number) for number in range(3)]
    rows = [" ".join(run.text for run in row) for row in ordered_rows([initial, *lines]) if row]
    assert rows == ["O line 0 of the story", "line 1 of the story", "line 2 of the story"]


def test_words_across_a_column() -> None:
    assert joined_lines(["the presi-", "", "dent spoke"]) == ["the president", "", "spoke"]
    assert joined_lines(["the presi-"]) == ["the presi-"]
    assert joined_lines(["a list of e-", "1. mails"]) == ["a list of e-1.", "mails"]
