"""Near-duplicate detection: copies of a chunk with other line breaks or a little more text.

Two texts are near-duplicates if their words are equal, regardless of white space, case and punctuation; or if one is
the other with a little added: at least 90% of their five-word shingles are shared, one has every word of the other, and
neither a number nor a negation was added. Texts in which a word or a number is replaced (settings described alike,
versions of a page) differ. For texts shorter than a sentence the heading above must be equal, too: "Returns: nothing"
means little by itself.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property

from epic_rag_chroma.store.tokenizer import words

__all__ = ["ComparedText"]

_SHINGLE = 5
_OVERLAP = 0.9
_SENTENCE = 10
_NEGATIONS = frozenset(["cannot", "except", "neither", "never", "no", "none", "nor", "not", "unless", "without"])


class ComparedText:
    """A text prepared for comparison.

    Args:
        text: The text.
        heading: The heading right above it.
    """

    def __init__(self, text: str, heading: str = "") -> None:
        self._text = text
        own = tuple(words(text))
        self._everything = (*words(heading), *own)
        self._words = own if len(own) >= _SENTENCE else self._everything
        self._distinct = frozenset(self._everything)

    @cached_property
    def _counts(self) -> Counter[str]:
        return Counter(self._everything)

    @cached_property
    def _shingles(self) -> frozenset[int]:
        ends = range(len(self._everything) - _SHINGLE + 1)
        return frozenset(hash(self._everything[start : start + _SHINGLE]) for start in ends)

    def is_near_duplicate(self, other: ComparedText) -> bool:
        """Return whether a reader of one learns next to nothing from the other."""
        if self._words == other._words:
            # Texts without words, such as tables of symbols, are compared by character.
            return bool(self._words) or "".join(self._text.split()) == "".join(other._text.split())
        if not (self._distinct <= other._distinct or self._distinct >= other._distinct):
            return False  # neither has every word of the other; this decides most pairs
        shared = len(self._shingles & other._shingles)
        if not shared or shared < _OVERLAP * (len(self._shingles) + len(other._shingles) - shared):
            return False
        more, fewer = sorted((self._counts, other._counts), key=Counter.total, reverse=True)
        added = more - fewer
        return not fewer - more and not any(word in _NEGATIONS or any(map(str.isdigit, word)) for word in added)
