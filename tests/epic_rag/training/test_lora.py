"""LoRA: what is trained, what a checkpoint keeps, and that the result is the model that was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError, MissingExtraError
from epic_rag.training import Trainer, TrainingConfig
from epic_rag.training.sampling import sample_batch

Config = Callable[..., TrainingConfig]
TEXTS = ["cat", "dog on the roof"]


@pytest.fixture
def plain(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny decoder as a Hugging Face folder without anything of ours."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "plain")
    for name in ("epic.json", "projector.safetensors"):
        (folder / name).unlink()
    return folder


def trained_names(trainer: Trainer) -> set[str]:
    return {name for name, value in trainer.encoder.backbone.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
    ],
)
def test_adapters_and_projector_are_trained_and_nothing_else(
    config: Config, targets: list[str], modules: set[str]
) -> None:
    trainer = Trainer(config(lora_rank=4, lora_targets=targets))
    names = trained_names(trainer)
    lora = {name for name in names if "lora_" in name}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in lora} == modules
    assert names - lora == {"projector.linear.weight", "projector.linear.bias"}
    frozen = {n: v.clone() for n, v in trainer.encoder.backbone.named_parameters() if n not in names}
    trainer.train_step(sample_batch(trainer.datasets, trainer.config, 0))
    assert {id(v) for group in trainer.optimizer.param_groups for v in group["params"]} == {
        id(v) for n, v in trainer.encoder.backbone.named_parameters() if n in names
    }
    for name, value in trainer.encoder.backbone.named_parameters():
        if name in frozen:
            assert value.grad is None
            assert torch.equal(value, frozen[name])
        elif "lora_A" not in name:  # lora_B starts at zero, so lora_A has no gradient in the first step
            assert float(value.grad.abs().max()) > 0, name


def test_the_seed_decides_the_first_adapters(config: Config) -> None:
    first, again, other = (Trainer(config(lora_rank=2, seed=seed)) for seed in (0, 0, 1))
    values = [
        {name: value for name, value in each.encoder.backbone.named_parameters() if "lora_A" in name}
        for each in (first, again, other)
    ]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert not any(torch.equal(values[0][name], values[2][name]) for name in values[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_weights_are_in_the_dtype_that_is_computed_in(config: Config, dtype: str) -> None:
    trainer = Trainer(config(lora_rank=4, dtype=dtype))
    names = trained_names(trainer)
    for name, value in trainer.encoder.backbone.named_parameters():
        assert value.dtype == (torch.float32 if name in names else getattr(torch, dtype)), name
    result = trainer.train_step(sample_batch(trainer.datasets, trainer.config, 0))
    assert 0 < result.loss < 100


def test_the_result_is_merged_and_the_adapter_is_beside_it(config: Config, plain: Path) -> None:
    trainer = Trainer(config(model=str(plain), lora_rank=4, lora_alpha=8, base_model="someone/tiny"))
    final = trainer.train(show_progress=False)
    wanted = EpicEncoder(trainer.encoder.backbone.eval(), trainer.prompt).encode_document(TEXTS)
    untrained = EpicEncoder.from_pretrained(plain).encode_document(TEXTS)
    assert np.abs(wanted - untrained).max() > 0.01
    merged = EpicEncoder.from_pretrained(final)
    np.testing.assert_allclose(merged.encode_document(TEXTS), wanted, atol=3e-3)
    assert not any("lora" in name or "base_layer" in name for name in merged.backbone.state_dict())
    # The projector was trained, too.
    projector = trainer.encoder.backbone.projector.linear.weight.detach()
    torch.testing.assert_close(merged.backbone.projector.linear.weight.detach(), projector, atol=3e-3, rtol=1e-3)
    adapted = EpicEncoder.from_pretrained(plain, adapter=final / "adapter")
    np.testing.assert_allclose(adapted.encode_document(TEXTS), wanted, atol=1e-4)
    settings = json.loads((final / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert settings["base_model_name_or_path"] == "someone/tiny"
    record = json.loads((final / "epic.json").read_text())["training"]
    assert "peft" in record["versions"]
    assert record["config"]["lora_rank"] == 4
    weights = [value for value in trainer.encoder.backbone.parameters() if value.requires_grad]
    assert record["trained_parameters"] == sum(value.numel() for value in weights)
    # Writing the result changes nothing of what is trained.
    assert any("lora_" in name for name in trained_names(trainer))


def test_the_adapter_of_the_first_layers_fits_the_whole_base(config: Config, plain: Path) -> None:
    trainer = Trainer(config(model=str(plain), lora_rank=2, num_layers=1, steps=2))
    final = trainer.train(show_progress=False)
    adapted = EpicEncoder.from_pretrained(plain, adapter=final / "adapter", num_layers=1)
    wanted = EpicEncoder.from_pretrained(final).encode_document(TEXTS)
    np.testing.assert_allclose(adapted.encode_document(TEXTS), wanted, atol=3e-3)


def test_checkpoints_keep_what_is_trained_and_go_on(config: Config, tmp_path: Path) -> None:
    whole = Trainer(config(lora_rank=4, lora_dropout=0.1, output=str(tmp_path / "whole")))
    whole.train(show_progress=False)
    first = Trainer(config(lora_rank=4, lora_dropout=0.1, stop_at_step=3))
    first.train(show_progress=False)
    kept = load_file(first.folder / "checkpoint-3" / "state.safetensors")
    assert {key.removeprefix("model.") for key in kept if key.startswith("model.")} == trained_names(first)
    second = Trainer(config(lora_rank=4, lora_dropout=0.1))
    second.train(show_progress=False)
    left, right = (load_file(each.folder / "checkpoint-6" / "state.safetensors") for each in (whole, second))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_module_that_is_not_there(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"lora_targets is \['query'\], and .* are down_proj, .*q_proj.*\. Name some"):
        Trainer(config(lora_rank=4, lora_targets=["query"]))


def test_without_peft_the_extra_is_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, f=importlib.util.find_spec: None if name == "peft" else f(name)
    )
    with pytest.raises(MissingExtraError, match=r"Training with LoRA needs peft.*epic-rag\[train\]"):
        Trainer(config(lora_rank=4))


def test_an_encoder_of_ones_own(config: Config, tiny_checkpoint: Path, tmp_path: Path) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    trainer = Trainer(config(lora_rank=2, steps=1), encoder)
    assert trainer.encoder is encoder
    before: Any = encoder.encode_document(TEXTS)
    final = trainer.train(show_progress=False)
    assert not np.array_equal(encoder.encode_document(TEXTS), before)
    assert EpicEncoder.from_pretrained(final).dimension == 32
