"""Keyword index: BM25 over SQLite's FTS5, in the database of the index.

A chunk is stored as the terms that `tokenizer.py` makes of it; FTS5 stems them (Porter) and ranks with BM25 (k1 = 1.2,
b = 0.75). If another version of the tokenizer made the terms, the writer makes them again from the chunks.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import Any

from epic_rag_chroma.errors import IndexStateError
from epic_rag_chroma.store.tokenizer import TERMS_VERSION, document_terms, query_terms

__all__ = ["KEYWORD_SCHEMA", "KEYWORD_VERSION", "MAX_VARIABLES", "KeywordIndex", "KeywordsUnavailableError"]

MAX_VARIABLES = 900
"""Values in a statement: SQLite before 3.32 allows 999 variables."""
KEYWORD_VERSION = f"1.{TERMS_VERSION}"
KEYWORD_SCHEMA = "CREATE VIRTUAL TABLE keywords USING fts5 (terms, tokenize = 'porter unicode61 remove_diacritics 2');"
_MAX_TERMS = 100
# A term in more than this share of the chunks is dropped if a query has rarer ones: FTS5 gives a term in more than half
# of the chunks no weight, and every chunk with it would have to be scored.
_COMMON_SHARE = 0.5
# Up to this number of chunks, common terms are kept.
MIN_CHUNKS_TO_PRUNE = 2000


class KeywordsUnavailableError(IndexStateError):
    """The keyword index was made by another version of the tokenizer."""


class KeywordIndex:
    """Keyword index over the chunks of a database; rows have the chunks' numbers. Not thread-safe.

    Args:
        connection: The open database.
        max_variables: Maximum number of values in one statement.
        min_chunks_to_prune: From this number of chunks on, common terms of a query are dropped.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        max_variables: int = MAX_VARIABLES,
        min_chunks_to_prune: int = MIN_CHUNKS_TO_PRUNE,
    ) -> None:
        self._connection = connection
        self._max_variables = max_variables
        self._min_chunks_to_prune = min_chunks_to_prune

    def add(self, number: int, text: str) -> None:
        """Add a chunk's text, with the headings above it, to the index."""
        self._connection.execute("INSERT INTO keywords (rowid, terms) VALUES (?, ?)", (number, document_terms(text)))

    def delete(self, number: int) -> None:
        """Delete a chunk from the index."""
        self._connection.execute("DELETE FROM keywords WHERE rowid = ?", (number,))

    def search(self, query: str, k: int, allowed: Collection[int] | None = None) -> list[tuple[str, float]]:
        """Return the k chunks with the highest BM25 scores.

        Args:
            query: Any text; it has no special syntax.
            k: Maximum number of chunks.
            allowed: Numbers of the chunks to search among; None for all.

        Returns:
            (id, BM25 score), best first; equal scores in the order of their ids. Chunks without a term of the query are
            left out.

        Raises:
            sqlite3.Error: If the database cannot be read.
        """
        terms = self._prune(query_terms(query))
        if not terms or k < 1 or (allowed is not None and not len(allowed)):
            return []
        match = _match(terms)
        select = (
            "SELECT id, -bm25(keywords) AS score FROM keywords JOIN chunks ON number = keywords.rowid "
            "WHERE keywords MATCH ?"
        )
        order = "ORDER BY score DESC, id LIMIT ?"
        rows: Iterable[tuple[Any, ...]]
        if allowed is None:
            best = self._best(match, k)
            rows = best if best is not None else self._connection.execute(f"{select} {order}", (match, k))
        elif len(allowed) <= self._max_variables:
            # The plus keeps SQLite from querying FTS5 once for each number.
            places = ",".join("?" * len(allowed))
            numbers = sorted(map(int, allowed))
            rows = self._connection.execute(f"{select} AND +keywords.rowid IN ({places}) {order}", (match, *numbers, k))
        else:
            known = frozenset(map(int, allowed))
            every = self._connection.execute(f"{select.replace('SELECT', 'SELECT number,', 1)} {order}", (match, -1))
            rows = islice(((row[1], row[2]) for row in every if row[0] in known), k)
        return [(str(row_id), float(score)) for row_id, score in rows]

    def counts(self, query: str) -> dict[str, int]:
        """Return the number of chunks with each term of a query, of a very long one with its first terms."""
        return {term: self._frequency(term) for term in query_terms(query)[:_MAX_TERMS]}

    def match_term(self, term: str, numbers: Sequence[int]) -> list[tuple[str, float]]:
        """Return the BM25 scores for one term of those of the given chunks that have it, by their ids."""
        found: list[tuple[str, float]] = []
        for start in range(0, len(numbers), self._max_variables):
            some = numbers[start : start + self._max_variables]
            found += self._connection.execute(
                "SELECT id, -bm25(keywords) FROM keywords JOIN chunks ON number = keywords.rowid "
                f"WHERE keywords MATCH ? AND +keywords.rowid IN ({','.join('?' * len(some))})",
                (_match([term]), *some),
            )
        return found

    def _best(self, match: str, k: int) -> list[tuple[str, float]] | None:
        """Return the k best chunks and look up only their ids; None if too many chunks share the last score.

        SQLite has to look up the ids of all matching chunks to break ties by id; here, a few more than k suffice.
        """
        scored = self._connection.execute(
            "SELECT rowid, -bm25(keywords) AS score FROM keywords WHERE keywords MATCH ? ORDER BY score DESC LIMIT ?",
            (match, k + self._max_variables),
        ).fetchall()
        if len(scored) == k + self._max_variables and scored[-1][1] == scored[k - 1][1]:
            return None
        last = scored[min(k, len(scored)) - 1][1] if scored else 0.0
        scores = {int(number): float(score) for number, score in scored if score >= last}
        found: list[tuple[str, float]] = []
        numbers = list(scores)
        for start in range(0, len(numbers), self._max_variables):
            some = numbers[start : start + self._max_variables]
            rows = self._connection.execute(
                f"SELECT number, id FROM chunks WHERE number IN ({','.join('?' * len(some))})", some
            )
            found += [(str(row_id), scores[int(number)]) for number, row_id in rows]
        return sorted(found, key=lambda row: (-row[1], row[0]))[:k]

    def _prune(self, terms: list[str]) -> list[str]:
        """Drop common terms, which make a search slow and hardly change its result."""
        if len(terms) == 1:
            return terms
        total = int(self._connection.execute("SELECT count(*) FROM chunks").fetchone()[0])
        if total < self._min_chunks_to_prune and len(terms) <= _MAX_TERMS:
            return terms
        counted = sorted((self._frequency(term), place, term) for place, term in enumerate(terms[: 10 * _MAX_TERMS]))
        found = [(count, term) for count, _, term in counted if count > 0][:_MAX_TERMS]
        return [term for count, term in found if count <= total * _COMMON_SHARE] or [term for _, term in found[:1]]

    def _frequency(self, term: str) -> int:
        row = self._connection.execute(
            "SELECT count(*) FROM keywords WHERE keywords MATCH ?", (_match([term]),)
        ).fetchone()
        return int(row[0])


def _match(terms: Sequence[str]) -> str:
    # Quoted text has no syntax; a term contains only letters, digits and marks.
    return " OR ".join(f'"{term}"' for term in terms)
