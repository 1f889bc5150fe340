"""Patterns of ignore files, matched as git matches them: one entry at a time, never what lies below it.

pathspec, which knows the syntax, asks whether a path or a folder above it matches. A walk that asks about every folder
on its way needs the other question: after `*` and `!*/`, the usual way to name what is wanted, it must enter folders,
and after `*.md` and `!docs/`, what is in docs is still ignored. The rules are those of git's dir.c and wildmatch.c.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["GitPatterns"]

logger = logging.getLogger(__name__)

_CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "blank": r" \t",
    "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": r"!-/:-@\[-`{-~",
    "space": r" \t-\r",
    "upper": "A-Z",
    "xdigit": "0-9A-Fa-f",
}


class _NeverMatchesError(ValueError):
    """A pattern that git reads and that matches nothing."""


@dataclass(frozen=True)
class _Pattern:
    """A line: whether it takes back in, whether it is for folders only, and the expression for a whole path."""

    negated: bool
    folders: bool
    expression: str


class GitPatterns:
    """The patterns of one ignore file.

    Args:
        lines: The lines, without their ends.
        origin: Where they come from, for the warning about one that matches nothing.
    """

    def __init__(self, lines: Iterable[str], origin: str) -> None:
        patterns = []
        for line in lines:
            try:
                pattern = _parse(line)
            except _NeverMatchesError:
                logger.warning("%s: %r is no valid pattern; it does not count", origin, line)
            else:
                if pattern is not None:
                    patterns.append(pattern)
        self._of_folders = _runs(patterns)
        self._of_files = _runs([pattern for pattern in patterns if not pattern.folders])

    def decide(self, path: str, is_folder: bool) -> bool | None:
        """Whether an entry is ignored; None if no pattern says anything.

        Args:
            path: Relative to the file's folder, with slashes.
            is_folder: Whether it is a folder.
        """
        for ignored, expression in self._of_folders if is_folder else self._of_files:
            if expression.fullmatch(path):
                return ignored
        return None


def _runs(patterns: list[_Pattern]) -> list[tuple[bool, re.Pattern[str]]]:
    """What to ask in turn: the last pattern that matches decides, so neighbours that say the same are one question."""
    runs = itertools.groupby(reversed(patterns), key=lambda pattern: pattern.negated)
    return [
        (not negated, re.compile("|".join(f"(?:{pattern.expression})" for pattern in run), re.DOTALL))
        for negated, run in runs
    ]


def _parse(line: str) -> _Pattern | None:
    text = _trimmed(line)
    if not text or text.startswith("#"):
        return None
    negated = text.startswith("!")
    text = text[negated:]
    folders = text.endswith("/")
    text = text[: len(text) - folders]
    if not text:
        raise _NeverMatchesError
    if "/" not in text:
        return _Pattern(negated, folders, "(?:.*/)?" + _translate(text, whole_path=False))
    return _Pattern(negated, folders, _translate(text.removeprefix("/"), whole_path=True))


def _trimmed(line: str) -> str:
    """The line without spaces at its end that no backslash keeps."""
    kept = 0
    position = 0
    while position < len(line):
        if line[position] == "\\":
            position += 1
            if position == len(line):
                return line
            kept = position + 1
        elif line[position] != " ":
            kept = position + 1
        position += 1
    return line[:kept]


def _translate(glob: str, *, whole_path: bool) -> str:
    """A regular expression for what a glob matches; in a whole path, `**` between slashes goes over slashes."""
    parts = []
    position = 0
    # git compares what stands before the first special character by itself, and takes the rest for a glob of its own.
    beginnings = {0, next((place for place, character in enumerate(glob) if character in "*?[\\"), 0)}
    while position < len(glob):
        character = glob[position]
        if character == "*":
            end = position
            while end < len(glob) and glob[end] == "*":
                end += 1
            bounded = position in beginnings or glob[position - 1] == "/"
            bounded = whole_path and bounded and (end == len(glob) or glob[end] == "/")
            if end - position < 2 or not bounded:
                parts.append("[^/]*")
            elif end < len(glob):
                parts.append("(?:.*/)?")
                end += 1
            else:
                parts.append(".*")
            position = end
        elif character == "?":
            parts.append("[^/]")
            position += 1
        elif character == "[":
            text, position = _set(glob, position)
            parts.append(text)
        else:
            if character == "\\":
                position += 1
                if position == len(glob):
                    raise _NeverMatchesError
            parts.append(re.escape(glob[position]))
            position += 1
    return "".join(parts)


def _set(glob: str, position: int) -> tuple[str, int]:
    """The expression of a set that begins at `position`, and where it ends."""
    position += 1
    negated = glob[position : position + 1] in ("!", "^")
    position += negated
    items: list[str] = []
    before = ""  # the character that a range may begin with
    first = True
    while True:
        character = glob[position : position + 1]
        if not character:
            raise _NeverMatchesError
        if character == "]" and not first:
            break
        first = False
        if character == "[" and glob[position + 1 : position + 2] == ":":
            end = glob.find("]", position + 2)
            if end < 0:
                raise _NeverMatchesError
            name = glob[position + 2 : end]
            if name.endswith(":"):
                if name[:-1] not in _CLASSES:
                    raise _NeverMatchesError
                items.append(_CLASSES[name[:-1]])
                before = ""
                position = end + 1
                continue
        following = glob[position + 1 : position + 2]
        if character == "-" and before and following and following != "]":
            position += 1
            last, position = _member(glob, position)
            if before <= last:
                items.append(f"{re.escape(before)}-{re.escape(last)}")
            before = ""
            continue
        before, position = _member(glob, position)
        items.append(re.escape(before))
    if not items and not negated:
        raise _NeverMatchesError
    inner = "".join(items)
    return f"(?!/)[{'^' if negated else ''}{inner}]" if inner else "[^/]", position + 1


def _member(glob: str, position: int) -> tuple[str, int]:
    """A character of a set, and what comes after it; a backslash takes the next one as it is."""
    if glob[position] == "\\":
        position += 1
        if position == len(glob):
            raise _NeverMatchesError
    return glob[position], position + 1
