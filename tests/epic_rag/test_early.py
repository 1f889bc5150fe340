"""Demonstrations chosen by the first layers: what a model of those layers alone would choose."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag._early import EARLY_SHARE, first_layers
from epic_rag.backbone import Backbone, cut_layers
from epic_rag.errors import ConfigError, PromptError
from tests.conftest import make_encoder
from tests.helpers.families import FAMILIES, INSTRUCTION, TEXTS, config, encoder_of, transformer

PAIRS = [("question about the fox", "one"), ("def encode(texts)", "two"), ("hello hello", "three")]
BANK = DemonstrationBank(PAIRS, instruction=INSTRUCTION)


def cut(encoder: EpicEncoder, layers: int = 1) -> EpicEncoder:
    """A copy that has the first layers alone, and nothing in common with the original."""
    copied = copy.deepcopy(encoder)
    cut_layers(copied.backbone.transformer, layers)
    copied.forget_fingerprint()
    return copied


def chosen(encoder: EpicEncoder, text: str) -> DemonstrationBank:
    """What a model of the first layers alone chooses, by ridge regression as its textbooks have it."""
    shallow = cut(encoder)
    early = shallow.encode_query([item.query for item in BANK.demonstrations], instruction=INSTRUCTION)
    built = BANK.build(encoder)
    vectors = built.require(encoder.fingerprint)[:, 0]
    centred, width = early - early.mean(axis=0), early.shape[1]
    gram = centred.T @ centred
    weights = np.linalg.solve(
        gram + 0.3 * np.trace(gram) / width * np.eye(width), centred.T @ (vectors - vectors.mean(axis=0))
    )
    asked = shallow.encode_query(text, instruction=INSTRUCTION) - early.mean(axis=0)
    return built.select(1, method="nearest", query_embedding=asked @ weights + vectors.mean(axis=0))


def early(encoder: EpicEncoder, texts: Any = TEXTS, bank: DemonstrationBank = BANK, **options: Any) -> np.ndarray:
    return encoder.encode_query(texts, bank=bank, num_demonstrations=1, selection="nearest-early", **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_are_the_model_cut(family: str) -> None:
    whole = encoder_of(Backbone(transformer(config(family))))
    before = whole.encode_query(TEXTS, instruction=INSTRUCTION)
    shallow = encoder_of(first_layers(whole.backbone, 1))
    found = shallow.encode_query(TEXTS, instruction=INSTRUCTION)
    np.testing.assert_allclose(found, cut(whole).encode_query(TEXTS, instruction=INSTRUCTION), atol=1e-6)
    assert np.abs(found - before).max() > 1e-3
    # The whole model is as it was, and there is no second copy of a weight.
    np.testing.assert_array_equal(whole.encode_query(TEXTS, instruction=INSTRUCTION), before)
    held = {tensor.data_ptr() for tensor in whole.backbone.transformer.parameters()}
    assert {tensor.data_ptr() for tensor in shallow.backbone.transformer.parameters()} < held


def test_more_layers_than_there_are() -> None:
    with pytest.raises(ConfigError, match="num_layers is 3, the model has 2"):
        first_layers(make_encoder().backbone, 3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("strategy", ["epic", "text"])
def test_each_query_gets_what_the_first_layers_choose(causal: bool, strategy: Any) -> None:
    encoder = make_encoder(causal=causal, seed=3)
    together = early(encoder, strategy=strategy)
    shown = set()
    for text, vector in zip(TEXTS, together, strict=True):
        own = DemonstrationBank(chosen(encoder, text).demonstrations, instruction=INSTRUCTION)
        shown.add(own.demonstrations)
        np.testing.assert_allclose(vector, encoder.encode_query(text, bank=own, strategy=strategy), atol=1e-5)
        np.testing.assert_allclose(vector, early(encoder, text, strategy=strategy), atol=1e-5)
    assert len(shown) > 1
    assert EARLY_SHARE > 2  # of two layers, one


@pytest.mark.parametrize("batch_size", [1, 3])
def test_neither_the_batch_nor_the_cache_matters(batch_size: int) -> None:
    encoder = make_encoder()
    expected = early(encoder)
    np.testing.assert_allclose(early(encoder, batch_size=batch_size), expected, atol=1e-5)
    encoder.prefix_cache = None
    np.testing.assert_allclose(early(encoder), expected, atol=1e-5)


def test_the_bank_is_read_once_and_the_number_of_banks_is_bounded() -> None:
    encoder = make_encoder()
    early(encoder)
    kept = next(iter(encoder._early._likenesses.values()))
    early(encoder)
    assert next(iter(encoder._early._likenesses.values())) is kept
    for number in range(20):
        early(encoder, bank=DemonstrationBank(PAIRS, instruction=f"number {number}"))
    assert len(encoder._early._likenesses) == 16


def test_it_follows_the_weights_and_the_dtype() -> None:
    encoder = make_encoder()
    early(encoder)
    with torch.no_grad():
        encoder.backbone.transformer.layers[0].mlp.down_proj.weight.mul_(2)
    encoder.forget_fingerprint()
    fresh = copy.deepcopy(encoder)
    np.testing.assert_allclose(early(encoder), early(fresh), atol=1e-6)
    encoder.backbone.to(dtype=torch.bfloat16)
    encoder.forget_fingerprint()
    assert early(encoder).dtype == np.float32


def test_a_copy_and_a_pickle_make_their_own() -> None:
    encoder = make_encoder()
    expected = early(encoder)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        np.testing.assert_allclose(early(other), expected, atol=1e-6)
        assert other._early._shallow.transformer.layers[0] is other.backbone.transformer.layers[0]


def test_it_shows_what_it_chooses_and_comes_nearer_than_the_first() -> None:
    encoder = make_encoder(seed=3)
    texts = [f"question {number} about {what}" for number in range(12) for what in ("the fox", "texts", "hello")]
    bank = DemonstrationBank([(text, "a passage") for text in texts[:24]], instruction=INSTRUCTION).build(encoder)
    vectors = encoder.encode_query(texts[24:], instruction=INSTRUCTION)

    def nearness(selection: Any) -> float:
        banks = encoder.choose_demonstrations(texts[24:], bank, 3, selection=selection)
        together = encoder.encode_query(texts[24:], bank=bank, num_demonstrations=3, selection=selection)
        for text, vector, own in zip(texts[24:], together, banks, strict=True):
            np.testing.assert_allclose(vector, encoder.encode_query(text, bank=own), atol=1e-5)
        shown = np.stack([own.require(encoder.fingerprint)[:, 0] for own in banks])
        return float(np.einsum("qkd,qd->qk", shown, vectors).mean())

    assert nearness("first") < nearness("nearest-early") <= nearness("nearest")


@pytest.mark.parametrize("queries", [["only one"], ["twice"] * 2])
def test_a_bank_of_one_or_of_the_same(queries: list[str]) -> None:
    bank = DemonstrationBank([(query, str(number)) for number, query in enumerate(queries)], instruction=INSTRUCTION)
    assert np.isfinite(early(make_encoder(), bank=bank)).all()


def test_a_bank_alone_cannot_choose_so() -> None:
    with pytest.raises(PromptError, match="selection 'nearest-early' needs the model, select has none"):
        BANK.select(1, method="nearest-early")
