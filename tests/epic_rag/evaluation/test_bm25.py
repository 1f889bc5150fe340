from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from epic_rag.errors import MissingExtraError
from epic_rag.evaluation.bm25 import Bm25Index, bm25_fingerprint


def _scores(documents: list[str], *queries: str) -> list[list[float]]:
    return [scores.tolist() for scores in Bm25Index(documents).scores(queries)]


def test_scores_by_hand() -> None:
    # Three documents of 2, 1 and 3 words, so 2 on average; "apple" is in two of them, "pear" in one.
    documents = ["apple pear", "apple", "plum cherry grape"]

    def part(frequency: int, found_in: int, length: int) -> float:
        rarity = math.log(1 + (3 - found_in + 0.5) / (found_in + 0.5))
        return rarity * frequency / (frequency + 1.5 * (1 - 0.75 + 0.75 * length / 2))

    (scores,) = _scores(documents, "apples and a pear")  # stems, and no stop words
    assert scores == pytest.approx([part(1, 2, 2) + part(1, 1, 2), part(1, 2, 1), -np.inf], abs=1e-6)


@pytest.mark.parametrize(
    ("documents", "query"), [(["apple"], "pear"), (["apple"], "the"), (["apple"], ""), (["", "the"], "apple")]
)
def test_nothing_in_common(documents: list[str], query: str) -> None:
    assert _scores(documents, query) == [[-np.inf] * len(documents)]


def test_fingerprint() -> None:
    assert bm25_fingerprint().startswith("bm25s-0.")


@pytest.mark.parametrize("package", ["bm25s", "Stemmer"])
def test_missing_packages_name_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"BM25 baseline needs bm25s.*epic-rag\[eval\]"):
        Bm25Index(["x"])
