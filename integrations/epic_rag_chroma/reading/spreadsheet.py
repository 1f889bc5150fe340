"""Read spreadsheets (.xlsx, .xlsm, .xlsb, .xls): a sheet is a section, a row a line, an empty row ends a table.

Cells are read as the sheet shows them: by their number formats, and merged ones for each row and column that they span.
Comments, text boxes, charts, and the header and footer of the printed page follow the cells. xlrd reads .xls;
of .xlsb, calamine reads the values.
"""

from __future__ import annotations

import datetime
import io
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from epic_rag.errors import MissingExtraError
from epic_rag_chroma.reading.containers import (
    Archive,
    DocumentBuilder,
    attribute,
    children,
    local_name,
    parsing,
    requires,
)
from epic_rag_chroma.reading.document import BrokenFileError, Document
from epic_rag_chroma.reading.drawing import chart_rows, chart_titles, diagram_texts, drawn_text, related_drawings
from epic_rag_chroma.reading.number_formats import BUILT_IN, number_text, shown
from epic_rag_chroma.reading.package import Package

if TYPE_CHECKING:
    from lxml.etree import _Element

__all__ = ["Merge", "add_cells", "read_xlsx"]


_FORMAT = "spreadsheet"
_PURPOSE = "reading spreadsheets"
_REFERENCE = re.compile(r"\$?([A-Z]{1,3})\$?([0-9]{1,7})")
# A range of columns or rows may be merged as a whole; only rows that have other cells are filled.
_MAX_MERGED_COLUMNS = 200
# Codes in headers and footers: page numbers, dates, names, fonts.
_HEADER_CODE = re.compile(r"&(?:\"[^\"]*\"|[0-9]{1,3}(?![0-9])|K[0-9A-F]{6}|[A-Z&])", re.IGNORECASE)
_OLE = b"\xd0\xcf\x11\xe0"
_THREAD = "[Threaded comment]"


class Merge(NamedTuple):
    """The rows and columns of a merged cell, from 0, the last ones included."""

    top: int
    left: int
    bottom: int
    right: int


def read_xlsx(data: bytes) -> Document:
    """Read a workbook."""
    out = DocumentBuilder(_FORMAT)
    with parsing(_FORMAT):
        if data.startswith(b"PK") and "xl/workbook.bin" not in Archive(data, _FORMAT):
            package = Package(data, _FORMAT, _PURPOSE, "workbook")
            _Workbook(package, out).read()
        else:
            if data.startswith(_OLE):
                try:
                    _read_xls(data, out)
                    return out.document()
                except (MemoryError, MissingExtraError):
                    raise
                except Exception:  # damaged, or encrypted: calamine reads more, or has the reason
                    out = DocumentBuilder(_FORMAT)
            _read_values(data, out)
    return out.document()


def add_cells(
    out: DocumentBuilder, rows: Mapping[int, dict[int, str]], merges: Iterable[Merge], *, page: int = 0
) -> None:
    """Add the cells of a sheet as tables.

    Args:
        out: The builder.
        rows: Texts by row and column. Merged cells are filled in.
        merges: The merged cells.
        page: The page that they are on.
    """
    for merge in merges:
        text = rows.get(merge.top, {}).get(merge.left, "")
        if not text:
            continue
        # A title over the whole table is not repeated for each column.
        alone = sum(map(bool, rows[merge.top].values())) == 1
        right = merge.left if alone else min(merge.right, merge.left + _MAX_MERGED_COLUMNS)
        height = merge.bottom - merge.top + 1
        for number in range(merge.top, merge.bottom + 1) if height < len(rows) else rows:
            row = rows.get(number)
            if row and merge.top <= number <= merge.bottom and (number == merge.top or any(row.values())):
                for column in range(merge.left, right + 1):
                    row[column] = row.get(column) or text
    filled = [number for number in sorted(rows) if any(rows[number].values())]
    for _, block in groupby(enumerate(filled), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in block]
        columns = sorted({column for number in numbers for column, text in rows[number].items() if text})
        out.rows(([rows[number].get(column, "") for column in columns] for number in numbers), page=page)


class _Workbook:
    def __init__(self, package: Package, out: DocumentBuilder) -> None:
        self._package = package
        self._out = out
        main = package.main
        self._texts = [
            _rich_text(item)
            for part in package.related(main, "sharedStrings")[:1]
            for item in children(package.xml(part), "si")
        ]
        self._codes: list[str] = []
        for part in package.related(main, "styles")[:1]:
            self._codes = _format_codes(package.xml(part))
        self._date_1904 = any(
            attribute(properties, "date1904") in ("1", "true") for properties in children(package.root, "workbookPr")
        )
        # Comments of Office 2019 and later name their authors by the ids of persons.
        self._authors = {
            attribute(person, "id"): attribute(person, "displayName")
            for part in package.related(main, "person")
            for person in children(package.xml(part), "person")
        }

    def read(self) -> None:
        """Add all sheets."""
        for sheets in children(self._package.root, "sheets"):
            for sheet in children(sheets, "sheet"):
                key = next((str(value) for name, value in sheet.attrib.items() if str(name).endswith("}id")), "")
                part = self._package.target(self._package.main, key)
                if part:
                    self._out.section(attribute(sheet, "name"), 1)
                    self._sheet(part)

    def _sheet(self, part: str) -> None:
        from lxml import etree

        rows: dict[int, dict[int, str]] = {}
        merges: list[Merge] = []
        surroundings: dict[str, list[str]] = {"Header": [], "Footer": []}
        tags = (
            "{*}row",
            "{*}mergeCell",
            *(f"{{*}}{kind}{of}" for of in surroundings for kind in ("odd", "even", "first")),
        )
        number = -1
        parser = etree.iterparse(
            io.BytesIO(self._package.read(part)), events=("end",), tag=tags, resolve_entities=False, no_network=True,
            load_dtd=False, huge_tree=False, remove_comments=True, remove_pis=True,
        )  # fmt: skip
        for _, element in parser:
            name = local_name(element)
            if name == "row":
                given = attribute(element, "r")
                number = int(given) - 1 if given.isdecimal() else number + 1
                cells = self._row(element)
                if cells:
                    rows[number] = cells
                element.clear()
                while element.getprevious() is not None:
                    del element.getparent()[0]
            elif name == "mergeCell":
                corners = _REFERENCE.findall(attribute(element, "ref"))
                if len(corners) == 2:
                    (left, top), (right, bottom) = corners
                    merges.append(Merge(int(top) - 1, _column(left), int(bottom) - 1, _column(right)))
            else:
                text = _HEADER_CODE.sub(" ", element.text or "")
                surroundings[name[-6:]].append(" ".join(text.split()))
        for text in dict.fromkeys(filter(None, surroundings["Header"])):
            self._out.text(text)
        add_cells(self._out, rows, merges)
        self._comments(part)
        for drawing in self._package.related(part, "drawing"):
            self._drawing(drawing)
        for text in dict.fromkeys(filter(None, surroundings["Footer"])):
            self._out.text(text)

    def _row(self, row: _Element) -> dict[int, str]:
        cells: dict[int, str] = {}
        column = -1
        for cell in row:
            reference = _REFERENCE.match(attribute(cell, "r"))
            column = _column(reference.group(1)) if reference else column + 1
            text = self._cell(cell)
            if text:
                cells[column] = text
        return cells

    def _cell(self, cell: _Element) -> str:
        kind = attribute(cell, "t")
        value = ""
        for child in cell:
            name = local_name(child)
            if name == "is":
                return _rich_text(child)
            if name == "v":
                value = child.text or ""
        if kind == "s":
            return self._texts[int(value)] if value.isdecimal() and int(value) < len(self._texts) else ""
        if kind == "b":
            return {"1": "TRUE", "0": "FALSE"}.get(value, value)
        if kind in ("", "n") and value:
            style = attribute(cell, "s")
            code = self._codes[int(style)] if style.isdecimal() and int(style) < len(self._codes) else "General"
            return number_text(value, code, date_1904=self._date_1904)
        return value

    def _comments(self, part: str) -> None:
        for comments in self._package.related(part, "threadedComment"):
            for comment in children(self._package.xml(comments), "threadedComment"):
                text = "".join(child.text or "" for child in children(comment, "text"))
                self._comment(comment, self._authors.get(attribute(comment, "personId"), ""), text)
        for comments in self._package.related(part, "comments"):
            root = self._package.xml(comments)
            authors = [author.text or "" for author in root.iter("{*}author")]
            for comment in root.iter("{*}comment"):
                text = "".join(_rich_text(child) for child in children(comment, "text"))
                number = attribute(comment, "authorId")
                author = authors[int(number)] if number.isdecimal() and int(number) < len(authors) else ""
                if not text.startswith(_THREAD):
                    self._comment(comment, author if not text.startswith(f"{author}:") else "", text)

    def _comment(self, comment: _Element, author: str, text: str) -> None:
        if text.strip():
            by = f" by {author}" if author.strip() and not author.startswith("tc=") else ""
            self._out.text(f"Comment on {attribute(comment, 'ref')}{by}: {text.strip()}")

    def _drawing(self, part: str) -> None:
        root = self._package.xml(part)
        for body in root.iter("{*}txBody"):
            self._out.text("\n".join(drawn_text(paragraph) for paragraph in children(body, "p")))
        for kind, drawn in related_drawings(self._package, part, root):
            for text in chart_titles(drawn) if kind == "chart" else diagram_texts(drawn):
                self._out.text(text)
            if kind == "chart":
                rows = chart_rows(drawn)
                # The data is in the cells already.
                self._out.rows(row for row in rows[:1] if not row[0])


def _column(letters: str) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - 64
    return number - 1


def _rich_text(item: _Element) -> str:
    """Return the text of a string, without its phonetic guide."""
    parts: list[str] = []
    for child in item:
        name = local_name(child)
        if name == "t":
            parts.append(child.text or "")
        elif name == "r":
            parts += (text.text or "" for text in children(child, "t"))
    return re.sub(r"_x([0-9A-Fa-f]{4})_", lambda match: chr(int(match.group(1), 16)), "".join(parts))


def _format_codes(styles: _Element) -> list[str]:
    """Return the format code of each style of cells."""
    own = {
        attribute(number_format, "numFmtId"): attribute(number_format, "formatCode")
        for formats in children(styles, "numFmts")
        for number_format in children(formats, "numFmt")
    }
    codes = []
    for formats in children(styles, "cellXfs"):
        for cell_format in children(formats, "xf"):
            key = attribute(cell_format, "numFmtId") or "0"
            codes.append(own.get(key) or BUILT_IN.get(int(key) if key.isdecimal() else 0, "General"))
    return codes


def _read_xls(data: bytes, out: DocumentBuilder) -> None:
    """Read a workbook of Excel 97 to 2003."""
    with requires("xlrd", _PURPOSE):
        import xlrd  # type: ignore[import-untyped]
    book = xlrd.open_workbook(file_contents=data, formatting_info=True, logfile=io.StringIO())
    for sheet in book.sheets():
        rows: dict[int, dict[int, str]] = {}
        for number in range(sheet.nrows):
            cells = {}
            for column, cell in enumerate(sheet.row(number)):
                text = str(cell.value)
                if cell.ctype in (xlrd.XL_CELL_NUMBER, xlrd.XL_CELL_DATE):
                    code = book.format_map[book.xf_list[cell.xf_index].format_key].format_str
                    text = shown(cell.value, code, date_1904=bool(book.datemode))
                elif cell.ctype == xlrd.XL_CELL_BOOLEAN:
                    text = "TRUE" if cell.value else "FALSE"
                elif cell.ctype == xlrd.XL_CELL_ERROR:
                    text = xlrd.error_text_from_code.get(cell.value, "")
                if text:
                    cells[column] = text
            if cells:
                rows[number] = cells
        out.section(sheet.name, 1)
        add_cells(out, rows, [Merge(top, left, end - 1, right - 1) for top, end, left, right in sheet.merged_cells])
        for _, note in sorted(sheet.cell_note_map.items()):
            if note.text.strip():
                out.text(f"Comment: {note.text.strip()}")


def _read_values(data: bytes, out: DocumentBuilder) -> None:
    """Read the values of a workbook in any format, without the formats of its cells."""
    with requires("python-calamine", _PURPOSE):
        from python_calamine import CalamineWorkbook, PasswordError, SheetTypeEnum
    try:
        book = CalamineWorkbook.from_filelike(io.BytesIO(data))
    except PasswordError as error:
        raise BrokenFileError(f"an encrypted {_FORMAT}") from error
    for entry in book.sheets_metadata:
        if entry.typ is SheetTypeEnum.WorkSheet:
            out.section(entry.name, 1)
            sheet = book.get_sheet_by_name(entry.name)
            top, left = sheet.start or (0, 0)
            rows = {
                top + number: {left + column: _value_text(value) for column, value in enumerate(row) if value != ""}
                for number, row in enumerate(sheet.iter_rows())
            }
            merges = [Merge(*first, *last) for first, last in sheet.merged_cell_ranges or ()]
            add_cells(out, {number: row for number, row in rows.items() if row}, merges)


def _value_text(value: object) -> str:
    """Return a value without its format: whole numbers without a decimal point, dates without a time of midnight."""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, (int, float)):
        return shown(value)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time.min:
        return value.date().isoformat()
    return str(value)
