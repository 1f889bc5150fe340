"""Which files an index is made of: the walk through a folder, and the rules that leave files out.

In order of strength: version control's own folders are never read; `.epicignore` decides before `.gitignore`, a deeper
file before a higher one; names that begin with a dot are left out unless an `.epicignore` says `!name`; then the
patterns `exclude`, `include` and the built-in ones for files that nobody searches (lock files, minified code).
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from epic_rag_chroma.readers import is_binary_name
from epic_rag_chroma.types import IndexSettings, SkippedFile

__all__ = ["INDEX_FILE", "FileStamp", "FoundFile", "Scan", "display_name", "scan"]

logger = logging.getLogger(__name__)

INDEX_FILE = "index.json"
_VCS = frozenset({".git", ".hg", ".svn", ".bzr", ".jj", "_darcs", "CVS"})
_GIT_IGNORE = ".gitignore"
_EPIC_IGNORE = ".epicignore"
_DEFAULT_EXCLUDE = GitIgnoreSpec.from_lines(
    ["node_modules/", "__pycache__/", "*.min.js", "*.min.css", "*.js.map", "*.css.map", "*.lock", "package-lock.json"]
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


@dataclass(frozen=True)
class FoundFile:
    """A file to index: its path relative to the root, with slashes, and where it is."""

    path: str
    location: Path


@dataclass
class Scan:
    """What a walk found. Paths are relative to the root; a folder in `unreadable` hides what may lie below it."""

    files: list[FoundFile] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Rules:
    """Ignore files that hold for a folder, outermost first: (the folder they lie in, their patterns)."""

    git: tuple[tuple[str, GitIgnoreSpec], ...] = ()
    epic: tuple[tuple[str, GitIgnoreSpec], ...] = ()

    def entered(self, folder: str, names: Iterable[str]) -> _Rules:
        """The rules inside a folder that holds these names."""
        git, epic = self.git, self.epic
        if _GIT_IGNORE in names:
            git = (*git, (folder, _read_patterns(Path(folder, _GIT_IGNORE))))
        if _EPIC_IGNORE in names:
            epic = (*epic, (folder, _read_patterns(Path(folder, _EPIC_IGNORE))))
        return _Rules(git, epic)

    def ignores(self, location: str, name: str, is_folder: bool) -> bool:
        """Whether an entry is left out."""
        said = _decide(self.epic, location, is_folder)
        if said is None:
            said = True if name.startswith(".") else _decide(self.git, location, is_folder)
        return bool(said)


def _decide(chain: Sequence[tuple[str, GitIgnoreSpec]], location: str, is_folder: bool) -> bool | None:
    for folder, patterns in reversed(chain):
        relative = os.path.relpath(location, folder).replace(os.sep, "/") + ("/" if is_folder else "")
        said = patterns.check_file(relative).include
        if said is not None:
            return said
    return None


def _read_patterns(file: Path) -> GitIgnoreSpec:
    try:
        lines = file.read_bytes().decode("utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        logger.warning("cannot read %s (%s); its patterns do not count", file, error.strerror)
        return GitIgnoreSpec.from_lines([])
    return _patterns(lines, str(file))


def _patterns(lines: Iterable[str], origin: str) -> GitIgnoreSpec:
    good = []
    for line in lines:
        try:
            GitIgnoreSpec.from_lines([line])
        except ValueError:
            logger.warning("%s: %r is no valid pattern; it does not count", origin, line)
        else:
            good.append(line)
    return GitIgnoreSpec.from_lines(good)


def display_name(path: str) -> str:
    """A path that can be printed and stored, whatever bytes the file system has in it."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def scan(root: Path, settings: IndexSettings, *, index_dir: Path | None = None) -> Scan:
    """Find the files below a root, in order of their paths.

    Args:
        root: A folder or a file, resolved. A file is named on purpose, so no rule leaves it out.
        settings: Its patterns decide with the ignore files.
        index_dir: An index folder that must not be read; others are known by their content.
    """
    found = Scan()
    if not root.is_dir():
        found.files.append(FoundFile(root.name, root))
        return found
    walk = _Walk(root, settings, index_dir, found)
    walk.run()
    found.files.sort(key=lambda file: file.path)
    found.skipped.sort(key=lambda file: file.path)
    return found


class _Walk:
    def __init__(self, root: Path, settings: IndexSettings, index_dir: Path | None, found: Scan) -> None:
        self._root = root
        self._index_dir = str(index_dir) if index_dir is not None else None
        self._include = _patterns(settings.include, "include") if settings.include else None
        self._exclude = _patterns(settings.exclude, "exclude")
        self._found = found
        self._links: list[tuple[str, str]] = []
        self._seen: set[tuple[int, int]] = set()

    def run(self) -> None:
        stack = [(str(self._root), "", _rules_above(self._root))]
        while stack:
            folder, prefix, rules = stack.pop()
            try:
                with os.scandir(folder) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                self._skip(prefix.rstrip("/") or ".", f"cannot be listed: {error.strerror}")
                self._found.unreadable.append(prefix)
                continue
            names = {entry.name for entry in listed}
            if prefix and _is_index_folder(folder, names):
                continue
            rules = rules.entered(folder, names)
            for entry in listed:
                if self._keep(entry, prefix, rules):
                    stack.append((entry.path, f"{prefix}{entry.name}/", rules))
        self._follow_links()

    def _keep(self, entry: os.DirEntry[str], prefix: str, rules: _Rules) -> bool:
        """Note a file; whether the entry is a folder to walk into."""
        path = prefix + entry.name
        try:
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name in _VCS or entry.path == self._index_dir:
                return False
            if rules.ignores(entry.path, entry.name, is_folder) or self._excluded(path, is_folder):
                return False
            if display_name(path) != path:
                self._skip(display_name(path), "its name is not valid UTF-8")
            elif is_folder:
                return True
            elif entry.is_symlink():
                self._links.append((path, entry.path))
            elif not entry.is_file(follow_symlinks=False):
                self._skip(path, "neither a file nor a folder")
            elif is_binary_name(entry.name):
                self._skip(path, "not text")
            else:
                info = entry.stat(follow_symlinks=False)
                self._seen.add((info.st_dev, info.st_ino))
                self._found.files.append(FoundFile(path, Path(entry.path)))
        except OSError as error:
            self._skip(display_name(path), f"cannot be read: {error.strerror}")
            self._found.unreadable.append(path)
        return False

    def _excluded(self, path: str, is_folder: bool) -> bool:
        asked = f"{path}/" if is_folder else path
        if self._exclude.match_file(asked):
            return True
        if self._include is not None and not is_folder:
            return not self._include.match_file(path)
        return _DEFAULT_EXCLUDE.match_file(asked)

    def _follow_links(self) -> None:
        """Take in linked files inside the root that the walk did not find under their own name; no other link."""
        for path, location in sorted(self._links):
            try:
                target = Path(location).resolve(strict=True)
                info = target.stat()
            except (OSError, RuntimeError):
                self._skip(path, "a broken symbolic link")
                continue
            if not target.is_relative_to(self._root):
                self._skip(path, "a symbolic link that leaves the indexed folder")
            elif stat.S_ISREG(info.st_mode) and (info.st_dev, info.st_ino) not in self._seen:
                if is_binary_name(target.name) or _VCS.intersection(target.parts[len(self._root.parts) :]):
                    continue
                self._seen.add((info.st_dev, info.st_ino))
                self._found.files.append(FoundFile(path, target))

    def _skip(self, path: str, reason: str) -> None:
        self._found.skipped.append(SkippedFile(path, reason))


def _is_index_folder(folder: str, names: set[str]) -> bool:
    """Whether a folder is an index of ours (under any name) or a Chroma folder; neither holds documents."""
    if "chroma.sqlite3" in names:
        return True
    if INDEX_FILE not in names:
        return False
    try:
        with open(os.path.join(folder, INDEX_FILE), "rb") as file:
            return b"epic-rag-index" in file.read(400)
    except OSError:
        return False


def _rules_above(root: Path) -> _Rules:
    """The ignore files between the top of the repository that a root lies in, and the root."""
    above: list[Path] = []
    for folder in (root, *root.parents):
        if folder != root:
            above.append(folder)
        if (folder / ".git").exists():
            break
    else:
        return _Rules()
    rules = _Rules()
    for folder in reversed(above):
        names = [name for name in (_GIT_IGNORE, _EPIC_IGNORE) if (folder / name).is_file()]
        rules = rules.entered(str(folder), names)
        below = [root, *root.parents]
        child = below[below.index(folder) - 1]
        if _decide(rules.epic, str(child), True) or _decide(rules.git, str(child), True):
            # The root itself is ignored, and yet asked for by name: then only the rules inside it hold.
            return _Rules()
    return rules
