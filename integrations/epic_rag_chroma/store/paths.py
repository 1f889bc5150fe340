"""The folders and files that an index covers, kept relative to the index folder so that all can move together."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from epic_rag.errors import DataError

__all__ = [
    "CHROMA_FOLDER",
    "CHROMA_LOCK_FILE",
    "INDEX_FILE",
    "MANIFEST_FILE",
    "RUNNING_FILE",
    "DocumentKey",
    "FileStamp",
    "existing_path",
    "merge_roots",
    "relative_root",
    "root_path",
    "write_atomically",
]

# The root's path relative to the index folder, and the file's relative to the root, both with slashes.
DocumentKey = tuple[str, str]

INDEX_FILE = "index.json"


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


MANIFEST_FILE = "manifest.json"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content so that it is, at every moment and after a crash, all old or all new."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    with suppress(OSError):  # a folder cannot be opened on Windows, where the rename is durable by itself
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


CHROMA_FOLDER = "chroma"

CHROMA_LOCK_FILE = "chroma.lock"

RUNNING_FILE = "running.json"


def existing_path(path: str | os.PathLike[str]) -> Path:
    """A path with its links resolved.

    Raises:
        DataError: If there is nothing.
    """
    resolved = Path(path).resolve()
    if not resolved.exists():
        raise DataError(f"no such file or folder: {os.fspath(path)}; check the path and run `epic-rag index` again")
    return resolved


def relative_root(path: Path, index_dir: Path) -> str:
    """A root as it is kept: relative to the index folder, with slashes; absolute only on another Windows drive."""
    try:
        return os.path.relpath(path, index_dir).replace(os.sep, "/")
    except ValueError:
        return path.as_posix()


def root_path(root: str, index_dir: Path) -> Path:
    """Where a kept root is now."""
    return Path(os.path.normpath(index_dir / root))


def merge_roots(paths: Sequence[Path], kept: Iterable[str], index_dir: Path) -> list[str]:
    """The roots of an index after paths are added: none lies inside another.

    Raises:
        DataError: If there are none.
    """
    merged: list[Path] = []
    for path in [*(root_path(root, index_dir) for root in kept), *paths]:
        if any(path.is_relative_to(other) for other in merged):
            continue
        merged = [other for other in merged if not other.is_relative_to(path)] + [path]
    if not merged:
        raise DataError("no path is given and the index has none; run `epic-rag index PATH`")
    return [relative_root(path, index_dir) for path in merged]
