"""From a file's bytes to a `Document`, by the kind of file."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from epic_rag_chroma.reading.code import read as source_code
from epic_rag_chroma.reading.document import BrokenFileError, Document, NotTextError, split_lines
from epic_rag_chroma.reading.encoding import decode, is_utf16
from epic_rag_chroma.reading.file_types import byte_limit, is_binary_name, kind_of, language_of

__all__ = [
    "BrokenFileError",
    "NotTextError",
    "byte_limit",
    "bytes_reader",
    "decode",
    "is_binary_name",
    "kind_of",
    "language_of",
    "read_document",
    "text_reader",
]


# --- from formats
# One module a format, imported when a file of it comes along: `read` makes a `Document` of it.
#
# A format that is text gets the file's lines, decoded; a format that is not gets its bytes.

# kind -> (module, function)
_TEXT = {
    "text": ("epic_rag_chroma.reading.text", "plain"),
    "markdown": ("epic_rag_chroma.reading.text", "markdown"),
    "rst": ("epic_rag_chroma.reading.text", "restructured"),
    "asciidoc": ("epic_rag_chroma.reading.text", "asciidoc"),
    "latex": ("epic_rag_chroma.reading.text", "latex"),
    "org": ("epic_rag_chroma.reading.text", "org"),
    "man": ("epic_rag_chroma.reading.text", "manual"),
    "subtitles": ("epic_rag_chroma.reading.text", "subtitles"),
    "csv": ("epic_rag_chroma.reading.data", "read"),
    "json": ("epic_rag_chroma.reading.data", "json"),
    "jsonl": ("epic_rag_chroma.reading.data", "json_lines"),
    "yaml": ("epic_rag_chroma.reading.data", "yaml"),
    "toml": ("epic_rag_chroma.reading.data", "toml"),
    "ini": ("epic_rag_chroma.reading.data", "ini"),
    "xml": ("epic_rag_chroma.reading.data", "xml"),
}
_BYTES = {
    "html": ("epic_rag_chroma.reading.html", "html"),
    "pdf": ("epic_rag_chroma.reading.pdf", "read"),
    "docx": ("epic_rag_chroma.reading.office", "read_word"),
    "pptx": ("epic_rag_chroma.reading.office", "read_slides"),
    "xlsx": ("epic_rag_chroma.reading.office", "read_spreadsheet"),
    "opendocument": ("epic_rag_chroma.reading.office", "read_opendocument"),
    "rtf": ("epic_rag_chroma.reading.office", "read_rtf"),
    "epub": ("epic_rag_chroma.reading.office", "read_epub"),
    "notebook": ("epic_rag_chroma.reading.notebook", "read"),
    "email": ("epic_rag_chroma.reading.mail", "read"),
    "mailbox": ("epic_rag_chroma.reading.mail", "read_mailbox"),
}


def bytes_reader(kind: str) -> Callable[[bytes], Document] | None:
    """What reads files of a kind from their bytes; None if the kind is text."""
    if kind not in _BYTES:
        return None
    module, function = _BYTES[kind]
    reader: Callable[[bytes], Document] = getattr(import_module(module), function)
    return reader


def text_reader(kind: str) -> Callable[[list[str]], Document]:
    """What reads files of a kind from their lines; a kind that is not known is plain text."""
    module, function = _TEXT.get(kind, _TEXT["text"])
    reader: Callable[[list[str]], Document] = getattr(import_module(module), function)
    return reader


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
