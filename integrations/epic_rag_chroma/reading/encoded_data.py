"""Cut data that is written as letters out of text: data URIs, base64, PEM, uuencode.

None of it is text that somebody searches, and a picture in base64 would fill hundreds of chunks. The number of lines
stays the same, so that lines refer to the file; an ellipsis stands for the data.
"""

from __future__ import annotations

import re
from itertools import pairwise

__all__ = ["is_cut_data", "without_encoded_data"]

ELLIPSIS = "\u2026"
_MEDIA_TYPE = r"data:[\w.+-]+/[\w.+-]+(?:;[\w.-]+(?:=[^;,\s\"']{0,100})?){0,5}"
# Base64, or another text up to the quote that was opened before it.
_DATA_URI = re.compile(
    rf"""(?P<head>{_MEDIA_TYPE};base64,)\s*[A-Za-z0-9+/=%_-]{{24,}}(?:\\?\s*[A-Za-z0-9+/=_-]{{24,}}=*)*"""
    rf"""|(?P<double>(?<="){_MEDIA_TYPE},)[^"\\]{{48,}}(?:\\[^"][^"\\]*)*|(?P<single>(?<='){_MEDIA_TYPE},)[^'\\]{{48,}}"""
    rf"""|(?P<bare>{_MEDIA_TYPE},)[^\s"'<>)\\]{{48,}}""",
    re.IGNORECASE,
)
_PEM_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]+-----")
_PEM_END = re.compile(r"-----END [A-Z0-9 ]+-----")
_PEM_LINES = 1000
_RUN = re.compile(r"[A-Za-z0-9+/=_-]{160,}")
# Escaped line ends inside base64 (a key in JSON).
_ESCAPED_RUN = re.compile(r"(?:[A-Za-z0-9+/=]{48,80}(?:\\r)?\\n){3,}[A-Za-z0-9+/=]*")
_ENCODED_LINE = re.compile(r"[\s>|#*\"']*([A-Za-z0-9+/_-]{40,}={0,2})[\s\"',+\\]*")
_LAST_ENCODED_LINE = re.compile(r"[\s>|#*\"']*([A-Za-z0-9+/_-]{1,}={0,2})[\s\"',;+\\)]*")
_LINES_IN_A_ROW = 3
# What `without_encoded_data` leaves of data.
_REMAINS = re.compile(
    rf"{_MEDIA_TYPE},{ELLIPSIS}|-----(?:BEGIN|END) [A-Z0-9 ]+-----|begin [0-7]{{3,4}} .* {ELLIPSIS}|{ELLIPSIS}",
    re.IGNORECASE,
)
_UUENCODE = re.compile(r"begin [0-7]{3,4} \S.*")
_UUENCODED_LINE = re.compile(r"[ -`]{1,61}[ -`]?")
# Random letters change between capitals, small letters and digits at every second step; words and paths seldom do.
_CHANGES = 0.25


def without_encoded_data(lines: list[str]) -> list[str]:
    """Return the lines with encoded data cut out; the same list if there is none."""
    result: list[str] | None = None
    number = 0
    while number < len(lines):
        line = lines[number]
        end = _block_end(lines, number)
        if end > number:
            result = list(lines) if result is None else result
            keeps = _PEM_BEGIN.search(line) or _UUENCODE.fullmatch(line)
            result[number:end] = [f"{line} {ELLIPSIS}" if keeps else ELLIPSIS, *[""] * (end - number - 1)]
            number = end
            continue
        if len(line) >= 48:
            cut = _cut(line)
            if cut != line:
                result = list(lines) if result is None else result
                result[number] = cut
        number += 1
    return lines if result is None else result


def is_cut_data(line: str) -> bool:
    """Return whether nothing is left of a line but what names the data that was cut out."""
    rest = _REMAINS.sub("", line)
    return rest != line and not any(map(str.isalnum, rest))


def _cut(line: str) -> str:
    """Return a line without data URIs and long runs of encoded data."""
    if "data:" in line or "DATA:" in line:
        line = _DATA_URI.sub(lambda match: next(filter(None, match.groups())) + ELLIPSIS, line)
    if "-----BEGIN " in line:
        line = re.sub(r"(-----BEGIN ([A-Z0-9 ]+)-----).*?(?=-----END \2-----|$)", rf"\1{ELLIPSIS}", line)
    if len(line) < 160:
        return line
    line = _ESCAPED_RUN.sub(lambda match: ELLIPSIS if _is_random(match.group()) else match.group(), line)
    return _RUN.sub(lambda match: ELLIPSIS if _is_random(match.group()) else match.group(), line)


def _block_end(lines: list[str], first: int) -> int:
    """Return the line after a block of encoded lines that begins at a line; the line itself if none does."""
    line = lines[first]
    if "-----BEGIN " in line and _PEM_BEGIN.search(line) and not _PEM_END.search(line):
        for number in range(first + 1, min(first + _PEM_LINES, len(lines))):
            if _PEM_END.search(lines[number]):
                return number + 1
    if line.startswith("begin ") and _UUENCODE.fullmatch(line):
        number = first + 1
        while number < len(lines) and _UUENCODED_LINE.fullmatch(lines[number]) and lines[number] != "end":
            number += 1
        if number > first + 1 and number < len(lines) and lines[number] == "end":
            return number + 1
    if len(line) < 40:
        return first
    end = first
    parts: list[str] = []
    while end < len(lines) and (match := _ENCODED_LINE.fullmatch(lines[end])):
        if parts and len(match.group(1)) > len(parts[0]):
            break
        parts.append(match.group(1))
        end += 1
    if len(parts) < _LINES_IN_A_ROW:
        return first
    text = "".join(parts)
    kinds = (any(map(str.isupper, text)), any(map(str.islower, text)), any(map(str.isdigit, text)))
    if not all(kinds) or not _is_random(text):
        return first
    if end < len(lines) and len(lines[end]) < len(lines[first]) and _LAST_ENCODED_LINE.fullmatch(lines[end]):
        end += _is_random(lines[end].strip()) or lines[end].rstrip().endswith("=")
    return end


def _is_random(text: str) -> bool:
    """Return whether the letters of a text are those of encoded data rather than of words."""
    kinds = ["d" if character.isdigit() else "u" if character.isupper() else "l" for character in text[:4000]]
    return sum(a != b for a, b in pairwise(kinds)) > _CHANGES * len(kinds)
