"""Read drawings of Office Open XML files: the text of shapes, tables, charts and diagrams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from epic_rag_chroma.reading.containers import EQUATION_MARKS, attribute, children, local_name
from epic_rag_chroma.reading.number_formats import number_text
from epic_rag_chroma.reading.package import Package

if TYPE_CHECKING:
    from lxml.etree import _Element

__all__ = ["chart_rows", "chart_titles", "diagram_texts", "drawn_rows", "drawn_text", "related_drawings"]


_MAX_POINTS = 5000
# Numbers of pages and dates, which change by themselves.
_FIELDS = ("slidenum", "datetime")


def drawn_text(paragraph: _Element) -> str:
    """Return the text of a paragraph of a shape: runs, line breaks, fields and equations."""
    parts: list[str] = []
    stack = list(reversed(paragraph))
    while stack:
        element = stack.pop()
        name = local_name(element)
        if name == "t":
            parts.append(element.text or "")
        elif name == "br":
            parts.append("\n")
        elif name == "tab":
            parts.append("\t")
        elif not (
            name in ("pPr", "rPr", "endParaRPr") or (name == "fld" and attribute(element, "type").startswith(_FIELDS))
        ):
            if name in EQUATION_MARKS and next(element.iter("{*}t"), None) is not None:
                parts.append(EQUATION_MARKS[name])
            stack.extend(reversed(element))
    return "".join(parts)


def drawn_rows(table: _Element) -> list[list[str]]:
    """Return the rows of a table; a merged cell counts for each row and column that it spans."""
    rows: list[list[str]] = []
    above: list[str] = []
    for row in children(table, "tr"):
        cells: list[str] = []
        whole = False
        for cell in children(row, "tc"):
            text = " ".join(drawn_text(paragraph) for paragraph in cell.iter("{*}p")).strip()
            if attribute(cell, "hMerge") in ("1", "true") and cells:
                text = cells[-1]
            elif attribute(cell, "vMerge") in ("1", "true") and len(cells) < len(above):
                text = above[len(cells)]
            span = attribute(cell, "gridSpan")
            whole = whole or (not cells and span.isdecimal() and int(span) >= len(list(children(row, "tc"))) > 1)
            cells.append(text)
        above = cells
        rows.append(cells[:1] if whole else cells)
    return rows


def related_drawings(package: Package, part: str, drawing: _Element) -> Iterator[tuple[str, _Element]]:
    """Yield the charts ("chart") and diagrams ("diagram") below an element of a part."""
    for element in drawing.iter("{*}chart", "{*}relIds"):
        target = package.target(part, attribute(element, "id") or attribute(element, "dm"))
        if target:
            yield ("chart" if local_name(element) == "chart" else "diagram"), package.xml(target)


def diagram_texts(diagram: _Element) -> Iterator[str]:
    """Yield the texts of a diagram (SmartArt)."""
    for text in diagram.iter("{*}t"):
        paragraphs = [drawn_text(paragraph).strip() for paragraph in children(text, "p")]
        if any(paragraphs):
            yield " ".join(filter(None, paragraphs))


def chart_titles(chart: _Element) -> list[str]:
    """Return the titles of a chart and of its axes, without duplicates."""
    titles = []
    for title in chart.iter("{*}title"):
        text = " ".join(drawn_text(paragraph).strip() for paragraph in title.iter("{*}p"))
        titles.append(text.strip() or " ".join(value.text or "" for value in title.iter("{*}v")))
    return list(dict.fromkeys(" ".join(title.split()) for title in titles if title.strip()))


def chart_rows(chart: _Element) -> list[list[str]]:
    """Return the data of a chart as a table: the names of the series, then a row for each category."""
    names: list[str] = []
    columns: list[dict[int, str]] = []
    categories: dict[int, str] = {}
    for series in chart.iter("{*}ser", "{*}series"):
        name = next((" ".join(v.text or "" for v in tx.iter("{*}v", "{*}t")) for tx in children(series, "tx")), "")
        values: dict[int, str] = {}
        for child in series:
            if local_name(child) in ("cat", "xVal"):
                categories = categories or _points(child)
            elif local_name(child) in ("val", "yVal"):
                values = _points(child)
        names.append(name)
        columns.append(values)
    # Charts of Office 2016 and later keep their data apart from the series.
    for data in chart.iter("{*}strDim"):
        categories = categories or _points(data)
    new = [_points(data) for data in chart.iter("{*}numDim")]
    if new and not any(columns):
        columns = new
        names += [""] * (len(columns) - len(names))
    keys = sorted({*categories, *(key for column in columns for key in column)})
    rows = [[categories.get(key, ""), *(column.get(key, "") for column in columns)] for key in keys]
    return [["", *names], *rows] if any(names) else rows


def _points(data: _Element) -> dict[int, str]:
    """Return the values of a series by number; of categories on several levels, the levels of each together."""
    formats = [code.text or "" for code in data.iter("{*}formatCode")]
    code = formats[0] if formats else attribute(next(iter(children(data, "lvl")), data), "formatCode")
    points: dict[int, str] = {}
    for point in data.iter("{*}pt"):
        number = attribute(point, "idx")
        value = " ".join(v.text or "" for v in children(point, "v")) or (point.text or "").strip()
        if number.isdecimal() and value and len(points) < _MAX_POINTS:
            if code and local_name(data) != "strDim":
                value = number_text(value, attribute(point, "formatCode") or code)
            key = int(number)
            points[key] = f"{value} {points[key]}" if key in points else value
    return points
