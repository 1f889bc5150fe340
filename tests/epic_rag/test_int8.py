"""int8 layers: exact integers between two roundings, on every family, and refused where they cannot compute."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from epic_rag import CheckpointError, ConfigError, EpicEncoder, _int8
from epic_rag._int8 import Int8Linear, check_int8, dtype_of, multiplies_int8, use_int8
from epic_rag.backbone import Backbone
from epic_rag.cpu_kernels import portable
from tests.helpers.families import FAMILIES, TEXTS, config, encoder_of, transformer

needs_int8 = pytest.mark.skipif(not multiplies_int8(), reason="this processor has no exact products of int8")
LONG_TEXTS = ["how do I install it", "a", "the quick brown fox jumps over the lazy dog " * 3]


def layer(inputs: int = 24, outputs: int = 40, bias: bool = True) -> Int8Linear:
    torch.manual_seed(0)
    return Int8Linear(nn.Linear(inputs, outputs, bias=bias))


def reference(made: Int8Linear, given: torch.Tensor) -> torch.Tensor:
    """The definition, in float64: there every sum of products of integers is exact."""
    rows = given.reshape(-1, given.shape[-1]).float()
    scale = (rows.abs().amax(dim=1, keepdim=True) * (1 / 127)).clamp(min=1e-30)
    whole = torch.floor(rows * scale.reciprocal() + 128.5) - 128
    product = whole.double() @ made.weight.double().T
    output = product * made.scale.double() * scale.double()
    if made.bias is not None:
        output = output + made.bias.double()
    return output.to(given.dtype).view(*given.shape[:-1], -1)


@needs_int8
@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (2, 3, 24), (1300, 24)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_the_product_is_that_of_rounded_numbers(shape: tuple[int, ...], bias: bool) -> None:
    made = layer(bias=bias)
    given = torch.randn(shape) * 3
    torch.testing.assert_close(made(given), reference(made, given), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.emulated(given), reference(made, given), atol=1e-5, rtol=1e-5)
    assert made(given[..., :0, :] if given.dim() > 1 else given[None][:0]).numel() == 0


@needs_int8
@pytest.mark.parametrize("inputs", [1, 3, 17, 384])
@torch.inference_mode()
def test_odd_widths_zeros_and_large_values(inputs: int) -> None:
    made = layer(inputs, 5)
    given = torch.randn(6, inputs)
    given[1] = 0
    given[2, 0] = 1e4
    given[3] = 1e-20
    torch.testing.assert_close(made(given), reference(made, given), atol=1e-5, rtol=1e-5)


@needs_int8
@torch.inference_mode()
def test_it_is_close_to_the_layer_that_it_was_made_of() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(256, 64)
    given = torch.randn(50, 256)
    expected = plain(given)
    error = (Int8Linear(plain)(given) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.02


@needs_int8
@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others() -> None:
    made = layer(384, 384)
    given = torch.randn(90, 384)
    given[40] *= 1e3
    together = made(given)
    for row in (0, 40, 89):
        assert torch.equal(made(given[row : row + 1])[0], together[row])


@needs_int8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_what_comes_out_has_the_dtype_that_came_in(dtype: torch.dtype) -> None:
    made = layer().to(dtype)
    assert made.scale.dtype == torch.float32
    given = torch.randn(3, 24).to(dtype)
    assert made(given).dtype == dtype
    torch.testing.assert_close(made(given), reference(made, given), atol=1e-2, rtol=1e-2)


@needs_int8
@torch.no_grad()
def test_copies_pickles_and_states() -> None:
    made = layer()
    given = torch.randn(3, 24)
    expected = made(given)
    other = layer()
    other.weight.zero_()  # its layout has to follow
    assert not torch.equal(other(given), expected)
    assert other.load_state_dict(made.state_dict()).missing_keys == []
    for each in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), other):
        assert torch.equal(each(given), expected)
    assert made.state_dict()["weight"].dtype == torch.float32
    assert torch.equal(made.state_dict()["weight"], made.weight.float() * made.scale.unsqueeze(1))


@needs_int8
def test_within_portable_torch_multiplies() -> None:
    made = layer()
    with portable():
        made(torch.randn(3, 24))
    assert "_laid_out" not in made.__dict__


@needs_int8
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(Backbone(transformer(config(family))))
    plain = encoder.encode_document(TEXTS), encoder.encode_query(TEXTS, instruction="find it")
    assert use_int8(encoder.backbone.transformer) > 0
    assert encoder.dtype == torch.int8
    found = encoder.encode_document(TEXTS), encoder.encode_query(TEXTS, instruction="find it")
    encoder.prefix_cache = None
    with portable():
        emulated = encoder.encode_document(TEXTS), encoder.encode_query(TEXTS, instruction="find it")
    for one, other, float32 in zip(found, emulated, plain, strict=True):
        assert (one * other).sum(axis=1).min() > 0.99
        assert (one * float32).sum(axis=1).min() > 0.95
        assert not np.allclose(one, float32, atol=1e-5)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="GPT2Model has 0 linear layers"):
        use_int8(transformer(config("gpt2")))


def test_weights_that_are_not_finite_are_refused() -> None:
    plain = nn.Linear(3, 4)
    nn.init.constant_(plain.weight, float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        use_int8(nn.Sequential(plain))


def test_a_layer_in_two_places_stays_one() -> None:
    plain = nn.Linear(3, 4)
    model = nn.Sequential(nn.Sequential(plain), nn.Sequential(plain))
    assert use_int8(model) == 1
    assert len({id(module) for module in model.modules() if isinstance(module, Int8Linear)}) == 1


# A loaded encoder


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> EpicEncoder:
    return EpicEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="int8")


@needs_int8
@pytest.mark.parametrize("dtype", ["int8", torch.int8])
def test_loading(tiny_checkpoint: Path, dtype: str | torch.dtype) -> None:
    plain = EpicEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype=dtype)
    assert encoder.dtype == torch.int8
    assert encoder.fingerprint == plain.fingerprint
    assert not any(parameter.requires_grad for parameter in encoder.backbone.transformer.parameters())
    assert (encoder.encode_document(LONG_TEXTS) * plain.encode_document(LONG_TEXTS)).sum(axis=1).min() > 0.99
    first = EpicEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype=dtype, num_layers=1)
    assert dtype_of(first.backbone.transformer) == torch.int8
    assert first.fingerprint != plain.fingerprint


@needs_int8
def test_a_copy_of_an_encoder(loaded: EpicEncoder) -> None:
    np.testing.assert_array_equal(copy.deepcopy(loaded).encode_document(LONG_TEXTS), loaded.encode_document(LONG_TEXTS))


@needs_int8
def test_several_replicas_give_the_same_vectors(tiny_checkpoint: Path, loaded: EpicEncoder) -> None:
    several = EpicEncoder.from_pretrained(tiny_checkpoint, device="cpu,cpu", dtype="int8")
    texts = LONG_TEXTS * 200
    assert (several.encode_document(texts) * loaded.encode_document(texts)).sum(axis=1).min() > 0.999


@needs_int8
@pytest.mark.parametrize("dtype", [None, "int8", "float32"])
def test_saving_loses_nothing_more(dtype: str | None, loaded: EpicEncoder, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path, dtype=dtype)
    assert bool(list(tmp_path.glob("model-int8-*"))) == (dtype != "float32")
    again = EpicEncoder.from_pretrained(tmp_path, device="cpu", dtype="int8")
    for name, tensor in again.backbone.transformer.state_dict().items():
        if name.endswith("proj.weight"):
            assert torch.equal(tensor, loaded.backbone.transformer.state_dict()[name]), name
    assert again.settings == loaded.settings
    plain = EpicEncoder.from_pretrained(tmp_path, device="cpu")
    assert plain.fingerprint == again.fingerprint


@needs_int8
def test_training_is_refused(tiny_checkpoint: Path) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="int8")
    with pytest.raises(ConfigError, match=r"dtype 'int8' has no gradients; load the model as float32"):
        encoder.backbone.train()


@pytest.mark.parametrize(
    ("device", "setting", "supported", "expected"),
    [
        ("cuda", None, True, "device is 'cuda'; pass device='cpu'"),
        ("cpu", "1", True, "EPIC_RAG_PORTABLE is set"),
        ("cpu", None, False, "no exact products of int8"),
    ],
)
def test_where_it_cannot_compute(
    device: str, setting: str | None, supported: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_int8, "multiplies_int8", lambda: supported)
    if setting is None:
        monkeypatch.delenv("EPIC_RAG_PORTABLE", raising=False)
    else:
        monkeypatch.setenv("EPIC_RAG_PORTABLE", setting)
    with pytest.raises(ConfigError, match=expected):
        check_int8(torch.device(device))


def test_loading_asks_first(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_int8, "multiplies_int8", lambda: False)
    with pytest.raises(ConfigError, match="no exact products"):
        EpicEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="int8")
    with pytest.raises(ConfigError, match=r"known are float32, bfloat16, float16, int8"):
        EpicEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="int4")
