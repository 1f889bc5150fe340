"""The expected gain of a bank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from epic_rag import DemonstrationBank
from epic_rag.bank_report import BankReport
from epic_rag.errors import BankError
from epic_rag.metrics import unit_rows
from epic_rag.reader import DemonstrationReader

Vectors = npt.NDArray[np.float32]


class GivenVectors:
    """An encoder of given vectors."""

    fingerprint = "given"
    strategy = "task-vector"
    reader = DemonstrationReader.universal()

    def __init__(self, pairs: Vectors) -> None:
        self.pairs = pairs

    def embed_demonstrations(self, bank: DemonstrationBank) -> Vectors:
        return self.pairs

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        return np.stack([self.pairs[int(text.split()[1]), 1] for text in texts])


def evaluate(pairs: Vectors, corpus: Any = None, **options: Any) -> BankReport:
    bank = DemonstrationBank([(f"q {row}", f"p {row}") for row in range(len(pairs))], instruction="Find it")
    return bank.evaluate(GivenVectors(pairs), corpus, **options)


def pairs_of(seed: int, n: int, *, shift: float, noise: float, dim: int = 16) -> Vectors:
    """Passages beside their queries, all in one direction."""
    chance = np.random.default_rng(seed)
    queries = chance.standard_normal((n, dim))
    passages = queries + shift * np.eye(dim)[0] + noise * chance.standard_normal((n, dim))
    return np.stack([unit_rows(queries.astype(np.float32)), unit_rows(passages.astype(np.float32))], axis=1)


def test_a_collection_that_holds_queries_too_shows_the_gain() -> None:
    pairs = pairs_of(0, 60, shift=4.0, noise=0.8)
    questions = unit_rows(np.random.default_rng(1).standard_normal((600, 16)).astype(np.float32))
    report = evaluate(pairs, questions)
    assert report.low > 0
    assert report.low <= report.gain <= report.high
    assert report.verdict == "It improves results."
    assert report.base < evaluate(pairs).base


def test_easy_pairs_leave_little_to_gain() -> None:
    report = evaluate(pairs_of(0, 40, shift=0.0, noise=0.05))
    assert report.base_recall == 1.0
    assert report.gain == pytest.approx(0.0, abs=1.0)
    assert report.verdict in ("Base recall@10 is 1.00: there is little to gain.", "It improves results.")


def test_wrong_pairs_are_named() -> None:
    pairs = pairs_of(0, 40, shift=1.0, noise=0.3, dim=48)
    pairs[[7, 21], 1] = pairs[[21, 7], 1]
    assert {7, 21} <= set(evaluate(pairs).misfits)
    assert len(evaluate(pairs).misfits) < 6


def test_passages_that_occur_again_are_the_same_answer() -> None:
    pairs = pairs_of(0, 40, shift=1.0, noise=0.3)
    alone = evaluate(pairs)
    again = evaluate(pairs, pairs[:, 1])
    assert again.gain == pytest.approx(alone.gain)
    assert again.base == pytest.approx(alone.base)


def test_no_query_is_moved_by_its_own_pair() -> None:
    """A reader that learns nothing but the pairs themselves gains nothing."""
    chance = np.random.default_rng(3)
    pairs = unit_rows(chance.standard_normal((80, 16)).astype(np.float32)).reshape(40, 2, 16)
    report = evaluate(pairs, strategy="reader")
    assert report.low < 5.0
    assert abs(report.gain) < 15.0


def test_what_cannot_be_measured() -> None:
    with pytest.raises(BankError, match="has 9 pairs"):
        evaluate(pairs_of(0, 9, shift=1.0, noise=0.3))
    with pytest.raises(BankError, match="have 20 dimensions"):
        evaluate(pairs_of(0, 12, shift=1.0, noise=0.3), np.eye(20, dtype=np.float32))


def test_a_corpus_of_texts_and_one_of_fewer_dimensions() -> None:
    pairs = pairs_of(0, 40, shift=1.0, noise=0.3)
    report = evaluate(pairs, [f"p {row}" for row in range(40)])
    assert (report.passages, report.gain) == (80, evaluate(pairs, pairs[:, 1]).gain)
    narrow = evaluate(pairs, unit_rows(pairs[:, 1, :8]))
    assert narrow.base == pytest.approx(evaluate(pairs, unit_rows(pairs[:, 1, :8])).base)
    assert narrow.base <= report.base


@pytest.mark.parametrize(
    ("low", "high", "recall", "verdict"),
    [
        (-3.0, -1.0, 0.5, "It makes results worse."),
        (1.0, 3.0, 0.99, "It improves results."),
        (-1.0, 1.0, 0.97, "Base recall@10 is 0.97: there is little to gain."),
        (-1.0, 1.0, 0.9, "No gain can be told from chance."),
    ],
)
def test_verdicts(low: float, high: float, recall: float, verdict: str) -> None:
    report = BankReport(20, 20, 50.0, recall, (low + high) / 2, low, high, (), ())
    assert report.verdict == verdict
    assert (report.harms, report.helps) == (high < 0, low > 0)


def test_repeated_pairs_are_listed() -> None:
    pairs = pairs_of(0, 12, shift=1.0, noise=0.3)
    texts = [(f"q {row % 10}", f"p {row % 10}") for row in range(12)]
    report = DemonstrationBank(texts).evaluate(GivenVectors(pairs))
    assert report.repeated == (10, 11)
