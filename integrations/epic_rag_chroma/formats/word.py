"""Word documents (.docx): headings by their styles, paragraphs, lists, tables by rows, footnotes, text boxes.

python-docx opens the package and knows the styles. Its paragraphs leave out what stands in content controls and in
insertions that nobody has accepted yet, so the text is read from the elements. A Word document has no pages until
something lays it out: a passage is found by its headings.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from epic_rag.errors import MissingExtraError
from epic_rag_chroma.document import Break, Document
from epic_rag_chroma.formats import safe_xml
from epic_rag_chroma.formats.archive import Archive
from epic_rag_chroma.formats.building import DocumentBuilder, parsing
from epic_rag_chroma.formats.safe_xml import attribute, children, local_name

if TYPE_CHECKING:
    from docx.document import Document as WordDocument
    from lxml.etree import _Element

__all__ = ["read"]

_WHAT = "Word document"
_PURPOSE = "reading Word documents"
_HEADING = re.compile(r"heading\s*([1-9])\b", re.IGNORECASE)
_TITLE_LEVEL = 0
# Deleted text, the fallback picture of a text box, field codes.
_LEFT_OUT = frozenset({"del", "moveFrom", "Fallback", "instrText", "delText", "rPr", "pPr", "sectPr"})
_WRAPPERS = frozenset({"sdt", "sdtContent", "ins", "moveTo", "customXml", "smartTag"})


def read(data: bytes) -> Document:
    """Read a .docx file.

    Raises:
        BrokenFileError: If it is damaged, encrypted or beyond a limit.
        NotTextError: If there is no text in it.
        MissingExtraError: If python-docx is not installed.
    """
    try:
        import docx
    except ImportError as error:
        raise MissingExtraError("python-docx", "files", _PURPOSE) from error
    with Archive(data, _WHAT), parsing(_WHAT):
        return _Reader(docx.Document(io.BytesIO(data))).document()


class _Reader:
    def __init__(self, word: WordDocument) -> None:
        self._body: _Element = word.element.body
        self._levels = _heading_levels(word)
        self._notes = _notes(word)
        self._out = DocumentBuilder(_WHAT)
        self._in_list = False

    def document(self) -> Document:
        self._blocks(self._body)
        return self._out.with_pages()

    def _blocks(self, parent: _Element) -> None:
        for child in parent:
            name = local_name(child)
            if name == "p":
                self._paragraph(child)
            elif name == "tbl":
                self._out.rows([_cell(cell) for cell in _below(row, "tc")] for row in _below(child, "tr"))
                self._in_list = False
            elif name in _WRAPPERS:
                self._blocks(child)

    def _paragraph(self, paragraph: _Element) -> None:
        text, notes, boxes = _text(paragraph)
        level, listed = self._kind(paragraph)
        if text.strip() and level is not None:
            self._out.heading(text, level)
        elif listed and text.strip():
            self._out.text(f"- {text.strip()}", cost=Break.ITEM if self._in_list else Break.BLOCK)
        else:
            self._out.text(text)
        self._in_list = listed
        for note in notes:
            self._out.text(f"[{note}] {self._notes.get(note, '')}".strip(), cost=Break.SENTENCE)
        for box in boxes:
            self._blocks(box)

    def _kind(self, paragraph: _Element) -> tuple[int | None, bool]:
        """The level of a heading (None: it is none), and whether the paragraph is a list item."""
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
    # 9 is body text.
    return int(value) + 1 if value.isdecimal() and int(value) < 9 else None


def _heading_levels(word: WordDocument) -> dict[str, int]:
    """Levels by style id. A built-in style has its English name in the file whatever language it is shown in."""
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
    """Footnotes and endnotes by a mark that tells them apart."""
    notes = {}
    for relation in word.part.rels.values():
        kind = relation.reltype.rpartition("/")[2]
        if kind in ("footnotes", "endnotes") and not relation.is_external:
            prefix = "" if kind == "footnotes" else "e"
            for note in safe_xml.parse(relation.target_part.blob, _PURPOSE):
                if attribute(note, "type") in ("", "normal"):
                    notes[prefix + attribute(note, "id")] = _cell(note)
    return notes


def _below(element: _Element, name: str) -> Iterator[_Element]:
    """Children of this name, through wrappers such as content controls."""
    for child in element:
        found = local_name(child)
        if found == name:
            yield child
        elif found in _WRAPPERS:
            yield from _below(child, name)


def _cell(element: _Element) -> str:
    """All paragraphs below an element on one line."""
    paragraphs = (_text(paragraph)[0] for paragraph in element.iter("{*}p"))
    return " ".join(" ".join(text.split()) for text in paragraphs if text.strip())


def _text(paragraph: _Element) -> tuple[str, list[str], list[_Element]]:
    """A paragraph's text, the marks of the notes that it names, and the text boxes that hang on it."""
    parts: list[str] = []
    notes: list[str] = []
    boxes: list[_Element] = []
    stack = list(reversed(paragraph))
    while stack:
        element = stack.pop()
        name = local_name(element)
        if name in _LEFT_OUT:
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
