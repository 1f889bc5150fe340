"""The index folder: making it, telling it from other folders, and taking it away without touching anything else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from epic_rag.errors import IndexStateError
from epic_rag_chroma.lock import HOLDER_FILE, LOCK_FILE
from epic_rag_chroma.manifest import INDEX_FILE, MANIFEST_FILE

__all__ = ["CHROMA_FOLDER", "delete_index", "folder_size", "index_folder", "remove_empty", "versions"]

CHROMA_FOLDER = "chroma"
_IGNORE_FILE = ".gitignore"
# index.json last: as long as it is there, deleting can be repeated.
_OWN_FILES = (MANIFEST_FILE, _IGNORE_FILE, HOLDER_FILE, INDEX_FILE)


@contextmanager
def index_folder(folder: Path) -> Iterator[None]:
    """Make the index folder; take it away again if nothing came of it.

    Raises:
        IndexStateError: If it holds something else.
    """
    if folder.is_dir() and not (folder / INDEX_FILE).is_file():
        others = sorted({path.name for path in folder.iterdir()} - {*_OWN_FILES, LOCK_FILE})
        if others:
            raise IndexStateError(
                f"{folder} holds {others[0]} and no {INDEX_FILE}, so it is no index; run `epic-rag index` with "
                "another --index-dir"
            )
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        ignore = folder / _IGNORE_FILE
        if not ignore.exists():
            ignore.write_text("# made by epic-rag: an index is not for version control\n*\n", encoding="utf-8")
        yield
    except BaseException:
        if made and not (folder / INDEX_FILE).is_file():
            for name in _OWN_FILES:
                (folder / name).unlink(missing_ok=True)
            remove_empty(folder)
        raise


def remove_empty(folder: Path) -> None:
    """Remove a folder that holds nothing but a lock."""
    (folder / LOCK_FILE).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def versions(folder: Path) -> tuple[object, ...]:
    """Changes whenever a run has ended."""
    seen: list[object] = []
    for name in (INDEX_FILE, MANIFEST_FILE):
        try:
            info = (folder / name).stat()
            seen.append((info.st_ino, info.st_mtime_ns, info.st_size))
        except OSError:
            seen.append(None)
    return tuple(seen)


def delete_index(folder: Path) -> None:
    """Delete what an index consists of, and nothing else that lies in the folder."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder / CHROMA_FOLDER)
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total
