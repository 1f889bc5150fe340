"""Walk the indexed folders and collect the files to index.

Precedence of the rules: folders of version control are never read; an .epicignore takes precedence over a .gitignore,
a deeper file over a higher one; hidden names are skipped unless an .epicignore re-includes them (`!name`); then the
settings `exclude` and `include` decide, or the built-in rules for files that nobody searches (lock files, minified
code, backup files), which are reported as skipped.

The walk opens only ignore files: entries are judged by their name and stat result. Symbolic links are followed last,
when all regular files inside the root are known, so that no file is indexed twice and no loop is entered. `scan` walks
one root, `scan_roots` all roots of an index; `read_file` reads a file that a walk found.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from epic_rag_chroma.reading.document import NotTextError
from epic_rag_chroma.reading.file_types import byte_limit, unread_format
from epic_rag_chroma.store.paths import (
    APPLICATION_ID,
    APPLICATION_ID_AT,
    DATABASE_FILE,
    OLD_INDEX_FILE,
    OLD_INDEX_MARK,
    DocumentKey,
    FileStamp,
    relative_root,
    root_path,
)
from epic_rag_chroma.types import IndexSettings, SkippedFile
from epic_rag_chroma.walk.generated import generated_format, is_left_out_folder, left_out
from epic_rag_chroma.walk.ignore import IgnorePatterns, IgnoreRules
from epic_rag_chroma.walk.safe_read import NotRegularError, TooLargeError, read_regular

__all__ = ["FoundFile", "Scan", "ScannedRoots", "display_name", "read_file", "scan", "scan_roots"]

_INDEX_MARK_WITHIN = 400
_VERSION_CONTROL = frozenset({".git", ".hg", ".svn", ".bzr", ".jj", "_darcs", "CVS"})


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file to index.

    Args:
        path: Relative to the root, with slashes.
        location: With links resolved.
        named: Whether it was named, as a root or by an `include` pattern; then no content excludes it.
    """

    path: str
    location: Path
    named: bool = False


@dataclass
class Scan:
    """Result of a walk, with paths relative to the root; the files below `unreadable` folders are unknown."""

    files: list[FoundFile] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def display_name(path: str) -> str:
    """Return a path that can be printed and stored, with undecodable bytes escaped."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_file(file: FoundFile) -> tuple[bytes, FileStamp]:
    """Read a file that a walk found, which may have been replaced since.

    Raises:
        NotTextError: If it is larger than its file type allows, generated and not named, or no longer a regular file.
        OSError: If it cannot be read.
    """
    limit = byte_limit(file.path)
    try:
        data, info = read_regular(file.location, limit)
    except NotRegularError as error:
        raise NotTextError(str(error.strerror)) from error
    except TooLargeError as error:
        raise NotTextError(f"larger than {limit // 2**20} MiB") from error
    reason = "" if file.named else generated_format(file.path, data)
    if reason:
        raise NotTextError(f"{reason}; --include reads it")
    return data, FileStamp.of(info)


def scan(root: Path, settings: IndexSettings, *, index_dir: Path | None = None, elsewhere: Sequence[Path] = ()) -> Scan:
    """Find the files below a root, sorted by path.

    Args:
        root: A folder or a file, resolved. A file was named by the user, so no rule excludes it.
        settings: Its patterns apply after the ignore files; `follow_links` lets links leave the root.
        index_dir: The index folder, which is not read; other index folders are recognised by their content.
        elsewhere: Other roots of the index; links into them are skipped, because their files are found there.
    """
    result = Scan()
    if not root.is_dir():
        result.files.append(FoundFile(root.name, root, named=True))
        return result
    _Walk(root, settings, index_dir, elsewhere, result).run()
    result.files.sort(key=lambda file: file.path)
    result.skipped.sort(key=lambda file: file.path)
    return result


def _is_index_folder(folder: str) -> bool:
    """Return whether a folder is an index (under any name) or a Chroma folder, neither of which holds documents."""
    if os.path.lexists(os.path.join(folder, "chroma.sqlite3")):
        return True
    for name in (DATABASE_FILE, OLD_INDEX_FILE):
        try:
            head = read_regular(os.path.join(folder, name), _INDEX_MARK_WITHIN, whole=False)[0]
        except OSError:
            continue
        if head[APPLICATION_ID_AT] == APPLICATION_ID or OLD_INDEX_MARK in head:
            return True
    return False


class _Walk:
    def __init__(
        self, root: Path, settings: IndexSettings, index_dir: Path | None, elsewhere: Sequence[Path], result: Scan
    ) -> None:
        self._root = root
        self._index_dir = str(index_dir) if index_dir is not None else None
        self._elsewhere = [other for other in elsewhere if other != root]
        self._follow_links = settings.follow_links
        self._include = IgnorePatterns(settings.include, "include") if settings.include else None
        # A folder that nobody reads is entered if a pattern names it.
        self._included_folders = {part for pattern in settings.include for part in pattern.split("/")}
        self._exclude = IgnorePatterns(settings.exclude, "exclude") if settings.exclude else None
        self._result = result
        # Links to follow after the walk: path, location, and the rules of the folder.
        self._links: list[tuple[str, str, IgnoreRules]] = []
        self._visited: set[tuple[int, int]] = set()

    def run(self) -> None:
        self._walk(str(self._root), "", IgnoreRules.above_root(self._root))
        if not self._links:
            return
        known = {str(file.location) for file in self._result.files}
        while self._links:
            links, self._links = sorted(self._links, key=lambda link: link[0]), []
            for path, location, rules in links:
                start = len(self._result.files)
                try:
                    self._follow(path, Path(location).resolve(strict=True), rules)
                except (OSError, RuntimeError):  # before Python 3.13, resolving a loop raises RuntimeError
                    self._skip(path, "a broken symbolic link")
                # A file that is reachable in two ways is indexed under the name that was found first.
                new = [file for file in self._result.files[start:] if str(file.location) not in known]
                self._result.files[start:] = new
                known.update(str(file.location) for file in new)

    def _walk(self, top: str, prefix: str, rules: IgnoreRules) -> None:
        stack = [(top, prefix, rules)]
        while stack:
            folder, prefix, rules = stack.pop()
            try:
                info = os.stat(folder)
                with os.scandir(folder) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                self._skip(prefix.rstrip("/") or ".", f"cannot be listed: {error.strerror}")
                self._result.unreadable.append(prefix)
                continue
            if (info.st_dev, info.st_ino) in self._visited:
                continue
            self._visited.add((info.st_dev, info.st_ino))
            names = {entry.name for entry in listed}
            marks = (DATABASE_FILE, OLD_INDEX_FILE, "chroma.sqlite3")
            if prefix and not names.isdisjoint(marks) and _is_index_folder(folder):
                continue
            name = os.path.basename(folder)
            reason = is_left_out_folder(name, names) if prefix and name not in self._included_folders else ""
            if reason:
                self._skip(prefix.rstrip("/"), f"{reason}; --include reads it")
                continue
            rules = rules.enter(folder, names, skip=len(prefix))
            for entry in listed:
                if self._visit(entry, prefix, rules):
                    stack.append((entry.path, f"{prefix}{entry.name}/", rules))

    def _visit(self, entry: os.DirEntry[str], prefix: str, rules: IgnoreRules) -> bool:
        """Record a file or link; return True for a folder to walk into."""
        path = prefix + entry.name
        try:
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name in _VERSION_CONTROL or entry.path == self._index_dir:
                return False
            if self._excludes(path, is_folder, rules):
                return False
            if display_name(path) != path:
                self._skip(display_name(path), "its name is not valid UTF-8")
            elif is_folder:
                return True
            elif entry.is_symlink():
                self._links.append((path, entry.path, rules))
            elif not entry.is_file(follow_symlinks=False):
                self._skip(path, "neither a file nor a folder")
            elif unread_format(entry.name):
                self._skip(path, f"not text: {unread_format(entry.name)}")
            else:
                self._result.files.append(FoundFile(path, Path(entry.path), named=self._include is not None))
        except OSError as error:
            self._skip(display_name(path), f"cannot be read: {error.strerror}")
            self._result.unreadable.append(path)
        return False

    def _follow(self, path: str, target: Path, rules: IgnoreRules) -> None:
        """Add the target of a link, unless a walk finds it under another name or it may not be read."""
        info = target.stat()
        if any(target.is_relative_to(other) for other in self._elsewhere):
            return
        inside = target.is_relative_to(self._root)
        if not inside and not self._follow_links:
            self._skip(path, "a symbolic link that leaves the indexed folder")
        elif _VERSION_CONTROL.intersection(target.parts[len(self._root.parts) :] if inside else target.parts):
            return
        elif stat.S_ISDIR(info.st_mode):
            is_index = str(target) == self._index_dir or _is_index_folder(str(target))
            if self._follow_links and not is_index and not self._excludes(path, True, rules):
                self._walk(str(target), f"{path}/", rules)
        elif not stat.S_ISREG(info.st_mode):
            self._skip(path, "a symbolic link to neither a file nor a folder")
        elif not unread_format(target.name):
            self._result.files.append(FoundFile(path, target, named=self._include is not None))

    def _excludes(self, path: str, is_folder: bool, rules: IgnoreRules) -> bool:
        """Return whether ignore files, settings or built-in rules exclude a path; its folders were checked before."""
        if rules.ignores(path, path.rpartition("/")[2], is_folder):
            return True
        if self._exclude is not None and self._exclude.decide(path, is_folder):
            return True
        if self._include is not None and not is_folder:
            return not self._include.selects(path)
        name = path.rpartition("/")[2]
        reason = "" if name in self._included_folders else left_out(path, is_folder)
        if reason and reason != "compiled code":
            self._skip(path, f"{reason}; --include reads it")
        return bool(reason)

    def _skip(self, path: str, reason: str) -> None:
        self._result.skipped.append(SkippedFile(path, reason))


@dataclass
class ScannedRoots:
    """Result of walking all roots of an index.

    Args:
        scans: By the folder that paths are relative to: the root, or the parent folder of a root that is a file.
        roots: The roots, without files that were deleted.
        missing: Folders that do not exist now (an unmounted drive, perhaps); their chunks stay in the index.
        skipped: One entry for each missing folder.
    """

    scans: dict[str, Scan] = field(default_factory=dict)
    roots: list[str] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)
    skipped: list[SkippedFile] = field(default_factory=list)


def scan_roots(
    roots: Iterable[str], indexed: Iterable[DocumentKey], settings: IndexSettings, index_dir: Path
) -> ScannedRoots:
    """Walk all roots of an index.

    Args:
        roots: Relative to the index folder.
        indexed: The files that are in the index.
        settings: The index's settings.
        index_dir: The index folder.
    """
    result = ScannedRoots()
    indexed_files = set(indexed)
    roots = list(roots)
    locations = [root_path(root, index_dir) for root in roots]
    for root, location in zip(roots, locations, strict=True):
        folder = str(PurePosixPath(root).parent) if root != ".." else ""
        if location.exists():
            base = root if location.is_dir() else relative_root(location.parent, index_dir)
            found = scan(location, settings, index_dir=index_dir, elsewhere=locations)
        elif location.parent.is_dir() and (folder, location.name) in indexed_files:
            result.scans.setdefault(folder, Scan())  # a file that was deleted
            continue
        else:
            result.roots.append(root)
            # The chunks of a file are stored under its folder.
            result.missing.add(folder if (folder, location.name) in indexed_files else root)
            result.skipped.append(SkippedFile(str(location), "the folder is missing. Its chunks stay in the index."))
            continue
        result.roots.append(root)
        merged = result.scans.setdefault(base, Scan())
        merged.files += found.files
        merged.skipped += found.skipped
        merged.unreadable += found.unreadable
    return result
