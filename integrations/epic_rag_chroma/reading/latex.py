r"""Read LaTeX and BibTeX: sections or entries, environments kept together, letters that are written as commands.

Accents (`\"u`, `\H{o}`), letters (`\ss`), places where a word may be broken (`\-`) and the braces that keep a
capital in BibTeX are embedded as the letters that they stand for; comments are not embedded.
"""

from __future__ import annotations

import re
import unicodedata

from epic_rag_chroma.reading.document import Document, SplitCost, Substitution
from epic_rag_chroma.reading.text import LineBlocks

__all__ = ["read_bibtex", "read_latex"]

# Accents by their commands, as combining characters.
_ACCENTS = {
    "`": "\u0300", "'": "\u0301", "^": "\u0302", "~": "\u0303", "=": "\u0304", "u": "\u0306", ".": "\u0307",
    '"': "\u0308", "r": "\u030a", "H": "\u030b", "v": "\u030c", "G": "\u030f", "U": "\u030e", "d": "\u0323",
    "c": "\u0327", "k": "\u0328", "b": "\u0331", "h": "\u0309", "f": "\u0311",
}  # fmt: skip
_LETTERS = {
    "ss": "ß", "SS": "ẞ", "o": "ø", "O": "Ø", "l": "ł", "L": "Ł", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ",
    "aa": "å", "AA": "Å", "i": "\u0131", "j": "\u0237", "dh": "ð", "DH": "Ð", "th": "þ", "TH": "Þ", "dj": "đ",
    "DJ": "Đ", "ng": "ŋ", "NG": "Ŋ", "textregistered": "®", "textcopyright": "©", "copyright": "©",
    "texttrademark": "™", "euro": "€", "texteuro": "€", "pounds": "£", "textdegree": "°", "textmu": "µ", "ldots": "…",
    "dots": "…", "textellipsis": "…", "textendash": "\u2013", "textemdash": "—", "textquotesingle": "'",
    "textbackslash": "\\", "S": "§", "P": "¶",
}  # fmt: skip
_BASE = r"\\?[ij](?![a-zA-Z])|[A-Za-z]"
_ACCENT = (
    r"\\(?P<{0}>[`'^~=.\"]\s*|[uHvrGUdckbhf](?:\s+|(?=\{{)))"
    r"(?:\{{\s*(?P<{0}b>BASE)\s*\}}|(?P<{0}a>BASE))"
).replace("BASE", _BASE)
_SUBSTITUTED = re.compile(
    r"(?P<comment>(?<!\\)(?:\\\\)*%.*$)"
    rf"|\{{{_ACCENT.format('braced')}\}}|{_ACCENT.format('bare')}"
    rf"|\{{\\(?P<bracedletter>{'|'.join(_LETTERS)})(?:\{{\}}|\s*)\}}"
    rf"|\\(?P<letter>{'|'.join(sorted(_LETTERS, key=len, reverse=True))})(?![a-zA-Z])(?:\{{\}}|\s+(?=[a-z]))?"
    r"|(?P<nothing>\\-|\\/|(?<!\\)\"[-~=|])|(?P<blank>~|\\[ ,;:])|\\(?P<sign>[&%$#_{}])"
)
# Braces around a part of a word.
_CASE_BRACES = re.compile(r"(?<=\w)\{(\w+)\}|\{(\w+)\}(?=\w)")
_ENTRY = re.compile(r"^\s*@\w+\s*[{(]")


def _replacement(match: re.Match[str]) -> str:
    """Return the text that stands for a command."""
    for name in ("braced", "bare"):
        command = match.group(name)
        if command is not None:
            letter = (match.group(name + "b") or match.group(name + "a")).removeprefix("\\")
            return unicodedata.normalize("NFC", letter + _ACCENTS[command.strip()])
    letter = match.group("bracedletter") or match.group("letter")
    if letter:
        return _LETTERS[letter]
    if match.group("comment") is not None:
        return match.group()[: -len(match.group().lstrip("\\"))] if match.group().startswith("\\") else ""
    return " " if match.group("blank") else match.group("sign") or ""


def _substitutions(line: str, *, bibtex: bool = False) -> tuple[Substitution, ...]:
    """Return the substitutions of a line."""
    if not any(mark in line for mark in '\\~%{"'):
        return ()
    found: list[Substitution] = []
    for match in _SUBSTITUTED.finditer(line):
        if bibtex and (match.group("comment") is not None or match.group()[0] == '"'):
            continue  # in BibTeX, % is a percent sign, and quotes delimit values
        found.append((match.start(), match.end(), _replacement(match)))
    if bibtex:
        taken = [(start, end) for start, end, _ in found]
        for match in _CASE_BRACES.finditer(line):
            for place in (match.start(), match.end() - 1):
                if not any(start <= place < end for start, end in taken):
                    found.append((place, place + 1, ""))
        found.sort()
    return tuple(found)


def _decoded(text: str) -> str:
    """Return a text with its accents and letters."""
    return _SUBSTITUTED.sub(_replacement, text)


def read_bibtex(lines: list[str]) -> Document:
    """Read BibTeX: an entry is kept together."""
    blocks = LineBlocks(lines)
    starts = [number for number, line in enumerate(lines) if _ENTRY.match(line)]
    for first, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        blocks.costs[first] = SplitCost.BLOCK
        blocks.keep(first, end)
        for number in range(first + 1, end):
            blocks.costs[number] = SplitCost.LINE if lines[number].strip() else SplitCost.INSIDE
    for number, line in enumerate(lines):
        some = _substitutions(line, bibtex=True)
        if some:
            blocks.substitutions[number] = some
    return blocks.document()


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
    for number, text in enumerate(lines):
        some = () if number in blocks.verbatim else _substitutions(text)
        if some:
            blocks.substitutions[number] = some
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
    title = _decoded(title.replace("\\\\", " ").replace("~", " ")).replace("``", '"').replace("''", '"')
    title = re.sub(r"\\([%&#$_{}])", r"\1", _COMMAND.sub("", title).replace("$", ""))
    return title.replace("{", "").replace("}", "")
