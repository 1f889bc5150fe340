"""The reader of demonstrations: its formula, its invariances, wrong pairs, and its place in an encoder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag import CheckpointError, DemonstrationBank, EpicEncoder
from epic_rag.metrics import unit_rows
from epic_rag.reader import (
    FEATURES,
    KNOTS,
    READER_FILE,
    DemonstrationReader,
    Evidence,
    PreparedDemonstrations,
    QueryRange,
    prepare_features,
)
from tests.conftest import make_encoder

Vectors = npt.NDArray[np.float32]
WORDS = ("install", "quick brown fox", "def encode(texts)", "# Heading", "cats watch", "42", "virtual environment")
BANK = DemonstrationBank([(word, f"{word} {word}") for word in WORDS], instruction="Find it", symmetric=True)
"""Pairs that a random encoder takes for pairs, too."""
UNIVERSAL = DemonstrationReader.universal()


def pairs_of(seed: int, n: int, noise: float = 0.6, dim: int = 32) -> Vectors:
    """Passages that are rotated queries, beside all of them in one direction, with noise."""
    chance = np.random.default_rng(seed)
    rotation, shift = np.linalg.qr(chance.standard_normal((dim, dim)))[0], chance.standard_normal(dim)
    queries = chance.standard_normal((n, dim))
    passages = queries + 0.5 * queries @ rotation + shift + noise * chance.standard_normal((n, dim))
    return np.stack([unit_rows(queries.astype(np.float32)), unit_rows(passages.astype(np.float32))], axis=1)


def with_gains(**gains: float) -> DemonstrationReader:
    """A reader with the same gain at every knot for the named features, 0 for all others."""
    table = np.zeros((len(FEATURES), len(KNOTS)))
    for name, gain in gains.items():
        table[FEATURES.index(name.replace("_", "-"))] = gain
    return DemonstrationReader(table)


def test_the_mean_alone_is_a_shift() -> None:
    pairs = pairs_of(0, 12)
    _, evidence = prepare_features(pairs)
    prepared = with_gains(mean=0.5).prepare(pairs)
    order = np.argsort(pairs[:, 0, 0])
    weights = np.empty(12)
    # Weights come in the reader's own order of the pairs.
    by_fit = Evidence.of(pairs[order, 0], pairs[order, 1])
    weights[order] = by_fit.weights
    assert evidence.confidence == 1.0
    expected = 0.5 * np.mean(weights[:, None] * (pairs[:, 1] - pairs[:, 0]), axis=0)
    np.testing.assert_allclose(prepared.apply(pairs[:3, 0]), unit_rows(pairs[:3, 0] + expected), atol=1e-5)


def test_the_ridge_map_is_a_weighted_least_squares_fit() -> None:
    pairs = pairs_of(1, 60)
    features, evidence = prepare_features(pairs)
    order = np.lexsort(np.concatenate([pairs[:, 0, :8], pairs[:, 1, :8]], axis=1).T)
    queries, passages = pairs[order, 0].astype(np.float64), pairs[order, 1].astype(np.float64)
    weights = evidence.weights.astype(np.float64)
    centred = queries - (weights[:, None] * queries).mean(axis=0)
    target = passages - queries - (weights[:, None] * (passages - queries)).mean(axis=0)
    scale = float((weights * (centred**2).sum(axis=1)).mean())
    # Rows for the penalty turn ridge regression into least squares.
    rows = np.concatenate([np.sqrt(weights)[:, None] * centred, np.sqrt(4.0 * scale) * np.eye(32)])
    right = np.concatenate([np.sqrt(weights)[:, None] * target, np.zeros((32, 32))])
    expected = np.linalg.lstsq(rows, right, rcond=None)[0]
    np.testing.assert_allclose(features.maps[FEATURES.index("ridge-4") - 2], expected, atol=1e-4)


def test_the_map_brings_queries_nearer_to_passages_than_a_shift() -> None:
    pairs = pairs_of(2, 400)
    shown, asked = pairs[:300], pairs[300:]
    features, _ = prepare_features(shown)

    def cosine(queries: Vectors) -> float:
        return float(np.einsum("nd,nd->n", unit_rows(queries), asked[:, 1]).mean())

    shifted = asked[:, 0] + 0.7 * features.mean
    mapped = shifted + (asked[:, 0] - features.middle) @ features.maps[FEATURES.index("ridge-4") - 2]
    assert cosine(shifted) > cosine(asked[:, 0]) + 0.02
    assert cosine(mapped) > cosine(shifted) + 0.02
    assert cosine(UNIVERSAL.prepare(shown).apply(asked[:, 0])) > cosine(asked[:, 0]) + 0.02


def test_gains_adapt_to_a_bank_from_sixteen_pairs_on() -> None:
    pairs = pairs_of(2, 400)
    asked = pairs[300:]

    def margin(queries: Vectors) -> float:
        cosines = queries @ asked[:, 1].T
        return float(cosines.diagonal().mean() - cosines.mean())

    # A prior without any gain stays where it is for few pairs, and learns from many.
    none = with_gains()
    np.testing.assert_allclose(none.prepare(pairs[:15]).apply(asked[:, 0]), asked[:, 0], atol=1e-5)
    assert margin(none.prepare(pairs[:300]).apply(asked[:, 0])) > margin(asked[:, 0]) + 0.02


def test_a_bank_that_teaches_nothing_keeps_gains_near_the_prior() -> None:
    chance = np.random.default_rng(3)
    queries = chance.standard_normal((120, 32))
    passages = queries + 0.3 * chance.standard_normal((120, 32))  # no direction in common
    pairs = np.stack([unit_rows(side.astype(np.float32)) for side in (queries, passages)], axis=1)
    features, _ = prepare_features(pairs)
    assert features.left_out is not None
    assert np.abs(features.left_out.adapt(np.zeros(len(FEATURES), dtype=np.float32))).max() < 0.5


def test_adapted_gains_lower_the_objective() -> None:
    features, _ = prepare_features(pairs_of(7, 80))
    assert features.left_out is not None
    prior = UNIVERSAL.gains_for(80)
    value, slope, curvature = features.left_out.objective(prior.astype(np.float64))
    assert features.left_out.objective(features.left_out.adapt(prior).astype(np.float64))[0] < value
    assert np.linalg.eigvalsh(curvature).min() > -1e-4
    for place in range(len(FEATURES)):
        step = np.zeros(len(FEATURES))
        step[place] = 0.02
        change = features.left_out.objective(prior + step)[0] - features.left_out.objective(prior - step)[0]
        assert change / 0.04 == pytest.approx(slope[place], abs=2e-3)


def test_left_out_demonstrations_are_moved_by_the_others_alone() -> None:
    pairs = pairs_of(8, 60)
    pairs = pairs[np.lexsort(np.concatenate([pairs[:, 0, :8], pairs[:, 1, :8]], axis=1).T)]
    features, _ = prepare_features(pairs)
    assert features.left_out is not None
    for row in (0, 20, 45):
        rest, evidence = prepare_features(np.delete(pairs, row, axis=0))
        query, passage = pairs[row]
        directions = np.stack([rest.mean, -rest.middle, *((query - rest.middle) @ each for each in rest.maps)])
        np.testing.assert_allclose(features.left_out.own[row, 1:], directions @ passage, atol=0.02)
        assert evidence.confidence == 1.0


def test_repeated_pairs_are_not_left_out() -> None:
    pairs = pairs_of(9, 30)
    once, _ = prepare_features(pairs)
    assert once.left_out is not None
    assert len(once.left_out.own) == 30
    twice, _ = prepare_features(np.concatenate([pairs, pairs]))
    assert twice.left_out is None  # what the copy says about its pair would look like a gain
    some, _ = prepare_features(np.concatenate([pairs, pairs[:10]]))
    assert some.left_out is not None
    assert len(some.left_out.own) == 20


def test_queries_of_another_task_stay_where_they_are() -> None:
    pairs = pairs_of(10, 60)
    pairs[:, 0] = unit_rows(pairs[:, 0] + 0.5 * np.eye(1, 32, dtype=np.float32))
    query_range = UNIVERSAL.prepare(pairs).query_range
    assert query_range is not None
    assert query_range.share(pairs[:, 0]).mean() > 0.9
    foreign = -pairs[:5, 0]
    np.testing.assert_allclose(UNIVERSAL.prepare(pairs).apply(foreign), foreign, atol=1e-6)
    assert UNIVERSAL.prepare(pairs[:15]).query_range is None  # too few to know


def test_passages_of_the_same_label_are_no_negatives() -> None:
    chance = np.random.default_rng(4)
    labels = np.arange(120) % 6
    topics = 2.0 * chance.standard_normal((6, 32))
    messages = [topics[labels] + chance.standard_normal((120, 32)) for _ in range(2)]
    pairs = np.stack([unit_rows(side.astype(np.float32)) for side in messages], axis=1)
    order = np.lexsort(np.concatenate([pairs[:, 0, :8], pairs[:, 1, :8]], axis=1).T)
    features, _ = prepare_features(pairs)
    assert features.left_out is not None
    masked = features.left_out.masked[:, :120]
    same = labels[order][:, None] == labels[order]
    assert masked[same].mean() > 0.5
    assert masked[~same].mean() < 0.05


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_order_does_not_matter(seed: int, n: int) -> None:
    pairs = pairs_of(seed, n)
    order = np.random.default_rng(seed + 1).permutation(n)
    queries = pairs_of(seed + 2, 5)[:, 0]
    np.testing.assert_array_equal(
        UNIVERSAL.prepare(pairs).apply(queries), UNIVERSAL.prepare(pairs[order]).apply(queries)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 12))
def test_vectors_stay_of_length_one_and_rows_independent(seed: int, n: int, count: int) -> None:
    prepared = UNIVERSAL.prepare(pairs_of(seed, n))
    queries = pairs_of(seed + 1, count)[:, 0]
    moved = prepared.apply(queries)
    assert moved.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(moved[:1], prepared.apply(queries[:1]), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(8, 60))
def test_corrections_lie_in_the_span_of_the_pairs(seed: int, n: int) -> None:
    """A dimension in which no demonstration has anything is left alone."""
    pairs = np.zeros((n, 2, 40), dtype=np.float32)
    pairs[..., :32] = pairs_of(seed, n)
    prepared = UNIVERSAL.prepare(pairs)
    assert not prepared.offset[32:].any()
    assert prepared.linear is None or not np.abs(prepared.linear[:, 32:]).max() > 1e-7


def test_one_demonstration_moves_along_its_difference_and_away_from_its_query() -> None:
    pairs = pairs_of(3, 1)
    prepared = UNIVERSAL.prepare(pairs)
    assert prepared.linear is None
    difference = pairs[0, 1] - pairs[0, 0]
    along, away = UNIVERSAL.gains_for(1)[:2]
    np.testing.assert_allclose(prepared.offset, along * difference - away * pairs[0, 0], atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_a_model_that_reads_queries_as_documents_needs_no_third_vector(seed: int, n: int) -> None:
    pairs = pairs_of(seed, n)
    queries = pairs_of(seed + 1, 5)[:, 0]
    triples = np.concatenate([pairs, pairs[:, :1]], axis=1)
    for corpus in (None, pairs_of(seed + 2, 200)[:, 1]):
        expected = UNIVERSAL.prepare(pairs, corpus).apply(queries)
        np.testing.assert_allclose(UNIVERSAL.prepare(triples, corpus).apply(queries), expected, atol=1e-6)


def test_queries_move_away_from_what_queries_are_as_documents() -> None:
    """With queries and documents that a model tells apart, the difference of their kinds is no part of the shift."""
    pairs = pairs_of(5, 24)
    kind = np.eye(1, 32, 7, dtype=np.float32)  # the direction in which queries differ from themselves as documents
    asked = unit_rows(pairs[:, 0] + kind)
    reader = with_gains(mean=0.7)
    moved = {
        name: reader.prepare(np.stack([asked, pairs[:, 1], third], axis=1)).apply(asked) - asked
        for name, third in (("documents", pairs[:, 0]), ("queries", asked))
    }
    assert abs(float(moved["documents"][:, 7].mean())) < 0.3 * abs(float(moved["queries"][:, 7].mean()))
    one = np.stack([asked[:1], pairs[:1, 1], pairs[:1, 0]], axis=1)
    along, away = UNIVERSAL.gains_for(1)[:2]
    expected = along * (pairs[0, 1] - pairs[0, 0]) - away * asked[0]
    np.testing.assert_allclose(UNIVERSAL.prepare(one).offset, expected, atol=1e-6)


@pytest.mark.parametrize("n", [16, 40, 400])
def test_few_different_queries_do_not_shut_others_of_their_kind_out(n: int) -> None:
    """Each is nearer to a mean that it is part of: of 16 unlike queries, that alone is several standard deviations."""
    chance = np.random.default_rng(n)
    drawn = chance.standard_normal((n + 300, 64)).astype(np.float32)
    kind = 3 * np.eye(1, 64, dtype=np.float32)
    known = QueryRange.of(unit_rows(drawn[:n] + kind))
    assert known.share(unit_rows(drawn[n:] + kind)).mean() > 0.7
    assert known.share(unit_rows(drawn[n:] - kind)).mean() < 0.1


def test_centring_leaves_less_of_what_all_queries_have_in_common() -> None:
    pairs = pairs_of(11, 40)
    pairs[:, 0] = unit_rows(pairs[:, 0] + np.eye(1, 32, dtype=np.float32))
    moved = with_gains(centre=0.4).prepare(pairs).apply(pairs[:, 0])
    assert moved[:, 0].mean() < 0.8 * pairs[:, 0, 0].mean()
    assert moved[:, 1:].std() > 1.1 * pairs[:, 0, 1:].std()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(20, 80))
def test_wrong_pairs_lose_weight(seed: int, n: int) -> None:
    pairs = pairs_of(seed, n)
    wrong = np.arange(n // 4)
    pairs[wrong, 1] = np.roll(pairs[wrong, 1], 1, axis=0)
    weights = Evidence.of(pairs[:, 0], pairs[:, 1]).weights
    assert weights[wrong].mean() < 0.6 * weights[n // 4 :].mean()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60))
def test_pairs_that_do_not_belong_together_change_nothing(seed: int, n: int) -> None:
    chance = np.random.default_rng(seed)
    pairs = chance.standard_normal((n, 2, 32)).astype(np.float32)
    pairs[:, 0] = unit_rows(pairs[:, 0])
    pairs[:, 1] = unit_rows(pairs[:, 1])
    evidence = Evidence.of(pairs[:, 0], pairs[:, 1])
    if evidence.confidence == 0.0:
        queries = pairs_of(seed, 3)[:, 0]
        np.testing.assert_allclose(UNIVERSAL.prepare(pairs).apply(queries), queries, atol=1e-6)


def test_random_pairs_are_recognised_nearly_always() -> None:
    found = []
    for seed in range(100):
        pairs = np.random.default_rng(seed).standard_normal((16, 2, 32)).astype(np.float32)
        found.append(Evidence.of(unit_rows(pairs[:, 0]), unit_rows(pairs[:, 1])).confidence)
    assert np.mean(np.array(found) == 0.0) > 0.9


def test_labels_that_repeat_are_no_wrong_passages() -> None:
    pairs = pairs_of(4, 12)
    pairs[:, 1] = pairs[0, 1]
    evidence = Evidence.of(pairs[:, 0], pairs[:, 1])
    assert evidence.confidence == 1.0
    np.testing.assert_allclose(evidence.weights, 1.0)


def test_several_answers_to_one_query_are_no_wrong_passages() -> None:
    pairs = pairs_of(4, 6)
    pairs[:, 0] = pairs[0, 0]
    evidence = Evidence.of(pairs[:, 0], pairs[:, 1])
    assert evidence.confidence == 1.0
    np.testing.assert_allclose(evidence.weights, 1.0)
    moved = UNIVERSAL.prepare(pairs).apply(pairs[:1, 0])
    assert (moved @ pairs[:, 1].T).mean() > (pairs[:1, 0] @ pairs[:, 1].T).mean()


def test_ten_thousand_demonstrations_are_one_matrix() -> None:
    prepared = UNIVERSAL.prepare(pairs_of(5, 10_000))
    assert prepared.linear is not None
    assert prepared.linear.shape == (32, 32)


def test_gains_are_interpolated_in_the_logarithm() -> None:
    table = np.zeros((len(FEATURES), len(KNOTS)))
    table[0] = np.arange(len(KNOTS))
    reader = DemonstrationReader(table)
    assert [float(reader.gains_for(n)[0]) for n in (1, 2, 4, 1024, 5000)] == pytest.approx([0, 0.5, 1, 5, 5])


@pytest.mark.parametrize("gains", [np.zeros((2, 2)), np.full((len(FEATURES), len(KNOTS)), np.nan)])
def test_gains_that_cannot_be(gains: Vectors) -> None:
    with pytest.raises(ValueError, match="gains have shape"):
        DemonstrationReader(gains)


def test_a_folder_brings_its_own_reader(tmp_path: Path) -> None:
    assert DemonstrationReader.load(tmp_path).kind == "universal"
    own = with_gains(mean=0.25)
    own.save(tmp_path)
    read = DemonstrationReader.load(tmp_path)
    assert (read.kind, read.fingerprint) == ("trained", own.fingerprint)
    assert read.fingerprint != UNIVERSAL.fingerprint
    (tmp_path / READER_FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        DemonstrationReader.load(tmp_path)


def test_an_encoder_moves_its_queries_only(tmp_path: Path) -> None:
    encoder = make_encoder()
    bank = BANK.copy()
    zero = encoder.encode_query(["the fox", "cats"], instruction="Find it")
    encoder.reader = with_gains(mean=1.0)
    moved = encoder.encode_query(["the fox", "cats"], bank=bank, strategy="reader")
    bank.embed(encoder)
    assert bank.embeddings is not None
    np.testing.assert_allclose(moved, encoder.reader.prepare(bank.embeddings).apply(zero), atol=1e-6)
    assert not np.allclose(moved, zero)
    one = encoder.encode_query("cats", bank=bank, num_demonstrations=1, strategy="reader")
    np.testing.assert_allclose(one, encoder.reader.prepare(bank.embeddings[:1]).apply(zero[1:])[0], atol=1e-6)
    nearest = encoder.encode_query(["cats"], bank=bank, num_demonstrations=1, strategy="reader", selection="nearest")
    chosen = encoder.select_demonstrations(["cats"], bank, 1)[0]
    assert chosen.embeddings is not None
    np.testing.assert_allclose(nearest, encoder.reader.prepare(chosen.embeddings).apply(zero[1:]), atol=1e-6)


def test_another_reader_is_another_query_fingerprint_only(tmp_path: Path) -> None:
    encoder = make_encoder()
    before = encoder.fingerprint, encoder.query_fingerprint
    bank = BANK.copy()
    universal = encoder.encode_query("cats", bank=bank, strategy="reader")
    encoder.reader = with_gains(mean=2.0)
    assert encoder.fingerprint == before[0]
    assert encoder.query_fingerprint != before[1]
    # Prepared demonstrations of the former reader are not used.
    assert not np.allclose(universal, encoder.encode_query("cats", bank=bank, strategy="reader"))
    encoder.save_pretrained(tmp_path)
    loaded = EpicEncoder.from_pretrained(tmp_path)
    assert (loaded.reader.kind, loaded.query_fingerprint) == ("trained", encoder.query_fingerprint)
    assert loaded.fingerprint == encoder.fingerprint
    encoder.reader = UNIVERSAL
    encoder.save_pretrained(tmp_path)
    assert not (tmp_path / READER_FILE).exists()


def test_it_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, epic_rag.reader; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Against an index


def test_against_an_index_of_questions_queries_move_further() -> None:
    """Among other questions, a shift towards passages brings more than among passages alone."""
    chance = np.random.default_rng(3)
    topics = unit_rows(chance.standard_normal((400, 32)).astype(np.float32))
    kind = np.eye(32, dtype=np.float32)[0] * 0.6
    queries, passages = (
        unit_rows(topics + sign * kind + 0.15 * chance.standard_normal((400, 32)).astype(np.float32))
        for sign in (-1, 1)
    )
    pairs = np.stack([queries, passages], axis=1)[:40]
    shifts = {}
    for name, corpus in (("passages", passages), ("both", np.concatenate([passages, queries[40:]]))):
        shifts[name] = float(UNIVERSAL.prepare(pairs, corpus).apply(queries[300:])[:, 0].mean())
    assert shifts["both"] > shifts["passages"] + 0.02


@pytest.mark.parametrize("count", [0, 1, 3, 70, 60_000])
def test_an_index_may_be_of_any_size_and_hold_shortened_vectors(count: int) -> None:
    chance = np.random.default_rng(count)
    pairs = np.stack([unit_rows(chance.standard_normal((20, 16)).astype(np.float32)) for _ in range(2)], axis=1)
    pairs[:, 1] = unit_rows(pairs[:, 0] + 0.5 * pairs[:, 1] + 0.6 * np.eye(16, dtype=np.float32)[0])
    for width in (16, 8):
        corpus = unit_rows(chance.standard_normal((count, width)).astype(np.float32)).reshape(count, width)
        moved = UNIVERSAL.prepare(pairs, corpus).apply(pairs[:, 0])
        assert np.isfinite(moved).all()
        np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1.0, atol=1e-5)
    without = UNIVERSAL.prepare(pairs).apply(pairs[:, 0])
    assert np.array_equal(moved, without) == (count == 0)


def test_an_index_changes_nothing_for_messages_of_the_same_label() -> None:
    """Queries and passages are of one kind: many passages of the index are right, and none is known to be."""
    chance = np.random.default_rng(0)
    labels = chance.standard_normal((12, 32)).astype(np.float32)
    messages = unit_rows(labels[np.arange(240) % 12] + 0.6 * chance.standard_normal((240, 32)).astype(np.float32))
    pairs = np.stack([messages[:60], messages[12:72]], axis=1)
    for n in (8, 60):
        with_index, without = UNIVERSAL.prepare(pairs[:n], messages), UNIVERSAL.prepare(pairs[:n])
        np.testing.assert_array_equal(with_index.apply(messages), without.apply(messages))


def test_stored_numbers_are_those_that_were_prepared() -> None:
    for n in (1, 5, 30):
        pairs = unit_rows(np.random.default_rng(n).standard_normal((2 * n, 16)).astype(np.float32)).reshape(n, 2, 16)
        pairs[:, 1] = unit_rows(pairs[:, 0] + 0.3 * pairs[:, 1])
        prepared = UNIVERSAL.prepare(pairs)
        again = PreparedDemonstrations.from_arrays(prepared.to_arrays())
        np.testing.assert_allclose(again.apply(pairs[:, 0]), prepared.apply(pairs[:, 0]), atol=1e-6)
    with pytest.raises(KeyError):
        PreparedDemonstrations.from_arrays({"linear": np.zeros((2, 2), dtype=np.float32)})
