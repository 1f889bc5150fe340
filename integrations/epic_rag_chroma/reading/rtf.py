"""Read Rich Text Format: paragraphs, without images and embedded objects."""

from __future__ import annotations

from collections.abc import Callable

from epic_rag_chroma.reading.containers import DocumentBuilder, parsing, printable, requires
from epic_rag_chroma.reading.document import BrokenFileError, Document, split_lines, text_split_costs

__all__ = ["read_rtf"]


_RTF = "RTF document"


def read_rtf(data: bytes) -> Document:
    """Read an .rtf file."""
    with requires("striprtf", "reading RTF documents"):
        from striprtf.striprtf import rtf_to_text
    if not data.lstrip().startswith(b"{\\rtf"):
        raise BrokenFileError(f"not an {_RTF}")
    to_text: Callable[..., str] = rtf_to_text  # striprtf is marked as typed, and is not
    out = DocumentBuilder(_RTF)
    with parsing(_RTF):
        text = printable(to_text(data.decode("cp1252", errors="replace"), errors="replace"))
        lines = split_lines(text)
        out.add_document(Document(lines, text_split_costs(lines)))
    return out.document()
