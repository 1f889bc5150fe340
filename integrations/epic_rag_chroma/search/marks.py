"""Marks: passages that are known to answer a query, or known not to, by the examples of a bank.

Demonstrations move every query by what all of them have in common. When the query of an example is asked again, its own
passage is known as well: passages of the bank's pairs with that query come first, those of its negatives come last, and
the other hits keep their order.

Queries are the same if they have the same words in the same order, regardless of case, punctuation at the ends of
words, articles, pronouns and auxiliary verbs. Cosines cannot decide it: the symptoms of "ataxia 31" and of "ataxia 34"
have 0.99 (`benchmarks/marks.py`). A chunk belongs to a passage if one has all words of the other in a row; so an
example outlives a new index with other chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from epic_rag_chroma.store.tokenizer import words
from epic_rag_chroma.types import Mark

if TYPE_CHECKING:
    from epic_rag import DemonstrationBank

__all__ = ["MarkedRanking", "Marks", "find_marks", "same_query_key"]

_FILLERS = frozenset(
    [
        *("a", "an", "the", "i", "we", "you", "my", "our", "your", "me", "us", "it", "please"),
        *("do", "does", "did", "can", "could", "should", "would", "will", "shall"),
    ]
)
_PUNCTUATION = ".,;:!?\"'\u2018\u2019\u201c\u201d\u2026\u3002\uff1f\uff01"
_MOST = 20
_NEAREST = 5
_PASSAGE_WORDS = 40
_LEAST_WORDS = 5


@dataclass(frozen=True)
class Marks:
    """Marked passages for one query.

    Attributes:
        right: Passages that answer it.
        wrong: Passages that do not.
    """

    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.right or self.wrong)


def same_query_key(query: str) -> tuple[str, ...]:
    """Return what same queries have in common: their words, or all of them if there are only fillers."""
    stripped = [word.strip(_PUNCTUATION) or word for word in query.casefold().split()]
    return tuple(word for word in stripped if word not in _FILLERS) or tuple(stripped)


def find_marks(query: str, bank: DemonstrationBank) -> Marks:
    """Return the marks of a query by a bank's pairs and negatives, the first ones of many."""
    key = same_query_key(query)
    right, wrong = (tuple(passages.get(key, ())[:_MOST]) for passages in _passages_by_key(bank))
    return Marks(right, wrong)


@lru_cache(maxsize=8)
def _passages_by_key(bank: DemonstrationBank) -> tuple[dict[tuple[str, ...], list[str]], ...]:
    """Return the passages of a bank's pairs and of its negatives by `same_query_key`."""
    found: tuple[dict[tuple[str, ...], list[str]], ...] = ({}, {})
    for passages, pairs in zip(found, (bank.demonstrations, bank.negatives), strict=True):
        for each in pairs:
            passages.setdefault(same_query_key(each.query), []).append(each.passage)
    return found


class MarkedRanking:
    """A ranking with the marked chunks moved to its ends.

    Args:
        marks: The marks of the query.
        texts: Returns the texts of chunks by their ids.
    """

    def __init__(self, marks: Marks, texts: Callable[[Sequence[str]], Mapping[str, str]]) -> None:
        self._marks = marks
        self._right = [_spaced(passage) for passage in marks.right]
        self._wrong = [_spaced(passage) for passage in marks.wrong]
        self._texts = texts
        self.marked: dict[str, Mark] = {}

    def reorder(
        self, ranking: Sequence[tuple[str, float]], match: Callable[[str, int], Iterable[tuple[str, float]]]
    ) -> list[tuple[str, float]]:
        """Return the ranking with right chunks first and wrong ones last; `marked` has their marks afterwards.

        Args:
            ranking: Ids and scores, best first.
            match: Returns the best chunks for words, to find right passages that the ranking lacks.
        """
        scores = dict(ranking)
        ids = list(scores)
        for passage in self._marks.right:
            ids += [row_id for row_id, _ in match(" ".join(passage.split()[:_PASSAGE_WORDS]), _NEAREST)]
        places: dict[str, int] = {}
        for row_id, text in self._texts(list(dict.fromkeys(ids))).items():
            spaced = _spaced(text)
            place = next((place for place, passage in enumerate(self._right) if _belongs(spaced, passage)), None)
            if place is not None:
                places[row_id] = place
                self.marked[row_id] = "right"
            elif any(_belongs(spaced, passage) for passage in self._wrong):
                self.marked[row_id] = "wrong"
        first = sorted(places, key=lambda row_id: (places[row_id], -scores.get(row_id, 0.0), row_id))
        others = [each for each in ranking if each[0] not in self.marked]
        last = [each for each in ranking if self.marked.get(each[0]) == "wrong"]
        return [*((row_id, scores.get(row_id, 0.0)) for row_id in first), *others, *last]


def _spaced(text: str) -> str:
    return f" {' '.join(words(text))} "


def _belongs(chunk: str, passage: str) -> bool:
    """Return whether a chunk and a passage, as words between spaces, are the same or one contains the other."""
    if chunk == passage:
        return bool(chunk.strip())
    shorter, longer = sorted((chunk, passage), key=len)
    return shorter.count(" ") > _LEAST_WORDS and shorter in longer
