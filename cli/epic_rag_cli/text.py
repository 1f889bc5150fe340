"""Text that comes from documents, paths and messages, made fit for a terminal.

A document may hold escape sequences that move the cursor, set the window title or hide text, and
bidirectional controls that show a line in another order than it has. Nothing of that may reach a terminal: a
character that is not ordinary text is written as its escape.
"""

from __future__ import annotations

import json
import re

__all__ = ["json_text", "plural", "printable", "size", "snippet"]

# C0 and C1 controls, line and paragraph separators, bidirectional controls, invisible operators, byte order
# marks, interlinear annotations, lone surrogates (undecodable bytes in file names) and tag characters. The
# joiners U+200C and U+200D stay: scripts and emoji need them, and they cannot reorder anything.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_WORD = re.compile(r"\w+")
_SENTENCE_START = re.compile(r"(?<=[.!?:;])\s+(?=\S)")


def printable(text: str) -> str:
    """Return `text` as one safe line: runs of white space become a space, controls their escapes."""
    line = " ".join(text.split())
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), line)


def json_text(value: object, *, ascii_only: bool = False) -> str:
    """Return `value` as indented JSON in which every control and invisible character is escaped.

    Args:
        value: Anything that `json.dumps` takes.
        ascii_only: Escape all that is not ASCII, for an output that cannot encode it.
    """
    text = json.dumps(value, ensure_ascii=ascii_only, indent=2, allow_nan=False)
    # Inside strings json.dumps has escaped the line feeds, so a bare one is layout.
    return _UNSAFE.sub(lambda match: "\n" if match[0] == "\n" else json.dumps(match[0])[1:-1], text)


def plural(count: int, noun: str) -> str:
    """Return "1 file", "2 files"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(count: int) -> str:
    """Return a number of bytes for people: "512 B", "1.5 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def snippet(text: str, query: str, length: int) -> str:
    """Return the part of `text` that says most about `query`, as one printable line.

    It starts at the sentence from which the next `length` characters hold most of the query's words (the
    first such), and an ellipsis stands where something was left out.

    Args:
        text: The passage.
        query: What was asked for.
        length: The most characters to take from the passage; escapes of control characters come on top.
    """
    flat = " ".join(text.split())
    if len(flat) <= length:
        return printable(flat)
    words = {word for word in _WORD.findall(query.casefold()) if len(word) > 2}
    starts = [0, *(match.end() for match in _SENTENCE_START.finditer(flat))]
    # A later start would show less text than there is room for.
    starts = [start for start in starts if start <= len(flat) - length] or [0]

    def words_shown(start: int) -> int:
        return len(words & set(_WORD.findall(flat[start : start + length].casefold())))

    start = max(starts, key=words_shown)
    cut = flat[start : start + length]
    if start + length < len(flat) and " " in cut:
        cut = cut[: cut.rindex(" ")]
    left = "… " if start else ""
    right = " …" if start + len(cut) < len(flat) else ""
    return left + printable(cut) + right
