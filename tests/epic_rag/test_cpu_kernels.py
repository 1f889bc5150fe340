"""oneDNN's layers are torch's layers, but for rounding and time."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from epic_rag import EpicEncoder, checkpoint_io
from epic_rag.backbone import Backbone
from epic_rag.cpu_kernels import OneDnnLinear, _available, disable_fast_kernels, use_onednn
from tests.helpers.families import FAMILIES, TEXTS, config, encoder_of, transformer

pytestmark = pytest.mark.skipif(not _available(), reason="this build of torch has no oneDNN beside MKL")


def layer(inputs: int = 24, outputs: int = 40, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(inputs, outputs, bias=bias).eval()
    assert use_onednn(nn.Sequential(made)) == 1
    assert type(made) is OneDnnLinear
    return made


@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (2, 3, 24), (300, 24)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_the_product_is_the_same(shape: tuple[int, ...], bias: bool) -> None:
    made = layer(bias=bias)
    given = torch.randn(shape)
    torch.testing.assert_close(made(given), nn.functional.linear(given, made.weight, made.bias), atol=1e-5, rtol=1e-5)


def test_it_is_oneDNN_that_computes() -> None:  # noqa: N802 - its name
    made = layer()
    with torch.inference_mode():
        made(torch.randn(3, 24))
    assert "_packed" in made.__dict__


@pytest.mark.parametrize("how", ["gradients", "training", "portable", "dtype", "empty"])
def test_where_the_layer_is_torchs_own(how: str) -> None:
    made = layer()
    given = torch.randn(3, 24)
    if how == "gradients":
        made(given).sum().backward()
        assert made.weight.grad is not None
    elif how == "training":
        with torch.no_grad():
            made.train()(given)
    elif how == "portable":
        with torch.no_grad(), disable_fast_kernels():
            made(given)
    elif how == "dtype":
        with torch.no_grad():
            made.double()(given.double())
    else:
        with torch.no_grad():
            assert made(given[:0]).shape == (0, 40)
    assert "_packed" not in made.__dict__


@torch.no_grad()
def test_a_weight_that_changes_is_packed_anew() -> None:
    made = layer()
    given = torch.randn(3, 24)
    before = made(given)
    made.weight.mul_(2)
    torch.testing.assert_close(made(given) - made.bias, 2 * (before - made.bias), atol=1e-5, rtol=1e-4)
    made.weight.data = torch.zeros_like(made.weight)
    torch.testing.assert_close(made(given), made.bias.expand(3, -1))


@torch.no_grad()
def test_copies_and_pickles_work(tmp_path: Path) -> None:
    made = layer()
    given = torch.randn(3, 24)
    expected = made(given)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(other(given), expected)
    assert set(made.state_dict()) == {"weight", "bias"}


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPIC_RAG_PORTABLE", "1")
    assert use_onednn(nn.Linear(3, 4)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_vectors(family: str) -> None:
    encoder = encoder_of(Backbone(transformer(config(family))))
    expected = encoder.encode_document(TEXTS), encoder.encode_query(TEXTS, instruction="find it")
    fingerprint = encoder.fingerprint
    use_onednn(encoder.backbone)
    found = encoder.encode_document(TEXTS), encoder.encode_query(TEXTS, instruction="find it")
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    encoder.invalidate_caches()
    assert encoder.fingerprint == fingerprint


def test_a_loaded_encoder_uses_it(tiny_checkpoint: Path) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    assert any(isinstance(module, OneDnnLinear) for module in encoder.backbone.modules())


@pytest.mark.parametrize("supported", [True, False])
def test_the_fastest_dtype_follows_the_processor(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_io, "has_bfloat16_instructions", lambda: supported)
    assert checkpoint_io.parse_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if supported else torch.float32)
    assert checkpoint_io.parse_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert checkpoint_io.parse_dtype(None, torch.device("cpu")) == torch.float32
