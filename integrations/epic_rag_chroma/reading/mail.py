"""Read e-mail (.eml) and mailboxes (.mbox): the subject as a heading, sender and date below it, then the text.

Plain text is preferred to HTML. Attachments are skipped unless they are plain text (a patch, for example). Lines refer
to the file; for a part in base64 they are the lines of the whole part.
"""

from __future__ import annotations

import binascii
import re
from contextlib import suppress
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import Message
from email.parser import Parser
from email.policy import compat32
from quopri import decodestring

from epic_rag_chroma.reading.containers import DocumentBuilder, Parts, parsing, printable
from epic_rag_chroma.reading.document import BrokenFileError, Document, SplitCost, split_lines, text_split_costs
from epic_rag_chroma.reading.html import read_html

__all__ = ["read_email", "read_mailbox"]


_FORMAT = "e-mail message"
_MAILBOX = "mailbox"
# The line before each message of a mailbox: sender and date, at the top or after an empty line.
_SEPARATOR = re.compile(rb"(?:\A|(?<=\n\n))From [^\n]*\d{4}[^\n]*\n")
_SHOWN = ("From", "To", "Cc", "Date")
_SIGNS = ("From", "To", "Subject", "Date", "Received", "Message-ID", "MIME-Version")
_NEVER = frozenset({"text/calendar", "text/vcard", "text/x-vcard", "text/rfc822-headers", "text/css", "text/rtf"})

# Lines of a part, each with the first and last line of the file that it comes from.
_LinesWithSpans = list[tuple[str, tuple[int, int]]]


def read_email(data: bytes) -> Document:
    """Read an .eml file."""
    out = DocumentBuilder(_FORMAT)
    with parsing(_FORMAT):
        _Reader(_with_line_feeds(data), 0, out).read()
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
        self._out = out

    def read(self) -> None:
        """Add the message to the document."""
        if not any(name in self._message for name in _SIGNS):
            raise BrokenFileError(f"not an {_FORMAT}: none of its headers")
        self._headers(self._message, 1)
        self._part(self._message, 1)

    def _headers(self, message: Message, level: int) -> None:
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
        kind = part.get_content_type()
        payload = part.get_payload()
        if kind == "message/rfc822" and isinstance(payload, list):
            for message in payload:
                if isinstance(message, Message):
                    self._advance(next((f"{name}:" for name in message), ""))
                    self._headers(message, level + 1)
                    self._part(message, level + 1)
        elif isinstance(payload, list):
            parts = [child for child in payload if isinstance(child, Message)]
            if kind == "multipart/alternative":
                # The plain text if it is not empty, else the last alternative, which is the richest.
                plain = [child for child in parts if child.get_content_type() == "text/plain"]
                plain = [child for child in plain if str(child.get_payload()).strip()]
                parts = plain[:1] or parts[-1:]
            for child in parts:
                self._part(child, level)
        elif isinstance(payload, str) and kind.startswith("text/") and kind not in _NEVER and payload.strip():
            if part.get_content_disposition() == "attachment" and kind == "text/html":
                return
            self._advance(payload)
            self._text(self._decoded(part, payload), kind, level)
            self._skip(len(payload))

    def _text(self, located: _LinesWithSpans, kind: str, level: int) -> None:
        lines = [line for line, _ in located]
        if kind == "text/html":
            # With a byte order mark, the parser ignores a <meta> with the previous encoding.
            page = read_html("\n".join(lines).encode("utf-8-sig", "replace"))
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
        charset = part.get_content_charset() or "utf-8"
        encoding = str(part.get("Content-Transfer-Encoding", "")).strip().lower()
        raw = payload.split("\n")
        if encoding == "base64":
            place = (self._line, self._line + payload.rstrip("\n").count("\n"))
            letters = re.sub(r"[^A-Za-z0-9+/]", "", payload)
            letters = letters[: len(letters) - (len(letters) % 4 == 1)] + "=" * (-len(letters) % 4 % 3)  # if truncated
            return [(line, place) for line in split_lines(_characters(binascii.a2b_base64(letters), charset))]
        located: _LinesWithSpans = []
        start = 0
        for number, line in enumerate(raw):
            if encoding == "quoted-printable" and line.rstrip().endswith("=") and number < len(raw) - 1:
                continue  # continued on the next line
            joined = "\n".join(raw[start : number + 1]).encode("latin-1")
            content = decodestring(joined) if encoding == "quoted-printable" else joined
            place = (self._line + start, self._line + number)
            located += [(text, place) for text in split_lines(_characters(content, charset))]
            start = number + 1
        return located

    def _advance(self, text: str) -> None:
        """Move the position to a text, if it is found."""
        found = self._raw.find(text, self._position) if text else -1
        if found >= 0:
            self._skip(found - self._position)

    def _skip(self, length: int) -> None:
        self._line += self._raw.count("\n", self._position, self._position + length)
        self._position += length


def _characters(content: bytes, charset: str) -> str:
    try:
        text = content.decode(charset, "replace")
    except (LookupError, ValueError):  # an unknown name, or a codec that is not for text
        text = content.decode("utf-8", "replace")
    return printable(text)


def _header(message: Message, name: str) -> str:
    value = message.get(name)
    if value is None:
        return ""
    raw = str(value)
    with suppress(UnicodeError):
        raw = raw.encode("latin-1").decode("utf-8")
    with suppress(HeaderParseError, LookupError, ValueError):  # shown as it is
        raw = str(make_header(decode_header(raw)))
    return " ".join(printable(raw).split())
