"""Headings and breaks of the formats whose lines are the text: Markdown, reStructuredText, source code, plain text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from epic_rag_chroma.document import Break, Document, Heading, clean_title, line_breaks

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

__all__ = ["code", "markdown", "plain", "restructured"]

_FRONT_MATTER_LINES = 200
_FRONT_MATTER_TITLE = re.compile(r"""^title\s*[:=]\s*(['"]?)(.+?)\1\s*$""")
_ADORNMENT = re.compile(r"""^([!-/:-@\[-`{-~])\1+\s*$""")
_CLOSING = re.compile(r"^[\s})\]>;,]+$|^\s*(end|fi|done|esac)\b")


def plain(lines: list[str]) -> Document:
    """Plain text: paragraphs, no headings."""
    return Document(lines, line_breaks(lines))


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
            for line in range(first + 1, end):
                breaks[line] = Break.INSIDE if lines[line - 1].strip() else Break.LINE
        elif token.type == "list_item_open":
            breaks[first] = min(breaks[first], Break.ITEM)
        elif token.type == "table_open":
            for line in range(first + 1, end):
                # Header, rule and first row stay together.
                breaks[line] = Break.INSIDE if line < first + 3 else Break.ITEM
        if token.level == 0:
            breaks[first] = Break.BLOCK
    if len(headings) > 1 and headings[0].level == 0 and headings[1].title == headings[0].title:
        headings.pop(0)  # the front matter's title, said again by the first heading
    return Document(lines, breaks, headings)


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
    headings: list[Heading] = []
    styles: list[tuple[str, bool]] = []
    breaks = line_breaks(lines)
    for number in range(1, len(lines)):
        title = lines[number - 1]
        if not _is_underline(lines[number], title):
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
        headings.append(Heading(first, styles.index((mark, over)) + 1, text, number + 1 - first))
        breaks[first] = Break.BLOCK
        for line in range(first + 1, number + 1):
            breaks[line] = Break.INSIDE
    return Document(lines, breaks, headings)


def _is_underline(line: str, title: str) -> bool:
    if not _ADORNMENT.match(line) or not title.strip() or _ADORNMENT.match(title):
        return False
    # docutils wants the underline to be at least as long as the title; one or two characters short is a warning there.
    return len(line.rstrip()) >= max(2, len(title.strip()) - 2)
