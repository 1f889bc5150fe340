"""Read Markdown by CommonMark's rules, with tables, front matter, and the JSX of MDX.

markdown-it-py finds the blocks. Markup that nobody sees is not embedded: comments, tags, heading ids, imports, JSX,
template tags, fences, the marks of code and strong text, the bars of tables, and the targets of links within the same
documents; entities and backslash escapes are embedded as the characters that they stand for.
"""

from __future__ import annotations

import html
import re
from bisect import bisect_right
from functools import lru_cache
from typing import TYPE_CHECKING

from epic_rag_chroma.reading.document import (
    Document,
    Heading,
    RepeatedHeader,
    SplitCost,
    Substitution,
    plain_title,
    text_split_costs,
)
from epic_rag_chroma.reading.escapes import entity_text
from epic_rag_chroma.reading.front_matter import read_front_matter

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

__all__ = ["read_markdown"]

_HTML_NAMES = (
    "a abbr address area article aside audio b bdi bdo big blockquote body br button canvas caption center cite code "
    "col colgroup dd del details dfn div dl dt em embed figcaption figure font footer form h1 h2 h3 h4 h5 h6 header hr "
    "html i iframe img input ins kbd label legend li link main map mark meta nav object ol option p param picture pre "
    "progress q rp rt ruby s samp section select small source span strike strong sub summary sup svg table tbody td "
    "template textarea tfoot th thead time title tr track tt u ul var video wbr g path rect circle line polyline "
    "polygon ellipse text tspan defs use desc"
)
_ATTRIBUTES = r"""(?:\s(?:[^<>"'`{}]|"[^"]*"|'[^']*'|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})*)?"""
_MARKUP = re.compile(
    r"(?P<comment><!--.{0,20000}?-->|\{/\*.{0,20000}?\*/\})"
    r"|(?P<raw><(?P<name>script|style)\b[^<>]*>.{0,20000}?</(?P=name)\s*>)"
    rf"|(?P<html></?(?:{'|'.join(_HTML_NAMES.split())})(?![\w.:-]){_ATTRIBUTES}/?>)"
    rf"|(?P<jsx></?[A-Z][\w.]*{_ATTRIBUTES}/?>)"
    r"|(?P<fragment></?>)"
    r"|(?P<template>\{\{[<%][^\n]*?[%>]\}\}|\{%[^\n]*?%\})"
    r"|(?P<entity>&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});)"
    r"|(?P<escape>\\[!-/:-@\[-`{-~])",
    re.DOTALL | re.IGNORECASE,
)
_CLOSING_TAG = re.compile(r"</([A-Z][\w.]*)\s*>")
_JSX_NAME = re.compile(r"</?[A-Z]")
# Attributes that are read: what a picture shows, and the titles of components.
_SHOWN_ATTRIBUTE = re.compile(
    r"""(?<![\w-])(?:alt|title|label|heading|caption|description|summary)\s*=\s*\{?(?:"([^"]*)"|'([^']*)')""",
    re.IGNORECASE,
)
_CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_STRONG = re.compile(r"(\*\*|__)(?=\S)([^\n]+?)(?<=\S)\1")
_BAR = re.compile(r"(?<!\\)\|")
# A link or picture whose target has no scheme, such as a heading or a file beside this one.
_LOCAL_LINK = re.compile(r"(!?\[)([^\[\]\n]+)(\]\((?!\w+:|//)[^()\s]*(?:\s+\"[^\"\n]*\")?\))")
_TAG = re.compile(r"<!--.*?-->|</?[a-zA-Z][^>]*>", re.DOTALL)
_HTML_HEADING = re.compile(r"<h([1-6])\b[^>]*>(.*?)</h\1\s*>", re.DOTALL | re.IGNORECASE)
# An id, classes or a comment at the end of a heading, and Kramdown's attributes on a line of their own.
_HEADING_ID = re.compile(r"(?:\s*(?:\{[#.:][^{}]*\}|\{/\*.*?\*/\}|<!--.*?-->))+\s*#*\s*$", re.DOTALL)
_ATTRIBUTE_LINE = re.compile(r"^\s{0,3}\{:[^{}]*\}\s*$")
_RULE = re.compile(r"^\s{0,3}(?:=+|-+)\s*$")
_IMPORT = re.compile(r"""^import\s+(?:[\w*{][^'"]*?\sfrom\s+)?['"][^'"]+['"];?\s*$""")
_EXPORT = re.compile(r"^export\s+(?:default|const|let|var|function|async|class|\{|\*)")
_MAX_IMPORT_LINES = 20


@lru_cache(maxsize=1)
def _parsers() -> tuple[MarkdownIt, MarkdownIt]:
    """Return the parser of blocks, and that of the text inside them; without the latter's rules, blocks are fast."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").enable("table").disable("inline"), MarkdownIt("commonmark")


def read_markdown(lines: list[str], *, mdx: bool = False) -> Document:
    """Read Markdown; in MDX, all tags with a capital are components and `export` begins code."""
    costs = text_split_costs(lines)
    headings: list[Heading] = []
    keep_together: list[tuple[int, int]] = []
    repeated_headers: list[RepeatedHeader] = []
    verbatim: set[int] = set()
    rows: set[int] = set()
    titles: set[int] = set()
    front = read_front_matter(lines)
    if front is not None:
        lines = [*[""] * front.end, *lines[front.end :]]
        costs[: front.end] = [SplitCost.BLOCK] * front.end
        if plain_title(front.title):
            headings.append(Heading(0, 0, plain_title(front.title), front.end))
    modules = _module_lines(lines, mdx=mdx)
    hidden = set(modules)
    parsed = [("" if number in modules else line) for number, line in enumerate(lines)] if modules else lines
    tokens = _parsers()[0].parse("\n".join(parsed))
    for token, following in zip(tokens, [*tokens[1:], None], strict=False):
        if token.map is None:
            continue
        first, end = token.map[0], min(token.map[1], len(lines))
        if token.type == "heading_open" and token.level == 0 and following is not None:
            text = _heading_text(following.content)
            if text:
                headings.append(Heading(first, int(token.tag[1]), text, end - first))
            titles.add(first)
            for line in range(first + 1, end):
                costs[line] = SplitCost.INSIDE
                if _RULE.match(lines[line]):
                    hidden.add(line)  # the rule below a title
        elif token.type in ("fence", "code_block"):
            keep_together.append((first, end))
            verbatim.update(range(first, end))
            if token.type == "fence":
                hidden.add(first)
                if end - first > 1 and lines[end - 1].strip().strip("> ").startswith(token.markup):
                    hidden.add(end - 1)
            for line in range(first + 1, end):
                costs[line] = SplitCost.INSIDE if lines[line - 1].strip() else SplitCost.LINE
        elif token.type == "html_block" and token.level == 0:
            for found in _html_headings(token.content, first):
                headings.append(found)
                for line in range(found.line + 1, min(found.line + found.height, len(lines))):
                    costs[line] = SplitCost.INSIDE
        elif token.type == "list_item_open":
            keep_together.append((first, end))
            costs[first] = min(costs[first], SplitCost.ITEM)
        elif token.type == "table_open":
            keep_together.append((first, end))
            rows.update(range(first, end))
            hidden.add(first + 1)
            if token.level == 0 and end > first + 3:
                repeated_headers.append(RepeatedHeader(first + 3, end, " ".join(_BAR.sub(" ", lines[first]).split())))
            for line in range(first + 1, end):
                # Header, rule and first row stay together.
                costs[line] = SplitCost.INSIDE if line < first + 3 else SplitCost.ITEM
        if token.level == 0:
            costs[first] = SplitCost.BLOCK
    if len(headings) > 1 and headings[0].level == 0 and headings[1].title == headings[0].title:
        headings.pop(0)  # the front matter's title repeats the first heading
    hidden |= {n for n, line in enumerate(lines) if n not in verbatim and _ATTRIBUTE_LINE.match(line)}
    return Document(
        lines,
        costs,
        headings,
        keep_together=keep_together,
        repeated_headers=repeated_headers,
        display_only=frozenset(hidden),
        substitutions=_with_marks(
            lines,
            verbatim | hidden,
            rows,
            _substitutions(lines, verbatim | hidden, titles, mdx=mdx or bool(modules)),
        ),
        metadata={} if front is None else front.metadata,
    )


def _module_lines(lines: list[str], *, mdx: bool) -> set[int]:
    """Return the lines with the imports and exports of MDX; exports only in MDX or together with imports."""
    found: set[int] = set()
    fence = ""
    number = 0
    while number < len(lines):
        line = lines[number]
        mark = re.match(r"^\s{0,3}(`{3,}|~{3,})", line)
        if mark is not None and (not fence or mark.group(1).startswith(fence)):
            fence = "" if fence else mark.group(1)
        elif not fence and line.startswith("import "):
            # An import may take several lines, up to the name of its module.
            for end in range(number + 1, min(number + _MAX_IMPORT_LINES, len(lines)) + 1):
                if not lines[end - 1].strip():
                    break
                if _IMPORT.match(" ".join(lines[number:end])):
                    found.update(range(number, end))
                    number = end - 1
                    break
        elif not fence and (mdx or found) and _EXPORT.match(line):
            end, depth = number, 0
            while end < len(lines):
                depth += sum(lines[end].count(mark) for mark in "([{") - sum(lines[end].count(mark) for mark in ")]}")
                end += 1
                if depth <= 0 and (end >= len(lines) or not lines[end].strip() or _EXPORT.match(lines[end])):
                    break
            found.update(range(number, end))
            number = end - 1
        number += 1
    return found


def _heading_text(content: str) -> str:
    """Return the text that a heading shows."""
    tokens = _parsers()[1].parseInline(_HEADING_ID.sub("", content))
    parts: list[str] = []
    for token in (tokens[0].children or []) if tokens else []:
        if token.type in ("text", "code_inline", "image"):
            parts.append(token.content)
        elif token.type in ("softbreak", "hardbreak"):
            parts.append(" ")
    return plain_title("".join(parts).replace("\u00b6", ""))


def _html_headings(content: str, first: int) -> list[Heading]:
    """Return the headings of a block of HTML; one with only a picture is titled by its description."""
    found = []
    for match in _HTML_HEADING.finditer(content):
        inner = match.group(2)
        title = plain_title(html.unescape(_TAG.sub("", inner))) or plain_title(html.unescape(_shown(inner)))
        if title:
            line = first + content.count("\n", 0, match.start())
            found.append(Heading(line, int(match.group(1)), title, match.group().count("\n") + 1))
    return found


def _shown(markup: str) -> str:
    """Return the attributes of markup that are read."""
    return " ".join(filter(None, (first or second for first, second in _SHOWN_ATTRIBUTE.findall(markup))))


def _substitutions(
    lines: list[str], skipped: set[int], titles: set[int], *, mdx: bool
) -> dict[int, tuple[Substitution, ...]]:
    """Return the substitutions of markup, entities and escapes outside of code."""
    text = "\n".join(" " * len(line) if number in skipped else line for number, line in enumerate(lines))
    if not any(mark in text for mark in "<&\\{"):
        return {}
    # Code spans are masked; a blank line ends a paragraph and with it every span.
    parts = re.split(r"(\n[ \t]*\n)", text)
    text = "".join(
        part if "`" not in part else _CODE_SPAN.sub(lambda match: re.sub(r"[^\n]", "\0", match.group()), part)
        for part in parts
    )
    starts = [0]
    for content in lines:
        starts.append(starts[-1] + len(content) + 1)
    closed = set(_CLOSING_TAG.findall(text))
    found: dict[int, list[Substitution]] = {}
    line = 0
    for match in _MARKUP.finditer(text):
        shown = _replacement(match, closed, mdx=mdx)
        if shown is None:
            continue
        while starts[line + 1] <= match.start():
            line += 1
        start, end, number = match.start(), match.end(), line
        while start < end:  # a part for each line
            stop = min(end, starts[number + 1] - 1)
            found.setdefault(number, []).append((start - starts[number], stop - starts[number], shown))
            shown = ""
            start, number = starts[number + 1], number + 1
    for number in titles:
        match_id = _HEADING_ID.search(lines[number])
        if match_id is not None:
            kept = [one for one in found.get(number, []) if one[1] <= match_id.start()]
            found[number] = [*kept, (match_id.start(), match_id.end(), "")]
    return {number: tuple(some) for number, some in found.items()}


def _with_marks(
    lines: list[str], skipped: set[int], rows: set[int], found: dict[int, tuple[Substitution, ...]]
) -> dict[int, tuple[Substitution, ...]]:
    """Add the marks of code and strong text, the bars of tables and the targets of local links to substitutions."""
    text = "\n".join(" " * len(line) if number in skipped else line for number, line in enumerate(lines))
    marks: list[Substitution] = []

    def masked(match: re.Match[str]) -> str:
        length = len(match[1])
        marks.extend(((match.start(), match.start() + length, ""), (match.end() - length, match.end(), "")))
        return re.sub(r"[^\n]", "\0", match.group())

    # A blank line ends a paragraph and with it every code span.
    parts, offset = [], 0
    for part in re.split(r"(\n[ \t]*\n)", text):
        start = len(marks)
        parts.append(_CODE_SPAN.sub(masked, part) if "`" in part else part)
        marks[start:] = [(first + offset, last + offset, shown) for first, last, shown in marks[start:]]
        offset += len(part)
    text = "".join(parts)
    for match in _STRONG.finditer(text):
        marks.append((match.start(), match.start() + 2, ""))
        marks.append((match.end() - 2, match.end(), ""))
    for match in _LOCAL_LINK.finditer(text):
        marks += ((match.start(group), match.end(group), "") for group in (1, 3))
    changed = {number: [*some] for number, some in found.items()}
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    marks += (
        (starts[number] + bar.start(), starts[number] + bar.end(), " ")
        for number in rows - skipped
        for bar in _BAR.finditer(text[starts[number] : starts[number + 1]])
    )
    for first, last, shown in marks:
        number = bisect_right(starts, first) - 1
        some = changed.setdefault(number, [])
        begin, end = first - starts[number], last - starts[number]
        if end <= len(lines[number]) and not any(begin < other[1] and other[0] < end for other in some):
            some.append((begin, end, shown))
    return {number: tuple(sorted(some)) for number, some in changed.items() if some}


def _replacement(match: re.Match[str], closed: set[str], *, mdx: bool) -> str | None:
    """Return the text that stands for a piece of markup; None to leave it."""
    text = match.group()
    if match.lastgroup == "entity":
        return entity_text(text)
    if match.lastgroup == "escape":
        return text[1]
    if match.group("jsx") is not None:
        # Without other signs of a component, `<T>` is a type or a placeholder.
        name = text[1:-1].split(maxsplit=1)[0]
        component = mdx or text.startswith("</") or text.endswith("/>") or "=" in text or name in closed
        return _shown(text) if component and _JSX_NAME.match(text) else None
    if match.group("html") is not None:
        shown = _shown(text)
        return f" {shown} " if shown else " " if re.match(r"</?(?:br|td|th|li|p|div|tr|hr|h\d)\b", text, re.I) else ""
    if match.group("template") is not None:
        return _shown(text)
    if match.group("fragment") is not None:
        return "" if mdx else None
    return ""
