from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag.demonstrations import Demonstration, DemonstrationBank
from epic_rag.encoder import EpicEncoder
from epic_rag.evaluation.embedding_store import EmbeddingStore, make_prompt, prompt_fingerprint
from epic_rag.query_prompt import QueryPrompt

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
    assert store.documents([]).shape == (0, 2)


def test_prompts_reach_the_encoder(written: Any) -> None:
    encoder = written(VECTORS)
    store = EmbeddingStore(encoder)
    store.queries(["a"], make_prompt(None))
    store.queries(["a"], make_prompt("find it"))
    store.queries(["a"], make_prompt("find it", SHOWN, strategy="epic"))
    store.queries(["a"], make_prompt("find it", SHOWN, strategy="text"))
    store.queries(["a"], make_prompt("find it", SHOWN, strategy="text"))
    store.documents(["a"])
    pairs = (("q1", "p1"), ("q2", "p2"))
    assert [(call.role, call.instruction, call.demonstrations, call.strategy) for call in encoder.calls] == [
        ("query", "", (), None),  # "" and not None: the default instruction is not used
        ("query", "find it", (), None),
        ("query", "find it", pairs, "epic"),
        ("query", "find it", pairs, "text"),
        ("document", None, (), None),
    ]


def test_prompts_that_differ_have_different_fingerprints() -> None:
    prompts = [
        make_prompt(None),
        make_prompt("x"),
        make_prompt("x", SHOWN, strategy="epic"),
        make_prompt("x", SHOWN[:1], strategy="epic"),
        make_prompt("x", SHOWN[::-1], strategy="epic"),
        make_prompt("x", SHOWN, symmetric=True, strategy="epic"),
        make_prompt("x", SHOWN, strategy="text"),
        QueryPrompt(task="docs"),
    ]
    assert len({prompt_fingerprint(prompt) for prompt in prompts}) == len(prompts)
    assert prompt_fingerprint(make_prompt("x", strategy="text")) == prompt_fingerprint(make_prompt("x", symmetric=True))
    assert prompt_fingerprint(prompts[2].without_demonstrations()) == prompt_fingerprint(prompts[1])


def test_vectors_are_kept_by_checkpoint(written: Any, tmp_path: Path) -> None:
    prompt = make_prompt("x", SHOWN, strategy="epic")
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
    assert "computed again" in caplog.text


def test_with_a_real_encoder(tiny_encoder: EpicEncoder) -> None:
    store = EmbeddingStore(tiny_encoder)
    texts = ["how do I install the package", "42 cats"]
    bank = DemonstrationBank(SHOWN, instruction="Answer", symmetric=True)
    expected = tiny_encoder.encode_query(texts, bank=bank)
    assert store.queries(texts, make_prompt("Answer", SHOWN, symmetric=True)) == pytest.approx(expected, abs=1e-6)
    assert store.queries(texts, make_prompt(None)) == pytest.approx(tiny_encoder.encode_query(texts), abs=1e-6)
    assert store.documents(texts) == pytest.approx(tiny_encoder.encode_document(texts), abs=1e-6)
