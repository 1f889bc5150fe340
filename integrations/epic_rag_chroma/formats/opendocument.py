"""OpenDocument text and presentations (.odt, .odp): headings by their outline levels, a slide is a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from epic_rag_chroma.document import Break, BrokenFileError, Document
from epic_rag_chroma.formats import safe_xml, spreadsheet
from epic_rag_chroma.formats.archive import Archive
from epic_rag_chroma.formats.building import DocumentBuilder, parsing
from epic_rag_chroma.formats.safe_xml import attribute, local_name

if TYPE_CHECKING:
    from lxml.etree import _Element

__all__ = ["read"]

_WHAT = "OpenDocument file"
_PURPOSE = "reading OpenDocument files"
_CONTENT = "content.xml"
_MIMETYPE = "mimetype"
_MANIFEST = "META-INF/manifest.xml"
# Deleted text, comments, and what is made again from the headings.
_LEFT_OUT = frozenset(
    {"tracked-changes", "annotation", "table-of-content", "alphabetical-index", "sequence-decls", "forms"}
)


def read(data: bytes) -> Document:
    """Read an .odt, .ods or .odp file.

    Raises:
        BrokenFileError: If it is damaged, encrypted or beyond a limit.
        NotTextError: If there is no text in it.
        MissingExtraError: If lxml or python-calamine is not installed.
    """
    with Archive(data, _WHAT) as archive, parsing(_WHAT):
        if _MIMETYPE in archive and b"spreadsheet" in archive.read(_MIMETYPE):
            return spreadsheet.read(data)
        if _MANIFEST in archive and b"encryption-data" in archive.read(_MANIFEST):
            raise BrokenFileError(f"an encrypted {_WHAT}")
        root = safe_xml.parse(archive.read(_CONTENT), _PURPOSE)
        reader = _Reader()
        for body in root.iter("{*}body"):
            reader.blocks(body)
        return reader.out.with_pages()


class _Reader:
    def __init__(self) -> None:
        self.out = DocumentBuilder(_WHAT)
        self._page = 0

    def blocks(self, parent: _Element, *, in_list: bool = False) -> None:
        """Add what is below an element."""
        cost = Break.BLOCK
        for child in parent:
            name = local_name(child)
            if name in _LEFT_OUT:
                continue
            if name == "h":
                level = attribute(child, "outline-level")
                self.out.heading(_text(child), int(level) if level.isdecimal() else 1, page=self._page)
            elif name == "p":
                text = _text(child)
                if in_list and text.strip():
                    self.out.text(f"- {text.strip()}", cost=Break.ITEM, page=self._page)
                else:
                    self.out.text(text, cost=cost, page=self._page)
            elif name == "table":
                rows = ([_cell(cell) for cell in row.iter("{*}table-cell")] for row in child.iter("{*}table-row"))
                self.out.rows(rows, page=self._page)
            elif name == "page":
                self._page += 1
                self.out.section(attribute(child, "name") or f"Slide {self._page}", 1)
                self.blocks(child)
            elif name == "notes":
                self.blocks(child)
            else:
                self.blocks(child, in_list=in_list or name == "list-item")


def _cell(cell: _Element) -> str:
    return " ".join(_text(part) for part in cell.iter("{*}p", "{*}h"))


def _text(paragraph: _Element) -> str:
    """The text of a paragraph; a run of blanks is an element there, and how many it says does not matter."""
    parts = [paragraph.text or ""]
    for child in paragraph:
        name = local_name(child)
        if name in ("s", "tab"):
            parts.append(" ")
        elif name == "line-break":
            parts.append("\n")
        elif name not in _LEFT_OUT and name != "note-citation":
            parts.append(f" {_text(child)}" if name == "p" else _text(child))
        parts.append(child.tail or "")
    return "".join(parts)
