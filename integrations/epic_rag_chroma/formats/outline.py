"""Org files and manual pages: text with its headings in the lines."""

from __future__ import annotations

import re

from epic_rag_chroma.blocks import Blocks
from epic_rag_chroma.document import Break, Document

__all__ = ["manual", "org"]

_ORG_HEADING = re.compile(
    r"^(\*{1,12})\s+(?:(?:TODO|DONE|NEXT|WAITING)\s+)?(?:\[#\w\]\s+)?(\S.*?)(?:\s+:[\w@#%:]+:)?\s*$"
)
_ORG_TITLE = re.compile(r"^#\+title:\s*(\S.*)$", re.IGNORECASE)
_ORG_BEGIN = re.compile(r"^\s*#\+begin_(\w+)", re.IGNORECASE)
_ORG_VERBATIM = frozenset({"src", "example", "export", "comment", "verse"})
_ORG_RULE = re.compile(r"^\s*\|[-+]+\|?\s*$")
_ORG_BULLET = re.compile(r"(?:[-+]|\d{1,3}[.)])\s+\S")

_MACRO = re.compile(r"^[.'](TH|SH|SS|Dt|Sh|Ss|TP|IP|PP|P|LP|HP|Pp|It|nf|EX|Bd|fi|EE|Ed)\b\s*(.*)$")
_MAN_TITLES = {"SH": 1, "Sh": 1, "SS": 2, "Ss": 2}
_MAN_OPENS = {"nf": "fi", "EX": "EE", "Bd": "Ed"}
_FONT = re.compile(r"\\f(?:\[\w*\]|\(\w\w|.)|\\s[+-]?\d|\\&")


def org(lines: list[str]) -> Document:
    """Read an Org file."""
    blocks = Blocks(lines)
    number = 0
    while number < len(lines):
        line = lines[number]
        begin = _ORG_BEGIN.match(line)
        heading = _ORG_HEADING.match(line)
        title = _ORG_TITLE.match(line)
        if begin is not None:
            name = begin.group(1).lower()
            end = blocks.closing(number, f"#+end_{name}")
            if end is not None:
                blocks.block(number, end, verbatim=name in _ORG_VERBATIM)
                number = end
                continue
        elif heading is not None:
            blocks.heading(number, len(heading.group(1)), heading.group(2))
        elif title is not None:
            blocks.heading(number, 0, title.group(1))
        elif line.lstrip().startswith("|"):
            number = _org_table(blocks, number)
            continue
        number += 1
    blocks.items(_ORG_BULLET)
    return blocks.document()


def _org_table(blocks: Blocks, first: int) -> int:
    lines = blocks.lines
    end = first
    while end < len(lines) and lines[end].lstrip().startswith("|"):
        end += 1
    start = first + 1 if _ORG_RULE.match(lines[first]) and first + 1 < end else first
    rule = next((line for line in range(start + 1, end) if _ORG_RULE.match(lines[line])), None)
    blocks.table(first, end, start, rule)
    return end


def manual(lines: list[str]) -> Document:
    """Read the source of a manual page (man or mdoc macros); a file of that name without macros is plain text."""
    blocks = Blocks(lines)
    opened: tuple[str, int] | None = None
    for number, line in enumerate(lines):
        macro = _MACRO.match(line)
        if macro is None:
            continue
        name, rest = macro.groups()
        if opened is not None:
            if name == opened[0]:
                blocks.block(opened[1], number + 1)
                opened = None
        elif name in _MAN_OPENS:
            opened = (_MAN_OPENS[name], number)
        elif name in ("TH", "Dt"):
            title = _man_text(rest).split()
            if title:
                blocks.heading(number, 0, title[0].lower())
        elif name in _MAN_TITLES:
            height = 1
            if not rest.strip() and number + 1 < len(lines):  # man allows the title on the next line
                rest, height = lines[number + 1], 2
            blocks.heading(number, _MAN_TITLES[name], _man_text(rest), min(height, len(lines) - number))
        else:
            blocks.breaks[number] = Break.BLOCK if name in ("PP", "P", "LP", "Pp") else Break.ITEM
            blocks.together(number, number + 2)
    return blocks.document()


def _man_text(text: str) -> str:
    return _FONT.sub("", text).replace('"', "").replace("\\-", "-").replace("\\ ", " ").strip()
