"""Split a `Document` into chunks: whole lines of one section, within the token limit, split where the cost is lowest.

`sections_of` divides a document by its headings, or by the functions and classes of source code; no chunk crosses a
section. `_Chunker` then packs the lines of a section into chunks of similar size. A line that is longer than a chunk (a
paragraph in one line, minified code) is divided by `split_long_line`, into sentences where there are any.

LlamaIndex's parsers are not used, because a hit must name the lines that show its text: they return stripped strings
without positions, and the Markdown parser knows neither underlined titles nor ~~~ fences. Long lines are divided where
its `SentenceSplitter` divides them, without the packages and the seconds that importing it takes.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from epic_rag_chroma.reading.document import HEADING_SEPARATOR, Document, SplitCost, substituted

__all__ = ["Chunk", "CountTokens", "Section", "chunk_document", "sections_of", "split_long_line"]


CountTokens = Callable[[Sequence[str]], list[int]]

# Lines are tokenised in batches: a tokenizer holds far more of a line than its number of tokens until it returns.
_COUNTED_LINES = 1024
# Longer lines are divided before they are tokenised, in windows of this many characters.
_WINDOW = 4000
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])")
# What a sentence that is too long is divided into: phrases, words, characters.
_PHRASE = re.compile(r"[^,.;\u3002\uff1f\uff01]+[,.;\u3002\uff1f\uff01]?|[,.;\u3002\uff1f\uff01]")
_WORD = re.compile(r" [^ ]*|[^ ]+")
_UNSPACED = re.compile(r"[^\s,.;\u3002\uff01\uff1f]{400,}")


@dataclass(frozen=True)
class Section:
    """Lines under the same headings; no chunk crosses a section.

    Args:
        first: First line, from 0.
        end: The line after the last.
        path: The headings above the text, the section's heading last.
        body: The first line after the headings at its beginning.
    """

    first: int
    end: int
    path: tuple[str, ...]
    body: int


def sections_of(document: Document, fits: Callable[[Section], bool]) -> Iterator[Section]:
    """Yield the sections of a document in order; each line with text is in exactly one.

    Args:
        document: The document.
        fits: Returns whether a section fits into one chunk; a class that does is one section with its methods.
    """
    if document.scopes:
        yield from _by_scope(document, fits)
    else:
        yield from _by_heading(document)


def _by_heading(document: Document) -> Iterator[Section]:
    """Yield a section for each heading with text below it; a heading without text joins the next section."""
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


def _by_scope(document: Document, fits: Callable[[Section], bool]) -> Iterator[Section]:
    """Yield each scope that fits, and the lines between scopes; without recursion because of the depth."""
    lines, scopes = document.lines, document.scopes
    open_scopes: list[tuple[int, str]] = []  # (end, title) of the scopes around the position
    position = 0

    def between(first: int, end: int) -> Iterator[Section]:
        if any(line.strip() for line in lines[first:end]):
            yield Section(first, end, tuple(title for _, title in open_scopes), first)

    def rest_until(line: int) -> Iterator[Section]:
        """Yield the lines before a line, and close the scopes that end before it."""
        nonlocal position
        while open_scopes and open_scopes[-1][0] <= line:
            yield from between(position, open_scopes[-1][0])
            position = max(position, open_scopes[-1][0])
            open_scopes.pop()
        yield from between(position, line)

    number = 0
    while number < len(scopes):
        scope = scopes[number]
        yield from rest_until(scope.first)
        following = number + 1  # the first scope that is not inside this one
        while following < len(scopes) and scopes[following].first < scope.end:
            following += 1
        # The closing brackets after a scope belong to it, unless other code of the scope around it follows them.
        closed, limit = scope.end, scopes[following].first if following < len(scopes) else len(lines)
        after = lines[scope.end : min(limit, open_scopes[-1][0])] if open_scopes else []
        if not any(any(map(str.isalnum, line)) for line in after):
            while closed < limit and not any(map(str.isalnum, lines[closed])):
                closed += 1
        path = (*(title for _, title in open_scopes), scope.title)
        whole = Section(scope.first, closed, path, scope.body)
        if not fits(whole):
            whole = Section(scope.first, scope.end, path, scope.body)
        if fits(whole) or following == number + 1:
            yield whole
            position, number = whole.end, following
        else:
            open_scopes.append((scope.end, scope.title))
            inner = scopes[number + 1].first
            yield Section(scope.first, inner, path, min(scope.body, inner))
            position, number = inner, number + 1
    yield from rest_until(len(lines))


@dataclass(frozen=True)
class Chunk:
    """A chunk of a document.

    Args:
        text: The exact text of its lines (a slice of a line that is longer than a chunk).
        embedded: The text for the encoder: the headings above the chunk, the repeated header of a table that began
            before, then the text.
        heading_path: The headings above it, its section's heading last.
        first_line: First line in the file, from 1; None for formats with pages.
        last_line: Last line, inclusive; None for formats with pages.
        page: Page, from 1; None for formats with lines.
        tokens: Number of tokens of `embedded`.
        words: The text for a keyword index: `text` with the document's substitutions and without its display-only
            lines, as in `embedded`; without headings and repeated header.
    """

    text: str
    embedded: str
    heading_path: tuple[str, ...]
    first_line: int | None
    last_line: int | None
    page: int | None
    tokens: int
    words: str


@dataclass(frozen=True)
class _Unit:
    """A line, or a part of a long one (characters `start` to `end`), with the split cost before it."""

    line: int
    start: int
    end: int
    tokens: int
    cost: SplitCost


@dataclass(frozen=True)
class _Atom:
    """A range of units that are packed together, with the split cost before it."""

    first: int
    end: int
    tokens: int
    cost: SplitCost


def chunk_document(
    document: Document, *, max_tokens: int, overlap: int, count_tokens: CountTokens, window: int | None = None
) -> list[Chunk]:
    """Split a document into chunks.

    Args:
        document: The document.
        max_tokens: Maximum tokens of a chunk, headings included.
        overlap: Maximum tokens that a chunk repeats of the previous one in its section.
        count_tokens: The encoder's token count.
        window: Maximum tokens of a chunk that consists of whole lines, where it differs from that of parts of a line.

    Returns:
        Chunks in order. Every line with text to embed is in at least one.
    """
    chunker = _Chunker(document, max_tokens, max(max_tokens, window or 0), overlap, count_tokens)
    return [chunk for section in sections_of(document, chunker.fits) for chunk in chunker.split(section)]


class _Chunker:
    def __init__(
        self, document: Document, max_tokens: int, window: int, overlap: int, count_tokens: CountTokens
    ) -> None:
        self._document = document
        self._window = window
        self._lines = document.lines
        self._read_lines = list(document.lines)
        for number, substitutions in document.substitutions.items():
            self._read_lines[number] = substituted(document.lines[number], substitutions)
        self._max = max_tokens
        self._overlap = overlap
        self._count = count_tokens
        self._tokens = self._line_tokens()
        self._header_starts = [header.first for header in document.repeated_headers]
        self._header_tokens: dict[str, int] = {}
        # By first line, the outermost range first.
        ranges = {*document.keep_together, *_inside_runs(document.split_costs)}
        self._keep_together = sorted(ranges, key=lambda lines: (lines[0], -lines[1]))
        self._keep_together_starts = [first for first, _ in self._keep_together]

    def _line_tokens(self) -> list[int]:
        """Return the tokens of each line; for a line that is divided in any case, one more than the maximum."""
        tokens = [1] * len(self._lines)
        display_only = self._document.display_only
        for number in display_only:
            tokens[number] = 0
        counted = []
        for number, line in enumerate(self._read_lines):
            if number not in display_only and len(line) > _WINDOW:
                tokens[number] = self._max + 1
            elif number not in display_only and line.strip():
                counted.append(number)
        for start in range(0, len(counted), _COUNTED_LINES):
            some = counted[start : start + _COUNTED_LINES]
            # With the line end, for which some tokenizers have a token.
            for number, count in zip(some, self._count([self._read_lines[n] + "\n" for n in some]), strict=True):
                tokens[number] = count
        return tokens

    def fits(self, section: Section) -> bool:
        """Return whether a section fits into one chunk."""
        total = 0
        for line in range(section.first, section.end):
            total += self._tokens[line]
            if total > self._window:
                return False
        return total + self._prefix(section.path)[1] <= self._window

    def split(self, section: Section) -> list[Chunk]:
        """Split one section into chunks."""
        prefix, prefix_tokens = self._prefix(section.path)
        budget = max(1, self._max - prefix_tokens)
        units = self._trimmed(self._units(section, budget))
        groups = [self._trimmed(group) for group in self._packed(units, budget)]
        placed = [
            ((first.line, first.start), (last.line, last.end), chunk)
            for first, last, chunk in self._fitting([group for group in groups if group], section, prefix)
        ]
        # Chunks inside another one are dropped: before lines that need a chunk of their own, one may be nothing but the
        # overlap; and half of a group that was too long may be inside its neighbour.
        kept: list[Chunk] = []
        reached = (-1, 0)
        for _, end, chunk in sorted(placed, key=lambda each: (each[0], -each[1][0], -each[1][1])):
            if end > reached:
                kept.append(chunk)
                reached = end
        return kept

    def _prefix(self, path: tuple[str, ...]) -> tuple[str, int]:
        """Return the embedded headings and their tokens; only the innermost ones if all exceed a quarter of a chunk."""
        for skipped in range(len(path)):
            prefix = HEADING_SEPARATOR.join(path[skipped:]) + "\n\n"
            tokens = self._count([prefix])[0]
            if tokens <= self._max // 4:
                return prefix, tokens
        return "", 0

    def _repeated_header(self, line: int) -> tuple[str, int] | None:
        """Return the header to repeat in a chunk that begins at a line, and its tokens; None if there is none."""
        number = bisect_right(self._header_starts, line) - 1
        if number < 0:
            return None
        header = self._document.repeated_headers[number]
        if line >= header.end:
            return None
        tokens = self._header_tokens.get(header.text)
        if tokens is None:
            tokens = self._header_tokens[header.text] = self._count([header.text + "\n"])[0]
        return (header.text, tokens) if tokens <= self._max // 3 else None  # it must not fill the chunk

    def _budget_at(self, line: int, budget: int) -> int:
        header = self._repeated_header(line)
        return budget if header is None else max(1, budget - header[1])

    def _units(self, section: Section, budget: int) -> list[_Unit]:
        units: list[_Unit] = []
        for line in range(section.first, section.end):
            text, cost, tokens = self._lines[line], self._document.split_costs[line], self._tokens[line]
            allowed = self._budget_at(line, budget)
            if tokens <= allowed:
                units.append(_Unit(line, 0, len(text), tokens, cost))
                continue
            parts = list(split_long_line(text, allowed, self._count))
            counts = self._count([text[start:end] for start, end in parts])
            for (start, end), count in zip(parts, counts, strict=True):
                units.append(_Unit(line, start, end, count, SplitCost.SENTENCE if start else cost))
        return units

    def _atoms(self, units: list[_Unit], budget: int) -> list[_Atom]:
        """Group units by the outermost `keep_together` ranges that fit into a chunk."""
        atoms: list[_Atom] = []
        lines = [unit.line for unit in units]
        sums = [0, *accumulate(unit.tokens for unit in units)]
        position = 0
        while position < len(units):
            unit = units[position]
            first = position
            allowed = self._budget_at(unit.line, budget)
            for end_line in self._range_ends(unit) if unit.start == 0 else ():
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

    def _range_ends(self, unit: _Unit) -> Iterator[int]:
        """Yield the ends of the `keep_together` ranges that begin with a unit, the outermost first."""
        number = bisect_right(self._keep_together_starts, unit.line - 1)
        while number < len(self._keep_together) and self._keep_together[number][0] == unit.line:
            yield self._keep_together[number][1]
            number += 1

    def _packed(self, units: list[_Unit], budget: int) -> Iterator[list[_Unit]]:
        """Yield groups of units of at most `budget` tokens and similar size, split at the lowest cost near the end."""
        atoms = self._atoms(units, budget)
        position = 0
        while position < len(atoms):
            allowed = self._budget_at(units[atoms[position].first].line, budget)
            whole = allowed + self._window - self._max
            rest = 0
            for atom in atoms[position:]:
                rest += atom.tokens
                if rest > allowed * 4:  # far from the end: more does not change the target
                    break
            if rest <= whole:
                yield units[atoms[position].first :]
                return
            best = _following_line(units, atoms, position, rest, whole)
            if best is None:
                best = _within_line(atoms, position, rest, allowed)
            yield units[atoms[position].first : atoms[best - 1].end]
            # The next chunk repeats as many atoms of this one as the overlap allows, unless a paragraph begins with it.
            if best < len(atoms) and atoms[best].cost < SplitCost.SENTENCE:
                position = best
                continue
            repeated = 0
            while best - 1 > position and repeated + atoms[best - 1].tokens <= self._overlap:
                best -= 1
                repeated += atoms[best].tokens
            position = best

    def _trimmed(self, units: list[_Unit]) -> list[_Unit]:
        """Return units without blank lines at either end."""
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

    def _fitting(
        self, groups: list[list[_Unit]], section: Section, prefix: str
    ) -> Iterator[tuple[_Unit, _Unit, Chunk]]:
        """Yield the chunks of groups with their first and last units.

        A group with more tokens than the sum of its units is halved until it fits.
        """
        texts = [self._text(group) for group in groups]
        words = [self._words(group) for group in groups]
        embedded = [self._embedded(group, read, section, prefix) for group, read in zip(groups, words, strict=True)]
        pages, spans = self._document.pages, self._document.spans
        counts = self._count(embedded)
        for group, text, plain, read, tokens in zip(groups, texts, words, embedded, counts, strict=True):
            if not plain.strip():
                continue
            if tokens > self._window and (len(group) > 1 or len(text) > 1):
                middle = len(group) // 2
                halves = [group[:middle], group[middle:]]
                if len(group) == 1:
                    unit = group[0]
                    middle = (unit.start + unit.end) // 2
                    halves = [
                        [_Unit(unit.line, unit.start, middle, unit.tokens, unit.cost)],
                        [_Unit(unit.line, middle, unit.end, unit.tokens, SplitCost.INSIDE)],
                    ]
                yield from self._fitting([half for half in map(self._trimmed, halves) if half], section, prefix)
                continue
            first, last = group[0].line, group[-1].line
            lines: tuple[int | None, int | None] = (first + 1, last + 1)
            if pages is not None:
                lines = (None, None)
            elif spans is not None:
                lines = (min(spans[first : last + 1])[0], max(end for _, end in spans[first : last + 1]))
            page = pages[first] or None if pages is not None else None
            yield group[0], group[-1], Chunk(text, read, section.path, *lines, page, tokens, plain)

    def _words(self, group: list[_Unit]) -> str:
        """Return the text of units without display-only lines and with substitutions."""
        hidden, substitutions = self._document.display_only, self._document.substitutions
        if not hidden and not substitutions:
            return self._text(group)
        first, last = group[0], group[-1]
        parts = []
        for line in range(first.line, last.line + 1):
            if line not in hidden:
                start = first.start if line == first.line else 0
                end = last.end if line == last.line else len(self._lines[line])
                parts.append(substituted(self._lines[line], substitutions.get(line, ()), start, end))
        return "\n".join(parts)

    def _embedded(self, group: list[_Unit], text: str, section: Section, prefix: str) -> str:
        header = self._repeated_header(group[0].line)
        if header is not None:
            text = f"{header[0]}\n{text}"
        # A chunk that begins with the only heading of its path needs no prefix.
        if group[0].line < section.body and group[0].start == 0 and len(section.path) <= 1:
            return text
        return prefix + text


def _following_line(units: Sequence[_Unit], atoms: Sequence[_Atom], position: int, rest: int, whole: int) -> int | None:
    """Return the atom that begins the next chunk, if a line begins at the right place; None within long lines.

    Args:
        units: All units of a section.
        atoms: All of its atoms.
        position: The first atom of the chunk.
        rest: The tokens from there on, or more than four chunks of them.
        whole: Maximum tokens of the chunk.
    """
    count = math.ceil(rest / whole)
    target = rest / count
    best, best_cost, total = None, (int(SplitCost.INSIDE) + 1, 0.0), 0
    for end in range(position + 1, len(atoms)):
        total += atoms[end - 1].tokens
        if total > whole:
            break
        cost = (int(atoms[end].cost), abs(total - target))
        # Not so early that one more chunk is needed.
        early = total < max(target * 0.5, rest - (count - 1) * whole)
        if not early and units[atoms[end].first].start == 0 and cost < best_cost:
            best, best_cost = end, cost
    return best


def _within_line(atoms: Sequence[_Atom], position: int, rest: int, allowed: int) -> int:
    """Return the atom that begins the next chunk, also within a long line; arguments as for `_following_line`."""
    target = rest / math.ceil(rest / allowed)
    best, best_cost, total = position + 1, (SplitCost.INSIDE + 1, 0.0), 0
    for end in range(position + 1, len(atoms)):
        total += atoms[end - 1].tokens
        if total > allowed:
            break
        if total >= target * 0.5:
            cost = (int(atoms[end].cost), abs(total - target))
            if cost < best_cost:
                best, best_cost = end, cost
        elif best_cost[0] > SplitCost.INSIDE:
            best = end
    return best


def _inside_runs(costs: list[SplitCost]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of lines that are continued by lines with the cost INSIDE."""
    first = 0
    for line in range(1, len(costs) + 1):
        if line == len(costs) or costs[line] is not SplitCost.INSIDE:
            if line - first > 1:
                yield first, line
            first = line


def split_long_line(line: str, budget: int, count: CountTokens) -> Iterator[tuple[int, int]]:
    """Divide a line into parts (start, end) in characters: sentences where there are any.

    Args:
        line: A line without its end.
        budget: Maximum tokens of a chunk; a part has about a third, so that chunks can be filled.
        count: The encoder's token count.
    """
    size = max(1, budget // 3)
    for start, end in _windows(line):
        window = line[start:end]
        if _UNSPACED.search(window):
            # Without words (encoded data), the tokens of every single character would be counted.
            step = max(1, len(window) * size // max(1, count([window])[0]))
            yield from ((start + at, min(start + at + step, end)) for at in range(0, len(window), step))
        else:
            yield from ((start + first, start + last) for first, last in _sentences(window, size, count))


def _sentences(text: str, size: int, count: CountTokens) -> list[tuple[int, int]]:
    """Divide a text into parts (start, end) of at most `size` tokens, filled with whole sentences where they fit."""
    spans, start, end, total = [], 0, 0, 0
    for piece, tokens in _pieces(text, count([text])[0], size, count):
        if tokens > size:  # a single character has more tokens than a part may have
            return [(0, len(text))]
        if total + tokens > size and end > start:
            spans.append((start, end))
            start, total = end, 0
        end += len(piece)
        total += tokens
    spans.append((start, end))
    stripped = [
        (first + len(part) - len(part.lstrip()), first + len(part.rstrip()))
        for first, last in spans
        if (part := text[first:last]).strip()
    ]
    return stripped or [(0, len(text))]


def _pieces(text: str, tokens: int, size: int, count: CountTokens) -> Iterator[tuple[str, int]]:
    """Yield the consecutive pieces of a text with their tokens: sentences, and smaller ones where these are long."""
    if tokens > size:
        for split in (_split_sentences, _PHRASE.findall, _WORD.findall, list):
            parts = split(text)
            if len(parts) > 1:
                for part, number in zip(parts, count(parts), strict=True):
                    yield from _pieces(part, number, size, count)
                return
    yield text, tokens


def _split_sentences(text: str) -> list[str]:
    edges = [0, *(match.end() for match in _SENTENCE.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(edges) if end > start]


def _windows(line: str) -> Iterator[tuple[int, int]]:
    """Yield windows of a line that are short enough for the splitter, divided at white space if there is any."""
    start = 0
    while len(line) - start > _WINDOW:
        end = line.rfind(" ", start + _WINDOW // 2, start + _WINDOW)
        end = start + _WINDOW if end < 0 else end + 1
        yield start, end
        start = end
    yield start, len(line)
