"""`Document`: the text of a file in lines, with its headings and with where it may be cut.

Every reader makes one; the chunker knows nothing else, and so nothing about formats.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import IntEnum

__all__ = [
    "Break",
    "BrokenFileError",
    "Document",
    "Heading",
    "NotTextError",
    "Repeat",
    "Scope",
    "clean_title",
    "line_breaks",
    "split_lines",
]


_SENTENCE_END = re.compile(r"[.!?:;\u3002\uff01\uff1f][\"')\]\u00bb\u201d\u2019*_`]*\s*$")
_LINK = re.compile(r"!?\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])")
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")
_ANCHOR = re.compile(r"\s*\{[#:.][^}]*\}\s*$")
_MAX_TITLE = 200


class NotTextError(Exception):
    """A file that can be read and holds nothing to index; the message says why."""


class BrokenFileError(Exception):
    """A file that ought to hold text and cannot be read; the message says why."""


class Break(IntEnum):
    """How much is lost by cutting before a line; the chunker cuts where it is least."""

    BLOCK = 0  # between paragraphs, or two definitions of source code
    ITEM = 1  # between list items, table rows
    SENTENCE = 2
    LINE = 3
    INSIDE = 4  # inside a code block, or what else belongs together


@dataclass(frozen=True)
class Heading:
    """A heading: line where its section begins (from 0), level (smaller is higher), title, lines it takes itself."""

    line: int
    level: int
    title: str
    height: int = 1


@dataclass(frozen=True)
class Scope:
    """A part with a name that is kept whole where it fits into a chunk, and may hold others: a class, a function.

    Args:
        first: Its first line (from 0), comments and decorators that belong to it included.
        end: The line after its last.
        title: Its name.
        body: The line after the one that says the name.
    """

    first: int
    end: int
    title: str
    body: int


@dataclass(frozen=True)
class Repeat:
    """Text that the model reads again with every chunk that begins at lines `first` to `end` - 1: a table's header."""

    first: int
    end: int
    text: str


@dataclass(frozen=True)
class Document:
    """A file's text.

    Args:
        lines: The text's lines without their ends.
        breaks: For each line, what a cut before it costs.
        headings: In order of lines.
        spans: For each line, first and last line of the source it was extracted from (from 1); None when the lines
            are the file's own.
        pages: For each line its page (from 1), 0 where a format has neither pages nor lines (a Word document); None for
            formats with lines.
        scopes: Named parts, an outer one before those in it; they never overlap in part. Documents with headings
            have none.
        wholes: (first, end) of lines that stay in one chunk where they fit: a table, a code block, a list item. One may
            lie in another.
        repeats: In order of lines; none overlaps another.
        unread: Lines that the model does not read (a cue's times); they are part of the text all the same.
    """

    lines: list[str]
    breaks: list[Break]
    headings: list[Heading] = field(default_factory=list)
    spans: list[tuple[int, int]] | None = None
    pages: list[int] | None = None
    scopes: list[Scope] = field(default_factory=list)
    wholes: list[tuple[int, int]] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)
    unread: frozenset[int] = frozenset()


def split_lines(text: str) -> list[str]:
    r"""Split at \n, \r\n and \r, the line ends that `open()` and editors know.

    `str.splitlines` also splits at form feeds and others, which would shift every line number after them.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def line_breaks(lines: list[str]) -> list[Break]:
    """What a cut before each line costs in running text: paragraphs, then sentences, then lines."""
    breaks = []
    previous = ""
    for line in lines:
        if not line.strip() or not previous.strip():
            # An indented block after a blank line belongs to what it is indented under.
            breaks.append(Break.ITEM if line[:1] in (" ", "\t") and line.strip() else Break.BLOCK)
        else:
            breaks.append(Break.SENTENCE if _SENTENCE_END.search(previous) else Break.LINE)
        previous = line
    return breaks


def clean_title(title: str) -> str:
    """A heading without its markup, on one line, and free of the " > " that joins the headings of a path."""
    title = _LINK.sub(r"\1", _ANCHOR.sub("", title))
    title = _TAG.sub("", title).replace("`", "").replace("**", "").replace("¶", "")
    title = re.sub(r"(?<!\w)[*_](?=\S)|(?<=\S)[*_](?!\w)", "", title)
    title = " ".join(title.split()).replace(" > ", " / ")
    return title[:_MAX_TITLE].strip(" >")
