"""Similarity, token counts, attributes, and silence."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from epic_rag import DemonstrationBank, EpicEncoder
from tests.helpers.banks import embedded

TEXTS = ["how do I install it", "", "the quick brown fox " * 9, "naïve 日本語 🙂", "how do I install it"]

PAIRS = [
    ("how do I undo this", "To undo a step, press Ctrl+Z."),
    ("change the language", "Open Settings, then Language."),
    ("E1042 on startup", "The licence file could not be read."),
    ("export to a spreadsheet", "Choose Data, then Export."),
]


@pytest.fixture(scope="module")
def bank(tiny_encoder: EpicEncoder) -> DemonstrationBank:
    return embedded(DemonstrationBank(PAIRS, instruction="find the section"), tiny_encoder)


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
    bank: DemonstrationBank,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        tiny_encoder.encode_query(TEXTS, bank=bank)
        tiny_encoder.encode_document(TEXTS)
    assert capsys.readouterr() == ("", "")
    assert caplog.text == ""
