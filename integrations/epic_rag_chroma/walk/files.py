"""Which changes of the file system can change an index: the walk's rules, asked about one path at a time."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec

from epic_rag_chroma.reading.reader import NotTextError, byte_limit, is_binary_name
from epic_rag_chroma.store.paths import INDEX_FILE, DocumentKey, FileStamp, relative, where
from epic_rag_chroma.types import IndexSettings, SkippedFile
from epic_rag_chroma.walk.ignore import (
    EPIC_IGNORE,
    GIT_IGNORE,
    GitPatterns,
    NotRegularError,
    Rules,
    TooLargeError,
    read_regular,
)

__all__ = [
    "ChangeFilter",
    "FoundFile",
    "NamePatterns",
    "Scan",
    "ScannedRoots",
    "display_name",
    "is_index_folder",
    "is_version_control",
    "read_file",
    "scan",
    "scan_roots",
]


# --- from files
# Which files an index is made of: the walk through a folder, and the rules that leave files out.
#
# In order of strength: version control's own folders are never read; `.epicignore` decides before `.gitignore`, a deeper
# file before a higher one; names that begin with a dot are left out unless an `.epicignore` says `!name`; then the
# patterns `exclude`, `include` and the built-in ones for files that nobody searches (lock files, minified code, what
# editors leave behind).
#
# Nothing is opened here but ignore files: a name is judged by what the file system says of it. Links are looked at last,
# when every file that has a name of its own inside is known, so that none is read twice and no loop is entered.

logger = logging.getLogger(__name__)

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


# What vim writes to see whether it may write.
_PROBES = frozenset({"4913"})


class ChangeFilter:
    """Says of a path that has changed (or is gone) whether a walk may now find something else.

    What an index folder or version control writes, ignored files, binaries and what editors leave behind for a moment
    does not count. When in doubt, a change counts.

    Args:
        roots: The folders and files of the index, resolved.
        settings: The index's settings.
        index_dir: The index folder.
    """

    def __init__(self, roots: Sequence[Path], settings: IndexSettings, index_dir: Path) -> None:
        self._roots = [(str(root), root.is_dir()) for root in roots]
        self._patterns = NamePatterns(settings)
        self._index_dir = str(index_dir)
        self._rules: dict[str, Rules | None] = {}

    def refresh(self) -> None:
        """Forget the ignore files that were read; they may have changed."""
        self._rules.clear()

    def __call__(self, location: str) -> bool:
        """Whether a change of `location` counts."""
        if _below(location, self._index_dir) is not None:
            return False
        for root, is_folder in self._roots:
            path = _below(location, root)
            if path is not None:
                return not path or not is_folder or self._counts(root, path)
        return False

    def _counts(self, root: str, path: str) -> bool:
        rules = self._inside(root, "", Rules.above(Path(root)))
        folder = ""
        *parents, name = path.split("/")
        for parent in parents:
            if rules is None or self._left_out(rules, folder + parent, parent, True):
                return False
            folder = f"{folder}{parent}/"
            rules = self._inside(root, folder, rules)
        if rules is None or name in _PROBES:
            return False
        if name in (GIT_IGNORE, EPIC_IGNORE):
            return True
        if os.path.isdir(os.path.join(root, path)):
            return not self._left_out(rules, path, name, True)
        # What is gone may have been a folder.
        gone = not os.path.lexists(os.path.join(root, path))
        as_file = not self._left_out(rules, path, name, False) and not is_binary_name(name)
        return as_file or (gone and not self._left_out(rules, path, name, True))

    def _left_out(self, rules: Rules, path: str, name: str, is_folder: bool) -> bool:
        return (
            is_version_control(name)
            or display_name(path) != path
            or rules.ignores(path, name, is_folder)
            or self._patterns.exclude(path, is_folder)
        )

    def _inside(self, root: str, prefix: str, rules: Rules) -> Rules | None:
        """The rules in a folder; None if nothing in it counts."""
        folder = os.path.join(root, prefix)
        if folder not in self._rules:
            if prefix and is_index_folder(folder):
                self._rules[folder] = None
            else:
                names = [name for name in (GIT_IGNORE, EPIC_IGNORE) if os.path.lexists(os.path.join(folder, name))]
                self._rules[folder] = rules.entered(folder, prefix, names)
        return self._rules[folder]


def _below(location: str, folder: str) -> str | None:
    """The path of `location` relative to a folder, with slashes; "" for the folder, None if it is elsewhere."""
    if location == folder:
        return ""
    start = folder.rstrip(os.sep) + os.sep
    return location[len(start) :].replace(os.sep, "/") if location.startswith(start) else None


@dataclass
class ScannedRoots:
    """What there is below all roots.

    Args:
        scans: By the folder that paths are relative to: the root, or the folder of a root that is a file.
        roots: The roots, without files that are gone.
        absent: Folders whose content cannot be known now (an unmounted drive, perhaps), which is not to be gone.
        skipped: A note for each of those.
    """

    scans: dict[str, Scan] = field(default_factory=dict)
    roots: list[str] = field(default_factory=list)
    absent: set[str] = field(default_factory=set)
    skipped: list[SkippedFile] = field(default_factory=list)


def scan_roots(
    roots: Iterable[str], known: Iterable[DocumentKey], settings: IndexSettings, index_dir: Path
) -> ScannedRoots:
    """Walk through all roots.

    Args:
        roots: As kept.
        known: The files that are in the index.
        settings: Which files count.
        index_dir: The index folder.
    """
    result = ScannedRoots()
    known_files = set(known)
    roots = list(roots)
    places = [where(root, index_dir) for root in roots]
    for root in roots:
        path = where(root, index_dir)
        folder = str(PurePosixPath(root).parent) if root != ".." else ""
        if path.exists():
            base = root if path.is_dir() else relative(path.parent, index_dir)
            found = scan(path, settings, index_dir=index_dir, elsewhere=places)
        elif path.parent.is_dir() and (folder, path.name) in known_files:
            result.scans.setdefault(folder, Scan())  # a file that is gone
            continue
        else:
            result.roots.append(root)
            result.absent.add(root)
            result.skipped.append(SkippedFile(str(path), "the folder is gone; what was indexed of it stays"))
            continue
        result.roots.append(root)
        together = result.scans.setdefault(base, Scan())
        together.files += found.files
        together.skipped += found.skipped
        together.unreadable += found.unreadable
    return result
