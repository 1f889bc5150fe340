"""Read a file's bytes into a `Document`, by the kind of file.

The reader of a kind is the function `read_KIND` of a module of this package, imported with the first file of the kind.
It takes the decoded lines of a text format, or the bytes of any other, and raises the errors of `read_document`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from epic_rag_chroma.reading.document import Document, NotTextError, split_lines
from epic_rag_chroma.reading.encoding import decode, is_utf16
from epic_rag_chroma.reading.file_types import kind_of, language_of

__all__ = ["read_document"]


# The kinds that each module reads: from decoded lines, or from bytes.
_FROM_LINES = {
    "text": "text markdown rst asciidoc latex org man subtitles",
    "code": "code",
    "data": "csv json jsonl yaml toml ini xml",
}
_FROM_BYTES = {
    "html": "html",
    "pdf": "pdf",
    "office": "docx pptx xlsx opendocument rtf epub",
    "notebook": "notebook",
    "mail": "email mailbox",
}
_MODULE_OF = {kind: module for module, kinds in (_FROM_LINES | _FROM_BYTES).items() for kind in kinds.split()}


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
    module = _MODULE_OF[kind]
    read: Callable[..., Document] = getattr(import_module(f"epic_rag_chroma.reading.{module}"), f"read_{kind}")
    if module in _FROM_BYTES:
        if kind == "html" and b"\0" in data and not is_utf16(data):
            raise NotTextError("not text")
        return read(data)
    lines = split_lines(decode(data))
    return read(lines, language_of(name)) if kind == "code" else read(lines)
