"""Index folder: create it, check who owns it, and delete its files without touching others."""

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
from epic_rag_chroma.store.database import is_foreign
from epic_rag_chroma.store.lock import CHROMA_LOCK_FILE, HOLDER_FILE, LOCK_FILE
from epic_rag_chroma.store.migration import OLD_PATTERNS, is_old_index
from epic_rag_chroma.store.paths import (
    BROKEN_FOLDER,
    CHROMA_FOLDER,
    DATABASE_FILE,
    OLD_INDEX_FILE,
    REBUILD_FILE,
    SERVER_FILE,
    SERVER_LOCK_FILE,
    VECTORS_FILE,
)

__all__ = [
    "TRUSTED_VARIABLE",
    "check_owner",
    "delete_index",
    "folder_size",
    "index_folder",
    "is_index",
    "is_safe_relative_path",
    "remove_if_empty",
]


TRUSTED_VARIABLE = "EPIC_RAG_TRUSTED_INDEX"
"""Environment variable with trusted index folders of other users, separated as in PATH."""

_IGNORE_FILE = ".gitignore"
_IGNORE_TEXT = "# created by epic-rag: keeps the index out of version control\n*\n"
# All files of an index. The database comes last: an interrupted deletion can be repeated.
_OWN_FOLDERS = (CHROMA_FOLDER, BROKEN_FOLDER)
_OWN_PATTERNS = (
    *OLD_PATTERNS,
    f".{VECTORS_FILE}-*",  # left by a process that was killed while it wrote
    VECTORS_FILE,
    f"{REBUILD_FILE}*",
    _IGNORE_FILE,
    HOLDER_FILE,
    SERVER_FILE,
    f"{DATABASE_FILE}-*",
    DATABASE_FILE,
    OLD_INDEX_FILE,
)
_LOCKS = (LOCK_FILE, CHROMA_LOCK_FILE, SERVER_LOCK_FILE)


def is_index(folder: Path) -> bool:
    """Return whether a folder holds an index, of this format or the old one; damaged ones count."""
    path = folder / DATABASE_FILE
    return (path.is_file() and not is_foreign(path)) or is_old_index(folder)


@contextmanager
def index_folder(folder: Path) -> Iterator[None]:
    """Create the index folder; delete it again if the block fails before there is an index.

    Raises:
        IndexStateError: If the folder contains something else, or belongs to another user.
    """
    if folder.is_dir():
        check_owner(folder)
        if not is_index(folder):
            # A folder with our ignore file is an index that has lost its database.
            known = _OWN_FOLDERS if _has_own_ignore_file(folder) else ()
            others = sorted(path.name for path in folder.iterdir() if path.name not in known and not _is_own(path.name))
            if others:
                raise IndexStateError(
                    f"{folder} contains {others[0]} and no {DATABASE_FILE}, so it is not an index. "
                    "Run `epic-rag index` with another --index-dir."
                )
    elif folder.exists():
        raise IndexStateError(
            f"{folder} is a file, an index is a folder. Run `epic-rag index` with another --index-dir."
        )
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        ignore = folder / _IGNORE_FILE
        if not ignore.exists():
            ignore.write_text(_IGNORE_TEXT, encoding="utf-8")
        yield
    except BaseException:
        if made and not is_index(folder):
            _delete_files(folder)
            remove_if_empty(folder)
        raise


def _has_own_ignore_file(folder: Path) -> bool:
    try:
        return (folder / _IGNORE_FILE).read_text(encoding="utf-8") == _IGNORE_TEXT
    except (OSError, ValueError):
        return False


def _is_own(name: str) -> bool:
    return name in _LOCKS or any(fnmatchcase(name, pattern) for pattern in _OWN_PATTERNS)


def check_owner(folder: Path) -> None:
    """Refuse an index that another user could have made, or could change while it is read.

    Its content decides which model is loaded, which files a hit names and which rows are shown.

    Raises:
        IndexStateError: If the folder or a file in it belongs to another user (except root, who may also read all), or
            is writable by everybody.
    """
    if not hasattr(os, "geteuid") or _is_trusted(folder):
        return
    for path in (folder, *(folder / name for name in (DATABASE_FILE, VECTORS_FILE, CHROMA_FOLDER, OLD_INDEX_FILE))):
        try:
            info = path.stat()
        except OSError:
            continue
        me = os.geteuid()
        shown = shlex.quote(str(path))
        if info.st_uid not in (me, 0) and me != 0:
            raise IndexStateError(
                f"{path} belongs to user {_user(info.st_uid)} and you are {_user(me)}, so its content is not trusted. "
                f"If you trust that user, set {TRUSTED_VARIABLE}={shlex.quote(str(folder))}. Otherwise create another "
                "index with `epic-rag index --index-dir`."
            )
        if info.st_mode & stat.S_IWOTH:
            raise IndexStateError(
                f"Every user may write to {path} (mode {stat.S_IMODE(info.st_mode):o}), so its content is not trusted. "
                f"Run `chmod o-w {shown}` if its content is yours, or set {TRUSTED_VARIABLE}="
                f"{shlex.quote(str(folder))}."
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
    """Return whether a path relative to a root stays below it."""
    return bool(path) and "\0" not in path and not os.path.isabs(path) and ".." not in path.split("/")


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that contains nothing but lock files."""
    for name in _LOCKS:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def delete_index(folder: Path) -> None:
    """Delete the files of an index, and nothing else in the folder."""
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
            if path.is_symlink() or not path.is_dir():  # a folder of that name is not ours
                path.unlink(missing_ok=True)


def folder_size(folder: Path) -> int:
    """Return the total size of all files in a folder in bytes."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total
