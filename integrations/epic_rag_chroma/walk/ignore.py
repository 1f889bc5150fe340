"""Ignore patterns with git's semantics, and the stack of .gitignore and .epicignore files that apply to a folder.

`IgnorePatterns` implements the rules of git's dir.c and wildmatch.c for one list of patterns. It is the only matcher of
the package: the walk, `include` and `exclude` settings and `--path` filters all use it. It has two methods:

* `decide(path, is_folder)` matches one entry and never what lies below it. A walk decides every folder on its way down,
  so after `*` and `!*/` (allow-listing) folders are entered, and after `*.md` and `!docs/` a Markdown file in docs is
  still ignored, as in git.
* `selects(path)` matches a file by itself or by a folder above it, for lists of wanted files: `guide` selects all of
  guide/.

`IgnoreRules` holds the ignore files of a folder and of all folders above it. An .epicignore takes precedence over any
.gitignore, a deeper file over a higher one, a later line over an earlier one; at the top of a repository, its
`.git/info/exclude` and `core.excludesFile` come before all of its .gitignore files. The tests compare the result with
`git ls-files` on generated pattern lists.

Paths and patterns are compared in Unicode's composed form: macOS, archives and other file systems decompose names.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from epic_rag_chroma.walk.git_config import exclude_files
from epic_rag_chroma.walk.safe_read import read_regular

__all__ = ["EPIC_IGNORE", "GIT_IGNORE", "IgnorePatterns", "IgnoreRules", "PatternError", "compile_patterns"]

logger = logging.getLogger(__name__)

GIT_IGNORE = ".gitignore"
EPIC_IGNORE = ".epicignore"
_MAX_IGNORE_FILE_BYTES = 2**20

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


class PatternError(ValueError):
    """A pattern that git accepts and that can never match; an empty line or a comment for `compile_patterns`."""


@dataclass(frozen=True)
class _Pattern:
    """One line: its sign, whether it matches folders only, and the regular expression for a whole path."""

    negated: bool
    folders_only: bool
    expression: str


@dataclass(frozen=True)
class _Run:
    """Consecutive patterns of the same sign, merged into one expression for files (None: none of them) and folders."""

    ignored: bool
    files: re.Pattern[str] | None
    folders: re.Pattern[str]


class IgnorePatterns:
    """A list of ignore patterns.

    Args:
        lines: The patterns in .gitignore's syntax, without line ends.
        origin: Where they come from, for the warning about a pattern that cannot match.
    """

    def __init__(self, lines: Iterable[str], origin: str) -> None:
        patterns = []
        for line in lines:
            try:
                pattern = _parse(line)
            except PatternError:
                logger.warning("%s: pattern %r can never match and is ignored", origin, line)
            else:
                if pattern is not None:
                    patterns.append(pattern)
        # The last match wins, so the runs are tried from the end.
        self._runs = []
        for negated, group in itertools.groupby(reversed(patterns), key=lambda pattern: pattern.negated):
            run = list(group)
            for_files = [pattern for pattern in run if not pattern.folders_only]
            self._runs.append(_Run(not negated, _union(for_files) if for_files else None, _union(run)))

    def decide(self, path: str, is_folder: bool) -> bool | None:
        """Return True if an entry is ignored, False if it is re-included, None if no pattern matches it.

        Args:
            path: Relative to the folder of the patterns, with slashes.
            is_folder: Whether the entry is a folder.
        """
        path = _composed(path)
        for run in self._runs:
            expression = run.folders if is_folder else run.files
            if expression is not None and expression.fullmatch(path):
                return run.ignored
        return None

    def selects(self, path: str) -> bool:
        """Return whether the last pattern that matches a file, or a folder above it, is not negated."""
        path = _composed(path)
        parents = [path[: match.start()] for match in re.finditer("/", path)]
        for run in self._runs:
            if (run.files is not None and run.files.fullmatch(path)) or any(map(run.folders.fullmatch, parents)):
                return run.ignored
        return False


def compile_patterns(lines: Sequence[str], origin: str) -> IgnorePatterns:
    """Compile patterns that a user typed, none of which may be empty, a comment or without any possible match.

    Raises:
        PatternError: For the first such pattern, which is the error's only argument.
    """
    for line in lines:
        try:
            pattern = _parse(line)
        except PatternError as error:
            raise PatternError(line) from error
        if pattern is None:
            raise PatternError(line)
    return IgnorePatterns(lines, origin)


def _union(patterns: Iterable[_Pattern]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern.expression})" for pattern in patterns), re.DOTALL)


def _composed(path: str) -> str:
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def _parse(line: str) -> _Pattern | None:
    """Parse a line; None for an empty one or a comment."""
    text = _without_trailing_spaces(_composed(line))
    if not text or text.startswith("#"):
        return None
    negated = text.startswith("!")
    text = text[negated:]
    folders_only = text.endswith("/")
    text = text[: len(text) - folders_only]
    if not text:
        raise PatternError
    if "/" not in text:
        return _Pattern(negated, folders_only, "(?:.*/)?" + _translate(text, whole_path=False))
    return _Pattern(negated, folders_only, _translate(text.removeprefix("/"), whole_path=True))


def _without_trailing_spaces(line: str) -> str:
    """Strip trailing spaces except escaped ones."""
    end = 0
    position = 0
    while position < len(line):
        if line[position] == "\\":
            position += 1
            if position == len(line):
                return line
            end = position + 1
        elif line[position] != " ":
            end = position + 1
        position += 1
    return line[:end]


def _translate(glob: str, *, whole_path: bool) -> str:
    """Translate a glob into a regular expression; in a whole path, `**` between slashes matches any folders."""
    parts = []
    position = 0
    # git compares the literal prefix (up to the first special character) separately, and matches the rest as a glob.
    starts = {0, next((place for place, character in enumerate(glob) if character in "*?[\\"), 0)}
    while position < len(glob):
        character = glob[position]
        if character == "*":
            end = position
            while end < len(glob) and glob[end] == "*":
                end += 1
            bounded = position in starts or glob[position - 1] == "/"
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
            text, position = _translate_set(glob, position)
            parts.append(text)
        else:
            character, position = _literal(glob, position)
            parts.append(re.escape(character))
    return "".join(parts)


def _translate_set(glob: str, position: int) -> tuple[str, int]:
    """Translate the character set that begins at `position`; return it and the position after it."""
    position += 1
    negated = glob[position : position + 1] in ("!", "^")
    position += negated
    items: list[str] = []
    before = ""  # the character that may begin a range
    first = True
    while True:
        character = glob[position : position + 1]
        if not character:
            raise PatternError
        if character == "]" and not first:
            break
        first = False
        if character == "[" and glob[position + 1 : position + 2] == ":":
            end = glob.find("]", position + 2)
            if end < 0:
                raise PatternError
            name = glob[position + 2 : end]
            if name.endswith(":"):
                if name[:-1] not in _CLASSES:
                    raise PatternError
                items.append(_CLASSES[name[:-1]])
                before = ""
                position = end + 1
                continue
        following = glob[position + 1 : position + 2]
        if character == "-" and before and following and following != "]":
            last, position = _literal(glob, position + 1)
            if before <= last:
                items.append(f"{re.escape(before)}-{re.escape(last)}")
            before = ""
            continue
        before, position = _literal(glob, position)
        items.append(re.escape(before))
    if not items and not negated:
        raise PatternError
    inner = "".join(items)
    return f"(?!/)[{'^' if negated else ''}{inner}]" if inner else "[^/]", position + 1


def _literal(glob: str, position: int) -> tuple[str, int]:
    """Return a character, unescaped, and the position after it."""
    if glob[position] == "\\":
        position += 1
        if position == len(glob):
            raise PatternError
    return glob[position], position + 1


@dataclass(frozen=True)
class _IgnoreFile:
    """The patterns of one ignore file, for paths relative to the root.

    Args:
        patterns: The patterns.
        skip: Leading characters of the path to drop, for a file below the root.
        prefix: Folders to put before the path, for a file above the root.
    """

    patterns: IgnorePatterns
    skip: int = 0
    prefix: str = ""

    def decide(self, path: str, is_folder: bool) -> bool | None:
        """Return `IgnorePatterns.decide` for a path relative to the root."""
        return self.patterns.decide(self.prefix + path[self.skip :], is_folder)


@dataclass(frozen=True)
class IgnoreRules:
    """The ignore files that apply inside a folder, outermost first; paths are relative to the root, with slashes."""

    git: tuple[_IgnoreFile, ...] = ()
    epic: tuple[_IgnoreFile, ...] = ()

    @classmethod
    def above_root(cls, root: Path) -> IgnoreRules:
        """Collect the ignore files between the top of the repository that contains the root and the root itself.

        If they ignore the root, none of them applies: the user named the root, so only the rules inside it count.
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
            if (folder / ".git").exists():
                names.append(".git")
            relative = root.relative_to(folder)
            rules = rules.enter(str(folder), names, prefix=relative.as_posix() + "/")
            rest = root.relative_to(folder / relative.parts[0])
            if rules._ignores_ancestor("" if rest == Path() else f"{rest.as_posix()}/"):
                return cls()
        return rules

    def enter(self, folder: str, names: Collection[str], *, skip: int = 0, prefix: str = "") -> IgnoreRules:
        """Return the rules inside a folder.

        Args:
            folder: Its location.
            names: The names in it.
            skip: The length of its path with a slash at the end, if it is below the root.
            prefix: The folders between it and the root, with a slash at the end, if it is above the root.
        """
        git, epic = self.git, self.epic
        if ".git" in names:
            files = (_IgnoreFile(_read_ignore_file(path), skip, prefix) for path in exclude_files(folder))
            git = (*git, *files)
        if GIT_IGNORE in names:
            git = (*git, _IgnoreFile(_read_ignore_file(os.path.join(folder, GIT_IGNORE)), skip, prefix))
        if EPIC_IGNORE in names:
            epic = (*epic, _IgnoreFile(_read_ignore_file(os.path.join(folder, EPIC_IGNORE)), skip, prefix))
        return self if git is self.git and epic is self.epic else IgnoreRules(git, epic)

    def ignores(self, path: str, name: str, is_folder: bool) -> bool:
        """Return whether an entry is ignored; hidden names are, unless an .epicignore re-includes them."""
        decision = _last_decision(self.epic, path, is_folder)
        if decision is None:
            decision = True if name.startswith(".") else _last_decision(self.git, path, is_folder)
        return bool(decision)

    def _ignores_ancestor(self, rest: str) -> bool:
        """Return whether the folder above the root is ignored from which the root is `rest`."""
        git, epic = (
            tuple(replace(file, prefix=file.prefix[: len(file.prefix) - len(rest)].rstrip("/")) for file in files)
            for files in (self.git, self.epic)
        )
        decision = _last_decision(epic, "", True)
        return bool(_last_decision(git, "", True) if decision is None else decision)


def _last_decision(files: tuple[_IgnoreFile, ...], path: str, is_folder: bool) -> bool | None:
    for file in reversed(files):
        decision = file.decide(path, is_folder)
        if decision is not None:
            return decision
    return None


def _read_ignore_file(path: str) -> IgnorePatterns:
    try:
        data, _ = read_regular(path, _MAX_IGNORE_FILE_BYTES)  # git does not follow links here either
    except OSError as error:
        logger.warning("cannot read %s (%s); its patterns are ignored", path, error.strerror)
        return IgnorePatterns([], path)
    # As in git: lines end with a line feed, one carriage return before it is dropped, undecodable bytes are kept.
    lines = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").split("\n")
    return IgnorePatterns([line.removesuffix("\r") for line in lines], path)
