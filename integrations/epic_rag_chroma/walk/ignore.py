"""Ignore files: which entries of a folder `.gitignore` and `.epicignore` leave out, as git reads them."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["EPIC_IGNORE", "GIT_IGNORE", "GitPatterns", "NotRegularError", "Rules", "TooLargeError", "read_regular"]


# --- from regular
# Reading a file that may be anything by now: only a regular one, only as much as is allowed, and never a link.

# Not following a link closes the gap between the walk, which looks at a name, and the reading, which opens it.
# O_NONBLOCK: opening a FIFO would otherwise wait for somebody to write to it. Windows has neither.
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_PIECE = 2**20


class NotRegularError(OSError):
    """What should be a regular file is something else: a link, a folder, a FIFO, a socket or a device."""


class TooLargeError(OSError):
    """A file with more bytes than are allowed."""


def read_regular(path: str | os.PathLike[str], limit: int, *, whole: bool = True) -> tuple[bytes, os.stat_result]:
    """Read a regular file.

    Args:
        path: The file; its last name may not be a link.
        limit: The most bytes that are read.
        whole: Whether more bytes are an error; otherwise the first ones will do.

    Returns:
        The bytes, and what the file system said of the file before they were read.

    Raises:
        NotRegularError: If it is no regular file.
        TooLargeError: If it has more bytes and was to be read whole.
        OSError: If it cannot be opened or read.
    """
    if not _FLAGS & getattr(os, "O_NONBLOCK", 0) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise _other(path)
    try:
        handle = os.open(path, _FLAGS)
    except OSError as error:
        # A link; a socket, or a device without a driver.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _other(path) from error
        raise
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise _other(path)
        if whole and info.st_size > limit:
            raise TooLargeError(errno.EFBIG, f"larger than {limit} bytes", os.fspath(path))
        pieces = []
        left = limit + 1 if whole else limit
        # In pieces: a file may say less than it has (it grows, or is one of /proc's), and never gets more than allowed.
        while left > 0 and (piece := os.read(handle, min(left, max(_PIECE, info.st_size + 1)))):
            pieces.append(piece)
            left -= len(piece)
    finally:
        os.close(handle)
    if whole and not left:
        raise TooLargeError(errno.EFBIG, f"larger than {limit} bytes", os.fspath(path))
    return b"".join(pieces), info


def _other(path: str | os.PathLike[str]) -> NotRegularError:
    return NotRegularError(errno.EINVAL, "neither a file nor a folder", os.fspath(path))


# --- from gitpatterns
# Patterns of ignore files, matched as git matches them: one entry at a time, never what lies below it.
#
# pathspec, which knows the syntax, asks whether a path or a folder above it matches. A walk that asks about every folder
# on its way needs the other question: after `*` and `!*/`, the usual way to name what is wanted, it must enter folders,
# and after `*.md` and `!docs/`, what is in docs is still ignored. The rules are those of git's dir.c and wildmatch.c.

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


GIT_IGNORE = ".gitignore"
EPIC_IGNORE = ".epicignore"
_MOST_BYTES = 2**20


@dataclass(frozen=True)
class _Layer:
    """The patterns of one ignore file, and what makes a path relative to its folder of one relative to the root.

    Args:
        patterns: The patterns.
        cut: How many characters of the path to leave out, for a file below the root.
        above: What to put before the path, for a file above the root.
    """

    patterns: GitPatterns
    cut: int = 0
    above: str = ""

    def decide(self, path: str, is_folder: bool) -> bool | None:
        """Whether the file ignores an entry; None if it does not say."""
        return self.patterns.decide(self.above + path[self.cut :], is_folder)


@dataclass(frozen=True)
class Rules:
    """The ignore files that hold for a folder, outermost first; all paths are relative to the root, with slashes."""

    git: tuple[_Layer, ...] = ()
    epic: tuple[_Layer, ...] = ()

    @classmethod
    def above(cls, root: Path) -> Rules:
        """The rules that lie between the top of the repository that a root is in, and the root itself.

        There are none if they ignore the root, which was asked for by name: then only the rules inside it hold.
        """
        folders: list[Path] = []
        for folder in (root, *root.parents):
            if folder != root:
                folders.append(folder)
            if (folder / ".git").exists():
                break
        else:
            return cls()
        rules = cls()
        for folder in reversed(folders):
            names = [name for name in (GIT_IGNORE, EPIC_IGNORE) if (folder / name).is_file()]
            rules = rules._with(str(folder), names, above="/".join(root.relative_to(folder).parts) + "/")
            child = root.relative_to(folder).parts[0]
            beneath = root.relative_to(folder / child)
            if rules._ignored_above("" if beneath == Path() else f"{beneath.as_posix()}/"):
                return cls()
        return rules

    def entered(self, folder: str, prefix: str, names: Collection[str]) -> Rules:
        """The rules inside a folder.

        Args:
            folder: Where it is.
            prefix: Its path with a slash at the end; "" for the root.
            names: The names in it.
        """
        return self._with(folder, names, cut=len(prefix))

    def ignores(self, path: str, name: str, is_folder: bool) -> bool:
        """Whether an entry is left out; names that begin with a dot are, unless an `.epicignore` takes them in."""
        said = _decide(self.epic, path, is_folder)
        if said is None:
            said = True if name.startswith(".") else _decide(self.git, path, is_folder)
        return bool(said)

    def _ignored_above(self, beneath: str) -> bool:
        """Whether a folder above the root is ignored: the one from which the root is `beneath`."""

        def shortened(layers: tuple[_Layer, ...]) -> tuple[_Layer, ...]:
            return tuple(
                replace(layer, above=layer.above[: len(layer.above) - len(beneath)].rstrip("/")) for layer in layers
            )

        said = _decide(shortened(self.epic), "", True)
        return bool(_decide(shortened(self.git), "", True) if said is None else said)

    def _with(self, folder: str, names: Collection[str], *, cut: int = 0, above: str = "") -> Rules:
        git, epic = self.git, self.epic
        if GIT_IGNORE in names:
            git = (*git, _Layer(_read(os.path.join(folder, GIT_IGNORE)), cut, above))
        if EPIC_IGNORE in names:
            epic = (*epic, _Layer(_read(os.path.join(folder, EPIC_IGNORE)), cut, above))
        return self if git is self.git and epic is self.epic else Rules(git, epic)


def _decide(layers: tuple[_Layer, ...], path: str, is_folder: bool) -> bool | None:
    for layer in reversed(layers):
        said = layer.decide(path, is_folder)
        if said is not None:
            return said
    return None


def _read(file: str) -> GitPatterns:
    try:
        # git does not follow a link here either.
        data, _ = read_regular(file, _MOST_BYTES)
    except OSError as error:
        logger.warning("cannot read %s (%s); its patterns do not count", file, error.strerror)
        return GitPatterns([], file)
    # As git has it: lines end with a line feed, before which one carriage return does not count; bytes are bytes.
    lines = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").split("\n")
    return GitPatterns([line.removesuffix("\r") for line in lines], file)
