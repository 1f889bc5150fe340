"""File names of an index, and its roots: indexed folders and files, stored relative to the index folder.

Relative roots let the index and the documents move together.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from epic_rag.embedding_model import split_onnx
from epic_rag.errors import DataError

__all__ = [
    "APPLICATION_ID",
    "APPLICATION_ID_AT",
    "BROKEN_FOLDER",
    "CHROMA_FOLDER",
    "DATABASE_FILE",
    "OLD_INDEX_FILE",
    "OLD_INDEX_MARK",
    "REBUILD_FILE",
    "SERVER_FILE",
    "SERVER_LOCK_FILE",
    "VECTORS_FILE",
    "DocumentKey",
    "FileStamp",
    "absolute_source",
    "existing_path",
    "merge_roots",
    "relative_root",
    "root_path",
]

DATABASE_FILE = "index.sqlite"
"""The index."""
APPLICATION_ID, APPLICATION_ID_AT = b"EPIC", slice(68, 72)
"""Application id in SQLite's header, and its place there."""
OLD_INDEX_FILE, OLD_INDEX_MARK = "index.json", b"epic-rag-index"
"""File of an index of format 2, and what its first 400 bytes contain; other programs use the name as well."""
REBUILD_FILE = "rebuild.sqlite"
"""An index that is being rebuilt beside the current one."""
VECTORS_FILE = "vectors.bin"
"""Copy of the index's vectors that readers map into memory."""
SERVER_FILE, SERVER_LOCK_FILE = "server.json", "server.lock"
"""Address of a server that answers queries of the index, and the lock that it holds as long as it lives."""
CHROMA_FOLDER = "chroma"
"""The Chroma mirror."""
BROKEN_FOLDER = "chroma.broken"
"""A Chroma folder that could not be opened."""

DocumentKey = tuple[str, str]
"""The root's path relative to the index folder, and the file's path relative to the root, both with slashes."""


@dataclass(frozen=True)
class FileStamp:
    """Stat data of a file. As in git, equal stamps of old enough files mean equal content."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, info: os.stat_result) -> FileStamp:
        """Return the stamp of a stat result."""
        return cls(info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)


def existing_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with its links resolved.

    Raises:
        DataError: If it does not exist.
    """
    resolved = Path(path).resolve()
    if not resolved.exists():
        raise DataError(f"No such file or folder: {os.fspath(path)}. Check the path.")
    return resolved


def relative_root(path: Path, index_dir: Path) -> str:
    """Return a root as it is stored: relative to the index folder, with slashes; absolute only on another drive."""
    try:
        return os.path.relpath(path, index_dir).replace(os.sep, "/")
    except ValueError:
        return path.as_posix()


def root_path(root: str, index_dir: Path) -> Path:
    """Return the current path of a stored root."""
    return Path(os.path.normpath(index_dir / root))


def merge_roots(paths: Sequence[Path], kept: Iterable[str], index_dir: Path, removed: Sequence[Path] = ()) -> list[str]:
    """Return the stored roots of an index after paths are added and removed, without those inside another root.

    Args:
        paths: Folders and files to add.
        kept: The stored roots.
        index_dir: The index folder.
        removed: Roots to remove, or folders of roots; need not exist.

    Raises:
        DataError: If there are none, or a removed path is not a root.
    """
    roots = [root_path(root, index_dir) for root in kept]
    for path in removed:
        if outer := next((root for root in [*roots, *paths] if path != root and path.is_relative_to(root)), None):
            raise DataError(
                f"{path} is inside {outer}, which stays in the index. Leave it out with "
                f"--exclude {shlex.quote('/' + path.relative_to(outer).as_posix())}, or with a line in .epicignore."
            )
        if path in paths:
            raise DataError(f"{path} is to be added and to be removed. Name it once.")
        if not any(root.is_relative_to(path) for root in roots):
            shown = ", ".join(map(str, roots)) or "nothing"
            raise DataError(f"{path} is not in the index. It holds {shown}.")
    roots = [root for root in roots if not any(root.is_relative_to(path) for path in removed)]
    if removed and not roots and not paths:
        raise DataError(
            f"The index would be empty. Run `epic-rag clear --index-dir {shlex.quote(str(index_dir))}` to delete it."
        )
    merged: list[Path] = []
    for path in [*roots, *paths]:
        if any(path.is_relative_to(other) for other in merged):
            continue
        merged = [other for other in merged if not other.is_relative_to(path)] + [path]
    if not merged:
        raise DataError("No path is given and the index has none. Run `epic-rag index PATH`.")
    return [relative_root(path, index_dir) for path in merged]


def absolute_source(source: str | os.PathLike[str]) -> str:
    """Return a checkpoint's name unchanged, a checkpoint's folder as an absolute path."""
    text = os.fspath(source)
    onnx = split_onnx(text)
    if onnx is not None and os.path.isdir(onnx[0]):
        return f"onnx:{os.path.abspath(onnx[0])}" + ("" if onnx[1] is None else f"@{onnx[1]}")
    return os.path.abspath(text) if os.path.isdir(text) else text
