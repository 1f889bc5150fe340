"""What the readers of container formats share: a document that grows block by block, one reason for what is broken."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from epic_rag.errors import EpicError
from epic_rag_chroma.document import (
    Break,
    BrokenFileError,
    Document,
    Heading,
    NotTextError,
    Repeat,
    clean_title,
    line_breaks,
    split_lines,
)

__all__ = ["MAX_CHARACTERS", "DocumentBuilder", "parsing", "printable"]

# What one file may bring into the index; more is a data dump (a long novel has a million characters).
MAX_CHARACTERS = 32 * 2**20
# Vertical tab and the separators are how office formats write a line end inside a paragraph.
_LINE_ENDS = re.compile(r"\r\n|[\r\v\f\x85\u2028\u2029]")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """Text without control characters and lone surrogates, with line feeds for line ends."""
    return _UNPRINTABLE.sub("", _LINE_ENDS.sub("\n", text))


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into a `BrokenFileError`.

    Args:
        what: The format ("Word document").
    """
    try:
        yield
    except (BrokenFileError, NotTextError, EpicError, MemoryError):
        raise
    except Exception as error:  # parsers raise nearly anything on damaged files
        said = " ".join(str(error).split())[:120]
        raise BrokenFileError(f"a broken {what}: {type(error).__name__}{': ' if said else ''}{said}") from error


class DocumentBuilder:
    """Collects blocks of text; blocks are set apart by an empty line, as paragraphs are in text.

    Args:
        what: The format, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lines: list[str] = []
        self._breaks: list[Break] = []
        self._headings: list[Heading] = []
        self._pages: list[int] = []
        self._spans: list[tuple[int, int]] = []
        self._repeats: list[Repeat] = []
        self._size = 0
        self._pending: tuple[str, int] | None = None

    def section(self, title: str, level: int) -> None:
        """Begin a section whose title is no line of the text; it counts from the next block on."""
        self._pending = (clean_title(printable(title)), level)

    def heading(self, title: str, level: int, *, page: int = 0, span: tuple[int, int] = (1, 1)) -> None:
        """Add a heading, which is a line of the text as well."""
        text = " ".join(printable(title).split())
        cleaned = clean_title(text)
        if not text:
            return
        self._pending = None
        self._block([text], [Break.BLOCK], page, [span])
        if cleaned:
            self._headings.append(Heading(len(self._lines) - 1, level, cleaned))

    def text(self, text: str, *, cost: Break = Break.BLOCK, page: int = 0, span: tuple[int, int] = (1, 1)) -> None:
        """Add a paragraph, list item or table row; `cost` is what a cut before it costs."""
        lines = [line.rstrip() for line in split_lines(printable(text))]
        while lines and not lines[0]:
            del lines[0]
        while lines and not lines[-1]:
            lines.pop()
        if lines:
            self._block(lines, [cost, *line_breaks(lines)[1:]], page, [span] * len(lines))

    def document_of(self, part: Document, *, page: int = 0, level: int = 0) -> None:
        """Add a whole document; its headings go `level` levels down."""
        end = next((number for number in range(len(part.lines), 0, -1) if part.lines[number - 1].strip()), 0)
        if not end:
            return
        spans = part.spans or [(number, number) for number in range(1, len(part.lines) + 1)]
        lines = [printable(line).replace("\n", " ") for line in part.lines[:end]]
        start = self._block(lines, [Break.BLOCK, *part.breaks[1:end]], page, spans[:end])
        for heading in part.headings:
            moved = Heading(heading.line + start, heading.level + level, heading.title, heading.height)
            self._headings.append(moved)

    def rows(self, rows: Iterable[Iterable[str]], *, page: int = 0) -> None:
        """Add a table, a line for each row; the model reads the first row again with every part of the table."""
        header, start = "", 0
        cost = Break.BLOCK
        for row in rows:
            line = " | ".join(" ".join(printable(cell).split()) for cell in row).rstrip(" |")
            if line:
                self.text(line, cost=cost, page=page)
                if cost is Break.BLOCK:
                    header, start = line, len(self._lines)
                cost = Break.ITEM
        if len(self._lines) > start and header:
            self._repeats.append(Repeat(start, len(self._lines), header))

    def _block(self, lines: list[str], breaks: list[Break], page: int, spans: list[tuple[int, int]]) -> int:
        """Add lines; the number of the first one."""
        self._size += sum(map(len, lines)) + len(lines)
        if self._size > MAX_CHARACTERS:
            raise BrokenFileError(
                f"more than {MAX_CHARACTERS // 2**20} million characters of text in this {self._what}"
            )
        if self._lines and breaks[0] is Break.BLOCK:
            self._lines.append("")
            self._breaks.append(Break.BLOCK)
            self._pages.append(self._pages[-1])
            self._spans.append((self._spans[-1][1], self._spans[-1][1]))
        start = len(self._lines)
        if self._pending is not None and self._pending[0]:
            self._headings.append(Heading(start, self._pending[1], self._pending[0], 0))
        self._pending = None
        self._lines += lines
        self._breaks += breaks
        self._pages += [page] * len(lines)
        self._spans += spans
        return start

    def with_pages(self) -> Document:
        """The document, with pages for places (0: it has none).

        Raises:
            NotTextError: If there is no text.
        """
        self._complete()
        return Document(self._lines, self._breaks, self._headings, pages=self._pages, repeats=self._repeats)

    def with_lines(self) -> Document:
        """The document, with lines of the file for places.

        Raises:
            NotTextError: If there is no text.
        """
        self._complete()
        return Document(self._lines, self._breaks, self._headings, spans=self._spans)

    def _complete(self) -> None:
        if not any(line.strip() for line in self._lines):
            raise NotTextError(f"no text in this {self._what}")
