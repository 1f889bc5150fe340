"""One module a format, imported when a file of it comes along: `read` makes a `Document` of it.

A format that is text gets the file's lines, decoded; a format that is not gets its bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from epic_rag_chroma.document import Document

__all__ = ["bytes_reader", "text_reader"]

# kind -> (module, function)
_TEXT = {
    "text": ("epic_rag_chroma.structure", "plain"),
    "markdown": ("epic_rag_chroma.structure", "markdown"),
    "rst": ("epic_rag_chroma.structure", "restructured"),
    "asciidoc": ("epic_rag_chroma.formats.asciidoc", "read"),
    "latex": ("epic_rag_chroma.formats.latex", "read"),
    "org": ("epic_rag_chroma.formats.outline", "org"),
    "man": ("epic_rag_chroma.formats.outline", "manual"),
    "subtitles": ("epic_rag_chroma.formats.subtitles", "read"),
    "csv": ("epic_rag_chroma.formats.tables", "read"),
    "json": ("epic_rag_chroma.formats.data", "json"),
    "jsonl": ("epic_rag_chroma.formats.data", "json_lines"),
    "yaml": ("epic_rag_chroma.formats.data", "yaml"),
    "toml": ("epic_rag_chroma.formats.data", "toml"),
    "ini": ("epic_rag_chroma.formats.data", "ini"),
    "xml": ("epic_rag_chroma.formats.data", "xml"),
}
_BYTES = {
    "html": ("epic_rag_chroma.html", "html"),
    "pdf": ("epic_rag_chroma.formats.pdf", "read"),
    "docx": ("epic_rag_chroma.formats.word", "read"),
    "pptx": ("epic_rag_chroma.formats.slides", "read"),
    "xlsx": ("epic_rag_chroma.formats.spreadsheet", "read"),
    "opendocument": ("epic_rag_chroma.formats.opendocument", "read"),
    "rtf": ("epic_rag_chroma.formats.rtf", "read"),
    "epub": ("epic_rag_chroma.formats.epub", "read"),
    "notebook": ("epic_rag_chroma.formats.notebook", "read"),
    "email": ("epic_rag_chroma.formats.mail", "read"),
    "mailbox": ("epic_rag_chroma.formats.mail", "read_mailbox"),
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
