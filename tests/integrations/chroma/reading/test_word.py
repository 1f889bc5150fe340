"""Word documents: headers, footers, comments, numbers of headings, merged cells, other kinds of the format."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import docx
import pytest

from epic_rag_chroma.reading.document import BrokenFileError, Document
from epic_rag_chroma.reading.reader import read_document
from tests.helpers.sample_files import SAMPLES, zipped

OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
STRICT = {
    "http://schemas.openxmlformats.org/wordprocessingml/2006/main": "http://purl.oclc.org/ooxml/wordprocessingml/main",
    OFFICE: "http://purl.oclc.org/ooxml/officeDocument/relationships",
}


def read(fill: Callable[[Any], object], change: Callable[[str, str], str] = lambda name, text: text) -> Document:
    """Read a document that is filled with python-docx, after a change of its XML parts."""
    document = docx.Document()
    fill(document)
    out = io.BytesIO()
    document.save(out)
    with zipfile.ZipFile(out) as archive:
        members = {
            name: change(name, archive.read(name).decode()) if name.endswith((".xml", ".rels")) else archive.read(name)
            for name in archive.namelist()
        }
    return read_document("a.docx", zipped(members))


def text_of(document: Document) -> list[str]:
    return [line for line in document.lines if line]


def test_headers_footers_and_comments() -> None:
    def fill(document: Any) -> None:
        document.sections[0].header.paragraphs[0].text = "Contract 88-1234-XY"
        document.sections[0].footer.paragraphs[0].text = "Agreed in Lübeck"
        paragraph = document.add_paragraph("The lamp is lit at dusk.")
        document.add_comment(paragraph.runs, text="Ask the platypus team", author="Ada")
        document.add_section()  # with the same header
        document.add_paragraph("The end.")

    assert text_of(read(fill)) == [
        "Contract 88-1234-XY", "The lamp is lit at dusk.", "Comment by Ada: Ask the platypus team", "The end.", "Agreed in Lübeck",
    ]  # fmt: skip


def numbering(name: str, text: str) -> str:
    """Number headings as 1, 1.1, and A within them."""
    if name != "word/numbering.xml":
        for level in (1, 2, 3):
            properties = f'<w:pPr><w:numPr><w:ilvl w:val="{level - 1}"/><w:numId w:val="77"/></w:numPr>'
            start = text.find(f'w:styleId="Heading{level}"')
            if name == "word/styles.xml":
                at = text.index("<w:pPr>", start)
                text = text[:at] + properties + text[at + len("<w:pPr>") :]
        return text
    formats = ("decimal", "decimal", "upperLetter")
    texts = ("%1", "%1.%2", "%3)")
    levels = "".join(
        f'<w:lvl w:ilvl="{at}"><w:start w:val="1"/><w:numFmt w:val="{kind}"/><w:lvlText w:val="{shown}"/></w:lvl>'
        for at, (kind, shown) in enumerate(zip(formats, texts, strict=True))
    )
    abstract = f'<w:abstractNum w:abstractNumId="77">{levels}</w:abstractNum>'
    number = '<w:num w:numId="77"><w:abstractNumId w:val="77"/></w:num>'
    at = text.index("<w:abstractNum ")
    return (text[:at] + abstract + text[at:]).replace("</w:numbering>", f"{number}</w:numbering>")


def test_numbers_of_headings() -> None:
    def fill(document: Any) -> None:
        for level, title in [
            (1, "Intro"),
            (1, "Setup"),
            (2, "Linux"),
            (2, "Windows"),
            (3, "Old"),
            (3, "New"),
            (1, "Use"),
            (2, "First"),
        ]:
            document.add_heading(title, level)
            document.add_paragraph("Text.")

    titles = [heading.title for heading in read(fill, numbering).headings]
    assert titles == ["1 Intro", "2 Setup", "2.1 Linux", "2.2 Windows", "A) Old", "B) New", "3 Use", "3.1 First"]


def test_numbered_and_other_lists() -> None:
    def fill(document: Any) -> None:
        for text in ("open", "close"):
            document.add_paragraph(text, style="List Number")
        document.add_paragraph("a point", style="List Bullet")

    assert text_of(read(fill)) == ["1. open", "2. close", "- a point"]


def test_merged_cells_count_for_each_row_and_column() -> None:
    def fill(document: Any) -> None:
        table = document.add_table(4, 3)
        for row in range(4):
            for column in range(3):
                table.cell(row, column).text = f"{row}{column}"
        table.cell(0, 0).merge(table.cell(0, 2)).text = "Tariffs"
        table.cell(1, 0).merge(table.cell(3, 0)).text = "North"
        table.cell(2, 1).merge(table.cell(2, 2)).text = "wide"

    document = read(fill)
    assert text_of(document) == ["Tariffs", "North | 11 | 12", "North | wide | wide", "North | 31 | 32"]


def test_a_table_for_layout_is_read_cell_by_cell() -> None:
    def fill(document: Any) -> None:
        table = document.add_table(1, 2)
        table.cell(0, 0).add_paragraph("Left heading", style="Heading 1")
        table.cell(0, 1).add_paragraph("Right text.")

    document = read(fill)
    assert [heading.title for heading in document.headings] == ["Left heading"]
    assert text_of(document) == ["Left heading", "Right text."]


def strict(name: str, text: str) -> str:
    for old, new in STRICT.items():
        text = text.replace(old, new)
    return text


def test_strict_open_xml() -> None:
    def fill(document: Any) -> None:
        document.sections[0].header.paragraphs[0].text = "Log"
        document.add_heading("Lighthouse", 1)
        document.add_paragraph("Lamp oil is low.")

    document = read(fill, strict)
    assert text_of(document) == ["Log", "Lighthouse", "Lamp oil is low."]
    assert [heading.title for heading in document.headings] == ["Lighthouse"]


@pytest.mark.parametrize("suffix", ["docm", "dotx", "dotm"])
def test_templates_and_documents_with_macros(suffix: str) -> None:
    assert read_document(f"a.{suffix}", SAMPLES["a.docx"]).lines == read_document("a.docx", SAMPLES["a.docx"]).lines


BOX = "<w:txbxContent><w:p><w:r><w:t>Boxed once</w:t></w:r></w:p></w:txbxContent>"
ALTERNATIVES = (
    '<w:r><mc:AlternateContent xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006">'
    f'<mc:Choice Requires="wps"><w:drawing>{BOX}</w:drawing></mc:Choice><mc:Fallback><w:pict>{BOX}</w:pict></mc:Fallback>'
    "</mc:AlternateContent></w:r>"
)
FRACTION = (
    '<m:oMath xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math"><m:f><m:num><m:r><m:t>a</m:t></m:r></m:num>'
    "<m:den><m:r><m:t>b</m:t></m:r></m:den></m:f><m:sSup><m:e><m:r><m:t>c</m:t></m:r></m:e><m:sup><m:r><m:t>2</m:t></m:r></m:sup></m:sSup></m:oMath>"
)
HIDDEN = "<w:r><w:rPr><w:vanish/></w:rPr><w:t>hidden</w:t></w:r>"


def test_alternatives_equations_and_hidden_text() -> None:
    def change(name: str, text: str) -> str:
        return (
            text.replace("</w:r></w:p>", f"</w:r>{FRACTION}{HIDDEN}{ALTERNATIVES}</w:p>", 1)
            if name == "word/document.xml"
            else text
        )

    assert text_of(read(lambda document: document.add_paragraph("Flow: "), change)) == ["Flow: a/bc^2", "Boxed once"]


def test_another_format_has_a_reason() -> None:
    for name in ("a.docx", "a.xlsx", "a.pptx"):
        for other in ("a.docx", "a.xlsx", "a.pptx", "a.epub", "a.odt"):
            if other != name:
                with pytest.raises(BrokenFileError, match=r"in spite of its name|names no main part"):
                    read_document(name, SAMPLES[other])
