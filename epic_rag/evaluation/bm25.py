"""BM25, the baseline without a model.

Scores are those of bm25s (Lù 2024, arXiv 2407.03618) as Lucene computes them, with k1 = 1.5 and b = 0.75, over
lower-case English word stems without stop words. `Bm25Index` ranks held-out files, which must not need mteb; evaluation
sets are ranked by mteb's baseline `mteb/baseline-bm25s`, which has the same settings.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from epic_rag.errors import MissingExtraError

__all__ = ["BM25_NAME", "Bm25Index", "bm25_fingerprint", "require_bm25"]

BM25_NAME = "bm25"
"""BM25's name as a model on the command line."""
K1 = 1.5
B = 0.75


def require_bm25() -> tuple[Any, Any]:
    """Return the modules bm25s and Stemmer.

    Raises:
        MissingExtraError: One of them is not installed.
    """
    os.environ.setdefault("DISABLE_TQDM", "1")  # bm25s reads it on import: mteb's baseline cannot hide its bars
    try:
        import bm25s  # type: ignore[import-untyped]
        import Stemmer  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtraError("bm25s", "eval", "the BM25 baseline") from error
    return bm25s, Stemmer


def bm25_fingerprint() -> str:
    """Return the library's version and the settings, which decide BM25's scores."""
    bm25s, _ = require_bm25()
    return f"bm25s-{bm25s.__version__}-lucene-{K1}-{B}-english"


class Bm25Index:
    """BM25 index of documents.

    Args:
        documents: Their texts.

    Raises:
        MissingExtraError: bm25s is not installed.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        bm25s, stemmer = require_bm25()
        self._tokenize = bm25s.tokenize
        self._stemmer = stemmer.Stemmer("english")
        self._documents = len(documents)
        tokens = self._tokens(documents)
        self._index: Any = None
        # bm25s divides by the mean length, which is 0 without a single word.
        if any(tokens):
            self._index = bm25s.BM25(k1=K1, b=B, method="lucene")
            self._index.index(tokens, show_progress=False)

    def _tokens(self, texts: Sequence[str]) -> list[list[str]]:
        found: list[list[str]] = self._tokenize(
            list(texts), stopwords="en", stemmer=self._stemmer, return_ids=False, show_progress=False
        )
        return found

    def scores(self, queries: Sequence[str]) -> Iterator[npt.NDArray[np.float32]]:
        """Yield for each query its score with each document: (m,) float32, -inf without a word in common."""
        for tokens in self._tokens(queries):
            known = self._index.get_tokens_ids(tokens) if self._index is not None else []
            scores = np.zeros(self._documents, dtype=np.float32)
            if len(known):
                scores = np.array(self._index.get_scores_from_ids(known), dtype=np.float32)
            scores[scores <= 0] = -np.inf
            yield scores

    def attainable(self, queries: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return for each query the score of a document of average length that has each of its words once."""
        counts = {} if self._index is None else self._index.scores
        known = {} if self._index is None else self._index.vocab_dict
        found = []
        for tokens in self._tokens(queries):
            score = 0.0
            for token in set(tokens):
                row = known.get(token)
                holding = 0 if row is None else int(counts["indptr"][row + 1] - counts["indptr"][row])
                score += math.log(1 + (self._documents - holding + 0.5) / (holding + 0.5)) / (1 + K1)
            found.append(score)
        return np.array(found)
