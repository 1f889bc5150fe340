from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag.demonstrations import Demonstration, DemonstrationBank
from epic_rag.encoder import EpicEncoder
from epic_rag.evaluation.embedding import EmbeddingStore, QueryPrompt

VECTORS = {"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (1.0, 1.0)}
SHOWN = (Demonstration("q1", "p1"), Demonstration("q2", "p2"))


def test_texts_are_encoded_once_and_come_back_in_order(written: Any) -> None:
    encoder = written(VECTORS)
    store = EmbeddingStore(encoder)
    rows = store.documents(["b", "a", "b", "c", "a"])
    assert rows.dtype == np.float32
    assert rows == pytest.approx(np.array([[0, 1], [1, 0], [0, 1], [0.5**0.5, 0.5**0.5], [1, 0]]))
    assert np.array_equal(store.documents(["b", "a", "c"]), rows[[0, 1, 3]])
    assert [call.texts for call in encoder.calls] == [("b", "a", "c")]
    assert store.texts_encoded == 3
    assert store.documents([]).shape == (0, 2)


def test_what_a_query_is_encoded_with(written: Any) -> None:
    encoder = written(VECTORS)
    store = EmbeddingStore(encoder)
    store.queries(["a"], QueryPrompt())
    store.queries(["a"], QueryPrompt("find it"))
    store.queries(["a"], QueryPrompt("find it", SHOWN))
    store.queries(["a"], QueryPrompt("find it", SHOWN, strategy="text"))
    store.queries(["a"], QueryPrompt("find it", SHOWN, strategy="text"))
    store.documents(["a"])
    pairs = (("q1", "p1"), ("q2", "p2"))
    assert [(call.role, call.instruction, call.demonstrations, call.strategy) for call in encoder.calls] == [
        ("query", "", (), "epic"),  # "" and not None: no default instruction may come in
        ("query", "find it", (), "epic"),
        ("query", "find it", pairs, "epic"),
        ("query", "find it", pairs, "text"),
        ("document", None, (), "epic"),
    ]


def test_prompts_that_differ_have_different_fingerprints() -> None:
    prompts = [
        QueryPrompt(),
        QueryPrompt("x"),
        QueryPrompt("x", SHOWN),
        QueryPrompt("x", SHOWN[:1]),
        QueryPrompt("x", SHOWN[::-1]),
        QueryPrompt("x", SHOWN, symmetric=True),
        QueryPrompt("x", SHOWN, strategy="text"),
    ]
    assert len({prompt.fingerprint for prompt in prompts}) == len(prompts)
    assert QueryPrompt("x", strategy="text").fingerprint == QueryPrompt("x", symmetric=True).fingerprint


def test_vectors_outlive_the_process_and_belong_to_one_checkpoint(written: Any, tmp_path: Path) -> None:
    prompt = QueryPrompt("x", SHOWN)
    for fingerprint, made in (("one", 2), ("one", 0), ("two", 2)):
        encoder = written(VECTORS, fingerprint=fingerprint)
        store = EmbeddingStore(encoder, folder=tmp_path)
        assert np.array_equal(store.documents(["a"]), [[1, 0]])
        assert np.array_equal(store.queries(["b"], prompt), [[0, 1]])
        assert len(encoder.calls) == made
    assert not list(tmp_path.rglob("*.tmp"))
    half = written(VECTORS, fingerprint="one")
    EmbeddingStore(half, folder=tmp_path, precision="bfloat16").documents(["a"])
    assert len(half.calls) == 1, "another precision has vectors of its own"


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_a_broken_cache_file_is_made_again(
    written: Any, tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    EmbeddingStore(written(VECTORS), folder=tmp_path).documents(["a", "b"])
    (path,) = tmp_path.rglob("*.npy")
    if content is None:
        np.save(path, np.zeros((5, 2), dtype=np.float32))
    else:
        path.write_bytes(content)
    encoder = written(VECTORS)
    with caplog.at_level(logging.WARNING):
        rows = EmbeddingStore(encoder, folder=tmp_path).documents(["a", "b"])
    assert np.array_equal(rows, [[1, 0], [0, 1]])
    assert len(encoder.calls) == 1
    assert "made again" in caplog.text


def test_with_a_real_encoder(tiny_encoder: EpicEncoder) -> None:
    store = EmbeddingStore(tiny_encoder)
    texts = ["how do I install the package", "42 cats"]
    bank = DemonstrationBank(SHOWN, instruction="Answer", symmetric=True)
    expected = tiny_encoder.encode_query(texts, bank=bank)
    assert store.queries(texts, QueryPrompt("Answer", SHOWN, symmetric=True)) == pytest.approx(expected, abs=1e-6)
    assert store.queries(texts, QueryPrompt()) == pytest.approx(tiny_encoder.encode_query(texts), abs=1e-6)
    assert store.documents(texts) == pytest.approx(tiny_encoder.encode_document(texts), abs=1e-6)
