"""PowerPoint presentations (.pptx): a slide is a page, its title a heading; tables by rows, the notes at the end."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from epic_rag.errors import MissingExtraError
from epic_rag_chroma.document import Break, BrokenFileError, Document
from epic_rag_chroma.formats.archive import Archive
from epic_rag_chroma.formats.building import DocumentBuilder, parsing

if TYPE_CHECKING:
    from pptx.slide import Slide

__all__ = ["read"]

_WHAT = "presentation"


def read(data: bytes) -> Document:
    """Read a .pptx file. A damaged slide costs itself, not the others.

    Raises:
        BrokenFileError: If it is damaged, encrypted or beyond a limit.
        NotTextError: If there is no text in it.
        MissingExtraError: If python-pptx is not installed.
    """
    try:
        import pptx
    except ImportError as error:
        raise MissingExtraError("python-pptx", "files", "reading presentations") from error
    out = DocumentBuilder(_WHAT)
    with Archive(data, _WHAT), parsing(_WHAT):
        slides = pptx.Presentation(io.BytesIO(data)).slides
        broken: BrokenFileError | None = None
        read_any = False
        for number in range(1, len(slides) + 1):
            try:
                with parsing(f"slide {number} of a presentation"):
                    _slide(slides[number - 1], number, out)
                read_any = True
            except BrokenFileError as error:
                broken = broken or error
        if broken is not None and not read_any:
            raise broken
        return out.with_pages()


def _slide(slide: Slide, number: int, out: DocumentBuilder) -> None:
    title = slide.shapes.title
    if title is not None and title.has_text_frame and title.text_frame.text.strip():
        out.heading(title.text_frame.text, 1, page=number)
    else:
        out.section(f"Slide {number}", 1)
    title_id = title.shape_id if title is not None else None
    _shapes((shape for shape in slide.shapes if shape.shape_id != title_id), number, out)
    if slide.has_notes_slide:
        notes = slide.notes_slide.notes_text_frame
        if notes is not None and notes.text.strip():
            out.text(f"Notes: {notes.text.strip()}", page=number)


def _shapes(shapes: Iterable[Any], number: int, out: DocumentBuilder) -> None:
    """Text of shapes in the order in which they are drawn, which is the order in which a screen reader reads them."""
    for shape in shapes:
        # A group of shapes has shapes, and nothing else does.
        if hasattr(shape, "shapes"):
            _shapes(shape.shapes, number, out)
        elif getattr(shape, "has_table", False):
            out.rows(([cell.text for cell in row.cells] for row in shape.table.rows), page=number)
        elif shape.has_text_frame:
            cost = Break.BLOCK
            for paragraph in shape.text_frame.paragraphs:
                if paragraph.text.strip():
                    out.text("  " * paragraph.level + paragraph.text.strip(), cost=cost, page=number)
                    cost = Break.ITEM
