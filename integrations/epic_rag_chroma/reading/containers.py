"""Shared parts of the readers of container formats: safe XML, safe zip archives, and a builder of documents.

XML is parsed without entities, DTDs or network access. A zip archive is opened in memory, its headers are checked
against limits before anything is decompressed, and it is never unpacked to the file system. `zipfile` returns no more
of a member than the header announces, so a header that lies costs no memory and fails the member's checksum. `parsing`
turns whatever a parser raises on a damaged file into a `BrokenFileError`.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from epic_rag.errors import EpicError, needs_extra
from epic_rag_chroma.reading.document import (
    BrokenFileError,
    Document,
    Heading,
    NotTextError,
    RepeatedHeader,
    SplitCost,
    Substitution,
    clean_title,
    split_lines,
    text_split_costs,
)

if TYPE_CHECKING:
    from lxml.etree import _Element

__all__ = [
    "EQUATION_MARKS",
    "MAX_CHARACTERS",
    "Archive",
    "DocumentBuilder",
    "Parts",
    "attribute",
    "children",
    "local_name",
    "parse_xml",
    "parsing",
    "printable",
    "requires",
]


def requires(package: str, purpose: str) -> AbstractContextManager[None]:
    """Return `needs_extra` for a package that reads a format."""
    return needs_extra("index", purpose, package)


def parse_xml(data: bytes, purpose: str) -> _Element:
    """Parse untrusted XML and return the root element; the purpose is for the error message if lxml is missing.

    Raises:
        MissingExtraError: If lxml is not installed.
        lxml.etree.XMLSyntaxError: If the XML is not well-formed.
    """
    with requires("lxml", purpose):
        from lxml import etree
    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        remove_comments=True,
        remove_pis=True,
        huge_tree=False,
    )
    return etree.fromstring(data, parser)


def local_name(element: _Element) -> str:
    """Return the name of an element without its namespace; "" for other nodes (an unexpanded entity)."""
    tag: object = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def attribute(element: _Element, name: str) -> str:
    """Return an attribute by its name without namespace; "" if there is none."""
    for key, value in element.attrib.items():
        if str(key).rpartition("}")[2] == name:
            return str(value)
    return ""


# Marks between the parts of an equation, which stands on one line: a fraction, an exponent, an index.
EQUATION_MARKS = {"den": "/", "sup": "^", "sub": "_"}


def children(element: _Element, *names: str) -> Iterator[_Element]:
    """Yield the children with one of these names (without namespace)."""
    for child in element:
        if local_name(child) in names:
            yield child


# A large presentation has a few thousand members, a workbook or a book fewer.
MAX_MEMBERS = 20_000
# The XML tree of a member takes about ten times its size in memory.
MAX_MEMBER_BYTES = 128 * 2**20
MAX_TOTAL_BYTES = 512 * 2**20
# Deflate reaches at most 1032; documents are compressed 5 to 50 times, sparse sheets 100 times.
MAX_RATIO = 250
# Smaller members are harmless at any ratio.
_RATIO_COUNTS_FROM = 4 * 2**20

_CENTRAL_ENTRY = b"PK\x01\x02"
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_ENCRYPTED_PACKAGE = "EncryptedPackage".encode("utf-16-le")


class Archive:
    """A zip archive, checked against the limits.

    Args:
        data: The file's bytes.
        format_name: The expected format, for messages ("Word document").

    Raises:
        BrokenFileError: If it is not a zip archive, encrypted, or above a limit.
    """

    def __init__(self, data: bytes, format_name: str) -> None:
        self._format = format_name
        if data.startswith(_OLE):
            if _ENCRYPTED_PACKAGE in data:
                raise BrokenFileError(f"an encrypted {format_name}")
            raise BrokenFileError(f"an older format than a {format_name}, in spite of its name")
        # Checked before zipfile creates an object for each member.
        if data.count(_CENTRAL_ENTRY) > MAX_MEMBERS:
            raise BrokenFileError(f"more than {MAX_MEMBERS} parts in this {format_name}")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
            raise BrokenFileError(f"a broken {format_name}: {_message(error)}") from error
        self._members = {info.filename: info for info in self._zip.infolist()}
        total = 0
        for info in self._zip.infolist():
            if info.flag_bits & 0x1:
                raise BrokenFileError(f"an encrypted {self._format}")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # Office formats do not use the other methods, which zipfile decompresses without a bound.
                raise BrokenFileError(f"an unknown compression ({info.compress_type}) in this {self._format}")
            if info.file_size > MAX_MEMBER_BYTES:
                raise BrokenFileError(f"a part above {MAX_MEMBER_BYTES // 2**20} MiB in this {self._format}")
            if info.file_size > _RATIO_COUNTS_FROM and info.file_size > MAX_RATIO * max(1, info.compress_size):
                raise BrokenFileError(f"a part that is compressed more than {MAX_RATIO} times in this {self._format}")
            total += info.file_size
        if total > MAX_TOTAL_BYTES:
            raise BrokenFileError(f"more than {MAX_TOTAL_BYTES // 2**20} MiB in the parts of this {self._format}")

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def names(self) -> list[str]:
        """Return the names of the members in the order of the archive."""
        return list(self._members)

    def read(self, name: str) -> bytes:
        """Return the content of a member.

        Raises:
            BrokenFileError: If it is missing or damaged.
        """
        info = self._members.get(name)
        if info is None:
            raise BrokenFileError(f"a broken {self._format}: {name[:80]} is missing")
        try:
            with self._zip.open(info) as member:
                # One byte more than announced, so as not to rely on zipfile to stop there.
                content = member.read(info.file_size + 1)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError, OSError) as error:
            raise BrokenFileError(f"a broken {self._format}: {_message(error)}") from error
        if len(content) > info.file_size:
            raise BrokenFileError(f"a broken {self._format}: {name[:80]} is longer than announced")
        return content


def _message(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


# More text is a data dump (a long novel has a million characters).
MAX_CHARACTERS = 32 * 2**20
# Office formats use vertical tabs and separators as line ends inside a paragraph.
_LINE_ENDS = re.compile(r"\r\n|[\r\v\f\x85\u2028\u2029]")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """Return text without control characters and lone surrogates, and with line feeds as line ends."""
    return _UNPRINTABLE.sub("", _LINE_ENDS.sub("\n", text))


@contextmanager
def parsing(format_name: str) -> Iterator[None]:
    """Turn any exception of a parser into a `BrokenFileError` that names the format ("Word document")."""
    try:
        yield
    except (BrokenFileError, NotTextError, EpicError, MemoryError):
        raise
    except Exception as error:  # parsers raise nearly anything on damaged files
        message = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split())[:120])))
        raise BrokenFileError(f"a broken {format_name}: {message}") from error


class Parts:
    """Skips damaged parts of a file, such as slides, and raises the first error if every part is damaged."""

    def __init__(self) -> None:
        self._error: BrokenFileError | None = None
        self._any_read = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Read a part ("slide 3 of a presentation") in the block, and skip it if that fails."""
        try:
            with parsing(name):
                yield
            self._any_read = True
        except BrokenFileError as error:
            self._error = self._error or error

    def check(self) -> None:
        """Raise the first error if no part was read."""
        if self._error is not None and not self._any_read:
            raise self._error


class DocumentBuilder:
    """Collects blocks of text, separated by empty lines.

    Args:
        format_name: The format, for messages.
    """

    def __init__(self, format_name: str) -> None:
        self._format = format_name
        self._lines: list[str] = []
        self._costs: list[SplitCost] = []
        self._headings: list[Heading] = []
        self._pages: list[int] = []
        self._spans: list[tuple[int, int]] = []
        self._repeated_headers: list[RepeatedHeader] = []
        self._keep_together: list[tuple[int, int]] = []
        self._display_only: set[int] = set()
        self._substitutions: dict[int, tuple[Substitution, ...]] = {}
        self._size = 0
        self._pending: tuple[str, int] | None = None

    def section(self, title: str, level: int) -> None:
        """Begin a section with the next block, whose title is not a line of the text."""
        self._pending = (clean_title(printable(title)), level)

    def heading(self, title: str, level: int, *, page: int = 0, span: tuple[int, int] = (1, 1)) -> None:
        """Add a heading that is also a line of the text."""
        text = " ".join(printable(title).split())
        cleaned = clean_title(text)
        if not text:
            return
        self._pending = None
        self._block([text], [SplitCost.BLOCK], page, [span])
        if cleaned:
            self._headings.append(Heading(len(self._lines) - 1, level, cleaned))

    def text(
        self, text: str, *, cost: SplitCost = SplitCost.BLOCK, page: int = 0, span: tuple[int, int] = (1, 1)
    ) -> None:
        """Add a paragraph, list item or table row with its split cost."""
        lines = [line.rstrip() for line in split_lines(printable(text))]
        while lines and not lines[0]:
            del lines[0]
        while lines and not lines[-1]:
            lines.pop()
        if lines:
            self._block(lines, [cost, *text_split_costs(lines)[1:]], page, [span] * len(lines))

    def add_document(self, part: Document, *, page: int = 0, level: int = 0) -> None:
        """Add a whole document, with its headings moved down by `level` levels."""
        end = next((number for number in range(len(part.lines), 0, -1) if part.lines[number - 1].strip()), 0)
        if not end:
            return
        spans = part.spans or [(number, number) for number in range(1, len(part.lines) + 1)]
        lines = [printable(line).replace("\n", " ") for line in part.lines[:end]]
        start = self._block(lines, [SplitCost.BLOCK, *part.split_costs[1:end]], page, spans[:end])
        for heading in part.headings:
            moved = Heading(heading.line + start, heading.level + level, heading.title, heading.height)
            self._headings.append(moved)
        self._repeated_headers += [
            RepeatedHeader(header.first + start, min(header.end, end) + start, header.text)
            for header in part.repeated_headers
        ]
        self._keep_together += [(first + start, last + start) for first, last in part.keep_together]
        self._display_only |= {line + start for line in part.display_only if line < end}
        self._substitutions |= {line + start: some for line, some in part.substitutions.items() if line < end}

    def rows(self, rows: Iterable[Iterable[str]], *, page: int = 0) -> None:
        """Add a table with a line for each row; the first one, or the one below a title, is its repeated header."""
        lines = [" | ".join(" ".join(printable(cell).split()) for cell in row).rstrip(" |") for row in rows]
        lines = [line for line in lines if line]
        # Above the header there may be a title.
        header = 1 if len(lines) > 2 and "|" not in lines[0] and "|" in lines[1] else 0
        start = 0
        for number, line in enumerate(lines):
            self.text(line, cost=SplitCost.ITEM if number else SplitCost.BLOCK, page=page)
            start = len(self._lines) if number == header else start
        if len(lines) > header + 1:
            self._repeated_headers.append(RepeatedHeader(start, len(self._lines), lines[header]))

    def _block(self, lines: list[str], costs: list[SplitCost], page: int, spans: list[tuple[int, int]]) -> int:
        """Add lines; return the number of the first one."""
        self._size += sum(map(len, lines)) + len(lines)
        if self._size > MAX_CHARACTERS:
            raise BrokenFileError(
                f"more than {MAX_CHARACTERS // 2**20} million characters of text in this {self._format}"
            )
        if self._lines and costs[0] is SplitCost.BLOCK:
            self._lines.append("")
            self._costs.append(SplitCost.BLOCK)
            self._pages.append(self._pages[-1])
            self._spans.append((self._spans[-1][1], self._spans[-1][1]))
        start = len(self._lines)
        if self._pending is not None and self._pending[0]:
            self._headings.append(Heading(start, self._pending[1], self._pending[0], 0))
        self._pending = None
        self._lines += lines
        self._costs += costs
        self._pages += [page] * len(lines)
        self._spans += spans
        return start

    def document(self, *, paged: bool = True) -> Document:
        """Return the document, with page numbers (0: without pages) or with the source lines of its lines.

        Raises:
            NotTextError: If there is no text.
        """
        if not any(line.strip() for line in self._lines):
            raise NotTextError(f"no text in this {self._format}")
        pages, spans = (self._pages, None) if paged else (None, self._spans)
        return Document(
            self._lines,
            self._costs,
            self._headings,
            spans=spans,
            pages=pages,
            keep_together=self._keep_together,
            repeated_headers=self._repeated_headers,
            display_only=frozenset(self._display_only),
            substitutions=self._substitutions,
        )
