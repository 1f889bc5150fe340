"""Read presentations (.pptx): a slide is a page with its title as a heading; text, tables, charts, comments, notes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from epic_rag_chroma.reading.containers import DocumentBuilder, Parts, attribute, children, local_name, parsing
from epic_rag_chroma.reading.document import Document, SplitCost
from epic_rag_chroma.reading.drawing import (
    chart_rows,
    chart_titles,
    diagram_texts,
    drawn_rows,
    drawn_text,
    related_drawings,
)
from epic_rag_chroma.reading.package import Package

if TYPE_CHECKING:
    from lxml.etree import _Element

__all__ = ["read_pptx"]


_FORMAT = "presentation"
_TITLES = ("title", "ctrTitle")
# Placeholders of the number and the date of a slide, and pictures of it beside its notes.
_LEFT_OUT = frozenset({"sldNum", "dt", "sldImg"})


def read_pptx(data: bytes) -> Document:
    """Read a .pptx, .pptm, .ppsx or .potx file; damaged slides are skipped."""
    out = DocumentBuilder(_FORMAT)
    with parsing(_FORMAT):
        package = Package(data, _FORMAT, "reading presentations", "presentation")
        parts = Parts()
        for number, key in enumerate(_slide_keys(package.root), start=1):
            with parts.part(f"slide {number} of a presentation"):
                slide = package.target(package.main, key)
                _add_slide(package, slide, number, out)
        parts.check()
        return out.document()


def _slide_keys(presentation: _Element) -> Iterator[str]:
    for slides in children(presentation, "sldIdLst"):
        for slide in children(slides, "sldId"):
            # The id of the slide has the same name in another namespace.
            yield next((str(value) for key, value in slide.attrib.items() if str(key).endswith("}id")), "")


def _add_slide(package: Package, part: str, number: int, out: DocumentBuilder) -> None:
    root = package.xml(part)
    shapes = [shape for tree in root.iter("{*}spTree") for shape in _shapes(tree)]
    title = next((shape for shape in shapes if _placeholder(shape) in _TITLES and _texts(shape)), None)
    if title is not None:
        out.heading(" ".join(text for _, text in _texts(title)), 1, page=number)
    else:
        out.section(f"Slide {number}", 1)
    for shape in shapes:
        if shape is not title:
            _add_shape(package, part, shape, number, out)
    for comments in package.related(part, "comments"):
        for comment in package.xml(comments).iter("{*}text", "{*}txBody"):
            text = "\n".join(drawn_text(paragraph) for paragraph in children(comment, "p")) or comment.text or ""
            if text.strip():
                out.text(f"Comment: {text.strip()}", page=number)
    for notes in package.related(part, "notesSlide"):
        texts = [
            text
            for tree in package.xml(notes).iter("{*}spTree")
            for shape in _shapes(tree)
            if _placeholder(shape) not in ("hdr", "ftr")
            for _, text in _texts(shape)
        ]
        if texts:
            out.text("Notes: " + "\n".join(texts), page=number)


def _shapes(parent: _Element) -> Iterator[_Element]:
    """Yield shapes in drawing order, which is also the order of screen readers; those of a group one by one."""
    for child in parent:
        name = local_name(child)
        if name == "grpSp":
            yield from _shapes(child)
        elif name in ("sp", "graphicFrame", "cxnSp", "contentPart"):
            yield child


def _placeholder(shape: _Element) -> str:
    """Return the kind of a placeholder; "" for other shapes."""
    for properties in shape:
        for inner in children(properties, "nvPr"):
            for placeholder in children(inner, "ph"):
                return attribute(placeholder, "type") or "obj"
    return ""


def _texts(shape: _Element) -> list[tuple[int, str]]:
    """Return the paragraphs of a shape with their levels."""
    if _placeholder(shape) in _LEFT_OUT:
        return []
    texts = []
    for paragraph in (inner for body in children(shape, "txBody") for inner in children(body, "p")):
        text = drawn_text(paragraph).strip()
        level = next((attribute(properties, "lvl") for properties in children(paragraph, "pPr")), "")
        if text:
            texts.append((int(level) if level.isdecimal() else 0, text))
    return texts


def _add_shape(package: Package, part: str, shape: _Element, number: int, out: DocumentBuilder) -> None:
    cost = SplitCost.BLOCK
    for level, text in _texts(shape):
        out.text("  " * min(level, 8) + text, cost=cost, page=number)
        cost = SplitCost.ITEM
    for table in shape.iter("{*}tbl"):
        out.rows(drawn_rows(table), page=number)
    for kind, root in related_drawings(package, part, shape):
        for text in chart_titles(root) if kind == "chart" else diagram_texts(root):
            out.text(text, page=number)
        if kind == "chart":
            out.rows(chart_rows(root), page=number)
