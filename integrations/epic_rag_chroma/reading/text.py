"""Subtitles (.srt, .vtt, .sbv): cut between cues; the model reads what is said, not the times."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from epic_rag_chroma.reading.document import Break, Document, Heading, Repeat, clean_title, line_breaks

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

__all__ = ["Blocks", "asciidoc", "code", "latex", "manual", "markdown", "org", "plain", "restructured", "subtitles"]


# --- from blocks
# What readers of line-based formats share: a document's breaks, headings and wholes, noted block by block.


class Blocks:
    """The structure of a file's lines, as a reader finds it.

    Args:
        lines: The file's lines.

    Attributes:
        lines: The file's lines.
        breaks: What a cut before each line costs.
        verbatim: Lines of code blocks and the like, in which nothing else means anything.
    """

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.breaks = line_breaks(lines)
        self.verbatim: set[int] = set()
        self._unclosed: set[str] = set()
        self._headings: list[Heading] = []
        self._wholes: list[tuple[int, int]] = []
        self._repeats: list[Repeat] = []

    def heading(self, line: int, level: int, title: str, height: int = 1) -> None:
        """Note a heading of `height` lines; one without text is none."""
        title = clean_title(title)
        if title:
            self._headings.append(Heading(line, level, title, height))
            self.breaks[line] = Break.BLOCK
            self.together(line, line + height)

    def together(self, first: int, end: int) -> None:
        """Lines that are only cut from one another when nothing else is left."""
        for line in range(first + 1, min(end, len(self.lines))):
            self.breaks[line] = Break.INSIDE

    def whole(self, first: int, end: int) -> None:
        """Lines that stay in one chunk where they fit."""
        if end - first > 1:
            self._wholes.append((first, end))

    def block(self, first: int, end: int, *, verbatim: bool = False) -> None:
        """A block with marks around it: whole, and cut inside at empty lines at best."""
        self.breaks[first] = Break.BLOCK
        self.whole(first, end)
        if verbatim:
            self.verbatim.update(range(first, end))
            for line in range(first + 1, end):
                self.breaks[line] = Break.INSIDE if self.lines[line - 1].strip() else Break.LINE

    def table(self, first: int, end: int, header: int, rule: int | None) -> None:
        """A table: whole, cut between rows at best, its header read again.

        Args:
            first: Its first line.
            end: The line after its last.
            header: The first line of the header.
            rule: The line after the header; None if it has no header.
        """
        self.breaks[first] = Break.BLOCK
        self.whole(first, end)
        rows = first + 1 if rule is None else rule + 1
        self.together(first, min(rows + 1, end))
        for line in range(rows + 1, end):
            self.breaks[line] = Break.ITEM
        if rule is not None and rows < end:
            self._repeats.append(Repeat(rows, end, "\n".join(self.lines[header:rule])))

    def closing(self, first: int, mark: str) -> int | None:
        """The line after the next one that is a mark (in small letters) and nothing else; None if there is none."""
        if mark in self._unclosed:
            return None
        for number in range(first + 1, len(self.lines)):
            if self.lines[number].strip().lower() == mark:
                return number + 1
        self._unclosed.add(mark)  # so that a file full of marks that nothing closes is read through once
        return None

    def indented_end(self, first: int) -> int:
        """The line after what is indented under a line, empty lines between included."""
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
        """Note list items: lines that begin with a bullet, and what is indented under them."""
        open_until: list[int] = []
        for number, line in enumerate(self.lines):
            text = line.lstrip()
            if number in self.verbatim or not bullet.match(text):
                continue
            while open_until and open_until[-1] <= number:
                open_until.pop()
            end = self.indented_end(number)
            self.breaks[number] = min(self.breaks[number], Break.ITEM)
            # Items in items in items are all part of an outer one that is whole; their ends need no second look.
            if len(open_until) < 4:
                self.whole(number, end)
            open_until.append(end)

    def document(self, *, unread: frozenset[int] = frozenset()) -> Document:
        """The document."""
        repeats = [repeat for repeat in self._repeats if repeat.first < repeat.end]
        return Document(
            self.lines,
            self.breaks,
            sorted(self._headings, key=lambda heading: heading.line),
            wholes=self._wholes,
            repeats=sorted(repeats, key=lambda repeat: repeat.first),
            unread=unread,
        )


def _indent(line: str) -> int:
    expanded = line.expandtabs(8)
    return len(expanded) - len(expanded.lstrip())


# --- from structure
# The commonest formats: Markdown, reStructuredText, plain text, and source code where nothing parses it.

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


# --- from outline
# Org files and manual pages: text with its headings in the lines.

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


# --- from asciidoc
# AsciiDoc: section titles, delimited blocks whole, tables by rows with their header read again.

_TITLE = re.compile(r"^(={1,6}|#{1,6})\s+(\S.*?)(?:\s+\1)?\s*$")
# A title of two lines, the old way: underlined by = - ~ ^ or +.
_UNDERLINES = {"=": 1, "-": 2, "~": 3, "^": 4, "+": 5}
_UNDERLINE = re.compile(r"^([=\-~^+])\1{2,}\s*$")
_DELIMITER = re.compile(r"^(?:([-.+/=*_])\1{3,}|```+.*|--)\s*$")
_ASCIIDOC_VERBATIM = ("-", ".", "+", "/", "`")
_TABLE = re.compile(r"^[|,:!]={3,}\s*$")
_CELL = re.compile(r"^\s*(?:\d+[+*])?[aehlmsv<>^]?\|")
_ATTRIBUTE = re.compile(r"^:!?[\w-]+!?:")
# What says something about the block below it: its title, its attributes, its anchor.
_BLOCK_LINE = re.compile(r"^(?:\.[^\s.].*|\[.*\])\s*$")
_ASCIIDOC_BULLET = re.compile(r"(?:[*.\-]{1,5}|\d{1,3}\.|[a-zA-Z]\.|<\d+>)\s+\S|\S.*(?:::|;;)(?:\s|$)")


def asciidoc(lines: list[str]) -> Document:
    """Read an AsciiDoc file."""
    blocks = Blocks(lines)
    closers: set[int] = set()
    number = 0
    while number < len(lines):
        number = number + 1 if number in closers else _block(blocks, number, closers)
    blocks.items(_ASCIIDOC_BULLET)
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
            verbatim = line.startswith(_ASCIIDOC_VERBATIM) and line.strip() != "--"
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


# --- from latex
# LaTeX: sections for headings, environments whole, items and rows as places to cut.

_LEVELS = {
    "title": 0, "part": 1, "chapter": 2, "section": 3, "subsection": 4, "subsubsection": 5, "paragraph": 6,
    "subparagraph": 7,
}  # fmt: skip
_HEADING = re.compile(rf"^\s*\\({'|'.join(_LEVELS)})\*?\s*(?:\[[^\]]*\])?\s*\{{")
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([\w*@-]+)\}")
_LATEX_VERBATIM = re.compile(r"verbatim\*?|Verbatim|lstlisting|minted|comment|alltt|filecontents\*?")
# Environments that are the text rather than something in it.
_TRANSPARENT = frozenset({"document", "abstract", "frame", "appendices", "multicols"})
_ROWS = re.compile(r"tabular\w*\*?|longtable|array|tabu|align\*?|matrix")
_COMMAND = re.compile(r"\\[a-zA-Z]+\*?(?:\[[^\]]*\])?\s*")
_MAX_TITLE_LINES = 4
_MAX_DEPTH = 50


def latex(lines: list[str]) -> Document:
    """Read a LaTeX file."""
    blocks = Blocks(lines)
    around: list[tuple[str, int]] = []
    ends_row = False
    number = 0
    while number < len(lines):
        code = _code(lines[number])
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


_TIME = r"(?:\d{1,3}:)?\d{1,2}:\d{2}[.,]\d{1,3}"
_CUE = re.compile(rf"^\s*{_TIME}(?:\s+-->\s+|,){_TIME}(?:\s+\S+:\S+)*\s*$")
_SENTENCE_END = re.compile(r"""[.!?\u2026\u3002\uff01\uff1f]["')\]\u00bb\u201d\u2019]*\s*(?:</\w+>\s*)*$""")
# Parts of WebVTT that nobody hears.
_SILENT = re.compile(r"^(?:WEBVTT|STYLE|REGION|NOTE)(?:\s|$)")


def subtitles(lines: list[str]) -> Document:
    """Read subtitles. The lines of a chunk are the file's, times included."""
    breaks = [Break.INSIDE] * len(lines)
    wholes = []
    unread: set[int] = set()
    said = ""
    number = 0
    while number < len(lines):
        first = number
        while number < len(lines) and lines[number].strip():
            number += 1
        # A block: the lines between two empty ones.
        block = range(first, number)
        while number < len(lines) and not lines[number].strip():
            number += 1
        time = next((line for line in block[:2] if _CUE.match(lines[line])), None)
        breaks[first] = Break.BLOCK if _SENTENCE_END.search(said) or time is None else Break.SENTENCE
        wholes.append((first, number))
        spoken = [] if time is None else [line for line in block if line > time]
        if spoken:
            said = lines[spoken[-1]]
            unread |= {line for line in range(first, number) if line not in spoken}
        elif block and _SILENT.match(lines[first]) and not lines[first].startswith("NOTE"):
            unread |= set(range(first, number))
    if len(unread) == len(lines) or not any(lines[line].strip() for line in set(range(len(lines))) - unread):
        unread = set()
    return Document(lines, breaks, wholes=wholes, unread=frozenset(unread))
