"""Autocast, the loss scale of float16, and what the optimiser is made of."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from epic_rag import EpicEncoder, checkpoint_io
from epic_rag.errors import ConfigError, TrainingError
from epic_rag.training import Trainer, TrainingConfig, optimizer
from epic_rag.training.optimizer import WeightAverage, build_optimizer, resolve_dtype, warmup_and_decay
from epic_rag.training.sampling import sample_batch

Config = Callable[..., TrainingConfig]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("cached", [False, True])
def test_half_precision_is_close_to_single(config: Config, dtype: str, cached: bool) -> None:
    results = []
    for each in ("float32", dtype):
        trainer = Trainer(config(dtype=each, grad_cache=cached))
        if each == "float16":
            # Low enough for the gradients of a random model, so that the first step is not left out.
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        results.append(trainer.train_step(sample_batch(trainer.datasets, trainer.config, 0)))
        assert all(value.dtype == torch.float32 for value in trainer.encoder.backbone.parameters())
    assert results[1].loss == pytest.approx(results[0].loss, rel=0.05)
    # The norm is that of the real gradient, not of the scaled one.
    assert results[1].gradient_norm == pytest.approx(results[0].gradient_norm, rel=0.2)
    assert (results[1].loss_scale is not None) == (dtype == "float16")
    assert results[0].loss_scale is None


def overflowing(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the gradients of some steps infinite, as a loss scale that is too large does."""
    unscale = trainer.scaler.unscale_

    def spoiled(optimizer: torch.optim.Optimizer) -> None:
        if trainer.step in steps:
            next(value for value in trainer.encoder.backbone.parameters() if value.grad is not None).grad[0] = torch.inf
        unscale(optimizer)

    monkeypatch.setattr(trainer.scaler, "unscale_", spoiled)


def test_a_step_that_overflows_is_left_out(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config(dtype="float16"))
    # Low enough for the second step not to overflow by itself.
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    overflowing(trainer, monkeypatch, {0})
    before = [value.detach().clone() for value in trainer.encoder.backbone.parameters()]
    scale = trainer.scaler.get_scale()
    result = trainer.train_step(sample_batch(trainer.datasets, trainer.config, 0))
    assert result.gradient_norm is None
    assert result.loss_scale == trainer.scaler.get_scale() == scale / 2
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.encoder.backbone.parameters(), strict=True))
    trainer.step = 1
    assert trainer.train_step(sample_batch(trainer.datasets, trainer.config, 1)).gradient_norm is not None
    assert not all(
        torch.equal(old, new) for old, new in zip(before, trainer.encoder.backbone.parameters(), strict=True)
    )


def test_overflow_at_every_scale_is_an_error(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config(dtype="float16", steps=60))
    overflowing(trainer, monkeypatch, set(range(60)))
    with pytest.raises(TrainingError, match=r"The gradient's norm at step \d+ is (inf|nan)"):
        trainer.train(show_progress=False)
    assert trainer.step > 10


def test_without_a_scale_an_infinite_gradient_is_an_error(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config(dtype="bfloat16"))
    overflowing(trainer, monkeypatch, {0})
    with pytest.raises(TrainingError, match=r"The gradient's norm at step 1 is (inf|nan)"):
        trainer.train(show_progress=False)


def test_the_scale_goes_on_with_the_run(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for name, stops in (("whole", (None,)), ("halves", (3, None))):
        for stop in stops:
            trainer = Trainer(config(dtype="float16", output=str(tmp_path / name), stop_at_step=stop))
            overflowing(trainer, monkeypatch, {1})
            trainer.train(show_progress=False)
        ends.append(trainer)
    first = json.loads((tmp_path / "whole" / "checkpoint-3" / "trainer.json").read_text())["scaler"]
    assert first["scale"] < 2.0**16
    assert ends[0].scaler.state_dict() == ends[1].scaler.state_dict()
    left, right = (load_file(each.folder / "checkpoint-6" / "state.safetensors") for each in ends)
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_one_look_at_the_losses_a_step(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU each look waits for everything that was started: one a step, however many chunks there are.
    trainer = Trainer(config(micro_batch_tokens=40, grad_cache=True))
    looks: list[str] = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        original: Any = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, n=name, f=original: (looks.append(n) if self.is_floating_point() else None, f(self, *a))[
                1
            ],
        )
    batch = sample_batch(trainer.datasets, trainer.config, 0)
    trainer.backward(*trainer.prepare(batch))
    assert looks == []


@pytest.mark.parametrize("supported", [True, False])
def test_auto_is_what_the_processor_multiplies(
    config: Config, supported: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (checkpoint_io, optimizer):
        monkeypatch.setattr(module, "has_bfloat16_instructions", lambda: supported)
    trainer = Trainer(config(dtype="auto", device="cpu"))
    name = "bfloat16" if supported else "float32"
    assert (trainer.config.dtype, trainer.forward.dtype) == (name, getattr(torch, name))
    trainer.train(show_progress=False)
    assert trainer.encoder.config.training is None
    written = json.loads((trainer.folder / "final" / "epic.json").read_text())
    assert written["training"]["config"]["dtype"] == name
    assert not caplog.records


def test_a_warning_for_bfloat16_without_instructions(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(optimizer, "has_bfloat16_instructions", lambda: False)
    assert Trainer(config(dtype="bfloat16", device="cpu")).config.dtype == "bfloat16"
    [record] = caplog.records
    assert "this processor has no instructions for" in record.getMessage()
    assert "--set dtype=auto" in record.getMessage()


def test_auto_on_other_devices(config: Config) -> None:
    assert resolve_dtype(config(dtype="auto"), torch.device("cuda")).dtype == "bfloat16"


def test_rates_of_layers(config: Config, tiny_bidirectional_encoder: EpicEncoder) -> None:
    run = config(layer_decay=0.5, learning_rate=0.1, projector_learning_rate=0.3)
    backbone = tiny_bidirectional_encoder.backbone
    groups = build_optimizer(backbone, run).param_groups
    rates = {id(value): group["peak"] for group in groups for value in group["params"]}
    found = {name: rates[id(value)] for name, value in backbone.named_parameters()}
    assert found["transformer.encoder.layer.1.output.dense.weight"] == pytest.approx(0.1)
    assert found["transformer.encoder.layer.0.attention.self.query.bias"] == pytest.approx(0.05)
    assert found["transformer.embeddings.word_embeddings.weight"] == pytest.approx(0.025)
    assert found["projector.linear.weight"] == 0.3


@pytest.mark.parametrize("kind", ["tiny_encoder", "tiny_bidirectional_encoder"])
def test_frozen_layers_stay(config: Config, kind: str, request: pytest.FixtureRequest) -> None:
    encoder: EpicEncoder = copy.deepcopy(request.getfixturevalue(kind))
    before = {name: value.clone() for name, value in encoder.backbone.state_dict().items()}
    trainer = Trainer(config(frozen_layers=1), encoder)
    trainer.train_step(sample_batch(trainer.datasets, trainer.config, 0))
    moved = {name for name, value in encoder.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert not any("embed" in name or "layer.0." in name or "layers.0." in name for name in moved)
    assert any("layer.1." in name or "layers.1." in name for name in moved)


def test_too_many_frozen_layers(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"frozen_layers is 9, and the model has 2 layers\."):
        Trainer(config(frozen_layers=9))


def test_decay_at_the_end(config: Config) -> None:
    run = config(steps=100, warmup_ratio=0.1, decay_ratio=0.4)
    factors = [warmup_and_decay(step, run) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert set(factors[9:61]) == {1.0}
    assert factors[80] == pytest.approx(0.5)
    assert factors[100] == 0.0
    # A warm-up and a decay that overlap meet at 1.
    assert max(warmup_and_decay(step, config(steps=10, warmup_ratio=0.5)) for step in range(10)) == 1.0


def test_average_of_weights(config: Config, tiny_encoder: EpicEncoder) -> None:
    backbone = copy.deepcopy(tiny_encoder.backbone)
    average = WeightAverage(backbone, 0.9)
    weight = backbone.projector.linear.weight
    expected = weight.detach().clone()
    for step in range(1, 200):
        with torch.no_grad():
            weight.fill_(step)
        average.update(backbone)
        expected.lerp_(weight.detach(), 1 - min(0.9, step / (step + 9)))
    average.swap(backbone)
    torch.testing.assert_close(weight.detach(), expected)
    # 1 / (1 - decay) steps behind the last.
    assert weight[0, 0].item() == pytest.approx(199 - 9, abs=0.1)
    average.swap(backbone)
    assert weight[0, 0].item() == 199


def test_the_result_of_a_run_is_the_average(config: Config, tmp_path: Path) -> None:
    ends = {}
    for decay in (0.0, 0.9):
        run = config(ema_decay=decay, learning_rate=0.01, output=str(tmp_path / str(decay)))
        trainer = Trainer(run)
        final = trainer.train(show_progress=False)
        ends[decay] = load_file(final / "model.safetensors")
        state = load_file(tmp_path / str(decay) / "checkpoint-6" / "state.safetensors")
        kept = {key.removeprefix("average.transformer."): value for key, value in state.items() if "average.t" in key}
        assert bool(kept) == bool(decay)
        for key, value in kept.items():
            torch.testing.assert_close(ends[decay][key].float(), value, rtol=0, atol=1e-3)
    assert any((ends[0.0][key] - ends[0.9][key]).abs().max() > 1e-3 for key in ends[0.0])
