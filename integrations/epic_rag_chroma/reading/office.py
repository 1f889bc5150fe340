"""Read Word, PowerPoint, spreadsheet, OpenDocument, RTF and EPUB files.

* Word (.docx): headings by style or outline level, paragraphs, lists, tables by rows, footnotes, text boxes.
  python-docx opens the package and knows the styles; its paragraphs omit content controls and insertions that were not
  accepted yet, so the text is read from the XML elements. A Word document has no pages until it is laid out; places are
  headings.
* PowerPoint (.pptx): a slide is a page with its title as a heading; tables by rows, the notes at the end.
* Spreadsheets (.xlsx, .xlsm, .xlsb, .xls, .ods): a sheet is a section, a row is a line. calamine reads values, not
  formulas. An empty row ends a table.
* OpenDocument text and presentations (.odt, .odp): headings by outline level, a slide is a page.
* RTF: paragraphs, without images and embedded objects.
* EPUB: the documents of the spine in reading order, read as HTML, below the title of the book.

Each reader raises a `BrokenFileError` for a file that is damaged, encrypted or above a limit, a `NotTextError` for one
without text, and a `MissingExtraError` if the package that it needs is not installed.
"""

from __future__ import annotations

import datetime
import io
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from epic_rag_chroma.reading.containers import (
    Archive,
    DocumentBuilder,
    Parts,
    attribute,
    children,
    local_name,
    parse_xml,
    parsing,
    printable,
    requires,
)
from epic_rag_chroma.reading.document import BrokenFileError, Document, SplitCost, split_lines, text_split_costs
from epic_rag_chroma.reading.html import read_html

if TYPE_CHECKING:
    from docx.document import Document as WordDocument
    from lxml.etree import _Element
    from pptx.slide import Slide

__all__ = ["read_docx", "read_epub", "read_opendocument", "read_pptx", "read_rtf", "read_xlsx"]


_WORD = "Word document"
_WORD_PURPOSE = "reading Word documents"
_HEADING = re.compile(r"heading\s*([1-9])\b", re.IGNORECASE)
_TITLE_LEVEL = 0
# Deleted text, the fallback image of a text box, field codes.
_WORD_SKIPPED = frozenset({"del", "moveFrom", "Fallback", "instrText", "delText", "rPr", "pPr", "sectPr"})
_WRAPPERS = frozenset({"sdt", "sdtContent", "ins", "moveTo", "customXml", "smartTag"})


def read_docx(data: bytes) -> Document:
    """Read a .docx file."""
    with requires("python-docx", _WORD_PURPOSE):
        import docx
    Archive(data, _WORD)  # checks the limits
    with parsing(_WORD):
        return _WordReader(docx.Document(io.BytesIO(data))).document()


class _WordReader:
    def __init__(self, word: WordDocument) -> None:
        self._body: _Element = word.element.body
        self._levels = _heading_levels(word)
        self._notes = _notes(word)
        self._out = DocumentBuilder(_WORD)
        self._in_list = False

    def document(self) -> Document:
        self._blocks(self._body)
        return self._out.document()

    def _blocks(self, parent: _Element) -> None:
        for child in parent:
            name = local_name(child)
            if name == "p":
                self._paragraph(child)
            elif name == "tbl":
                self._out.rows([_word_cell(cell) for cell in _below(row, "tc")] for row in _below(child, "tr"))
                self._in_list = False
            elif name in _WRAPPERS:
                self._blocks(child)

    def _paragraph(self, paragraph: _Element) -> None:
        text, notes, boxes = _word_text(paragraph)
        level, listed = self._style(paragraph)
        if text.strip() and level is not None:
            self._out.heading(text, level)
        elif listed and text.strip():
            self._out.text(f"- {text.strip()}", cost=SplitCost.ITEM if self._in_list else SplitCost.BLOCK)
        else:
            self._out.text(text)
        self._in_list = listed
        for note in notes:
            self._out.text(f"[{note}] {self._notes.get(note, '')}".strip(), cost=SplitCost.SENTENCE)
        for box in boxes:
            self._blocks(box)

    def _style(self, paragraph: _Element) -> tuple[int | None, bool]:
        """Return the heading level of a paragraph (None: not a heading), and whether it is a list item."""
        level = None
        listed = False
        for properties in children(paragraph, "pPr"):
            for child in properties:
                name = local_name(child)
                if name == "pStyle":
                    level = self._levels.get(attribute(child, "val"), level)
                    listed = listed or attribute(child, "val").lower().startswith("list")
                elif name == "outlineLvl":
                    level = _outline_level(child)
                elif name == "numPr":
                    listed = True
        return level, listed and level is None


def _outline_level(element: _Element) -> int | None:
    value = attribute(element, "val")
    return int(value) + 1 if value.isdecimal() and int(value) < 9 else None  # 9 is body text


def _heading_levels(word: WordDocument) -> dict[str, int]:
    """Return heading levels by style id. Built-in styles have English names in the file, in every display language."""
    levels: dict[str, int] = {}
    parents: dict[str, str] = {}
    styles: _Element = word.styles.element
    for style in children(styles, "style"):
        key = attribute(style, "styleId")
        for child in style:
            name, value = local_name(child), attribute(child, "val")
            found = _HEADING.match(value) if name == "name" else None
            if found:
                levels[key] = int(found.group(1))
            elif name == "name" and value.lower() == "title":
                levels[key] = _TITLE_LEVEL
            elif name == "basedOn":
                parents[key] = value
            elif name == "pPr":
                for outline in children(child, "outlineLvl"):
                    level = _outline_level(outline)
                    if level is not None:
                        levels.setdefault(key, level)
    for key in parents:
        ancestor, steps = key, 0
        while ancestor not in levels and ancestor in parents and steps < 20:
            ancestor, steps = parents[ancestor], steps + 1
        if ancestor in levels:
            levels.setdefault(key, levels[ancestor])
    return levels


def _notes(word: WordDocument) -> dict[str, str]:
    """Return the text of footnotes and endnotes by mark; those of endnotes begin with "e"."""
    notes = {}
    for relation in word.part.rels.values():
        kind = relation.reltype.rpartition("/")[2]
        if kind in ("footnotes", "endnotes") and not relation.is_external:
            prefix = "" if kind == "footnotes" else "e"
            for note in parse_xml(relation.target_part.blob, _WORD_PURPOSE):
                if attribute(note, "type") in ("", "normal"):
                    notes[prefix + attribute(note, "id")] = _word_cell(note)
    return notes


def _below(element: _Element, name: str) -> Iterator[_Element]:
    """Yield the children with a name, also inside wrappers such as content controls."""
    for child in element:
        found = local_name(child)
        if found == name:
            yield child
        elif found in _WRAPPERS:
            yield from _below(child, name)


def _word_cell(element: _Element) -> str:
    """Return all paragraphs below an element on one line."""
    paragraphs = (_word_text(paragraph)[0] for paragraph in element.iter("{*}p"))
    return " ".join(" ".join(text.split()) for text in paragraphs if text.strip())


def _word_text(paragraph: _Element) -> tuple[str, list[str], list[_Element]]:
    """Return a paragraph's text, the marks of its notes, and its text boxes."""
    parts: list[str] = []
    notes: list[str] = []
    boxes: list[_Element] = []
    stack = list(reversed(paragraph))
    while stack:
        element = stack.pop()
        name = local_name(element)
        if name in _WORD_SKIPPED:
            continue
        if name == "t":
            parts.append(element.text or "")
        elif name in ("tab", "ptab"):
            parts.append("\t")
        elif name in ("br", "cr"):
            parts.append("\n")
        elif name == "noBreakHyphen":
            parts.append("-")
        elif name in ("footnoteReference", "endnoteReference"):
            mark = ("" if name == "footnoteReference" else "e") + attribute(element, "id")
            notes.append(mark)
            parts.append(f"[{mark}]")
        elif name == "txbxContent":
            boxes.append(element)
        else:
            stack.extend(reversed(element))
    return "".join(parts), notes, boxes


_SLIDES = "presentation"


def read_pptx(data: bytes) -> Document:
    """Read a .pptx file; damaged slides are skipped."""
    with requires("python-pptx", "reading presentations"):
        import pptx
    out = DocumentBuilder(_SLIDES)
    Archive(data, _SLIDES)  # checks the limits
    with parsing(_SLIDES):
        slides = pptx.Presentation(io.BytesIO(data)).slides
        parts = Parts()
        for number in range(1, len(slides) + 1):
            with parts.part(f"slide {number} of a presentation"):
                _add_slide(slides[number - 1], number, out)
        parts.check()
        return out.document()


def _add_slide(slide: Slide, number: int, out: DocumentBuilder) -> None:
    title = slide.shapes.title
    if title is not None and title.has_text_frame and title.text_frame.text.strip():
        out.heading(title.text_frame.text, 1, page=number)
    else:
        out.section(f"Slide {number}", 1)
    title_id = title.shape_id if title is not None else None
    _add_shapes((shape for shape in slide.shapes if shape.shape_id != title_id), number, out)
    if slide.has_notes_slide:
        notes = slide.notes_slide.notes_text_frame
        if notes is not None and notes.text.strip():
            out.text(f"Notes: {notes.text.strip()}", page=number)


def _add_shapes(shapes: Iterable[Any], number: int, out: DocumentBuilder) -> None:
    """Add the text of shapes in drawing order, which is also the order of screen readers."""
    for shape in shapes:
        if hasattr(shape, "shapes"):  # a group
            _add_shapes(shape.shapes, number, out)
        elif getattr(shape, "has_table", False):
            out.rows(([cell.text for cell in row.cells] for row in shape.table.rows), page=number)
        elif shape.has_text_frame:
            cost = SplitCost.BLOCK
            for paragraph in shape.text_frame.paragraphs:
                if paragraph.text.strip():
                    out.text("  " * paragraph.level + paragraph.text.strip(), cost=cost, page=number)
                    cost = SplitCost.ITEM


_SPREADSHEET = "spreadsheet"


def read_xlsx(data: bytes) -> Document:
    """Read a workbook."""
    with requires("python-calamine", "reading spreadsheets"):
        from python_calamine import CalamineWorkbook, PasswordError, SheetTypeEnum
    if data.startswith(b"PK"):
        Archive(data, _SPREADSHEET)  # checks the limits
    out = DocumentBuilder(_SPREADSHEET)
    with parsing(_SPREADSHEET):
        try:
            book = CalamineWorkbook.from_filelike(io.BytesIO(data))
        except PasswordError as error:
            raise BrokenFileError(f"an encrypted {_SPREADSHEET}") from error
        for sheet in book.sheets_metadata:
            if sheet.typ is SheetTypeEnum.WorkSheet:
                out.section(sheet.name, 1)
                cells = ([_cell_text(cell) for cell in row] for row in book.get_sheet_by_name(sheet.name).iter_rows())
                for _, table in groupby(cells, key=any):
                    out.rows(table)
    return out.document()


def _cell_text(value: object) -> str:
    """Format the value of a cell: whole numbers without a decimal point, dates without a time of midnight."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))  # calamine returns every number as a float
    if isinstance(value, datetime.datetime) and value.time() == datetime.time.min:
        return value.date().isoformat()
    return str(value)


_OPENDOCUMENT = "OpenDocument file"
_MIMETYPE = "mimetype"
_MANIFEST = "META-INF/manifest.xml"
# Deleted text, comments, and tables generated from the headings.
_OPENDOCUMENT_SKIPPED = frozenset(
    {"tracked-changes", "annotation", "table-of-content", "alphabetical-index", "sequence-decls", "forms"}
)


def read_opendocument(data: bytes) -> Document:
    """Read an .odt, .ods or .odp file."""
    archive = Archive(data, _OPENDOCUMENT)
    with parsing(_OPENDOCUMENT):
        if _MIMETYPE in archive and b"spreadsheet" in archive.read(_MIMETYPE):
            return read_xlsx(data)
        if _MANIFEST in archive and b"encryption-data" in archive.read(_MANIFEST):
            raise BrokenFileError(f"an encrypted {_OPENDOCUMENT}")
        root = parse_xml(archive.read("content.xml"), "reading OpenDocument files")
        reader = _OpenDocumentReader()
        for body in root.iter("{*}body"):
            reader.blocks(body)
        return reader.out.document()


class _OpenDocumentReader:
    def __init__(self) -> None:
        self.out = DocumentBuilder(_OPENDOCUMENT)
        self._page = 0

    def blocks(self, parent: _Element, *, in_list: bool = False) -> None:
        """Add the blocks below an element."""
        cost = SplitCost.BLOCK
        for child in parent:
            name = local_name(child)
            if name in _OPENDOCUMENT_SKIPPED:
                continue
            if name == "h":
                level = attribute(child, "outline-level")
                self.out.heading(_opendocument_text(child), int(level) if level.isdecimal() else 1, page=self._page)
            elif name == "p":
                text = _opendocument_text(child)
                if in_list and text.strip():
                    self.out.text(f"- {text.strip()}", cost=SplitCost.ITEM, page=self._page)
                else:
                    self.out.text(text, cost=cost, page=self._page)
            elif name == "table":
                rows = (
                    [" ".join(map(_opendocument_text, cell.iter("{*}p", "{*}h"))) for cell in row.iter("{*}table-cell")]
                    for row in child.iter("{*}table-row")
                )
                self.out.rows(rows, page=self._page)
            elif name == "page":
                self._page += 1
                self.out.section(attribute(child, "name") or f"Slide {self._page}", 1)
                self.blocks(child)
            elif name == "notes":
                self.blocks(child)
            else:
                self.blocks(child, in_list=in_list or name == "list-item")


def _opendocument_text(paragraph: _Element) -> str:
    """Return the text of a paragraph; a run of spaces, which is an element, becomes one space."""
    parts = [paragraph.text or ""]
    for child in paragraph:
        name = local_name(child)
        if name in ("s", "tab"):
            parts.append(" ")
        elif name == "line-break":
            parts.append("\n")
        elif name not in _OPENDOCUMENT_SKIPPED and name != "note-citation":
            parts.append(f" {_opendocument_text(child)}" if name == "p" else _opendocument_text(child))
        parts.append(child.tail or "")
    return "".join(parts)


_RTF = "RTF document"


def read_rtf(data: bytes) -> Document:
    """Read an .rtf file."""
    with requires("striprtf", "reading RTF documents"):
        from striprtf.striprtf import rtf_to_text
    if not data.lstrip().startswith(b"{\\rtf"):
        raise BrokenFileError(f"not an {_RTF}")
    to_text: Callable[..., str] = rtf_to_text  # striprtf is marked as typed, and is not
    out = DocumentBuilder(_RTF)
    with parsing(_RTF):
        text = printable(to_text(data.decode("cp1252", errors="replace"), errors="replace"))
        lines = split_lines(text)
        out.add_document(Document(lines, text_split_costs(lines)))
    return out.document()


_EPUB = "EPUB book"
_EPUB_PURPOSE = "reading EPUB books"
_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_TEXT_TYPES = frozenset({"application/xhtml+xml", "text/html", "application/x-dtbook+xml"})
_BOOK_LEVEL = -1


def read_epub(data: bytes) -> Document:
    """Read an .epub file; damaged chapters are skipped."""
    out = DocumentBuilder(_EPUB)
    archive = Archive(data, _EPUB)
    with parsing(_EPUB):
        container = parse_xml(archive.read(_CONTAINER), _EPUB_PURPOSE)
        package_name = next(filter(None, (attribute(file, "full-path") for file in container.iter("{*}rootfile"))), "")
        if not package_name:
            raise BrokenFileError(f"a broken {_EPUB}: {_CONTAINER} names no package")
        package = parse_xml(archive.read(package_name), _EPUB_PURPOSE)
        chapters = _spine(package, posixpath.dirname(package_name))
        if _ENCRYPTION in archive:
            encryption = parse_xml(archive.read(_ENCRYPTION), _EPUB_PURPOSE)
            # In readable books, fonts are often encrypted.
            if any(unquote(attribute(item, "URI")) in chapters for item in encryption.iter("{*}CipherReference")):
                raise BrokenFileError(f"an encrypted {_EPUB} (DRM)")
        title = _metadata(package, "title")
        creator = _metadata(package, "creator")
        if title:
            out.heading(f"{title} ({creator})" if creator else title, _BOOK_LEVEL)
        if not chapters:
            raise BrokenFileError(f"a broken {_EPUB}: no document in its spine")
        parts = Parts()
        for chapter in chapters:
            with parts.part(f"chapter {chapter[:80]} of an {_EPUB}"):
                out.add_document(read_html(archive.read(chapter)))
        parts.check()
        return out.document()


def _spine(package: _Element, folder: str) -> list[str]:
    """Return the names of the documents in reading order, without duplicates."""
    items: dict[str, str] = {}
    order: list[str] = []
    for part in package:
        if local_name(part) == "manifest":
            for item in children(part, "item"):
                if attribute(item, "media-type") in _TEXT_TYPES:
                    reference = unquote(attribute(item, "href").partition("#")[0])
                    # The result is only looked up in the archive, never in the file system.
                    items[attribute(item, "id")] = posixpath.normpath(posixpath.join(folder, reference))
        elif local_name(part) == "spine":
            order += [attribute(item, "idref") for item in children(part, "itemref")]
    return list(dict.fromkeys(items[key] for key in order if key in items))


def _metadata(package: _Element, name: str) -> str:
    for metadata in children(package, "metadata"):
        for element in metadata.iter(f"{{*}}{name}"):
            text = " ".join("".join(map(str, element.itertext())).split())
            if text:
                return text
    return ""
