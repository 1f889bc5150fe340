"""A linear head behind the pooling: vectors of another width, in this library's folders and sentence-transformers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from epic_rag import CheckpointError, ConfigError, DemonstrationBank, EpicEncoder
from epic_rag.backbone import Backbone, Projector
from epic_rag.cpu_kernels import use_onednn
from epic_rag.prompt import collate
from epic_rag.training.inputs import Forward, SlotTable
from tests.conftest import make_encoder

TEXTS = ["a cat", "the quick brown fox jumps over the lazy dog", "def encode(texts): return model(texts)"]
BANK = DemonstrationBank(
    [("how do I install it", "run pip install"), ("a fox", "it jumps"), ("cats", "they watch")], instruction="Find it"
)


def seeded_head(width: int, *, bias: bool = True, seed: int = 7, inputs: int = 32) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(inputs, width, bias)


def with_head(width: int = 12, *, bias: bool = True, causal: bool = True) -> EpicEncoder:
    encoder = make_encoder(causal=causal)
    encoder.backbone.set_head(seeded_head(width, bias=bias))
    encoder.backbone.eval()
    encoder.invalidate_caches()
    return encoder


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [12, 32, 40])
def test_a_vector_is_the_head_of_the_pooled_states(width: int, bias: bool) -> None:
    encoder, head = with_head(width, bias=bias), seeded_head(width, bias=bias)
    rows = encoder.prompt.documents(TEXTS)
    batch = collate(rows, pad_id=encoder.prompt.pad_id)
    with torch.no_grad():
        pooled = make_encoder().backbone(batch, pooled_only=True)
        expected = nn.functional.normalize(head(pooled), dim=-1).numpy()
    assert pooled.shape == (3, 32)
    found = encoder.encode_document(TEXTS)
    assert found.shape == (3, width) == (3, encoder.dimension)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [12, 40])
def test_queries_behind_a_kept_prompt_are_those_of_a_plain_pass(width: int, causal: bool) -> None:
    encoder = with_head(width, causal=causal)
    found = encoder.encode_query(TEXTS, bank=BANK, strategy="epic")
    one_by_one = [encoder.encode_query([text], bank=BANK) for text in TEXTS]
    np.testing.assert_allclose(found, np.concatenate(one_by_one), atol=1e-5)
    prefix = encoder.prompt.prefix("Find it", num_slots=3)
    queries = encoder.encode_query([item.query for item in BANK.demonstrations], instruction="Find it")
    passages = encoder.encode_document([item.passage for item in BANK.demonstrations])
    shown = torch.from_numpy(np.stack([queries, passages], axis=1).reshape(6, width))
    forward = Forward(encoder.backbone, pad_id=encoder.prompt.pad_id, max_tokens=4096)
    with torch.no_grad():
        plain = forward(encoder.prompt.queries(prefix, TEXTS), SlotTable(shown, [list(range(6))] * 3))
    np.testing.assert_allclose(found, plain.numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["scale", "linear", "mlp"])
@pytest.mark.parametrize("dimension", [3, 5, 8])
def test_a_projector_starts_as_the_identity_as_far_as_the_widths_go(kind: Any, dimension: int) -> None:
    projector = Projector(kind, dimension, 2.0, width=5)
    vector = torch.arange(1.0, dimension + 1)[None]
    expected = torch.zeros(1, 5)
    expected[0, : min(5, dimension)] = 2.0 * vector[0, : min(5, dimension)]
    torch.testing.assert_close(projector(vector).detach(), expected)


def test_a_head_must_fit() -> None:
    encoder = make_encoder()
    with pytest.raises(ConfigError, match=r"The head takes width 31, but the transformer has width 32. Pass"):
        encoder.backbone.set_head(seeded_head(4, inputs=31))
    encoder.backbone.set_head(seeded_head(4))
    encoder.backbone.set_head(None)
    assert encoder.backbone.dimension == 32 == encoder.backbone.projector.linear.in_features


@pytest.mark.parametrize("dtype", [None, "float16", "int8"])
def test_there_and_back(dtype: str | None, tmp_path: Path) -> None:
    encoder = with_head()
    use_onednn(encoder.backbone)
    encoder.save_pretrained(tmp_path / "saved", dtype=dtype)
    loaded = EpicEncoder.from_pretrained(tmp_path / "saved")
    assert loaded.dimension == 12
    tolerance = 1e-6 if dtype is None else 0.02
    np.testing.assert_allclose(loaded.encode_document(TEXTS), encoder.encode_document(TEXTS), atol=tolerance)
    if dtype != "int8":
        assert loaded.fingerprint == encoder.fingerprint != make_encoder().fingerprint
    # Once more: the same model, whatever it is stored as.
    loaded.save_pretrained(tmp_path / "again", dtype=dtype)
    assert EpicEncoder.from_pretrained(tmp_path / "again").fingerprint == loaded.fingerprint
    # A head that is taken away leaves nothing behind.
    loaded.backbone.set_head(None)
    loaded.save_pretrained(tmp_path / "again", dtype=dtype)
    assert EpicEncoder.from_pretrained(tmp_path / "again").dimension == 32
    assert not (tmp_path / "again" / "2_Dense").exists()


def test_computed_in_bfloat16(tmp_path: Path) -> None:
    encoder = with_head()
    encoder.save_pretrained(tmp_path)
    loaded = EpicEncoder.from_pretrained(tmp_path, dtype="bfloat16")
    np.testing.assert_allclose(loaded.encode_document(TEXTS), encoder.encode_document(TEXTS), atol=0.1)
    assert loaded.fingerprint == encoder.fingerprint


@pytest.mark.parametrize("bias", [True, False])
def test_sentence_transformers_opens_it(bias: bool, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = with_head(bias=bias)
    encoder.save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), encoder.encode_document(TEXTS), atol=1e-5)


@pytest.mark.parametrize("biases", [(True,), (False, False), (True, False), (False, True), (True, True)])
def test_a_folder_of_sentence_transformers_keeps_its_dense_modules(biases: tuple[bool, ...], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    make_encoder().save_pretrained(tmp_path / "plain")
    for file in ("epic.json", "projector.safetensors", "modules.json", "sentence_bert_config.json"):
        (tmp_path / "plain" / file).unlink()
    shutil.rmtree(tmp_path / "plain" / "1_Pooling")
    widths = [32, 20, 8]
    parts: list[Any] = [Transformer(str(tmp_path / "plain"), max_seq_length=64), Pooling(32, "mean")]
    for number, bias in enumerate(biases):
        dense = Dense(widths[number], widths[number + 1], bias=bias, activation_function=nn.Identity())
        dense.linear.load_state_dict(
            seeded_head(widths[number + 1], bias=bias, seed=number, inputs=widths[number]).state_dict()
        )
        parts.append(dense)
    theirs = SentenceTransformer(modules=[*parts, Normalize()], device="cpu")
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    loaded = EpicEncoder.from_pretrained(tmp_path / "theirs")
    assert loaded.dimension == widths[len(biases)]
    np.testing.assert_allclose(loaded.encode_document(TEXTS), theirs.encode(TEXTS), atol=1e-5)


def _tanh(folder: Path) -> None:
    file = folder / "2_Dense" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "activation_function": "torch.nn.Tanh"}))


def _no_weights(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").unlink()


def _other_shape(folder: Path) -> None:
    save_file({"linear.weight": torch.zeros(12, 31)}, folder / "2_Dense" / "model.safetensors")


def _too_narrow(folder: Path) -> None:
    file = folder / "2_Dense" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_features": 31}))
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    save_file(
        {**weights, "linear.weight": weights["linear.weight"][:, :31].contiguous()},
        folder / "2_Dense" / "model.safetensors",
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_tanh, "is a dense module with torch.nn.Tanh, but a head must be linear. Use another model"),
        (_no_weights, "has no dense module that loads .*Copy the checkpoint again"),
        (_other_shape, "has no dense module that loads .*Copy the checkpoint again"),
        (_too_narrow, "takes width 31, but the transformer has width 32"),
    ],
)
def test_a_head_that_does_not_load(spoil: Any, message: str, tmp_path: Path) -> None:
    with_head().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        EpicEncoder.from_pretrained(tmp_path)


def test_dense_modules_that_do_not_follow_each_other(tmp_path: Path) -> None:
    with_head().save_pretrained(tmp_path)
    file = tmp_path / "modules.json"
    modules = json.loads(file.read_text())
    file.write_text(json.dumps([*modules[:3], modules[2], modules[3]]))
    with pytest.raises(CheckpointError, match="takes width 32, but the one before it returns width 12"):
        EpicEncoder.from_pretrained(tmp_path)


def test_width_and_dimension(tiny_encoder: EpicEncoder) -> None:
    backbone: Backbone = with_head(12).backbone
    assert (backbone.width, backbone.dimension) == (32, 12)
    assert (tiny_encoder.backbone.width, tiny_encoder.backbone.dimension) == (32, 32)
