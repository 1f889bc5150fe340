"""Weights as int8 rows: rounding, folders, fingerprints, and what other libraries make of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from epic_rag import CheckpointError, DemonstrationBank, EpicEncoder
from epic_rag import int8_weights as _quantisation
from epic_rag.int8_weights import dequantise, quantise, quantise_rows
from tests.conftest import make_encoder
from tests.helpers.families import config as family_config
from tests.helpers.families import transformer
from tests.helpers.model_files import make_adapter, word_piece_encoder

TEXTS = ["how do I install it", "", "the quick brown fox jumps over the lazy dog " * 2, "naïve 日本語"]
INT8_FILE = "model-int8-00001-of-00001.safetensors"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny causal encoder, a projector and biases that are not zero, stored as int8."""
    encoder = make_encoder()
    with torch.no_grad():
        for parameter in encoder.backbone.projector.parameters():
            parameter.add_(random(*parameter.shape, seed=1), alpha=0.1)
    folder = tmp_path_factory.mktemp("int8") / "tiny"
    encoder.save_pretrained(folder, dtype="int8")
    return folder


def weights_of(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("model*"))


# Rounding


@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (3, 4, 5), (300, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-3, 100.0])
def test_no_value_is_farther_off_than_half_a_step_or_what_was_clipped(
    shape: tuple[int, ...], dtype: torch.dtype, size: float
) -> None:
    weight = (random(*shape) * size).to(dtype)
    values, scales = quantise_rows(weight)
    assert (values.dtype, values.shape) == (torch.int8, weight.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (shape[0],))
    rows, steps = weight.float().flatten(1), scales.unsqueeze(1)
    off = (values.float().flatten(1) * steps - rows).abs()
    assert (off <= torch.maximum(steps / 2, rows.abs() - 127 * steps) * (1 + 1e-5)).all()
    assert values.float().flatten(1).abs().amax(dim=1).eq(127).all()


def test_rows_that_are_zero_stay_zero() -> None:
    weight = random(3, 8)
    weight[1] = 0
    values, scales = quantise_rows(weight)
    assert scales[1] == 0
    assert not values[1].any()
    assert not dequantise({"w": values, "w.scale": scales})["w"][1].any()


def test_each_row_has_a_scale_of_its_own() -> None:
    weight = random(4, 50) * torch.tensor([1e-6, 1e-2, 1.0, 1e4]).unsqueeze(1)
    rounded = dequantise(quantise({"w": weight}))["w"]
    assert ((rounded - weight).norm(dim=1) / weight.norm(dim=1)).max() < 0.01


def test_clipping_lowers_the_error_where_it_can() -> None:
    spread = torch.linspace(-1, 1, 20_000)
    with_outlier = torch.cat([spread, torch.tensor([1.06])]).unsqueeze(0)
    _, scales = quantise_rows(with_outlier)

    def error(step: torch.Tensor) -> torch.Tensor:
        return ((with_outlier / step).round().clamp(-127, 127) * step - with_outlier).square().sum()

    unclipped = with_outlier.abs().max() / 127
    assert 127 * scales[0] < 1.05  # it clips
    assert error(scales[0]) < 0.97 * error(unclipped)
    # And a row that gains nothing from it is left whole.
    assert 127 * quantise_rows(torch.tensor([[1.0, 0.1, -0.2]]))[1][0] == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_what_was_rounded_is_not_rounded_again(seed: int) -> None:
    stored = quantise({"w": random(200, 64, seed=seed) * 10 ** random(200, 1, seed=seed + 9)})
    again = quantise(dequantise(stored))
    assert torch.equal(stored["w"], again["w"])
    assert torch.equal(stored["w.scale"], again["w.scale"])


def test_vectors_and_numbers_are_left_alone() -> None:
    tensors = {
        "bias": random(9),
        "scale": torch.tensor(3.5),
        "mlp.scale": torch.tensor(2.5),
        "half": random(4).half(),
        "ids": torch.arange(6).reshape(2, 3),
        "empty": torch.zeros(0, 4),
    }
    stored = quantise(tensors)
    assert stored.keys() == tensors.keys()
    for read in (stored, dequantise(stored)):
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
        assert all(read[name].dtype == tensors[name].dtype for name in tensors)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.backbone.get_parameter("transformer.embed_tokens.weight")[3, 3] = value
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has values that are not finite.*as float32"):
        encoder.save_pretrained(tmp_path, dtype="int8")


# Folders


def test_what_is_in_an_int8_folder(int8_folder: Path) -> None:
    assert weights_of(int8_folder) == [INT8_FILE]
    data = json.loads((int8_folder / "epic.json").read_text("utf-8"))
    # Version 2: a release that knows 1 alone says that it is too old, rather than that a file is missing.
    assert (data["format_version"], data["weights"]) == (2, {"format": "int8-rows"})
    for name, vectors in ((INT8_FILE, "norm.weight"), ("projector.safetensors", "linear.bias")):
        stored = load_file(int8_folder / name)
        assert stored[vectors].dtype == torch.float32
        matrices = {key for key, value in stored.items() if value.dim() > 1}
        assert matrices
        assert {stored[key].dtype for key in matrices} == {torch.int8}
        assert {f"{key}.scale" for key in matrices} == {key for key in stored if key.endswith(".scale")}
    with safe_open(int8_folder / INT8_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "int8-rows"}


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
@pytest.mark.parametrize("projector", ["scale", "linear", "mlp"])
def test_vectors_are_nearly_the_same(kind: str, projector: Any, tmp_path: Path) -> None:
    encoder = make_encoder(causal=kind == "causal", projector=projector)
    encoder.save_pretrained(tmp_path, dtype="int8")
    assert encoder.dtype == torch.float32
    loaded = EpicEncoder.from_pretrained(tmp_path)
    assert (loaded.dtype, loaded.backbone.projector_dtype) == (torch.float32, torch.float32)
    assert not loaded.backbone.training
    bank = DemonstrationBank([("a", "b"), ("c", "d")])
    for options in ({"instruction": "find it"}, {"bank": bank}):
        cosines = (loaded.encode_query(TEXTS, **options) * encoder.encode_query(TEXTS, **options)).sum(axis=1)
        assert cosines.min() > 0.998
    assert loaded.fingerprint != encoder.fingerprint


def test_one_fingerprint_in_every_dtype_and_after_every_export(int8_folder: Path, tmp_path: Path) -> None:
    found = {
        EpicEncoder.from_pretrained(int8_folder, dtype=kind).fingerprint for kind in ("float32", "float16", "bfloat16")
    }
    loaded = EpicEncoder.from_pretrained(int8_folder)
    for dtype in (None, "float32", "float16", "int8"):
        loaded.save_pretrained(tmp_path / str(dtype), dtype=dtype)
        found.add(EpicEncoder.from_pretrained(tmp_path / str(dtype)).fingerprint)
    assert found == {loaded.fingerprint}
    assert json.loads((tmp_path / "None" / "epic.json").read_text("utf-8"))["format_version"] == 1
    assert "weights" not in json.loads((tmp_path / "None" / "epic.json").read_text("utf-8"))
    # Not only one hash: the very same weights.
    for file in (INT8_FILE, "projector.safetensors"):
        assert (tmp_path / "int8" / file).read_bytes() == (int8_folder / file).read_bytes()
    np.testing.assert_array_equal(
        EpicEncoder.from_pretrained(tmp_path / "None").encode_document(TEXTS), loaded.encode_document(TEXTS)
    )


def test_loading_keeps_one_copy_of_a_matrix(int8_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, int] = {}

    def record(stored: Any) -> dict[str, torch.Tensor]:
        tensors = dequantise(stored)
        made.update({name: tensor.data_ptr() for name, tensor in tensors.items()})
        return tensors

    monkeypatch.setattr(_quantisation, "dequantise", record)
    parameters = EpicEncoder.from_pretrained(int8_folder, device="cpu").backbone.transformer.named_parameters()
    assert {name: value.data_ptr() for name, value in parameters if value.dim() > 1}.items() <= made.items()


def test_large_models_lie_in_several_files(int8_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = EpicEncoder.from_pretrained(int8_folder)
    monkeypatch.setattr(_quantisation, "SHARD_BYTES", 10_000)
    encoder.save_pretrained(tmp_path, dtype="int8")
    files = weights_of(tmp_path)
    assert len(files) > 2
    assert files == [f"model-int8-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    for file in files:
        largest = max(value.numel() for value in load_file(tmp_path / file).values())
        assert (tmp_path / file).stat().st_size < max(10_000, largest + 4 * largest) + 2_000
    assert EpicEncoder.from_pretrained(tmp_path).fingerprint == encoder.fingerprint
    (tmp_path / files[1]).unlink()
    with pytest.raises(
        CheckpointError,
        match=rf"has {len(files) - 1} of {len(files)} weight files; {files[1]} is missing. Copy the checkpoint",
    ):
        EpicEncoder.from_pretrained(tmp_path)
    # A smaller one saved over it leaves none of its files.
    monkeypatch.undo()
    encoder.save_pretrained(tmp_path, dtype="int8")
    assert weights_of(tmp_path) == [INT8_FILE]


@pytest.mark.parametrize("order", [("int8", "float16"), ("float16", "int8")])
def test_saving_over_a_folder_of_the_other_format(order: tuple[str, str], tmp_path: Path) -> None:
    make_encoder(seed=1).save_pretrained(tmp_path, dtype=order[0])
    make_encoder().save_pretrained(tmp_path, dtype=order[1])
    assert weights_of(tmp_path) == [INT8_FILE if order[1] == "int8" else "model.safetensors"]
    make_encoder().save_pretrained(tmp_path / "fresh", dtype=order[1])
    assert (
        EpicEncoder.from_pretrained(tmp_path).fingerprint == EpicEncoder.from_pretrained(tmp_path / "fresh").fingerprint
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no weights", r"has 0 of 1 weight files; model-int8-00001-of-00001\.safetensors is missing. Copy"),
        ("cut", "does not load as a model: .*It needs config.json and safetensors"),
        (
            "a matrix less",
            r"lacks 1 of the weights that its config\.json needs, for instance layers\.1\.mlp\.up_proj\.weight",
        ),
        ("another shape", "does not load as a model"),
        ("projector", r"projector\.safetensors does not fit epic\.json .*Copy the checkpoint"),
    ],
)
def test_a_broken_int8_folder_is_one_clear_error(damage: str, message: str, int8_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(int8_folder, folder)
    file = folder / INT8_FILE
    stored = load_file(file)
    if damage == "no weights":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-500])
    elif damage == "a matrix less":
        for key in ("layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight.scale"):
            del stored[key]
        save_file(stored, file)
    elif damage == "another shape":
        stored["norm.weight"] = torch.ones(31)
        save_file(stored, file)
    else:
        (folder / "projector.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(CheckpointError, match=message) as caught:
        EpicEncoder.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_options_of_loading_work_on_int8(int8_folder: Path, tmp_path: Path) -> None:
    whole = EpicEncoder.from_pretrained(int8_folder)
    cut = EpicEncoder.from_pretrained(int8_folder, num_layers=1, truncate_dim=8)
    cut.save_pretrained(tmp_path / "cut", dtype="int8")
    again = EpicEncoder.from_pretrained(tmp_path / "cut")
    assert (len(again.backbone.transformer.layers), again.dimension) == (1, 8)
    assert again.fingerprint == cut.fingerprint != whole.fingerprint
    whole.save_pretrained(tmp_path / "plain")
    make_adapter(AutoModel.from_pretrained(tmp_path / "plain"), tmp_path / "adapter", target_modules=["v_proj"])
    merged = [
        EpicEncoder.from_pretrained(folder, adapter=tmp_path / "adapter")
        for folder in (int8_folder, tmp_path / "plain")
    ]
    assert merged[0].fingerprint == merged[1].fingerprint != whole.fingerprint


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "distilbert", "modernbert"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Scaled embeddings, transposed matrices, buffers that are no weights: all survive a model without weights."""
    from epic_rag.backbone import Backbone
    from epic_rag.prompt import PromptBuilder

    backbone = Backbone(transformer(family_config(family)).eval()).eval()
    tokenizer = word_piece_encoder().tokenizer if family in ("distilbert", "modernbert") else make_encoder().tokenizer
    encoder = EpicEncoder(backbone, PromptBuilder(tokenizer, append_eos=False, max_query_tokens=40))
    encoder.save_pretrained(tmp_path / "int8", dtype="int8")
    loaded = EpicEncoder.from_pretrained(tmp_path / "int8")
    loaded.save_pretrained(tmp_path / "plain")
    plain = EpicEncoder.from_pretrained(tmp_path / "plain")
    assert plain.fingerprint == loaded.fingerprint
    np.testing.assert_array_equal(plain.encode_document(TEXTS), loaded.encode_document(TEXTS))
    texts = TEXTS[::2]  # an empty text has no tokens here, and no vector
    assert (loaded.encode_document(texts) * encoder.encode_document(texts)).sum(axis=1).min() > 0.99


# Other libraries


def test_other_libraries_say_that_they_find_no_weights(int8_folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    for opener in (AutoModel.from_pretrained, lambda folder: SentenceTransformer(str(folder), device="cpu")):
        with pytest.raises(OSError, match=re.compile(r"no file named (pytorch_model\.bin, )?model\.safetensors")):
            opener(int8_folder)


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_what_is_saved_from_int8_opens_everywhere(kind: str, dtype: str | None, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    (make_encoder() if kind == "causal" else word_piece_encoder()).save_pretrained(tmp_path / "int8", dtype="int8")
    loaded = EpicEncoder.from_pretrained(tmp_path / "int8")
    loaded.save_pretrained(tmp_path / "plain", dtype=dtype)
    assert AutoModel.from_pretrained(tmp_path / "plain").dtype == torch.float32
    opened = SentenceTransformer(str(tmp_path / "plain"), device="cpu")
    tolerance = 1e-5 if dtype is None else 5e-3
    np.testing.assert_allclose(opened.encode_document(TEXTS), loaded.encode_document(TEXTS), atol=tolerance)
