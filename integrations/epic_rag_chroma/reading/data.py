"""Read data files (CSV, JSON, YAML, TOML, INI, gettext, XML): split between records, members and elements.

Outer members cost less to split than inner ones. A chunk from the middle of a table is embedded with the table's
header, a chunk from the middle of a member with the lines that open the member, so that `port: 80` comes with the name
of its server.
"""

from __future__ import annotations

import csv
import html
import re
from dataclasses import replace

from epic_rag_chroma.reading.document import Document, NotTextError, RepeatedHeader, SplitCost, substituted
from epic_rag_chroma.reading.escapes import (
    Substitutions,
    entities,
    json_escapes,
    properties_escapes,
    quoted_escapes,
)
from epic_rag_chroma.reading.text import LineBlocks

__all__ = [
    "read_csv",
    "read_gettext",
    "read_ini",
    "read_json",
    "read_jsonl",
    "read_properties",
    "read_svg",
    "read_toml",
    "read_xml",
    "read_yaml",
]


_DELIMITERS = ",;\t|"
# A quote that is not closed within so many lines is an inch sign, or a mistake.
_MAX_RECORD_LINES = 100
_MAX_NAME = 100


def read_csv(lines: list[str]) -> Document:
    """Read a table as text. A record has several lines if a quoted field has."""
    costs = [SplitCost.ITEM] * len(lines)
    keep_together = []
    number = 0
    header: tuple[int, int] | None = None
    searched = False
    while number < len(lines):
        end = _record_end(lines, number)
        for line in range(number + 1, end):
            costs[line] = SplitCost.INSIDE
        if end - number > 1:
            keep_together.append((number, end))
        if not searched and lines[number].strip() and not lines[number].startswith("#"):
            searched = True
            if _is_header("\n".join(lines[number:end])):
                header = (number, end)
        number = end
    repeated_headers = []
    if header is not None and header[1] < len(lines):
        first, rows = header
        costs[rows] = SplitCost.INSIDE
        repeated_headers.append(RepeatedHeader(rows, len(lines), "\n".join(lines[first:rows])))
    return Document(lines, costs, keep_together=keep_together, repeated_headers=repeated_headers)


def _record_end(lines: list[str], first: int) -> int:
    """Return the line after a record."""
    if lines[first].count('"') % 2 == 0:
        return first + 1
    for number in range(first + 1, min(first + _MAX_RECORD_LINES, len(lines))):
        if lines[number].count('"') % 2:
            return number + 1
    return first + 1


def _is_header(record: str) -> bool:
    """Return whether the first record names columns: short, distinct, not empty, and none a number."""
    delimiter = max(_DELIMITERS, key=record.count)
    try:
        names = [name.strip() for name in next(csv.reader(record.split("\n"), delimiter=delimiter), [])]
    except csv.Error:  # for example, a field beyond the module's limit
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


# Split costs by depth; deeper lines have the highest.
_COSTS = (SplitCost.BLOCK, SplitCost.ITEM, SplitCost.SENTENCE, SplitCost.LINE)
# Nested members whose opening lines are repeated, and the longest such line; each one costs tokens.
_REPEATED_DEPTH = 2
_MAX_REPEATED = 120
_JSON_TOKEN = re.compile(r"""//[^\n]*|"(?:[^"\\]|\\.)*(?:"|$)|[\[{]|[\]}]""")
_XML_TOKEN = re.compile(r"<!--|-->|<!\[CDATA\[|\]\]>|</[^<>]*>|<[A-Za-z_][^<>]*>")
_INI_SECTION = re.compile(r"^\s*\[+\s*([^\[\]]+?)\s*\]+\s*(?:[#;].*)?$")


class _NestedLines:
    """Collects the depth of lines, and the ranges of lines of nested containers, for a `Document`."""

    def __init__(self, lines: list[str], substitutions: Substitutions) -> None:
        self._lines = lines
        self._substitutions = dict(substitutions)
        self._costs = [SplitCost.INSIDE] * len(lines)
        self._keep_together: list[tuple[int, int]] = []
        self._repeated_headers: list[RepeatedHeader] = []
        self._open: list[tuple[int, bool]] = []  # (line, whether it is repeated)
        self._openers: list[int] = []
        self._covered = 0  # lines before it have their repeated header

    @property
    def depth(self) -> int:
        return len(self._open)

    def set_depth(self, line: int, depth: int) -> None:
        """Set the depth at which a line begins."""
        self._costs[line] = _COSTS[depth] if depth < len(_COSTS) else SplitCost.INSIDE

    def open(self, line: int, *, repeat: bool) -> None:
        """Open a container on a line; `repeat` embeds the line again with the chunks inside."""
        self._repeat_openers(line + 1)
        repeat = repeat and len(self._openers) < _REPEATED_DEPTH and len(self._lines[line]) <= _MAX_REPEATED
        self._open.append((line, repeat))
        if repeat:
            self._openers.append(line)

    def close(self, line: int) -> None:
        """Close the innermost container on a line."""
        if self._open:
            self._repeat_openers(line)
            first, repeated = self._open.pop()
            if repeated:
                self._openers.pop()
            if line > first:
                self._keep_together.append((first, line + 1))

    def _repeat_openers(self, end: int) -> None:
        """Repeat the lines of the open containers for the lines since the last call and before `end`."""
        openers = [line for line in self._openers if line < self._covered]
        if openers and end > self._covered:
            text = "\n".join(
                substituted(self._lines[line], self._substitutions.get(line, ())).rstrip()
                for line in dict.fromkeys(openers)
            )
            start = self._covered
            last = self._repeated_headers[-1] if self._repeated_headers else None
            if last is not None and (last.end, last.text) == (start, text):
                start = self._repeated_headers.pop().first
            self._repeated_headers.append(RepeatedHeader(start, end, text))
        self._covered = max(end, self._covered)

    def document(self) -> Document:
        """Close the open containers and return the document."""
        while self._open:
            self.close(len(self._lines) - 1)
        return Document(
            self._lines,
            self._costs,
            keep_together=self._keep_together,
            repeated_headers=self._repeated_headers,
            substitutions=self._substitutions,
        )


def read_json(lines: list[str]) -> Document:
    """Read JSON, with or without comments, by its brackets."""
    tree = _NestedLines(lines, json_escapes(lines))
    for number, line in enumerate(lines):
        stripped = line.lstrip()
        # The members of the root are the outermost parts.
        tree.set_depth(number, max(0, tree.depth - 1) if stripped[:1] not in ("]", "}") else len(_COSTS))
        for token in _JSON_TOKEN.finditer(line):
            text = token.group()
            if text in "[{":
                tree.open(number, repeat=tree.depth > 0 and stripped.startswith('"'))
            elif text in "]}":
                tree.close(number)
    return tree.document()


def read_jsonl(lines: list[str]) -> Document:
    """Read JSON Lines: each line is a record."""
    return Document(lines, [SplitCost.ITEM] * len(lines), substitutions=json_escapes(lines))


def read_yaml(lines: list[str]) -> Document:
    """Read YAML by its indentation."""
    tree = _NestedLines(lines, quoted_escapes(lines))
    around: list[tuple[int, bool]] = []  # (indentation, whether it is an item of a list)
    last = 0
    for number, line in enumerate(lines):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            tree.set_depth(number, len(around))
            continue
        indent = len(line) - len(line.lstrip(" "))
        item = stripped == "-" or stripped.startswith("- ")
        # The items of a list may have the indentation of its key.
        while around and (around[-1][0] > indent or (around[-1][0] == indent and (around[-1][1] or not item))):
            around.pop()
            tree.close(last)
        tree.set_depth(number, len(around))
        if item or stripped.endswith((":", "|", ">", "|-", ">-")):
            around.append((indent, item))
            tree.open(number, repeat=not item)
        last = number
    return tree.document()


def read_toml(lines: list[str]) -> Document:
    """Read TOML: a table is a section."""
    return replace(read_ini(lines), substitutions=quoted_escapes(lines))


def read_properties(lines: list[str]) -> Document:
    """Read Java's .properties, with its escapes."""
    return replace(read_ini(lines), substitutions=properties_escapes(lines))


def read_gettext(lines: list[str]) -> Document:
    """Read gettext's .po: an entry is kept together; references and flags are not embedded."""
    blocks = LineBlocks(lines)
    first = 0
    for number, line in enumerate([*lines, ""]):
        if line.strip():
            continue
        for inside in range(first + 1, number):
            blocks.costs[inside] = SplitCost.INSIDE
        blocks.keep(first, number)
        first = number + 1
    blocks.substitutions = json_escapes(lines)
    blocks.hidden.update(number for number, line in enumerate(lines) if line.startswith(("#:", "#,", "#|")))
    return blocks.document()


def read_ini(lines: list[str]) -> Document:
    """Read INI files and the like: sections, and values that may continue on the next lines."""
    blocks = LineBlocks(lines)
    quoted = ""
    for number, line in enumerate(lines):
        if quoted:
            blocks.costs[number] = SplitCost.INSIDE
        section = None if quoted else _INI_SECTION.match(line)
        if section is not None:
            blocks.heading(number, 1, section.group(1))
        elif not quoted and line[:1] in (" ", "\t", "]", "}") and line.strip():
            blocks.costs[number] = SplitCost.INSIDE  # the continuation of a value
        for quotes in re.findall(r'"""|\'\'\'', line):
            quoted = quotes if not quoted else "" if quotes == quoted else quoted
    return blocks.document()


def read_xml(lines: list[str]) -> Document:
    """Read XML as text, markup included, by its tags."""
    tree = _NestedLines(lines, entities(lines))
    hidden = ""
    for number, line in enumerate(lines):
        closing = line.lstrip().startswith("</")
        tree.set_depth(number, max(0, tree.depth - 1) if not hidden and not closing else len(_COSTS))
        for match in _XML_TOKEN.finditer(line):
            text = match.group()
            if hidden:
                hidden = "" if text == hidden else hidden
            elif text in ("<!--", "<![CDATA["):
                hidden = "-->" if text == "<!--" else "]]>"
            elif text.startswith("</"):
                tree.close(number)
            elif text.startswith("<") and not text.endswith("/>") and text[1] != "!":
                tree.open(number, repeat=tree.depth > 0)
    return tree.document()


# What a picture says: its title and description, and the text that it shows.
_SVG_TEXT = re.compile(r"<(?:\w+:)?(title|desc|text|textPath|foreignObject)\b[^>]*?(/?)>", re.IGNORECASE)
_SVG_HIDDEN = re.compile(r"<!--.*?(?:-->|$)|<(style|script|metadata)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_SVG_HEIGHT = re.compile(r"\sy\s*=\s*[\"']([^\"']+)")
_SVG_TAG = re.compile(r"<[^>]*>")


def read_svg(lines: list[str]) -> Document:
    """Read the words of an SVG picture: title, description and texts; those at the same height are a line.

    Raises:
        NotTextError: If it has none.
    """
    text = _SVG_HIDDEN.sub(lambda match: "\n" * match.group().count("\n"), "\n".join(lines))
    words: list[str] = []
    spans: list[tuple[int, int]] = []
    height = ""
    position, line, counted = 0, 1, 0
    while (opening := _SVG_TEXT.search(text, position)) is not None:
        position = opening.end()
        if opening.group(2):
            continue
        closing = re.compile(rf"</(?:\w+:)?{opening.group(1)}\s*>", re.IGNORECASE).search(text, position)
        end = len(text) if closing is None else closing.start()
        content = text[position:end]
        shown = " ".join(html.unescape(_SVG_TAG.sub(_between, content)).split())
        if shown:
            start = position + len(content) - len(content.lstrip())
            line += text.count("\n", counted, start)
            counted = start
            last = line + content.strip().count("\n")
            place = _SVG_HEIGHT.search(opening.group())
            before, height = height, place.group(1) if place is not None else ""
            if height and height == before:
                words[-1] += f" {shown}"
                spans[-1] = (spans[-1][0], last)
            else:
                words.append(shown)
                spans.append((line, last))
        position = end
    if not words:
        raise NotTextError("a picture without text" if "<" in text else "not an SVG picture")
    return Document(words, [SplitCost.LINE] * len(words), spans=spans)


def _between(tag: re.Match[str]) -> str:
    """Return what separates the texts on both sides of a tag: a line of text moves, letters are only placed."""
    return " " if re.search(r"\b(?:x|dy)\s*=\s*[\"']-?[\d.]+(?:em|px|%)?[\"']", tag.group()) else ""
