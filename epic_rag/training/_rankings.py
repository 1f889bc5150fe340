"""Scores of documents for queries, a block of queries at a time: BM25 over words, cosines over vectors.

A matrix of all queries and all documents of a large file would not fit memory; a block of it does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from epic_rag.errors import MissingExtraError

__all__ = ["Scores", "best", "blocks", "bm25_scorer", "cosine_scorer"]

Scores = npt.NDArray[np.float32]
Scorer = Callable[[range], Scores]

# 64 MB of float32; two methods hold one such block each.
_BLOCK_SCORES = 2**24
# Every word, one letter long or more, in any script that separates words. No stop words and no stemming: both would be
# one language's.
_WORD = re.compile(r"\w+")


def blocks(queries: int, documents: int) -> Iterator[range]:
    """Ranges of queries, each with at most 16 million scores against all documents.

    Args:
        queries: Number of queries.
        documents: Number of documents.
    """
    size = max(1, _BLOCK_SCORES // max(1, documents))
    for start in range(0, queries, size):
        yield range(start, min(start + size, queries))


def best(scores: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Positions of the highest scores, best first; equal scores in their order, -inf never.

    Args:
        scores: (documents,) of one query.
        count: How many at most.
    """
    found = np.flatnonzero(scores > -np.inf)
    if len(found) > count:
        values = scores[found]
        # Everything that ties with the last place stays in, so that the order below decides and not the partition.
        lowest = np.partition(values, len(values) - count)[len(values) - count]
        found = found[values >= lowest]
    order = np.lexsort((found, -scores[found]))[:count]
    result: npt.NDArray[np.intp] = found[order]
    return result


def cosine_scorer(queries: Scores, documents: Scores) -> Scorer:
    """Cosines of unit vectors.

    Args:
        queries: (n, dim).
        documents: (m, dim).

    Returns:
        A function from a block of queries to its (block, m) scores.
    """

    def score(block: range) -> Scores:
        result: Scores = queries[block.start : block.stop] @ documents.T
        return result

    return score


def bm25_scorer(queries: Sequence[str], documents: Sequence[str]) -> Scorer:
    """BM25 (k1 1.5, b 0.75, Lucene's idf) by bm25s.

    Args:
        queries: n texts.
        documents: m texts.

    Returns:
        A function from a block of queries to its (block, m) scores; -inf for a document that shares no word.

    Raises:
        MissingExtraError: If bm25s is not installed.
    """
    try:
        import bm25s  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("bm25s", "train", "mining with BM25") from error

    # Numbers instead of words: a list of strings for each document would take many times the texts' own memory.
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in _words(text)] for text in documents]
    index = bm25s.BM25()
    if vocabulary:
        index.index((ids, vocabulary), create_empty_token=False, show_progress=False)

    def score(block: range) -> Scores:
        out = np.full((len(block), len(documents)), -np.inf, dtype=np.float32)
        for row, query in enumerate(block):
            known = [vocabulary[word] for word in _words(queries[query]) if word in vocabulary]
            if known:
                scores = index.get_scores_from_ids(known)
                out[row] = np.where(scores > 0, scores, -np.inf)
        return out

    return score


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
