"""E-mail: charsets, alternatives, lines of messages inside messages, other files of messages."""

from __future__ import annotations

import base64
import quopri
from email.header import Header

import pytest

from epic_rag_chroma.reading.document import BrokenFileError
from epic_rag_chroma.reading.reader import read_document


def mail(body: bytes, subject: str = "s", **headers: str) -> bytes:
    head = [f"Subject: {subject}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\n".join(head).encode() + b"\n\n" + body


def last_line(data: bytes) -> str:
    return read_document("a.eml", data).lines[-1]


GREETINGS = {
    "iso-8859-1": ("She paid €5 – “fine”", "cp1252"),
    "us-ascii": ("naïve – café", "cp1252"),
    "iso-8859-9": ("Işık – €", "cp1254"),
    "gb2312": ("镕基喆 €", "gb18030"),
    "gbk": ("𠮷野家", "gb18030"),
    "shift_jis": ("髙橋①", "cp932"),
    "ks_c_5601-1987": ("똠방각하", "cp949"),
    "iso-8859-8-i": ("שלום עולם", "iso8859_8"),
    "windows-874": ("สวัสดี", "cp874"),
    "x-unknown": ("Grüße aus Köln und Umgebung", "cp1252"),
    "iso-2022-jp": ("こんにちは", "iso2022_jp"),
    "utf-8": ("Grüße aus Köln, schöne Tage", "cp1252"),  # its bytes contradict the label
    "windows-1252": ("Grüße und łódź", "utf-8"),
    "": ("Schöne Feiertage wünscht Zoë", "utf-8"),
}


@pytest.mark.parametrize("label", GREETINGS)
@pytest.mark.parametrize("encoding", ["8bit", "base64", "quoted-printable"])
def test_charsets(label: str, encoding: str) -> None:
    text, codec = GREETINGS[label]
    body = text.encode(codec)
    if encoding != "8bit":
        body = base64.encodebytes(body) if encoding == "base64" else quopri.encodestring(body)
    kind = f'text/plain; charset="{label}"' if label else "text/plain"
    data = mail(body, Content_Type=kind, Content_Transfer_Encoding=encoding)
    assert last_line(data) == text


@pytest.mark.parametrize(
    ("raw", "subject"),
    [
        ("=?gb2312?B?6Ua7+Q==?=", "镕基"),
        ("=?iso-8859-1?Q?=80_5_=96_=93fine=94?=", "€ 5 – “fine”"),
        (Header("Ein längerer Betreff über Öfen und Züge, der zwei Zeilen braucht", "utf-8").encode(), "Ein längerer Betreff über Öfen und Züge, der zwei Zeilen braucht"),
        ("=?utf-8?B?5pel?= =?utf-8?B?5pys?=", "日本"),
        ("=?utf-8?B?5pc=?=\n =?utf-8?B?pQ==?=", "日"),
        ("plain =?utf-8?Q?caf=C3=A9?= end", "plain café end"),
    ],
)  # fmt: skip
def test_subjects(raw: str, subject: str) -> None:
    assert read_document("a.eml", mail(b"x", raw)).lines[0] == subject


def test_subject_in_8_bits() -> None:
    assert read_document("a.eml", "Subject: Grüße\n\nx".encode()).lines[0] == "Grüße"
    assert (
        read_document("a.eml", "Subject: Grüße aus Köln und Würzburg\n\nx".encode("latin-1")).lines[0]
        == "Grüße aus Köln und Würzburg"
    )


def alternative(plain: str, html: str) -> list[str]:
    body = f"--X\nContent-Type: text/plain\n\n{plain}\n--X\nContent-Type: multipart/related; boundary=Y\n\n--Y\nContent-Type: text/html\n\n{html}\n--Y--\n--X--\n"
    data = mail(body.encode(), MIME_Version="1.0", Content_Type="multipart/alternative; boundary=X")
    document = read_document("a.eml", data)
    assert document.spans is not None
    of_file = data.decode().split("\n")
    for line, (first, last) in zip(document.lines[1:], document.spans[1:], strict=True):
        assert all(word in "\n".join(of_file[first - 1 : last]) for word in line.split())
    return [line for line in document.lines[1:] if line]


@pytest.mark.parametrize(
    ("plain", "html", "shown"),
    [
        ("Forty boats are for sale.", "<p>Forty <b>boats</b> are for sale.</p>", ["Forty boats are for sale."]),
        ("Please view this message in a browser.", "<h1>Sale</h1><p>Forty boats and six canoes are cheap.</p>", ["Sale", "Forty boats and six canoes are cheap."]),
        (" \n", "<p>Forty boats</p>", ["Forty boats"]),
        ("A long text of the message, with many more words than the other part has in all.", "<p>Only boats</p>", ["A long text of the message, with many more words than the other part has in all."]),
    ],
)  # fmt: skip
def test_alternatives(plain: str, html: str, shown: list[str]) -> None:
    assert alternative(plain, html) == shown


@pytest.mark.parametrize("kind", ["multipart/mixed", "multipart/digest", "multipart/report"])
def test_lines_of_messages_inside_messages(kind: str) -> None:
    part = (
        "--B\nContent-Type: message/rfc822\n\nFrom: {0}@example.org\nSubject: {0}\nTo: x@example.org\n\nText of {0}\n\n"
    )
    head = "From: x@example.org\nTo: x@example.org\nSubject: outer\nMIME-Version: 1.0\n"
    text = f"{head}Content-Type: {kind}; boundary=B\n\npreamble\n{part.format('one')}{part.format('two')}--B--\n"
    document = read_document("a.eml", text.encode())
    of_file = text.split("\n")
    assert document.spans is not None
    for line, (first, last) in zip(document.lines, document.spans, strict=True):
        if line:
            assert first == last
            assert line in of_file[first - 1]
    assert [heading.title for heading in document.headings] == ["outer", "one", "two"]


def test_apple_mail_and_web_archives() -> None:
    message = mail(b"Hello there.")
    data = (
        f"{len(message)}\n".encode()
        + message
        + b'\n<?xml version="1.0"?>\n<plist><dict><key>flags</key></dict></plist>\n'
    )
    document = read_document("a.emlx", data)
    assert (document.lines, (document.spans or [])[-1]) == (["s", "", "Hello there."], (4, 4))
    page = 'From: <Saved by a browser>\nSubject: Pumps\nMIME-Version: 1.0\nContent-Type: multipart/related; boundary=B\n\n--B\nContent-Type: text/html\nContent-Transfer-Encoding: quoted-printable\n\n<p class=3D"x">Open the tap.\n--B\nContent-Type: text/css\n\na {}\n--B--\n'
    assert read_document("a.mhtml", page.encode()).lines[-1] == "Open the tap."


def test_outlook() -> None:
    with pytest.raises(BrokenFileError, match="a broken Outlook message"):
        read_document("a.msg", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))
    assert read_document("a.msg", mail(b"A message as text.")).lines[-1] == "A message as text."


@pytest.mark.parametrize("plain", ["", "See the web version.\n"])
def test_an_invitation_is_read_where_the_calendar_is_the_last_alternative(plain: str) -> None:
    parts = [
        ("text/plain", plain),
        ("text/html", "<p>We meet in the boat house on Monday at ten</p>"),
        ("text/calendar", "BEGIN:VCALENDAR"),
    ]
    body = "".join(f"--b\nContent-Type: {kind}\n\n{text}\n" for kind, text in parts)
    data = f'Subject: Invitation\nContent-Type: multipart/alternative; boundary="b"\n\n{body}--b--\n'.encode()
    assert read_document("a.eml", data).lines[-1] == "We meet in the boat house on Monday at ten"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_message_that_was_saved_as_utf_16(encoding: str) -> None:
    data = "Subject: Lübeck\nContent-Type: text/plain; charset=utf-8\n\nDie Fähre fährt.\n".encode(encoding)
    assert [line for line in read_document("a.eml", data).lines if line] == ["Lübeck", "Die Fähre fährt."]
