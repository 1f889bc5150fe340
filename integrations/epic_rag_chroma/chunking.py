"""From a `Document` to chunks: whole lines of one section, within the token limit, cut where it hurts least.

LlamaIndex's parsers return strings without positions, stripped, and its Markdown parser knows neither underlined titles
nor ~~~ fences; a hit has to name lines that show its text. So sections and lines are cut here, and LlamaIndex's
`SentenceSplitter` cuts what has no lines to cut at: a paragraph written as one long line.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from epic_rag_chroma.document import Break, Document, Repeat
from epic_rag_chroma.pieces import WINDOW, CountTokens, pieces
from epic_rag_chroma.sections import Section, sections_of

__all__ = ["HEADING_SEPARATOR", "Chunk", "CountTokens", "chunk_document"]

HEADING_SEPARATOR = " > "
# Lines that are counted by one call: a tokenizer keeps far more of a line than its number of tokens until it returns.
_COUNTED_LINES = 1024


@dataclass(frozen=True)
class Chunk:
    """A piece of a document.

    Args:
        text: The exact text of its lines (a slice of the line where one line is longer than a chunk).
        embedded: What the encoder reads: the headings above the text, the header of a table that began before, then
            the text.
        heading_path: Headings above it, its own section's last.
        first_line: First line in the file, from 1; None where there are pages.
        last_line: Last line, inclusive.
        page: Page, from 1; None where there are lines.
        tokens: Token count of `embedded`.
    """

    text: str
    embedded: str
    heading_path: tuple[str, ...]
    first_line: int | None
    last_line: int | None
    page: int | None
    tokens: int


@dataclass(frozen=True)
class _Unit:
    """What is never cut unless it must be: a line, or a piece of a long one (characters start to end)."""

    line: int
    start: int
    end: int
    tokens: int
    cost: Break


@dataclass(frozen=True)
class _Atom:
    """Units, by their numbers, that stay together; what the chunker packs."""

    first: int
    end: int
    tokens: int
    cost: Break


def chunk_document(document: Document, *, max_tokens: int, overlap: int, count_tokens: CountTokens) -> list[Chunk]:
    """Cut a document into chunks.

    Args:
        document: What a reader made.
        max_tokens: The most tokens of a chunk, headings included.
        overlap: The most tokens that a chunk repeats of the one before it in its section.
        count_tokens: The encoder's own count.

    Returns:
        Chunks in order. Every line with text is in at least one.
    """
    cutter = _Cutter(document, max_tokens, overlap, count_tokens)
    return [chunk for section in sections_of(document, cutter.fits) for chunk in cutter.cut(section)]


class _Cutter:
    def __init__(self, document: Document, max_tokens: int, overlap: int, count_tokens: CountTokens) -> None:
        self._document = document
        self._lines = document.lines
        self._max = max_tokens
        self._overlap = overlap
        self._count = count_tokens
        self._tokens = self._counted_lines()
        self._repeat_starts = [repeat.first for repeat in document.repeats]
        self._repeat_tokens: dict[str, int] = {}
        self._wholes = _nested([*document.wholes, *_runs(document.breaks)])
        self._whole_starts = [first for first, _ in self._wholes]

    def _counted_lines(self) -> list[int]:
        """Tokens of each line; more than a chunk may have, without a count, of a line that is cut in any case."""
        tokens = [1] * len(self._lines)
        unread = self._document.unread
        for number in unread:
            tokens[number] = 0
        counted = []
        for number, line in enumerate(self._lines):
            if number not in unread and len(line) > WINDOW:
                tokens[number] = self._max + 1
            elif number not in unread and line.strip():
                counted.append(number)
        for start in range(0, len(counted), _COUNTED_LINES):
            some = counted[start : start + _COUNTED_LINES]
            # The line end counts too: some tokenizers have a token for it.
            for number, count in zip(some, self._count([self._lines[n] + "\n" for n in some]), strict=True):
                tokens[number] = count
        return tokens

    def fits(self, section: Section) -> bool:
        """Whether a section is one chunk."""
        total = 0
        for line in range(section.first, section.end):
            total += self._tokens[line]
            if total > self._max:
                return False
        return total + self._prefix(section.path)[1] <= self._max

    def cut(self, section: Section) -> list[Chunk]:
        """Cut one section."""
        prefix, prefix_tokens = self._prefix(section.path)
        budget = max(1, self._max - prefix_tokens)
        units = self._trimmed(self._units(section, budget))
        groups = [self._trimmed(group) for group in self._packed(units, budget)]
        return list(self._fitting([group for group in groups if group], section, prefix))

    def _prefix(self, path: tuple[str, ...]) -> tuple[str, int]:
        """The headings as the encoder reads them, the innermost ones if all take more than a quarter of a chunk."""
        for skipped in range(len(path)):
            prefix = HEADING_SEPARATOR.join(path[skipped:]) + "\n\n"
            tokens = self._count([prefix])[0]
            if tokens <= self._max // 4:
                return prefix, tokens
        return "", 0

    def _repeat(self, line: int) -> tuple[Repeat, int] | None:
        """What is read again with a chunk that begins at a line, and its tokens; None if it would fill the chunk."""
        number = bisect_right(self._repeat_starts, line) - 1
        if number < 0:
            return None
        repeat = self._document.repeats[number]
        if line >= repeat.end:
            return None
        tokens = self._repeat_tokens.get(repeat.text)
        if tokens is None:
            tokens = self._repeat_tokens[repeat.text] = self._count([repeat.text + "\n"])[0]
        return (repeat, tokens) if tokens <= self._max // 3 else None

    def _budget_at(self, line: int, budget: int) -> int:
        repeat = self._repeat(line)
        return budget if repeat is None else max(1, budget - repeat[1])

    def _units(self, section: Section, budget: int) -> list[_Unit]:
        units: list[_Unit] = []
        for line in range(section.first, section.end):
            text, cost, tokens = self._lines[line], self._document.breaks[line], self._tokens[line]
            allowed = self._budget_at(line, budget)
            if tokens <= allowed:
                units.append(_Unit(line, 0, len(text), tokens, cost))
                continue
            parts = list(pieces(text, allowed, self._count))
            counts = self._count([text[start:end] for start, end in parts])
            for (start, end), count in zip(parts, counts, strict=True):
                units.append(_Unit(line, start, end, count, Break.SENTENCE if start else cost))
        return units

    def _atoms(self, units: list[_Unit], budget: int) -> list[_Atom]:
        """What stays together: the outermost of the document's wholes that fit, else units."""
        atoms: list[_Atom] = []
        lines = [unit.line for unit in units]
        sums = [0, *accumulate(unit.tokens for unit in units)]
        position = 0
        while position < len(units):
            unit = units[position]
            first = position
            allowed = self._budget_at(unit.line, budget)
            for end_line in self._ends_of_wholes(unit) if unit.start == 0 else ():
                end = bisect_left(lines, end_line)
                tokens = sums[end] - sums[first]
                if tokens <= allowed:
                    atoms.append(_Atom(first, end, tokens, unit.cost))
                    position = end
                    break
            else:
                atoms.append(_Atom(first, first + 1, unit.tokens, unit.cost))
                position = first + 1
        return atoms

    def _ends_of_wholes(self, unit: _Unit) -> Iterator[int]:
        """Where the wholes that begin with a unit end, the outermost first."""
        number = bisect_right(self._whole_starts, unit.line - 1)
        while number < len(self._wholes) and self._wholes[number][0] == unit.line:
            yield self._wholes[number][1]
            number += 1

    def _packed(self, units: list[_Unit], budget: int) -> Iterator[list[_Unit]]:
        """Groups of units of at most `budget` tokens and of similar size, cut at the cheapest place near the end."""
        atoms = self._atoms(units, budget)
        position = 0
        while position < len(atoms):
            allowed = self._budget_at(units[atoms[position].first].line, budget)
            rest = 0
            for atom in atoms[position:]:
                rest += atom.tokens
                if rest > allowed * 4:  # as good as endless
                    break
            if rest <= allowed:
                yield units[atoms[position].first :]
                return
            target = rest / math.ceil(rest / allowed)
            best, best_cost, total = position + 1, (Break.INSIDE + 1, 0.0), 0
            for end in range(position + 1, len(atoms)):
                total += atoms[end - 1].tokens
                if total > allowed:
                    break
                if total >= target * 0.5:
                    cost = (int(atoms[end].cost), abs(total - target))
                    if cost < best_cost:
                        best, best_cost = end, cost
                elif best_cost[0] > Break.INSIDE:
                    best = end
            yield units[atoms[position].first : atoms[best - 1].end]
            position = self._overlapped(atoms, position, best)

    def _overlapped(self, atoms: list[_Atom], first: int, end: int) -> int:
        """Where the chunk after atoms[first:end] begins: some atoms back, as far as the overlap allows."""
        tokens = 0
        while end - 1 > first and tokens + atoms[end - 1].tokens <= self._overlap:
            end -= 1
            tokens += atoms[end].tokens
        return end

    def _trimmed(self, units: list[_Unit]) -> list[_Unit]:
        """Without blank lines at either end."""
        first, end = 0, len(units)
        while first < end and not self._text(units[first : first + 1]).strip():
            first += 1
        while end > first and not self._text(units[end - 1 : end]).strip():
            end -= 1
        return units[first:end]

    def _text(self, units: list[_Unit]) -> str:
        first, last = units[0], units[-1]
        if first.line == last.line:
            return self._lines[first.line][first.start : last.end]
        middle = self._lines[first.line + 1 : last.line]
        return "\n".join([self._lines[first.line][first.start :], *middle, self._lines[last.line][: last.end]])

    def _fitting(self, groups: list[list[_Unit]], section: Section, prefix: str) -> Iterator[Chunk]:
        """Chunks of groups; a group whose tokens are more together than one by one is halved until it fits."""
        texts = [self._text(group) for group in groups]
        counts = self._count([self._embedded(group, section, prefix) for group in groups])
        for group, text, tokens in zip(groups, texts, counts, strict=True):
            if tokens > self._max and (len(group) > 1 or len(text) > 1):
                halves = [self._trimmed(half) for half in self._halved(group)]
                yield from self._fitting([half for half in halves if half], section, prefix)
            else:
                yield self._chunk(group, text, tokens, section, prefix)

    def _embedded(self, group: list[_Unit], section: Section, prefix: str) -> str:
        read = [unit for unit in group if unit.line not in self._document.unread] if self._document.unread else group
        text = self._text(group) if len(read) in (0, len(group)) else "\n".join(self._text([unit]) for unit in read)
        repeat = self._repeat(group[0].line)
        if repeat is not None:
            text = f"{repeat[0].text}\n{text}"
        # A chunk that begins with its own heading says it already; what stands above that is in the prefix still.
        if group[0].line < section.body and group[0].start == 0 and len(section.path) <= 1:
            return text
        return prefix + text

    def _halved(self, group: list[_Unit]) -> tuple[list[_Unit], list[_Unit]]:
        if len(group) > 1:
            return group[: len(group) // 2], group[len(group) // 2 :]
        unit = group[0]
        middle = (unit.start + unit.end) // 2
        left = _Unit(unit.line, unit.start, middle, unit.tokens, unit.cost)
        return [left], [_Unit(unit.line, middle, unit.end, unit.tokens, Break.INSIDE)]

    def _chunk(self, group: list[_Unit], text: str, tokens: int, section: Section, prefix: str) -> Chunk:
        first, last = group[0].line, group[-1].line
        embedded = self._embedded(group, section, prefix)
        if self._document.pages is not None:
            return Chunk(text, embedded, section.path, None, None, self._document.pages[first] or None, tokens)
        spans = self._document.spans
        if spans is None:
            return Chunk(text, embedded, section.path, first + 1, last + 1, None, tokens)
        return Chunk(text, embedded, section.path, spans[first][0], max(spans[last]), None, tokens)


def _runs(breaks: list[Break]) -> Iterator[tuple[int, int]]:
    """Lines of which each one belongs inside what the line before it is in."""
    first = 0
    for line in range(1, len(breaks) + 1):
        if line == len(breaks) or breaks[line] is not Break.INSIDE:
            if line - first > 1:
                yield first, line
            first = line


def _nested(wholes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order of their first lines, of those with the same first line the longest first."""
    return sorted(set(wholes), key=lambda whole: (whole[0], -whole[1]))
