"""What readers of line-based formats share: a document's breaks, headings and wholes, noted block by block."""

from __future__ import annotations

import re

from epic_rag_chroma.document import Break, Document, Heading, Repeat, clean_title, line_breaks

__all__ = ["Blocks"]


class Blocks:
    """The structure of a file's lines, as a reader finds it.

    Args:
        lines: The file's lines.

    Attributes:
        lines: The file's lines.
        breaks: What a cut before each line costs.
        verbatim: Lines of code blocks and the like, in which nothing else means anything.
    """

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.breaks = line_breaks(lines)
        self.verbatim: set[int] = set()
        self._unclosed: set[str] = set()
        self._headings: list[Heading] = []
        self._wholes: list[tuple[int, int]] = []
        self._repeats: list[Repeat] = []

    def heading(self, line: int, level: int, title: str, height: int = 1) -> None:
        """Note a heading of `height` lines; one without text is none."""
        title = clean_title(title)
        if title:
            self._headings.append(Heading(line, level, title, height))
            self.breaks[line] = Break.BLOCK
            self.together(line, line + height)

    def together(self, first: int, end: int) -> None:
        """Lines that are only cut from one another when nothing else is left."""
        for line in range(first + 1, min(end, len(self.lines))):
            self.breaks[line] = Break.INSIDE

    def whole(self, first: int, end: int) -> None:
        """Lines that stay in one chunk where they fit."""
        if end - first > 1:
            self._wholes.append((first, end))

    def block(self, first: int, end: int, *, verbatim: bool = False) -> None:
        """A block with marks around it: whole, and cut inside at empty lines at best."""
        self.breaks[first] = Break.BLOCK
        self.whole(first, end)
        if verbatim:
            self.verbatim.update(range(first, end))
            for line in range(first + 1, end):
                self.breaks[line] = Break.INSIDE if self.lines[line - 1].strip() else Break.LINE

    def table(self, first: int, end: int, header: int, rule: int | None) -> None:
        """A table: whole, cut between rows at best, its header read again.

        Args:
            first: Its first line.
            end: The line after its last.
            header: The first line of the header.
            rule: The line after the header; None if it has no header.
        """
        self.breaks[first] = Break.BLOCK
        self.whole(first, end)
        rows = first + 1 if rule is None else rule + 1
        self.together(first, min(rows + 1, end))
        for line in range(rows + 1, end):
            self.breaks[line] = Break.ITEM
        if rule is not None and rows < end:
            self._repeats.append(Repeat(rows, end, "\n".join(self.lines[header:rule])))

    def closing(self, first: int, mark: str) -> int | None:
        """The line after the next one that is a mark (in small letters) and nothing else; None if there is none."""
        if mark in self._unclosed:
            return None
        for number in range(first + 1, len(self.lines)):
            if self.lines[number].strip().lower() == mark:
                return number + 1
        self._unclosed.add(mark)  # so that a file full of marks that nothing closes is read through once
        return None

    def indented_end(self, first: int) -> int:
        """The line after what is indented under a line, empty lines between included."""
        indent = _indent(self.lines[first])
        end = first + 1
        for line in range(first + 1, len(self.lines)):
            text = self.lines[line]
            if not text.strip():
                continue
            if _indent(text) <= indent:
                break
            end = line + 1
        return end

    def items(self, bullet: re.Pattern[str]) -> None:
        """Note list items: lines that begin with a bullet, and what is indented under them."""
        open_until: list[int] = []
        for number, line in enumerate(self.lines):
            text = line.lstrip()
            if number in self.verbatim or not bullet.match(text):
                continue
            while open_until and open_until[-1] <= number:
                open_until.pop()
            end = self.indented_end(number)
            self.breaks[number] = min(self.breaks[number], Break.ITEM)
            # Items in items in items are all part of an outer one that is whole; their ends need no second look.
            if len(open_until) < 4:
                self.whole(number, end)
            open_until.append(end)

    def document(self, *, unread: frozenset[int] = frozenset()) -> Document:
        """The document."""
        repeats = [repeat for repeat in self._repeats if repeat.first < repeat.end]
        return Document(
            self.lines,
            self.breaks,
            sorted(self._headings, key=lambda heading: heading.line),
            wholes=self._wholes,
            repeats=sorted(repeats, key=lambda repeat: repeat.first),
            unread=unread,
        )


def _indent(line: str) -> int:
    expanded = line.expandtabs(8)
    return len(expanded) - len(expanded.lstrip())
