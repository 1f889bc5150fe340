"""The expected gain of a bank."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from epic_rag import DemonstrationBank
from epic_rag.bank_report import evaluate_bank
from epic_rag.demonstrations import unit_rows
from epic_rag.errors import BankError, FingerprintError
from epic_rag.reader import DemonstrationReader

Vectors = npt.NDArray[np.float32]


class GivenVectors:
    """An encoder of given vectors."""

    fingerprint = "given"

    def __init__(self, pairs: Vectors) -> None:
        self.pairs = pairs

    def embed_demonstrations(self, bank: DemonstrationBank) -> Vectors:
        return self.pairs


def bank_of(pairs: Vectors) -> DemonstrationBank:
    bank = DemonstrationBank([(f"q {row}", f"p {row}") for row in range(len(pairs))], instruction="Find it")
    bank.embed(GivenVectors(pairs))
    return bank


def pairs_of(seed: int, n: int, *, shift: float, noise: float, dim: int = 16) -> Vectors:
    """Passages beside their queries, all in one direction."""
    chance = np.random.default_rng(seed)
    queries = chance.standard_normal((n, dim))
    passages = queries + shift * np.eye(dim)[0] + noise * chance.standard_normal((n, dim))
    return np.stack([unit_rows(queries.astype(np.float32)), unit_rows(passages.astype(np.float32))], axis=1)


def test_a_collection_that_holds_queries_too_shows_the_gain() -> None:
    pairs = pairs_of(0, 60, shift=4.0, noise=0.8)
    questions = unit_rows(np.random.default_rng(1).standard_normal((600, 16)).astype(np.float32))
    report = evaluate_bank(bank_of(pairs), "given", corpus=questions)
    assert report.low > 0
    assert report.low <= report.gain <= report.high
    assert report.verdict == "It improves results."
    assert report.base < evaluate_bank(bank_of(pairs), "given").base


def test_easy_pairs_leave_little_to_gain() -> None:
    report = evaluate_bank(bank_of(pairs_of(0, 40, shift=0.0, noise=0.05)), "given")
    assert report.base_recall == 1.0
    assert report.gain == pytest.approx(0.0, abs=1.0)
    assert report.verdict in ("Base recall@10 is 1.00: there is little to gain.", "It improves results.")


def test_wrong_pairs_are_named() -> None:
    pairs = pairs_of(0, 40, shift=1.0, noise=0.3, dim=48)
    pairs[[7, 21], 1] = pairs[[21, 7], 1]
    assert {7, 21} <= set(evaluate_bank(bank_of(pairs), "given").misfits)
    assert len(evaluate_bank(bank_of(pairs), "given").misfits) < 6


def test_passages_that_occur_again_are_the_same_answer() -> None:
    pairs = pairs_of(0, 40, shift=1.0, noise=0.3)
    alone = evaluate_bank(bank_of(pairs), "given")
    again = evaluate_bank(bank_of(pairs), "given", corpus=pairs[:, 1])
    assert again.gain == pytest.approx(alone.gain)
    assert again.base == pytest.approx(alone.base)


def test_no_query_is_moved_by_its_own_pair() -> None:
    """A reader that learns nothing but the pairs themselves gains nothing."""
    chance = np.random.default_rng(3)
    pairs = unit_rows(chance.standard_normal((80, 16)).astype(np.float32)).reshape(40, 2, 16)
    report = evaluate_bank(bank_of(pairs), "given", reader=DemonstrationReader.universal())
    assert report.low < 5.0
    assert abs(report.gain) < 15.0


def test_what_cannot_be_measured() -> None:
    with pytest.raises(BankError, match="has 9 pairs"):
        evaluate_bank(bank_of(pairs_of(0, 9, shift=1.0, noise=0.3)), "given")
    with pytest.raises(FingerprintError):
        evaluate_bank(bank_of(pairs_of(0, 12, shift=1.0, noise=0.3)), "another")
