"""Read a file's bytes into a `Document`, by the kind of file.

The reader of a kind is the function `read_KIND` of a module of this package, imported with the first file of the kind.
It takes the decoded lines of a text format, or the bytes of any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from epic_rag_chroma.reading.document import Document, NotTextError, split_lines
from epic_rag_chroma.reading.encoding import decode, is_utf16
from epic_rag_chroma.reading.file_types import kind_of, language_of

__all__ = ["read_document"]


@dataclass(frozen=True)
class _Reader:
    """The module of a reader, and what the reader takes: bytes, or decoded lines."""

    module: str
    takes_bytes: bool = False


_READERS = {
    "text": _Reader("text"),
    "markdown": _Reader("text"),
    "rst": _Reader("text"),
    "asciidoc": _Reader("text"),
    "latex": _Reader("text"),
    "org": _Reader("text"),
    "man": _Reader("text"),
    "subtitles": _Reader("text"),
    "code": _Reader("code"),
    "csv": _Reader("data"),
    "json": _Reader("data"),
    "jsonl": _Reader("data"),
    "yaml": _Reader("data"),
    "toml": _Reader("data"),
    "ini": _Reader("data"),
    "xml": _Reader("data"),
    "html": _Reader("html", takes_bytes=True),
    "pdf": _Reader("pdf", takes_bytes=True),
    "docx": _Reader("office", takes_bytes=True),
    "pptx": _Reader("office", takes_bytes=True),
    "xlsx": _Reader("office", takes_bytes=True),
    "opendocument": _Reader("office", takes_bytes=True),
    "rtf": _Reader("office", takes_bytes=True),
    "epub": _Reader("office", takes_bytes=True),
    "notebook": _Reader("notebook", takes_bytes=True),
    "email": _Reader("mail", takes_bytes=True),
    "mailbox": _Reader("mail", takes_bytes=True),
}


def read_document(name: str, data: bytes) -> Document:
    """Read a file.

    Args:
        name: The file's name; its suffix selects the reader.
        data: The file's bytes.

    Raises:
        NotTextError: If there is nothing to index in it.
        BrokenFileError: If it is damaged or encrypted.
        MissingExtraError: If the package that reads this kind is not installed.
    """
    kind = kind_of(name)
    reader = _READERS[kind]
    read: Any = getattr(import_module(f"epic_rag_chroma.reading.{reader.module}"), f"read_{kind}")
    document: Document
    if reader.takes_bytes:
        if kind == "html" and b"\0" in data and not is_utf16(data):
            raise NotTextError("not text")
        document = read(data)
    elif kind == "code":
        document = read(split_lines(decode(data)), language_of(name))
    else:
        document = read(split_lines(decode(data)))
    return document
