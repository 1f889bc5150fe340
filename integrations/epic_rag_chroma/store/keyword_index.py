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
    MAX_VARIABLES,
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
_MAX_TERMS = 100
# A term in more than this share of the chunks is dropped if a query has rarer ones: FTS5 gives a term in more than half
# of the chunks no weight, and every chunk with it would have to be scored.
_COMMON_SHARE = 0.5
# Up to this number of chunks, common terms are kept.
MIN_CHUNKS_TO_PRUNE = 2000

_KEYWORDS_SCHEMA = """
CREATE TABLE meta (version TEXT NOT NULL);
CREATE TABLE chunks (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, doc_id TEXT NOT NULL);
CREATE VIRTUAL TABLE words USING fts5 (terms, tokenize = 'porter unicode61 remove_diacritics 2');
"""


class KeywordsUnavailableError(IndexStateError):
    """The keyword index is missing or cannot be read."""


class KeywordIndex:
    """Keyword index of one collection.

    Made by `open` for writing or `open_reading`; must be closed. Not thread-safe.

    Args:
        connection: The open database.
        path: Its file.
        max_ids: Maximum number of ids in one statement.
        min_chunks_to_prune: From this number of chunks on, common terms of a query are dropped.

    Example:
        >>> keywords = KeywordIndex.open(Path("docs/.epic-rag"), collection_id)
        >>> keywords.upsert(["a"], ["Undo the last commit"], ["guide.md"])
        >>> keywords.search("undo a commit", 10)
        [('a', 0.9)]
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: Path,
        *,
        max_ids: int = MAX_VARIABLES,
        min_chunks_to_prune: int = MIN_CHUNKS_TO_PRUNE,
    ) -> None:
        self._max_ids = max_ids
        self._min_chunks_to_prune = min_chunks_to_prune
        self._connection = connection
        self._path = path
        self._counted: tuple[tuple[int, int], int] | None = None

    @classmethod
    def open(cls, index_dir: Path, collection_id: str, **limits: int) -> KeywordIndex:
        """Open the index of a collection for writing; start empty if it is missing, broken or of another version.

        Raises:
            IndexStateError: If the file can be neither read nor replaced (permissions, a full disk).
        """
        path = file_of(index_dir, _KEYWORDS, collection_id)
        try:
            return cls(open_writing(path, _make_keywords, _check_all), path, **limits)
        except (OSError, sqlite3.Error) as error:
            raise _keywords_unwritable(path, error) from error

    @classmethod
    def open_reading(cls, index_dir: Path, collection_id: str) -> KeywordIndex:
        """Open the index of a collection for searching. Writes nothing, and works in a read-only folder.

        Raises:
            KeywordsUnavailableError: If it is missing, broken or of another version.
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
        """Delete the indexes of all other collections; with None, of all collections."""
        delete_others(index_dir, _KEYWORDS, collection_id)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def count(self) -> int:
        """Return the number of chunks."""
        return int(self._connection.execute("SELECT count(*) FROM chunks").fetchone()[0])

    def ids(self) -> set[str]:
        """Return the ids of all chunks."""
        return {row[0] for row in self._connection.execute("SELECT id FROM chunks")}

    def upsert(self, ids: Sequence[str], texts: Sequence[str], doc_ids: Sequence[str]) -> None:
        """Write chunks, all or none; existing ones are replaced.

        Args:
            ids: The chunks' ids in the collection.
            texts: The text to search, with the headings above it.
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
        """Delete chunks, all or none; unknown ids are ignored.

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
            with suppress(sqlite3.Error):  # after a full disk SQLite has rolled back already
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                if is_broken(error):
                    self.close()
                    delete_database(self._path)  # so that the next run rebuilds it
                raise _keywords_unwritable(self._path, error) from error
            raise

    def search(self, query: str, k: int, allowed: Collection[str] | None = None) -> list[tuple[str, float]]:
        """Return the k chunks with the highest BM25 scores.

        Args:
            query: Any text; it has no special syntax.
            k: Maximum number of chunks.
            allowed: Ids to search among; None for all.

        Returns:
            (id, BM25 score), best first; equal scores in the order of their ids. Chunks without a term of the query are
            left out.

        Raises:
            KeywordsUnavailableError: If the file is broken.
        """
        try:
            terms = self._prune(query_terms(query))
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
            elif len(allowed) <= self._max_ids:
                # The plus keeps SQLite from querying FTS5 once for each number.
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
        """Return the k best chunks and look up only their ids; None if too many chunks share the last score.

        SQLite has to look up the ids of all matching chunks to break ties by id; here, a few more than k suffice.
        """
        scored = self._connection.execute(
            "SELECT rowid, -bm25(words) AS score FROM words WHERE words MATCH ? ORDER BY score DESC LIMIT ?",
            (match, k + self._max_ids),
        ).fetchall()
        if len(scored) == k + self._max_ids and scored[-1][1] == scored[k - 1][1]:
            return None
        last = scored[min(k, len(scored)) - 1][1] if scored else 0.0
        scores = {int(number): float(score) for number, score in scored if score >= last}
        found: list[tuple[str, float]] = []
        numbers = list(scores)
        for start in range(0, len(numbers), self._max_ids):
            some = numbers[start : start + self._max_ids]
            rows = self._connection.execute(
                f"SELECT number, id FROM chunks WHERE number IN ({','.join('?' * len(some))})", some
            )
            found += [(str(row_id), scores[int(number)]) for number, row_id in rows]
        return sorted(found, key=lambda row: (-row[1], row[0]))[:k]

    def _prune(self, terms: list[str]) -> list[str]:
        """Drop common terms, which make a search slow and hardly change its result."""
        if len(terms) == 1:
            return terms
        total = self._total()
        if total < self._min_chunks_to_prune and len(terms) <= _MAX_TERMS:
            return terms
        counted = sorted((self._frequency(term), place, term) for place, term in enumerate(terms[: 10 * _MAX_TERMS]))
        found = [(count, term) for count, _, term in counted if count > 0][:_MAX_TERMS]
        return [term for count, term in found if count <= total * _COMMON_SHARE] or [term for _, term in found[:1]]

    def _total(self) -> int:
        """Return `count()`, which reads all ids, cached until the next write."""
        version = int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        key = (version, self._connection.total_changes)
        if self._counted is None or self._counted[0] != key:
            self._counted = key, self.count()
        return self._counted[1]

    def _frequency(self, term: str) -> int:
        row = self._connection.execute("SELECT count(*) FROM words WHERE words MATCH ?", (_match([term]),)).fetchone()
        return int(row[0])


def _match(terms: Sequence[str]) -> str:
    # Quoted text has no syntax; a term contains only letters, digits and marks.
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
    """Raise sqlite3.DatabaseError unless this version can read the file."""
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
        f"Keyword search is not available: {path}: {why}. Run `epic-rag index` to rebuild it, "
        "or search with --mode dense."
    )


def _keywords_unwritable(path: Path, error: Exception) -> IndexStateError:
    return IndexStateError(
        f"{path} cannot be written ({error}). Stored data is intact: free disk space or fix permissions, then run "
        "`epic-rag index` again."
    )
