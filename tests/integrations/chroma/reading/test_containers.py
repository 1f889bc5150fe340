"""Container formats: text, headings, places, and reasons of files that cannot be read."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag_chroma.chunking import Chunk, chunk_document
from epic_rag_chroma.reading.document import BrokenFileError, NotTextError, split_lines
from epic_rag_chroma.reading.reader import read_document
from tests.helpers.sample_files import SAMPLES, make_book, make_docx, make_odt, zipped

CONTAINERS = ("docx", "pptx", "xlsx", "epub", "odt", "ipynb", "eml", "mbox", "rtf", "pdf")
W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def chunks_of(name: str, data: bytes, size: int = 60) -> list[Chunk]:
    return chunk_document(
        read_document(name, data),
        max_tokens=size,
        overlap=0,
        count_tokens=lambda texts: [len(text.split()) for text in texts],
    )


def shown(name: str, data: bytes | None = None) -> list[tuple[tuple[str, ...], int | None, str]]:
    return [(c.heading_path, c.page, c.text) for c in chunks_of(name, SAMPLES[name] if data is None else data)]


def with_member(data: bytes, member: str, change: Mapping[str, str]) -> bytes:
    """Replace text in one member of an archive."""
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    text = members[member].decode()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new, 1)
    members[member] = text.encode()
    return zipped(members)


def test_word() -> None:
    assert shown("a.docx") == [
        (
            ("Manual", "Undo"),
            None,
            "Manual\n\nUndo\n\nReset softly to the commit before it.\n\n- keep the changes\n- drop the commit",
        ),
        (
            ("Manual", "Undo", "Options"),
            None,
            "Options\n\nOption | Meaning\n--soft | keeps files\n--hard | drops files",
        ),
        (("Manual", "Remove"), None, "Remove\n\nDelete the folder."),
    ]
    assert all(chunk.first_line is None for chunk in chunks_of("a.docx", SAMPLES["a.docx"]))


def test_word_controls_insertions_and_boxes() -> None:
    data = with_member(
        make_docx(),
        "word/document.xml",
        {
            "<w:t>Delete the folder.</w:t></w:r>": (
                "<w:t>Delete</w:t></w:r><w:ins><w:r><w:t> really</w:t></w:r></w:ins>"
                "<w:del><w:r><w:delText> never</w:delText><w:t> nor this</w:t></w:r></w:del>"
                "<w:sdt><w:sdtContent><w:r><w:t> it</w:t></w:r></w:sdtContent></w:sdt>"
                '<w:hyperlink><w:r><w:t xml:space="preserve"> now</w:t><w:br/><w:t>or later</w:t></w:r></w:hyperlink>'
                "<w:r><w:pict><w:txbxContent><w:p><w:r><w:t>In a box</w:t></w:r></w:p></w:txbxContent></w:pict></w:r>"
            ),
            "<w:sectPr": "<w:sdt><w:sdtContent><w:p><w:r><w:t>In a control</w:t></w:r></w:p></w:sdtContent></w:sdt><w:sectPr",
        },
    )
    assert shown("a.docx", data)[-1][2] == "Remove\n\nDelete really it now\nor later\n\nIn a box\n\nIn a control"


def test_word_headings_by_outline_level_and_based_on() -> None:
    data = with_member(
        make_docx(),
        "word/styles.xml",
        {
            "</w:styles>": '<w:style w:type="paragraph" w:styleId="Mine"><w:name w:val="Mine"/><w:basedOn w:val="Heading2"/></w:style></w:styles>'
        },
    )
    data = with_member(
        data,
        "word/document.xml",
        {
            '<w:pStyle w:val="Heading1"/>': '<w:pStyle w:val="Mine"/>',
            "<w:p><w:r><w:t>Delete": '<w:p><w:pPr><w:outlineLvl w:val="2"/></w:pPr><w:r><w:t>Delete',
        },
    )
    document = read_document("a.docx", data)
    assert [(h.level, h.title) for h in document.headings] == [
        (0, "Manual"), (2, "Undo"), (2, "Options"), (1, "Remove"), (3, "Delete the folder."),
    ]  # fmt: skip


def test_word_footnotes() -> None:
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/footnotes"
    data = with_member(
        make_docx(),
        "word/document.xml",
        {"<w:t>Delete the folder.</w:t>": '<w:t>Delete</w:t><w:footnoteReference w:id="2"/>'},
    )
    data = with_member(
        data,
        "word/_rels/document.xml.rels",
        {"</Relationships>": f'<Relationship Id="f1" Type="{kind}" Target="footnotes.xml"/></Relationships>'},
    )
    data = with_member(
        data,
        "[Content_Types].xml",
        {"</Types>": '<Override PartName="/word/footnotes.xml" ContentType="application/xml"/></Types>'},
    )
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["word/footnotes.xml"] = (
        f'<w:footnotes xmlns:w="{W}"><w:footnote w:id="2"><w:p><w:r><w:t>Or move it.</w:t></w:r></w:p></w:footnote></w:footnotes>'
    ).encode()
    assert shown("a.docx", zipped(members))[-1][2] == "Remove\n\nDelete[2]\n[2] Or move it."


def test_slides_are_pages() -> None:
    assert shown("a.pptx") == [
        (("Undo",), 1, "Undo\n\nReset softly\nKeep the changes\n\nNotes: Say why."),
        (("Options",), 2, "Options\n\nOption | Meaning\n--soft | keeps files"),
        (("Slide 3",), 3, "No title here"),
    ]


def test_damaged_slide() -> None:
    data = with_member(SAMPLES["a.pptx"], "ppt/slides/slide2.xml", {"<p:cSld>": "<p:cSld", "</p:cSld>": ""})
    assert [page for _, page, _ in shown("a.pptx", data)] == [1, 3]


def test_sheets() -> None:
    assert shown("a.xlsx") == [
        (("People",), None, "Name | Age\nAda | 36\nAlan | 41.5\n\nCity\nLondon"),
        (("Prices",), None, "Bread | 3"),
    ]
    document = read_document("a.xlsx", SAMPLES["a.xlsx"])
    assert [(header.text, document.lines[header.first : header.end]) for header in document.repeated_headers] == [
        ("Name | Age", ["Ada | 36", "Alan | 41.5"]),
        ("City", ["London"]),
    ]


def test_book() -> None:
    assert shown("a.epub") == [
        (
            ("Moby-Dick (Herman Melville)", "Loomings"),
            None,
            "Moby-Dick (Herman Melville)\n\nLoomings\n\nCall me Ishmael.",
        ),
        (
            ("Moby-Dick (Herman Melville)", "The Carpet-Bag", "New Bedford"),
            None,
            "The Carpet-Bag\n\nNew Bedford\n\nI stuffed a shirt or two.",
        ),
    ]


def test_missing_chapter_and_hostile_paths() -> None:
    spine = {"gone.xhtml": "x", "../../../../etc/passwd": "<p>in the archive</p>", "two.xhtml": "<p>Two.</p>"}
    data = with_member(make_book(spine), "OEBPS/content.opf", {"text/gone.xhtml": "text/other.xhtml"})
    texts = [text for _, _, text in shown("a.epub", data)]
    assert texts[-1].endswith("Two.")
    assert not any("root:" in text for text in texts)


def test_an_encrypted_book() -> None:
    def listing(name: str) -> dict[str, str]:
        return {
            "META-INF/encryption.xml": f'<encryption><EncryptedData><CipherData><CipherReference URI="OEBPS/{name}"/></CipherData></EncryptedData></encryption>'
        }

    with pytest.raises(BrokenFileError, match="an encrypted EPUB book"):
        read_document("a.epub", make_book(extra=listing("text/two.xhtml")))
    assert len(shown("a.epub", make_book(extra=listing("fonts/a.otf")))) == 2


def test_opendocument_text() -> None:
    assert shown("a.odt") == [
        (("Undo",), None, "Undo\n\nReset softly or not.\n- keep\n- drop"),
        (("Undo", "Options"), None, "Options\n\nOption | Meaning\n--soft | keeps"),
    ]


def test_opendocument_slides_and_encryption() -> None:
    body = '<draw:page draw:name="First"><text:p>one</text:p></draw:page><draw:page><text:p>two</text:p><presentation:notes><text:p>say why</text:p></presentation:notes></draw:page>'
    assert shown("a.odp", make_odt(body, kind="presentation")) == [
        (("First",), 1, "one"),
        (("Slide 2",), 2, "two\n\nsay why"),
    ]
    with pytest.raises(BrokenFileError, match="an encrypted OpenDocument"):
        read_document("a.odt", make_odt(extra={"META-INF/manifest.xml": "<manifest><encryption-data/></manifest>"}))


def test_rtf() -> None:
    assert shown("a.rtf") == [((), None, "Reset softly.\nKeep the café open €.")]


def test_notebook() -> None:
    chunks = chunks_of("a.ipynb", SAMPLES["a.ipynb"])
    assert [(chunk.heading_path, chunk.text) for chunk in chunks] == [
        (("Analysis",), '# Analysis\n\nLoad the *data*.\n\nimport os\n\nprint("é\\n")'),
        (("Analysis", "Results"), "## Results\n\nAll is well."),
    ]
    lines = SAMPLES["a.ipynb"].decode().split("\n")
    assert "# Analysis" in lines[chunks[0].first_line - 1]  # type: ignore[operator]
    assert "print" in lines[chunks[0].last_line - 1]  # type: ignore[operator]


def test_old_notebook() -> None:
    cells = [{"cell_type": "code", "input": ["x = 1"], "outputs": []}, {"cell_type": "markdown", "source": ["# T"]}]
    data = json.dumps({"worksheets": [{"cells": cells}], "nbformat": 3}).encode()
    assert read_document("a.ipynb", data).lines == ["x = 1", "", "# T"]


source = st.lists(
    st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"), exclude_characters="\ufffe\uffff")), max_size=6
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["code", "markdown", "raw"]), source, st.booleans()), min_size=1, max_size=5),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_notebook_lines(cells: list[tuple[str, list[str], bool]], indent: int | None, ascii_only: bool) -> None:
    notebook = {
        "metadata": {"cells": [{"source": "not this"}]},
        "cells": [
            {
                "outputs": [{"text": lines, "source": lines}],
                "source": "\n".join(lines) if joined else [line + "\n" for line in lines],
                "cell_type": kind,
            }
            for kind, lines, joined in cells
        ],
    }
    text = json.dumps(notebook, indent=indent, ensure_ascii=ascii_only)
    expected = [line for _, lines, _ in cells for line in lines if line.strip()]
    if not expected:
        with pytest.raises(NotTextError):
            read_document("a.ipynb", text.encode())
        return
    document = read_document("a.ipynb", text.encode())
    assert [line for line in document.lines if line.strip()] == expected
    of_file = split_lines(text)
    assert document.spans is not None
    for line, (first, last) in zip(document.lines, document.spans, strict=True):
        if line.strip():
            assert first == last
            assert json.dumps(line, ensure_ascii=ascii_only)[1:-1] in of_file[first - 1]


def test_mail() -> None:
    chunks = chunks_of("a.eml", SAMPLES["a.eml"])
    assert [(chunk.heading_path, chunk.text) for chunk in chunks] == [
        (
            ("Undo the löst commit",),
            "Undo the löst commit\nFrom: Ada Lovelace <ada@example.org>\nDate: Thu, 01 Jan 2026 10:00:00 +0000\n\n"
            "Reset softly to the commit before it.\n\nOr not.\n\n--- a\n+++ b",
        )
    ]
    lines = SAMPLES["a.eml"].decode().split("\n")
    document = read_document("a.eml", SAMPLES["a.eml"])
    assert document.spans is not None
    for text in ("Or not.", "+++ b", "Date: Thu, 01 Jan 2026 10:00:00 +0000"):
        first, last = document.spans[document.lines.index(text)]
        assert lines[first - 1 : last] == [text]


def test_mailbox() -> None:
    chunks = chunks_of("a.mbox", SAMPLES["a.mbox"])
    assert [(chunk.heading_path, chunk.first_line) for chunk in chunks] == [(("Bread",), 2), (("Öfen",), 9)]
    assert chunks[0].text == "Bread\nFrom: Ada\n\nBake it for forty minutes.\n>From the top."
    lines = SAMPLES["a.mbox"].decode().split("\n")
    assert chunks[1].last_line is not None
    body = "".join(lines[chunks[1].last_line - 4 : chunks[1].last_line])
    assert base64.b64decode(body).decode().splitlines() == chunks[1].text.split("\n")[2:]


def message(*lines: str, **headers: str) -> bytes:
    head = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*head, "", *lines]).encode("latin-1")


def test_mail_in_quoted_printable_and_html() -> None:
    data = message(
        "<html><head><meta charset=utf-16></head><body><p>Der =C3=96fen =", "ist hei=C3=9F</p>", "<p>zwei</p><script>never()</script>",
        Subject="x", Content_Type="text/html; charset=utf-8", Content_Transfer_Encoding="quoted-printable",
    )  # fmt: skip
    document = read_document("a.eml", data)
    assert document.lines == ["x", "", "Der Öfen ist heiß", "", "zwei"]
    assert document.spans == [(1, 1), (1, 1), (5, 6), (5, 6), (7, 7)]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (message("héllo", Subject="s", Content_Type="text/plain; charset=iso-8859-1"), "héllo"),
        (message("héllo", Subject="s", Content_Type="text/plain; charset=no-such"), "héllo"),
        (message("text", Subject="=?bad?q?x?=", From="a\0b"), "text"),
        (message("YWJj!!!ZGVm", "Z", Subject="s", Content_Transfer_Encoding="base64"), "abcdef"),
        (
            message(
                "--x", "Content-Type: text/plain", "", "inside", Subject="s", Content_Type="multipart/mixed; boundary=x"
            ),
            "inside",
        ),
        (
            message(
                "--x",
                "Content-Type: message/rfc822",
                "",
                "Subject: within",
                "",
                "deep",
                "--x--",
                Subject="s",
                Content_Type="multipart/mixed; boundary=x",
            ),
            "deep",
        ),
        (b"From a Thu Jan 1 10:00:00 2026\nSubject: s\n\nbody\n", "body"),
    ],
)
def test_odd_mail(data: bytes, text: str) -> None:
    document = read_document("a.eml", data)
    assert document.lines[-1] == text
    assert document.spans is not None
    assert all(1 <= first <= last <= data.count(b"\n") + 1 for first, last in document.spans)


def test_pdf_outline() -> None:
    assert shown("a.pdf") == [
        (("Chapter One", "Undo"), 2, "Reset softly to the commit before it."),
        (("Remove",), 3, "Delete the folder."),
    ] or shown("a.pdf")[-1] == (("Remove",), 3, "Delete the folder.")
    document = read_document("a.pdf", SAMPLES["a.pdf"])
    assert [(h.line, h.level, h.title, h.height) for h in document.headings] == [
        (0, 1, "Chapter One", 1), (1, 2, "Undo", 0), (2, 1, "Remove", 0),
    ]  # fmt: skip


def test_damaged_page(monkeypatch: pytest.MonkeyPatch) -> None:
    import pypdfium2

    get_page = pypdfium2.PdfDocument.get_page

    def failing(pdf: pypdfium2.PdfDocument, number: int) -> pypdfium2.PdfPage:
        if number == 1:
            raise KeyError("/Font")
        return get_page(pdf, number)

    monkeypatch.setattr(pypdfium2.PdfDocument, "__getitem__", failing)
    document = read_document("a.pdf", SAMPLES["a.pdf"])
    assert document.pages == [1, 3]
