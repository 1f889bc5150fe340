"""Read line-based text: plain text, Markdown, reStructuredText, Org, manual pages, AsciiDoc, LaTeX, subtitles.

Each reader returns the file's lines with headings, split costs, and the lines that belong together. `LineBlocks`
collects these block by block; Markdown is parsed by markdown-it-py, the other formats by regular expressions for the
line-level syntax that marks sections, lists, tables and verbatim blocks.
"""

from __future__ import annotations

import re
import unicodedata
from string import hexdigits

from epic_rag_chroma.reading.document import (
    CLOSING_QUOTES,
    Document,
    Heading,
    RepeatedHeader,
    SplitCost,
    Substitution,
    clean_title,
    substituted,
    text_split_costs,
)
from epic_rag_chroma.reading.escapes import entities, matched, merged

__all__ = [
    "LineBlocks",
    "read_asciidoc",
    "read_man",
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
        hidden: Lines that are shown and not embedded.
        substitutions: The substitutions of lines.
    """

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.costs = text_split_costs(lines)
        self.verbatim: set[int] = set()
        self.hidden: set[int] = set()
        self.substitutions: dict[int, tuple[Substitution, ...]] = {}
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
            display_only=frozenset(self.hidden),
            substitutions=self.substitutions,
        )


def _indent(line: str) -> int:
    expanded = line.expandtabs(8)
    return len(expanded) - len(expanded.lstrip())


_ADORNMENT = re.compile(r"""^([!-/:-@\[-`{-~])\1+\s*$""")
_GRID_BORDER = re.compile(r"^\s*\+[-=+]+\+\s*$")
_SIMPLE_BORDER = re.compile(r"^\s*=+(?: +=+)+\s*$")
_DIRECTIVE = re.compile(r"^\s*\.\. [\w:+-]+::")
_VERBATIM_DIRECTIVE = re.compile(r"^\s*\.\. (?:[\w:-]*code[\w:-]*|literalinclude|parsed-literal|math|raw|graphviz)::")
# Directives that nobody sees with all of their content, and those whose content alone is seen.
_RST_HIDDEN = re.compile(
    r"(?:[\w+-]+:)?(?:currentmodule|default-domain|toctree|index|contents|sectionauthor|moduleauthor|codeauthor|meta"
    r"|include|literalinclude|tabularcolumns|role|default-role|sectnum|target-notes|raw|testsetup|testcleanup|autoapi\w*"
    r"|highlight(?:lang)?|image|unicode|auto\w+)"
)
_RST_WRAPPER = re.compile(
    r"only|ifconfig|class|rst-class|container|cssclass|code(?:-block)?|sourcecode|figure|tabs?|sidebar"
)
_RST_EXPLICIT = re.compile(r"^(\s*)\.\.(?:\s+(.*))?$")
_RST_NAME = re.compile(r"(?:\|[^|]+\|\s+)?([\w:+.-]+)::(?:\s+(.*))?$")
# Targets and substitution definitions; footnotes and citations begin with a bracket and are text.
_RST_TARGET = re.compile(r"_\S.*:(?:\s|$)|__(?:\s|$)|\|[^|]+\|\s")
_RST_OPTION = re.compile(r"^\s+:([\w -]+):(?:\s|$)")
_RST_SHOWN_OPTIONS = frozenset({"alt", "synopsis", "caption", "title", "header", "name", "subtitle", "summary"})
_BULLET = re.compile(r"(?:[-*+•]|\d{1,3}[.)]|[a-zA-Z#][.)]|\(\w{1,3}\))\s+\S")


def read_text(lines: list[str]) -> Document:
    """Read plain text: paragraphs and lists, no headings."""
    blocks = LineBlocks(lines)
    blocks.items(_BULLET)
    return blocks.document()


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
        blocks.hidden.update((first, number) if over else (number,))
    _hide_rst_scaffolding(blocks)
    return blocks.document()


def _hide_rst_scaffolding(blocks: LineBlocks) -> None:
    """Hide comments, targets, and the directives and options that nobody sees; an argument that is seen stays."""
    lines = blocks.lines
    blocks.hidden.update(
        number
        for number, line in enumerate(lines)
        if number not in blocks.verbatim and (_GRID_BORDER.match(line) or _SIMPLE_BORDER.match(line))
    )
    number = 0
    while number < len(lines):
        explicit = None if number in blocks.verbatim else _RST_EXPLICIT.match(lines[number])
        if explicit is None:
            number += 1
            continue
        content = explicit.group(2) or ""
        directive = _RST_NAME.match(content)
        end = number + 1
        if directive is None:
            if content.startswith("["):
                number += 1
                continue
            # A comment reaches as far as its indentation, an empty one no further than its line.
            empty = not content and (number + 1 == len(lines) or not lines[number + 1].strip())
            if not _RST_TARGET.match(content) and not empty:
                end = blocks.indented_end(number)
            blocks.hidden.update(range(number, end))
            number = end
            continue
        name, argument = directive.groups()
        if _RST_HIDDEN.fullmatch(name) or content.startswith("|"):
            end = blocks.indented_end(number)
            shown = [n for n in range(number + 1, end) if _is_shown_option(lines[n])]
            blocks.hidden.update(n for n in range(number, end) if n not in shown)
            number = end
            continue
        if _RST_WRAPPER.fullmatch(name):
            blocks.hidden.add(number)
        elif ":" in name and argument:  # the description of a function or an option
            start = lines[number].index(argument, lines[number].index("::"))
            blocks.substitutions[number] = ((len(explicit.group(1)), start, ""),)
        while end < len(lines) and _RST_OPTION.match(lines[end]):
            if not _is_shown_option(lines[end]):
                blocks.hidden.add(end)
            end += 1
        number = end


def _is_shown_option(line: str) -> bool:
    option = _RST_OPTION.match(line)
    return option is not None and option.group(1).strip() in _RST_SHOWN_OPTIONS


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
# Fonts, sizes and places to break a word are nothing; `\\(xx` and `\\[name]` are characters.
_MAN_ESCAPE = re.compile(
    r"(?P<nothing>\\f(?:\[\w*\]|\(\w\w|.)|\\s[+-]?\d|\\m\[\w*\]|\\[&%:/,|^)c])"
    r"|\\(?:\((?P<two>\S\S)|\[(?P<name>[^\]\s]+)\])|\\(?P<sign>[-e\\'`])|\\(?P<blank>[ ~0])"
)
_MAN_COMMENT = re.compile(r"""^[.']\s*\\["#]""")
_TROFF = {
    "oq": "\u2018", "cq": "\u2019", "lq": "\u201c", "rq": "\u201d", "aq": "'", "dq": '"', "em": "\u2014",
    "en": "\u2013", "hy": "-", "bu": "\u2022", "co": "\u00a9", "rg": "\u00ae", "tm": "\u2122", "ss": "\u00df",
    "/o": "\u00f8", "/O": "\u00d8", "/l": "\u0142", "/L": "\u0141", "ae": "\u00e6", "AE": "\u00c6", "oa": "\u00e5",
    "oA": "\u00c5", "ti": "~", "ha": "^", "ga": "`", "rs": "\\", "sl": "/", "at": "@", "sh": "#", "Do": "$",
    "Eu": "\u20ac", "de": "\u00b0", "mu": "\u00d7", "+-": "\u00b1", ">=": "\u2265", "<=": "\u2264", "!=": "\u2260",
    "->": "\u2192", "<-": "\u2190",
}  # fmt: skip
_TROFF_ACCENTS = {
    "'": "\u0301",
    "`": "\u0300",
    "^": "\u0302",
    "~": "\u0303",
    ":": "\u0308",
    ",": "\u0327",
    "v": "\u030c",
}


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
            rules = [row for row in range(number, end) if _ORG_RULE.match(lines[row])]
            rule = next((row for row in rules if row > header), None)
            blocks.hidden.update(rules)
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
    if any(_MACRO.match(line) for line in lines):
        blocks.hidden.update(number for number, line in enumerate(lines) if _MAN_COMMENT.match(line))
        blocks.substitutions = matched(lines, _MAN_ESCAPE, _man_escape)
    return blocks.document()


def _man_text(text: str) -> str:
    return _MAN_ESCAPE.sub(_man_escape, text).replace('"', "").strip()


def _man_escape(match: re.Match[str]) -> str:
    """Return the text of an escape of troff."""
    name = match.group("name") or match.group("two") or ""
    if name.startswith("u") and len(name) in (5, 6, 7) and all(letter in hexdigits for letter in name[1:]):
        number = int(name[1:], 16)
        return chr(number) if number <= 0x10FFFF and not 0xD800 <= number <= 0xDFFF else ""
    if len(name) == 2 and name[0] in _TROFF_ACCENTS and name[1].isalpha():
        return unicodedata.normalize("NFC", name[1] + _TROFF_ACCENTS[name[0]])
    if name:
        return _TROFF.get(name, match.group())
    sign = match.group("sign")
    if sign:
        return "\\" if sign == "e" else sign
    return "" if match.group("nothing") else " "


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
_ASCIIDOC_ANCHOR = re.compile(r"^(?:\[\[[^\]]*\]\]|\[#[^\]]*\]|(?:ifdef|ifndef|endif|ifeval|include)::\S*\[.*\])\s*$")
_ASCIIDOC_COMMENT = re.compile(r"^//(?!/)")
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
    blocks.substitutions = entities(lines, blocks.verbatim)
    blocks.hidden.update(
        number
        for number, line in enumerate(lines)
        if number not in blocks.verbatim
        and (_ASCIIDOC_ANCHOR.match(line) or (line.startswith("//") and line[2:3] != "/"))
    )
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


_TIME = r"(?:\d{1,3}:)?\d{1,2}:\d{2}[.,]\d{1,3}"
_CUE = re.compile(rf"^\s*{_TIME}(?:\s+-->\s+|,){_TIME}(?:\s+\S+:\S+)*\s*$")
_CUE_SENTENCE_END = re.compile(rf"[.!?\u2026\u3002\uff01\uff1f][{CLOSING_QUOTES}]*\s*(?:</\w+>\s*)*$")
# Tags, times of words, positions; a voice is read.
_CUE_MARKUP = re.compile(
    r"<(?:\d+:)?\d\d:\d\d[.,]\d{1,3}>|<v(?:\.[^\s>]*)?\s+(?P<voice>[^>]+)>"
    r"|</?(?:c|i|b|u|s|v|font|ruby|rt|lang)(?:[.\s][^>]*)?>|\{\\[^{}]*\}|(?P<white>\\[Nnh])"
    r"|^\[\d{1,3}:\d\d(?:[.:]\d{1,3})?\]|^Dialogue:(?:[^,]*,){9}",
    re.IGNORECASE,
)
_ASS_EVENT = re.compile(r"^Dialogue:", re.IGNORECASE)
# Parts of WebVTT that are not spoken.
_NOT_SPOKEN = re.compile(r"^(?:WEBVTT|STYLE|REGION|NOTE)(?:\s|$)")


def _cue_text(match: re.Match[str]) -> str:
    """Return the text of a tag in a cue: the name of a voice, a blank for a line end."""
    return f"{match.group('voice')}: " if match.group("voice") else " " if match.group("white") else ""


def read_subtitles(lines: list[str]) -> Document:
    """Read subtitles (.srt, .vtt, .sbv): split between cues; times and tags are shown and not embedded.

    Automatic captions repeat the line before; it is embedded once.
    """
    costs = [SplitCost.INSIDE] * len(lines)
    keep_together = []
    display_only: set[int] = set()
    spoken_before, repeated = "", ""
    substitutions = merged(matched(lines, _CUE_MARKUP, _cue_text), entities(lines))
    if any(_ASS_EVENT.match(line) for line in lines):  # SubStation Alpha: a line for each cue, below styles
        hidden = frozenset(number for number, line in enumerate(lines) if not _ASS_EVENT.match(line))
        return Document(lines, [SplitCost.ITEM] * len(lines), display_only=hidden, substitutions=substitutions)
    number = 0
    while number < len(lines):
        first = number
        # A line of blanks ends a cue unless it is the first below its time, as in automatic captions.
        while number < len(lines) and (
            lines[number].strip() or (number > first and lines[number] and _CUE.match(lines[number - 1]))
        ):
            number += 1
        block = range(first, number)  # the lines between two empty ones
        while number < len(lines) and not lines[number].strip():
            number += 1
        time = next((line for line in block[:2] if _CUE.match(lines[line])), None)
        after_sentence = time is None or _CUE_SENTENCE_END.search(spoken_before)
        costs[first] = SplitCost.BLOCK if after_sentence else SplitCost.SENTENCE
        keep_together.append((first, number))
        spoken = [] if time is None else [line for line in block if line > time]
        if time is not None:
            spoken_before = lines[spoken[-1]] if spoken else spoken_before
            display_only |= {line for line in range(first, number) if line not in spoken}
            for line in spoken:
                text = " ".join(substituted(lines[line], substitutions.get(line, ())).split())
                if text and text == repeated:
                    display_only.add(line)
                repeated = text or repeated
        elif block and _NOT_SPOKEN.match(lines[first]) and not lines[first].startswith("NOTE"):
            display_only |= set(range(first, number))
    return Document(
        lines,
        costs,
        keep_together=keep_together,
        display_only=frozenset(display_only),
        substitutions=substitutions,
    )
