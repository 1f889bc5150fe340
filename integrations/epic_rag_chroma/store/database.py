"""SQLite database of an index: its rows (chunks with vectors), and brute-force search over them.

Each collection has its own files, named after its id, so that a rebuild fills new ones. They are in write-ahead mode: a
reader sees the last commit, and neither waits for the writer nor delays it.

Chroma keeps vectors in the files of an HNSW graph, which it overwrites in place; a killed process leaves a graph that
is neither old nor new. Rows are therefore written here in transactions, before Chroma gets them:

* No vector is computed twice: renamed, moved or copied text finds its vector by the hash of the embedded text, and so
  does the run after a crash.
* A corrupt collection is rebuilt without the model.
* While Chroma is being written to and after a crash, queries are answered by `BruteForceIndex`. docs/reliability.md has
  its cost.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from epic_rag_chroma.errors import IndexStateError

__all__ = [
    "MAX_VARIABLES",
    "BruteForceIndex",
    "Record",
    "RecordStore",
    "RecordsUnavailableError",
    "delete_database",
    "delete_others",
    "file_of",
    "is_broken",
    "open_reading",
    "open_writing",
]


logger = logging.getLogger(__name__)

MAX_VARIABLES = 900
"""Ids in a statement: SQLite before 3.32 allows 999 variables."""
_SUFFIX = ".sqlite"
# Suffixes of the files of an open database.
_COMPANIONS = ("", "-wal", "-shm", "-journal")
_BUSY_SECONDS = 30.0

Check = Callable[[sqlite3.Connection], object]


def file_of(index_dir: Path, kind: str, collection_id: str) -> Path:
    """Return the file of a kind ("records", "keywords") for a collection."""
    return index_dir / f"{kind}-{collection_id}{_SUFFIX}"


def open_writing(path: Path, make: Check, check: Check) -> sqlite3.Connection:
    """Open a database for writing; replace it by an empty one if it is missing or broken.

    Args:
        path: The file.
        make: Creates the tables if there are none.
        check: Raises sqlite3.DatabaseError if this version cannot read the database.

    Raises:
        OSError, sqlite3.Error: If it can be neither read nor replaced.
    """
    try:
        return _opened(path, make, check)
    except sqlite3.DatabaseError as error:
        if not is_broken(error):
            raise  # locked, read-only or a full disk, where a new file would not help
        logger.info("Replacing %s: %s", path, error)
        delete_database(path)
        return _opened(path, make, check)


def _opened(path: Path, make: Check, check: Check) -> sqlite3.Connection:
    connection = _connect(str(path))
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        make(connection)
        check(connection)
        # Finds torn and overwritten pages; about one second for 100,000 chunks.
        said = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if said != "ok":
            raise sqlite3.DatabaseError(said)
    except BaseException:
        connection.close()
        raise
    return connection


def open_reading(path: Path, check: Check) -> sqlite3.Connection:
    """Open a database for reading. Writes nothing, and works in a read-only folder.

    Args:
        path: The file; must exist.
        check: See `open_writing`.

    Raises:
        sqlite3.Error: If it cannot be read.
    """
    uri = f"file:{quote(str(path))}?mode=ro"
    try:
        return _checked(uri, check)
    except sqlite3.Error:
        # Write-ahead mode needs a shared-memory file. Where it cannot be created, nobody writes either.
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
    """Delete a database and SQLite's files beside it."""
    for companion in _COMPANIONS:
        path.with_name(path.name + companion).unlink(missing_ok=True)


def delete_others(index_dir: Path, kind: str, collection_id: str | None) -> None:
    """Delete the files of a kind of all other collections; with None, of all collections."""
    keep = None if collection_id is None else file_of(index_dir, kind, collection_id)
    for path in index_dir.glob(f"{kind}-*{_SUFFIX}"):
        if path != keep:
            with suppress(PermissionError):  # open in a query on Windows; the next run deletes it
                delete_database(path)


def is_broken(error: sqlite3.Error) -> bool:
    """Return whether an error means that the file's content is wrong, as opposed to temporarily unreachable."""
    return not isinstance(error, sqlite3.OperationalError) or "no such" in str(error)


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


_RECORDS = "records"
_RECORDS_VERSION = 1
_PAGE = 1000
_RECORDS_SCHEMA = """
CREATE TABLE records (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    doc_id TEXT NOT NULL,
    embedded_hash TEXT NOT NULL,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL,
    vector BLOB NOT NULL
);
CREATE INDEX records_doc_id ON records (doc_id);
CREATE INDEX records_embedded_hash ON records (embedded_hash);
CREATE TABLE spare (embedded_hash TEXT PRIMARY KEY, vector BLOB NOT NULL);
"""

Vector = npt.NDArray[np.float32]
Metadata = Mapping[str, Any]


class RecordsUnavailableError(IndexStateError):
    """The rows are missing or cannot be read."""


@dataclass(frozen=True)
class Record:
    """A row: id, text, metadata as in Chroma (without None), and vector (dim,) float32."""

    id: str
    text: str
    metadata: dict[str, Any]
    vector: Vector


class RecordStore:
    """Rows of one collection.

    Made by `open` for writing or `open_reading`; must be closed. Not thread-safe.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    @classmethod
    def open(cls, index_dir: Path, collection_id: str) -> RecordStore:
        """Open the rows of a collection for writing; start empty if they are missing, broken or of another version.

        Raises:
            IndexStateError: If the file can be neither read nor replaced (permissions, a full disk).
        """
        path = file_of(index_dir, _RECORDS, collection_id)
        try:
            return cls(open_writing(path, _make_records, _check_records), path)
        except (OSError, sqlite3.Error) as error:
            raise _records_unwritable(path, error) from error

    @classmethod
    def open_reading(cls, index_dir: Path, collection_id: str) -> RecordStore:
        """Open the rows of a collection for reading. Writes nothing, and works in a read-only folder.

        Raises:
            RecordsUnavailableError: If they are missing, broken or of another version.
        """
        path = file_of(index_dir, _RECORDS, collection_id)
        if not path.is_file():
            raise _records_unavailable(path, "it is missing")
        try:
            return cls(open_reading(path, _check_records), path)
        except sqlite3.Error as error:
            raise _records_unavailable(path, str(error)) from error

    @staticmethod
    def delete_others(index_dir: Path, collection_id: str | None) -> None:
        """Delete the rows of all other collections; with None, of all collections."""
        delete_others(index_dir, _RECORDS, collection_id)

    def copy_to(self, index_dir: Path, collection_id: str) -> RecordStore:
        """Copy all rows for another collection, and return the copy, open for writing.

        Raises:
            IndexStateError: If it cannot be written.
        """
        path = file_of(index_dir, _RECORDS, collection_id)
        delete_database(path)
        try:
            with sqlite3.connect(path) as target:
                self._connection.backup(target)
            target.close()
        except sqlite3.Error as error:
            raise _records_unwritable(path, error) from error
        return RecordStore.open(index_dir, collection_id)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read everything inside from one snapshot."""
        with self._reading():
            self._connection.execute("BEGIN")
            try:
                self._connection.execute("SELECT 1 FROM records LIMIT 1").fetchone()  # starts the snapshot
                yield
            finally:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")

    def data_version(self) -> int:
        """Return a number that changes whenever another connection has committed."""
        with self._reading():
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def count(self) -> int:
        """Return the number of rows."""
        with self._reading():
            return int(self._connection.execute("SELECT count(*) FROM records").fetchone()[0])

    def write(self, records: Sequence[Record]) -> None:
        """Write rows, all or none; existing ones are replaced.

        Args:
            records: Rows; their metadata has `doc_id` and `embedded_hash`.

        Raises:
            IndexStateError: If the file cannot be written.
        """
        with self._transaction():
            self._connection.executemany(
                "INSERT OR REPLACE INTO records (id, doc_id, embedded_hash, text, metadata, vector) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (
                        record.id,
                        str(record.metadata.get("doc_id", "")),
                        str(record.metadata.get("embedded_hash", "")),
                        record.text,
                        _dumped(record.metadata),
                        np.ascontiguousarray(record.vector, dtype="<f4").tobytes(),
                    )
                    for record in records
                ),
            )

    def update_metadata(self, ids: Sequence[str], metadatas: Sequence[Metadata]) -> None:
        """Change rows' metadata, all or none.

        Raises:
            IndexStateError: If the file cannot be written.
        """
        with self._transaction():
            self._connection.executemany(
                "UPDATE records SET metadata = ?, doc_id = ?, embedded_hash = ? WHERE id = ?",
                (
                    (_dumped(metadata), str(metadata.get("doc_id", "")), str(metadata.get("embedded_hash", "")), row_id)
                    for row_id, metadata in zip(ids, metadatas, strict=True)
                ),
            )

    def delete(self, ids: Collection[str]) -> None:
        """Delete rows, all or none; unknown ids are ignored.

        Their vectors stay until `drop_tombstones`: the text may reappear in another file of the same run.

        Raises:
            IndexStateError: If the file cannot be written.
        """
        with self._transaction():
            self._connection.executemany(
                "INSERT OR IGNORE INTO spare SELECT embedded_hash, vector FROM records WHERE id = ?",
                ((row_id,) for row_id in ids),
            )
            self._connection.executemany("DELETE FROM records WHERE id = ?", ((row_id,) for row_id in ids))

    def drop_tombstones(self) -> None:
        """Delete the vectors of deleted rows.

        Raises:
            IndexStateError: If the file cannot be written.
        """
        with self._transaction():
            self._connection.execute("DELETE FROM spare")

    def vectors_by_hash(self, hashes: Collection[str]) -> dict[str, Vector]:
        """Return the vector (dim,) of each known hash of embedded text, also of rows deleted in this run."""
        found: dict[str, Vector] = {}
        for table in ("spare", "records"):
            select = f"SELECT embedded_hash, vector FROM {table} WHERE embedded_hash IN"
            found.update({str(known): _vector(vector) for known, vector in self._selected(select, hashes)})
        return found

    def ids_by_document(self, documents: Collection[str]) -> dict[str, set[str]]:
        """Return the ids of the rows of documents, by their `doc_id`."""
        found: dict[str, set[str]] = {document: set() for document in documents}
        for document, row_id in self._selected("SELECT doc_id, id FROM records WHERE doc_id IN", documents):
            found[str(document)].add(str(row_id))
        return found

    def get(self, ids: Collection[str]) -> dict[str, Record]:
        """Return rows by id, without those that do not exist."""
        rows = self._selected("SELECT id, text, metadata, vector FROM records WHERE id IN", ids)
        return {str(row[0]): _record(row) for row in rows}

    def known(self, ids: Collection[str]) -> set[str]:
        """Return those of the ids that have a row."""
        return {str(row[0]) for row in self._selected("SELECT id FROM records WHERE id IN", ids)}

    def scan(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield id and metadata of all rows, in the order of the ids."""
        with self._reading():
            for row_id, metadata in self._connection.execute("SELECT id, metadata FROM records ORDER BY id"):
                yield str(row_id), dict(json.loads(metadata))

    def pages(self) -> Iterator[list[Record]]:
        """Yield pages of all rows. Rows that are written meanwhile may be missing."""
        last = -1
        while True:
            with self._reading():
                rows = self._connection.execute(
                    "SELECT id, text, metadata, vector, number FROM records WHERE number > ? ORDER BY number LIMIT ?",
                    (last, _PAGE),
                ).fetchall()
            if not rows:
                return
            last = int(rows[-1][4])
            yield [_record(row) for row in rows]

    def matrix(self) -> tuple[list[str], Vector]:
        """Return the ids of all rows and their vectors (rows, dim), in the order of the ids; (0, 0) without rows."""
        ids: list[str] = []
        values = bytearray()  # grows in place, so that the vectors are in memory once
        with self._reading():
            for row_id, vector in self._connection.execute("SELECT id, vector FROM records ORDER BY id"):
                ids.append(str(row_id))
                values += vector
        flat = np.frombuffer(values, dtype="<f4").astype(np.float32, copy=False)
        try:
            return ids, flat.reshape(len(ids), -1) if ids else np.zeros((0, 0), dtype=np.float32)
        except ValueError as error:
            raise _records_unavailable(self._path, "its vectors differ in length") from error

    def _selected(self, select: str, values: Collection[str]) -> Iterator[tuple[Any, ...]]:
        wanted = sorted(values)
        with self._reading():
            for start in range(0, len(wanted), MAX_VARIABLES):
                some = wanted[start : start + MAX_VARIABLES]
                yield from self._connection.execute(f"{select} ({','.join('?' * len(some))})", some)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _records_unavailable(self._path, str(error)) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except BaseException as error:
            with suppress(sqlite3.Error):  # after a full disk SQLite has rolled back already
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise _records_unwritable(self._path, error) from error
            raise


def _record(row: tuple[Any, ...]) -> Record:
    return Record(str(row[0]), str(row[1]), dict(json.loads(row[2])), _vector(row[3]))


def _vector(content: bytes) -> Vector:
    return np.frombuffer(content, dtype="<f4").astype(np.float32, copy=False)


def _dumped(metadata: Metadata) -> str:
    return json.dumps(dict(metadata), ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _make_records(connection: sqlite3.Connection) -> None:
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'records'").fetchone() is None:
        connection.executescript(f"BEGIN IMMEDIATE;{_RECORDS_SCHEMA}PRAGMA user_version = {_RECORDS_VERSION};COMMIT")


def _check_records(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError unless this version can read the file."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != _RECORDS_VERSION:
        raise sqlite3.DatabaseError(f"it has version {version}, this epic-rag reads {_RECORDS_VERSION}")
    connection.execute(
        "SELECT number, id, doc_id, embedded_hash, text, metadata, vector FROM records LIMIT 1"
    ).fetchone()


def _records_unavailable(path: Path, why: str) -> RecordsUnavailableError:
    why = " ".join(why.split())[:120]
    return RecordsUnavailableError(f"{path} cannot be read ({why}). Run `epic-rag index` to rebuild it.")


def _records_unwritable(path: Path, error: Exception) -> IndexStateError:
    why = " ".join(str(error).split())[:120]
    return IndexStateError(
        f"{path} cannot be written ({why}). Stored data is intact: free disk space or fix permissions, then run "
        "`epic-rag index` again."
    )


# Reloading the vectors is throttled if it takes longer than this, to one part in so many of the time.
FREE_RELOAD_SECONDS = 0.05
RELOAD_THROTTLE = 10.0


class BruteForceIndex:
    """Brute-force search over the rows of a collection. Must be closed; not thread-safe.

    Vectors are kept in memory between queries and reloaded when rows have changed. If that takes long, it is throttled:
    new rows then appear later, but deleted rows are never returned.

    Args:
        index_dir: The index folder.
        collection: The collection's id.
        free_reload_seconds: Up to this duration, reloading is not throttled.
        throttle: One part in so many of the time is spent on reloading.

    Raises:
        RecordsUnavailableError: If the rows are missing or cannot be read.
    """

    def __init__(
        self,
        index_dir: Path,
        collection: str,
        *,
        free_reload_seconds: float = FREE_RELOAD_SECONDS,
        throttle: float = RELOAD_THROTTLE,
    ) -> None:
        self._free_reload_seconds = free_reload_seconds
        self._throttle = throttle
        self._records = RecordStore.open_reading(index_dir, collection)
        self._version = -1
        self._read_at = 0.0
        self._cost = 0.0
        self._ids: list[str] = []
        self._matrix: Vector = np.zeros((0, 0), dtype=np.float32)

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Answer everything inside from one snapshot."""
        with self._records.snapshot():
            yield

    def count(self) -> int:
        """Return the number of rows."""
        return self._records.count()

    def get(self, ids: Collection[str]) -> dict[str, Record]:
        """Return rows by id, without those that do not exist."""
        return self._records.get(ids)

    def scan(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield id and metadata of all rows."""
        return self._records.scan()

    def version(self) -> int:
        """Return a number that changes with the rows."""
        return self._records.data_version()

    def nearest(self, vector: Vector, k: int, allowed: Collection[str] | None = None) -> list[tuple[str, float]]:
        """Return the k rows nearest to a vector.

        Args:
            vector: Unit vector (dim,) float32.
            k: Maximum number of rows.
            allowed: Ids to search among; None for all.

        Returns:
            (id, cosine), best first; equal cosines in the order of their ids.
        """
        self._refresh(force=False)
        found = self._nearest(vector, k, allowed)
        if len(self._records.known([row_id for row_id, _ in found])) < len(found):
            # Some were deleted since the vectors were loaded.
            self._refresh(force=True)
            found = self._nearest(vector, k, allowed)
        return found

    def _nearest(self, vector: Vector, k: int, allowed: Collection[str] | None) -> list[tuple[str, float]]:
        if not self._ids or k < 1:
            return []
        # Rounded, since equal rows of a matrix may differ in the last bit of their products.
        scores = np.round(self._matrix @ vector, 6)  # (rows,)
        if allowed is not None:
            known = frozenset(allowed)
            scores = np.where([row_id in known for row_id in self._ids], scores, -np.inf)
        # Ids are sorted, so a stable sort puts equal scores in their order.
        best = np.argsort(-scores, kind="stable")[:k]
        return [(self._ids[at], float(scores[at])) for at in best if np.isfinite(scores[at])]

    def _refresh(self, *, force: bool) -> None:
        version = self._records.data_version()
        now = time.monotonic()
        if not force and version == self._version:
            return
        if not force and self._cost > self._free_reload_seconds and now - self._read_at < self._cost * self._throttle:
            return
        self._ids, self._matrix = self._records.matrix()
        self._version = version
        self._read_at = time.monotonic()
        self._cost = self._read_at - now
