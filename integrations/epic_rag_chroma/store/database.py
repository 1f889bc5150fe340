"""Index database: chunks with their vectors, files, keyword index and settings in one SQLite file.

Everything that belongs together is written in one transaction, so a crash at any moment leaves the state before or
after it. The file is in write-ahead mode: a reader sees the last commit, and neither waits for the writer nor delays
it. A rebuild fills a database beside this one, whose content `replace_by` then takes over in one transaction.

* A chunk's number is never used again and its vector never changes, so readers keep vectors in memory (`vectors.py`).
* No vector is computed twice: renamed, moved or copied text finds its vector by the hash of the embedded text.
* The table `outbox` lists ids that the Chroma mirror has not seen yet (`collection.py`).
"""

from __future__ import annotations

import json
import logging
import sqlite3
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from epic_rag.files import describe_os_error
from epic_rag_chroma.errors import IndexDamagedError, IndexMismatchError, IndexNotFoundError, IndexStateError
from epic_rag_chroma.store.keyword_index import (
    KEYWORD_SCHEMA,
    KEYWORD_VERSION,
    MAX_VARIABLES,
    KeywordIndex,
    KeywordsUnavailableError,
    Searched,
)
from epic_rag_chroma.store.paths import APPLICATION_ID, APPLICATION_ID_AT, DocumentKey, FileStamp
from epic_rag_chroma.store.state import FileEntry, IndexState, MirrorState
from epic_rag_chroma.store.tokenizer import ParsedQuery

__all__ = ["IndexDatabase", "Record", "delete_database", "is_foreign", "is_readable"]

logger = logging.getLogger(__name__)

Vector = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
Metadata = Mapping[str, Any]

FORMAT_VERSION = 3
_APPLICATION_NUMBER = int.from_bytes(APPLICATION_ID, "big")
_SQLITE_MARK = b"SQLite format 3\0"
_PAGE = 1000
_BUSY_SECONDS = 30.0
# Suffixes of the files of an open database.
_COMPANIONS = ("", "-wal", "-shm", "-journal")
_SCHEMA = f"""
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE files (
    root TEXT NOT NULL,
    path TEXT NOT NULL,
    digest TEXT NOT NULL,
    chunks INTEGER NOT NULL,
    size INTEGER,
    mtime_ns INTEGER,
    ctime_ns INTEGER,
    inode INTEGER,
    checked_ns INTEGER NOT NULL,
    PRIMARY KEY (root, path)
) WITHOUT ROWID;
CREATE TABLE chunks (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    doc_id TEXT NOT NULL,
    embedded_hash TEXT NOT NULL,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL
);
CREATE INDEX chunks_doc_id ON chunks (doc_id);
CREATE INDEX chunks_embedded_hash ON chunks (embedded_hash);
CREATE TABLE vectors (number INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE TABLE spare (embedded_hash TEXT PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE outbox (id TEXT PRIMARY KEY) WITHOUT ROWID;
{KEYWORD_SCHEMA}
"""


@dataclass(frozen=True)
class Record:
    """A chunk: id, text, metadata as in Chroma (without None), and vector (dim,) float32."""

    id: str
    text: str
    metadata: dict[str, Any]
    vector: Vector


class IndexDatabase:
    """The database of an index.

    Made by `open` for writing or `open_reading`; must be closed. Not thread-safe. Methods that read raise
    `IndexDamagedError` if the file is damaged; methods that write must be called within `transaction`.

    Args:
        connection: The open file.
        path: Its path.
        is_immutable: True if it was opened without locks, so that a change of the file calls for opening it again.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, *, is_immutable: bool = False) -> None:
        self._connection = connection
        self.path = path
        self.is_immutable = is_immutable
        self._keywords = KeywordIndex(connection)

    @classmethod
    def open(cls, path: Path) -> IndexDatabase:
        """Open a database for writing; create it if there is none.

        Raises:
            IndexMismatchError: If it has the format of another version.
            IndexDamagedError: If it is damaged.
            IndexStateError: If it cannot be written, or belongs to another program.
        """
        if is_foreign(path):
            raise _foreign(path)
        try:
            if not path.exists():
                path.touch()  # by the umask; SQLite never lets a group write
            database = cls(_connect(str(path)), path)
        except (OSError, sqlite3.Error) as error:
            raise _unwritable(path, error) from error
        try:
            with database._errors(writing=True):
                connection = database._connection
                if not _size(path):  # the file's header shows from the beginning that it is an index
                    connection.execute(f"PRAGMA application_id = {_APPLICATION_NUMBER}")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                if not connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                    connection.executescript(
                        f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version = {FORMAT_VERSION};"
                        f"INSERT INTO settings VALUES ('id', '{uuid.uuid4().hex}'), ('version', '0'),"
                        f"('keywords', '{KEYWORD_VERSION}');COMMIT"
                    )
                database._check_format()
                if database._setting("run") is not None:
                    # After a crash: torn pages of a failing disk are found now instead of in some later query.
                    result = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
                    if result != "ok":
                        raise sqlite3.DatabaseError(result)
                if database._setting("keywords") != KEYWORD_VERSION:
                    database._make_keywords()
        except BaseException:
            database.close()
            raise
        return database

    @classmethod
    def open_reading(cls, path: Path) -> IndexDatabase:
        """Open a database for reading. Changes nothing, and works in a read-only folder.

        Raises:
            IndexNotFoundError: If there is nothing in it yet.
            IndexMismatchError: If it has the format of another version.
            IndexDamagedError: If it is damaged.
            IndexStateError: If it is missing, may not be read, or belongs to another program.
        """
        if is_foreign(path):
            raise _foreign(path)
        uri = f"file:{quote(str(path))}?mode=ro"
        try:
            database = cls(_connect(uri, uri=True), path)
            try:
                database._setting("id")
            except sqlite3.Error:
                database.close()
                # Write-ahead mode needs a shared-memory file, which cannot be created in a read-only folder.
                if _size(path.with_name(path.name + "-wal")):
                    raise
                database = cls(_connect(f"{uri}&immutable=1", uri=True), path, is_immutable=True)
        except sqlite3.Error as error:
            raise _unreadable(path, error) from error
        try:
            with database._errors():
                database._check_format()
        except BaseException:
            database.close()
            raise
        return database

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    # -- transactions --------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write everything inside, or nothing if it fails or the process dies. Marks the run as unfinished.

        Raises:
            IndexStateError: If the file cannot be written.
        """
        with self._errors(writing=True):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._set("run", "unfinished")
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # after a full disk SQLite has rolled back already
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read everything inside from one state of the database."""
        with self._errors():
            self._connection.execute("BEGIN")
            try:
                self._setting("id")  # starts the snapshot
                yield
            finally:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")

    def replace_by(self, other: Path) -> None:
        """Take over the content of a complete database in one transaction, and delete it.

        The mirror stays that of this database and becomes dirty, since all chunks may differ.

        Raises:
            IndexStateError: If the file cannot be written.
        """
        collection = self.mirror().collection
        with self._errors(writing=True):
            source = IndexDatabase.open(other)
            try:
                source._set("mirror", _mirror_json(collection, True))
                source._connection.execute("DELETE FROM outbox")
                source._connection.backup(self._connection)
            finally:
                source.close()
        delete_database(other)

    # -- settings ------------------------------------------------------------------------------------------------------

    def state(self) -> IndexState | None:
        """Return the settings of the index; None before `save_state`."""
        with self._errors():
            text = self._setting("state")
            try:
                return None if text is None else IndexState.from_json(text)
            except ValueError as error:
                raise sqlite3.DatabaseError(f"its settings: {error}") from error

    def save_state(self, state: IndexState) -> None:
        """Store the settings of the index."""
        self._set("state", state.to_json())

    def finish_run(self, state: IndexState) -> None:
        """Store the settings, delete spare vectors, and mark the run as finished; a transaction by itself."""
        with self._errors(writing=True):
            self._connection.executescript("BEGIN IMMEDIATE;DELETE FROM spare;DELETE FROM settings WHERE name = 'run'")
            self.save_state(state)
            self._connection.execute("COMMIT")

    @property
    def is_unfinished(self) -> bool:
        """True during a run and after one that did not finish."""
        with self._errors():
            return self._setting("run") is not None

    def version(self) -> tuple[str, int]:
        """Return the database's id and a number that grows whenever chunks change."""
        with self._errors():
            return str(self._setting("id")), int(self._setting("version") or 0)

    # -- files ---------------------------------------------------------------------------------------------------------

    def front_matter_keys(self) -> set[str]:
        """Return the keys of the files' front matter."""
        rows = self._connection.execute(
            "SELECT DISTINCT json_extract(metadata, '$.front_matter') FROM chunks "
            "WHERE instr(metadata, '\"front_matter\"')"
        )
        return {str(key) for (text,) in rows if text for key in json.loads(text)}

    def files(self) -> dict[DocumentKey, FileEntry]:
        """Return the entries of all files."""
        return dict(self._files(""))

    def file(self, key: DocumentKey) -> FileEntry | None:
        """Return the entry of a file; None if it is not in the index."""
        return next((entry for _, entry in self._files("WHERE root = ? AND path = ?", key)), None)

    def file_times(self) -> list[tuple[str, str, int | None, int | None]]:
        """Return root, path, size and modification time of all files, in a fraction of the time of `files`."""
        with self._errors():
            return self._connection.execute("SELECT root, path, size, mtime_ns FROM files").fetchall()

    def put_file(self, key: DocumentKey, entry: FileEntry) -> None:
        """Store the entry of a file."""
        stamp: tuple[int | None, ...] = (None,) * 4
        if entry.stamp is not None:
            stamp = (entry.stamp.size, entry.stamp.mtime_ns, entry.stamp.ctime_ns, entry.stamp.inode)
        self._connection.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*key, entry.digest, entry.chunks, *stamp, entry.checked_ns),
        )

    def forget_digests(self) -> None:
        """Have the next change detection read every file again."""
        self._connection.execute("UPDATE files SET digest = ''")

    def delete_files(self, keys: Iterable[DocumentKey]) -> None:
        """Delete the entries of files."""
        self._connection.executemany("DELETE FROM files WHERE root = ? AND path = ?", keys)

    def _files(self, where: str, values: Sequence[str] = ()) -> Iterator[tuple[DocumentKey, FileEntry]]:
        with self._errors():
            for root, path, digest, chunks, *stamp, checked_ns in self._connection.execute(
                f"SELECT * FROM files {where}", values
            ):
                known = None if stamp[0] is None else FileStamp(*stamp)
                yield (root, path), FileEntry(digest, chunks, known, checked_ns)

    # -- chunks --------------------------------------------------------------------------------------------------------

    def put(self, records: Sequence[Record]) -> None:
        """Store chunks; those with a known id are replaced.

        Args:
            records: Chunks; their metadata has `doc_id`, `embedded_hash` and, if there is one, `heading_path`.
        """
        self.delete([record.id for record in records])
        for record in records:
            number = self._connection.execute(
                "INSERT INTO chunks (id, doc_id, embedded_hash, text, metadata) VALUES (?, ?, ?, ?, ?)",
                (record.id, *_columns(record.metadata), record.text, _dumped(record.metadata)),
            ).lastrowid
            assert number is not None
            self._connection.execute(
                "INSERT INTO vectors VALUES (?, ?)",
                (number, np.ascontiguousarray(record.vector, dtype="<f4").tobytes()),
            )
            self._keywords.add(number, _searched(record.text, record.metadata))
        self._record_changes(record.id for record in records)

    def update_metadata(self, ids: Sequence[str], metadatas: Sequence[Metadata]) -> None:
        """Change the metadata of chunks, and their keywords if these follow from it; text, vector and number stay."""
        given = dict(zip(ids, metadatas, strict=True))
        for number, row_id, text, old in list(
            self._selected("SELECT number, id, text, metadata FROM chunks WHERE id IN", ids)
        ):
            searched = _searched(text, given[row_id])
            if searched != _searched(text, json.loads(old)):
                self._keywords.delete(number)
                self._keywords.add(number, searched)
        changed = [(_dumped(metadata), *_columns(metadata), row_id) for row_id, metadata in given.items()]
        self._connection.executemany(
            "UPDATE chunks SET metadata = ?, doc_id = ?, embedded_hash = ? WHERE id = ?", changed
        )
        self._record_changes(ids)

    def delete(self, ids: Collection[str]) -> None:
        """Delete chunks; unknown ids are ignored.

        Their vectors stay until the run ends: the text may reappear in another file of the same run.
        """
        known = list(self._selected("SELECT number, id FROM chunks WHERE id IN", ids))
        if not known:
            return
        for number, _ in known:
            self._connection.execute(
                "INSERT OR IGNORE INTO spare SELECT embedded_hash, vector FROM chunks JOIN vectors USING (number) "
                "WHERE number = ?",
                (number,),
            )
            for table in ("chunks", "vectors"):
                self._connection.execute(f"DELETE FROM {table} WHERE number = ?", (number,))
            self._keywords.delete(number)
        self._record_changes(row_id for _, row_id in known)

    def count(self) -> int:
        """Return the number of chunks."""
        with self._errors():
            return int(self._connection.execute("SELECT count(*) FROM chunks").fetchone()[0])

    def get(self, ids: Collection[str]) -> dict[str, Record]:
        """Return chunks by id, without those that do not exist."""
        rows = self._selected(
            "SELECT id, text, metadata, vector FROM chunks JOIN vectors USING (number) WHERE id IN", ids
        )
        return {str(row[0]): _record(row) for row in rows}

    def neighbours(self, row_id: str, first: int, last: int) -> list[Record]:
        """Return the chunks of a chunk's file from one position to another, in order; none if none has a position."""
        place = "json_extract(metadata, '$.position')"
        with self._errors():
            rows = self._connection.execute(
                "SELECT id, text, metadata, vector FROM chunks JOIN vectors USING (number) "
                f"WHERE doc_id = (SELECT doc_id FROM chunks WHERE id = ?) AND {place} BETWEEN ? AND ? ORDER BY {place}",
                (row_id, first, last),
            ).fetchall()
        return [_record(row) for row in rows]

    def sample(self, count: int) -> list[str]:
        """Return the texts of at most this number of chunks, at even distances."""
        with self._errors():
            first, last = self._connection.execute("SELECT min(number), max(number) FROM chunks").fetchone()
            if first is None:
                return []
            step = (last - first + 1) / count
            select = "SELECT number, text FROM chunks WHERE number >= ? ORDER BY number LIMIT 1"
            places = sorted({first + int(step * place) for place in range(count)})
            return list(dict(self._connection.execute(select, (place,)).fetchone() for place in places).values())

    def scan(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield number and metadata of all chunks."""
        with self._errors():
            for number, metadata in self._connection.execute("SELECT number, metadata FROM chunks"):
                yield int(number), dict(json.loads(metadata))

    def pages(self) -> Iterator[list[Record]]:
        """Yield pages of all chunks, in the order of their numbers."""
        last = -1
        while True:
            with self._errors():
                rows = self._connection.execute(
                    "SELECT id, text, metadata, vector, number FROM chunks JOIN vectors USING (number) "
                    "WHERE number > ? ORDER BY number LIMIT ?",
                    (last, _PAGE),
                ).fetchall()
            if not rows:
                return
            last = int(rows[-1][4])
            yield [_record(row) for row in rows]

    def vectors_by_hash(self, hashes: Collection[str]) -> dict[str, Vector]:
        """Return the vector (dim,) of each known hash of embedded text, also of chunks deleted in this run."""
        found: dict[str, Vector] = {}
        for table in ("spare", "chunks JOIN vectors USING (number)"):
            select = f"SELECT embedded_hash, vector FROM {table} WHERE embedded_hash IN"
            found.update({str(known): _vector(vector) for known, vector in self._selected(select, hashes)})
        return found

    def ids_by_document(self, documents: Collection[str]) -> dict[str, set[str]]:
        """Return the ids of the chunks of documents, by their `doc_id`."""
        found: dict[str, set[str]] = {document: set() for document in documents}
        for document, row_id in self._selected("SELECT doc_id, id FROM chunks WHERE doc_id IN", documents):
            found[str(document)].add(str(row_id))
        return found

    # -- search --------------------------------------------------------------------------------------------------------

    def ids(self, numbers: Iterable[int]) -> dict[int, str]:
        """Return the ids of chunks by their numbers."""
        rows = self._selected("SELECT number, id FROM chunks WHERE number IN", [int(number) for number in numbers])
        return {int(number): str(row_id) for number, row_id in rows}

    def numbers_of(self, ids: Collection[str]) -> list[int]:
        """Return the numbers of chunks by their ids."""
        return [int(row[0]) for row in self._selected("SELECT number FROM chunks WHERE id IN", ids)]

    def numbers(self) -> Numbers:
        """Return the numbers of all chunks (n,), in ascending order."""
        with self._errors():
            # Without an order SQLite reads them from an index, which is a hundredth of the table.
            rows = self._connection.execute("SELECT number FROM chunks").fetchall()
        return np.sort(np.asarray([row[0] for row in rows], dtype=np.int64))

    def vectors_after(self, number: int, *, every: int = 1) -> tuple[Numbers, Vector]:
        """Return numbers (n,) and vectors (n, dim) of chunks with a greater number; (0, 0) if there are none.

        Args:
            number: All chunks have greater numbers.
            every: Leave out chunks whose number is no multiple of this.
        """
        numbers: list[int] = []
        values = bytearray()  # grows in place, so that the vectors are in memory once
        with self._errors():
            for each, vector in self._connection.execute(
                "SELECT number, vector FROM vectors WHERE number > ? AND number % ? = 0 ORDER BY number",
                (number, every),
            ):
                numbers.append(each)
                values += vector
            flat = np.frombuffer(values, dtype="<f4").astype(np.float32, copy=False)
            try:
                matrix = flat.reshape(len(numbers), -1) if numbers else np.zeros((0, 0), dtype=np.float32)
            except ValueError as error:
                raise sqlite3.DatabaseError("its vectors differ in length") from error
        return np.asarray(numbers, dtype=np.int64), matrix

    def vectors_token(self) -> str | None:
        """Return the token of the file with copies of the vectors that belongs to this database; see `vectors.py`."""
        with self._errors():
            return self._setting("vectors")

    def save_vectors_token(self, token: str) -> None:
        """Store the token of a new file with copies of the vectors; a transaction by itself."""
        with self._errors(writing=True):
            self._set("vectors", token)

    def match(
        self,
        query: str | ParsedQuery,
        k: int,
        allowed: Collection[int] | None = None,
        *,
        languages: Collection[str] | None = None,
    ) -> list[tuple[str, float]]:
        """Return the k chunks with the highest BM25 scores; see `KeywordIndex.search`.

        Raises:
            KeywordsUnavailableError: If another version of epic-rag made the keyword index.
        """
        with self._keyword_errors():
            return self._keywords.search(query, k, allowed, languages=languages)

    def parsed(self, query: str) -> ParsedQuery:
        """Return a query as parsed for this index; see `KeywordIndex.parsed`."""
        with self._keyword_errors():
            return self._keywords.parsed(query)

    def options(self, query: str) -> frozenset[str]:
        """Return the words of a query that are options of a command; see `KeywordIndex.options`."""
        with self._keyword_errors():
            return self._keywords.options(query)

    def restrict(self, query: ParsedQuery) -> tuple[frozenset[int] | None, frozenset[int]]:
        """Return which chunks a query requires and excludes; see `KeywordIndex.restrict`."""
        with self._keyword_errors():
            return self._keywords.restrict(query)

    def languages(self) -> frozenset[str]:
        """Return the languages of the chunks."""
        with self._errors():
            return self._keywords.languages()

    def query_terms(self, query: ParsedQuery, languages: Collection[str] | None = None) -> list[str]:
        """Return the terms that a query is searched by; see `KeywordIndex.terms`."""
        with self._errors():
            return self._keywords.terms(query, languages)

    def term_counts(self, terms: Sequence[str]) -> dict[str, int]:
        """Return the number of chunks with each term."""
        with self._errors():
            return self._keywords.counts(terms)

    def attainable(self, query: ParsedQuery) -> float:
        """Return the score of a chunk that has every word of a query; see `KeywordIndex.attainable`."""
        with self._keyword_errors():
            return self._keywords.attainable(query)

    def match_term(self, term: str, numbers: Sequence[int]) -> list[tuple[str, float]]:
        """Return the BM25 scores for one term of a query; see `KeywordIndex.match_term`."""
        with self._errors():
            return self._keywords.match_term(term, numbers)

    @contextmanager
    def _keyword_errors(self) -> Iterator[None]:
        with self._errors():
            if self._setting("keywords") != KEYWORD_VERSION:
                raise KeywordsUnavailableError(
                    f"The keyword index of {self.path.parent} was made by another version of epic-rag. Run "
                    "`epic-rag index` to update it, or search with --mode dense."
                )
            yield

    def _make_keywords(self) -> None:
        logger.info("making the keyword index again")
        with self.transaction():
            self._keywords.clear()
            for number, text, metadata in self._connection.execute("SELECT number, text, metadata FROM chunks"):
                self._keywords.add(number, _searched(text, json.loads(metadata)))
            self._set("keywords", KEYWORD_VERSION)

    # -- mirror --------------------------------------------------------------------------------------------------------

    def mirror(self) -> MirrorState:
        """Return the state of the Chroma mirror."""
        with self._errors():
            is_behind = self._connection.execute("SELECT 1 FROM outbox LIMIT 1").fetchone() is not None
            return MirrorState(**json.loads(self._setting("mirror") or "{}"), is_behind=is_behind)

    def unmirrored(self) -> list[str]:
        """Return the ids of chunks that changed since the mirror was complete; those without a chunk were deleted."""
        with self._errors():
            return [str(row[0]) for row in self._connection.execute("SELECT id FROM outbox")]

    def begin_mirror(self, collection: str | None) -> None:
        """Mark the mirror as dirty before the first write to it."""
        with self._errors(writing=True):
            self._set("mirror", _mirror_json(collection, True))

    def end_mirror(self, collection: str | None) -> None:
        """Mark the mirror as clean; None for an index without one."""
        with self._errors(writing=True):
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("DELETE FROM outbox")
            self._set("mirror", _mirror_json(collection, False))
            self._connection.execute("COMMIT")

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _check_format(self) -> None:
        found = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        application = int(self._connection.execute("PRAGMA application_id").fetchone()[0])
        if not found:  # a process died, or has not finished, before the tables were created
            raise IndexNotFoundError(f"No index in {self.path.parent}. Run `epic-rag index PATH` to create one.")
        if application != _APPLICATION_NUMBER:
            raise sqlite3.DatabaseError("it is not an index")
        if found != FORMAT_VERSION:
            raise IndexMismatchError(
                f"{self.path} has format {found}, this version of epic-rag reads {FORMAT_VERSION}. Run `pip install "
                "--upgrade epic-rag`, or rebuild with `epic-rag index --rebuild`."
            )

    def _setting(self, name: str) -> str | None:
        row = self._connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def _set(self, name: str, value: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    def _record_changes(self, ids: Iterable[str]) -> None:
        self._connection.execute("UPDATE settings SET value = value + 1 WHERE name = 'version'")
        self._connection.executemany("INSERT OR IGNORE INTO outbox VALUES (?)", ((row_id,) for row_id in ids))

    def _selected(self, select: str, values: Collection[Any]) -> Iterator[tuple[Any, ...]]:
        wanted = sorted(values)
        with self._errors():
            for start in range(0, len(wanted), MAX_VARIABLES):
                some = wanted[start : start + MAX_VARIABLES]
                yield from self._connection.execute(f"{select} ({','.join('?' * len(some))})", some)

    @contextmanager
    def _errors(self, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if writing and not _is_damage(error):
                raise _unwritable(self.path, error) from error
            raise _unreadable(self.path, error) from error


def delete_database(path: Path) -> None:
    """Delete a database and SQLite's files beside it."""
    for companion in _COMPANIONS:
        path.with_name(path.name + companion).unlink(missing_ok=True)


def _connect(name: str, *, uri: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(name, uri=uri, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA trusted_schema = OFF")  # an index from elsewhere may have triggers
    return connection


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _mirror_json(collection: str | None, is_dirty: bool) -> str:
    return json.dumps({"collection": collection, "is_dirty": is_dirty})


def _columns(metadata: Metadata) -> tuple[str, str]:
    return str(metadata.get("doc_id", "")), str(metadata.get("embedded_hash", ""))


def _searched(text: str, metadata: Metadata) -> Searched:
    """Return what the keyword index contains of a chunk."""
    return Searched(
        PurePosixPath(str(metadata.get("path", ""))).name,
        str(metadata.get("heading_path", "")),
        str(metadata.get("words", text)),
    )


def _record(row: tuple[Any, ...]) -> Record:
    return Record(str(row[0]), str(row[1]), dict(json.loads(row[2])), _vector(row[3]))


def _vector(content: bytes) -> Vector:
    return np.frombuffer(content, dtype="<f4").astype(np.float32, copy=False)


def _dumped(metadata: Metadata) -> str:
    return json.dumps(dict(metadata), ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def is_readable(path: Path) -> bool:
    """Return whether the user may read a file."""
    try:
        with open(path, "rb"):
            return True
    except OSError:
        return False


def is_foreign(path: Path) -> bool:
    """Return whether a file is an SQLite database of another program."""
    try:
        with open(path, "rb") as file:
            head = file.read(100)
    except OSError:
        return False
    return head.startswith(_SQLITE_MARK) and head[APPLICATION_ID_AT] != APPLICATION_ID


def _is_damage(error: sqlite3.Error) -> bool:
    """Return whether the content is wrong, as opposed to locked, forbidden or on a full disk."""
    return not isinstance(error, sqlite3.OperationalError) or "no such" in str(error)


def _foreign(path: Path) -> IndexStateError:
    return IndexStateError(f"{path} is a database of another program. Run `epic-rag index` with another --index-dir.")


def _unreadable(path: Path, error: sqlite3.Error) -> IndexStateError:
    why = " ".join(str(error).split())[:120]
    if not path.exists():
        return IndexStateError(f"{path} is missing. Run `epic-rag index` with the indexed folder.")
    if denied := _missing_permission(path, "rb"):
        return IndexStateError(f"{denied}. Make it readable or pass another --index-dir.")
    if not _is_damage(error):
        return IndexStateError(f"{path} cannot be read now ({why}). Check the disk and permissions, then try again.")
    return IndexDamagedError(f"{path} cannot be read ({why}). Run `epic-rag index --rebuild` with the indexed folder.")


def _unwritable(path: Path, error: Exception) -> IndexStateError:
    why = " ".join(str(error).split())[:120]
    if denied := _missing_permission(path, "r+b"):
        return IndexStateError(f"{denied}. Stored data is intact. Make it writable, then run `epic-rag index` again.")
    return IndexStateError(
        f"{path} cannot be written ({why}). Stored data is intact: free disk space or fix permissions, then run "
        "`epic-rag index` again."
    )


def _missing_permission(path: Path, mode: str) -> str | None:
    """Return what keeps a file from being opened, if that is a permission."""
    try:
        path.open(mode).close()
    except PermissionError as error:
        return describe_os_error(error)
    except OSError:
        pass
    return None
