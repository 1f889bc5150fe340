"""Weights of their own for queries: which texts are read with them, and how they are stored."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from epic_rag import CheckpointError, ConfigError, DemonstrationBank, EpicEncoder
from epic_rag.batching import Replicas
from epic_rag.checkpoints import QUERY_FILES, read_epic_file
from epic_rag.numpy_bert import open_numpy_bert
from tests.conftest import make_encoder

TEXTS = ["how to undo", "the quick fox", "a window", "cats"]
PAIRS = [("undo", "press back"), ("open a window", "turn the handle"), ("cat", "an animal")]


def separated(*, causal: bool = False) -> EpicEncoder:
    """Return a tiny encoder whose second layer has other weights for queries."""
    encoder = make_encoder(causal=causal)
    names = [name for name, _ in encoder.backbone.transformer.named_parameters() if ".1." in name]
    encoder.backbone.separate_queries(names)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in encoder.backbone.query_weights().values():
            weight.add_(0.2 * torch.randn_like(weight))
    encoder.config = replace(encoder.config, symmetric_as_documents=True)
    encoder.invalidate_caches()
    return encoder


@pytest.fixture
def encoder() -> EpicEncoder:
    return separated()


@pytest.mark.parametrize("causal", [False, True])
def test_queries_alone_are_read_with_them(causal: bool) -> None:
    encoder, plain = separated(causal=causal), make_encoder(causal=causal)
    np.testing.assert_array_equal(encoder.encode_document(TEXTS), plain.encode_document(TEXTS))
    for instruction in ("", "find it"):
        ours, theirs = (each.encode_query(TEXTS, instruction=instruction) for each in (encoder, plain))
        assert np.abs(ours - theirs).max() > 0.05
    assert encoder.fingerprint != plain.fingerprint


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("strategy", ["epic", "text"])
def test_a_prompt_with_demonstrations_is_a_query(causal: bool, strategy: str) -> None:
    encoder, plain = separated(causal=causal), make_encoder(causal=causal)
    ours, theirs = (
        each.encode_query(TEXTS, bank=DemonstrationBank(PAIRS), strategy=strategy) for each in (encoder, plain)
    )
    assert np.abs(ours - theirs).max() > 0.05
    np.testing.assert_allclose(
        ours,
        [encoder.encode_query(text, bank=DemonstrationBank(PAIRS), strategy=strategy) for text in TEXTS],
        atol=1e-5,
    )


def test_texts_of_one_kind_are_documents(encoder: EpicEncoder) -> None:
    bank = DemonstrationBank(PAIRS, instruction="same", symmetric=True)
    documents = encoder.encode_document(TEXTS)
    np.testing.assert_allclose(encoder.encode_query(TEXTS, task="sts"), documents, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_query(TEXTS, bank=bank, num_demonstrations=0), documents, atol=1e-6)
    vectors = encoder.embed_demonstrations(bank)
    np.testing.assert_allclose(vectors[:, 0], encoder.encode_document([query for query, _ in PAIRS]), atol=1e-6)
    np.testing.assert_allclose(vectors[:, 1], encoder.encode_document([passage for _, passage in PAIRS]), atol=1e-6)
    asymmetric = encoder.embed_demonstrations(DemonstrationBank(PAIRS))
    np.testing.assert_allclose(asymmetric[:, 0], encoder.encode_query([query for query, _ in PAIRS]), atol=1e-6)


def test_copies_share_what_is_shared(encoder: EpicEncoder) -> None:
    backbone = encoder.backbone
    assert set(backbone.query_weights()) == {
        name for name, _ in backbone.transformer.named_parameters() if ".1." in name
    }
    other = copy.deepcopy(backbone)
    assert other.query_weights().keys() == backbone.query_weights().keys()
    assert sum(value.numel() for value in other.parameters()) == sum(value.numel() for value in backbone.parameters())
    before = encoder.encode_query(TEXTS)
    encoder.replicas = Replicas()
    encoder.replicas.workers = 2
    np.testing.assert_allclose(encoder.encode_query(TEXTS * 9), np.tile(before, (9, 1)), atol=1e-6)
    assert make_encoder().backbone.query_weights() == {}


@pytest.mark.parametrize(
    ("dtype", "compact", "near"),
    [("float32", False, 1e-6), ("float16", False, 5e-3), ("float16", True, 5e-3), ("int8", False, 3e-2)],
)
def test_a_saved_checkpoint(encoder: EpicEncoder, dtype: str, compact: bool, near: float, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path, dtype=dtype, compact=compact)
    loaded = EpicEncoder.from_pretrained(tmp_path, dtype="float32")
    if dtype != "int8":
        assert loaded.fingerprint == encoder.fingerprint
    assert loaded.backbone.query_weights().keys() == encoder.backbone.query_weights().keys()
    assert loaded.config.symmetric_as_documents
    np.testing.assert_allclose(loaded.encode_query(TEXTS), encoder.encode_query(TEXTS), atol=near)
    np.testing.assert_allclose(loaded.encode_document(TEXTS), encoder.encode_document(TEXTS), atol=near)
    kinds = {"int8": 0, "compact": 1, "float32": 2}
    kind = "int8" if dtype == "int8" else "compact" if compact else "float32"
    assert [(tmp_path / file).is_file() for file in QUERY_FILES] == [kinds[kind] == n for n in range(3)]
    # Saved again in each format, nothing of the former is left.
    for again, number in kinds.items():
        loaded.save_pretrained(tmp_path, dtype="float16" if again == "compact" else again, compact=again == "compact")
        assert [(tmp_path / file).is_file() for file in QUERY_FILES] == [number == n for n in range(3)]
        assert EpicEncoder.from_pretrained(tmp_path, dtype="float32").backbone.query_weights()
    make_encoder(causal=False).save_pretrained(tmp_path)
    assert not [file for file in QUERY_FILES if (tmp_path / file).exists()]
    assert not (tmp_path / "router_config.json").exists()
    assert EpicEncoder.from_pretrained(tmp_path, dtype="float32").backbone.query_weights() == {}


@pytest.mark.parametrize(
    ("dtype", "compact"),
    [("float32", False), ("float32", True), ("float16", False), ("float16", True), ("int8", False)],
)
def test_numpy_reads_queries_with_them(encoder: EpicEncoder, dtype: str, compact: bool, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path, dtype=dtype, compact=compact)
    loaded = EpicEncoder.from_pretrained(tmp_path, device="cpu", dtype="float32")
    epic = read_epic_file(tmp_path)
    opened = open_numpy_bert(tmp_path, {**epic, "weights_hash": None}, max_query_tokens=None, max_document_tokens=None)
    assert opened is not None
    light = EpicEncoder(*opened, config=loaded.config)
    for texts in (TEXTS, TEXTS[:1]):
        np.testing.assert_allclose(light.encode_query(texts), loaded.encode_query(texts), atol=2e-6)
        np.testing.assert_allclose(light.encode_document(texts), loaded.encode_document(texts), atol=2e-6)
        np.testing.assert_allclose(light.encode_query(texts, task="sts"), loaded.encode_document(texts), atol=2e-6)
    assert light.fingerprint == loaded.fingerprint
    for each in (light, loaded):
        assert [fact.value for fact in each.describe() if fact.name == "weights"] == ["of their own for queries"]
    assert not [fact for fact in make_encoder(causal=False).describe() if fact.name == "weights"]
    assert epic["weights_hash"]["values"] == opened[0].weights_hash()


def test_a_process_without_torch(encoder: EpicEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path, dtype="int8")
    code = (
        "import sys, json; from epic_rag import EpicEncoder; encoder = EpicEncoder.from_pretrained(sys.argv[1]); "
        "vector = encoder.encode_query('how to undo').tolist(); "
        "print(json.dumps([encoder.fingerprint, 'torch' in sys.modules, vector]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    loaded = EpicEncoder.from_pretrained(tmp_path, dtype="float32")
    fingerprint, has_torch, vector = json.loads(done.stdout)
    assert (fingerprint, has_torch) == (loaded.fingerprint, False)
    np.testing.assert_allclose(vector, loaded.encode_query("how to undo"), atol=2e-6)


def test_sentence_transformers_opens_it(encoder: EpicEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path, dtype="float32")
    model = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(model.encode_query(TEXTS), encoder.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(model.encode_document(TEXTS), encoder.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(model.encode(TEXTS), encoder.encode_query(TEXTS, task="sts"), atol=1e-5)


def test_the_first_layers_alone(encoder: EpicEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    cut = EpicEncoder.from_pretrained(tmp_path, num_layers=1)
    np.testing.assert_allclose(cut.encode_query(TEXTS), cut.encode_document(TEXTS), atol=1e-6)


def _remove(folder: Path) -> None:
    (folder / QUERY_FILES[0]).unlink()


def _truncate(folder: Path) -> None:
    file = folder / QUERY_FILES[0]
    file.write_bytes(file.read_bytes()[:-40])


def _rename(folder: Path) -> None:
    (folder / QUERY_FILES[0]).write_bytes((folder / "projector.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove, "has none of query_model-int8.safetensors"),
        (_rename, "does not fit the model .unknown weight"),
        (_truncate, "does not fit the model .*. Copy the checkpoint again"),
    ],
)
def test_a_damaged_checkpoint(
    encoder: EpicEncoder, damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path, dtype="int8")
    damage(tmp_path)
    assert open_numpy_bert(tmp_path, read_epic_file(tmp_path), max_query_tokens=None, max_document_tokens=None) is None
    with pytest.raises(CheckpointError, match=message):
        EpicEncoder.from_pretrained(tmp_path, dtype="float32")


def test_adapters_have_no_place(encoder: EpicEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises((ConfigError, CheckpointError)):
        EpicEncoder.from_pretrained(tmp_path / "model", adapter=tmp_path / "adapter")
