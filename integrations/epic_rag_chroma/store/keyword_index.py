"""Keyword index: BM25 over SQLite's FTS5, in the database of the index.

A chunk is stored as the terms that `tokenizer.py` makes of its text, its headings and the name of its file, and FTS5
ranks with BM25 (k1 = 1.2, b = 0.75). Words in order have columns of their own, so that phrases are exact; stems, parts
and wholes of compounds are in others. If another version of the tokenizer made the terms, the writer makes them again
from the chunks.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from epic_rag_chroma.errors import IndexStateError
from epic_rag_chroma.store.languages import ENGLISH, FUNCTION_WORDS
from epic_rag_chroma.store.tokenizer import (
    SPLIT_RUN,
    TERMS_VERSION,
    ParsedQuery,
    document_terms,
    language_of,
    parse_query,
    possible_options,
)

__all__ = [
    "KEYWORD_SCHEMA",
    "KEYWORD_VERSION",
    "MAX_VARIABLES",
    "KeywordIndex",
    "KeywordsUnavailableError",
    "Searched",
    "attainable_score",
    "term_weight",
]

MAX_VARIABLES = 900
"""Values in a statement: SQLite before 3.32 allows 999 variables."""
KEYWORD_VERSION = f"2.{TERMS_VERSION}"
# Terms are separated by spaces; all other characters that a term may have are part of it.
KEYWORD_SCHEMA = (
    "CREATE VIRTUAL TABLE keywords USING fts5 (name, headings, body, titles, parts, wholes, "
    "tokenize = \"ascii tokenchars '+#.-@$_/:\\&,'\");"
)
_WEIGHTS = "2.0, 2.0, 1.0, 2.0, 1.0, 0.5"
_BM25 = f"bm25(keywords, {_WEIGHTS})"
_IN_ORDER = "{name headings body}"
# Before the language of a chunk, which is stored as a term; no word begins with it.
_LANGUAGE = ":"
# A query is stemmed in the languages of at least this share of the chunks: a rare stem of another language would count
# more than the word itself.
_LANGUAGE_SHARE = 0.02
_MAX_TERMS = 100
_MOST_COUNTED = 10_000
# A term in more than this share of the chunks is dropped if a query has rarer ones: FTS5 gives a term in more than half
# of the chunks no weight, and every chunk with it would have to be scored.
_COMMON_SHARE = 0.5
# Up to this number of chunks, common terms are kept.
MIN_CHUNKS_TO_PRUNE = 2000


class KeywordsUnavailableError(IndexStateError):
    """The keyword index was made by another version of the tokenizer."""


class Searched(NamedTuple):
    """Searched fields of a chunk: the name of its file, the headings above it, and its text."""

    name: str
    headings: str
    text: str


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
        # Numbers of chunks with a term, of the version of the chunks that is counted.
        self._counted: tuple[str, dict[str, int]] = ("", {})

    def add(self, number: int, searched: Searched) -> None:
        """Add a chunk to the index."""
        stem, dot, _ = searched.name.rpartition(".")
        language = language_of(f"{searched.headings}\n{searched.text}")
        name = document_terms(stem if dot and stem else searched.name, language)
        headings = document_terms(searched.headings, language)
        body = document_terms(searched.text, language)
        # Terms of the name and the headings that are not in order; "vpnsetupmd" is the whole of "vpn-setup.md".
        titles = (
            name.parts,
            name.wholes,
            document_terms(searched.name, language).wholes,
            headings.parts,
            headings.wholes,
        )
        self._connection.execute(
            "INSERT INTO keywords (rowid, name, headings, body, titles, parts, wholes) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                number,
                name.sequence,
                headings.sequence,
                body.sequence,
                " ".join(dict.fromkeys(" ".join(titles).split())),
                body.parts if language == ENGLISH else f"{body.parts} {_LANGUAGE}{language}",
                body.wholes,
            ),
        )

    def delete(self, number: int) -> None:
        """Delete a chunk from the index."""
        self._connection.execute("DELETE FROM keywords WHERE rowid = ?", (number,))

    def clear(self) -> None:
        """Delete all chunks, and make the table as this version has it."""
        self._connection.execute("DROP TABLE IF EXISTS keywords")
        self._connection.execute(KEYWORD_SCHEMA)

    def languages(self) -> frozenset[str]:
        """Return the languages in Latin script of a noticeable share of the chunks, and English."""
        least = max(1.0, _LANGUAGE_SHARE * self._total())
        return frozenset((ENGLISH, *(each for each in FUNCTION_WORDS if self._frequency(_LANGUAGE + each) >= least)))

    def options(self, query: str) -> frozenset[str]:
        """Return the words of a query that begin with a dash and occur so in the chunks, such as "-rf"."""
        return frozenset(word for word in possible_options(query) if self._frequency(word.casefold()))

    def search(
        self,
        query: str | ParsedQuery,
        k: int,
        allowed: Collection[int] | None = None,
        *,
        languages: Collection[str] | None = None,
    ) -> list[tuple[str, float]]:
        """Return the k chunks with the highest BM25 scores.

        Args:
            query: A query; its phrases are required, and what it excludes is left out.
            k: Maximum number of chunks.
            allowed: Numbers of the chunks to search among; None for all.
            languages: Languages to stem the query in; None for those of the chunks.

        Returns:
            (id, BM25 score), best first; equal scores in the order of their ids. Chunks without a term of the query are
            left out.

        Raises:
            sqlite3.Error: If the database cannot be read.
        """
        parsed = self.parsed(query)
        terms = self._prune(self.terms(parsed, languages))
        if not terms or k < 1 or (allowed is not None and not len(allowed)):
            return []
        match = _match(terms)
        if parsed.has_syntax:
            match = self._restricted(parsed, f"({match})")
        select = (
            f"SELECT id, -{_BM25} AS score FROM keywords JOIN chunks ON number = keywords.rowid WHERE keywords MATCH ?"
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

    def parsed(self, query: str | ParsedQuery) -> ParsedQuery:
        """Return a query as parsed with the options that the chunks have."""
        return query if isinstance(query, ParsedQuery) else parse_query(query, self.options(query))

    def terms(self, query: ParsedQuery, languages: Collection[str] | None = None) -> list[str]:
        """Return the distinct terms that a query is searched by, of a very long one the first."""
        known = sorted(self.languages() if languages is None else languages)
        every = dict.fromkeys(term for word in query.words for term in word.terms(known))
        return list(islice(every, 10 * _MAX_TERMS))

    def restrict(self, query: ParsedQuery) -> tuple[frozenset[int] | None, frozenset[int]]:
        """Return the numbers of the chunks that have all phrases of a query (None: all), and of those it excludes."""
        required = excluded = None
        if query.phrases:
            required = " AND ".join(map(_phrase, query.phrases))
        if query.excluded:
            excluded = self._excluded(query)
        found = [
            frozenset(
                int(row[0])
                for row in self._connection.execute("SELECT rowid FROM keywords WHERE keywords MATCH ?", (match,))
            )
            for match in (required, excluded)
            if match is not None
        ]
        return found[0] if required is not None else None, found[-1] if excluded is not None else frozenset()

    def _restricted(self, query: ParsedQuery, match: str) -> str:
        match = " AND ".join((match, *map(_phrase, query.phrases)))
        return f"({match}) NOT ({self._excluded(query)})" if query.excluded else match

    def _excluded(self, query: ParsedQuery) -> str:
        languages = sorted(self.languages())
        alternatives = []
        for word in query.excluded:
            alternatives.append(_phrase(word.sequence))
            if len(word.sequence) == 1 and word.words:
                alternatives += [f'"{term}"' for term in word.terms(languages)]
        return " OR ".join(alternatives)

    def counts(self, terms: Sequence[str]) -> dict[str, int]:
        """Return the number of chunks with each term, of very many for the first ones."""
        return {term: self._frequency(term) for term in terms[:_MAX_TERMS]}

    def attainable(self, query: ParsedQuery) -> float:
        """Return the score of a chunk that has every word of a query; see `attainable_score`."""
        languages = self.languages()
        return attainable_score(query, languages, self.counts(self.terms(query, languages)), self._total())

    def match_term(self, term: str, numbers: Sequence[int]) -> list[tuple[str, float]]:
        """Return the BM25 scores for one term of those of the given chunks that have it, by their ids."""
        found: list[tuple[str, float]] = []
        for start in range(0, len(numbers), self._max_variables):
            some = numbers[start : start + self._max_variables]
            found += self._connection.execute(
                f"SELECT id, -{_BM25} FROM keywords JOIN chunks ON number = keywords.rowid "
                f"WHERE keywords MATCH ? AND +keywords.rowid IN ({','.join('?' * len(some))})",
                (_match([term]), *some),
            )
        return found

    def _best(self, match: str, k: int) -> list[tuple[str, float]] | None:
        """Return the k best chunks and look up only their ids; None if too many chunks share the last score.

        SQLite has to look up the ids of all matching chunks to break ties by id; here, a few more than k suffice.
        """
        scored = self._connection.execute(
            f"SELECT rowid, -{_BM25} AS score FROM keywords WHERE keywords MATCH ? ORDER BY score DESC LIMIT ?",
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
        total = self._total()
        if total < self._min_chunks_to_prune and len(terms) <= _MAX_TERMS:
            return terms
        counted = sorted((self._frequency(term), place, term) for place, term in enumerate(terms))
        found = [(count, term) for count, _, term in counted if count > 0][:_MAX_TERMS]
        return [term for count, term in found if count <= total * _COMMON_SHARE] or [term for _, term in found[:1]]

    def _total(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM chunks").fetchone()[0])

    def _frequency(self, term: str) -> int:
        (version,) = self._connection.execute("SELECT value FROM settings WHERE name = 'version'").fetchone()
        if self._counted[0] != version or len(self._counted[1]) > _MOST_COUNTED:
            self._counted = (version, {})
        counts = self._counted[1]
        if term not in counts:
            select = "SELECT count(*) FROM keywords WHERE keywords MATCH ?"
            counts[term] = int(self._connection.execute(select, (_match([term]),)).fetchone()[0])
        return counts[term]


def term_weight(total: int, count: int) -> float:
    """Return a term's weight as FTS5 computes it, from the numbers of all chunks and of those with the term."""
    return max(1e-6, math.log((total - count + 0.5) / (count + 0.5)))


def attainable_score(query: ParsedQuery, languages: Collection[str], counts: Mapping[str, int], total: int) -> float:
    """Return the BM25 score of a chunk of average length that has every word of a query once.

    Args:
        query: The query.
        languages: The languages that it is stemmed in.
        counts: The number of chunks with each of its terms.
        total: The number of all chunks.
    """
    score = 0.0
    for word in query.words:
        known = [count for term in word.terms(sorted(languages)) if (count := counts.get(term, 0))]
        score += sum(term_weight(total, count) for count in known) if known else term_weight(total, 0)
    return score


def _match(terms: Sequence[str]) -> str:
    # Quoted text has no syntax; a term contains no quote.
    return " OR ".join(f'"{term}"' for term in terms)


def _phrase(sequence: Sequence[str]) -> str:
    phrase = f'"{" ".join(sequence)}"'
    # A single character of Chinese and the like is no word in order.
    return phrase if len(sequence) == 1 and SPLIT_RUN.match(sequence[0]) else f"{_IN_ORDER} : {phrase}"
