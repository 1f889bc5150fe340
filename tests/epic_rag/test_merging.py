"""The mean of two models' weights."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from epic_rag import CheckpointError, ConfigError, EpicEncoder
from epic_rag.backbone import Pooling
from epic_rag.merging import merge
from tests.conftest import make_encoder


def moved(encoder: EpicEncoder, by: float) -> EpicEncoder:
    """As if trained: every weight differs by so much."""
    with torch.no_grad():
        for value in encoder.backbone.parameters():
            value.add_(by)
    encoder.forget_fingerprint()
    return encoder


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_weights_lie_between(weight: float) -> None:
    start, trained = make_encoder(), moved(make_encoder(), 0.125)
    trained.settings["training"] = {"steps": 7}
    before = trained.fingerprint
    other = start.fingerprint
    merge(trained, start, weight=weight)
    for (name, value), first in zip(
        trained.backbone.named_parameters(), make_encoder().backbone.parameters(), strict=True
    ):
        # The start has no training record, so its projector was never trained and says nothing.
        share = 0.0 if name.startswith("projector.") else weight
        torch.testing.assert_close(value, first + 0.125 * (1 - share))
    assert (trained.fingerprint == before) is (weight == 0)
    assert start.fingerprint == other
    merged = {"name": start.name, "fingerprint": other, "weight": weight}
    assert trained.settings["training"] == {"steps": 7, "merged": [merged]}


def test_trained_projectors_are_merged_too() -> None:
    one, two = moved(make_encoder(), 0.5), make_encoder()
    two.settings["training"] = {"steps": 1}
    merge(one, two)
    for value, first in zip(
        one.backbone.projector.parameters(), make_encoder().backbone.projector.parameters(), strict=True
    ):
        torch.testing.assert_close(value, first + 0.25)


def test_a_second_merge_is_recorded_after_the_first() -> None:
    encoder, other = moved(make_encoder(), 0.5), make_encoder()
    encoder.settings["training"] = {"steps": 7}
    merge(encoder, other, weight=0.25)
    merge(encoder, other, weight=0.5)
    assert [item["weight"] for item in encoder.settings["training"]["merged"]] == [0.25, 0.5]
    value, first = next(encoder.backbone.parameters()), next(other.backbone.parameters())
    torch.testing.assert_close(value, first + 0.5 * 0.75 * 0.5)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_weight_is_a_share(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"give the second model's share, from 0 to 1"):
        merge(make_encoder(), make_encoder(), weight=weight)


def test_two_plain_models_make_a_plain_one() -> None:
    encoder = make_encoder()
    merge(encoder, make_encoder(seed=1))
    assert "training" not in encoder.settings


def test_float32_alone() -> None:
    half = make_encoder()
    half.backbone.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r'load both with dtype="float32"'):
        merge(make_encoder(), half)


def test_models_of_another_kind() -> None:
    encoder = make_encoder()
    before = encoder.fingerprint
    for pooling, said in (("last", "architecture LlamaModel, .* BertModel"), ("mean", "pooling last, .* mean")):
        other = make_encoder(causal=False)
        other.backbone.pooling = cast("Pooling", pooling)
        with pytest.raises(CheckpointError, match=f"has {said}; merge two models that were trained from the same one"):
            merge(encoder, other)
    assert encoder.fingerprint == before


def test_another_width_depth_head_or_projector() -> None:
    encoder = make_encoder()
    other = make_encoder()
    other.backbone.put_head(torch.nn.Linear(other.dimension, 5))
    with pytest.raises(CheckpointError, match=r"head\.\S+ missing, .* \(5,"):
        merge(encoder, other)
    other = make_encoder(projector="mlp")
    other.settings["training"] = {"steps": 1}
    with pytest.raises(CheckpointError, match=r"projector linear, .* mlp"):
        merge(encoder, other)
