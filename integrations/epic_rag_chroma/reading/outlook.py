"""Read Outlook's messages (.msg): the subject as a heading, sender, recipients and date, the text, attached text.

A message is a compound file with a stream for each property, which olefile opens; the names of the streams are the tags
of MS-OXPROPS and the types of MS-OXCDATA. Appointments, contacts and tasks are messages too.
"""

from __future__ import annotations

import datetime
import io
import struct
from contextlib import suppress
from typing import Any

from epic_rag_chroma.reading.containers import DocumentBuilder, parsing, printable, requires
from epic_rag_chroma.reading.document import (
    BrokenFileError,
    Document,
    NotTextError,
    SplitCost,
    split_lines,
    text_split_costs,
)
from epic_rag_chroma.reading.encoding import decode_labelled
from epic_rag_chroma.reading.file_types import kind_of, unread_format
from epic_rag_chroma.reading.html import read_html
from epic_rag_chroma.reading.mail import is_stub, read_email

__all__ = ["read_outlook"]


_FORMAT = "Outlook message"
_PURPOSE = "reading Outlook messages"
_OLE = b"\xd0\xcf\x11\xe0"
_MAX_DEPTH = 10
# Tags of properties.
_SUBJECT, _BODY, _HTML, _RTF = "0037", "1000", "1013", "1009"
_SENDER, _SENDER_ADDRESS, _SENDER_SMTP = "0C1A", "0C1F", "5D01"
_TO, _CC = "0E04", "0E03"
_SUBMITTED, _DELIVERED, _CODE_PAGE, _HTML_CODE_PAGE = 0x0039, 0x0E06, 0x3FFD, 0x3FDE
_ATTACHED, _FILE_NAME, _SHORT_NAME = "3701", "3707", "3704"
_PROPERTIES = "__properties_version1.0"
_EPOCH = datetime.datetime(1601, 1, 1, tzinfo=datetime.timezone.utc)


def read_outlook(data: bytes) -> Document:
    """Read a .msg file, or an e-mail message of that name, as some programs write them."""
    if not data.startswith(_OLE):
        return read_email(data)
    with requires("olefile", _PURPOSE):
        import olefile  # type: ignore[import-untyped]
    out = DocumentBuilder(_FORMAT)
    with parsing(_FORMAT), olefile.OleFileIO(io.BytesIO(data)) as file:
        if not file.exists(_PROPERTIES):
            raise BrokenFileError(f"a broken {_FORMAT}: it has no properties")
        _Message(file, [], out, 1).read()
        return out.document()


class _Message:
    """A message, or one that is attached to another.

    Args:
        file: The compound file.
        place: The names of the storages that it is in.
        out: The builder that gets the text.
        level: The level of the subject.
    """

    def __init__(self, file: Any, place: list[str], out: DocumentBuilder, level: int) -> None:
        self._file = file
        self._place = place
        self._out = out
        self._level = level
        self._fixed = self._fixed_properties(24 if place else 32)
        page = struct.unpack("<I", self._fixed.get(_CODE_PAGE, b"\xe4\x04\0\0")[:4])[0]
        self._charset = _charset(page)

    def read(self) -> None:
        """Add the message."""
        out = self._out
        subject = self._text(_SUBJECT)
        if subject.strip():
            out.heading(subject, self._level)
        else:
            out.section("(no subject)", self._level)
        address = self._text(_SENDER_SMTP) or self._text(_SENDER_ADDRESS)
        name = self._text(_SENDER)
        sender = f"{name} <{address}>" if name and "@" in address and address != name else name or address
        shown = {"From": sender, "To": self._text(_TO), "Cc": self._text(_CC), "Date": self._date()}
        for label, value in shown.items():
            if value.strip():
                out.text(f"{label}: {' '.join(value.split())}", cost=SplitCost.INSIDE)
        self._body()
        names = {entry[len(self._place)] for entry in self._file.listdir() if entry[: len(self._place)] == self._place}
        for attachment in sorted(name for name in names if name.lower().startswith("__attach_version1.0_")):
            self._attachment([*self._place, attachment])

    def _body(self) -> None:
        plain = self._text(_BODY)
        html = self._stream(f"{_HTML}0102", self._place)
        page = struct.unpack("<I", self._fixed.get(_HTML_CODE_PAGE, b"\0\0\0\0")[:4])[0]
        markup = decode_labelled(html, _charset(page) if page else None) if html else self._text(_HTML)
        packed = self._stream(f"{_RTF}0102", self._place)
        body: Document | None = None
        with suppress(NotTextError):
            if markup.strip():
                body = read_html(markup)
            elif packed and not plain.strip():
                with requires("compressed-rtf", _PURPOSE):
                    import compressed_rtf  # type: ignore[import-untyped]
                from epic_rag_chroma.reading.word import read_rtf

                body = read_rtf(compressed_rtf.decompress(packed))
        if body is None or (plain.strip() and not is_stub(plain, "\n".join(body.lines))):
            lines = split_lines(printable(plain))
            body = Document(lines, text_split_costs(lines))
        self._out.add_document(body, level=self._level)

    def _attachment(self, place: list[str]) -> None:
        inner = [*place, f"__substg1.0_{_ATTACHED}000D"]
        if self._file.exists("/".join([*inner, _PROPERTIES])):
            if self._level < _MAX_DEPTH:
                _Message(self._file, inner, self._out, self._level + 1).read()
            return
        name = self._text(_FILE_NAME, place) or self._text(_SHORT_NAME, place)
        content = self._stream(f"{_ATTACHED}0102", place)
        is_text = kind_of(name) in ("text", "markdown", "csv") and "." in name and not unread_format(name)
        if is_text and content and b"\0" not in content:
            lines = split_lines(printable(decode_labelled(content, None)))
            self._out.add_document(Document(lines, text_split_costs(lines)))

    def _stream(self, name: str, place: list[str]) -> bytes:
        path = "/".join([*place, f"__substg1.0_{name}"])
        return bytes(self._file.openstream(path).read()) if self._file.exists(path) else b""

    def _text(self, tag: str, place: list[str] | None = None) -> str:
        """Return a property that is a string, in one of the two encodings."""
        place = self._place if place is None else place
        wide = self._stream(f"{tag}001F", place)
        if wide:
            return wide.decode("utf-16-le", "replace").rstrip("\0")
        return decode_labelled(self._stream(f"{tag}001E", place).rstrip(b"\0"), self._charset)

    def _date(self) -> str:
        for tag in (_SUBMITTED, _DELIVERED):
            value = self._fixed.get(tag)
            if value is not None:
                moment = _EPOCH + datetime.timedelta(microseconds=struct.unpack("<Q", value)[0] // 10)
                return moment.strftime("%a, %d %b %Y %H:%M:%S +0000")
        return ""

    def _fixed_properties(self, header: int) -> dict[int, bytes]:
        """Return the values of the properties of a fixed size by tag."""
        path = "/".join([*self._place, _PROPERTIES])
        content = self._file.openstream(path).read() if self._file.exists(path) else b""
        return {
            struct.unpack_from("<H", content, at + 2)[0]: content[at + 8 : at + 16]
            for at in range(header, len(content) - 15, 16)
        }


def _charset(page: int) -> str:
    """Return the name of a Windows code page."""
    return {65001: "utf-8", 20127: "us-ascii", 28591: "iso-8859-1", 932: "shift_jis", 936: "gbk", 950: "big5"}.get(
        page, f"windows-{page}"
    )
