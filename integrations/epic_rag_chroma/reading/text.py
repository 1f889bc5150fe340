"""Read line-based text: plain text, Markdown, reStructuredText, Org, manual pages, AsciiDoc, LaTeX, subtitles.

Each reader returns the file's lines with headings, split costs, and the lines that belong together. `LineBlocks`
collects these block by block; Markdown is parsed by markdown-it-py, the other formats by regular expressions for the
line-level syntax that marks sections, lists, tables and verbatim blocks.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from epic_rag_chroma.reading.document import (
    CLOSING_QUOTES,
    Document,
    Heading,
    RepeatedHeader,
    SplitCost,
    clean_title,
    text_split_costs,
)

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

__all__ = [
    "LineBlocks",
    "read_asciidoc",
    "read_latex",
    "read_man",
    "read_markdown",
    "read_org",
    "read_rst",
    "read_subtitles",
    "read_text",
]


class LineBlocks:
    """Collects the structure of a file's lines for a `Document`.

    Attributes:
        lines: The file's lines.
        costs: The split cost of each line.
        verbatim: Lines inside code blocks and the like, in which other syntax is not recognised.
    """

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.costs = text_split_costs(lines)
        self.verbatim: set[int] = set()
        self._unclosed: set[str] = set()
        self._headings: list[Heading] = []
        self._keep_together: list[tuple[int, int]] = []
        self._repeated_headers: list[RepeatedHeader] = []

    def heading(self, line: int, level: int, title: str, height: int = 1) -> None:
        """Add a heading of `height` lines, unless it is empty."""
        title = clean_title(title)
        if title:
            self._headings.append(Heading(line, level, title, height))
            self.costs[line] = SplitCost.BLOCK
            self.glue(line, line + height)

    def glue(self, first: int, end: int) -> None:
        """Make splits between these lines the last resort."""
        for line in range(first + 1, min(end, len(self.lines))):
            self.costs[line] = SplitCost.INSIDE

    def keep(self, first: int, end: int) -> None:
        """Keep lines in one chunk where they fit."""
        if end - first > 1:
            self._keep_together.append((first, end))

    def block(self, first: int, end: int, *, verbatim: bool = False) -> None:
        """Add a delimited block: kept together, and split at empty lines if it must be."""
        self.costs[first] = SplitCost.BLOCK
        self.keep(first, end)
        if verbatim:
            self.verbatim.update(range(first, end))
            for line in range(first + 1, end):
                self.costs[line] = SplitCost.INSIDE if self.lines[line - 1].strip() else SplitCost.LINE

    def table(self, first: int, end: int, header: int, rule: int | None) -> None:
        """Add a table: kept together, split between rows if it must be, with its header repeated.

        `header` is the first line of the header, and `rule` the line after it; None without a header.
        """
        self.costs[first] = SplitCost.BLOCK
        self.keep(first, end)
        rows = first + 1 if rule is None else rule + 1
        self.glue(first, min(rows + 1, end))
        for line in range(rows + 1, end):
            self.costs[line] = SplitCost.ITEM
        if rule is not None and rows < end:
            self._repeated_headers.append(RepeatedHeader(rows, end, "\n".join(self.lines[header:rule])))

    def closing(self, first: int, mark: str) -> int | None:
        """Return the line after the next one that consists of a mark (in lower case); None if there is none."""
        if mark in self._unclosed:
            return None
        for number in range(first + 1, len(self.lines)):
            if self.lines[number].strip().lower() == mark:
                return number + 1
        self._unclosed.add(mark)  # avoids quadratic time in a file full of unclosed marks
        return None

    def indented_end(self, first: int) -> int:
        """Return the line after the block that is indented under a line, including empty lines inside it."""
        indent = _indent(self.lines[first])
        end = first + 1
        for line in range(first + 1, len(self.lines)):
            text = self.lines[line]
            if not text.strip():
                continue
            if _indent(text) <= indent:
                break
            end = line + 1
        return end

    def items(self, bullet: re.Pattern[str]) -> None:
        """Add the list items: lines that begin with a bullet, and the lines indented under them."""
        open_until: list[int] = []
        for number, line in enumerate(self.lines):
            text = line.lstrip()
            if number in self.verbatim or not bullet.match(text):
                continue
            while open_until and open_until[-1] <= number:
                open_until.pop()
            end = self.indented_end(number)
            self.costs[number] = min(self.costs[number], SplitCost.ITEM)
            # Deeper items are inside an outer one that is kept together.
            if len(open_until) < 4:
                self.keep(number, end)
            open_until.append(end)

    def document(self) -> Document:
        """Return the document."""
        return Document(
            self.lines,
            self.costs,
            sorted(self._headings, key=lambda heading: heading.line),
            keep_together=self._keep_together,
            repeated_headers=sorted(self._repeated_headers, key=lambda header: header.first),
        )


def _indent(line: str) -> int:
    expanded = line.expandtabs(8)
    return len(expanded) - len(expanded.lstrip())


_FRONT_MATTER_LINES = 200
_FRONT_MATTER_TITLE = re.compile(r"""^title\s*[:=]\s*(['"]?)(.+?)\1\s*$""")
_ADORNMENT = re.compile(r"""^([!-/:-@\[-`{-~])\1+\s*$""")
_GRID_BORDER = re.compile(r"^\s*\+[-=+]+\+\s*$")
_SIMPLE_BORDER = re.compile(r"^\s*=+(?: +=+)+\s*$")
_DIRECTIVE = re.compile(r"^\s*\.\. [\w:+-]+::")
_VERBATIM_DIRECTIVE = re.compile(r"^\s*\.\. (?:[\w:-]*code[\w:-]*|literalinclude|parsed-literal|math|raw|graphviz)::")
_BULLET = re.compile(r"(?:[-*+•]|\d{1,3}[.)]|[a-zA-Z#][.)]|\(\w{1,3}\))\s+\S")


def read_text(lines: list[str]) -> Document:
    """Read plain text: paragraphs and lists, no headings."""
    blocks = LineBlocks(lines)
    blocks.items(_BULLET)
    return blocks.document()


@lru_cache(maxsize=1)
def _markdown_parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # Only blocks are needed; without the inline rules, parsing takes a fraction of the time.
    return MarkdownIt("commonmark").enable("table").disable("inline")


def read_markdown(lines: list[str]) -> Document:
    """Read Markdown by CommonMark's rules, with tables and front matter."""
    costs = text_split_costs(lines)
    headings: list[Heading] = []
    keep_together: list[tuple[int, int]] = []
    repeated_headers: list[RepeatedHeader] = []
    skipped, title = _front_matter(lines)
    if title:
        headings.append(Heading(0, 0, title, skipped))
    for line in range(1, skipped):
        costs[line] = SplitCost.INSIDE
    # Blanked, because the front matter's closing line would turn the line above it into a heading.
    tokens = _markdown_parser().parse("\n".join([""] * skipped + lines[skipped:]))
    for token, following in zip(tokens, [*tokens[1:], None], strict=False):
        if token.map is None:
            continue
        first, end = token.map[0], min(token.map[1], len(lines))
        if token.type == "heading_open" and token.level == 0 and following is not None:
            text = clean_title(following.content)
            if text:
                headings.append(Heading(first, int(token.tag[1]), text, end - first))
            for line in range(first + 1, end):
                costs[line] = SplitCost.INSIDE
        elif token.type in ("fence", "code_block"):
            keep_together.append((first, end))
            for line in range(first + 1, end):
                costs[line] = SplitCost.INSIDE if lines[line - 1].strip() else SplitCost.LINE
        elif token.type == "list_item_open":
            keep_together.append((first, end))
            costs[first] = min(costs[first], SplitCost.ITEM)
        elif token.type == "table_open":
            keep_together.append((first, end))
            if token.level == 0 and end > first + 3:
                repeated_headers.append(RepeatedHeader(first + 3, end, lines[first]))
            for line in range(first + 1, end):
                # Header, rule and first row stay together.
                costs[line] = SplitCost.INSIDE if line < first + 3 else SplitCost.ITEM
        if token.level == 0:
            costs[first] = SplitCost.BLOCK
    if len(headings) > 1 and headings[0].level == 0 and headings[1].title == headings[0].title:
        headings.pop(0)  # the front matter's title repeats the first heading
    return Document(lines, costs, headings, keep_together=keep_together, repeated_headers=repeated_headers)


def _front_matter(lines: list[str]) -> tuple[int, str]:
    """Return the number of lines of YAML or TOML front matter, and its title."""
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


def read_rst(lines: list[str]) -> Document:
    """Read reStructuredText: titles by their under- and overlines, levels in the order in which styles appear."""
    blocks = LineBlocks(lines)
    _add_rst_blocks(blocks)
    styles: list[tuple[str, bool]] = []
    for number in range(1, len(lines)):
        title, underline = lines[number - 1], lines[number]
        if number in blocks.verbatim or not _ADORNMENT.match(underline):
            continue
        # docutils requires an underline as long as the title; up to two characters less is only a warning there.
        if not title.strip() or _ADORNMENT.match(title) or len(underline.rstrip()) < max(2, len(title.strip()) - 2):
            continue
        before = lines[number - 2] if number >= 2 else ""
        mark = underline[0]
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


def _add_rst_blocks(blocks: LineBlocks) -> None:
    """Add literal blocks and directives with their indented content, tables, and list items."""
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
            number = _add_simple_table(blocks, number)
        elif line.rstrip().endswith("::") or _DIRECTIVE.match(line):
            end = blocks.indented_end(number)
            blocks.keep(number, end)
            if end > number + 1 and (_DIRECTIVE.match(line) is None or _VERBATIM_DIRECTIVE.match(line)):
                blocks.verbatim.update(range(number + 1, end))
                number = end
                continue
            number += 1
        else:
            number += 1
    blocks.items(_BULLET)


def _add_simple_table(blocks: LineBlocks, first: int) -> int:
    """Add a table between borders of `=`; return the line after it."""
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


def read_org(lines: list[str]) -> Document:
    """Read an Org file: headings, blocks, tables with their header, list items."""
    blocks = LineBlocks(lines)
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
            end = number
            while end < len(lines) and lines[end].lstrip().startswith("|"):
                end += 1
            header = number + 1 if _ORG_RULE.match(line) and number + 1 < end else number
            rule = next((row for row in range(header + 1, end) if _ORG_RULE.match(lines[row])), None)
            blocks.table(number, end, header, rule)
            number = end
            continue
        number += 1
    blocks.items(_ORG_BULLET)
    return blocks.document()


def read_man(lines: list[str]) -> Document:
    """Read the source of a manual page (man or mdoc macros); a file without macros is plain text."""
    blocks = LineBlocks(lines)
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
            blocks.costs[number] = SplitCost.BLOCK if name in ("PP", "P", "LP", "Pp") else SplitCost.ITEM
            blocks.glue(number, number + 2)
    return blocks.document()


def _man_text(text: str) -> str:
    return _FONT.sub("", text).replace('"', "").replace("\\-", "-").replace("\\ ", " ").strip()


_TITLE = re.compile(r"^(={1,6}|#{1,6})\s+(\S.*?)(?:\s+\1)?\s*$")
# Titles of two lines (the older syntax), underlined by = - ~ ^ or +.
_UNDERLINES = {"=": 1, "-": 2, "~": 3, "^": 4, "+": 5}
_UNDERLINE = re.compile(r"^([=\-~^+])\1{2,}\s*$")
_DELIMITER = re.compile(r"^(?:([-.+/=*_])\1{3,}|```+.*|--)\s*$")
_ASCIIDOC_VERBATIM = ("-", ".", "+", "/", "`")
_TABLE = re.compile(r"^[|,:!]={3,}\s*$")
_CELL = re.compile(r"^\s*(?:\d+[+*])?[aehlmsv<>^]?\|")
_ATTRIBUTE = re.compile(r"^:!?[\w-]+!?:")
# The title, attributes or anchor of the block below.
_BLOCK_METADATA = re.compile(r"^(?:\.[^\s.].*|\[.*\])\s*$")
_ASCIIDOC_BULLET = re.compile(r"(?:[*.\-]{1,5}|\d{1,3}\.|[a-zA-Z]\.|<\d+>)\s+\S|\S.*(?:::|;;)(?:\s|$)")


def read_asciidoc(lines: list[str]) -> Document:
    """Read AsciiDoc: section titles, delimited blocks kept together, tables by rows with their header repeated."""
    blocks = LineBlocks(lines)
    closers: set[int] = set()
    number = 0
    while number < len(lines):
        number = number + 1 if number in closers else _add_asciidoc_block(blocks, number, closers)
    blocks.items(_ASCIIDOC_BULLET)
    for number, line in enumerate(lines[:-1]):
        if number not in blocks.verbatim and _BLOCK_METADATA.match(line) and lines[number + 1].strip():
            blocks.costs[number + 1] = SplitCost.INSIDE
    return blocks.document()


def _add_asciidoc_block(blocks: LineBlocks, number: int, closers: set[int]) -> int:
    """Add the block that begins at a line, and to `closers` its last line if it may contain blocks.

    Returns:
        The line to continue with.
    """
    lines = blocks.lines
    line = lines[number]
    if _TABLE.match(line):
        return _add_asciidoc_table(blocks, number)
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
    alone = number == 0 or not lines[number - 1].strip() or bool(_BLOCK_METADATA.match(lines[number - 1]))
    if (
        under
        and alone
        and line[:1].isalnum()
        and not _DELIMITER.match(line)
        and abs(len(line.rstrip()) - len(following.rstrip())) <= 1
    ):
        blocks.heading(number, _UNDERLINES[under.group(1)], line, 2)
        return number + 2
    if _DELIMITER.match(line):
        after = blocks.closing(number, "```" if line.startswith("```") else line.strip())
        if after is not None:
            verbatim = line.startswith(_ASCIIDOC_VERBATIM) and line.strip() != "--"
            blocks.block(number, after, verbatim=verbatim)
            blocks.keep(_with_metadata_above(lines, number), after)
            closers.add(after - 1)
            return after if verbatim else number + 1
    if _ATTRIBUTE.match(line) and number and _ATTRIBUTE.match(lines[number - 1]):
        blocks.costs[number] = SplitCost.LINE
    return number + 1


def _with_metadata_above(lines: list[str], first: int) -> int:
    """Return the first line of a block including its metadata lines."""
    while first > 0 and _BLOCK_METADATA.match(lines[first - 1]):
        first -= 1
    return first


def _add_asciidoc_table(blocks: LineBlocks, first: int) -> int:
    """Add a table; return the line after it."""
    lines = blocks.lines
    end = blocks.closing(first, lines[first].strip())
    if end is None:
        return first + 1
    header = first + 1
    options = lines[first - 1] if first else ""
    # The first row is a header if an empty line follows it, or if the table's options name it.
    alone = header + 1 < end - 1 and lines[header].strip() and not lines[header + 1].strip()
    named = bool(header < end - 1 and (alone or "header" in options))
    blocks.table(first, end, header, header + 1 if named else None)
    blocks.keep(_with_metadata_above(lines, first), end)
    for line in range(header + 1, end - 1):
        if not _CELL.match(lines[line]):  # rows may have a line for each cell, and cells several lines
            blocks.costs[line] = SplitCost.INSIDE
    blocks.costs[end - 1] = SplitCost.INSIDE
    return end


_LEVELS = {
    "title": 0, "part": 1, "chapter": 2, "section": 3, "subsection": 4, "subsubsection": 5, "paragraph": 6,
    "subparagraph": 7,
}  # fmt: skip
_HEADING = re.compile(rf"^\s*\\({'|'.join(_LEVELS)})\*?\s*(?:\[[^\]]*\])?\s*\{{")
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([\w*@-]+)\}")
_LATEX_VERBATIM = re.compile(r"verbatim\*?|Verbatim|lstlisting|minted|comment|alltt|filecontents\*?")
# Environments that contain the text itself.
_TRANSPARENT = frozenset({"document", "abstract", "frame", "appendices", "multicols"})
_ROWS = re.compile(r"tabular\w*\*?|longtable|array|tabu|align\*?|matrix")
_COMMAND = re.compile(r"\\[a-zA-Z]+\*?(?:\[[^\]]*\])?\s*")
_MAX_TITLE_LINES = 4
_MAX_DEPTH = 50


def read_latex(lines: list[str]) -> Document:
    """Read LaTeX: sections as headings, environments kept together, split at items and rows."""
    blocks = LineBlocks(lines)
    around: list[tuple[str, int]] = []
    ends_row = False
    number = 0
    while number < len(lines):
        code = _without_comment(lines[number])
        if around and _LATEX_VERBATIM.fullmatch(around[-1][0]):
            if f"\\end{{{around[-1][0]}}}" in lines[number]:
                _, first = around.pop()
                blocks.block(first, number + 1, verbatim=True)
            number += 1
            continue
        heading = _HEADING.match(code)
        if heading is not None:
            title, end = _argument(lines, number, heading.end())
            if title is not None:
                blocks.heading(number, _LEVELS[heading.group(1)], _without_commands(title), end - number)
                number = end
                continue
        if code.lstrip().startswith("\\item"):
            blocks.costs[number] = min(blocks.costs[number], SplitCost.ITEM)
        elif around and _ROWS.fullmatch(around[-1][0]) and number > around[-1][1] + 1:
            blocks.costs[number] = SplitCost.ITEM if ends_row else SplitCost.INSIDE
        ends_row = code.rstrip().endswith(("\\\\", "\\hline", "\\midrule", "\\toprule", "\\tabularnewline"))
        for match in _ENVIRONMENT.finditer(code):
            _add_environment(blocks, around, match, number)
        number += 1
    return blocks.document()


def _add_environment(blocks: LineBlocks, around: list[tuple[str, int]], match: re.Match[str], number: int) -> None:
    """Open or close an environment; `around` are the open ones with their first lines."""
    kind, name = match.groups()
    if kind == "begin" and len(around) < _MAX_DEPTH:
        around.append((name, number))
    elif kind == "end" and any(open_name == name for open_name, _ in around):
        while True:  # an environment that was never closed ends with the one around it
            open_name, first = around.pop()
            if open_name == name:
                break
        if name not in _TRANSPARENT:
            blocks.keep(first, number + 1)
            if number > first:
                blocks.costs[first + 1] = SplitCost.INSIDE
                blocks.costs[number] = SplitCost.INSIDE


def _without_comment(line: str) -> str:
    return re.split(r"(?<!\\)%", line, maxsplit=1)[0]


def _argument(lines: list[str], number: int, start: int) -> tuple[str | None, int]:
    """Return the argument whose brace opens before a column, and the line after it; None if it does not close."""
    depth = 1
    taken: list[str] = []
    for line in range(number, min(number + _MAX_TITLE_LINES, len(lines))):
        text = _without_comment(lines[line])
        for column in range(start if line == number else 0, len(text)):
            char = text[column]
            if char in "{}" and (column == 0 or text[column - 1] != "\\"):
                depth += 1 if char == "{" else -1
                if depth == 0:
                    return "".join(taken), line + 1
            taken.append(char)
        taken.append(" ")
    return None, number + 1


def _without_commands(title: str) -> str:
    """Strip commands from a title and keep their arguments."""
    title = re.sub(r"\\(?:label|footnote|thanks|index)\s*\{[^{}]*\}", "", title)
    title = title.replace("\\\\", " ").replace("~", " ").replace("``", '"').replace("''", '"')
    title = re.sub(r"\\([%&#$_{}])", r"\1", _COMMAND.sub("", title).replace("$", ""))
    return title.replace("{", "").replace("}", "")


_TIME = r"(?:\d{1,3}:)?\d{1,2}:\d{2}[.,]\d{1,3}"
_CUE = re.compile(rf"^\s*{_TIME}(?:\s+-->\s+|,){_TIME}(?:\s+\S+:\S+)*\s*$")
_CUE_SENTENCE_END = re.compile(rf"[.!?\u2026\u3002\uff01\uff1f][{CLOSING_QUOTES}]*\s*(?:</\w+>\s*)*$")
# Parts of WebVTT that are not spoken.
_NOT_SPOKEN = re.compile(r"^(?:WEBVTT|STYLE|REGION|NOTE)(?:\s|$)")


def read_subtitles(lines: list[str]) -> Document:
    """Read subtitles (.srt, .vtt, .sbv): split between cues; the times are shown and not embedded."""
    costs = [SplitCost.INSIDE] * len(lines)
    keep_together = []
    display_only: set[int] = set()
    spoken_before = ""
    number = 0
    while number < len(lines):
        first = number
        while number < len(lines) and lines[number].strip():
            number += 1
        block = range(first, number)  # the lines between two empty ones
        while number < len(lines) and not lines[number].strip():
            number += 1
        time = next((line for line in block[:2] if _CUE.match(lines[line])), None)
        after_sentence = time is None or _CUE_SENTENCE_END.search(spoken_before)
        costs[first] = SplitCost.BLOCK if after_sentence else SplitCost.SENTENCE
        keep_together.append((first, number))
        spoken = [] if time is None else [line for line in block if line > time]
        if spoken:
            spoken_before = lines[spoken[-1]]
            display_only |= {line for line in range(first, number) if line not in spoken}
        elif block and _NOT_SPOKEN.match(lines[first]) and not lines[first].startswith("NOTE"):
            display_only |= set(range(first, number))
    if not any(line.strip() for number, line in enumerate(lines) if number not in display_only):
        display_only = set()
    return Document(lines, costs, keep_together=keep_together, display_only=frozenset(display_only))
