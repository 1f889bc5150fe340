"""Exact search over an index's own rows: what answers while Chroma's files may not be opened.

That is so while a run is writing, after one that died, and in a folder that cannot be written to. Every answer is of
one moment: SQLite shows a reader the last commit. The vectors are kept between queries and read again when rows have
changed; where that takes long, at most every tenth of the time is spent on it, and nothing that is gone is ever shown.
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
    "FEW",
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


# --- from database
# The SQLite files beside Chroma's: one for each collection, in write-ahead mode, opened to write or to read.
#
# A reader sees the last commit, and neither waits for the writer nor makes it wait.

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


# --- from records
# The index's own copy of its rows, in one SQLite file: what Chroma's collection is made from, and made again from.
#
# Chroma keeps texts in SQLite and vectors in the files of an HNSW graph, which it overwrites in place; a process that is
# killed meanwhile leaves a graph that is neither old nor new, and a second process that opens it while it is written
# reads the same. Rows here are written in transactions, before Chroma gets them. So
#
# * a vector is never computed twice: text that was renamed, moved or copied finds its vector by the hash of what the
#   model reads, and so does the run after a crash;
# * a collection that was torn is made again without the model;
# * a query that comes while Chroma is being written to, or after a crash, is answered from here (`exact.py`).
#
# The file is in write-ahead mode: a reader sees the last commit, and neither waits for the writer nor makes it wait.
# Which collection the rows belong to is in the file's name, so that a rebuild fills a file of its own.

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
    """The index's own rows are missing or cannot be read; the message says what to run."""


@dataclass(frozen=True)
class Record:
    """A row: id, text, metadata as Chroma has it (without None), and vector (dim,) float32."""

    id: str
    text: str
    metadata: dict[str, Any]
    vector: Vector


class RecordStore:
    """The rows of one collection.

    Make one with `open` to write or `open_reading` to read, and close it. Not for two threads at once.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    @classmethod
    def open(cls, index_dir: Path, collection_id: str) -> RecordStore:
        """Open the rows of a collection for writing; made empty if they are missing, broken or of another version.

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
        """Open the rows of a collection for reading. Writes nothing, and works in a folder that is read-only.

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
        """Delete the rows of all other collections; of all with None."""
        delete_others(index_dir, _RECORDS, collection_id)

    def copy_to(self, index_dir: Path, collection_id: str) -> RecordStore:
        """Copy all rows for another collection; the copy, open for writing.

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
        """Let go of the file."""
        self._connection.close()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything that is read inside is of one moment."""
        with self._reading():
            self._connection.execute("BEGIN")
            try:
                self._connection.execute(
                    "SELECT 1 FROM records LIMIT 1"
                ).fetchone()  # the moment is that of the first look
                yield
            finally:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")

    def data_version(self) -> int:
        """Changes whenever another connection has committed."""
        with self._reading():
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def count(self) -> int:
        """Number of rows."""
        with self._reading():
            return int(self._connection.execute("SELECT count(*) FROM records").fetchone()[0])

    def write(self, records: Sequence[Record]) -> None:
        """Write rows, all or none; those that exist are replaced.

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
        """Delete rows, all or none; an id that is not there is no error.

        Their vectors stay until `drop_tombstones`: the text may turn up in another file of the same run.

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
        """Delete the vectors of rows that are gone.

        Raises:
            IndexStateError: If the file cannot be written.
        """
        with self._transaction():
            self._connection.execute("DELETE FROM spare")

    def vectors_by_hash(self, hashes: Collection[str]) -> dict[str, Vector]:
        """Vectors of what the model has read already: for each hash that is known, its vector (dim,)."""
        found: dict[str, Vector] = {}
        for table in ("spare", "records"):
            select = f"SELECT embedded_hash, vector FROM {table} WHERE embedded_hash IN"
            found.update({str(known): _vector(vector) for known, vector in self._selected(select, hashes)})
        return found

    def ids_by_document(self, documents: Collection[str]) -> dict[str, set[str]]:
        """Ids of the rows of documents, by their `doc_id`."""
        found: dict[str, set[str]] = {document: set() for document in documents}
        for document, row_id in self._selected("SELECT doc_id, id FROM records WHERE doc_id IN", documents):
            found[str(document)].add(str(row_id))
        return found

    def get(self, ids: Collection[str]) -> dict[str, Record]:
        """Rows by id; those that are not there are left out."""
        rows = self._selected("SELECT id, text, metadata, vector FROM records WHERE id IN", ids)
        return {str(row[0]): _record(row) for row in rows}

    def known(self, ids: Collection[str]) -> set[str]:
        """Which of some ids have a row."""
        return {str(row[0]) for row in self._selected("SELECT id FROM records WHERE id IN", ids)}

    def scan(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All rows: id and metadata, in the order of the ids."""
        with self._reading():
            for row_id, metadata in self._connection.execute("SELECT id, metadata FROM records ORDER BY id"):
                yield str(row_id), dict(json.loads(metadata))

    def pages(self) -> Iterator[list[Record]]:
        """All rows, some at a time. Rows may be written meanwhile; those that are may be missing."""
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
        """Ids of all rows and their vectors (rows, dim), in the order of the ids; (0, 0) without any."""
        ids: list[str] = []
        values = bytearray()  # grows in place: the vectors are in memory once
        with self._reading():
            for row_id, vector in self._connection.execute("SELECT id, vector FROM records ORDER BY id"):
                ids.append(str(row_id))
                values += vector
        flat = np.frombuffer(values, dtype="<f4").astype(np.float32, copy=False)
        try:
            return ids, flat.reshape(len(ids), -1) if ids else np.zeros((0, 0), dtype=np.float32)
        except ValueError as error:
            raise _records_unavailable(self._path, "its vectors are not equally long") from error

    def _selected(self, select: str, values: Collection[str]) -> Iterator[tuple[Any, ...]]:
        wanted = sorted(values)
        with self._reading():
            for start in range(0, len(wanted), FEW):
                some = wanted[start : start + FEW]
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
            with suppress(sqlite3.Error):  # a full disk rolls back by itself
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
    """Raise sqlite3.DatabaseError unless the file is one of ours that this version reads."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != _RECORDS_VERSION:
        raise sqlite3.DatabaseError(f"it has version {version}, this epic-rag reads {_RECORDS_VERSION}")
    connection.execute(
        "SELECT number, id, doc_id, embedded_hash, text, metadata, vector FROM records LIMIT 1"
    ).fetchone()


def _records_unavailable(path: Path, why: str) -> RecordsUnavailableError:
    why = " ".join(why.split())[:120]
    return RecordsUnavailableError(f"{path} cannot be read ({why}); run `epic-rag index` to make it again")


def _records_unwritable(path: Path, error: Exception) -> IndexStateError:
    why = " ".join(str(error).split())[:120]
    return IndexStateError(
        f"{path} cannot be written ({why}); what is stored stays: see to the folder's permissions and free space, and "
        "run `epic-rag index` again"
    )


_SHORT_SECONDS = 0.05
_SHARE = 10.0


class BruteForceIndex:
    """The rows of a collection, searched by comparing with every one. Close it. Not for two threads at once.

    Args:
        index_dir: The index folder.
        collection: The collection's id.

    Raises:
        RecordsUnavailableError: If the rows are missing or cannot be read.
    """

    def __init__(self, index_dir: Path, collection: str) -> None:
        self._records = RecordStore.open_reading(index_dir, collection)
        self._version = -1
        self._read_at = 0.0
        self._cost = 0.0
        self._ids: list[str] = []
        self._matrix: Vector = np.zeros((0, 0), dtype=np.float32)

    def close(self) -> None:
        """Let go of the file."""
        self._records.close()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything that is asked inside is answered as of one moment."""
        with self._records.snapshot():
            yield

    def count(self) -> int:
        """Number of rows."""
        return self._records.count()

    def get(self, ids: Collection[str]) -> dict[str, Record]:
        """Rows by id; those that are not there are left out."""
        return self._records.get(ids)

    def scan(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All rows: id and metadata."""
        return self._records.scan()

    def version(self) -> int:
        """Another number whenever rows have changed."""
        return self._records.data_version()

    def nearest(self, vector: Vector, k: int, allowed: Collection[str] | None = None) -> list[tuple[str, float]]:
        """The rows nearest to a vector.

        Args:
            vector: (dim,) float32, of length one.
            k: The most rows.
            allowed: Ids of the only rows that may be found; None for all.

        Returns:
            (id, cosine), best first; equal ones in the order of their ids.
        """
        self._refresh(force=False)
        found = self._nearest(vector, k, allowed)
        if len(self._records.known([row_id for row_id, _ in found])) < len(found):
            # Some have gone since the vectors were read.
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
        if not force and self._cost > _SHORT_SECONDS and now - self._read_at < self._cost * _SHARE:
            return
        self._ids, self._matrix = self._records.matrix()
        self._version = version
        self._read_at = time.monotonic()
        self._cost = self._read_at - now
