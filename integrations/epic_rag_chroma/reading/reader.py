"""Read a file's bytes into a `Document`, by the kind of file.

The reader of a kind is the function `read_KIND` of a module of this package, imported with the first file of the kind.
It takes the decoded lines of a text format, or the bytes of any other, and raises the errors of `read_document`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module

from epic_rag_chroma.reading.document import Document, Heading, NotTextError, plain_title, split_lines, substituted
from epic_rag_chroma.reading.encoded_data import is_cut_data, without_encoded_data
from epic_rag_chroma.reading.encoding import decode, is_utf16
from epic_rag_chroma.reading.escapes import without_invisible
from epic_rag_chroma.reading.file_types import kind_of, language_of
from epic_rag_chroma.reading.front_matter import read_front_matter

__all__ = ["read_document"]


# The kinds that each module reads: from decoded lines, or from bytes.
_FROM_LINES = {
    "text": "text rst asciidoc org man subtitles",
    "markdown": "markdown",
    "latex": "latex bibtex",
    "code": "code",
    "data": "csv json jsonl yaml toml ini properties gettext xml svg",
}
_FROM_BYTES = {
    "html": "html",
    "pdf": "pdf",
    "word": "docx rtf",
    "presentation": "pptx",
    "spreadsheet": "xlsx",
    "opendocument": "opendocument",
    "epub": "epub",
    "notebook": "notebook",
    "mail": "email mailbox",
    "outlook": "outlook",
}
_MODULE_OF = {kind: module for module, kinds in (_FROM_LINES | _FROM_BYTES).items() for kind in kinds.split()}
# Formats that static site generators read with front matter; Markdown's reader reads its own.
_WITH_FRONT_MATTER = frozenset({"text", "rst", "asciidoc", "org", "html"})


def read_document(name: str, data: bytes, *, named: bool = False) -> Document:
    """Read a file.

    Args:
        name: The file's name; its suffix selects the reader.
        data: The file's bytes.
        named: Whether the user asked for this file: if its format has nothing to read in it, it is read as plain text.

    Raises:
        NotTextError: If there is nothing to index in it.
        BrokenFileError: If it is damaged or encrypted.
        MissingExtraError: If the package that reads this kind is not installed.
    """
    kind = kind_of(name)
    module = _MODULE_OF[kind]
    read: Callable[..., Document] = getattr(import_module(f"epic_rag_chroma.reading.{module}"), f"read_{kind}")
    if (module not in _FROM_BYTES or kind == "html") and not data.strip():
        raise NotTextError("empty")
    try:
        document = _read(name, kind, data, read)
        embedded = [line for line in _embedded_lines(document) if line.strip()]
        if all(map(is_cut_data, embedded)):
            raise NotTextError(
                "nothing but encoded data"
                if embedded
                else "front matter without a text"
                if document.metadata
                else "no text"
            )
    except NotTextError as error:
        if not named or module in _FROM_BYTES:
            raise
        lines = split_lines(decode(data))
        if not any(map(str.strip, lines)):
            raise error
        from epic_rag_chroma.reading.text import read_text

        document = read_text(lines)
    return without_invisible(document)


def _read(name: str, kind: str, data: bytes, read: Callable[..., Document]) -> Document:
    if _MODULE_OF[kind] in _FROM_BYTES and kind != "html":
        document = read(data)
        lines = without_encoded_data(document.lines)
        return document if lines is document.lines else replace(document, lines=lines)
    if kind == "html" and b"\0" in data and not is_utf16(data):
        raise NotTextError("not text")
    lines = split_lines(decode(data))
    if kind != "html":
        lines = without_encoded_data(lines)
    front = read_front_matter(lines) if kind in _WITH_FRONT_MATTER else None
    if front is not None:
        lines = [*[""] * front.end, *lines[front.end :]]
    if kind == "html":
        document = read("\n".join(lines))
    elif kind == "code":
        document = read(lines, language_of(name))
    elif kind == "markdown":
        document = read(lines, mdx=name.lower().endswith(".mdx"))
    else:
        document = read(lines)
    if kind == "html":
        document = replace(document, lines=without_encoded_data(document.lines))
    if front is None:
        return document
    headings = document.headings
    title = plain_title(front.title)
    if title and not any(heading.level <= 1 for heading in headings):
        headings = [Heading(0, 0, title, 0 if kind == "html" else front.end), *headings]
    return replace(document, headings=headings, metadata={**document.metadata, **front.metadata})


def _embedded_lines(document: Document) -> Iterator[str]:
    """Yield the lines of a document as they are embedded."""
    for number, line in enumerate(document.lines):
        if number not in document.display_only:
            some = document.substitutions.get(number)
            yield substituted(line, some) if some else line
