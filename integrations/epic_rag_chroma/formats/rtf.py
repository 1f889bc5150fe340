"""Rich Text Format (.rtf): its text, in paragraphs. Pictures and embedded objects are left out."""

from __future__ import annotations

from collections.abc import Callable

from epic_rag.errors import MissingExtraError
from epic_rag_chroma.document import BrokenFileError, Document, line_breaks, split_lines
from epic_rag_chroma.formats.building import DocumentBuilder, parsing, printable

__all__ = ["read"]

_WHAT = "RTF document"
_MAGIC = b"{\\rtf"


def read(data: bytes) -> Document:
    """Read an .rtf file.

    Raises:
        BrokenFileError: If it is damaged or beyond a limit.
        NotTextError: If there is no text in it.
        MissingExtraError: If striprtf is not installed.
    """
    try:
        from striprtf.striprtf import rtf_to_text
    except ImportError as error:
        raise MissingExtraError("striprtf", "files", "reading RTF documents") from error
    if not data.lstrip()[: len(_MAGIC)].startswith(_MAGIC):
        raise BrokenFileError(f"not an {_WHAT}")
    to_text: Callable[..., str] = rtf_to_text  # striprtf says that it is typed, and is not
    out = DocumentBuilder(_WHAT)
    with parsing(_WHAT):
        text = printable(to_text(data.decode("cp1252", errors="replace"), errors="replace"))
        lines = split_lines(text)
        out.document_of(Document(lines, line_breaks(lines)))
    return out.with_pages()
