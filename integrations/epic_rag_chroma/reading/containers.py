"""What the readers of container formats share: a document that grows block by block, one reason for what is broken."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from epic_rag.errors import EpicError, MissingExtraError
from epic_rag_chroma.reading.document import (
    Break,
    BrokenFileError,
    Document,
    Heading,
    NotTextError,
    Repeat,
    clean_title,
    line_breaks,
    split_lines,
)

if TYPE_CHECKING:
    from lxml.etree import _Element

__all__ = [
    "MAX_CHARACTERS",
    "MAX_MEMBERS",
    "MAX_MEMBER_BYTES",
    "MAX_RATIO",
    "MAX_TOTAL_BYTES",
    "Archive",
    "DocumentBuilder",
    "attribute",
    "children",
    "local_name",
    "parse",
    "parsing",
    "printable",
]


# --- from safe_xml
# XML that others wrote: no entity is expanded, no DTD is loaded, nothing is fetched, and libxml2's own limits hold.


def parse(data: bytes, purpose: str) -> _Element:
    """The root element of a document.

    Args:
        data: The XML.
        purpose: What it is read for, if lxml is missing ("reading EPUB files").

    Raises:
        MissingExtraError: If lxml is not installed.
        lxml.etree.XMLSyntaxError: If it is not well-formed.
    """
    try:
        from lxml import etree
    except ImportError as error:
        raise MissingExtraError("lxml", "files", purpose) from error
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
    """The element's name without its namespace; "" for what is no element (an entity that was not expanded)."""
    tag: object = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def attribute(element: _Element, name: str) -> str:
    """An attribute by its name without namespace; "" if there is none."""
    for key, value in element.attrib.items():
        if str(key).rpartition("}")[2] == name:
            return str(value)
    return ""


def children(element: _Element, *names: str) -> Iterator[_Element]:
    """The children with one of these names (without namespace)."""
    for child in element:
        if local_name(child) in names:
            yield child


# --- from archive
# Zip-based formats: opened in memory, within limits, and never unpacked into the file system.
#
# What an archive says of itself is checked before anything is decompressed; `zipfile` never gives more of a member than
# its header announces, so a header that lies costs no memory and fails the member's checksum.

# A large presentation has a few thousand members, a workbook or a book fewer.
MAX_MEMBERS = 20_000
# The longest part that is worth reading: a tree of a part's XML takes about ten times its size in memory.
MAX_MEMBER_BYTES = 128 * 2**20
MAX_TOTAL_BYTES = 512 * 2**20
# Deflate cannot reach more than 1032; documents are at 5 to 50, sparse sheets at 100.
MAX_RATIO = 250
# Below this size a ratio says nothing: a part of blanks is small whatever its ratio.
_RATIO_COUNTS_FROM = 4 * 2**20

_CENTRAL_ENTRY = b"PK\x01\x02"
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_ENCRYPTED_PACKAGE = "EncryptedPackage".encode("utf-16-le")


class Archive:
    """A zip file that has been found to be within the limits.

    Args:
        data: The file's bytes.
        what: What it ought to be, for messages ("Word document").

    Raises:
        BrokenFileError: If it is none, is encrypted, or is beyond a limit.
    """

    def __init__(self, data: bytes, what: str) -> None:
        self._what = what
        if data.startswith(_OLE):
            if _ENCRYPTED_PACKAGE in data:
                raise BrokenFileError(f"an encrypted {what}")
            raise BrokenFileError(f"an older format than that of a {what}, which its name says it is")
        # Before zipfile makes an object of each.
        if data.count(_CENTRAL_ENTRY) > MAX_MEMBERS:
            raise BrokenFileError(f"more than {MAX_MEMBERS} parts in this {what}")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
            raise BrokenFileError(f"a broken {what}: {_said(error)}") from error
        self._members = {info.filename: info for info in self._zip.infolist()}
        self._check()

    def _check(self) -> None:
        total = 0
        for info in self._zip.infolist():
            if info.flag_bits & 0x1:
                raise BrokenFileError(f"an encrypted {self._what}")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # The other methods are not of these formats, and decompress without a bound on what comes out.
                raise BrokenFileError(f"an unknown compression ({info.compress_type}) in this {self._what}")
            if info.file_size > MAX_MEMBER_BYTES:
                raise BrokenFileError(f"a part above {MAX_MEMBER_BYTES // 2**20} MiB in this {self._what}")
            if info.file_size > _RATIO_COUNTS_FROM and info.file_size > MAX_RATIO * max(1, info.compress_size):
                raise BrokenFileError(f"a part that is compressed more than {MAX_RATIO} times in this {self._what}")
            total += info.file_size
        if total > MAX_TOTAL_BYTES:
            raise BrokenFileError(f"more than {MAX_TOTAL_BYTES // 2**20} MiB in the parts of this {self._what}")

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> bytes:
        """The content of a member.

        Raises:
            BrokenFileError: If it is missing or damaged.
        """
        info = self._members.get(name)
        if info is None:
            raise BrokenFileError(f"a broken {self._what}: {name[:80]} is missing")
        try:
            with self._zip.open(info) as member:
                # One more than announced: zipfile itself stops there, and this does not depend on it.
                content = member.read(info.file_size + 1)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError, OSError) as error:
            raise BrokenFileError(f"a broken {self._what}: {_said(error)}") from error
        if len(content) > info.file_size:
            raise BrokenFileError(f"a broken {self._what}: {name[:80]} is longer than it says")
        return content

    def close(self) -> None:
        """Let go of the bytes."""
        self._zip.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


# What one file may bring into the index; more is a data dump (a long novel has a million characters).
MAX_CHARACTERS = 32 * 2**20
# Vertical tab and the separators are how office formats write a line end inside a paragraph.
_LINE_ENDS = re.compile(r"\r\n|[\r\v\f\x85\u2028\u2029]")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """Text without control characters and lone surrogates, with line feeds for line ends."""
    return _UNPRINTABLE.sub("", _LINE_ENDS.sub("\n", text))


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into a `BrokenFileError`.

    Args:
        what: The format ("Word document").
    """
    try:
        yield
    except (BrokenFileError, NotTextError, EpicError, MemoryError):
        raise
    except Exception as error:  # parsers raise nearly anything on damaged files
        said = " ".join(str(error).split())[:120]
        raise BrokenFileError(f"a broken {what}: {type(error).__name__}{': ' if said else ''}{said}") from error


class DocumentBuilder:
    """Collects blocks of text; blocks are set apart by an empty line, as paragraphs are in text.

    Args:
        what: The format, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lines: list[str] = []
        self._breaks: list[Break] = []
        self._headings: list[Heading] = []
        self._pages: list[int] = []
        self._spans: list[tuple[int, int]] = []
        self._repeats: list[Repeat] = []
        self._size = 0
        self._pending: tuple[str, int] | None = None

    def section(self, title: str, level: int) -> None:
        """Begin a section whose title is no line of the text; it counts from the next block on."""
        self._pending = (clean_title(printable(title)), level)

    def heading(self, title: str, level: int, *, page: int = 0, span: tuple[int, int] = (1, 1)) -> None:
        """Add a heading, which is a line of the text as well."""
        text = " ".join(printable(title).split())
        cleaned = clean_title(text)
        if not text:
            return
        self._pending = None
        self._block([text], [Break.BLOCK], page, [span])
        if cleaned:
            self._headings.append(Heading(len(self._lines) - 1, level, cleaned))

    def text(self, text: str, *, cost: Break = Break.BLOCK, page: int = 0, span: tuple[int, int] = (1, 1)) -> None:
        """Add a paragraph, list item or table row; `cost` is what a cut before it costs."""
        lines = [line.rstrip() for line in split_lines(printable(text))]
        while lines and not lines[0]:
            del lines[0]
        while lines and not lines[-1]:
            lines.pop()
        if lines:
            self._block(lines, [cost, *line_breaks(lines)[1:]], page, [span] * len(lines))

    def document_of(self, part: Document, *, page: int = 0, level: int = 0) -> None:
        """Add a whole document; its headings go `level` levels down."""
        end = next((number for number in range(len(part.lines), 0, -1) if part.lines[number - 1].strip()), 0)
        if not end:
            return
        spans = part.spans or [(number, number) for number in range(1, len(part.lines) + 1)]
        lines = [printable(line).replace("\n", " ") for line in part.lines[:end]]
        start = self._block(lines, [Break.BLOCK, *part.breaks[1:end]], page, spans[:end])
        for heading in part.headings:
            moved = Heading(heading.line + start, heading.level + level, heading.title, heading.height)
            self._headings.append(moved)

    def rows(self, rows: Iterable[Iterable[str]], *, page: int = 0) -> None:
        """Add a table, a line for each row; the model reads the first row again with every part of the table."""
        header, start = "", 0
        cost = Break.BLOCK
        for row in rows:
            line = " | ".join(" ".join(printable(cell).split()) for cell in row).rstrip(" |")
            if line:
                self.text(line, cost=cost, page=page)
                if cost is Break.BLOCK:
                    header, start = line, len(self._lines)
                cost = Break.ITEM
        if len(self._lines) > start and header:
            self._repeats.append(Repeat(start, len(self._lines), header))

    def _block(self, lines: list[str], breaks: list[Break], page: int, spans: list[tuple[int, int]]) -> int:
        """Add lines; the number of the first one."""
        self._size += sum(map(len, lines)) + len(lines)
        if self._size > MAX_CHARACTERS:
            raise BrokenFileError(
                f"more than {MAX_CHARACTERS // 2**20} million characters of text in this {self._what}"
            )
        if self._lines and breaks[0] is Break.BLOCK:
            self._lines.append("")
            self._breaks.append(Break.BLOCK)
            self._pages.append(self._pages[-1])
            self._spans.append((self._spans[-1][1], self._spans[-1][1]))
        start = len(self._lines)
        if self._pending is not None and self._pending[0]:
            self._headings.append(Heading(start, self._pending[1], self._pending[0], 0))
        self._pending = None
        self._lines += lines
        self._breaks += breaks
        self._pages += [page] * len(lines)
        self._spans += spans
        return start

    def with_pages(self) -> Document:
        """The document, with pages for places (0: it has none).

        Raises:
            NotTextError: If there is no text.
        """
        self._complete()
        return Document(self._lines, self._breaks, self._headings, pages=self._pages, repeats=self._repeats)

    def with_lines(self) -> Document:
        """The document, with lines of the file for places.

        Raises:
            NotTextError: If there is no text.
        """
        self._complete()
        return Document(self._lines, self._breaks, self._headings, spans=self._spans)

    def _complete(self) -> None:
        if not any(line.strip() for line in self._lines):
            raise NotTextError(f"no text in this {self._what}")
