"""Escapes and invisible characters as substitutions, so that a text is embedded and searched as it is meant.

The functions take the lines of a file and return a document's `substitutions`. The shown text stays the file's.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from epic_rag_chroma.reading.document import INVISIBLE, Document, RepeatedHeader, Substitution

__all__ = [
    "Substitutions",
    "code_escapes",
    "entities",
    "json_escapes",
    "matched",
    "merged",
    "properties_escapes",
    "quoted_escapes",
    "without_invisible",
]

Substitutions = Mapping[int, tuple[Substitution, ...]]

_PAIR = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_JSON = re.compile(rf'{_PAIR}|\\u[0-9a-fA-F]{{4}}|\\["\\/bfnrt]')
_QUOTED = re.compile(rf"{_PAIR}|\\(?:u[0-9a-fA-F]{{4}}|U[0-9a-fA-F]{{8}}|x[0-9a-fA-F]{{2}}|[0abtnvfre \"/\\N_LP])|''")
_PROPERTIES = re.compile(rf"{_PAIR}|\\u[0-9a-fA-F]{{4}}|\\[\\tnrf:=#! ]|\\$")
# In source code, only what joins or hides the letters of a word is decoded: white space before a word, and letters.
_CODE = re.compile(
    rf"(?:(?<!\\)|(?<=\\\\))(?:(?:\\[nrtvf])+(?=\w)|{_PAIR}|\\u[0-9a-fA-F]{{4}}|\\u\{{[0-9a-fA-F]{{1,6}}\}}"
    r"|\\U[0-9a-fA-F]{8}|\\x[0-9a-fA-F]{2})"
)
# A string literal on a line, or its beginning; in raw ones, a backslash is itself.
_LITERAL = re.compile(
    r"""(?P<prefix>(?<!\w)[a-zA-Z]{0,2}|@\$?)(?P<text>"(?:[^"\\]|\\.)*(?:"|$)|'(?:[^'\\]|\\.)*'|`(?:[^`\\]|\\.)*(?:`|$))"""
)
_YAML_LITERAL = re.compile(
    r"""(?:^|(?<=[\s:=\[{(,-]))(?:"(?:[^"\\]|\\.)*(?:"|$)|'(?:[^']|'')*'(?=\s*(?:$|[,:\]}#])))"""
)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_WHITE = {"b": " ", "f": " ", "v": " ", "0": "", "a": "", "e": "", "N": "\n", "_": " ", "L": "\n", "P": "\n"}
_WHITE |= {"n": "\n", "r": "\n", "t": "\t"}


def matched(
    lines: Sequence[str],
    pattern: re.Pattern[str],
    text_of: Callable[[re.Match[str]], str],
    skipped: Collection[int] = (),
) -> dict[int, tuple[Substitution, ...]]:
    """Return a substitution for each match of a pattern in the lines that are not skipped."""
    found = {}
    for number, line in enumerate(lines):
        if number not in skipped:
            some = tuple((match.start(), match.end(), text_of(match)) for match in pattern.finditer(line))
            if some:
                found[number] = some
    return found


def merged(*several: Substitutions) -> dict[int, tuple[Substitution, ...]]:
    """Join substitutions; of those that overlap, the one of the earlier argument is kept."""
    result: dict[int, tuple[Substitution, ...]] = {}
    for substitutions in several:
        for number, some in substitutions.items():
            kept = result.get(number, ())
            new = [one for one in some if not any(one[0] < end and start < one[1] for start, end, _ in kept)]
            result[number] = tuple(sorted((*kept, *new))) if kept else some
    return result


def unescaped(escape: str) -> str:
    """Return the text of a backslash escape."""
    letter, digits = escape[1:2], escape[2:].strip("{}")
    if letter in ("u", "U", "x") and digits:
        if "\\" in digits:  # a surrogate pair
            number = 0x10000 + ((int(digits[:4], 16) - 0xD800) << 10) + (int(digits[6:], 16) - 0xDC00)
        else:
            number = int(digits, 16)
        character = chr(number) if number <= 0x10FFFF and not 0xD800 <= number <= 0xDFFF else ""
        return character if character.isprintable() or INVISIBLE.match(character) else " "
    return _WHITE.get(letter, letter)


def json_escapes(lines: Sequence[str]) -> dict[int, tuple[Substitution, ...]]:
    """Return the escapes of JSON."""
    return matched(lines, _JSON, lambda match: unescaped(match.group()))


def properties_escapes(lines: Sequence[str]) -> dict[int, tuple[Substitution, ...]]:
    """Return the escapes of Java's .properties, in keys and values; a backslash at the end continues the line."""
    return matched(lines, _PROPERTIES, lambda match: unescaped(match.group()))


def quoted_escapes(lines: Sequence[str]) -> dict[int, tuple[Substitution, ...]]:
    """Return the escapes in the quoted strings of YAML and TOML; without quotes, a backslash is itself."""
    found: dict[int, tuple[Substitution, ...]] = {}
    for number, line in enumerate(lines):
        some: list[Substitution] = []
        for literal in _YAML_LITERAL.finditer(line) if "\\" in line or "''" in line else ():
            double = literal.group().startswith('"')
            for match in _QUOTED.finditer(line, literal.start() + 1, max(literal.start() + 1, literal.end() - 1)):
                if double is match.group().startswith("\\"):
                    some.append((match.start(), match.end(), unescaped(match.group()) if double else "'"))
        if some:
            found[number] = tuple(some)
    return found


def code_escapes(lines: Sequence[str]) -> dict[int, tuple[Substitution, ...]]:
    r"""Return the escapes in string literals that hide words: `\n` before a word, and letters as numbers."""
    found: dict[int, tuple[Substitution, ...]] = {}
    for number, line in enumerate(lines):
        some: list[Substitution] = []
        for literal in _LITERAL.finditer(line) if "\\" in line else ():
            raw = literal.group("prefix").lower() in ("r", "br", "rb", "fr", "rf", "@", "@$")
            for match in () if raw else _CODE.finditer(line, literal.start("text") + 1, literal.end()):
                text = " " if match.group()[1] in "nrtvf" else unescaped(match.group())
                if text.isalpha() or text == " ":
                    some.append((match.start(), match.end(), text))
        if some:
            found[number] = tuple(some)
    return found


def entities(lines: Sequence[str], skipped: Collection[int] = ()) -> dict[int, tuple[Substitution, ...]]:
    """Return the entities of HTML and XML; an unknown name stays as it is."""
    return matched(lines, _ENTITY, lambda match: entity_text(match.group()), skipped)


def entity_text(entity: str) -> str:
    """Return the character of an entity, white space as a blank."""
    text = html.unescape(entity)
    return " " if text.isspace() else text


def without_invisible(document: Document) -> Document:
    """Return a document in which characters that are not seen, such as soft hyphens, are not embedded."""
    found = {}
    for number, line in enumerate(document.lines):
        if not line.isascii() and INVISIBLE.search(line):
            found[number] = tuple((match.start(), match.end(), "") for match in INVISIBLE.finditer(line))
    substitutions = {
        number: tuple((start, end, INVISIBLE.sub("", text)) for start, end, text in some)
        for number, some in merged(document.substitutions, found).items()
    }
    headers = [
        RepeatedHeader(header.first, header.end, INVISIBLE.sub("", header.text)) for header in document.repeated_headers
    ]
    if substitutions == document.substitutions and headers == document.repeated_headers:
        return document
    return replace(document, substitutions=substitutions, repeated_headers=headers)
