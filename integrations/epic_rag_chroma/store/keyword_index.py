"""Keyword index: BM25 over SQLite's FTS5, one file for each collection.

A chunk is stored as the terms that `tokenizer.py` makes of it; FTS5 stems them (Porter) and ranks with BM25 (k1 = 1.2,
b = 0.75). Everything here can be rebuilt from the rows: a file that is broken or of another version is replaced by an
empty one when it is opened for writing, and the writer then compares `ids` with the collection's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from epic_rag_chroma.errors import IndexStateError
from epic_rag_chroma.store.database import (
    FEW,
    delete_database,
    delete_others,
    file_of,
    is_broken,
    open_reading,
    open_writing,
)
from epic_rag_chroma.store.tokenizer import TERMS_VERSION, document_terms, query_terms

__all__ = ["KeywordIndex", "KeywordsUnavailableError"]

_KEYWORDS = "keywords"
_KEYWORDS_VERSION = f"1.{TERMS_VERSION}"
_MOST_TERMS = 100
# A term in more than this share of the chunks is left out where a query has rarer ones: FTS5 gives a term in more than
# half of them no weight at all, and every chunk that has it would have to be scored.
_COMMON = 0.5
_COMMON_COUNTED = 2000
# How many more chunks are scored than are wanted, since equal scores are put in the order of ids.
_SPARE = FEW

_KEYWORDS_SCHEMA = """
CREATE TABLE meta (version TEXT NOT NULL);
CREATE TABLE chunks (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, doc_id TEXT NOT NULL);
CREATE VIRTUAL TABLE words USING fts5 (terms, tokenize = 'porter unicode61 remove_diacritics 2');
"""


class KeywordsUnavailableError(IndexStateError):
    """The keyword index is missing or cannot be read; the message says what to run."""


class KeywordIndex:
    """The words of one collection's chunks.

    Make one with `open` to write or `open_reading` to search, and close it. Not for two threads at once.

    Example:
        >>> words = KeywordIndex.open(Path("docs/.epic-rag"), collection_id)
        >>> words.upsert(["a"], ["Undo the last commit"], ["guide.md"])
        >>> words.search("undo a commit", 10)
        [('a', 0.9)]
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._counted: tuple[tuple[int, int], int] | None = None

    @classmethod
    def open(cls, index_dir: Path, collection_id: str) -> KeywordIndex:
        """Open the words of a collection for writing; made empty if they are missing, broken or of another version.

        Raises:
            IndexStateError: If the file can be neither read nor replaced (permissions, a full disk).
        """
        path = file_of(index_dir, _KEYWORDS, collection_id)
        try:
            return cls(open_writing(path, _make_keywords, _check_all), path)
        except (OSError, sqlite3.Error) as error:
            raise _keywords_unwritable(path, error) from error

    @classmethod
    def open_reading(cls, index_dir: Path, collection_id: str) -> KeywordIndex:
        """Open the words of a collection for searching. Writes nothing, and works in a folder that is read-only.

        Raises:
            KeywordsUnavailableError: If they are missing, broken or of another version.
        """
        path = file_of(index_dir, _KEYWORDS, collection_id)
        if not path.is_file():
            raise _keywords_unavailable(path, "it is missing")
        try:
            return cls(open_reading(path, _check_keywords), path)
        except sqlite3.Error as error:
            raise _keywords_unavailable(path, str(error)) from error

    @staticmethod
    def delete_others(index_dir: Path, collection_id: str | None) -> None:
        """Delete the words of all other collections; of all with None."""
        delete_others(index_dir, _KEYWORDS, collection_id)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def count(self) -> int:
        """Number of chunks."""
        return int(self._connection.execute("SELECT count(*) FROM chunks").fetchone()[0])

    def ids(self) -> set[str]:
        """Ids of all chunks."""
        return {row[0] for row in self._connection.execute("SELECT id FROM chunks")}

    def upsert(self, ids: Sequence[str], texts: Sequence[str], doc_ids: Sequence[str]) -> None:
        """Write chunks, all or none; those that exist are replaced.

        Args:
            ids: The chunks' ids in the collection.
            texts: What is searched: the text with the headings above it.
            doc_ids: The chunks' documents.

        Raises:
            IndexStateError: If the file cannot be written.
        """
        with self._transaction():
            for row_id, text, doc_id in zip(ids, texts, doc_ids, strict=True):
                self._delete(row_id)
                number = self._connection.execute(
                    "INSERT INTO chunks (id, doc_id) VALUES (?, ?)", (row_id, doc_id)
                ).lastrowid
                self._connection.execute(
                    "INSERT INTO words (rowid, terms) VALUES (?, ?)", (number, document_terms(text))
                )

    def delete(self, ids: Collection[str]) -> None:
        """Delete chunks, all or none; an id that is not there is no error.

        Raises:
            IndexStateError: If the file cannot be written.
        """
        with self._transaction():
            for row_id in ids:
                self._delete(row_id)

    def _delete(self, row_id: str) -> None:
        found = self._connection.execute("SELECT number FROM chunks WHERE id = ?", (row_id,)).fetchone()
        if found is not None:
            self._connection.execute("DELETE FROM words WHERE rowid = ?", found)
            self._connection.execute("DELETE FROM chunks WHERE number = ?", found)

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
                if is_broken(error):
                    self.close()
                    delete_database(self._path)  # so that the next run makes it anew
                raise _keywords_unwritable(self._path, error) from error
            raise

    def search(self, query: str, k: int, allowed: Collection[str] | None = None) -> list[tuple[str, float]]:
        """The chunks that have words of a query.

        Args:
            query: Any text; nothing in it has a special meaning.
            k: The most chunks.
            allowed: Ids of the only chunks that may be found; None for all.

        Returns:
            (id, BM25 score) with the highest score first, equal ones in the order of their ids.

        Raises:
            KeywordsUnavailableError: If the file is broken.
        """
        try:
            terms = self._rare(query_terms(query))
            if not terms or k < 1 or (allowed is not None and not allowed):
                return []
            select = (
                "SELECT id, -bm25(words) AS score FROM words JOIN chunks ON number = words.rowid WHERE words MATCH ?"
            )
            order = "ORDER BY score DESC, id LIMIT ?"
            rows: Iterable[tuple[Any, ...]]
            if allowed is None:
                best = self._best(_match(terms), k)
                rows = best if best is not None else self._connection.execute(f"{select} {order}", (_match(terms), k))
            elif len(allowed) <= FEW:
                # The plus keeps SQLite from asking FTS5 again for each number.
                places = ",".join("?" * len(allowed))
                rows = self._connection.execute(
                    f"{select} AND +words.rowid IN (SELECT number FROM chunks WHERE id IN ({places})) {order}",
                    (_match(terms), *sorted(allowed), k),
                )
            else:
                known = frozenset(allowed)
                every = self._connection.execute(f"{select} {order}", (_match(terms), -1))
                rows = islice((row for row in every if row[0] in known), k)
            return [(str(row_id), float(score)) for row_id, score in rows]
        except sqlite3.Error as error:
            raise _keywords_unavailable(self._path, str(error)) from error

    def _best(self, match: str, k: int) -> list[tuple[str, float]] | None:
        """The k best chunks, whose ids alone are looked up; None if more than a few are as good as the last of them."""
        scored = self._connection.execute(
            "SELECT rowid, -bm25(words) AS score FROM words WHERE words MATCH ? ORDER BY score DESC LIMIT ?",
            (match, k + _SPARE),
        ).fetchall()
        if len(scored) == k + _SPARE and scored[-1][1] == scored[k - 1][1]:
            return None
        last = scored[min(k, len(scored)) - 1][1] if scored else 0.0
        scores = {int(number): float(score) for number, score in scored if score >= last}
        found: list[tuple[str, float]] = []
        numbers = list(scores)
        for start in range(0, len(numbers), _SPARE):
            some = numbers[start : start + _SPARE]
            rows = self._connection.execute(
                f"SELECT number, id FROM chunks WHERE number IN ({','.join('?' * len(some))})", some
            )
            found += [(str(row_id), scores[int(number)]) for number, row_id in rows]
        return sorted(found, key=lambda row: (-row[1], row[0]))[:k]

    def _rare(self, terms: list[str]) -> list[str]:
        """The terms that make a difference, so that frequent words do not make a search slow."""
        if len(terms) == 1:
            return terms
        total = self._total()
        if total < _COMMON_COUNTED and len(terms) <= _MOST_TERMS:
            return terms
        counted = sorted((self._frequency(term), place, term) for place, term in enumerate(terms[: 10 * _MOST_TERMS]))
        found = [(count, term) for count, _, term in counted if count > 0][:_MOST_TERMS]
        return [term for count, term in found if count <= total * _COMMON] or [term for _, term in found[:1]]

    def _total(self) -> int:
        """`count`, which reads every page of ids, asked again only when somebody has written."""
        version = int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        key = (version, self._connection.total_changes)
        if self._counted is None or self._counted[0] != key:
            self._counted = key, self.count()
        return self._counted[1]

    def _frequency(self, term: str) -> int:
        row = self._connection.execute("SELECT count(*) FROM words WHERE words MATCH ?", (_match([term]),)).fetchone()
        return int(row[0])


def _match(terms: Sequence[str]) -> str:
    # In quotes nothing has a meaning; a term holds no quote, only letters, digits and marks.
    return " OR ".join(f'"{term}"' for term in terms)


def _make_keywords(connection: sqlite3.Connection) -> None:
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'words'").fetchone() is None:
        connection.executescript(f"BEGIN IMMEDIATE;{_KEYWORDS_SCHEMA}")
        connection.execute("INSERT INTO meta VALUES (?)", (_KEYWORDS_VERSION,))
        connection.execute("COMMIT")


def _check_all(connection: sqlite3.Connection) -> None:
    _check_keywords(connection)
    connection.execute("INSERT INTO words (words) VALUES ('integrity-check')")


def _check_keywords(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError unless the file is one of ours that this version reads."""
    row = connection.execute("SELECT version FROM meta").fetchone()
    if row is None or row[0] != _KEYWORDS_VERSION:
        raise sqlite3.DatabaseError(
            f"it has version {None if row is None else row[0]}, this epic-rag reads {_KEYWORDS_VERSION}"
        )
    connection.execute("SELECT rowid FROM words LIMIT 1").fetchone()
    connection.execute("SELECT number FROM chunks LIMIT 1").fetchone()


def _keywords_unavailable(path: Path, why: str) -> KeywordsUnavailableError:
    why = " ".join(why.split())[:120]
    return KeywordsUnavailableError(
        f"keyword search is not available: {path}: {why}; run `epic-rag index` to make it again, "
        "or search with --mode dense"
    )


def _keywords_unwritable(path: Path, error: Exception) -> IndexStateError:
    return IndexStateError(
        f"{path} cannot be written ({error}); check the folder's permissions and free space and run "
        "`epic-rag index` again"
    )
