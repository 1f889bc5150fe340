"""Read PDF: the text of each page, and the entries of the outline as headings at the lines with their titles."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING, Any

from epic_rag_chroma.reading.containers import MAX_CHARACTERS, parsing, printable, requires
from epic_rag_chroma.reading.document import (
    BrokenFileError,
    Document,
    Heading,
    NotTextError,
    SplitCost,
    clean_title,
    split_lines,
    text_split_costs,
)

if TYPE_CHECKING:
    from pypdf import PdfReader

__all__ = ["read_pdf"]


_FORMAT = "PDF"
_MAX_OUTLINE = 10_000


def read_pdf(data: bytes) -> Document:
    """Read a PDF; damaged pages are skipped."""
    with requires("pypdf", "reading PDF files"):
        import pypdf
    # pypdf logs every irregularity of a file; the reason for a skipped file is reported by the indexer.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    with parsing(_FORMAT):
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise BrokenFileError(f"an encrypted {_FORMAT}")
        document = _pages(reader)
        if not any(line.strip() for line in document.lines):
            raise NotTextError("a PDF without text (scanned pages?)")
        document.headings.extend(_outline(reader, document))
        return document


def _pages(reader: PdfReader) -> Document:
    lines: list[str] = []
    costs: list[SplitCost] = []
    pages: list[int] = []
    size = 0
    broken: BrokenFileError | None = None
    for number in range(1, len(reader.pages) + 1):
        try:
            with parsing(_FORMAT):
                of_page = split_lines(printable(reader.pages[number - 1].extract_text() or ""))
        except BrokenFileError as error:
            broken = broken or error
            continue
        size += sum(map(len, of_page))
        if size > MAX_CHARACTERS:
            raise BrokenFileError(f"more than {MAX_CHARACTERS // 2**20} million characters of text in this {_FORMAT}")
        lines += of_page
        costs += text_split_costs(of_page)
        pages += [number] * len(of_page)
    if broken is not None and not any(line.strip() for line in lines):
        raise broken
    return Document(lines, costs, pages=pages)


def _outline(reader: PdfReader, document: Document) -> list[Heading]:
    """Return the entries of the outline as headings: at the line with the title, or at the first line of the page."""
    pages = document.pages or []
    first: dict[int, int] = {}
    for line, page in enumerate(pages):
        first.setdefault(page, line)
    headings: list[Heading] = []
    taken = -1
    for page, level, title in _entries(reader):
        # Skip entries that point backwards, or to a page without text.
        start = max(first.get(page, len(pages)), taken + 1)
        if start >= len(pages) or pages[start] != page:
            continue
        taken, height = start, 0
        for line in range(start, len(pages)):
            if pages[line] == page and clean_title(document.lines[line]).casefold().endswith(title.casefold()):
                taken, height = line, 1
                break
        headings.append(Heading(taken, level, title, height))
    return headings


def _entries(reader: PdfReader) -> list[tuple[int, int, str]]:
    """Return page, level and title of each entry, in order; none if the outline is damaged."""
    entries: list[tuple[int, int, str]] = []
    try:
        stack: list[tuple[Any, int]] = [(entry, 1) for entry in reversed(reader.outline)]
        while stack and len(entries) < _MAX_OUTLINE:
            entry, level = stack.pop()
            if isinstance(entry, list):
                stack.extend((below, level + 1) for below in reversed(entry))
                continue
            number = reader.get_destination_page_number(entry)
            title = clean_title(printable(str(entry.title or "")))
            if number is not None and number >= 0 and title:
                entries.append((number + 1, level, title))
    except MemoryError:
        raise
    except Exception:  # pypdf raises nearly anything here too; the text is indexed without its outline
        return []
    return entries
