"""The index's own copy of its rows, in one SQLite file: what Chroma's collection is made from, and made again from.

Chroma keeps texts in SQLite and vectors in the files of an HNSW graph, which it overwrites in place; a process that is
killed meanwhile leaves a graph that is neither old nor new, and a second process that opens it while it is written
reads the same. Rows here are written in transactions, before Chroma gets them. So

* a vector is never computed twice: text that was renamed, moved or copied finds its vector by the hash of what the
  model reads, and so does the run after a crash;
* a collection that was torn is made again without the model;
* a query that comes while Chroma is being written to, or after a crash, is answered from here (`exact.py`).

The file is in write-ahead mode: a reader sees the last commit, and neither waits for the writer nor makes it wait.
Which collection the rows belong to is in the file's name, so that a rebuild fills a file of its own.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from epic_rag.errors import IndexStateError
from epic_rag_chroma.database import FEW, delete_database, delete_others, file_of, open_reading, open_writing

__all__ = ["Record", "RecordStore", "RecordsUnavailableError"]

_KIND = "records"
_VERSION = 1
_PAGE = 1000
_SCHEMA = """
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
        path = file_of(index_dir, _KIND, collection_id)
        try:
            return cls(open_writing(path, _make, _check), path)
        except (OSError, sqlite3.Error) as error:
            raise _unwritable(path, error) from error

    @classmethod
    def open_reading(cls, index_dir: Path, collection_id: str) -> RecordStore:
        """Open the rows of a collection for reading. Writes nothing, and works in a folder that is read-only.

        Raises:
            RecordsUnavailableError: If they are missing, broken or of another version.
        """
        path = file_of(index_dir, _KIND, collection_id)
        if not path.is_file():
            raise _unavailable(path, "it is missing")
        try:
            return cls(open_reading(path, _check), path)
        except sqlite3.Error as error:
            raise _unavailable(path, str(error)) from error

    @staticmethod
    def delete_others(index_dir: Path, collection_id: str | None) -> None:
        """Delete the rows of all other collections; of all with None."""
        delete_others(index_dir, _KIND, collection_id)

    def copy_to(self, index_dir: Path, collection_id: str) -> RecordStore:
        """Copy all rows for another collection; the copy, open for writing.

        Raises:
            IndexStateError: If it cannot be written.
        """
        path = file_of(index_dir, _KIND, collection_id)
        delete_database(path)
        try:
            with sqlite3.connect(path) as target:
                self._connection.backup(target)
            target.close()
        except sqlite3.Error as error:
            raise _unwritable(path, error) from error
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

        Their vectors stay until `drop_spare`: the text may turn up in another file of the same run.

        Raises:
            IndexStateError: If the file cannot be written.
        """
        with self._transaction():
            self._connection.executemany(
                "INSERT OR IGNORE INTO spare SELECT embedded_hash, vector FROM records WHERE id = ?",
                ((row_id,) for row_id in ids),
            )
            self._connection.executemany("DELETE FROM records WHERE id = ?", ((row_id,) for row_id in ids))

    def drop_spare(self) -> None:
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
            raise _unavailable(self._path, "its vectors are not equally long") from error

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
            raise _unavailable(self._path, str(error)) from error

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
                raise _unwritable(self._path, error) from error
            raise


def _record(row: tuple[Any, ...]) -> Record:
    return Record(str(row[0]), str(row[1]), dict(json.loads(row[2])), _vector(row[3]))


def _vector(content: bytes) -> Vector:
    return np.frombuffer(content, dtype="<f4").astype(np.float32, copy=False)


def _dumped(metadata: Metadata) -> str:
    return json.dumps(dict(metadata), ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _make(connection: sqlite3.Connection) -> None:
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'records'").fetchone() is None:
        connection.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version = {_VERSION};COMMIT")


def _check(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError unless the file is one of ours that this version reads."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != _VERSION:
        raise sqlite3.DatabaseError(f"it has version {version}, this epic-rag reads {_VERSION}")
    connection.execute(
        "SELECT number, id, doc_id, embedded_hash, text, metadata, vector FROM records LIMIT 1"
    ).fetchone()


def _unavailable(path: Path, why: str) -> RecordsUnavailableError:
    why = " ".join(why.split())[:120]
    return RecordsUnavailableError(f"{path} cannot be read ({why}); run `epic-rag index` to make it again")


def _unwritable(path: Path, error: Exception) -> IndexStateError:
    why = " ".join(str(error).split())[:120]
    return IndexStateError(
        f"{path} cannot be written ({why}); what is stored stays: see to the folder's permissions and free space, and "
        "run `epic-rag index` again"
    )
