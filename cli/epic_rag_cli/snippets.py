"""The part of a passage that is shown for a query: around its best sentence, cut to a width in terminal cells."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from rich.cells import get_character_cell_size

from epic_rag_cli.highlight import QueryWords, Span
from epic_rag_cli.text import printable

__all__ = ["Snippet", "snippet"]

# The full stops, exclamation marks, question marks and semicolons of scripts that put no space after them.
_STOPS = "\u3002\uff01\uff1f\uff1b"
# After a full stop and the like, between paragraphs, and before list items.
_BOUNDARY = re.compile(
    rf"(?<=[.!?:;…])\s+|(?<=[.!?…][\"')\]])\s+|(?<=[{_STOPS}])|\n[ \t]*\n\s*|\n(?=[ \t]*(?:[-*+#>|]|\d+[.)]) )"
)
_LINE_END = re.compile(r"\n\s*")
_ELLIPSIS = "…"


class Snippet:
    """A part of a passage as one printable line, and where the query's words are in it.

    Args:
        pieces: Text of the passage, each piece with whether it is a word of the query.
        before: Whether something was left out before it.
        after: Whether something was left out after it.
    """

    def __init__(self, pieces: Sequence[tuple[str, bool]], *, before: bool, after: bool) -> None:
        parts = [(_safe(piece), marked) for piece, marked in pieces]
        if before:
            parts.insert(0, (f"{_ELLIPSIS} ", False))
        if after:
            parts.append((f" {_ELLIPSIS}", False))
        self.text = "".join(part for part, _ in parts)
        ends = list(accumulate(len(part) for part, _ in parts))
        self.spans: list[Span] = [
            (end - len(part), end) for (part, marked), end in zip(parts, ends, strict=True) if marked and part
        ]


def snippet(text: str, words: QueryWords, width: int, *, by_line: bool = False) -> Snippet:
    """Return the part of `text` that says most about a query.

    The sentence with the most different words of the query is in it, with as much as there is room for of what stands
    around it, whole sentences first. An ellipsis stands where something was left out.

    Args:
        text: The passage.
        words: The words of the query.
        width: The most terminal cells of the passage to take; escapes of control characters come on top.
        by_line: Whether a line is a sentence, as in source code.
    """
    flat, sentences = _sentences(text, by_line)
    found = words.find(flat)
    line = _Line(flat, width)
    start, end = line.around(sentences, _best(sentences, found), found)
    pieces, place = [], start
    for first, last in _merged([span for span, _ in found]):
        first, last = max(first, start), min(last, end)
        if first < last:
            pieces += [(flat[place:first], False), (flat[first:last], True)]
            place = last
    pieces.append((flat[place:end], False))
    return Snippet(pieces, before=start > 0, after=end < len(flat))


def _safe(piece: str) -> str:
    """Make a piece printable without losing the space at its ends."""
    left = " " if piece[:1] == " " else ""
    right = " " if piece[-1:] == " " and piece != " " else ""
    return left + printable(piece) + right


def _sentences(text: str, by_line: bool) -> tuple[str, list[Span]]:
    """Return `text` with single spaces, and where its sentences are in that."""
    parts = (_LINE_END if by_line else _BOUNDARY).split(text.strip())
    flat, spans = "", []
    for part in (" ".join(part.split()) for part in parts):
        if part:
            # What follows a stop of a script without spaces had none before it, either.
            start = len(flat) + (1 if flat and flat[-1] not in _STOPS else 0)
            flat = flat.ljust(start) + part
            spans.append((start, len(flat)))
    return flat, spans or [(0, 0)]


def _best(sentences: Sequence[Span], found: Sequence[tuple[Span, str]]) -> int:
    """Return the number of the first sentence with the most different words of the query."""
    starts = [start for start, _ in sentences]
    kinds: list[set[str]] = [set() for _ in sentences]
    for (start, _), stem in found:
        kinds[bisect_right(starts, start) - 1].add(stem)
    return max(range(len(sentences)), key=lambda number: len(kinds[number]))


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


class _Line:
    """A line of text that is longer than a width, perhaps."""

    def __init__(self, text: str, width: int) -> None:
        self._text = text
        self._width = width
        self._cells = [0, *accumulate(map(get_character_cell_size, text))]

    def around(self, sentences: Sequence[Span], best: int, found: Sequence[tuple[Span, str]]) -> Span:
        """Return the part with the best sentence, and what fits of its neighbourhood."""
        if self._fits(0, len(self._text)):
            return 0, len(self._text)
        start, end = sentences[best]
        if not self._fits(start, end):
            start = self._best_start(start, end, found)
            return start, self._end(start, end)
        first = last = best
        while True:
            after = self._fits(start, sentences[last + 1][1]) if last + 1 < len(sentences) else False
            before = self._fits(sentences[first - 1][0], end) if first > 0 else False
            if not after and not before:
                break
            # The best sentence stays in the middle.
            if after and (not before or end - sentences[best][1] <= sentences[best][0] - start):
                last += 1
                end = sentences[last][1]
            else:
                first -= 1
                start = sentences[first][0]
        end = max(end, self._end(start, len(self._text)))
        if end == len(self._text):
            start = min(start, self._start(end))
        return start, end

    def _fits(self, start: int, end: int) -> bool:
        return self._cells[end] - self._cells[start] <= self._width

    def _best_start(self, start: int, end: int, found: Sequence[tuple[Span, str]]) -> int:
        """Return the word of a long sentence from which most different words of the query follow; the middle one of
        such words.
        """
        inside = [(span, stem) for span, stem in found if start <= span[0] < end]
        starts = [start, *(place + 1 for place in range(start, end) if self._text[place] == " ")]
        # The first words before a word of the query; where there are no spaces, the word itself.
        starts += [span[0] for span, _ in inside]
        # A later start would show less text than there is room for.
        starts = [place for place in sorted(set(starts)) if not self._fits(place, end)] or [start]

        def shown(place: int) -> int:
            return len({stem for span, stem in inside if span[0] >= place and self._fits(place, span[1])})

        counts = [shown(place) for place in starts]
        if not max(counts):
            return start
        best = [place for place, count in zip(starts, counts, strict=True) if count == max(counts)]
        return best[len(best) // 2]

    def _end(self, start: int, limit: int) -> int:
        """Return where the last word that fits ends; in the middle of it if there is no other."""
        end = bisect_right(self._cells, self._cells[start] + self._width) - 1
        if end >= limit:
            return limit
        if self._text[end] != " ":
            space = self._text.rfind(" ", start, end)
            end = space if space > start else end
        return max(end, start + 1)

    def _start(self, end: int) -> int:
        """Return where the first word that fits before `end` begins."""
        start = next(place for place in range(end + 1) if self._fits(place, end))
        if start == 0 or self._text[start - 1] == " ":
            return start
        space = self._text.find(" ", start, end)
        return space + 1 if space >= 0 else start
