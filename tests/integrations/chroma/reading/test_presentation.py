"""Presentations: alternatives of a shape, charts, tables with merged cells, groups, comments."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import pptx
import pytest
from pptx.chart.data import CategoryChartData, XyChartData
from pptx.enum.chart import XL_CHART_TYPE
from pptx.util import Inches

from epic_rag_chroma.reading.document import Document
from epic_rag_chroma.reading.reader import read_document
from tests.helpers.sample_files import SAMPLES, zipped

AREA = (Inches(1), Inches(2), Inches(5), Inches(2))


def read(fill: Callable[[Any], object], change: Callable[[str, str], str] = lambda name, text: text) -> Document:
    """Read a presentation of one slide without a title that is filled with python-pptx."""
    presentation = pptx.Presentation()
    fill(presentation.slides.add_slide(presentation.slide_layouts[6]))
    out = io.BytesIO()
    presentation.save(out)
    with zipfile.ZipFile(out) as archive:
        members = {
            name: change(name, archive.read(name).decode()) if name.endswith((".xml", ".rels")) else archive.read(name)
            for name in archive.namelist()
        }
    return read_document("a.pptx", zipped(members))


def text_of(document: Document) -> list[str]:
    return [line for line in document.lines if line]


def test_charts() -> None:
    def fill(slide: Any) -> None:
        data = CategoryChartData(number_format="0.0%")
        data.categories = ["2019", "2020"]
        data.add_series("Ibex", (0.125, 0.5))
        data.add_series("Lynx", (None, 0.25))
        chart = slide.shapes.add_chart(XL_CHART_TYPE.COLUMN_CLUSTERED, *AREA, data).chart
        chart.has_title = True
        chart.chart_title.text_frame.text = "Alpine fauna census"
        chart.value_axis.has_title = True
        chart.value_axis.axis_title.text_frame.text = "Sightings per year"
        points = XyChartData()
        series = points.add_series("Depth")
        series.add_data_point(1.5, 20)
        slide.shapes.add_chart(XL_CHART_TYPE.XY_SCATTER, *AREA, points)

    assert text_of(read(fill)) == [
        "Alpine fauna census", "Sightings per year", " | Ibex | Lynx", "2019 | 12.5%", "2020 | 50.0% | 25.0%", " | Depth", "1.5 | 20",
    ]  # fmt: skip


def test_a_shape_with_alternatives_is_read_once() -> None:
    def fill(slide: Any) -> None:
        slide.shapes.add_textbox(*AREA).text_frame.text = "the marmot equation"
        slide.shapes.add_textbox(*AREA).text_frame.text = "after it"

    def change(name: str, text: str) -> str:
        if name != "ppt/slides/slide1.xml":
            return text
        start, end = text.index("<p:sp>"), text.index("</p:sp>") + len("</p:sp>")
        shape = text[start:end]
        space = "http://schemas.openxmlformats.org/markup-compatibility/2006"
        both = f'<mc:AlternateContent xmlns:mc="{space}"><mc:Choice Requires="a14">{shape}</mc:Choice><mc:Fallback>{shape}</mc:Fallback></mc:AlternateContent>'
        return text[:start] + both + text[end:]

    assert text_of(read(fill, change)) == ["the marmot equation", "after it"]


def test_merged_cells_and_groups() -> None:
    def fill(slide: Any) -> None:
        table = slide.shapes.add_table(4, 3, *AREA).table
        for row in range(4):
            for column in range(3):
                table.cell(row, column).text = f"{row}{column}"
        table.cell(0, 0).merge(table.cell(0, 2))
        table.cell(0, 0).text = "Tariffs"
        table.cell(1, 0).merge(table.cell(3, 0))
        table.cell(1, 0).text = "North"
        group = slide.shapes.add_group_shape()
        group.shapes.add_textbox(*AREA).text_frame.text = "in a group"

    assert text_of(read(fill)) == ["Tariffs", "North | 11 | 12", "North | 21 | 22", "North | 31 | 32", "in a group"]


def test_comments_and_strict_open_xml() -> None:
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"

    def change(name: str, text: str) -> str:
        if name == "ppt/slides/_rels/slide1.xml.rels":
            text = text.replace(
                "</Relationships>",
                f'<Relationship Id="c1" Type="{office}/comments" Target="../slideLayouts/slideLayout1.xml"/></Relationships>',
            )
        if name == "ppt/slideLayouts/slideLayout1.xml":
            text = '<p:cmLst xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main"><p:cm><p:text>Ask the gulls</p:text></p:cm></p:cmLst>'
        text = text.replace(office, "http://purl.oclc.org/ooxml/officeDocument/relationships")
        text = text.replace(
            "http://schemas.openxmlformats.org/presentationml/2006/main",
            "http://purl.oclc.org/ooxml/presentationml/main",
        )
        return text.replace(
            "http://schemas.openxmlformats.org/drawingml/2006/main", "http://purl.oclc.org/ooxml/drawingml/main"
        )

    def fill(slide: Any) -> None:
        slide.shapes.add_textbox(*AREA).text_frame.text = "On the slide"

    document = read(fill, change)
    assert text_of(document) == ["On the slide", "Comment: Ask the gulls"]
    assert document.pages == [1] * len(document.lines)


@pytest.mark.parametrize("suffix", ["pptm", "ppsx", "potx"])
def test_shows_and_templates(suffix: str) -> None:
    assert read_document(f"a.{suffix}", SAMPLES["a.pptx"]).lines == read_document("a.pptx", SAMPLES["a.pptx"]).lines
