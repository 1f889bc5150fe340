"""LaTeX: sections for headings, environments whole, items and rows as places to cut."""

from __future__ import annotations

import re

from epic_rag_chroma.blocks import Blocks
from epic_rag_chroma.document import Break, Document

__all__ = ["read"]

_LEVELS = {
    "title": 0, "part": 1, "chapter": 2, "section": 3, "subsection": 4, "subsubsection": 5, "paragraph": 6,
    "subparagraph": 7,
}  # fmt: skip
_HEADING = re.compile(rf"^\s*\\({'|'.join(_LEVELS)})\*?\s*(?:\[[^\]]*\])?\s*\{{")
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([\w*@-]+)\}")
_VERBATIM = re.compile(r"verbatim\*?|Verbatim|lstlisting|minted|comment|alltt|filecontents\*?")
# Environments that are the text rather than something in it.
_TRANSPARENT = frozenset({"document", "abstract", "frame", "appendices", "multicols"})
_ROWS = re.compile(r"tabular\w*\*?|longtable|array|tabu|align\*?|matrix")
_COMMAND = re.compile(r"\\[a-zA-Z]+\*?(?:\[[^\]]*\])?\s*")
_MAX_TITLE_LINES = 4
_MAX_DEPTH = 50


def read(lines: list[str]) -> Document:
    """Read a LaTeX file."""
    blocks = Blocks(lines)
    around: list[tuple[str, int]] = []
    ends_row = False
    number = 0
    while number < len(lines):
        code = _code(lines[number])
        if around and _VERBATIM.fullmatch(around[-1][0]):
            if f"\\end{{{around[-1][0]}}}" in lines[number]:
                _, first = around.pop()
                blocks.block(first, number + 1, verbatim=True)
            number += 1
            continue
        heading = _HEADING.match(code)
        if heading is not None:
            title, end = _argument(lines, number, heading.end())
            if title is not None:
                blocks.heading(number, _LEVELS[heading.group(1)], _plain(title), end - number)
                number = end
                continue
        if code.lstrip().startswith("\\item"):
            blocks.breaks[number] = min(blocks.breaks[number], Break.ITEM)
        elif around and _ROWS.fullmatch(around[-1][0]) and number > around[-1][1] + 1:
            blocks.breaks[number] = Break.ITEM if ends_row else Break.INSIDE
        ends_row = code.rstrip().endswith(("\\\\", "\\hline", "\\midrule", "\\toprule", "\\tabularnewline"))
        for match in _ENVIRONMENT.finditer(code):
            _environment(blocks, around, match, number)
        number += 1
    return blocks.document()


def _environment(blocks: Blocks, around: list[tuple[str, int]], match: re.Match[str], number: int) -> None:
    kind, name = match.groups()
    if kind == "begin" and len(around) < _MAX_DEPTH:
        around.append((name, number))
    elif kind == "end" and any(open_name == name for open_name, _ in around):
        while True:  # what was never closed ends with what it stands in
            open_name, first = around.pop()
            if open_name == name:
                break
        if name not in _TRANSPARENT:
            blocks.whole(first, number + 1)
            if number > first:
                blocks.breaks[first + 1] = Break.INSIDE
                blocks.breaks[number] = Break.INSIDE


def _code(line: str) -> str:
    """A line without its comment."""
    if "%" not in line:
        return line
    return re.split(r"(?<!\\)%", line, maxsplit=1)[0]


def _argument(lines: list[str], number: int, start: int) -> tuple[str | None, int]:
    """What stands in the braces that open before a column, and the line after it; None if they do not close."""
    depth = 1
    taken: list[str] = []
    for line in range(number, min(number + _MAX_TITLE_LINES, len(lines))):
        text = _code(lines[line])
        for column in range(start if line == number else 0, len(text)):
            char = text[column]
            if char in "{}" and (column == 0 or text[column - 1] != "\\"):
                depth += 1 if char == "{" else -1
                if depth == 0:
                    return "".join(taken), line + 1
            taken.append(char)
        taken.append(" ")
    return None, number + 1


def _plain(title: str) -> str:
    """A title without commands; what stands in their braces stays."""
    title = re.sub(r"\\(?:label|footnote|thanks|index)\s*\{[^{}]*\}", "", title)
    title = title.replace("\\\\", " ").replace("~", " ").replace("``", '"').replace("''", '"')
    title = re.sub(r"\\([%&#$_{}])", r"\1", _COMMAND.sub("", title).replace("$", ""))
    return title.replace("{", "").replace("}", "")
