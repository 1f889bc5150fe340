"""Lines of a page from runs of letters with their places: columns in reading order, rows of tables, hyphenated words.

A page has no lines: it has letters at places, drawn in any order. `ordered_rows` groups the runs into rows, and reads
columns of running text one after the other. Columns of a table stay beside each other: their rows are short, or do not
fill the column. `joined_lines` joins the words that are hyphenated at the end of a line.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from importlib import resources
from itertools import pairwise
from math import inf, isfinite
from statistics import median
from typing import NamedTuple

__all__ = ["LINE_END_HYPHEN", "Run", "joined_lines", "ordered_rows", "row_text", "words_of"]

# The letter that stands for a hyphen which the page's program put at the end of a line.
LINE_END_HYPHEN = "\x02"

# In heights of a line; the second of two paragraphs is also further away than the usual line.
_MIN_GUTTER = 0.6
_PARAGRAPH_GAP = 1.4
_LEADING = 1.2
_CELL_GAP = 1.5
# Of a column of running text: rows, letters in one, share of the rows that fill most of the width, or that begin with
# a small letter.
_MIN_ROWS = 3
_MIN_LETTERS = 12
_FILLED = 0.7
_MIN_FILLED = 0.5
_MIN_CONTINUED = 0.3
_MAX_DEPTH = 8
_MAX_ROWS = 1000

_HYPHENS = f"\u2010\u00ad{LINE_END_HYPHEN}-"
_BEFORE_HYPHEN = re.compile(rf"(?:^|[\s(\[/])([\w'\u2019{_HYPHENS}]*[^\W_])[{_HYPHENS}]$")
_AFTER_HYPHEN = re.compile(r"(\w[\w'\u2019\u2010-]*)")
_WORD = re.compile(r"[^\W\d_]+(?:[-\u2010][^\W\d_]+)*")


class Run(NamedTuple):
    """Letters of one line that stand close together, and their box in points; y grows upwards."""

    text: str
    left: float
    bottom: float
    right: float
    top: float


def ordered_rows(runs: Iterable[Run]) -> list[list[Run] | None]:
    """Return the rows of a page in reading order, each from left to right; None between two paragraphs or columns."""
    return _ordered([run for run in runs if run.text.strip()], 0)


def _ordered(runs: list[Run], depth: int) -> list[list[Run] | None]:
    rows = _rows(runs)
    if not rows or depth > _MAX_DEPTH or len(rows) > _MAX_ROWS:
        return list(rows)
    height = median(run.top - run.bottom for run in runs)
    ordered: list[list[Run] | None] = []
    start = number = 0
    while number < len(rows):
        columns = _columns(rows, number, height)
        if columns is None:
            number += 1
            continue
        end, left, right = columns
        ordered += _paragraphs(rows[start:number], height)
        for column in (left, right):
            ordered += [None, *_ordered(column, depth + 1), None]
        start = number = end
    return [*ordered, *_paragraphs(rows[start:], height)]


def _rows(runs: list[Run]) -> list[list[Run]]:
    """Group runs into rows from top to bottom; of a row, the lowest run is the measure (not an initial)."""
    rows: list[tuple[list[Run], float, float]] = []
    usual = median([run.top - run.bottom for run in runs] or [0])
    # An initial stands in its first row.
    for run in sorted(runs, key=lambda run: (min(usual, run.top - run.bottom) / 2 - run.top, run.left)):
        height = run.top - run.bottom
        for number in range(len(rows) - 1, max(-1, len(rows) - 4), -1):
            row, bottom, top = rows[number]
            if min(top, run.top) - max(bottom, run.bottom) >= 0.5 * min(height, top - bottom):
                row.append(run)
                if height < top - bottom:
                    rows[number] = (row, run.bottom, run.top)
                break
        else:
            rows.append(([run], run.bottom, run.top))
    return [sorted(row, key=lambda run: run.left) for row, _, _ in rows]


def _columns(rows: list[list[Run]], first: int, height: float) -> tuple[int, list[Run], list[Run]] | None:
    """Return two columns of running text that begin with a row: the row behind them, the left and the right runs."""
    best = None
    row = rows[first]
    starts = [(one.right, other.left) for one, other in pairwise(row)]
    if len(row) == 1:
        starts = [(row[0].right, inf), (-inf, row[0].left)]
    for low, high in starts:
        if high - low < _MIN_GUTTER * height:
            continue
        end = first
        while end < len(rows):
            narrowed = _narrowed(rows[end], low, high, _MIN_GUTTER * height)
            if narrowed is None:
                break
            low, high = narrowed
            end += 1
        if best is not None and end <= best[0]:
            continue
        band = [run for of_row in rows[first:end] for run in of_row]
        left = [run for run in band if run.right <= low]
        right = [run for run in band if run.left >= high]
        if _is_running_text(left) and _is_running_text(right):
            best = (end, left, right)
    return best


def _narrowed(row: list[Run], low: float, high: float, least: float) -> tuple[float, float] | None:
    """Return the part of a gutter that a row leaves free; None if it is narrower than the least."""
    for run in row:
        if run.right <= low or run.left >= high:
            continue
        parts = [(run.left - low, low, run.left), (high - run.right, run.right, high)]
        wide = [part for part in parts if part[0] >= least]
        if not wide:
            return None
        # Between the run and the edge of the page there is no second column.
        _, low, high = max(wide, key=lambda part: (isfinite(part[0]), part[0]))
    return low, high


def _is_running_text(runs: list[Run]) -> bool:
    rows = _rows(runs)
    if len(rows) < _MIN_ROWS:
        return False
    texts = [" ".join(run.text.strip() for run in row) for row in rows]
    letters = sum(sum(map(str.isalpha, text)) for text in texts) / len(texts)
    if any(text.lower() != text.upper() for text in texts):
        continued = sum(text[:1].islower() for text in texts) >= _MIN_CONTINUED * len(rows)
    else:  # a script without capital letters
        width = max(run.right for run in runs) - min(run.left for run in runs)
        filled = sum(row[-1].right - row[0].left >= _FILLED * width for row in rows)
        continued = filled >= _MIN_FILLED * len(rows)
    return letters >= _MIN_LETTERS and continued


def _paragraphs(rows: list[list[Run]], height: float) -> list[list[Run] | None]:
    """Put None between rows that are further apart than lines of a paragraph are."""
    boxes = [(min(run.bottom for run in row), max(run.top for run in row)) for row in rows]
    steps = [(sum(above) - sum(below)) / 2 for above, below in pairwise(boxes)]
    usual = median(steps) if len(steps) >= _MIN_ROWS else 0.0
    parts: list[list[Run] | None] = list(rows[:1])
    for number, step in enumerate(steps):
        tallest = max(height, *(top - bottom for bottom, top in boxes[number : number + 2]))
        if step > max(_PARAGRAPH_GAP * tallest, _LEADING * usual):
            parts.append(None)
        parts.append(rows[number + 1])
    return parts


def row_text(row: list[Run]) -> str:
    """Return the text of a row; cells are two spaces apart."""
    text = ""
    last: Run | None = None
    for run in row:
        if last is not None:
            wide = run.left - last.right > _CELL_GAP * (run.top - run.bottom)
            text += "  " if wide else " " if run.left - last.right > 0.1 * (run.top - run.bottom) else ""
        text += run.text.strip()
        last = run
    return text


def joined_lines(lines: list[str], known: Callable[[], Counter[str]] | None = None) -> list[str]:
    """Join words that are hyphenated at the end of a line: the rest of the word moves up to its beginning.

    Args:
        lines: Lines of one page, in reading order.
        known: Returns the words of the whole document in lower case, hyphenated ones as a whole.
    """
    joined = list(lines)
    for number, line in enumerate(joined):
        before = _BEFORE_HYPHEN.search(line)
        if before is not None:
            below = next((low for low in range(number + 1, min(number + 3, len(joined))) if joined[low].strip()), None)
            after = None if below is None else _AFTER_HYPHEN.match(joined[below].lstrip())
            if below is not None and after is not None:
                text = joined[below].lstrip()
                rest = re.match(r"\S+", text[after.end() :])  # closing punctuation
                end = after.end() + (rest.end() if rest is not None else 0)
                kept = _keeps_hyphen(before.group(1), after.group(1), known() if known is not None else Counter())
                line = line[:-1] + ("-" if kept else "") + text[:end]
                joined[below] = text[end:].lstrip()
        joined[number] = line.replace(LINE_END_HYPHEN, "-")
    return [line for line, given in zip(joined, lines, strict=True) if line or not given]


def words_of(lines: Iterable[str]) -> Counter[str]:
    """Count the words of lines in lower case, hyphenated ones as a whole, without those at the end of a line."""
    words: Counter[str] = Counter()
    for line in lines:
        line = line.rstrip()
        if line.endswith(tuple(_HYPHENS)):
            line = line[: -len(line.split()[-1])] if line.split() else ""
        words.update(_WORD.findall(line.lower()))
    return words


def _keeps_hyphen(first: str, second: str, known: Counter[str]) -> bool:
    """Decide whether a hyphen at the end of a line is part of the word: "well-known", and not "tech-nician".

    The document decides, if it has the word elsewhere; otherwise two words of English that are none together are a
    compound.
    """
    capitals = len(first) > 1 and first.isupper() and second.isupper()
    first = first.replace("\u2010", "-").replace(LINE_END_HYPHEN, "-").lower()
    if not (second[0].islower() or capitals) or "-" in first or "-" in second or "\u2010" in second:
        return True
    second = second.lower()
    whole = first + second
    spelt, hyphenated = known[whole], known[f"{first}-{second}"]
    if spelt or hyphenated:
        return hyphenated > spelt
    english = _english_words()
    return first in english and second in english and whole not in english


@cache
def _english_words() -> frozenset[str]:
    """Return common English words: those that the tokenizer of the smallest shipped checkpoint does not divide."""
    file = resources.files("epic_rag") / "checkpoints" / "epic-minilm" / "tokenizer.json"
    vocabulary = json.loads(file.read_text("utf-8"))["model"]["vocab"]
    return frozenset(word for word in vocabulary if len(word) > 1 and word.isalpha())
