"""The index folder: making it, telling it from other folders, and taking it away without touching anything else."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from epic_rag_chroma.errors import IndexStateError
from epic_rag_chroma.store.lock import HOLDER_FILE, LOCK_FILE
from epic_rag_chroma.store.paths import CHROMA_FOLDER, CHROMA_LOCK_FILE, INDEX_FILE, MANIFEST_FILE, RUNNING_FILE

__all__ = [
    "BROKEN_FOLDER",
    "CHROMA_FOLDER",
    "TRUSTED_VARIABLE",
    "check_owner",
    "delete_index",
    "file_versions",
    "folder_size",
    "index_folder",
    "is_safe_relative_path",
    "remove_if_empty",
]


BROKEN_FOLDER = "chroma.broken"
# Index folders whose owner is somebody else and trusted, as in PATH.
TRUSTED_VARIABLE = "EPIC_RAG_TRUSTED_INDEX"
_IGNORE_FILE = ".gitignore"
# What an index consists of, running.json after the rows and index.json last: as long as it is there, deleting can be
# repeated.
_OWN_FOLDERS = (CHROMA_FOLDER, BROKEN_FOLDER)
_OWN_PATTERNS = (
    "records-*.sqlite",
    "records-*.sqlite-*",
    "keywords-*.sqlite",
    "keywords-*.sqlite-*",
    ".*.json-*",  # what a killed process left of an atomic write
    "running.next",
    MANIFEST_FILE,
    _IGNORE_FILE,
    HOLDER_FILE,
    RUNNING_FILE,
    INDEX_FILE,
)
_LOCKS = (LOCK_FILE, CHROMA_LOCK_FILE)


@contextmanager
def index_folder(folder: Path) -> Iterator[None]:
    """Make the index folder; take it away again if nothing came of it.

    Raises:
        IndexStateError: If it holds something else, or belongs to somebody else.
    """
    if folder.is_dir():
        check_owner(folder)
        if not (folder / INDEX_FILE).is_file():
            # Rows lie in nobody else's folder: an index that has lost its index.json is made anew.
            known = _OWN_FOLDERS if any(folder.glob("records-*.sqlite")) else ()
            others = sorted(path.name for path in folder.iterdir() if not _is_own(path.name) and path.name not in known)
            if others:
                raise IndexStateError(
                    f"{folder} holds {others[0]} and no {INDEX_FILE}, so it is no index; run `epic-rag index` with "
                    "another --index-dir"
                )
    elif folder.exists():
        raise IndexStateError(
            f"{folder} is a file, an index is a folder; run `epic-rag index` with another --index-dir"
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
            _delete_files(folder)
            remove_if_empty(folder)
        raise


def _is_own(name: str) -> bool:
    return name in _LOCKS or any(fnmatchcase(name, pattern) for pattern in _OWN_PATTERNS)


def check_owner(folder: Path) -> None:
    """Refuse an index that somebody else could have made, or could change while it is read.

    What lies in it decides which model is loaded, which files a hit names and which rows are shown.

    Raises:
        IndexStateError: If the folder, or what it is made of, belongs to another user (root's are taken, and root takes
            everybody's), or may be written by everybody.
    """
    if not hasattr(os, "geteuid") or _is_trusted(folder):
        return
    for path in (folder, *(folder / name for name in (INDEX_FILE, MANIFEST_FILE, RUNNING_FILE, CHROMA_FOLDER))):
        try:
            info = path.stat()
        except OSError:
            continue
        me = os.geteuid()
        shown = shlex.quote(str(path))
        if info.st_uid not in (me, 0) and me != 0:
            raise IndexStateError(
                f"{path} belongs to user {_user(info.st_uid)} and you are {_user(me)}, so it could be made to mislead "
                f"you; if you trust that user, set {TRUSTED_VARIABLE}={shlex.quote(str(folder))}, or make an index of "
                "your own with `epic-rag index --index-dir`"
            )
        if info.st_mode & stat.S_IWOTH:
            raise IndexStateError(
                f"every user may write to {path} (mode {stat.S_IMODE(info.st_mode):o}), so it could be made to mislead "
                f"you; run `chmod o-w {shown}` if its content is yours, or set {TRUSTED_VARIABLE}="
                f"{shlex.quote(str(folder))}"
            )


def _is_trusted(folder: Path) -> bool:
    trusted = os.environ.get(TRUSTED_VARIABLE, "").split(os.pathsep)
    return any(each and (each == "*" or Path(each).resolve() == folder) for each in trusted)


def _user(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def is_safe_relative_path(path: str) -> bool:
    """Whether a path of the index, relative to a root, stays below it."""
    return bool(path) and "\0" not in path and not os.path.isabs(path) and ".." not in path.split("/")


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing but locks."""
    for name in _LOCKS:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def file_versions(folder: Path) -> tuple[object, ...]:
    """Changes whenever a run has begun to write, and whenever one has ended."""
    seen: list[object] = [(folder / RUNNING_FILE).exists()]
    for name in (INDEX_FILE, MANIFEST_FILE):
        try:
            info = (folder / name).stat()
            seen.append((info.st_ino, info.st_mtime_ns, info.st_size))
        except OSError:
            seen.append(None)
    return tuple(seen)


def delete_index(folder: Path) -> None:
    """Delete what an index consists of, and nothing else that lies in the folder."""
    for name in _OWN_FOLDERS:
        path = folder / name
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
    _delete_files(folder)


def _delete_files(folder: Path) -> None:
    for pattern in _OWN_PATTERNS:
        for path in sorted(folder.glob(pattern)):
            if path.is_symlink() or not path.is_dir():  # a folder in a file's place is nobody we know
                path.unlink(missing_ok=True)


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total
