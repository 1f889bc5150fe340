"""From a `Document` to chunks: whole lines of one section, within the token limit, cut where it hurts least.

LlamaIndex's parsers return strings without positions, stripped, and its Markdown parser knows neither underlined titles
nor ~~~ fences; a hit has to name lines that show its text. So sections and lines are cut here, and LlamaIndex's
`SentenceSplitter` cuts what has no lines to cut at: a paragraph written as one long line.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from epic_rag_chroma.reading.document import Break, Document, Repeat, Scope

__all__ = ["HEADING_SEPARATOR", "WINDOW", "Chunk", "CountTokens", "Section", "chunk_document", "pieces", "sections_of"]


# --- from pieces
# Pieces of a line that is longer than a chunk: a paragraph in one line, minified code, encoded data.

CountTokens = Callable[[Sequence[str]], list[int]]

# Characters that are cut into sentences at a time.
WINDOW = 4000
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])")
_UNSPACED = re.compile(r"[^\s,.;\u3002\uff01\uff1f]{400,}")


def pieces(line: str, budget: int, count: CountTokens) -> Iterator[tuple[int, int]]:
    """Pieces of a line: (start, end) in characters, sentences if there are any.

    Args:
        line: A line without its end.
        budget: The most tokens of a chunk; a piece has about a third, so that chunks are filled.
        count: The encoder's own count.
    """
    size = max(1, budget // 3)
    for start, end in _windows(line):
        window = line[start:end]
        if _UNSPACED.search(window):
            # No words to cut at (encoded data, say); a split by characters would count each one by itself.
            step = max(1, len(window) * size // max(1, count([window])[0]))
            yield from ((start + at, min(start + at + step, end)) for at in range(0, len(window), step))
        else:
            yield from ((start + first, start + last) for first, last in _sentences(window, size, count))


def _sentences(text: str, size: int, count: CountTokens) -> list[tuple[int, int]]:
    from llama_index.core.node_parser import SentenceSplitter

    splitter = SentenceSplitter(
        chunk_size=size,
        chunk_overlap=0,
        tokenizer=lambda part: range(count([part])[0]),
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
    while len(line) - start > WINDOW:
        end = line.rfind(" ", start + WINDOW // 2, start + WINDOW)
        end = start + WINDOW if end < 0 else end + 1
        yield start, end
        start = end
    yield start, len(line)


# --- from sections
# The sections of a document: by its headings, or by the functions and classes of source code.


@dataclass(frozen=True)
class Section:
    """Lines that share their headings; no chunk reaches beyond them.

    Args:
        first: First line, from 0.
        end: The line after the last.
        path: Headings above the text, its own last.
        body: First line after the headings it begins with.
    """

    first: int
    end: int
    path: tuple[str, ...]
    body: int


def sections_of(document: Document, fits: Callable[[Section], bool]) -> Iterator[Section]:
    """The sections of a document, in order; each line with text is in exactly one.

    Args:
        document: What a reader made.
        fits: Whether a section is one chunk; a class that is keeps its methods.
    """
    if document.scopes:
        yield from _Scopes(document, fits).sections()
    else:
        yield from _by_heading(document)


def _by_heading(document: Document) -> Iterator[Section]:
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
        yield Section(first if pending is None else pending, end, tuple(title for _, title in stack), body)
        pending = None


class _Scopes:
    def __init__(self, document: Document, fits: Callable[[Section], bool]) -> None:
        self._lines = document.lines
        self._scopes = document.scopes
        self._fits = fits

    def sections(self) -> Iterator[Section]:
        """Each scope that fits, and what lies between scopes. Without recursion, however deep they are."""
        position = 0
        open_scopes: list[tuple[int, str]] = []  # (end, title) of the scopes around the position
        number = 0
        while number < len(self._scopes):
            scope = self._scopes[number]
            position = yield from self._close(open_scopes, position, scope.first)
            yield from self._between(position, scope.first, open_scopes)
            path = (*(title for _, title in open_scopes), scope.title)
            following = self._after(number)
            whole = Section(scope.first, self._with_closers(scope, open_scopes, following), path, scope.body)
            if not self._fits(whole):
                whole = Section(scope.first, scope.end, path, scope.body)
            if self._fits(whole) or following == number + 1:
                yield whole
                position, number = whole.end, following
            else:
                open_scopes.append((scope.end, scope.title))
                inner = self._scopes[number + 1].first
                yield Section(scope.first, inner, path, min(scope.body, inner))
                position, number = inner, number + 1
        position = yield from self._close(open_scopes, position, len(self._lines))
        yield from self._between(position, len(self._lines), [])

    def _after(self, number: int) -> int:
        """The first scope that does not lie in a scope."""
        end = self._scopes[number].end
        number += 1
        while number < len(self._scopes) and self._scopes[number].first < end:
            number += 1
        return number

    def _with_closers(self, scope: Scope, around: Sequence[tuple[int, str]], following: int) -> int:
        """The end of a scope with the closing brackets after it, which say nothing by themselves."""
        limit = self._scopes[following].first if following < len(self._scopes) else len(self._lines)
        if around and any(any(map(str.isalnum, line)) for line in self._lines[scope.end : min(limit, around[-1][0])]):
            return scope.end
        end = scope.end
        while end < limit and not any(map(str.isalnum, self._lines[end])):
            end += 1
        return end

    def _close(self, around: list[tuple[int, str]], position: int, until: int) -> Generator[Section, None, int]:
        """Leave the scopes that end before a line; yields what is left in each, gives the new position."""
        while around and around[-1][0] <= until:
            yield from self._between(position, around[-1][0], around)
            position = max(position, around[-1][0])
            around.pop()
        return position

    def _between(self, first: int, end: int, around: Sequence[tuple[int, str]]) -> Iterator[Section]:
        if any(line.strip() for line in self._lines[first:end]):
            yield Section(first, end, tuple(title for _, title in around), first)


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
