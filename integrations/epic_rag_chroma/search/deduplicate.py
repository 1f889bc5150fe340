"""Near-duplicates: the same passage in several files, copies with another line break, versions of one page.

Two passages are the same for a reader if their words are equal, whatever white space, case and punctuation they have;
or if one is the other with a little added: at least nine in ten of their five-word sequences are shared, the one has
every word of the other, and no number and no negation was added. Where a word stands in the place of another, as in
two settings that are described alike, or a number in the place of another, as in two versions of a page, the passages
are different ones. Where a text is shorter than a sentence, the heading above it has to be the same as well: "Returns:
nothing" says little by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from epic_rag_chroma.store.tokenizer import words

__all__ = ["Passage", "distinct"]


_SHINGLE = 5
_OVERLAP = 0.9
_SENTENCE = 10
_NEGATIONS = frozenset(["cannot", "except", "neither", "never", "no", "none", "nor", "not", "unless", "without"])


@dataclass(frozen=True)
class Passage:
    """A text as it is compared with others.

    Args:
        text: The text.
        heading: The heading right above it.
    """

    text: str
    heading: str = ""
    _words: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _counts: Counter[str] = field(init=False, repr=False, compare=False)
    _shingles: frozenset[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        of_text = tuple(words(self.text))
        everything = (*words(self.heading), *of_text)
        ends = range(len(everything) - _SHINGLE + 1)
        object.__setattr__(self, "_words", of_text if len(of_text) >= _SENTENCE else everything)
        object.__setattr__(self, "_counts", Counter(everything))
        object.__setattr__(self, "_shingles", frozenset(hash(everything[at : at + _SHINGLE]) for at in ends))

    def resembles(self, other: Passage) -> bool:
        """Whether a reader who has seen one learns next to nothing from the other."""
        if self._words == other._words:
            # Without a word, as in a table of symbols, the characters have to be the same.
            return bool(self._words) or "".join(self.text.split()) == "".join(other.text.split())
        shared = len(self._shingles & other._shingles)
        if not shared or shared < _OVERLAP * (len(self._shingles) + len(other._shingles) - shared):
            return False
        more, fewer = sorted((self._counts, other._counts), key=Counter.total, reverse=True)
        added = more - fewer
        return not fewer - more and not any(word in _NEGATIONS or _has_digit(word) for word in added)


def _has_digit(word: str) -> bool:
    return any(character.isdigit() for character in word)


def distinct(passages: Sequence[Passage], kept: Sequence[Passage] = ()) -> list[int | None]:
    """Tell which passages repeat an earlier one.

    Args:
        passages: In order.
        kept: Distinct passages that came before.

    Returns:
        For each passage None, or the number of the first one that it resembles among the distinct ones: those in
        `kept` first, then those of `passages` that have None, in order.
    """
    known = list(kept)
    found: list[int | None] = []
    for passage in passages:
        same = next((number for number, other in enumerate(known) if passage.resembles(other)), None)
        if same is None:
            known.append(passage)
        found.append(same)
    return found
