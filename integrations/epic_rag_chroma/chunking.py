"""From a `Document` to chunks: whole lines of one section, within the token limit, cut where it hurts least.

LlamaIndex's parsers return strings without positions, stripped, and its Markdown parser knows neither underlined titles
nor ~~~ fences; a hit has to name lines that show its text. So sections and lines are cut here, and LlamaIndex's
`SentenceSplitter` cuts what has no lines to cut at: a paragraph written as one long line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from epic_rag_chroma.document import Break, Document

__all__ = ["HEADING_SEPARATOR", "Chunk", "CountTokens", "chunk_document"]

CountTokens = Callable[[Sequence[str]], list[int]]

HEADING_SEPARATOR = " > "
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])")
_UNSPACED = re.compile(r"[^\s,.;\u3002\uff01\uff1f]{400,}")
_WINDOW = 4000


@dataclass(frozen=True)
class Chunk:
    """A piece of a document.

    Args:
        text: The exact text of its lines (a slice of the line where one line is longer than a chunk).
        embedded: What the encoder reads: the headings above the text, then the text.
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
class _Section:
    first: int
    end: int
    path: tuple[str, ...]
    body: int  # first line after the headings it begins with


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
    return [chunk for section in _sections(document) for chunk in cutter.cut(section)]


def _sections(document: Document) -> Iterator[_Section]:
    """One section for each heading with text below it; a bare heading joins the section that follows."""
    headings = {heading.line: heading for heading in document.headings}
    starts = {0, *headings}
    if document.pages is not None:
        pages = document.pages
        starts |= {line for line in range(1, len(pages)) if pages[line] != pages[line - 1]}
    edges = [*sorted(line for line in starts if line < len(document.lines)), len(document.lines)]
    stack: list[tuple[int, str]] = []
    pending: int | None = None
    for first, end in pairwise(edges):
        body = first
        heading = headings.get(first)
        if heading is not None:
            while stack and stack[-1][0] >= heading.level:
                stack.pop()
            stack.append((heading.level, heading.title))
            body = first + heading.height
        if heading is not None and end < len(document.lines) and not any(map(str.strip, document.lines[body:end])):
            pending = first if pending is None else pending
            continue
        yield _Section(first if pending is None else pending, end, tuple(title for _, title in stack), body)
        pending = None


class _Cutter:
    def __init__(self, document: Document, max_tokens: int, overlap: int, count_tokens: CountTokens) -> None:
        self._document = document
        self._lines = document.lines
        self._max = max_tokens
        self._overlap = overlap
        self._count = count_tokens
        counted = [number for number, line in enumerate(self._lines) if line.strip()]
        self._tokens = [1] * len(self._lines)
        # The line end counts too: some tokenizers have a token for it.
        for number, tokens in zip(counted, count_tokens([self._lines[n] + "\n" for n in counted]), strict=True):
            self._tokens[number] = tokens

    def cut(self, section: _Section) -> list[Chunk]:
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

    def _units(self, section: _Section, budget: int) -> list[_Unit]:
        units: list[_Unit] = []
        for line in range(section.first, section.end):
            text, cost = self._lines[line], self._document.breaks[line]
            if self._tokens[line] <= budget:
                units.append(_Unit(line, 0, len(text), self._tokens[line], cost))
                continue
            pieces = list(self._pieces(text, budget))
            counts = self._count([text[start:end] for start, end in pieces])
            for (start, end), tokens in zip(pieces, counts, strict=True):
                units.append(_Unit(line, start, end, tokens, Break.SENTENCE if start else cost))
        return units

    def _packed(self, units: list[_Unit], budget: int) -> Iterator[list[_Unit]]:
        """Groups of units of at most `budget` tokens and of similar size, cut at the cheapest place near the end."""
        position = 0
        while position < len(units):
            rest = sum(unit.tokens for unit in units[position:]) if len(units) - position <= budget else budget * 4
            if rest <= budget:
                yield units[position:]
                return
            target = rest / math.ceil(rest / budget)
            best, best_cost, total = position + 1, (Break.INSIDE + 1, 0.0), 0
            for end in range(position + 1, len(units)):
                total += units[end - 1].tokens
                if total > budget:
                    break
                if total >= target * 0.5:
                    cost = (int(units[end].cost), abs(total - target))
                    if cost < best_cost:
                        best, best_cost = end, cost
                elif best_cost[0] > Break.INSIDE:
                    best = end
            yield units[position:best]
            position = self._overlapped(units, position, best)

    def _overlapped(self, units: list[_Unit], first: int, end: int) -> int:
        """Where the chunk after units[first:end] begins: some units back, as far as the overlap allows."""
        tokens = 0
        while end - 1 > first and tokens + units[end - 1].tokens <= self._overlap:
            end -= 1
            tokens += units[end].tokens
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

    def _fitting(self, groups: list[list[_Unit]], section: _Section, prefix: str) -> Iterator[Chunk]:
        """Chunks of groups; a group whose tokens are more together than one by one is halved until it fits."""
        texts = [self._text(group) for group in groups]
        counts = self._count([self._embedded(group, section, prefix) for group in groups])
        for group, text, tokens in zip(groups, texts, counts, strict=True):
            if tokens > self._max and (len(group) > 1 or len(text) > 1):
                halves = [self._trimmed(half) for half in self._halved(group)]
                yield from self._fitting([half for half in halves if half], section, prefix)
            else:
                yield self._chunk(group, text, tokens, section, prefix)

    def _embedded(self, group: list[_Unit], section: _Section, prefix: str) -> str:
        text = self._text(group)
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

    def _chunk(self, group: list[_Unit], text: str, tokens: int, section: _Section, prefix: str) -> Chunk:
        first, last = group[0].line, group[-1].line
        embedded = self._embedded(group, section, prefix)
        if self._document.pages is not None:
            return Chunk(text, embedded, section.path, None, None, self._document.pages[first], tokens)
        spans = self._document.spans
        if spans is None:
            return Chunk(text, embedded, section.path, first + 1, last + 1, None, tokens)
        return Chunk(text, embedded, section.path, spans[first][0], max(spans[last]), None, tokens)

    def _pieces(self, line: str, budget: int) -> Iterator[tuple[int, int]]:
        """Pieces of a line that is longer than a chunk: (start, end) in characters, sentences if there are any."""
        size = max(1, budget // 3)
        for start, end in _windows(line):
            window = line[start:end]
            if _UNSPACED.search(window):
                # No words to cut at (encoded data, say); a split by characters would count each one by itself.
                step = max(1, len(window) * size // max(1, self._count([window])[0]))
                yield from ((start + at, min(start + at + step, end)) for at in range(0, len(window), step))
            else:
                yield from ((start + first, start + last) for first, last in self._sentences(window, size))

    def _sentences(self, text: str, size: int) -> list[tuple[int, int]]:
        from llama_index.core.node_parser import SentenceSplitter

        splitter = SentenceSplitter(
            chunk_size=size,
            chunk_overlap=0,
            tokenizer=lambda part: range(self._count([part])[0]),
            # The default would load nltk, for seconds, to cut English better than this does.
            chunking_tokenizer_fn=_split_sentences,
        )
        try:
            parts = splitter.split_text(text)
        except ValueError:  # a single character of more tokens than a piece may have
            return [(0, len(text))]
        spans = []
        position = 0
        for part in parts:
            # With no overlap, nothing but stripped white space lies between one part and the next.
            start = text.find(part, position)
            if start < 0:
                return [(0, len(text))]
            spans.append((start, start + len(part)))
            position = start + len(part)
        return spans or [(0, len(text))]


def _split_sentences(text: str) -> list[str]:
    edges = [0, *(match.end() for match in _SENTENCE.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(edges) if end > start]


def _windows(line: str) -> Iterator[tuple[int, int]]:
    """Parts of a line that are short enough to be split in reasonable time, cut at white space if there is any."""
    start = 0
    while len(line) - start > _WINDOW:
        end = line.rfind(" ", start + _WINDOW // 2, start + _WINDOW)
        end = start + _WINDOW if end < 0 else end + 1
        yield start, end
        start = end
    yield start, len(line)
