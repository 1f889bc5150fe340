"""The method: the terms of a step, where gradients flow, what is learned, and the settings of a run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError, MissingExtraError
from epic_rag.prompt import EncoderInput
from epic_rag.training import TaskConfig, Trainer, TrainingBatch, TrainingConfig
from epic_rag.training.optimizer import build_optimizer, warmup_and_decay
from epic_rag.training.sampling import sample_batch

Config = Callable[..., TrainingConfig]


def first_batch(trainer: Trainer) -> TrainingBatch:
    return sample_batch(trainer.datasets, trainer.config, 0)


def recorded(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the trainer embeds in a step, in order (queries, documents, queries with demonstrations)."""
    seen: list[torch.Tensor] = []
    embed = trainer.forward

    def spy(*arguments: Any) -> torch.Tensor:
        vectors = embed(*arguments)
        if vectors.requires_grad:
            vectors.retain_grad()
        seen.append(vectors)
        return vectors

    monkeypatch.setattr(trainer, "forward", spy)
    return seen


@pytest.mark.parametrize("strategy", ["epic", "text"])
@pytest.mark.parametrize("kind", ["tiny_encoder", "tiny_bidirectional_encoder"])
def test_no_demonstrations_is_exactly_zero_shot(
    config: Config, strategy: str, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder: EpicEncoder = request.getfixturevalue(kind)
    trainer = Trainer(config(strategy=strategy, max_demonstrations=0), encoder)
    seen = recorded(trainer, monkeypatch)
    terms = trainer.loss(*trainer.prepare(first_batch(trainer)))
    q0, _, q1 = seen
    assert torch.equal(q0, q1)
    assert torch.equal(terms.with_demonstrations, terms.zero_shot)
    torch.testing.assert_close(terms.loss, 2 * terms.zero_shot)


def test_demonstrations_change_the_query(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config())
    seen = recorded(trainer, monkeypatch)
    batch = first_batch(trainer)
    trainer.loss(*trainer.prepare(batch))
    q0, d, q1 = seen
    shown = torch.tensor([bool(chosen) for task in batch.tasks for chosen in task.demonstrations])
    assert 0 < shown.sum() < len(shown)
    moved = (q0 - q1).abs().max(dim=1).values
    assert (moved[shown] > 1e-3).all()
    # Beside others in a batch, k = 0 is zero-shot up to rounding.
    assert (moved[~shown] < 1e-5).all()
    assert d.shape == (8 + 4, 32)  # a hard negative for each row of `down`
    for vectors in seen:
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))


def test_loss_is_the_weighted_sum(config: Config) -> None:
    losses = []
    for weight in (0.0, 0.25):
        trainer = Trainer(config(zero_shot_weight=weight))
        terms = trainer.loss(*trainer.prepare(first_batch(trainer)))
        torch.testing.assert_close(terms.loss, terms.with_demonstrations + weight * terms.zero_shot)
        losses.append((float(terms.with_demonstrations), float(terms.zero_shot)))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_flow_through_slots_unless_detached(
    config: Config, detach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the zero-shot term, slots are the only way from the loss to q0.
    trainer = Trainer(config(detach_demonstrations=detach, zero_shot_weight=0.0))
    seen = recorded(trainer, monkeypatch)
    trainer.loss(*trainer.prepare(first_batch(trainer))).loss.backward()
    q0, d, q1 = seen
    assert (float(q0.grad.abs().max()) == 0.0) == detach
    assert float(d.grad.abs().max()) > 0
    assert float(q1.grad.abs().max()) > 0
    # The projector learns in both cases.
    assert float(trainer.encoder.backbone.projector.linear.weight.grad.abs().max()) > 0


def test_plain_contrastive_training(config: Config) -> None:
    trainer = Trainer(config(strategy="none"))
    result = trainer.train_step(first_batch(trainer))
    assert result.with_demonstrations == 0.0
    assert result.loss == result.zero_shot > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "text"},
        {"projector": "scale"},
        {"projector": "mlp"},
        {"separators": "none"},
        {"dtype": "bfloat16"},
        {"num_layers": 1},
        {"generic_instruction_p": 0.5, "drop_instruction_p": 0.5},
        {"attention": "eager"},
    ],
)
def test_every_setting_trains(config: Config, changes: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    # A plain Hugging Face folder, which has no projector of its own.
    plain = shutil.copytree(tiny_checkpoint, tmp_path / "plain")
    for name in ("epic.json", "projector.safetensors"):
        (plain / name).unlink()
    trainer = Trainer(config(model=str(plain), **changes))
    before = [value.detach().clone() for value in trainer.encoder.backbone.projector.parameters()]
    result = trainer.train_step(first_batch(trainer))
    assert 0 < result.loss < 100
    assert (result.pairs, result.tokens > 0) == (8, True)
    after = list(trainer.encoder.backbone.projector.parameters())
    changed = any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    # Text demonstrations have no slots to fill.
    assert changed == (changes.get("strategy") != "text")


def test_reset_projector(config: Config, tiny_checkpoint: Path) -> None:
    trainer = Trainer(config(projector="mlp", reset_projector=True))
    assert trainer.encoder.backbone.projector.kind == "mlp"
    shipped = EpicEncoder.from_pretrained(tiny_checkpoint)
    assert trainer.encoder.fingerprint != shipped.fingerprint
    np.testing.assert_allclose(trainer.encoder.encode_query("hello"), shipped.encode_query("hello"), atol=1e-6)
    trainer.train()
    final = EpicEncoder.from_pretrained(Path(trainer.config.output) / "final")
    assert final.backbone.projector.kind == "mlp"


def test_tokens_are_the_real_ones(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config())
    rows: list[EncoderInput] = []
    embed = trainer.forward
    monkeypatch.setattr(trainer, "forward", lambda items, *rest: (rows.extend(items), embed(items, *rest))[1])
    assert trainer.train_step(first_batch(trainer)).tokens == sum(len(row.ids) for row in rows)


def test_schedule() -> None:
    config = TrainingConfig("m", "o", "d", {"t": TaskConfig()}, steps=10, warmup_ratio=0.2)
    rates = [warmup_and_decay(step, config) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_optimizer_groups(config: Config, tiny_encoder: EpicEncoder) -> None:
    run = config(projector_learning_rate=0.5, learning_rate=0.25, weight_decay=0.125)
    names = {id(value): name for name, value in tiny_encoder.backbone.named_parameters()}
    seen = set()
    for group in build_optimizer(tiny_encoder.backbone, run).param_groups:
        for value in group["params"]:
            name = names[id(value)]
            seen.add(name)
            projector = name.startswith("projector.")
            assert group["peak"] == (0.5 if projector else 0.25)
            assert group["weight_decay"] == (0.125 if value.ndim > 1 and not projector else 0.0)
    assert seen == set(names.values())


def test_the_loss_goes_down(config: Config) -> None:
    trainer = Trainer(config(steps=30, tasks=["up"], tasks_per_batch=1, batch_size=16, max_demonstrations=2))
    trainer.train(show_progress=False)
    losses = [entry["loss"] for entry in trainer.metrics]
    assert len(losses) == 30
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3]), losses


def test_demonstrations_are_used_where_nothing_else_decides(
    config: Config, data: Path, write_task: Callable[..., Path]
) -> None:
    # Two tasks want different documents for the same queries, and no instruction says which task it is: three of four
    # rows are shown demonstrations, and if these were not read, a coin toss would be the best there is, a loss of ln 2.
    words = ("cat", "dog", "pen", "cup")
    write_task(data, "up", [{"query": word, "positive": f"+ {word}"} for word in words])
    write_task(data, "down", [{"query": word, "positive": f"- {word}"} for word in words])
    trainer = Trainer(
        config(
            steps=120,
            drop_instruction_p=1.0,
            zero_shot_weight=0.1,
            temperature=0.05,
            weight_decay=0.0,
            save_every=1000,
        )
    )
    trainer.train(show_progress=False)
    last = trainer.metrics[-20:]
    with_demonstrations = sum(entry["with_demonstrations"] for entry in last) / 20
    # Rows that draw k = 0 are not asked to tell the two tasks apart.
    assert with_demonstrations < 0.35


def test_evaluation_uses_the_strategy_of_training(config: Config) -> None:
    run = config(evaluation_tasks=["up"], evaluation_rows=8, evaluation_demonstrations=[0, 3])
    scores = {
        strategy: Trainer(dataclasses.replace(run, strategy=strategy)).evaluate()["up"]
        for strategy in ("epic", "text", "none")
    }
    assert len({row["k=0"] for row in scores.values()}) == 1
    assert scores["none"]["k=3"] == scores["none"]["k=0"]


def test_pooling_and_layers_of_a_run(config: Config) -> None:
    assert Trainer(config()).encoder.backbone.pooling == "last"
    trainer = Trainer(config(pooling="mean", num_layers=1, steps=1))
    assert trainer.encoder.backbone.pooling == "mean"
    final = EpicEncoder.from_pretrained(trainer.train(show_progress=False))
    assert (final.backbone.pooling, final.backbone.transformer.config.num_hidden_layers) == ("mean", 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention(config: Config, attention: str) -> None:
    losses = {}
    for choice in (None, attention):
        trainer = Trainer(config(attention=choice))
        losses[choice] = trainer.train_step(first_batch(trainer)).loss
    assert trainer.encoder.backbone.transformer.config._attn_implementation == attention
    assert losses[attention] == pytest.approx(losses[None], rel=1e-4)


def test_first_steps_without_demonstrations(config: Config) -> None:
    trainer = Trainer(config(zero_shot_steps=2, steps=4))
    trainer.train(show_progress=False)
    assert [entry["with_demonstrations"] == 0.0 for entry in trainer.metrics] == [True, True, False, False]
    assert [entry["loss"] == entry["zero_shot"] for entry in trainer.metrics] == [True, True, False, False]


@pytest.mark.parametrize("changes", [{}, {"strategy": "text"}, {"strategy": "none"}])
def test_a_run_with_a_bank(config: Config, changes: dict[str, str]) -> None:
    bank = {"demonstration_source": "bank", "bank_size": 4}
    trainer = Trainer(config(**bank, evaluation_tasks=["up"], evaluation_rows=4, evaluate_every=3, steps=3, **changes))
    trainer.train(show_progress=False)
    assert set(trainer.metrics[-1]["evaluation"]["up"]) == {"k=0", "k=8"}


def test_the_template_is_in_the_checkpoint(config: Config) -> None:
    final = Trainer(config(demonstration_instructions="each", steps=1)).train(show_progress=False)
    assert json.loads((final / "epic.json").read_text())["template"]["demonstration_instructions"] == "each"
    assert EpicEncoder.from_pretrained(final).prompt.template.demonstration_instructions == "each"


def test_interpolation_with_the_start(config: Config, tiny_checkpoint: Path, tmp_path: Path) -> None:
    states = {}
    for share in (0.0, 0.25, 1.0):
        run = config(interpolate_with_start=share, output=str(tmp_path / str(share)), evaluate_every=6)
        trainer = Trainer(run)
        trainer.train(show_progress=False)
        states[share] = {name: value.clone() for name, value in trainer.encoder.backbone.state_dict().items()}
        # The result is evaluated after the last step and after the interpolation.
        assert [entry["step"] for entry in trainer.metrics if "evaluation" in entry] == [0, 6] + [6] * (share > 0)
    start = EpicEncoder.from_pretrained(tiny_checkpoint).backbone.state_dict()
    for name, value in states[0.25].items():
        torch.testing.assert_close(value, 0.75 * states[0.0][name] + 0.25 * start[name])
        torch.testing.assert_close(states[1.0][name], start[name])
    assert not all(torch.equal(states[0.0][name], start[name]) for name in start)
    # A finished run is interpolated from its checkpoint, not twice; the share may change.
    for share in (0.25, 0.5):
        again = Trainer(config(interpolate_with_start=share, output=str(tmp_path / "0.25"), evaluate_every=6))
        again.train(show_progress=False)
        for name, value in again.encoder.backbone.state_dict().items():
            torch.testing.assert_close(value, (1 - share) * states[0.0][name] + share * start[name])


def test_interpolation_with_another_model(
    config: Config, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    ours, other = (
        EpicEncoder.from_pretrained(path).backbone.state_dict() for path in (tiny_checkpoint, other_checkpoint)
    )
    run = config(steps=0, interpolation_model=str(other_checkpoint), interpolate_with_start=0.25)
    trainer = Trainer(run)
    final = trainer.train(show_progress=False)
    for name, value in trainer.encoder.backbone.state_dict().items():
        expected = ours[name] if name.startswith("projector.") else 0.75 * ours[name] + 0.25 * other[name]
        torch.testing.assert_close(value, expected)
    record = json.loads((final / "epic.json").read_text())["training"]
    assert (record["steps"], record["config"]["interpolation_model"]) == (0, other_checkpoint.name)
    with pytest.raises(ConfigError, match="whose weights have other names or shapes"):
        Trainer(config(num_layers=1, interpolation_model=str(other_checkpoint), interpolate_with_start=0.5))


# The event reader's protobuf files use deprecated names.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = {"tensorboard": True, "evaluation_tasks": ["up"], "evaluate_every": 3, "evaluation_demonstrations": [0, 2]}
    Trainer(config(**run, stop_at_step=3)).train(show_progress=False)
    trainer = Trainer(config(**run))
    trainer.train(show_progress=False)
    board = EventAccumulator(str(trainer.folder / "tensorboard"))
    board.Reload()
    losses = [entry for entry in trainer.metrics if "loss" in entry]
    for name in ("loss", "zero_shot", "with_demonstrations", "tokens", "gradient_norm"):
        seen = board.Scalars(f"training/{name}")
        assert [event.step for event in seen] == [1, 2, 3, 4, 5, 6]
        assert [event.value for event in seen] == pytest.approx([entry[name] for entry in losses], rel=1e-5)
    assert {event.step for event in board.Scalars("ndcg@10/up/k=2")} == {0, 3, 6}
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name, *rest)
    )
    with pytest.raises(MissingExtraError, match=r"The setting tensorboard needs tensorboard.*epic-rag\[train\]"):
        Trainer(config(tensorboard=True))
