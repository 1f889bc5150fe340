"""Data files (JSON, JSON Lines, YAML, TOML, INI, XML): cut between records, members and elements, outer ones first.

A chunk from the middle of a member is read with the lines that open it, so that `port: 80` says whose port it is.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator

from epic_rag_chroma.reading.document import Break, Document, Repeat
from epic_rag_chroma.reading.text import Blocks

__all__ = ["ini", "json", "json_lines", "read", "toml", "xml", "yaml"]


# --- from tables
# Tables as text (.csv, .tsv): cut between records; the model reads the header with every chunk.

_DELIMITERS = ",;\t|"
# A quote that is not closed within so many lines is a sign for inches, or a mistake.
_MAX_RECORD_LINES = 100
_MAX_NAME = 100


def read(lines: list[str]) -> Document:
    """Read a table. A record may have several lines, where a field in quotes has."""
    breaks = [Break.ITEM] * len(lines)
    wholes = []
    number = 0
    header: tuple[int, int] | None = None
    searched = False
    while number < len(lines):
        end = _record_end(lines, number)
        for line in range(number + 1, end):
            breaks[line] = Break.INSIDE
        if end - number > 1:
            wholes.append((number, end))
        if not searched and lines[number].strip() and not lines[number].startswith("#"):
            searched = True
            if _is_header("\n".join(lines[number:end])):
                header = (number, end)
        number = end
    if header is None:
        return Document(lines, breaks, wholes=wholes)
    first, rows = header
    repeats = []
    if rows < len(lines):
        breaks[rows] = Break.INSIDE
        repeats.append(Repeat(rows, len(lines), "\n".join(lines[first:rows])))
    return Document(lines, breaks, wholes=wholes, repeats=repeats)


def _record_end(lines: list[str], first: int) -> int:
    """The line after a record."""
    if lines[first].count('"') % 2 == 0:
        return first + 1
    for number in range(first + 1, min(first + _MAX_RECORD_LINES, len(lines))):
        if lines[number].count('"') % 2:
            return number + 1
    return first + 1


def _is_header(record: str) -> bool:
    """Whether the first record names columns: short, different, not empty, and none a number."""
    delimiter = max(_DELIMITERS, key=record.count)
    try:
        names = [name.strip() for name in next(csv.reader(record.split("\n"), delimiter=delimiter), [])]
    except csv.Error:  # a field beyond the module's limit, say
        return False
    if not names or any(not name or len(name) > _MAX_NAME or _is_number(name) for name in names):
        return False
    return len(set(names)) == len(names)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


# What a cut costs before a line at a depth; deeper is as bad as any.
_COSTS = (Break.BLOCK, Break.ITEM, Break.SENTENCE, Break.LINE)
# Members within members that a chunk is told about; each one costs tokens.
_TOLD_DEPTH = 2
_MAX_TOLD = 120
_JSON_TOKEN = re.compile(r"""//[^\n]*|"(?:[^"\\]|\\.)*(?:"|$)|[\[{]|[\]}]""")
_XML_TOKEN = re.compile(r"<!--|-->|<!\[CDATA\[|\]\]>|</[^<>]*>|<[A-Za-z_][^<>]*>")
_INI_SECTION = re.compile(r"^\s*\[+\s*([^\[\]]+?)\s*\]+\s*(?:[#;].*)?$")


class _Tree:
    """Lines and their depths, and the ranges of lines that an opened container takes."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self._breaks = [Break.INSIDE] * len(lines)
        self._wholes: list[tuple[int, int]] = []
        self._repeats: list[Repeat] = []
        self._open: list[tuple[int, bool]] = []  # (line, whether a chunk is told of it)
        self._told: list[int] = []
        self._told_from = 0

    @property
    def depth(self) -> int:
        return len(self._open)

    def at(self, line: int, depth: int) -> None:
        """Say at which depth a line begins."""
        self._breaks[line] = _COSTS[depth] if depth < len(_COSTS) else Break.INSIDE

    def open(self, line: int, *, told: bool) -> None:
        """A container begins on a line; what follows is deeper."""
        self._tell(line + 1)
        told = told and len(self._told) < _TOLD_DEPTH and len(self._lines[line]) <= _MAX_TOLD
        self._open.append((line, told))
        if told:
            self._told.append(line)

    def close(self, line: int) -> None:
        """The innermost container ends on a line."""
        if self._open:
            self._tell(line)
            first, told = self._open.pop()
            if told:
                self._told.pop()
            if line > first:
                self._wholes.append((first, line + 1))

    def _tell(self, until: int) -> None:
        """What chunks that begin before a line, and after the last such one, are told."""
        told = [line for line in self._told if line < self._told_from]
        if told and until > self._told_from:
            text = "\n".join(self._lines[line].rstrip() for line in dict.fromkeys(told))
            start = self._told_from
            if self._repeats and (self._repeats[-1].end, self._repeats[-1].text) == (start, text):
                start = self._repeats.pop().first
            self._repeats.append(Repeat(start, until, text))
        self._told_from = max(until, self._told_from)

    def document(self) -> Document:
        while self._open:
            self.close(len(self._lines) - 1)
        return Document(self._lines, self._breaks, wholes=self._wholes, repeats=self._repeats)


def json(lines: list[str]) -> Document:
    """Read JSON, comments allowed. What stands on one line is cut at commas."""
    tree = _Tree(lines)
    for number, line in enumerate(lines):
        stripped = line.lstrip()
        # The root is no member: its members are the outermost parts.
        tree.at(number, max(0, tree.depth - 1) if stripped[:1] not in ("]", "}") else len(_COSTS))
        for token in _JSON_TOKEN.finditer(line):
            text = token.group()
            if text in "[{":
                tree.open(number, told=tree.depth > 0 and stripped.startswith('"'))
            elif text in "]}":
                tree.close(number)
    return tree.document()


def json_lines(lines: list[str]) -> Document:
    """Read JSON Lines: each line is a record."""
    return Document(lines, [Break.ITEM] * len(lines))


def yaml(lines: list[str]) -> Document:
    """Read YAML by its indentation, which is what nests in it."""
    tree = _Tree(lines)
    around: list[tuple[int, bool]] = []  # (indentation, whether it is an item of a list)
    last = 0
    for number, line in enumerate(lines):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            tree.at(number, len(around))
            continue
        indent = len(line) - len(line.lstrip(" "))
        item = stripped == "-" or stripped.startswith("- ")
        # The items of a list may stand right under its key.
        while around and (around[-1][0] > indent or (around[-1][0] == indent and (around[-1][1] or not item))):
            around.pop()
            tree.close(last)
        tree.at(number, len(around))
        if item or stripped.endswith((":", "|", ">", "|-", ">-")):
            around.append((indent, item))
            tree.open(number, told=not item)
        last = number
    return tree.document()


def toml(lines: list[str]) -> Document:
    """Read TOML: a table is a section."""
    return _tables(lines)


def ini(lines: list[str]) -> Document:
    """Read INI files and the like."""
    return _tables(lines)


def _tables(lines: list[str]) -> Document:
    blocks = Blocks(lines)
    quoted = ""
    for number, line in enumerate(lines):
        if quoted:
            blocks.breaks[number] = Break.INSIDE
        section = None if quoted else _INI_SECTION.match(line)
        if section is not None:
            blocks.heading(number, 1, section.group(1))
        elif not quoted and line[:1] in (" ", "\t", "]", "}") and line.strip():
            blocks.breaks[number] = Break.INSIDE  # a value goes on
        for quotes in re.findall(r'"""|\'\'\'', line):
            quoted = quotes if not quoted else "" if quotes == quoted else quoted
    return blocks.document()


def xml(lines: list[str]) -> Document:
    """Read XML as it is written, markup included."""
    tree = _Tree(lines)
    hidden = ""
    for number, line in enumerate(lines):
        closing = line.lstrip().startswith("</")
        tree.at(number, max(0, tree.depth - 1) if not hidden and not closing else len(_COSTS))
        for text in _tokens(line):
            if hidden:
                hidden = "" if text == hidden else hidden
            elif text in ("<!--", "<![CDATA["):
                hidden = "-->" if text == "<!--" else "]]>"
            elif text.startswith("</"):
                tree.close(number)
            elif text.startswith("<") and not text.endswith("/>") and text[1] != "!":
                tree.open(number, told=tree.depth > 0)
    return tree.document()


def _tokens(line: str) -> Iterator[str]:
    return (match.group() for match in _XML_TOKEN.finditer(line))
