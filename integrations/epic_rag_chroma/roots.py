"""The folders and files that an index covers, kept relative to the index folder so that all can move together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from epic_rag.errors import DataError
from epic_rag_chroma.files import Scan, scan
from epic_rag_chroma.manifest import DocumentKey
from epic_rag_chroma.types import IndexSettings, SkippedFile

__all__ = ["ScannedRoots", "existing", "merge", "relative", "scan_roots", "where"]


def existing(path: str | os.PathLike[str]) -> Path:
    """A path with its links resolved.

    Raises:
        DataError: If there is nothing.
    """
    resolved = Path(path).resolve()
    if not resolved.exists():
        raise DataError(f"no such file or folder: {os.fspath(path)}; check the path and run `epic-rag index` again")
    return resolved


def relative(path: Path, index_dir: Path) -> str:
    """A root as it is kept: relative to the index folder, with slashes; absolute only on another Windows drive."""
    try:
        return os.path.relpath(path, index_dir).replace(os.sep, "/")
    except ValueError:
        return path.as_posix()


def where(root: str, index_dir: Path) -> Path:
    """Where a kept root is now."""
    return Path(os.path.normpath(index_dir / root))


def merge(paths: Sequence[Path], kept: Iterable[str], index_dir: Path) -> list[str]:
    """The roots of an index after paths are added: none lies inside another.

    Raises:
        DataError: If there are none.
    """
    merged: list[Path] = []
    for path in [*(where(root, index_dir) for root in kept), *paths]:
        if any(path.is_relative_to(other) for other in merged):
            continue
        merged = [other for other in merged if not other.is_relative_to(path)] + [path]
    if not merged:
        raise DataError("no path is given and the index has none; run `epic-rag index PATH`")
    return [relative(path, index_dir) for path in merged]


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
