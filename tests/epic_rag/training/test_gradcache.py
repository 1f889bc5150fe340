"""The cached step gives the gradients of the plain one, keeps one chunk's activations, and so do several processes."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from epic_rag import EpicEncoder
from epic_rag.training import Trainer, TrainingConfig
from epic_rag.training.gradcache import cached_backward
from epic_rag.training.sampling import sample_batch

Config = Callable[..., TrainingConfig]


def gradients(config: TrainingConfig, encoder: EpicEncoder | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step, before they are clipped."""
    # A copy, because training mode would stay with an encoder that other tests use.
    trainer = Trainer(config, copy.deepcopy(encoder))
    torch.manual_seed(1)
    trainer.encoder.backbone.train()
    trainer.encoder.backbone.zero_grad(set_to_none=True)
    terms = trainer.backward(*trainer.prepare(sample_batch(trainer.datasets, config, 0)))
    named = trainer.encoder.backbone.named_parameters()
    found = {name: value.grad.clone() for name, value in named if value.grad is not None}
    return float(terms.loss.detach()), found


def assert_same(plain: tuple[float, dict[str, torch.Tensor]], cached: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert cached[0] == pytest.approx(plain[0], rel=1e-5)
    assert plain[1].keys() == cached[1].keys()
    assert max(float(value.abs().max()) for value in plain[1].values()) > 1e-3
    for name, value in plain[1].items():
        bound = 1e-4 * max(float(value.abs().max()), 1e-4)
        torch.testing.assert_close(cached[1][name], value, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("tokens", [8192, 120, 40, 1])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"detach_demonstrations": True},
        {"zero_shot_weight": 0.0},
        {"strategy": "text"},
        {"strategy": "none"},
        {"demonstration_source": "bank", "bank_size": 4},
    ],
)
def test_the_cached_step_is_the_plain_one(config: Config, changes: dict[str, Any], tokens: int) -> None:
    # The plain step in one chunk, the cached one in chunks of any size; `down` has hard negatives.
    plain = gradients(config(**changes))
    assert_same(plain, gradients(config(**changes, grad_cache=True, micro_batch_tokens=tokens)))


@pytest.mark.parametrize("changes", [{}, {"detach_demonstrations": True}, {"gradient_checkpointing": True}])
def test_dropout_is_the_same_in_both_passes(
    config: Config, tiny_bidirectional_encoder: EpicEncoder, changes: dict[str, Any]
) -> None:
    assert tiny_bidirectional_encoder.backbone.transformer.config.hidden_dropout_prob > 0
    run = config(micro_batch_tokens=60)
    plain = gradients(run, tiny_bidirectional_encoder)
    if "detach_demonstrations" in changes:
        plain = gradients(dataclasses.replace(run, **changes), tiny_bidirectional_encoder)
    assert_same(plain, gradients(dataclasses.replace(run, grad_cache=True, **changes), tiny_bidirectional_encoder))
    # The masks matter: another seed gives another gradient.
    trainer = Trainer(run, copy.deepcopy(tiny_bidirectional_encoder))
    trainer.encoder.backbone.train()
    torch.manual_seed(2)
    other = float(trainer.loss(*trainer.prepare(sample_batch(trainer.datasets, run, 0))).loss.detach())
    assert other != pytest.approx(plain[0], rel=1e-4)


def test_kept_activations_give_the_same(config: Config) -> None:
    # What several processes do without grad_cache.
    run = config(micro_batch_tokens=60)
    plain = gradients(run)
    trainer = Trainer(run)
    trainer.encoder.backbone.train()
    _, inputs = trainer.prepare(sample_batch(trainer.datasets, run, 0))
    losses: list[torch.Tensor] = []

    def objective(q0: torch.Tensor, d: torch.Tensor, q1: torch.Tensor | None) -> torch.Tensor:
        losses.append(trainer.objective(inputs, q0, d, q1).loss)
        return losses[0]

    cached_backward(
        trainer.forward,
        inputs.queries,
        inputs.documents,
        inputs.prompted,
        inputs.shown,
        objective,
        detach=False,
        recompute=False,
    )
    named = trainer.encoder.backbone.named_parameters()
    assert_same(
        plain, (float(losses[0].detach()), {name: value.grad for name, value in named if value.grad is not None})
    )


class Held:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def most_kept(trainer: Trainer) -> int:
    """The most numbers that graphs hold at once during a step."""
    now = most = 0

    def pack(tensor: torch.Tensor) -> Held:
        nonlocal now, most
        held, size = Held(tensor), tensor.numel()
        now += size
        most = max(most, now)

        def freed() -> None:
            nonlocal now
            now -= size

        weakref.finalize(held, freed)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        trainer.train_step(sample_batch(trainer.datasets, trainer.config, 0))
    return most


def test_one_chunk_is_alive_at_a_time(config: Config) -> None:
    plain, cached = (most_kept(Trainer(config(grad_cache=each, micro_batch_tokens=40))) for each in (False, True))
    assert cached < 0.25 * plain
    # More pairs need more memory only in the plain step; what is left of the growth is the weights and the loss.
    settings = {"batch_size": 32, "micro_batch_tokens": 40}
    more_plain, more_cached = (most_kept(Trainer(config(grad_cache=each, **settings))) for each in (False, True))
    assert more_plain > 2.5 * plain
    assert more_cached < 1.5 * cached


def test_gradient_checkpointing_keeps_less(config: Config) -> None:
    plain, less = (most_kept(Trainer(config(gradient_checkpointing=each))) for each in (False, True))
    assert less < 0.5 * plain


def test_the_weights_after_some_steps_are_the_same(config: Config, tmp_path: Any) -> None:
    ends = []
    for name, cached in (("plain", False), ("cached", True)):
        trainer = Trainer(config(output=str(tmp_path / name), grad_cache=cached, micro_batch_tokens=60))
        trainer.train(show_progress=False)
        ends.append(trainer)
    for left, right in zip(*(each.encoder.backbone.parameters() for each in ends), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=2e-4)
    plain, cached_losses = ([entry["loss"] for entry in each.metrics] for each in ends)
    assert plain == pytest.approx(cached_losses, rel=1e-3)


@pytest.mark.parametrize("kind", ["tiny_encoder", "tiny_bidirectional_encoder"])
def test_gradient_checkpointing_gives_the_same(config: Config, kind: str, request: pytest.FixtureRequest) -> None:
    encoder: EpicEncoder = request.getfixturevalue(kind)
    plain = gradients(config(), encoder)
    assert_same(plain, gradients(config(gradient_checkpointing=True), encoder))
