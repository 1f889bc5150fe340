"""Read OpenDocument texts, spreadsheets and presentations (.odt, .ods, .odp, their templates and flat XML).

Headings by outline level with their numbers, paragraphs, lists, tables with merged cells filled in, notes, comments,
charts; the headers of pages come first and their footers last. A slide is a page. Cells of a spreadsheet are read as
they are shown; a sheet is a section, and an empty row ends a table.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from epic_rag_chroma.reading.containers import (
    Archive,
    DocumentBuilder,
    attribute,
    children,
    local_name,
    parse_xml,
    parsing,
)
from epic_rag_chroma.reading.document import BrokenFileError, Document, SplitCost
from epic_rag_chroma.reading.spreadsheet import Merge, add_cells

if TYPE_CHECKING:
    from lxml.etree import _Element

__all__ = ["read_opendocument"]


_FORMAT = "OpenDocument file"
_PURPOSE = "reading OpenDocument files"
_MANIFEST = "META-INF/manifest.xml"
# Deleted text, tables generated from the headings, and what is read apart from its paragraph.
_SKIPPED_NAMES = (
    "tracked-changes table-of-content illustration-index table-index alphabetical-index sequence-decls variable-decls "
    "user-field-decls forms note-citation annotation script event-listeners page-number date time ruby-text"
)
_SKIPPED = frozenset(_SKIPPED_NAMES.split())
_CELLS = ("table-cell", "covered-table-cell")
_ROWS = ("table-row", "table-rows", "table-header-rows", "table-row-group")
_MAX_REPEATED = 1000
_MAX_COLUMNS = 16384
# In a table with a longer cell, a heading or another table, the cells are layout rather than data.
_MAX_CELL = 400
_MASTERS = (("header", "header-first", "header-left"), ("footer", "footer-first", "footer-left"))


def read_opendocument(data: bytes) -> Document:
    """Read an OpenDocument file."""
    with parsing(_FORMAT):
        if data.lstrip()[:1] == b"<":
            root = parse_xml(data, _PURPOSE)
            if local_name(root) != "document":
                raise BrokenFileError(f"not an {_FORMAT}")
            return _Reader(None, root).document()
        archive = Archive(data, _FORMAT)
        if _MANIFEST in archive and b"encryption-data" in archive.read(_MANIFEST):
            raise BrokenFileError(f"an encrypted {_FORMAT}")
        return _Reader(archive, parse_xml(archive.read("content.xml"), _PURPOSE)).document()


class _Reader:
    def __init__(self, archive: Archive | None, root: _Element) -> None:
        self._archive = archive
        self._root = root
        has_styles = archive is not None and "styles.xml" in archive
        self._styles = parse_xml(archive.read("styles.xml"), _PURPOSE) if archive is not None and has_styles else root
        self._numbers = _HeadingNumbers(self._styles)
        self._numbered = _numbered_lists(self._styles) | _numbered_lists(root)
        self._out = DocumentBuilder(_FORMAT)
        self._page = 0

    def document(self) -> Document:
        """Read the whole file."""
        self._masters(_MASTERS[0])
        for body in self._root.iter("{*}body"):
            for content in body:
                if local_name(content) == "spreadsheet":
                    for sheet in content.iter("{*}table"):
                        self._sheet(sheet)
                else:
                    self._blocks(content)
        self._masters(_MASTERS[1])
        return self._out.document()

    def _masters(self, kinds: tuple[str, ...]) -> None:
        """Add the headers or footers of all kinds of pages, each text once."""
        seen: set[str] = set()
        for master in self._styles.iter("{*}master-page"):
            for area in children(master, *kinds):
                text = _all_text(area)
                if text.strip("0123456789 ?") and text not in seen and attribute(area, "display") != "false":
                    seen.add(text)
                    self._blocks(area)

    def _blocks(self, parent: _Element, *, marker: str = "") -> None:
        """Add the blocks below an element; the marker is that of a list item ("-", "3.")."""
        cost = SplitCost.BLOCK
        for child in parent:
            name = local_name(child)
            if name in _SKIPPED:
                if name == "annotation":
                    self._comment(child)
            elif name == "h":
                text = _text(child)
                level = attribute(child, "outline-level")
                depth = int(level) if level.isdecimal() and int(level) > 0 else 1
                if text.strip():
                    unnumbered = attribute(child, "is-list-header") == "true"
                    number = "" if unnumbered else self._numbers.next(depth, attribute(child, "start-value"))
                    self._out.heading(f"{number} {text}", depth, page=self._page)
                self._anchored(child)
            elif name == "p":
                text = _text(child)
                if marker and text.strip():
                    self._out.text(f"{marker} {text.strip()}", cost=SplitCost.ITEM, page=self._page)
                    marker = " " * len(marker)
                else:
                    self._out.text(text, cost=cost, page=self._page)
                self._anchored(child)
            elif name == "table":
                self._table(child)
            elif name == "list":
                self._list(child)
            elif name == "page":
                self._page += 1
                self._out.section(attribute(child, "name") or f"Slide {self._page}", 1)
                self._blocks(child)
            elif name == "object":
                self._object(child)
            else:
                self._blocks(child)

    def _list(self, parent: _Element, style: str = "", depth: int = 1) -> None:
        style = attribute(parent, "style-name") or style
        count = 0
        for item in children(parent, "list-item", "list-header"):
            start = attribute(item, "start-value")
            count = int(start) if start.isdecimal() else count + 1
            suffix = self._numbered.get((style, depth))
            marker = "" if local_name(item) == "list-header" else "-" if suffix is None else f"{count}{suffix}"
            for child in item:
                if local_name(child) == "list":
                    self._list(child, style, depth + 1)
                else:
                    self._blocks([child], marker=marker)  # type: ignore[arg-type]
                    marker = " " * len(marker) if marker else ""

    def _anchored(self, paragraph: _Element) -> None:
        """Add the comments, text boxes and charts that are anchored in a paragraph."""
        for child in paragraph.iter("{*}annotation", "{*}object", "{*}text-box"):
            name = local_name(child)
            if name == "annotation":
                self._comment(child)
            elif name == "object":
                self._object(child)
            else:
                self._blocks(child)

    def _comment(self, annotation: _Element) -> None:
        author = next(
            ("".join(map(str, creator.itertext())) for creator in children(annotation, "creator")), ""
        ).strip()
        text = "\n".join(_text(paragraph) for paragraph in annotation.iter("{*}p", "{*}h")).strip()
        if text:
            self._out.text(f"Comment{f' by {author}' if author else ''}: {text}", page=self._page)

    def _object(self, frame: _Element) -> None:
        """Add an embedded chart or sheet: its titles, and its data, which the file has as a table."""
        root = next(iter(frame.iter("{*}document", "{*}document-content")), None)
        name = posixpath.normpath(attribute(frame, "href").removeprefix("./") or ".") + "/content.xml"
        if root is None and self._archive is not None and name in self._archive:
            root = parse_xml(self._archive.read(name), _PURPOSE)
        for body in root.iter("{*}body") if root is not None else ():
            for title in body.iter("{*}title", "{*}subtitle"):
                self._out.text(" ".join(_text(paragraph) for paragraph in title.iter("{*}p")), page=self._page)
            for table in body.iter("{*}table"):
                self._table(table)

    def _table(self, table: _Element) -> None:
        """Add a table of a text or a slide."""
        nested = any(element is not table for element in table.iter("{*}table"))
        cells = [cell for row in _below(table, *_ROWS) for cell in children(row, *_CELLS)]
        if nested or any(
            next(cell.iter("{*}h"), None) is not None or len(_all_text(cell)) > _MAX_CELL for cell in cells
        ):
            for cell in cells:
                self._blocks(cell)
            return
        rows, merges = _grid(table)
        if rows:
            # A row without text does not end a table of a text.
            numbers = {number: place for place, number in enumerate(sorted(rows))}
            moved = [
                Merge(numbers[top], left, max(numbers[n] for n in numbers if n <= bottom), right)
                for top, left, bottom, right in merges
                if top in numbers
            ]
            add_cells(self._out, {numbers[n]: row for n, row in rows.items()}, moved, page=self._page)
        for cell in cells:
            for paragraph in cell.iter("{*}p"):
                for comment in paragraph.iter("{*}annotation"):
                    self._comment(comment)

    def _sheet(self, table: _Element) -> None:
        self._out.section(attribute(table, "name"), 1)
        rows, merges = _grid(table)
        add_cells(self._out, rows, merges)
        for comment in table.iter("{*}annotation"):
            self._comment(comment)
        for text in table.iter("{*}text-box", "{*}custom-shape"):
            self._blocks(text)
        for frame in table.iter("{*}object"):
            self._object(frame)


def _grid(table: _Element) -> tuple[dict[int, dict[int, str]], list[Merge]]:
    """Return the texts of the cells of a table by row and column, and the merged cells."""
    rows: dict[int, dict[int, str]] = {}
    merges: list[Merge] = []
    number = 0
    for row in _below(table, *_ROWS):
        cells: dict[int, str] = {}
        column = 0
        for cell in children(row, *_CELLS):
            repeated = _count(cell, "number-columns-repeated")
            text = _cell_text(cell) if local_name(cell) == "table-cell" else ""
            if text:
                for place in range(column, min(column + min(repeated, _MAX_REPEATED), _MAX_COLUMNS)):
                    cells[place] = text
                across, down = _count(cell, "number-columns-spanned"), _count(cell, "number-rows-spanned")
                if across > 1 or down > 1:
                    merges.append(Merge(number, column, number + down - 1, column + across - 1))
            column += repeated
        repeated = _count(row, "number-rows-repeated")
        if cells:
            for place in range(number, number + min(repeated, _MAX_REPEATED)):
                rows[place] = dict(cells)
        number += repeated
    return rows, merges


def _below(element: _Element, *names: str) -> Iterator[_Element]:
    """Yield the rows of a table, also those in groups."""
    for child in children(element, *names):
        if local_name(child) == "table-row":
            yield child
        else:
            yield from _below(child, *names)


def _count(element: _Element, name: str) -> int:
    value = attribute(element, name)
    return max(1, int(value)) if value.isdecimal() and len(value) < 9 else 1


def _cell_text(cell: _Element) -> str:
    texts = [_text(paragraph).strip() for paragraph in cell.iter("{*}p", "{*}h") if not _in_annotation(paragraph, cell)]
    return " ".join(filter(None, texts)) or attribute(cell, "value") or attribute(cell, "string-value")


def _in_annotation(element: _Element, cell: _Element) -> bool:
    parent = element.getparent()
    while parent is not None and parent is not cell:
        if local_name(parent) in ("annotation", "p", "note"):
            return True
        parent = parent.getparent()
    return False


def _all_text(element: _Element) -> str:
    return " ".join(" ".join(_text(paragraph).split()) for paragraph in element.iter("{*}p", "{*}h")).strip()


def _text(paragraph: _Element) -> str:
    """Return the text of a paragraph with its notes; a run of spaces, which is an element, becomes one space."""
    parts = [paragraph.text or ""]
    for child in paragraph:
        name = local_name(child)
        if name in ("s", "tab"):
            parts.append(" ")
        elif name == "line-break":
            parts.append("\n")
        elif name not in _SKIPPED and name != "text-box":
            parts.append(f" {_text(child)}" if name == "p" else _text(child))
        parts.append(child.tail or "")
    return "".join(parts)


class _HeadingNumbers:
    """Numbers of headings, which are not in the text but counted by the program that shows it."""

    def __init__(self, styles: _Element) -> None:
        self._levels: dict[int, tuple[str, str, int]] = {}
        for outline in styles.iter("{*}outline-level-style"):
            if attribute(outline, "num-format"):
                level = attribute(outline, "level")
                around = (attribute(outline, "num-prefix"), attribute(outline, "num-suffix"))
                self._levels[int(level) if level.isdecimal() else 0] = (*around, _count(outline, "display-levels"))
        self._counters: dict[int, int] = {}

    def next(self, level: int, start: str) -> str:
        """Return the number of the next heading of a level; "" if its level has none."""
        self._counters[level] = int(start) if start.isdecimal() else self._counters.get(level, 0) + 1
        for lower in [lower for lower in self._counters if lower > level]:
            del self._counters[lower]
        if level not in self._levels:
            return ""
        prefix, suffix, shown = self._levels[level]
        numbers = [str(self._counters.get(above, 1)) for above in range(max(1, level - shown + 1), level + 1)]
        return f"{prefix}{'.'.join(numbers)}{suffix}"


def _numbered_lists(styles: _Element) -> dict[tuple[str, int], str]:
    """Return what follows the number in numbered lists, by the name of the style and the level."""
    found = {}
    for style in styles.iter("{*}list-style"):
        for level in children(style, "list-level-style-number"):
            depth = attribute(level, "level")
            if depth.isdecimal() and re.fullmatch("1", attribute(level, "num-format")):
                found[attribute(style, "name"), int(depth)] = attribute(level, "num-suffix")
    return found
