"""Which files an index is made of: the walk through a folder, and the rules that leave files out.

In order of strength: version control's own folders are never read; `.epicignore` decides before `.gitignore`, a deeper
file before a higher one; names that begin with a dot are left out unless an `.epicignore` says `!name`; then the
patterns `exclude`, `include` and the built-in ones for files that nobody searches (lock files, minified code, what
editors leave behind).

Nothing is opened here but ignore files: a name is judged by what the file system says of it. Links are looked at last,
when every file that has a name of its own inside is known, so that none is read twice and no loop is entered.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from epic_rag_chroma.gitpatterns import GitPatterns
from epic_rag_chroma.ignore import Rules
from epic_rag_chroma.readers import NotTextError, byte_limit, is_binary_name
from epic_rag_chroma.regular import NotRegularError, TooLargeError, read_regular
from epic_rag_chroma.types import IndexSettings, SkippedFile

__all__ = [
    "INDEX_FILE",
    "FileStamp",
    "FoundFile",
    "NamePatterns",
    "Scan",
    "display_name",
    "is_index_folder",
    "is_version_control",
    "read_file",
    "scan",
]

logger = logging.getLogger(__name__)

INDEX_FILE = "index.json"
_INDEX_MARK = b"epic-rag-index"
_MARK_WITHIN = 400
_VCS = frozenset({".git", ".hg", ".svn", ".bzr", ".jj", "_darcs", "CVS"})
_DEFAULT_EXCLUDE = GitPatterns(
    [
        *("node_modules/", "__pycache__/", "*.min.js", "*.min.css", "*.js.map", "*.css.map"),
        *("*.lock", "package-lock.json"),
        *("*~", "~$*", "\\#*#", "*.swp", "*.swo"),
    ],
    "built in",
)


@dataclass(frozen=True)
class FileStamp:
    """What the file system says of a file; equal stamps of old enough files mean equal content, as git has it."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, info: os.stat_result) -> FileStamp:
        """The stamp of a stat result."""
        return cls(info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file to index: its path relative to the root, with slashes, and where it is (no link, any more)."""

    path: str
    location: Path


@dataclass
class Scan:
    """What a walk found. Paths are relative to the root; a folder in `unreadable` hides what may lie below it."""

    files: list[FoundFile] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def display_name(path: str) -> str:
    """A path that can be printed and stored, whatever bytes the file system has in it."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_file(file: FoundFile) -> tuple[bytes, FileStamp]:
    """Read a file that a walk found, whatever has become of it since.

    Raises:
        NotTextError: If it is larger than its kind may be, or no regular file any more.
        OSError: If it cannot be read.
    """
    limit = byte_limit(file.path)
    try:
        data, info = read_regular(file.location, limit)
    except NotRegularError as error:
        raise NotTextError(str(error.strerror)) from error
    except TooLargeError as error:
        raise NotTextError(f"larger than {limit // 2**20} MiB") from error
    return data, FileStamp.of(info)


class NamePatterns:
    """What the settings say of names: `exclude`, `include`, and the built-in patterns where `include` says nothing.

    Like the walk, it is asked about every folder above a file before it is asked about the file.
    """

    def __init__(self, settings: IndexSettings) -> None:
        self._include = _taken_in(settings.include) if settings.include else None
        self._exclude = GitPatterns(settings.exclude, "exclude") if settings.exclude else None

    def exclude(self, path: str, is_folder: bool) -> bool:
        """Whether they leave out a path, which is relative to the root."""
        if self._exclude is not None and self._exclude.decide(path, is_folder):
            return True
        if self._include is not None and not is_folder:
            return not self._include.match_file(path)
        return bool(_DEFAULT_EXCLUDE.decide(path, is_folder))


def _taken_in(lines: Sequence[str]) -> GitIgnoreSpec:
    """Patterns of files, and of folders with all that is in them."""
    good = []
    for line in lines:
        try:
            GitIgnoreSpec.from_lines([line])
        except ValueError:
            logger.warning("include: %r is no valid pattern; it does not count", line)
        else:
            good.append(line)
    return GitIgnoreSpec.from_lines(good)


def is_version_control(name: str) -> bool:
    """Whether a folder belongs to git or one of its like."""
    return name in _VCS


def is_index_folder(folder: str) -> bool:
    """Whether a folder is an index of ours (under any name) or a Chroma folder; neither holds documents."""
    if os.path.lexists(os.path.join(folder, "chroma.sqlite3")):
        return True
    try:
        return _INDEX_MARK in read_regular(os.path.join(folder, INDEX_FILE), _MARK_WITHIN, whole=False)[0]
    except OSError:
        return False


def scan(root: Path, settings: IndexSettings, *, index_dir: Path | None = None, elsewhere: Sequence[Path] = ()) -> Scan:
    """Find the files below a root, in order of their paths.

    Args:
        root: A folder or a file, resolved. A file is named on purpose, so no rule leaves it out.
        settings: Its patterns decide with the ignore files; `follow_links` lets links leave the root.
        index_dir: An index folder that must not be read; others are known by their content.
        elsewhere: Other roots of the index: what links lead to there is found there.
    """
    found = Scan()
    if not root.is_dir():
        found.files.append(FoundFile(root.name, root))
        return found
    _Walk(root, settings, index_dir, elsewhere, found).run()
    found.files.sort(key=lambda file: file.path)
    found.skipped.sort(key=lambda file: file.path)
    return found


@dataclass(frozen=True)
class _Link:
    """A link to look at when the walk is over: its path, where it is, and the rules that hold there."""

    path: str
    location: str
    rules: Rules


class _Walk:
    def __init__(
        self, root: Path, settings: IndexSettings, index_dir: Path | None, elsewhere: Sequence[Path], found: Scan
    ) -> None:
        self._root = root
        self._index_dir = str(index_dir) if index_dir is not None else None
        self._elsewhere = [other for other in elsewhere if other != root]
        self._leave = settings.follow_links
        self._patterns = NamePatterns(settings)
        self._found = found
        self._links: list[_Link] = []
        self._folders: set[tuple[int, int]] = set()

    def run(self) -> None:
        self._walk(str(self._root), "", Rules.above(self._root))
        if not self._links:
            return
        known = {str(file.location) for file in self._found.files}
        while self._links:
            links, self._links = sorted(self._links, key=lambda link: link.path), []
            for link in links:
                start = len(self._found.files)
                try:
                    self._follow(link)
                except (OSError, RuntimeError):  # Python 3.12 and older say RuntimeError of a loop
                    self._skip(link.path, "a broken symbolic link")
                # A file that is reached in two ways counts under the name that it was reached by first.
                new = [file for file in self._found.files[start:] if str(file.location) not in known]
                self._found.files[start:] = new
                known.update(str(file.location) for file in new)

    def _walk(self, top: str, prefix: str, rules: Rules) -> None:
        stack = [(top, prefix, rules)]
        while stack:
            folder, prefix, rules = stack.pop()
            try:
                info = os.stat(folder)
                with os.scandir(folder) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                self._skip(prefix.rstrip("/") or ".", f"cannot be listed: {error.strerror}")
                self._found.unreadable.append(prefix)
                continue
            if (info.st_dev, info.st_ino) in self._folders:
                continue
            self._folders.add((info.st_dev, info.st_ino))
            names = {entry.name for entry in listed}
            if prefix and not names.isdisjoint((INDEX_FILE, "chroma.sqlite3")) and is_index_folder(folder):
                continue
            rules = rules.entered(folder, prefix, names)
            for entry in listed:
                if self._keep(entry, prefix, rules):
                    stack.append((entry.path, f"{prefix}{entry.name}/", rules))

    def _keep(self, entry: os.DirEntry[str], prefix: str, rules: Rules) -> bool:
        """Note a file; whether the entry is a folder to walk into."""
        path = prefix + entry.name
        try:
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name in _VCS or entry.path == self._index_dir:
                return False
            if rules.ignores(path, entry.name, is_folder) or self._patterns.exclude(path, is_folder):
                return False
            if display_name(path) != path:
                self._skip(display_name(path), "its name is not valid UTF-8")
            elif is_folder:
                return True
            elif entry.is_symlink():
                self._links.append(_Link(path, entry.path, rules))
            elif not entry.is_file(follow_symlinks=False):
                self._skip(path, "neither a file nor a folder")
            elif is_binary_name(entry.name):
                self._skip(path, "not text")
            else:
                self._found.files.append(FoundFile(path, Path(entry.path)))
        except OSError as error:
            self._skip(display_name(path), f"cannot be read: {error.strerror}")
            self._found.unreadable.append(path)
        return False

    def _follow(self, link: _Link) -> None:
        """Take in what a link leads to, unless it is found under its own name or lies outside and must not be read."""
        target = Path(link.location).resolve(strict=True)
        info = target.stat()
        if any(target.is_relative_to(other) for other in self._elsewhere):
            return
        inside = target.is_relative_to(self._root)
        if not inside and not self._leave:
            self._skip(link.path, "a symbolic link that leaves the indexed folder")
        elif _VCS.intersection(target.parts[len(self._root.parts) :] if inside else target.parts):
            return
        elif stat.S_ISDIR(info.st_mode):
            name = link.path.rpartition("/")[2]
            ignored = link.rules.ignores(link.path, name, True) or self._patterns.exclude(link.path, True)
            if self._leave and not ignored and str(target) != self._index_dir and not is_index_folder(str(target)):
                self._walk(str(target), f"{link.path}/", link.rules)
        elif not stat.S_ISREG(info.st_mode):
            self._skip(link.path, "a symbolic link to neither a file nor a folder")
        elif not is_binary_name(target.name):
            self._found.files.append(FoundFile(link.path, target))

    def _skip(self, path: str, reason: str) -> None:
        self._found.skipped.append(SkippedFile(path, reason))
