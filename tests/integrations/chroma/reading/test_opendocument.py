"""OpenDocument: numbers, merged and repeated cells, comments, page headers, embedded charts, flat XML."""

from __future__ import annotations

from collections.abc import Mapping

from epic_rag_chroma.reading.document import Document
from epic_rag_chroma.reading.reader import read_document
from tests.helpers.sample_files import make_odt

NAMES = ("office", "text", "table", "draw", "presentation", "style", "chart", "dc", "xlink", "meta")
SPACES = " ".join(
    f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name if name != "draw" else "drawing"}:1.0"'
    for name in NAMES
)
MORE = " ".join(f'xmlns:{name}="urn:x:{name}"' for name in ("style", "chart", "dc", "xlink"))


def read(
    body: str, *, kind: str = "text", suffix: str = "odt", extra: Mapping[str, str | bytes] | None = None
) -> Document:
    return read_document(
        f"a.{suffix}",
        make_odt(f"<text:section {MORE}>{body}</text:section>" if kind == "text" else body, kind=kind, extra=extra),
    )


def text_of(document: Document) -> list[str]:
    return [line for line in document.lines if line]


def cell(text: str, more: str = "") -> str:
    return f"<table:table-cell {more}><text:p>{text}</text:p></table:table-cell>"


STYLES = (
    f"<office:document-styles {SPACES}><office:styles><text:outline-style>"
    '<text:outline-level-style text:level="1" style:num-format="1"/>'
    '<text:outline-level-style text:level="2" style:num-format="1" text:display-levels="2" style:num-suffix="."/></text:outline-style>'
    '<text:list-style style:name="L1"><text:list-level-style-number text:level="1" style:num-format="1" style:num-suffix=")"/></text:list-style></office:styles>'
    "<office:master-styles><style:master-page><style:header><text:p>Contract 88</text:p></style:header><style:footer><text:p>Lübeck</text:p></style:footer></style:master-page>"
    "<style:master-page><style:header><text:p>Contract 88</text:p></style:header></style:master-page></office:master-styles></office:document-styles>"
)


def test_numbers_of_headings_and_items_between_page_headers() -> None:
    def heading(level: int, title: str) -> str:
        return f'<text:h text:outline-level="{level}">{title}</text:h>'

    items = '<text:list text:style-name="L1"><text:list-item><text:p>open</text:p></text:list-item><text:list-item><text:p>close</text:p></text:list-item></text:list>'
    document = read(
        heading(1, "A") + heading(2, "B") + heading(2, "C") + heading(1, "D") + items, extra={"styles.xml": STYLES}
    )
    assert [one.title for one in document.headings] == ["1 A", "1.1. B", "1.2. C", "2 D"]
    assert text_of(document) == ["Contract 88", "1 A", "1.1. B", "1.2. C", "2 D", "1) open", "2) close", "Lübeck"]


TABLE = (
    f'<table:table table:name="Sheet">'
    f'<table:table-row>{cell("Tariffs", "table:number-columns-spanned=&quot;3&quot;".replace("&quot;", chr(34)))}<table:covered-table-cell table:number-columns-repeated="2"/></table:table-row>'
    f"<table:table-row>{cell('North', chr(116) + 'able:number-rows-spanned=' + chr(34) + '2' + chr(34))}{cell('1 kg')}{cell('4 EUR')}</table:table-row>"
    f"<table:table-row><table:covered-table-cell/>{cell('2 kg')}{cell('5 EUR')}</table:table-row>"
    f"<table:table-row>{cell('x', 'table:number-columns-repeated=' + chr(34) + '2' + chr(34))}</table:table-row></table:table>"
)
ROWS = ["Tariffs", "North | 1 kg | 4 EUR", "North | 2 kg | 5 EUR", "x | x"]


def test_merged_and_repeated_cells_of_a_table_and_a_sheet() -> None:
    assert text_of(read(TABLE)) == ROWS
    sheet = read(
        TABLE.replace(
            "</table:table>",
            '<table:table-row table:number-rows-repeated="1048000"><table:table-cell table:number-columns-repeated="16384"/></table:table-row></table:table>',
        ),
        kind="spreadsheet",
        suffix="ods",
    )
    assert text_of(sheet) == ROWS
    assert [one.title for one in sheet.headings] == ["Sheet"]


def test_cells_as_shown_and_comments() -> None:
    comment = '<office:annotation><dc:creator xmlns:dc="urn:x:dc">Ada</dc:creator><text:p>Ask the gulls</text:p></office:annotation>'
    shown = f'<table:table table:name="S"><table:table-row><table:table-cell office:value-type="percentage" office:value="0.153">{comment}<text:p>15.3%</text:p></table:table-cell>{cell("001234")}</table:table-row></table:table>'
    assert text_of(read(shown, kind="spreadsheet", suffix="ods")) == ["15.3% | 001234", "Comment by Ada: Ask the gulls"]
    assert text_of(read(f"<text:p>Lit at dusk.{comment}</text:p>")) == ["Lit at dusk.", "Comment by Ada: Ask the gulls"]


def test_embedded_chart_and_text_box() -> None:
    chart = (
        f"<office:document-content {SPACES}><office:body><office:chart><chart:chart><chart:title><text:p>Census</text:p></chart:title>"
        f"<table:table><table:table-row>{cell('2019')}{cell('12')}</table:table-row></table:table></chart:chart></office:chart></office:body></office:document-content>"
    )
    body = '<text:p>Before<draw:frame><draw:object xlink:href="./Object 1"/></draw:frame><draw:frame><draw:text-box><text:p>Boxed once</text:p></draw:text-box></draw:frame></text:p>'
    assert text_of(read(body, extra={"Object 1/content.xml": chart})) == ["Before", "Census", "2019 | 12", "Boxed once"]


def test_flat_xml() -> None:
    flat = f"<?xml version='1.0'?><office:document {SPACES}><office:body><office:text><text:h text:outline-level='1'>Undo</text:h><text:p>Reset.</text:p></office:text></office:body></office:document>"
    assert text_of(read_document("a.fodt", flat.encode())) == ["Undo", "Reset."]
