"""Subtitles (.srt, .vtt, .sbv): cut between cues; the model reads what is said, not the times."""

from __future__ import annotations

import re

from epic_rag_chroma.document import Break, Document

__all__ = ["read"]

_TIME = r"(?:\d{1,3}:)?\d{1,2}:\d{2}[.,]\d{1,3}"
_CUE = re.compile(rf"^\s*{_TIME}(?:\s+-->\s+|,){_TIME}(?:\s+\S+:\S+)*\s*$")
_SENTENCE_END = re.compile(r"""[.!?\u2026\u3002\uff01\uff1f]["')\]\u00bb\u201d\u2019]*\s*(?:</\w+>\s*)*$""")
# Parts of WebVTT that nobody hears.
_SILENT = re.compile(r"^(?:WEBVTT|STYLE|REGION|NOTE)(?:\s|$)")


def read(lines: list[str]) -> Document:
    """Read subtitles. The lines of a chunk are the file's, times included."""
    breaks = [Break.INSIDE] * len(lines)
    wholes = []
    unread: set[int] = set()
    said = ""
    number = 0
    while number < len(lines):
        first = number
        while number < len(lines) and lines[number].strip():
            number += 1
        # A block: the lines between two empty ones.
        block = range(first, number)
        while number < len(lines) and not lines[number].strip():
            number += 1
        time = next((line for line in block[:2] if _CUE.match(lines[line])), None)
        breaks[first] = Break.BLOCK if _SENTENCE_END.search(said) or time is None else Break.SENTENCE
        wholes.append((first, number))
        spoken = [] if time is None else [line for line in block if line > time]
        if spoken:
            said = lines[spoken[-1]]
            unread |= {line for line in range(first, number) if line not in spoken}
        elif block and _SILENT.match(lines[first]) and not lines[first].startswith("NOTE"):
            unread |= set(range(first, number))
    if len(unread) == len(lines) or not any(lines[line].strip() for line in set(range(len(lines))) - unread):
        unread = set()
    return Document(lines, breaks, wholes=wholes, unread=frozenset(unread))
