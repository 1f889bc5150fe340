"""Banks: their texts, their vectors, and the choice of k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag import (
    BankError,
    Demonstration,
    DemonstrationBank,
    EpicEncoder,
    FingerprintError,
    PromptError,
    get_task,
)
from epic_rag.demonstrations import SELECTIONS
from tests.helpers.banks import embedded

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True, database=None)
PAIRS = [
    ("how do I undo this", "To undo a step, press Ctrl+Z."),
    ("change the language", "Open Settings, then Language."),
    ("E1042 on startup", "The licence file could not be read."),
    ("naïve café 日本語 🙂", "zweite Passage\nwith a line break\u2028and another"),
]

text = st.text(min_size=1, max_size=30).filter(str.strip) | st.sampled_from(
    ["\ud800", "🙂", "\u2028x", '"\\', "x\r\ny"]
)
pairs = st.lists(st.tuples(text, text), max_size=5)


@pytest.fixture
def bank() -> DemonstrationBank:
    return DemonstrationBank(PAIRS, instruction="find the section")


@pytest.fixture
def built(bank: DemonstrationBank, tiny_encoder: EpicEncoder) -> DemonstrationBank:
    return embedded(bank, tiny_encoder)


def rows(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


# Making one


def test_pairs_and_demonstrations_are_the_same_thing() -> None:
    assert DemonstrationBank(PAIRS).demonstrations == tuple(Demonstration(*pair) for pair in PAIRS)
    assert (
        DemonstrationBank([Demonstration(*pair) for pair in PAIRS]).fingerprint == DemonstrationBank(PAIRS).fingerprint
    )
    assert len(DemonstrationBank([])) == 0


@pytest.mark.parametrize(
    "bad",
    [("a",), ("a", "b", "c"), ("a", ""), ("  ", "b"), ("a", 3), ("a", None), "ab", 7, None, Demonstration("a", "")],
)
def test_what_is_no_pair_is_named(bad: Any) -> None:
    with pytest.raises(BankError, match=r"Demonstration 2 is .*Pass \(query, passage\)"):
        DemonstrationBank([("a", "b"), bad])


def test_a_task_brings_its_instruction_and_symmetry() -> None:
    sts = DemonstrationBank(PAIRS, task="sts")
    assert (sts.instruction, sts.symmetric) == (get_task("sts").instruction, True)
    own = DemonstrationBank(PAIRS, task="sts", instruction="mine", symmetric=False)
    assert (own.instruction, own.symmetric) == ("mine", False)
    unknown = DemonstrationBank(PAIRS, task="a task of my own")
    assert (unknown.instruction, unknown.symmetric, unknown.task) == (None, False, "a task of my own")


def test_the_fingerprint_is_of_the_texts_and_not_of_the_vectors(
    bank: DemonstrationBank, tiny_encoder: EpicEncoder
) -> None:
    before = bank.fingerprint
    assert embedded(bank, tiny_encoder).fingerprint == before
    others = [
        DemonstrationBank(PAIRS, instruction="another"),
        DemonstrationBank(PAIRS),
        DemonstrationBank(PAIRS, instruction="find the section", symmetric=True),
        DemonstrationBank(PAIRS[::-1], instruction="find the section"),
        DemonstrationBank(PAIRS[:3], instruction="find the section"),
        DemonstrationBank([(passage, query) for query, passage in PAIRS], instruction="find the section"),
        DemonstrationBank([(PAIRS[0][0] + "how", PAIRS[0][1]), *PAIRS[1:]], instruction="find the section"),
    ]
    assert len({before, *(other.fingerprint for other in others)}) == 8
    assert repr(bank).startswith("DemonstrationBank(task=None, 4 demonstrations, embedded under ")
    assert repr(DemonstrationBank([])) == "DemonstrationBank(task=None, 0 demonstrations, not embedded)"


# Vectors


def test_require_refuses_a_bank_without_vectors(bank: DemonstrationBank, tiny_encoder: EpicEncoder) -> None:
    with pytest.raises(FingerprintError, match=r"embedded under None, .*Call bank\.embed\(encoder\)"):
        bank.embeddings_for(tiny_encoder.fingerprint)


def test_building_is_the_queries_zero_shot_and_the_passages_as_documents(
    built: DemonstrationBank, tiny_encoder: EpicEncoder
) -> None:
    assert built.embeddings is not None
    queries, passages = zip(*PAIRS, strict=True)
    np.testing.assert_allclose(
        built.embeddings[:, 0], tiny_encoder.encode_query(queries, instruction="find the section"), atol=1e-6
    )
    np.testing.assert_allclose(built.embeddings[:, 1], tiny_encoder.encode_document(passages), atol=1e-6)
    assert embedded(built, tiny_encoder) is built


def test_a_symmetric_bank_encodes_both_sides_as_queries(tiny_encoder: EpicEncoder) -> None:
    bank = embedded(DemonstrationBank(PAIRS, instruction="same meaning", symmetric=True), tiny_encoder)
    plain = embedded(DemonstrationBank(PAIRS, instruction="same meaning"), tiny_encoder)
    assert bank.embeddings is not None
    assert plain.embeddings is not None
    right = tiny_encoder.encode_query([passage for _, passage in PAIRS], instruction="same meaning")
    np.testing.assert_allclose(bank.embeddings[:, 1], right, atol=1e-6)
    np.testing.assert_allclose(bank.embeddings[:, 0], plain.embeddings[:, 0], atol=1e-6)
    assert np.abs(bank.embeddings[:, 1] - plain.embeddings[:, 1]).max() > 1e-2


# Picking k


@PROPERTY
@given(k=st.integers(0, 4), method=st.sampled_from(sorted({*SELECTIONS} - {"nearest-early"})), seed=st.integers(0, 5))
def test_a_choice_keeps_texts_and_vectors_together(tiny_encoder: EpicEncoder, k: int, method: Any, seed: int) -> None:
    built = embedded(DemonstrationBank(PAIRS, task="sts"), tiny_encoder)
    assert built.embeddings is not None
    chosen = built.select(k, method=method, seed=seed, query_embedding=built.embeddings[2, 0])
    assert len(chosen) == len(set(chosen.demonstrations)) == k
    assert (chosen.task, chosen.instruction, chosen.symmetric) == (built.task, built.instruction, built.symmetric)
    indices = [built.demonstrations.index(item) for item in chosen.demonstrations]
    np.testing.assert_array_equal(chosen.embeddings_for(tiny_encoder.fingerprint), built.embeddings[indices])
    again = built.select(k, method=method, seed=seed, query_embedding=built.embeddings[2, 0])
    assert again.demonstrations == chosen.demonstrations
    if method == "first":
        assert indices == list(range(k))
    if method == "diverse":
        assert indices[:1] == [0][:k]
    if method == "nearest":
        similarity = built.embeddings[:, 0] @ built.embeddings[2, 0]
        assert indices == [int(index) for index in np.argsort(-similarity)[:k]][::-1]
        assert indices[-1:] == [2][:k]  # beside the query


def test_a_random_choice_follows_its_seed(bank: DemonstrationBank) -> None:
    drawn = {seed: bank.select(2, method="random", seed=seed).demonstrations for seed in range(12)}
    assert len(set(drawn.values())) > 1
    assert {item for items in drawn.values() for item in items} == set(bank.demonstrations)


def test_a_diverse_choice_takes_the_farthest(bank: DemonstrationBank) -> None:
    queries = np.array([[1, 0], [0.99, 0.1], [0, 1], [-1, 0]], dtype=np.float32)
    bank.embeddings = np.stack([queries, queries[::-1]], axis=1)
    bank.encoder_fingerprint = "made by hand"
    chosen = [bank.demonstrations.index(item) for item in bank.select(4, method="diverse").demonstrations]
    assert chosen == [0, 3, 2, 1]


def test_a_choice_needs_no_vectors_unless_it_reads_them(bank: DemonstrationBank) -> None:
    assert bank.select(2).embeddings is None
    assert bank.select(2, method="random").embeddings is None
    with pytest.raises(BankError, match=r"Selection 'diverse' needs vectors.*Call bank\.embed\(encoder\)"):
        bank.select(2, method="diverse")
    with pytest.raises(BankError, match="Selection 'nearest' needs vectors"):
        bank.select(2, method="nearest", query_embedding=np.zeros(32, dtype=np.float32))


@pytest.mark.parametrize("k", [-1, 5])
def test_more_than_there_are_names_both_numbers(bank: DemonstrationBank, k: int) -> None:
    with pytest.raises(PromptError, match=f"{k} demonstrations requested, but the bank has 4. Use 0 to 4"):
        bank.select(k)


def test_a_choice_that_is_unknown_or_lacks_its_query(built: DemonstrationBank) -> None:
    with pytest.raises(PromptError, match=r"Unknown selection 'best'. Choose one of first, random, diverse, nearest"):
        built.select(1, method="best")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="needs query_embedding"):
        built.select(1, method="nearest")
    with pytest.raises(PromptError, match=r"has shape \(8,\), the bank's vectors have \(32,\)\. Encode one query"):
        built.select(1, method="nearest", query_embedding=np.zeros(8, dtype=np.float32))
