"""From a file's bytes to a `Document`, by the kind of file."""

from __future__ import annotations

from epic_rag_chroma.document import BrokenFileError, Document, NotTextError, split_lines
from epic_rag_chroma.encodings import decode, is_utf16
from epic_rag_chroma.formats import bytes_reader, text_reader
from epic_rag_chroma.formats.source import read as source_code
from epic_rag_chroma.kinds import byte_limit, is_binary_name, kind_of, language_of

__all__ = [
    "BrokenFileError",
    "NotTextError",
    "byte_limit",
    "decode",
    "is_binary_name",
    "kind_of",
    "language_of",
    "read_document",
]


def read_document(name: str, data: bytes) -> Document:
    """Read a file.

    Args:
        name: The file's name; its ending decides how it is read.
        data: The file's bytes.

    Raises:
        NotTextError: If there is nothing to index in it.
        BrokenFileError: If it is damaged or locked.
        MissingExtraError: If the package that reads this kind is not installed.
    """
    kind = kind_of(name)
    reader = bytes_reader(kind)
    if reader is not None:
        if kind == "html" and b"\0" in data and not is_utf16(data):
            raise NotTextError("not text")
        return reader(data)
    lines = split_lines(decode(data))
    if kind == "code":
        return source_code(lines, language_of(name))
    return text_reader(kind)(lines)
