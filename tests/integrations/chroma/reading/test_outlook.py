"""Outlook's messages: headers, bodies in each form, attachments, damaged files."""

from __future__ import annotations

import struct

import pytest

from epic_rag_chroma.reading.document import BrokenFileError
from epic_rag_chroma.reading.reader import read_document
from tests.helpers.compound_files import Tree, compound_file, outlook_message

DATE = {0x0039: struct.pack("<Q", 133_555_000_000_000_000)}


def lines_of(tree: Tree) -> list[str]:
    return [line for line in read_document("a.msg", compound_file(tree)).lines if line]


def test_message() -> None:
    message = outlook_message(
        {"0037": "The lamp of the löighthouse", "0C1A": "Ada", "5D01": "ada@example.org", "0E04": "Bo; Cy", "0E03": "Di", "1000": "Oil is low.\r\n\r\nBring some."},
        fixed=DATE,
    )  # fmt: skip
    document = read_document("a.msg", compound_file(message))
    assert [(heading.level, heading.title) for heading in document.headings] == [(1, "The lamp of the löighthouse")]
    assert [line for line in document.lines if line] == [
        "The lamp of the löighthouse", "From: Ada <ada@example.org>", "To: Bo; Cy", "Cc: Di", "Date: Thu, 21 Mar 2024 13:06:40 +0000",
        "Oil is low.", "Bring some.",
    ]  # fmt: skip


def test_html_where_the_text_is_missing_or_only_refers_to_it() -> None:
    html = "<p>Kayaks are <b>reduced</b> this week at the quay of Lübeck</p>".encode()
    for plain in ("", "See the web version."):
        found = lines_of(outlook_message({"0037": "News", "1000": plain, "10130102": html}))
        assert found == ["News", "Kayaks are reduced this week at the quay of Lübeck"]
    same = "Kayaks are reduced this week at the quay of Lübeck"
    assert lines_of(outlook_message({"0037": "News", "1000": same, "10130102": html})) == ["News", same]


def test_text_in_an_old_code_page() -> None:
    message = outlook_message(
        {"0037001E": "Größe".encode("cp1252"), "1000001E": "Привет".encode("cp1251")},
        fixed={0x3FFD: struct.pack("<Q", 1251)},
    )
    assert lines_of(message)[1] == "Привет"


def test_text_in_compressed_rich_text() -> None:
    import compressed_rtf

    packed = compressed_rtf.compress(b"{\\rtf1\\ansi Reset softly.\\par}", compressed=True)
    assert lines_of(outlook_message({"0037": "Undo", "10090102": packed})) == ["Undo", "Reset softly."]


def test_attachments() -> None:
    inner = outlook_message({"0037": "Inner subject", "1000": "Inner text."}, within=True)
    attachments: list[Tree] = [
        {"__substg1.0_3707001F": "notes.txt".encode("utf-16-le"), "__substg1.0_37010102": b"Attached text.\n"},
        {"__substg1.0_3707001F": "a.png".encode("utf-16-le"), "__substg1.0_37010102": b"\x89PNG" * 2000},
        {"__substg1.0_3701000D": inner},
    ]
    message = outlook_message({"0037": "Outer", "1000": "Outer text."}, attachments=attachments)
    document = read_document("a.msg", compound_file(message))
    assert [line for line in document.lines if line] == [
        "Outer",
        "Outer text.",
        "Attached text.",
        "Inner subject",
        "Inner text.",
    ]
    assert [(heading.level, heading.title) for heading in document.headings] == [(1, "Outer"), (2, "Inner subject")]


def test_a_long_body_and_no_subject() -> None:
    body = "\n".join(f"Line {number} of a long text." for number in range(2000))
    document = read_document("a.msg", compound_file(outlook_message({"1000": body})))
    assert document.lines == body.split("\n")
    assert document.headings[0].title == "(no subject)"


@pytest.mark.parametrize("cut", [512, 1000, 1600, 2500])
def test_damaged(cut: int) -> None:
    data = compound_file(outlook_message({"0037": "Undo", "1000": "Reset softly."}))
    with pytest.raises(BrokenFileError, match="Outlook message"):
        read_document("a.msg", data[:-cut])
    with pytest.raises(BrokenFileError, match="a broken Outlook message"):
        read_document("a.msg", compound_file({"other": b"x"}))
