"""Highlighting: the words of a text that match a query, as keyword search matches them (stems, no case, no accents)."""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Iterable
from contextlib import closing

from epic_rag_chroma.store.tokenizer import RUN, STOP_WORDS, UNSPACED_RUN, query_terms

__all__ = ["QueryWords", "Span"]

# The tokenizer of the keyword index, so that highlighted words are those that it matched.
_TOKENIZER = "porter unicode61 remove_diacritics 2"
_CAMEL = re.compile(r"[A-Z]+(?![^\W\dA-Z_])|[A-Z]?[^\W\dA-Z_]+|\d+")
_SHORTEST_PART = 2

Span = tuple[int, int]


class QueryWords:
    """Finds the words of a query in texts.

    Args:
        query: The query.
    """

    def __init__(self, query: str) -> None:
        terms = query_terms(query)
        if all(term in STOP_WORDS for term in terms):
            terms = []  # "what is it" is in nearly every sentence
        # In scripts without spaces any part of a run can match, in others whole words.
        self._sequences = {term for term in terms if UNSPACED_RUN.fullmatch(term)}
        self._stem_of: dict[str, str] = {}
        self._learn(terms)
        self._stems = {self._stem_of[term] for term in terms if term not in self._sequences}

    def __bool__(self) -> bool:
        return bool(self._stems or self._sequences)

    def find(self, text: str) -> list[tuple[Span, str]]:
        """Return spans of the query's words in `text`, in order, each with the stem or character pair that matches."""
        if not self:
            return []
        places = [(match.span(), match[0]) for match in RUN.finditer(text)]
        words = [(span, word) for span, word in places if not UNSPACED_RUN.match(word)]
        parts = {word: _parts(word) for _, word in words}
        self._learn(_folded(each) for _, word in words for each in (word, *(part for _, part in parts[word])))
        found: list[tuple[Span, str]] = []
        for span, word in places:
            if UNSPACED_RUN.match(word):
                found += self._in_run(span[0], word)
                continue
            stem = self._stem_of[_folded(word)]
            if stem in self._stems:
                found.append((span, stem))
                continue
            for (start, end), part in parts[word]:
                stem = self._stem_of[_folded(part)]
                if stem in self._stems:
                    found.append(((span[0] + start, span[0] + end), stem))
        return found

    def _in_run(self, start: int, run: str) -> list[tuple[Span, str]]:
        lengths = sorted({len(sequence) for sequence in self._sequences}, reverse=True)
        return [
            ((start + place, start + place + length), run[place : place + length])
            for place in range(len(run))
            for length in lengths
            if run[place : place + length] in self._sequences
        ]

    def _learn(self, words: Iterable[str]) -> None:
        new = sorted(set(words) - self._stem_of.keys())
        if new:
            self._stem_of.update(zip(new, _stems(new), strict=True))


def _folded(word: str) -> str:
    return unicodedata.normalize("NFKC", word).casefold()


def _parts(word: str) -> list[tuple[Span, str]]:
    found = [(match.span(), match[0]) for match in _CAMEL.finditer(word)]
    return [(span, part) for span, part in found if len(part) >= _SHORTEST_PART] if len(found) > 1 else []


def _stems(words: list[str]) -> list[str]:
    """Return the stem of each word by SQLite's tokenizer, which the keyword index uses."""
    try:
        with closing(sqlite3.connect(":memory:")) as database:
            database.execute(f"CREATE VIRTUAL TABLE words USING fts5 (word, tokenize = '{_TOKENIZER}')")
            database.execute("CREATE VIRTUAL TABLE stems USING fts5vocab (words, instance)")
            encoded = [(row, word.encode("utf-8", "replace").decode()) for row, word in enumerate(words)]
            database.executemany("INSERT INTO words (rowid, word) VALUES (?, ?)", encoded)
            stems: dict[int, str] = {}
            for row, stem in database.execute('SELECT doc, term FROM stems ORDER BY doc, "offset"'):
                stems[row] = stems.get(row, "") + stem
    except sqlite3.OperationalError:  # SQLite without FTS5; keyword search reports that
        return words
    return [stems.get(row, word) for row, word in enumerate(words)]
