"""What comes out of the encoder: the contract of encode_query and encode_document."""

from __future__ import annotations

import copy
import itertools
import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag import (
    BankError,
    ConfigError,
    DemonstrationBank,
    EpicEncoder,
    PromptError,
    QueryPrompt,
    TaskError,
    batching,
    get_task,
)
from epic_rag.prefix_cache import embed_packed
from epic_rag.query_prompt import QUERY_STRATEGIES
from tests.conftest import make_encoder
from tests.helpers.banks import embedded

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)
TEXTS = ["how do I install it", "", "the quick brown fox " * 9, "naïve 日本語 🙂", "how do I install it"]
PAIRS = [
    ("how do I undo this", "To undo a step, press Ctrl+Z."),
    ("change the language", "Open Settings, then Language."),
    ("E1042 on startup", "The licence file could not be read."),
    ("export to a spreadsheet", "Choose Data, then Export."),
]


@pytest.fixture(params=["causal", "bidirectional"])
def encoder(
    request: pytest.FixtureRequest, tiny_encoder: EpicEncoder, tiny_bidirectional_encoder: EpicEncoder
) -> EpicEncoder:
    return tiny_encoder if request.param == "causal" else tiny_bidirectional_encoder


@pytest.fixture(scope="module")
def bank(tiny_encoder: EpicEncoder) -> DemonstrationBank:
    return embedded(DemonstrationBank(PAIRS, instruction="find the section"), tiny_encoder)


def check(vectors: np.ndarray, *shape: int) -> None:
    assert vectors.dtype == np.float32
    assert vectors.shape == shape
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), np.ones(shape[:-1]), atol=1e-5)


def different(left: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.abs(left - right).max() > 1e-3)


# Shapes and order


@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
def test_shapes(encoder: EpicEncoder, method: str) -> None:
    encode = getattr(encoder, method)
    check(encode(TEXTS), 5, 32)
    check(encode(tuple(TEXTS)), 5, 32)
    check(encode(["one"]), 1, 32)
    check(encode("one"), 32)
    check(encode(""), 32)
    check(encode([]), 0, 32)
    check(encode([], truncate_dim=8), 0, 8)


@pytest.mark.parametrize("strategy", QUERY_STRATEGIES)
def test_shapes_with_demonstrations(encoder: EpicEncoder, strategy: Any) -> None:
    bank = DemonstrationBank(PAIRS)
    check(encoder.encode_query(TEXTS, bank=bank, strategy=strategy), 5, 32)
    check(encoder.encode_query("one", bank=bank, strategy=strategy), 32)
    check(encoder.encode_query([], bank=bank, strategy=strategy), 0, 32)


@PROPERTY
@given(order=st.permutations(range(5)), batch_size=st.none() | st.integers(1, 6), k=st.integers(0, 2))
def test_order_is_kept_whatever_the_batches(
    tiny_encoder: EpicEncoder, bank: DemonstrationBank, order: list[int], batch_size: int | None, k: int
) -> None:
    for encode in (
        lambda texts, size: tiny_encoder.encode_document(texts, batch_size=size),
        lambda texts, size: tiny_encoder.encode_query(texts, bank=bank, num_demonstrations=k, batch_size=size),
    ):
        alone = np.stack([encode(text, None) for text in TEXTS])
        together = encode([TEXTS[index] for index in order], batch_size)
        np.testing.assert_allclose(together, alone[order], atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batch_size_is_the_most_rows_of_a_batch(
    batch_size: int, tiny_encoder: EpicEncoder, bank: DemonstrationBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, sizes = tiny_encoder.backbone.forward, []

    def count(batch: Any, slots: Any = None) -> torch.Tensor:
        sizes.append(len(batch.ids))
        return forward(batch, slots)

    def count_packed(backbone: Any, prefix: Any, rows: Any, vectors: Any) -> torch.Tensor:
        sizes.append(sum(map(len, rows)))
        return embed_packed(backbone, prefix, rows, vectors)

    monkeypatch.setattr(tiny_encoder.backbone, "forward", count)
    monkeypatch.setattr(batching, "embed_packed", count_packed)
    tiny_encoder.encode_document(TEXTS, batch_size=batch_size)
    tiny_encoder.encode_query(TEXTS, bank=bank, num_demonstrations=2, selection="nearest", batch_size=batch_size)
    assert max(sizes) == batch_size
    assert sum(sizes) == 3 * len(TEXTS)  # "nearest" encodes every query twice


def test_very_long_texts_are_cut(encoder: EpicEncoder) -> None:
    long = "the quick brown fox jumps over the lazy dog " * 3000
    check(encoder.encode_document([long, "short"]), 2, 32)
    check(encoder.encode_query([long, "short"], instruction="x" * 100), 2, 32)
    np.testing.assert_array_equal(encoder.encode_document(long), encoder.encode_document(long + "and more"))


def test_what_is_no_text_is_named(encoder: EpicEncoder) -> None:
    for encode in (encoder.encode_query, encoder.encode_document, encoder.count_tokens):
        with pytest.raises(PromptError, match="Text 2 of 2 is None, not a string"):
            encode(["a", None])  # type: ignore[operator]


def test_half_a_surrogate_pair_is_no_reason_to_stop(encoder: EpicEncoder) -> None:
    check(encoder.encode_document(["\ud800 broken", "whole"]), 2, 32)


# Width and dtype


def test_truncation_renormalises(encoder: EpicEncoder) -> None:
    whole = encoder.encode_document(TEXTS)
    cut = encoder.encode_document(TEXTS, truncate_dim=8)
    check(cut, 5, 8)
    np.testing.assert_allclose(cut, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6)
    check(encoder.encode_query("one", truncate_dim=1), 1)
    np.testing.assert_array_equal(encoder.encode_document(TEXTS, truncate_dim=32), whole)


def test_the_encoders_own_width_and_that_of_a_call() -> None:
    encoder = make_encoder()
    bank = DemonstrationBank(PAIRS)
    expected = encoder.encode_query("a", bank=bank, truncate_dim=8)
    whole = encoder.encode_query("a", bank=bank)
    encoder.truncate_dim = 8
    assert encoder.dimension == 8
    # Slots stay at full width, so the queries behind them are the same ones, cut.
    np.testing.assert_allclose(encoder.encode_query("a", bank=bank), expected, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_query("a", bank=bank, selection="nearest", truncate_dim=32).shape, (32,))
    np.testing.assert_allclose(encoder.encode_query("a", bank=bank, truncate_dim=32), whole, atol=1e-6)
    assert embedded(bank, encoder).embeddings_for(encoder.fingerprint).shape == (4, 3, 32)


@pytest.mark.parametrize("width", [0, -1, 33])
def test_a_width_that_is_not_there(encoder: EpicEncoder, width: int) -> None:
    with pytest.raises(ConfigError, match=f"truncate_dim is {width}, but the model has 32 dimensions. Choose 1 to 32"):
        encoder.encode_document("a", truncate_dim=width)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_half_precision_gives_float32_unit_vectors(
    tiny_checkpoint: Path, tiny_encoder: EpicEncoder, bank: DemonstrationBank, dtype: str, tolerance: float
) -> None:
    half = EpicEncoder.from_pretrained(tiny_checkpoint, dtype=dtype)
    assert half.dtype == getattr(torch, dtype)
    for options in ({}, {"bank": bank}, {"bank": bank, "strategy": "text"}):
        vectors = half.encode_query(TEXTS, **options)
        check(vectors, 5, 32)
        np.testing.assert_allclose(vectors, tiny_encoder.encode_query(TEXTS, **options), atol=tolerance)


# Instructions


def test_where_the_instruction_comes_from(encoder: EpicEncoder) -> None:
    def encode(**options: Any) -> np.ndarray:
        return encoder.encode_query("a", num_demonstrations=0, **options)

    mine, docs = encode(instruction="mine"), encode(task="docs")
    bare = encode()
    bank = DemonstrationBank(PAIRS, instruction="of the bank")
    silent = DemonstrationBank(PAIRS)
    np.testing.assert_array_equal(docs, encode(instruction=get_task("docs").instruction))
    np.testing.assert_array_equal(encode(bank=bank), encode(instruction="of the bank"))
    # Precedence: instruction, task, bank.
    np.testing.assert_array_equal(encode(bank=bank, task="docs", instruction="mine"), mine)
    np.testing.assert_array_equal(encode(bank=bank, task="docs"), docs)
    np.testing.assert_array_equal(encode(bank=silent, task="docs"), docs)
    np.testing.assert_array_equal(encode(task="docs", instruction=""), bare)
    np.testing.assert_array_equal(encode(bank=bank, instruction=""), bare)
    assert different(mine, docs)
    assert different(mine, bare)


def test_a_default_instruction_is_for_queries_that_have_none() -> None:
    encoder = make_encoder()
    bare, mine = encoder.encode_query("a"), encoder.encode_query("a", instruction="mine")
    document, before = encoder.encode_document("a"), encoder.fingerprint
    np.testing.assert_array_equal(bare, document)
    encoder.config.default_instruction = "mine"
    assert encoder.default_instruction == "mine"
    np.testing.assert_array_equal(encoder.encode_query("a"), mine)
    np.testing.assert_array_equal(encoder.encode_query("a", instruction=""), bare)
    np.testing.assert_array_equal(encoder.encode_query("a", task="docs"), make_encoder().encode_query("a", task="docs"))
    np.testing.assert_array_equal(encoder.encode_document("a"), document)
    # A bank without an instruction is embedded under it, as queries are.
    built = embedded(DemonstrationBank(PAIRS), encoder)
    expected = embedded(DemonstrationBank(PAIRS, instruction="mine"), encoder)
    np.testing.assert_allclose(built.embeddings, expected.embeddings, atol=1e-6)
    assert encoder.fingerprint != before


def test_documents_know_nothing_of_instructions_and_demonstrations(tiny_encoder: EpicEncoder) -> None:
    document = tiny_encoder.encode_document("a")
    assert different(document, tiny_encoder.encode_query("a", instruction="mine"))
    np.testing.assert_array_equal(document, tiny_encoder.encode_query("a", instruction=""))


# Demonstrations


def test_how_many_are_shown(tiny_encoder: EpicEncoder, bank: DemonstrationBank) -> None:
    def encode(**options: Any) -> np.ndarray:
        return tiny_encoder.encode_query(TEXTS, **options)

    np.testing.assert_array_equal(encode(bank=bank), encode(bank=bank, num_demonstrations=4))
    np.testing.assert_array_equal(encode(bank=bank, num_demonstrations=2), encode(bank=bank.select(2)))
    zero_shot = encode(instruction="find the section")
    for strategy in (None, *QUERY_STRATEGIES):
        np.testing.assert_array_equal(encode(bank=bank, num_demonstrations=0, strategy=strategy), zero_shot)
    steps = [encode(bank=bank, num_demonstrations=k) for k in range(5)]
    assert all(different(left, right) for left, right in itertools.pairwise(steps))
    assert different(encode(bank=bank), encode(bank=bank, strategy="text"))
    np.testing.assert_array_equal(encode(bank=DemonstrationBank([], instruction="find the section")), zero_shot)


def test_a_task_is_only_an_instruction(tiny_encoder: EpicEncoder) -> None:
    alone = tiny_encoder.encode_query("a", task="docs")
    np.testing.assert_array_equal(alone, tiny_encoder.encode_query("a", bank="docs", num_demonstrations=0))
    assert different(alone, tiny_encoder.encode_query("a", task="docs", bank="docs", num_demonstrations=2))


def test_a_prompt_is_the_same_as_its_settings(tiny_encoder: EpicEncoder, bank: DemonstrationBank) -> None:
    prompt = QueryPrompt(bank=bank, num_demonstrations=2, strategy="epic")
    np.testing.assert_array_equal(
        tiny_encoder.encode_query("a", prompt),
        tiny_encoder.encode_query("a", bank=bank, num_demonstrations=2, strategy="epic"),
    )
    with pytest.raises(ConfigError, match="Both a prompt and task are given"):
        tiny_encoder.encode_query("a", prompt, task="docs")
    with pytest.raises(ConfigError, match="Unknown setting banks"):
        tiny_encoder.encode_query("a", banks=bank)  # type: ignore[call-arg]


def test_a_checkpoint_shows_no_more_than_it_was_trained_with(caplog: pytest.LogCaptureFixture) -> None:
    encoder = make_encoder()
    bank = embedded(DemonstrationBank(PAIRS), encoder)
    two, three = (encoder.encode_query("a", bank=bank, num_demonstrations=k) for k in (2, 3))
    encoder.config.max_demonstrations = 2
    np.testing.assert_array_equal(encoder.encode_query("a", bank=bank), two)
    assert caplog.text == ""
    np.testing.assert_array_equal(encoder.encode_query("a", bank=bank, num_demonstrations=3), three)
    assert "3 demonstrations requested, tiny was trained with up to 2" in caplog.text


@pytest.mark.parametrize("strategy", ["epic", "text"])
def test_nearest_is_each_querys_own_choice(tiny_encoder: EpicEncoder, bank: DemonstrationBank, strategy: Any) -> None:
    together = tiny_encoder.encode_query(TEXTS, bank=bank, num_demonstrations=2, selection="nearest", strategy=strategy)
    chosen = set()
    for text, vector in zip(TEXTS, together, strict=True):
        zero_shot = tiny_encoder.encode_query(text, instruction="find the section")
        own = bank.select(2, method="nearest", query_embedding=zero_shot)
        chosen.add(own.demonstrations)
        np.testing.assert_allclose(vector, tiny_encoder.encode_query(text, bank=own, strategy=strategy), atol=1e-5)
    assert len(chosen) > 1


@pytest.mark.parametrize("selection", ["first", "diverse", "random"])
def test_other_selections_are_one_choice_for_all(
    tiny_encoder: EpicEncoder, bank: DemonstrationBank, selection: Any
) -> None:
    together = tiny_encoder.encode_query(TEXTS, bank=bank, num_demonstrations=2, selection=selection)
    own = bank.select(2, method=selection)
    np.testing.assert_array_equal(together, tiny_encoder.encode_query(TEXTS, bank=own))


def test_an_unbuilt_bank_is_embedded_once(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    embed, calls = encoder.embed_demonstrations, []
    monkeypatch.setattr(encoder, "embed_demonstrations", lambda bank: calls.append(bank) or embed(bank))
    bank = DemonstrationBank(PAIRS)
    first = encoder.encode_query("a", bank=bank)
    np.testing.assert_array_equal(encoder.encode_query("a", bank=DemonstrationBank(PAIRS)), first)
    assert len(calls) == 1
    assert bank.embeddings is None
    encoder.encode_query("a", bank=DemonstrationBank(PAIRS[:2]))
    assert len(calls) == 2
    for number in range(20):  # the cache is bounded
        encoder.encode_query("a", bank=DemonstrationBank(PAIRS, instruction=f"number {number}"))
    assert len(encoder._banks) == 16


@pytest.mark.parametrize("symmetric", [False, True])
def test_three_vectors_of_a_demonstration(symmetric: bool) -> None:
    encoder = make_encoder()
    bank = DemonstrationBank(PAIRS, instruction="Find it", symmetric=symmetric)
    queries, passages = zip(*PAIRS, strict=True)
    asked = encoder.encode_query(list(queries), instruction="Find it")
    found = encoder.embed_demonstrations(bank)
    expected = [
        asked,
        encoder.encode_query(list(passages), instruction="Find it")
        if symmetric
        else encoder.encode_document(list(passages)),
        asked if symmetric else encoder.encode_document(list(queries)),
    ]
    np.testing.assert_allclose(found, np.stack(expected, axis=1), atol=1e-6)


def test_vectors_of_a_bank_follow_the_weights(tiny_checkpoint: Path) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    bank = DemonstrationBank(PAIRS)
    before, vector = encoder.fingerprint, encoder.encode_query("a", bank=bank)
    with torch.no_grad():
        encoder.backbone.transformer.layers[0].mlp.down_proj.weight.mul_(2)
    encoder.invalidate_caches()
    assert encoder.fingerprint != before
    changed = encoder.encode_query("a", bank=bank)
    np.testing.assert_allclose(
        changed, encoder.encode_query("a", bank=embedded(DemonstrationBank(PAIRS), encoder)), atol=1e-6
    )
    assert different(changed, vector)


def test_vectors_of_a_bank_follow_the_settings(tiny_checkpoint: Path) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    bank = DemonstrationBank([("a " * 90, "b " * 90)])
    encoder.encode_query("a", bank=bank)
    encoder.prompt.max_query_tokens = 10
    fresh = embedded(DemonstrationBank([("a " * 90, "b " * 90)]), encoder)
    np.testing.assert_allclose(encoder.encode_query("a", bank=bank), encoder.encode_query("a", bank=fresh), atol=1e-6)


def test_a_symmetric_bank_in_a_call(tiny_encoder: EpicEncoder) -> None:
    both = [DemonstrationBank(PAIRS, instruction="same", symmetric=value) for value in (False, True)]
    assert different(*(tiny_encoder.encode_query("a", bank=bank) for bank in both))


def test_symmetric_texts_without_an_instruction(tiny_encoder: EpicEncoder) -> None:
    bank = DemonstrationBank(PAIRS, instruction="same", symmetric=True)
    other = copy.copy(tiny_encoder)
    other.config = replace(tiny_encoder.config, symmetric_as_documents=True)
    other.invalidate_caches()
    assert other.fingerprint != tiny_encoder.fingerprint
    bare = other.encode_query("a", instruction="")
    np.testing.assert_array_equal(other.encode_query("a", task="sts"), bare)
    np.testing.assert_array_equal(other.encode_query("a", bank=bank, num_demonstrations=0), bare)
    np.testing.assert_array_equal(
        other.embed_demonstrations(bank)[:, 0], other.encode_query([q for q, _ in PAIRS], instruction="")
    )
    assert different(tiny_encoder.encode_query("a", task="sts"), bare)
    assert different(other.encode_query("a", task="docs"), bare)
    assert different(other.encode_query("a", instruction="same"), bare)


# Errors


@pytest.mark.parametrize("selection", ["first", "random", "diverse", "nearest"])
def test_more_demonstrations_than_there_are(tiny_encoder: EpicEncoder, bank: DemonstrationBank, selection: Any) -> None:
    with pytest.raises(PromptError, match=r"5 demonstrations requested, but the bank has 4. Use 0 to 4"):
        tiny_encoder.encode_query("a", bank=bank, num_demonstrations=5, selection=selection)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"task": "nothing"}, TaskError, "Unknown task 'nothing'. Choose one of docs, qa, claims"),
        ({"task": "nothing", "instruction": "mine"}, TaskError, "Unknown task 'nothing'"),
        ({"bank": "nothing"}, BankError, "There is no demonstration bank nothing. Built-in banks are"),
        (
            {"num_demonstrations": 2},
            PromptError,
            r"num_demonstrations is 2, but there is no bank",
        ),
        ({"num_demonstrations": -1, "task": "docs"}, PromptError, "num_demonstrations is -1. Use 0 or more"),
        ({"strategy": "bogus"}, PromptError, "Unknown strategy 'bogus'. Choose one of reader, task-vector, epic, text"),
        (
            {"strategy": "bogus", "bank": "docs"},
            PromptError,
            "Unknown strategy 'bogus'. Choose one of reader, task-vector, epic, text",
        ),
        ({"selection": "bogus", "bank": "docs"}, PromptError, "Unknown selection 'bogus'. Choose one of first, random"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0. Pass 1 or more"),
        ({"truncate_dim": 99}, ConfigError, "truncate_dim is 99, but the model has 32"),
        ({"instruction": "word " * 2000}, PromptError, r"No room for a query.*Use fewer demonstrations or a shorter"),
    ],
)
def test_a_call_that_cannot_work(
    tiny_encoder: EpicEncoder, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        tiny_encoder.encode_query("a", **options)


# The rest


ATTRIBUTE_TEXTS = [
    "how do I install it",
    "",
    "the quick brown fox " * 9,
    "naïve 日本語 🙂",
    "how do I install it",
]

ATTRIBUTE_PAIRS = [
    ("how do I undo this", "To undo a step, press Ctrl+Z."),
    ("change the language", "Open Settings, then Language."),
    ("E1042 on startup", "The licence file could not be read."),
    ("export to a spreadsheet", "Choose Data, then Export."),
]


@pytest.fixture(scope="module")
def plain_bank(tiny_encoder: EpicEncoder) -> DemonstrationBank:
    return embedded(DemonstrationBank(ATTRIBUTE_PAIRS, instruction="find the section"), tiny_encoder)


def test_similarity_is_the_cosine(tiny_encoder: EpicEncoder) -> None:
    left = np.array([[3.0, 0.0], [1.0, 1.0]])
    right = [[2, 0], [0, 5], [-1, 0]]
    expected = [[1, 0, -1], [2**-0.5, 2**-0.5, -(2**-0.5)]]
    result = tiny_encoder.similarity(left, right)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)
    np.testing.assert_allclose(tiny_encoder.similarity(left[0], right[0]), [[1]], atol=1e-6)
    assert tiny_encoder.similarity(np.zeros((0, 2)), right).shape == (0, 3)
    np.testing.assert_array_equal(tiny_encoder.similarity([0, 0], right), np.zeros((1, 3)))


def test_tokens_are_counted_without_special_ones_and_without_a_limit(tiny_encoder: EpicEncoder) -> None:
    texts = ["", "hello", "a b " * 500]
    assert tiny_encoder.count_tokens(texts) == [len(tiny_encoder.tokenizer(text)["input_ids"]) for text in texts]
    assert tiny_encoder.count_tokens(texts)[2] > tiny_encoder.max_document_tokens
    assert tiny_encoder.count_tokens([]) == []


def test_attributes(tiny_encoder: EpicEncoder) -> None:
    assert tiny_encoder.dimension == 32
    assert (tiny_encoder.max_query_tokens, tiny_encoder.max_document_tokens) == (128, 128)
    assert tiny_encoder.device == torch.device("cpu")
    assert tiny_encoder.dtype == torch.float32
    assert (tiny_encoder.name, tiny_encoder.source) == ("tiny", "tiny")
    assert len(tiny_encoder.fingerprint) == 12
    int(tiny_encoder.fingerprint, 16)


def test_nothing_is_logged_or_printed(
    tiny_encoder: EpicEncoder,
    plain_bank: DemonstrationBank,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        tiny_encoder.encode_query(ATTRIBUTE_TEXTS, bank=plain_bank)
        tiny_encoder.encode_document(ATTRIBUTE_TEXTS)
    assert capsys.readouterr() == ("", "")
    assert caplog.text == ""


@PROPERTY
@given(lengths=st.lists(st.integers(0, 900), max_size=5))
def test_windows_of_long_texts_are_averaged_by_tokens(lengths: list[int]) -> None:
    encoder = _small()
    texts = ["the quick brown fox jumps over a warm window "[: length % 40] * (length // 20) for length in lengths]
    vectors = encoder.encode_document(texts, long_texts="windows")
    check(vectors, len(texts), 32)
    whole = encoder.encode_document(texts)
    for text, count, vector, cut in zip(texts, encoder.count_tokens(texts), vectors, whole, strict=True):
        parts = encoder.windows(text)
        assert "".join(parts) == text
        assert max(encoder.count_tokens(parts)) <= 22
        if count <= 22:
            assert parts == [text]
            np.testing.assert_allclose(vector, cut, atol=1e-6)
        else:
            mean = np.average(encoder.encode_document(parts), axis=0, weights=encoder.count_tokens(parts))
            np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("text", ["x" * 500, "数据库" * 100, "a " * 300, "word\n" * 90, "🙂" * 80])
def test_a_text_of_any_script_has_windows(text: str) -> None:
    parts = _small().windows(text)
    assert "".join(parts) == text
    assert max(_small().count_tokens(parts)) <= 22


@lru_cache(maxsize=1)
def _small() -> EpicEncoder:
    return make_encoder(causal=False, max_tokens=24)


def test_windows_keep_shape_and_width() -> None:
    encoder = make_encoder(max_tokens=24)
    check(encoder.encode_document("fox " * 100, long_texts="windows"), 32)
    check(encoder.encode_document(["fox " * 100, "a"], long_texts="windows", truncate_dim=8), 2, 8)
    assert encoder.encode_document([], long_texts="windows").shape == (0, 32)


def test_texts_that_are_too_long_are_reported_once_with_both_numbers(caplog: pytest.LogCaptureFixture) -> None:
    encoder = make_encoder(max_tokens=24)
    encoder.encode_document(["fox " * 5], long_texts="windows")
    encoder.encode_query(["fox " * 5])
    assert not caplog.records
    long = "fox " * 100
    for _ in range(2):
        encoder.encode_document([long, "fox"], long_texts="windows")
        encoder.encode_query(["fox", long])
    tokens = encoder.count_tokens([long])[0]
    document, query = (record.getMessage() for record in caplog.records)
    assert document.startswith(f"A text has {tokens} tokens, and tiny reads 24 at a time.")
    assert query == f"A query has {tokens} tokens, and tiny reads 24. The rest of it is cut off."
