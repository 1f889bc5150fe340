"""The sections of a document: by its headings, or by the functions and classes of source code."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from epic_rag_chroma.document import Document, Scope

__all__ = ["Section", "sections_of"]


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
