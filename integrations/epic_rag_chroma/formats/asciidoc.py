"""AsciiDoc: section titles, delimited blocks whole, tables by rows with their header read again."""

from __future__ import annotations

import re

from epic_rag_chroma.blocks import Blocks
from epic_rag_chroma.document import Break, Document

__all__ = ["read"]

_TITLE = re.compile(r"^(={1,6}|#{1,6})\s+(\S.*?)(?:\s+\1)?\s*$")
# A title of two lines, the old way: underlined by = - ~ ^ or +.
_UNDERLINES = {"=": 1, "-": 2, "~": 3, "^": 4, "+": 5}
_UNDERLINE = re.compile(r"^([=\-~^+])\1{2,}\s*$")
_DELIMITER = re.compile(r"^(?:([-.+/=*_])\1{3,}|```+.*|--)\s*$")
_VERBATIM = ("-", ".", "+", "/", "`")
_TABLE = re.compile(r"^[|,:!]={3,}\s*$")
_CELL = re.compile(r"^\s*(?:\d+[+*])?[aehlmsv<>^]?\|")
_ATTRIBUTE = re.compile(r"^:!?[\w-]+!?:")
# What says something about the block below it: its title, its attributes, its anchor.
_BLOCK_LINE = re.compile(r"^(?:\.[^\s.].*|\[.*\])\s*$")
_BULLET = re.compile(r"(?:[*.\-]{1,5}|\d{1,3}\.|[a-zA-Z]\.|<\d+>)\s+\S|\S.*(?:::|;;)(?:\s|$)")


def read(lines: list[str]) -> Document:
    """Read an AsciiDoc file."""
    blocks = Blocks(lines)
    closers: set[int] = set()
    number = 0
    while number < len(lines):
        number = number + 1 if number in closers else _block(blocks, number, closers)
    blocks.items(_BULLET)
    for number, line in enumerate(lines[:-1]):
        if number not in blocks.verbatim and _BLOCK_LINE.match(line) and lines[number + 1].strip():
            blocks.breaks[number + 1] = Break.INSIDE
    return blocks.document()


def _block(blocks: Blocks, number: int, closers: set[int]) -> int:
    """Note what begins at a line, and in `closers` where it ends if it holds other blocks; the line to go on with."""
    lines = blocks.lines
    line = lines[number]
    if _TABLE.match(line):
        return _table(blocks, number)
    title = _TITLE.match(line)
    if title is not None:
        end = number + 1
        if len(title.group(1)) == 1:  # the document's title, with authors and attributes below it
            while end < len(lines) and lines[end].strip():
                end += 1
        blocks.heading(number, len(title.group(1)), title.group(2), end - number)
        return end
    following = lines[number + 1] if number + 1 < len(lines) else ""
    under = _UNDERLINE.match(following)
    alone = number == 0 or not lines[number - 1].strip() or bool(_BLOCK_LINE.match(lines[number - 1]))
    if under and alone and _is_title(line) and abs(len(line.rstrip()) - len(following.rstrip())) <= 1:
        blocks.heading(number, _UNDERLINES[under.group(1)], line, 2)
        return number + 2
    if _DELIMITER.match(line):
        after = blocks.closing(number, "```" if line.startswith("```") else line.strip())
        if after is not None:
            verbatim = line.startswith(_VERBATIM) and line.strip() != "--"
            blocks.block(number, after, verbatim=verbatim)
            blocks.whole(_with_lines_above(lines, number), after)
            closers.add(after - 1)
            return after if verbatim else number + 1
    if _ATTRIBUTE.match(line) and number and _ATTRIBUTE.match(lines[number - 1]):
        blocks.breaks[number] = Break.LINE
    return number + 1


def _is_title(line: str) -> bool:
    return line[:1].isalnum() and not _DELIMITER.match(line)


def _with_lines_above(lines: list[str], first: int) -> int:
    """Where a block begins with the lines that say something about it."""
    while first > 0 and _BLOCK_LINE.match(lines[first - 1]):
        first -= 1
    return first


def _table(blocks: Blocks, first: int) -> int:
    lines = blocks.lines
    end = blocks.closing(first, lines[first].strip())
    if end is None:
        return first + 1
    header = first + 1
    options = lines[first - 1] if first else ""
    # The first row is a header if an empty line follows it, or if the table says so.
    alone = header + 1 < end - 1 and lines[header].strip() and not lines[header + 1].strip()
    named = bool(header < end - 1 and (alone or "header" in options))
    blocks.table(first, end, header, header + 1 if named else None)
    blocks.whole(_with_lines_above(lines, first), end)
    for line in range(header + 1, end - 1):
        if not _CELL.match(lines[line]):  # a row may have a line for each cell, and cells several lines
            blocks.breaks[line] = Break.INSIDE
    blocks.breaks[end - 1] = Break.INSIDE
    return end
