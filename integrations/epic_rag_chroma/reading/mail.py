"""Read e-mail (.eml, .emlx), web archives (.mht) and mailboxes: the subject as a heading, sender and date, the text.

Plain text is preferred to HTML, unless it lacks most of the words. Attachments are skipped unless they are plain text
(a patch, for example). Lines refer to the file; for a part in base64 they are the lines of the whole part.
"""

from __future__ import annotations

import binascii
import re
from contextlib import suppress
from email.errors import HeaderParseError
from email.header import decode_header
from email.message import Message
from email.parser import Parser
from email.policy import compat32
from quopri import decodestring

from epic_rag_chroma.reading.containers import DocumentBuilder, Parts, parsing, printable
from epic_rag_chroma.reading.document import (
    BrokenFileError,
    Document,
    NotTextError,
    SplitCost,
    split_lines,
    text_split_costs,
)
from epic_rag_chroma.reading.encoding import decode, decode_labelled
from epic_rag_chroma.reading.html import read_html

__all__ = ["is_stub", "read_email", "read_mailbox"]


_FORMAT = "e-mail message"
_MAILBOX = "mailbox"
# The line before each message of a mailbox: sender and date, at the top or after an empty line.
_SEPARATOR = re.compile(rb"(?:\A|(?<=\n\n))From [^\n]*\d{4}[^\n]*\n")
_SHOWN = ("From", "To", "Cc", "Date")
_SIGNS = ("From", "To", "Subject", "Date", "Received", "Message-ID", "MIME-Version")
_NEVER = frozenset({"text/calendar", "text/vcard", "text/x-vcard", "text/rfc822-headers", "text/css", "text/rtf"})

_WORD = re.compile(r"\w+")
# A plain text with less of the words of the HTML beside it is no alternative to it, unless it is much longer.
_SHARED_WORDS = 0.5
_MUCH_LONGER = 2.5
# Apple Mail's files begin with the length of the message.
_LENGTH = re.compile(rb"\s*(\d{1,12})[ \t]*\n")

# Lines of a part, each with the first and last line of the file that it comes from.
_LinesWithSpans = list[tuple[str, tuple[int, int]]]


def read_email(data: bytes) -> Document:
    """Read an .eml, .emlx or .mht file."""
    out = DocumentBuilder(_FORMAT)
    if b"\0" in data[:100]:  # saved as UTF-16 text
        with suppress(NotTextError):
            data = decode(data).encode()
    data = _with_line_feeds(data)
    before = 0
    length = _LENGTH.match(data)
    if length is not None:
        before = data.count(b"\n", 0, length.end())
        end = data.find(b"<?xml", length.end() + int(length.group(1)) // 2)  # a property list follows the message
        data = data[length.end() : end if end >= 0 else len(data)]
    with parsing(_FORMAT):
        _Reader(data, before, out).read()
    return out.document(paged=False)


def read_mailbox(data: bytes) -> Document:
    """Read an .mbox file; damaged messages are skipped."""
    data = _with_line_feeds(data)
    starts = [match.span() for match in _SEPARATOR.finditer(data)]
    if not starts:
        raise BrokenFileError(f"not a {_MAILBOX}: no line that begins a message")
    out = DocumentBuilder(_MAILBOX)
    parts = Parts()
    line, counted = 0, 0
    for (_, first), (end, _) in zip(starts, [*starts[1:], (len(data), 0)], strict=True):
        line += data.count(b"\n", counted, first)
        counted = first
        with parts.part(f"{_FORMAT} at line {line + 1}"):
            _Reader(data[first:end], line, out).read()
    parts.check()
    return out.document(paged=False)


def _with_line_feeds(data: bytes) -> bytes:
    """Normalise line ends, so that lines are counted as in editors."""
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


class _Reader:
    """Reads one message.

    Args:
        data: The bytes of the message.
        before: The number of lines of the file before it.
        out: The builder that gets the text.
    """

    def __init__(self, data: bytes, before: int, out: DocumentBuilder) -> None:
        # latin-1: one character a byte, so that the raw text of a part can be located and encoded again.
        self._raw = data.decode("latin-1")
        self._message: Message = Parser(policy=compat32).parsestr(self._raw)
        self._position = 0
        self._line = before + 1
        self._last = self._line + self._raw.count("\n")
        self._out = out

    def read(self) -> None:
        """Add the message to the document."""
        if not any(name in self._message for name in _SIGNS):
            raise BrokenFileError(f"not an {_FORMAT}: none of its headers")
        self._headers(self._message, 1)
        self._skip_headers()
        self._part(self._message, 1)

    def _headers(self, message: Message, level: int) -> None:
        """Add the headers of a message, whose block begins at the current position."""
        places = self._header_places()
        subject = _header(message, "Subject")
        if subject:
            self._out.heading(subject, level, span=places.get("subject", (self._line, self._line)))
        else:
            self._out.section("(no subject)", level)
        for name in _SHOWN:
            value = _header(message, name)
            if value:
                place = places.get(name.lower(), (self._line, self._line))
                self._out.text(f"{name}: {value}", cost=SplitCost.INSIDE if subject else SplitCost.LINE, span=place)

    def _skip_headers(self) -> None:
        """Move the position from the beginning of a block of headers to the body below it."""
        if self._raw.startswith("\n", self._position):
            self._skip(1)
            return
        end = self._raw.find("\n\n", self._position)
        self._skip((end + 2 if end >= 0 else len(self._raw)) - self._position)

    def _header_places(self) -> dict[str, tuple[int, int]]:
        """Return the first and last line of each header of the block at the current position."""
        places: dict[str, tuple[int, int]] = {}
        name = ""
        end = self._raw.find("\n\n", self._position)
        block = self._raw[self._position : end if end >= 0 else len(self._raw)]
        for number, line in enumerate(block.split("\n"), start=self._line):
            if line[:1] in (" ", "\t") and name in places:
                places[name] = (places[name][0], number)
            else:
                name = line.partition(":")[0].strip().lower()
                places.setdefault(name, (number, number))
        return places

    def _part(self, part: Message, level: int) -> None:
        """Add a part of a message, whose body begins at the current position."""
        kind = part.get_content_type()
        payload = part.get_payload()
        if kind == "message/rfc822" and isinstance(payload, list):
            for message in payload:
                if isinstance(message, Message):
                    self._headers(message, level + 1)
                    self._skip_headers()
                    self._part(message, level + 1)
        elif isinstance(payload, list):
            parts = [child for child in payload if isinstance(child, Message)]
            chosen = _alternative(parts) if kind == "multipart/alternative" else parts
            boundary = part.get_boundary()
            for child in parts:
                self._enter(boundary)
                if child in chosen:
                    self._part(child, level)
        elif isinstance(payload, str) and kind.startswith("text/") and kind not in _NEVER and payload.strip():
            if part.get_content_disposition() == "attachment" and kind == "text/html":
                return
            self._advance(payload)
            # In a damaged message the parser's text may not be where it seems to be.
            self._text(
                [
                    (line, (min(first, self._last), min(last, self._last)))
                    for line, (first, last) in self._decoded(part, payload)
                ],
                kind,
                level,
            )
            self._skip(len(payload))

    def _text(self, located: _LinesWithSpans, kind: str, level: int) -> None:
        lines = [line for line, _ in located]
        if kind == "text/html":
            page = read_html("\n".join(lines))
            spans = [
                (located[first - 1][1][0], located[min(last, len(located)) - 1][1][1])
                for first, last in page.spans or []
            ]
            self._out.add_document(Document(page.lines, page.split_costs, page.headings, spans=spans), level=level)
        else:
            spans = [place for _, place in located]
            self._out.add_document(Document(lines, text_split_costs(lines), spans=spans))

    def _decoded(self, part: Message, payload: str) -> _LinesWithSpans:
        """Decode a part into lines with their spans in the file."""
        charset = part.get_content_charset()
        encoding = str(part.get("Content-Transfer-Encoding", "")).strip().lower()
        raw = payload.split("\n")
        if encoding == "base64":
            place = (self._line, self._line + payload.rstrip("\n").count("\n"))
            return [(line, place) for line in split_lines(printable(decode_labelled(_base64(payload), charset)))]
        places: list[tuple[int, int]] = []
        contents: list[bytes] = []
        start = 0
        for number, line in enumerate(raw):
            if encoding == "quoted-printable" and line.rstrip().endswith("=") and number < len(raw) - 1:
                continue  # continued on the next line
            joined = "\n".join(raw[start : number + 1]).encode("latin-1")
            content = decodestring(joined) if encoding == "quoted-printable" else joined
            for piece in content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"):
                contents.append(piece)
                places.append((self._line + start, self._line + number))
            start = number + 1
        # Decoded as a whole: a line alone is too little evidence for the charset.
        lines = decode_labelled(b"\n".join(contents), charset).split("\n")
        if len(lines) != len(places):  # the line ends of a multi-byte charset
            places = [(places[0][0], places[-1][1])] * len(lines)
        return [
            (text, place) for line, place in zip(lines, places, strict=True) for text in split_lines(printable(line))
        ]

    def _enter(self, boundary: str | None) -> None:
        """Move the position behind the next delimiter of a multipart and the headers below it."""
        if boundary:
            delimiter = re.compile(rf"^--{re.escape(boundary)}[ \t]*(?:\n|\Z)", re.MULTILINE)
            found = delimiter.search(self._raw, self._position)
            if found is not None:
                self._skip(found.end() - self._position)
                self._skip_headers()

    def _advance(self, text: str) -> None:
        """Move the position to a text, if it is found."""
        found = self._raw.find(text, self._position) if text else -1
        if found >= 0:
            self._skip(found - self._position)

    def _skip(self, length: int) -> None:
        self._line += self._raw.count("\n", self._position, self._position + length)
        self._position += length


def _base64(payload: str) -> bytes:
    letters = re.sub(r"[^A-Za-z0-9+/]", "", payload)
    letters = letters[: len(letters) - (len(letters) % 4 == 1)] + "=" * (-len(letters) % 4 % 3)  # if truncated
    return binascii.a2b_base64(letters)


def _alternative(parts: list[Message]) -> list[Message]:
    """Return the alternative to read: the plain text if it has the words of the richest one, which is the last."""
    plain = [part for part in parts if part.get_content_type() == "text/plain" and str(part.get_payload()).strip()]
    for part in reversed(parts):
        leaf = next((leaf for leaf in part.walk() if leaf.get_content_type() == "text/html"), None)
        if leaf is not None:
            if not plain or is_stub(_content(plain[0]), " ".join(read_html(_content(leaf)).lines)):
                return [part]
            break
    return plain[:1] or parts[-1:]


def is_stub(plain: str, rich: str) -> bool:
    """Return whether a plain text lacks most words of the text of the HTML beside it, and is not much longer."""
    words, plain_words = (set(_WORD.findall(text.lower())) for text in (rich, plain))
    return len(words & plain_words) < _SHARED_WORDS * len(words) and len(plain_words) < _MUCH_LONGER * len(words)


def _content(part: Message) -> str:
    """Return the decoded text of a part."""
    content = part.get_payload(decode=True)
    return decode_labelled(content if isinstance(content, bytes) else b"", part.get_content_charset())


def _header(message: Message, name: str) -> str:
    value = message.get(name)
    if value is None:
        return ""
    raw = decode_labelled(str(value).encode("latin-1", "replace"), None)
    with suppress(HeaderParseError, LookupError, ValueError):  # shown as it is
        parts = decode_header(raw)
        raw = "".join(
            part
            if isinstance(part, str)
            else decode_labelled(part, charset)
            if charset
            else part.decode("raw-unicode-escape")
            for part, charset in parts
        )
    return " ".join(printable(raw).split())
