"""Text that comes from documents, paths and messages, made fit for a terminal.

A document may hold escape sequences that move the cursor, set the window title or hide text, and
bidirectional controls that show a line in another order than it has. Nothing of that may reach a terminal: a
character that is not ordinary text is written as its escape.
"""

from __future__ import annotations

import json
import re

__all__ = ["json_text", "plural", "printable", "size"]

# C0 and C1 controls, line and paragraph separators, bidirectional controls, invisible operators, byte order
# marks, interlinear annotations, lone surrogates (undecodable bytes in file names) and tag characters. The
# joiners U+200C and U+200D stay: scripts and emoji need them, and they cannot reorder anything.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Return `text` as one safe line: runs of white space become a space, controls their escapes."""
    line = " ".join(text.split())
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), line)


def json_text(value: object, *, ascii_only: bool = False, one_line: bool = False) -> str:
    """Return `value` as JSON in which every control and invisible character is escaped.

    Args:
        value: Anything that `json.dumps` takes.
        ascii_only: Escape all that is not ASCII, for an output that cannot encode it.
        one_line: Write one line; otherwise it is indented.
    """
    text = json.dumps(value, ensure_ascii=ascii_only, indent=None if one_line else 2, allow_nan=False)
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
