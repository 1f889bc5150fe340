"""The commonest formats: Markdown, reStructuredText, plain text, and source code where nothing parses it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from epic_rag_chroma.blocks import Blocks
from epic_rag_chroma.document import Break, Document, Heading, Repeat, clean_title, line_breaks

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

__all__ = ["code", "markdown", "plain", "restructured"]

_FRONT_MATTER_LINES = 200
_FRONT_MATTER_TITLE = re.compile(r"""^title\s*[:=]\s*(['"]?)(.+?)\1\s*$""")
_ADORNMENT = re.compile(r"""^([!-/:-@\[-`{-~])\1+\s*$""")
_GRID_BORDER = re.compile(r"^\s*\+[-=+]+\+\s*$")
_SIMPLE_BORDER = re.compile(r"^\s*=+(?: +=+)+\s*$")
_DIRECTIVE = re.compile(r"^\s*\.\. [\w:+-]+::")
_VERBATIM_DIRECTIVE = re.compile(r"^\s*\.\. (?:[\w:-]*code[\w:-]*|literalinclude|parsed-literal|math|raw|graphviz)::")
_BULLET = re.compile(r"(?:[-*+•]|\d{1,3}[.)]|[a-zA-Z#][.)]|\(\w{1,3}\))\s+\S")
_CLOSING = re.compile(r"^[\s})\]>;,]+$|^\s*(end|fi|done|esac)\b")


def plain(lines: list[str]) -> Document:
    """Plain text: paragraphs and lists, no headings."""
    blocks = Blocks(lines)
    blocks.items(_BULLET)
    return blocks.document()


def code(lines: list[str]) -> Document:
    """Source code: cut before what begins at the margin after a blank line, then at blank lines."""
    breaks = []
    previous = ""
    for line in lines:
        indented = line[:1] in (" ", "\t")
        if not line.strip() or _CLOSING.match(line):
            breaks.append(Break.INSIDE)
        elif not previous.strip():
            breaks.append(Break.SENTENCE if indented else Break.BLOCK)
        else:
            breaks.append(Break.INSIDE if indented else Break.LINE)
        previous = line
    return Document(lines, breaks)


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # Blocks are all that is asked for; without the inline rules a file parses in a fraction of the time.
    return MarkdownIt("commonmark").enable("table").disable("inline")


def markdown(lines: list[str]) -> Document:
    """Markdown by CommonMark's rules: a # in a code fence is no heading, an underlined title is one."""
    breaks = line_breaks(lines)
    headings: list[Heading] = []
    wholes: list[tuple[int, int]] = []
    repeats: list[Repeat] = []
    skipped, title = _front_matter(lines)
    if title:
        headings.append(Heading(0, 0, title, skipped))
    for line in range(1, skipped):
        breaks[line] = Break.INSIDE
    # The front matter's closing line would make a heading of the line above it.
    tokens = _parser().parse("\n".join([""] * skipped + lines[skipped:]))
    for token, following in zip(tokens, [*tokens[1:], None], strict=False):
        if token.map is None:
            continue
        first, end = token.map[0], min(token.map[1], len(lines))
        if token.type == "heading_open" and token.level == 0 and following is not None:
            text = clean_title(following.content)
            if text:
                headings.append(Heading(first, int(token.tag[1]), text, end - first))
            for line in range(first + 1, end):
                breaks[line] = Break.INSIDE
        elif token.type in ("fence", "code_block"):
            wholes.append((first, end))
            for line in range(first + 1, end):
                breaks[line] = Break.INSIDE if lines[line - 1].strip() else Break.LINE
        elif token.type == "list_item_open":
            wholes.append((first, end))
            breaks[first] = min(breaks[first], Break.ITEM)
        elif token.type == "table_open":
            wholes.append((first, end))
            if token.level == 0 and end > first + 3:
                repeats.append(Repeat(first + 3, end, lines[first]))
            for line in range(first + 1, end):
                # Header, rule and first row stay together.
                breaks[line] = Break.INSIDE if line < first + 3 else Break.ITEM
        if token.level == 0:
            breaks[first] = Break.BLOCK
    if len(headings) > 1 and headings[0].level == 0 and headings[1].title == headings[0].title:
        headings.pop(0)  # the front matter's title, said again by the first heading
    return Document(lines, breaks, headings, wholes=wholes, repeats=repeats)


def _front_matter(lines: list[str]) -> tuple[int, str]:
    """Number of lines of YAML or TOML front matter, and the title that it gives."""
    mark = lines[0].rstrip() if lines else ""
    if mark not in ("---", "+++"):
        return 0, ""
    title = ""
    for number, line in enumerate(lines[1:_FRONT_MATTER_LINES], start=1):
        if line.rstrip() in (mark, "..." if mark == "---" else mark):
            return number + 1, title
        match = _FRONT_MATTER_TITLE.match(line)
        if match and not title:
            title = clean_title(match.group(2))
    return 0, ""


def restructured(lines: list[str]) -> Document:
    """reStructuredText: titles by their under- and overlines, levels in the order in which styles appear."""
    blocks = Blocks(lines)
    _rst_blocks(blocks)
    styles: list[tuple[str, bool]] = []
    for number in range(1, len(lines)):
        title = lines[number - 1]
        if number in blocks.verbatim or not _is_underline(lines[number], title):
            continue
        before = lines[number - 2] if number >= 2 else ""
        mark = lines[number][0]
        over = bool(_ADORNMENT.match(before)) and before[0] == mark and len(before.rstrip()) >= len(title.strip())
        if (before.strip() and not over) or (title[:1].isspace() and not over):
            continue
        text = clean_title(title.strip())
        if not text:
            continue
        if (mark, over) not in styles:
            styles.append((mark, over))
        first = number - 2 if over else number - 1
        blocks.heading(first, styles.index((mark, over)) + 1, text, number + 1 - first)
    return blocks.document()


def _rst_blocks(blocks: Blocks) -> None:
    """Literal blocks and directives with what is indented under them, tables, list items."""
    lines = blocks.lines
    number = 0
    while number < len(lines):
        line = lines[number]
        if _GRID_BORDER.match(line):
            end = number + 1
            while end < len(lines) and lines[end].lstrip()[:1] in ("+", "|"):
                end += 1
            header = next((row for row in range(number + 1, end) if set(lines[row].strip()) <= set("+=")), None)
            blocks.table(number, end, number + 1, header)
            number = end
        elif _SIMPLE_BORDER.match(line):
            number = _simple_table(blocks, number)
        elif line.rstrip().endswith("::") or _DIRECTIVE.match(line):
            end = blocks.indented_end(number)
            blocks.whole(number, end)
            if end > number + 1 and (_DIRECTIVE.match(line) is None or _VERBATIM_DIRECTIVE.match(line)):
                blocks.verbatim.update(range(number + 1, end))
                number = end
                continue
            number += 1
        else:
            number += 1
    blocks.items(_BULLET)


def _simple_table(blocks: Blocks, first: int) -> int:
    """A table between borders of `=`; the line after it."""
    lines = blocks.lines
    borders = [first]
    end = first + 1
    while end < len(lines) and len(borders) < 3:
        if _SIMPLE_BORDER.match(lines[end]):
            borders.append(end)
            if end + 1 >= len(lines) or not lines[end + 1].strip():
                break
        elif not lines[end].strip() and len(borders) > 2:
            break
        end += 1
    if len(borders) < 2:
        return first + 1
    last = borders[-1] + 1
    blocks.table(first, last, first + 1, borders[1] if len(borders) > 2 else None)
    return last


def _is_underline(line: str, title: str) -> bool:
    if not _ADORNMENT.match(line) or not title.strip() or _ADORNMENT.match(title):
        return False
    # docutils wants the underline to be at least as long as the title; one or two characters short is a warning there.
    return len(line.rstrip()) >= max(2, len(title.strip()) - 2)
