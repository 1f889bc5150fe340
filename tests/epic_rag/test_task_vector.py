"""Demonstrations as one vector that moves the query."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_rag import CheckpointError, DemonstrationBank, EpicEncoder
from epic_rag.errors import PromptError
from epic_rag.metrics import unit_rows
from epic_rag.task_vector import apply_task_vector, task_vector
from tests.conftest import make_encoder
from tests.helpers.banks import embedded
from tests.helpers.families import INSTRUCTION, TEXTS

PAIRS = [("question about the fox", "one"), ("def encode(texts)", "two"), ("hello hello", "three")]


def pairs_of(seed: int, k: int, noise: float, dim: int = 32) -> np.ndarray:
    """Passages near their queries, and all of them beside these in one direction."""
    chance = np.random.default_rng(seed)
    queries = chance.standard_normal((k, dim))
    passages = queries + noise * chance.standard_normal((k, dim)) + chance.standard_normal(dim)
    stacked = np.stack([unit_rows(queries.astype(np.float32)), unit_rows(passages.astype(np.float32))], axis=1)
    return np.asarray(stacked, dtype=np.float32)


def test_the_shift_is_that_from_queries_read_as_documents() -> None:
    pairs = pairs_of(3, 8, 0.3)
    other = pairs_of(4, 8, 0.3)[:, 0]
    expected = task_vector(pairs) + 0.7 * 8 / 10 * (pairs[:, 0] - other).mean(axis=0)
    found = task_vector(np.concatenate([pairs, other[:, None]], axis=1))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("k", [2, 3, 8, 40])
def test_the_formula(k: int) -> None:
    pairs = pairs_of(k, k, 0.9).astype(np.float64)
    own = [float(query @ passage) for query, passage in pairs]
    other = [float(pairs[i, 0] @ pairs[j, 1]) for i in range(k) for j in range(k) if i != j]
    z = (np.mean(own) - np.mean(other)) / max(np.std(other), 0.05) * k**0.5
    sure = min(max((z - 2) / 2, 0), 1)
    expected = 0.7 * k / (k + 2) * sure * np.mean([passage - query for query, passage in pairs], axis=0)
    assert sure > 0
    np.testing.assert_allclose(task_vector(pairs.astype(np.float32)), expected, atol=1e-6)


def test_one_demonstration_is_taken_as_it_is() -> None:
    pairs = pairs_of(1, 1, 5.0)
    np.testing.assert_allclose(task_vector(pairs), 0.7 / 3 * (pairs[0, 1] - pairs[0, 0]), atol=1e-6)


@pytest.mark.parametrize("k", [4, 8, 16])
def test_passages_that_fit_other_queries_as_well_say_nothing(k: int) -> None:
    pairs = pairs_of(k, k, 0.5)
    shuffled = np.stack([pairs[:, 0], np.roll(pairs[:, 1], 1, axis=0)], axis=1)
    assert np.linalg.norm(task_vector(pairs)) > 0.1
    assert not task_vector(shuffled).any()


def test_a_label_that_is_shown_twice_is_no_other_passage() -> None:
    pairs = np.repeat(pairs_of(3, 2, 0.5), 2, axis=0)
    cosines = pairs[:, 0] @ pairs[:, 1].T
    chance = np.concatenate([cosines[:2, 2:].ravel(), cosines[2:, :2].ravel()])
    z = (np.diag(cosines).mean() - chance.mean()) / max(chance.std(), 0.05) * 2
    expected = 0.7 * 4 / 6 * np.clip((z - 2) / 2, 0, 1) * (pairs[:, 1] - pairs[:, 0]).mean(axis=0)
    np.testing.assert_allclose(task_vector(pairs), expected, atol=1e-6)
    same = pairs.copy()
    same[:, 1] = same[0, 1]
    np.testing.assert_allclose(task_vector(same), 0.7 * 4 / 6 * (same[:, 1] - same[:, 0]).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_answers_to_one_query_confirm_each_other(count: int) -> None:
    pairs = pairs_of(8, count, 2.0)
    pairs[:, 0] = pairs[0, 0]
    expected = 0.7 * count / (count + 2) * (pairs[:, 1] - pairs[:, 0]).mean(axis=0)
    np.testing.assert_allclose(task_vector(pairs), expected, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 20), st.floats(0.1, 3.0), st.randoms(use_true_random=False))
def test_order_says_nothing_and_length_is_bounded(seed: int, k: int, noise: float, random: Any) -> None:
    pairs = pairs_of(seed, k, noise)
    order = list(range(k))
    random.shuffle(order)
    vector = task_vector(pairs)
    assert vector.dtype == np.float32
    np.testing.assert_allclose(task_vector(pairs[order]), vector, atol=1e-5)
    assert np.linalg.norm(vector) <= 0.7 * k / (k + 2) * 2 + 1e-6


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_shifted_queries_are_unit_vectors(seed: int, count: int) -> None:
    pairs = pairs_of(seed, 6, 0.5)
    queries = unit_rows(np.random.default_rng(seed).standard_normal((count, 32)).astype(np.float32))
    found = apply_task_vector(queries, [pairs] * count)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found, unit_rows(queries + task_vector(pairs)), atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_an_encoder_adds_the_task_vector(causal: bool) -> None:
    encoder = make_encoder(causal=causal)
    bank = embedded(DemonstrationBank(PAIRS, instruction=INSTRUCTION), encoder)
    zero = encoder.encode_query(TEXTS, instruction=INSTRUCTION)
    found = encoder.encode_query(TEXTS, bank=bank, strategy="task-vector")
    np.testing.assert_allclose(
        found, unit_rows(zero + task_vector(bank.embeddings_for(encoder.fingerprint))), atol=1e-5
    )
    one = encoder.encode_query(TEXTS[0], bank=bank, num_demonstrations=1, strategy="task-vector")
    expected = unit_rows(zero[:1] + task_vector(bank.embeddings_for(encoder.fingerprint)[:1]))[0]
    np.testing.assert_allclose(one, expected, atol=1e-5)
    assert np.abs(one - zero[0]).max() > 1e-3
    narrow = encoder.encode_query(TEXTS, bank=bank, strategy="task-vector", truncate_dim=8)
    np.testing.assert_allclose(narrow, unit_rows(found[:, :8]), atol=1e-5)
    none = encoder.encode_query(TEXTS, bank=bank, num_demonstrations=0, strategy="task-vector")
    np.testing.assert_allclose(none, zero, atol=1e-6)


@pytest.mark.parametrize("selection", ["first", "nearest"])
def test_each_query_uses_its_own_selection(tiny_encoder: EpicEncoder, selection: Any) -> None:
    bank = embedded(DemonstrationBank(PAIRS, instruction=INSTRUCTION), tiny_encoder)
    zero = tiny_encoder.encode_query(TEXTS, instruction=INSTRUCTION)
    found = tiny_encoder.encode_query(
        TEXTS, bank=bank, num_demonstrations=1, selection=selection, strategy="task-vector"
    )
    chosen = tiny_encoder.select_demonstrations(TEXTS, bank, 1, selection=selection)
    for vector, query, own in zip(found, zero, chosen, strict=True):
        shift = task_vector(own.embeddings_for(tiny_encoder.fingerprint))
        np.testing.assert_allclose(vector, unit_rows((query + shift)[None])[0], atol=1e-5)


def test_any_number_of_demonstrations(caplog: pytest.LogCaptureFixture) -> None:
    encoder = make_encoder()
    encoder.config.max_demonstrations = 2
    bank = embedded(DemonstrationBank([(f"hello {n}", f"{n} there") for n in range(30)]), encoder)
    everything = encoder.encode_query(TEXTS, bank=bank, strategy="task-vector")
    np.testing.assert_array_equal(
        everything, encoder.encode_query(TEXTS, bank=bank, num_demonstrations=30, strategy="task-vector")
    )
    assert not caplog.records
    with pytest.raises(PromptError, match="31 demonstrations requested, but the bank has 30"):
        encoder.encode_query(TEXTS, bank=bank, num_demonstrations=31, strategy="task-vector")


def test_a_checkpoint_has_its_own_strategy(tmp_path: Path) -> None:
    encoder = make_encoder()
    assert encoder.strategy == "epic"
    bank = embedded(DemonstrationBank(PAIRS, instruction=INSTRUCTION), encoder)
    prompted = encoder.encode_query(TEXTS, bank=bank)
    encoder.config.strategy = "task-vector"
    encoder.save_pretrained(tmp_path)
    loaded = EpicEncoder.from_pretrained(tmp_path)
    assert loaded.strategy == "task-vector"
    assert loaded.fingerprint == encoder.fingerprint  # documents are encoded as before
    moved_queries = loaded.encode_query(TEXTS, bank=bank)
    np.testing.assert_allclose(moved_queries, encoder.encode_query(TEXTS, bank=bank, strategy="task-vector"), atol=1e-5)
    assert np.abs(moved_queries - prompted).max() > 1e-3
    np.testing.assert_allclose(loaded.encode_query(TEXTS, bank=bank, strategy="epic"), prompted, atol=1e-5)

    file = tmp_path / "epic.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "strategy": "magic"}))
    with pytest.raises(CheckpointError, match=r"Unknown strategy 'magic' in epic\.json"):
        EpicEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["code", "commands"])
def test_the_shipped_checkpoint_reads_what_is_wanted(name: str) -> None:
    """Among other questions, too: what is most like a question is another question, not its answer."""
    encoder = EpicEncoder.from_pretrained("epic-minilm")
    assert encoder.strategy == "reader"
    bank = DemonstrationBank.load(name)
    asked = bank.demonstrations[8:]
    shown = bank.demonstrations[:8]
    wrong = [(item.query, shown[(at + 1) % 8].passage) for at, item in enumerate(shown)]
    queries = [item.query for item in asked]
    answers = encoder.encode_document([item.passage for item in asked])
    others = encoder.encode_document(queries)

    def lead(vectors: np.ndarray) -> float:
        """By how much the answer scores above the best of the other queries, on average."""
        cosines = vectors @ others.T
        np.fill_diagonal(cosines, -1)
        return float(((vectors * answers).sum(axis=1) - cosines.max(axis=1)).mean())

    zero = encoder.encode_query(queries, instruction=bank.instruction)
    assert lead(encoder.encode_query(queries, bank=bank, num_demonstrations=8)) > lead(zero) + 0.01
    shuffled = DemonstrationBank(wrong, instruction=bank.instruction)
    np.testing.assert_allclose(encoder.encode_query(queries, bank=shuffled), zero, atol=1e-5)


def test_evaluation_says_how_demonstrations_were_shown() -> None:
    from epic_rag.evaluation.report import ModelRecord, _column_title

    record = ModelRecord("m", "runs/m", "abc", 8, False, 256, 256, "cpu", "float32", strategy="task-vector")
    assert [_column_title(record, k) for k in (0, 8)] == ["m, k = 0", "m, k = 8, task-vector"]
    assert _column_title(dataclasses.replace(record, strategy="epic"), 8) == "m, k = 8"
