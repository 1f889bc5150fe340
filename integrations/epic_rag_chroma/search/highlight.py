"""Highlighting: the words of a text that match a query, as keyword search matches them (stems, no case, no accents)."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from epic_rag_chroma.store.languages import ENGLISH, STOP_WORDS, text_language
from epic_rag_chroma.store.tokenizer import Piece, normalize, parse_query, pieces

__all__ = ["QueryWords", "Span"]

Span = tuple[int, int]


class QueryWords:
    """Finds the words of a query in texts.

    Args:
        query: The query, with its syntax; words that it excludes are not found.
    """

    def __init__(self, query: str) -> None:
        self._words = parse_query(query).words
        if all(len(word.sequence) == 1 and word.sequence[0] in STOP_WORDS for word in self._words):
            self._words = ()  # "what is it" is in nearly every sentence
        self._own_language = text_language(query.casefold().split())

    def __bool__(self) -> bool:
        return bool(self._words)

    def find(self, text: str) -> list[tuple[Span, str]]:
        """Return spans of the query's words in `text`, in order, each with the term that matches."""
        if not self:
            return []
        normalized, places = _with_places(text)
        languages = sorted({ENGLISH, self._own_language, text_language(normalized.casefold().split())})
        wanted = {term for word in self._words for term in word.terms(languages)}
        found: list[tuple[Span, str]] = []
        for compound in pieces(normalized):
            for start, end, term in _matches(compound, wanted, languages):
                found.append(((places[start][0], places[end - 1][1]), term))
        return found


def _matches(piece: Piece, wanted: set[str], languages: list[str]) -> Iterator[tuple[int, int, str]]:
    """Yield the widest parts of a piece of text that match."""
    term = next((term for term in piece.terms(languages) if term in wanted), None)
    if term is not None:
        yield piece.start, piece.end, term
        return
    for part in piece.parts():
        yield from _matches(part, wanted, languages)


def _with_places(text: str) -> tuple[str, Sequence[Span]]:
    """Return the normalized text, and the span in `text` of each of its characters."""
    if text.isascii():
        return normalize(text), [(place, place + 1) for place in range(len(text))]
    clusters: list[str] = []
    for character in text:
        # Marks and characters without a picture belong to the letter before them.
        if clusters and not character.isascii() and unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf"):
            clusters[-1] += character
        else:
            clusters.append(character)
    normalized: list[str] = []
    places: list[Span] = []
    start = 0
    for cluster in clusters:
        shown = normalize(cluster)
        normalized.append(shown)
        places += [(start, start + len(cluster))] * len(shown)
        start += len(cluster)
    return "".join(normalized), places
