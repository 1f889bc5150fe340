"""`Document`: the text of a file in lines, with its headings and the cost of splitting it before each line.

Every reader returns one. It is all that the chunker gets, so the chunker is independent of file formats.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

__all__ = [
    "CLOSING_QUOTES",
    "HEADING_SEPARATOR",
    "INVISIBLE",
    "BrokenFileError",
    "Document",
    "Heading",
    "NotTextError",
    "RepeatedHeader",
    "Scope",
    "SplitCost",
    "Substitution",
    "clean_title",
    "plain_title",
    "split_lines",
    "substituted",
    "text_split_costs",
]

# Joins the headings of a path in metadata and in the embedded text.
HEADING_SEPARATOR = " > "

# Quotes and brackets that may follow the end of a sentence, for a character class.
CLOSING_QUOTES = r"\"')\]\u00bb\u201d\u2019"
_SENTENCE_END = re.compile(rf"[.!?:;\u3002\uff01\uff1f][{CLOSING_QUOTES}*_`]*\s*$")
_LINK = re.compile(r"!?\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])")
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")
_ANCHOR = re.compile(r"\s*\{[#:.][^}]*\}\s*$")
# Unicode's Default_Ignorable_Code_Point: soft hyphens, zero-width and other characters that are not seen.
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
_SEPARATOR_AT_END = re.compile(r"^(?:> )+|(?: >)+$")
_MAX_TITLE = 200

# A part of a line, from one character to another, that is embedded as another text: an escape as the letter that it
# stands for, markup as nothing.
Substitution = tuple[int, int, str]


class NotTextError(Exception):
    """A readable file with nothing to index; the message is the reason."""


class BrokenFileError(Exception):
    """A file that should hold text and cannot be read; the message is the reason."""


class SplitCost(IntEnum):
    """Cost of splitting before a line; the chunker splits where it is lowest."""

    BLOCK = 0  # between paragraphs, or two definitions in source code
    ITEM = 1  # between list items or table rows
    SENTENCE = 2
    LINE = 3
    INSIDE = 4  # inside a code block or another unit


@dataclass(frozen=True)
class Heading:
    """A heading: first line of its section (from 0), level (1 is the top), title, number of lines of the heading."""

    line: int
    level: int
    title: str
    height: int = 1


@dataclass(frozen=True)
class Scope:
    """A named unit, such as a class or a function: kept whole where it fits into a chunk, and may contain others.

    Args:
        first: Its first line (from 0), including its comments and decorators.
        end: The line after its last.
        title: Its name.
        body: The line after the one with the name.
    """

    first: int
    end: int
    title: str
    body: int


@dataclass(frozen=True)
class RepeatedHeader:
    """Text, such as a table's header, that is embedded again with every chunk that begins in `first` to `end` - 1."""

    first: int
    end: int
    text: str


@dataclass(frozen=True)
class Document:
    """The text of a file.

    Args:
        lines: The lines of the text without their ends.
        split_costs: For each line, the cost of splitting before it.
        headings: In order of lines.
        spans: For each line, the first and last line of the source it was extracted from (from 1); None if the lines
            are the file's.
        pages: For each line its page (from 1), 0 in a format with neither pages nor lines (a Word document); None for
            formats with lines.
        scopes: Named units, an outer one before those inside it, either nested or disjoint. A document with headings
            has none.
        keep_together: (first, end) of lines that stay in one chunk where they fit: a table, a code block, a list item.
            They may be nested.
        repeated_headers: In order of lines, disjoint.
        display_only: Lines that are part of the text and not of the embedded text (the times of subtitles).
        substitutions: The substitutions in a line, in order and disjoint, for the lines that have some. They change
            the embedded text and the keywords; the shown text stays the file's.
        metadata: The front matter: values and lists of values by key, as texts.
    """

    lines: list[str]
    split_costs: list[SplitCost]
    headings: list[Heading] = field(default_factory=list)
    spans: list[tuple[int, int]] | None = None
    pages: list[int] | None = None
    scopes: list[Scope] = field(default_factory=list)
    keep_together: list[tuple[int, int]] = field(default_factory=list)
    repeated_headers: list[RepeatedHeader] = field(default_factory=list)
    display_only: frozenset[int] = frozenset()
    substitutions: dict[int, tuple[Substitution, ...]] = field(default_factory=dict)
    metadata: dict[str, str | list[str]] = field(default_factory=dict)


def split_lines(text: str) -> list[str]:
    r"""Split at \n, \r\n and \r, the line ends that `open()` and editors use.

    `str.splitlines` also splits at form feeds and other characters, which would shift all later line numbers.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def text_split_costs(lines: list[str]) -> list[SplitCost]:
    """Return the split costs of running text: paragraphs, then sentences, then lines."""
    costs = []
    previous = ""
    for line in lines:
        if not line.strip() or not previous.strip():
            # An indented block after a blank line belongs to the item above it.
            costs.append(SplitCost.ITEM if line[:1] in (" ", "\t") and line.strip() else SplitCost.BLOCK)
        else:
            costs.append(SplitCost.SENTENCE if _SENTENCE_END.search(previous) else SplitCost.LINE)
        previous = line
    return costs


def substituted(line: str, substitutions: Sequence[Substitution], start: int = 0, end: int | None = None) -> str:
    """Return a part of a line as it is embedded.

    A substitution that begins before `start` belongs to the part before, as a whole.
    """
    end = len(line) if end is None else end
    parts: list[str] = []
    position = start
    for first, last, text in substitutions:
        if first >= start and first < end:
            parts += (line[position:first], text)
        if first < end:
            position = max(position, last)
    parts.append(line[position:end])
    return "".join(parts)


def plain_title(title: str) -> str:
    """Return a heading on one line, without the separator of heading paths."""
    title = " ".join(INVISIBLE.sub("", title).split())[:_MAX_TITLE].replace(HEADING_SEPARATOR, " / ")
    return _SEPARATOR_AT_END.sub("", title).strip()


def clean_title(title: str) -> str:
    """Return a heading without Markdown's or HTML's markup, as `plain_title` does."""
    title = _LINK.sub(r"\1", _ANCHOR.sub("", title))
    title = _TAG.sub("", title).replace("`", "").replace("**", "").replace("¶", "")
    return plain_title(re.sub(r"(?<!\w)[*_](?=\S)|(?<=\S)[*_](?!\w)", "", title))
