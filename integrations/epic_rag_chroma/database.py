"""The SQLite files beside Chroma's: one for each collection, in write-ahead mode, opened to write or to read.

A reader sees the last commit, and neither waits for the writer nor makes it wait.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

__all__ = ["FEW", "delete_database", "delete_others", "file_of", "is_broken", "open_reading", "open_writing"]

logger = logging.getLogger(__name__)

# SQLite before 3.32 takes no more variables than 999.
FEW = 900
_SUFFIX = ".sqlite"
# What SQLite keeps beside a database that is open.
_COMPANIONS = ("", "-wal", "-shm", "-journal")
_BUSY_SECONDS = 30.0

Check = Callable[[sqlite3.Connection], object]


def file_of(index_dir: Path, kind: str, collection_id: str) -> Path:
    """The file of a kind ("records", "keywords") for a collection."""
    return index_dir / f"{kind}-{collection_id}{_SUFFIX}"


def open_writing(path: Path, make: Check, check: Check) -> sqlite3.Connection:
    """Open a database to write to; made empty if it is missing or broken.

    Args:
        path: The file.
        make: Makes the tables where there are none.
        check: Raises sqlite3.DatabaseError if the database is not one that this version reads.

    Raises:
        OSError, sqlite3.Error: If it can be neither read nor replaced.
    """
    try:
        return _opened(path, make, check)
    except sqlite3.DatabaseError as error:
        if not is_broken(error):
            raise  # locked, read-only or a full disk: nothing that a new file would mend
        logger.info("%s is made anew: %s", path, error)
        delete_database(path)
        return _opened(path, make, check)


def _opened(path: Path, make: Check, check: Check) -> sqlite3.Connection:
    connection = _connect(str(path))
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        make(connection)
        check(connection)
        # Pages that are torn or were written over: about a second for 100,000 chunks.
        said = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if said != "ok":
            raise sqlite3.DatabaseError(said)
    except BaseException:
        connection.close()
        raise
    return connection


def open_reading(path: Path, check: Check) -> sqlite3.Connection:
    """Open a database to read. Writes nothing, and works in a folder that is read-only.

    Args:
        path: The file, which must be there.
        check: See `open_writing`.

    Raises:
        sqlite3.Error: If it cannot be read.
    """
    uri = f"file:{quote(str(path))}?mode=ro"
    try:
        return _checked(uri, check)
    except sqlite3.Error:
        # Write-ahead mode needs a file for shared memory. Where none can be made nobody writes, either.
        if _has_content(path.with_name(path.name + "-wal")):
            raise
    return _checked(f"{uri}&immutable=1", check)


def _checked(uri: str, check: Check) -> sqlite3.Connection:
    connection = _connect(uri, uri=True)
    try:
        check(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(name: str, *, uri: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(name, uri=uri, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)


def delete_database(path: Path) -> None:
    """Delete a database with what SQLite keeps beside it."""
    for companion in _COMPANIONS:
        path.with_name(path.name + companion).unlink(missing_ok=True)


def delete_others(index_dir: Path, kind: str, collection_id: str | None) -> None:
    """Delete the files of a kind of all other collections; of all with None."""
    keep = None if collection_id is None else file_of(index_dir, kind, collection_id)
    for path in index_dir.glob(f"{kind}-*{_SUFFIX}"):
        if path != keep:
            with suppress(PermissionError):  # open in a query on Windows: it goes after the next run
                delete_database(path)


def is_broken(error: sqlite3.Error) -> bool:
    """Whether an error means that the file's content is wrong, and not that it cannot be reached now."""
    return not isinstance(error, sqlite3.OperationalError) or "no such" in str(error)


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False
