"""Spreadsheets: cells as they are shown, merged cells, comments, charts, headers of the page."""

from __future__ import annotations

import base64
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag_chroma.reading.containers import DocumentBuilder
from epic_rag_chroma.reading.document import Document
from epic_rag_chroma.reading.reader import read_document
from epic_rag_chroma.reading.spreadsheet import Merge, add_cells
from tests.helpers.sample_files import zipped

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"
DRAWN = "http://schemas.openxmlformats.org/drawingml/2006/main"
CHART = "http://schemas.openxmlformats.org/drawingml/2006/chart"

# A workbook of Excel 97 as LibreOffice writes it.
OLD = zlib.decompress(
    base64.b85decode(
        "c-rk3ZHQD=^xQXZXWxwL&fC>hTWy-G{m>nk5urB9X4chGs5aC-kcAv)-"
        "@23IykVSR{ZWpYe?p<~NBs~&SVao@AgCV|?fw%g>W@E?f>j6#3to|g(C+J;^X?m;;|$EqicrmYoOka#_uYHWJ@<Uw@4oGrJM&TZWhjG(!3PU=0"
        "Q?@BK-An19YB$^1>3e=vfYG#70k<)&QQhkYeA$lZ<Xg7kZlwGo3Im1d<qbOZIHz_4~L;1Sb-MfU9Xlo3pM^%D>V5x&Y$8p#c>~Ex&KqFC;ty3E"
        "<tQVT#DF^7;;hobRc#jE<;?7*u^#huo7_<;$4W{h^rCTAl@zc-"
        "y>VXwb;K8@qS6`#kQ{*ckT!TG(1Ir3w*ZpYdUg1`^#t%AF8u#7grF+AV;<_lFXzccM7(!3`s#U%%G8O#-4!FNNtA?nEE-tH?#F2Bp@;*E&6#S!"
        "Lpy^_ga3p1I_=G=UigSMhL?XY~^pT69{M(Banm)q+uV%!8HES4HwA2j_@Dk9b%YA=&!|$hSfHhCLep;$Qt=%CaebGEcsrHAgl)99BDi@80(p1x"
        "0;4)cEsbtGZCWG%1r;WHo8(L9sYOpY1CaMJr6klTjlh1Rp`+w^z~Kffr|8!JpJYLvkqM?r=PopeoDcQBG}aGMIW~vML)NlMU~rS#a3>Y7hCMT>"
        ">|f8;Qz*}_+T_Megan%_{<6o5n%U80asxUWdUm^GxA#$?TN8_EAZkbSYnZ%eu>_u!BK%(MVk=`d?z6MyYA!_4fBhJc|-"
        "dPQ_J7b%e#=c$IKcOg3NIPy=2#9GEePOX1*|KV}8<LT6OYMO6x+rae!U2RVax$!A`#^*tMa+<G2wD4;?JLj>~NrS#$Nu1Ksf#m|nbb?SUTBCq%"
        "_j9GO+u^Naz0zsmo*N$?ocUgLLfY5vdgK2N{D)VJd6JpD5mv;rs<u+kOe78R@7{KsbZ&c)qUz%w|a!OOgD5U*<?xzlz4nb4iLrs%RCbwZH{F-"
        "=sUDP^>IPX1212l*xNOO(D8)}8Yuc<;pX6(z{BuYh-HMU;v5vC_55xKR8&s|&us0Iu+#VJ;iK;x&JQpxisbukbW+v9>#>V`<W?$TC9UvtlfvYV"
        "|WcVCfZ#9tDCtkLFO3^Qh7ZpZJ~30q_WGo63`r)EvmL4g1k1_iNsTgj;9@7hk&xta5xor-sutXS*}b&|_3HJ(*7B%|qryA+l{MWn>}`J-A_aa-"
        "WgO7;L>;(i0Oyi{meK+#oF2P&%fvbz$!KJAYgsoz&lZQ-guNkH4p5dRx|(LMon|X}hd5$D~RpWxZLDHD^)QohM|i`pZ19vCtedXJm7Sr!vGdEX"
        "QMVZ5M9ocTQcpcH~Fl?ceVG6GgfB&BfD$tMyZF;r^r7-``4AKpAaJ*2!+9)IEEAqU6TFNr}dX<aokUyOXYlbGc`Y{Gqg&y;(=3-"
        "%W!XtIB^n?|&?RnGIK(<Ma5=bI3gp2e9HIIS$mVe+nLo+^1c~y=u7CwbK#gdk`z!QIz4uhWPtDcd%OK(7Eg=`N=5OgGR&t7exN`-"
        "v1)<uEtd<?1GnY{|B)yrL*6GRxrV5LX-m5t0q#aL%-zTQiuNUMZ8erzZE&8SO$YFus(T)8rXji;`!$NpWz=Rq8L8"
    )
)


def relations(*targets: tuple[str, str, str]) -> str:
    items = "".join(
        f'<Relationship Id="{key}" Type="{OFFICE}/{kind}" Target="{target}"/>' for key, kind, target in targets
    )
    return f'<Relationships xmlns="{PACKAGE}">{items}</Relationships>'


def workbook(
    sheet: str, *, strict: bool = False, formats: tuple[str, ...] = (), extra: dict[str, str] | None = None
) -> bytes:
    """A workbook of one sheet; the cells' styles are numbers of the formats, from 1."""
    own = "".join(f'<numFmt numFmtId="{164 + at}" formatCode="{code}"/>' for at, code in enumerate(formats))
    styles = '<xf numFmtId="0"/>' + "".join(f'<xf numFmtId="{164 + at}"/>' for at in range(len(formats)))
    members = {
        "_rels/.rels": relations(("r", "officeDocument", "/xl/workbook.xml")),
        "xl/workbook.xml": f'<workbook xmlns="{MAIN}" xmlns:r="{OFFICE}"><sheets><sheet name="Stock" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": relations(
            ("r1", "worksheet", "worksheets/sheet1.xml"),
            ("r2", "styles", "styles.xml"),
            ("r3", "sharedStrings", "sharedStrings.xml"),
        ),
        "xl/styles.xml": f'<styleSheet xmlns="{MAIN}"><numFmts>{own}</numFmts><cellXfs>{styles}</cellXfs></styleSheet>',
        "xl/sharedStrings.xml": f'<sst xmlns="{MAIN}"><si><t>Zone</t></si><si><r><t>No</t></r><r><t>rth</t></r><rPh><t>x</t></rPh></si></sst>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{MAIN}">{sheet}</worksheet>',
        **(extra or {}),
    }
    if strict:
        members = {
            name: text.replace(MAIN, "http://purl.oclc.org/ooxml/spreadsheetml/main").replace(
                OFFICE, "http://purl.oclc.org/ooxml/officeDocument/relationships"
            )
            for name, text in members.items()
        }
    return zipped(members)


def text_of(document: Document) -> list[str]:
    return [line for line in document.lines if line]


CELLS = (
    '<sheetData><row r="1"><c r="A1" t="s"><v>0</v></c><c r="B1" t="inlineStr"><is><t>Code</t></is></c></row>'
    '<row r="2"><c r="A2" t="s"><v>1</v></c><c r="B2" s="1"><v>42</v></c><c r="C2" s="2"><v>0.153</v></c><c r="D2" s="3"><v>45000</v></c></row>'
    '<row r="3"><c r="B3" s="1"><v>7</v></c><c r="C3" t="b"><v>1</v></c><c r="D3" t="e"><v>#N/A</v></c><c r="E3" t="str"><f>A2</f><v>sum</v></c></row></sheetData>'
    '<mergeCells><mergeCell ref="A2:A3"/></mergeCells>'
)


@pytest.mark.parametrize("strict", [False, True])
def test_cells_are_read_as_shown_and_merged_ones_for_each_row(strict: bool) -> None:
    document = read_document("a.xlsx", workbook(CELLS, strict=strict, formats=("00000", "0.0%", "dd.mm.yyyy")))
    assert text_of(document) == [
        "Zone | Code",
        "North | 00042 | 15.3% | 15.03.2023",
        "North | 00007 | TRUE | #N/A | sum",
    ]
    assert [(heading.level, heading.title) for heading in document.headings] == [(1, "Stock")]


def test_a_title_is_not_repeated_and_not_the_header() -> None:
    rows = (
        '<row><c t="str"><v>Tariffs</v></c></row><row><c t="str"><v>Zone</v></c><c t="str"><v>Price</v></c></row>'
        + "".join(f'<row><c t="str"><v>Z{number}</v></c><c><v>{number}</v></c></row>' for number in range(3))
    )
    document = read_document(
        "a.xlsx", workbook(f'<sheetData>{rows}</sheetData><mergeCells><mergeCell ref="A1:B1"/></mergeCells>')
    )
    assert text_of(document)[:2] == ["Tariffs", "Zone | Price"]
    assert [(header.text, document.lines[header.first]) for header in document.repeated_headers] == [
        ("Zone | Price", "Z0 | 0")
    ]


def test_comments_charts_text_boxes_and_headers() -> None:
    series = '<c:ser><c:tx><c:strRef><c:strCache><c:pt idx="0"><c:v>Lynx</c:v></c:pt></c:strCache></c:strRef></c:tx><c:val><c:numRef><c:numCache><c:pt idx="0"><c:v>5</c:v></c:pt></c:numCache></c:numRef></c:val></c:ser>'
    extra = {
        "xl/worksheets/_rels/sheet1.xml.rels": relations(
            ("r1", "comments", "../comments1.xml"), ("r2", "drawing", "../drawings/drawing1.xml")
        ),
        "xl/comments1.xml": f'<comments xmlns="{MAIN}"><authors><author>Ada</author></authors><commentList><comment ref="B2" authorId="0"><text><t>Check the heron</t></text></comment></commentList></comments>',
        "xl/drawings/_rels/drawing1.xml.rels": relations(("c1", "chart", "../charts/chart1.xml")),
        "xl/drawings/drawing1.xml": f'<wsDr xmlns:a="{DRAWN}" xmlns:c="{CHART}" xmlns:r="{OFFICE}"><sp><txBody><a:p><a:r><a:t>In a box</a:t></a:r></a:p></txBody></sp><c:chart r:id="c1"/></wsDr>',
        "xl/charts/chart1.xml": f'<c:chartSpace xmlns:a="{DRAWN}" xmlns:c="{CHART}"><c:chart><c:title><c:tx><c:rich><a:p><a:r><a:t>Sightings</a:t></a:r></a:p></c:rich></c:tx></c:title><c:plotArea>{series}</c:plotArea></c:chart></c:chartSpace>',
    }
    surroundings = '<headerFooter><oddHeader>&amp;C&amp;"Arial,Bold"Secret ibis</oddHeader><oddFooter>&amp;LPage &amp;P of &amp;N</oddFooter></headerFooter>'
    document = read_document("a.xlsx", workbook(CELLS + surroundings, extra=extra))
    assert text_of(document) == [
        "Secret ibis", "Zone | Code", "North | 42 | 0.153 | 45000", "North | 7 | TRUE | #N/A | sum", "Comment on B2 by Ada: Check the heron",
        "In a box", "Sightings", " | Lynx", "Page of",
    ]  # fmt: skip


def test_a_workbook_of_excel_97() -> None:
    assert text_of(read_document("a.xls", OLD)) == [
        "Zone | Code | Share",
        "North | 00042 | 12.5%",
        "North | 00007 | 50.0%",
    ]


texts = st.sampled_from(["", "a", "b", "c"])


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.integers(0, 8), st.dictionaries(st.integers(0, 5), texts, max_size=4), max_size=6),
    st.lists(st.tuples(*[st.integers(0, 9)] * 4), max_size=3),
)
def test_no_cell_is_lost(rows: dict[int, dict[int, str]], merges: list[tuple[int, int, int, int]]) -> None:
    cells = sorted(text for row in rows.values() for text in row.values() if text)
    out = DocumentBuilder("sheet")
    out.text("first")
    add_cells(out, rows, [Merge(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in merges])
    found = "\n".join(out.document().lines[1:]).replace("|", " ").split()
    for text in set(cells):
        assert found.count(text) >= cells.count(text)
