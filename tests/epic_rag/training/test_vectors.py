"""Training that imitates a teacher's vectors: the head, its start, the loss, the rates, and going on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag.training import Trainer, TrainingConfig
from epic_rag.training.distillation import fit_head
from epic_rag.training.losses import vector_distillation
from epic_rag.training.optimizer import build_optimizer
from epic_rag.training.sampling import sample_batch
from tests.conftest import make_encoder

Config = Callable[..., TrainingConfig]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """An encoder whose vectors have 12 numbers."""
    encoder = make_encoder(seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        encoder.backbone.set_head(torch.nn.Linear(32, 12))
    encoder.backbone.eval()
    encoder.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def distil(config: Config, teacher: Path) -> Config:
    """A run that does nothing but imitate it."""

    def make(**changes: Any) -> TrainingConfig:
        values: dict[str, Any] = {
            "teacher": str(teacher),
            "teacher_weight": 1.0,
            "teacher_loss": "vectors",
            "contrastive_weight": 0.0,
            "output_dimension": 12,
            "strategy": "none",
        }
        return config(**{**values, **changes})

    return make


@pytest.mark.parametrize("cached", [False, True])
def test_the_loss_is_the_distance_to_the_teachers_vectors(distil: Config, teacher: Path, cached: bool) -> None:
    trainer = Trainer(distil(grad_cache=cached))
    batch = sample_batch(trainer.datasets, trainer.config, 0)
    texts = [row.query for task in batch.tasks for row in task.rows]
    texts += [row.positive for task in batch.tasks for row in task.rows]
    texts += [text for task in batch.tasks for row in task.rows for text in row.negatives]
    goal = torch.from_numpy(EpicEncoder.from_pretrained(teacher).encode_document(texts))
    _, inputs = trainer.prepare(batch)
    mine = torch.cat([trainer.forward(inputs.queries), trainer.forward(inputs.documents)]).detach()
    expected = 1 - (mine * goal).sum(dim=1).mean()
    result = trainer.train_step(batch)
    assert result.loss == result.teacher == pytest.approx(float(expected), abs=1e-5)
    assert result.zero_shot > 0  # told, and not trained


def test_both_terms_together(distil: Config) -> None:
    trainer = Trainer(distil(contrastive_weight=0.25, teacher_weight=3.0, strategy="epic", zero_shot_weight=0.5))
    terms = trainer.loss(sample_batch(trainer.datasets, trainer.config, 0))
    assert terms.teacher is not None
    contrast = terms.with_demonstrations + 0.5 * terms.zero_shot
    torch.testing.assert_close(terms.loss.detach(), 0.25 * contrast + 3.0 * terms.teacher)


def test_a_new_head_starts_as_the_best_linear_fit(distil: Config) -> None:
    trainer = Trainer(distil(batch_size=16))
    batch = sample_batch(trainer.datasets, trainer.config, 0)
    plain = trainer.loss(batch).loss
    head = trainer.encoder.backbone.head
    assert head is not None
    torch.testing.assert_close(head.weight.detach(), torch.eye(12, 32))
    before = trainer.encoder.fingerprint
    fit_head(trainer)
    assert trainer.encoder.fingerprint != before
    fitted = trainer.loss(batch).loss
    assert fitted < 0.5 * plain
    # No other weights do better: the loss does not fall along any of some random directions.
    for seed in range(5):
        start = head.weight.detach().clone()
        moved = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            head.weight += 0.05 * moved * start.norm() / moved.norm()
            assert trainer.loss(batch).loss > fitted
            head.weight.copy_(start)


def test_training_comes_closer_and_goes_on_where_it_stopped(distil: Config, tmp_path: Path) -> None:
    straight = Trainer(distil(steps=12)).train(show_progress=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < sum(losses[:3])
    Trainer(distil(steps=12, output=str(tmp_path / "parts"), stop_after=5, save_every=5)).train(show_progress=False)
    resumed = Trainer(distil(steps=12, output=str(tmp_path / "parts"), save_every=5))
    assert resumed.step == 0
    parts = resumed.train(show_progress=False)
    for file in ("model.safetensors", "2_Dense/model.safetensors", "projector.safetensors"):
        one, other = load_file(straight / file), load_file(parts / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), file
    loaded = EpicEncoder.from_pretrained(straight)
    assert loaded.dimension == 12
    assert loaded.config.training["config"]["output_dimension"] == 12


def test_a_head_goes_on_into_the_next_stage(distil: Config, tmp_path: Path) -> None:
    first = Trainer(distil(steps=2, stop_after=1)).train(show_progress=False)
    second = distil(
        model=str(first),
        output=str(tmp_path / "second"),
        output_dimension=None,
        strategy="epic",
        contrastive_weight=1.0,
    )
    trainer = Trainer(second)
    kept = trainer.encoder.backbone.state_dict()["head.weight"].clone()
    fit_head(trainer)  # which has nothing to do
    assert torch.equal(kept, load_file(first / "2_Dense" / "model.safetensors")["linear.weight"].float())
    assert torch.equal(kept, trainer.encoder.backbone.state_dict()["head.weight"])
    final = trainer.train(show_progress=False)
    assert EpicEncoder.from_pretrained(final).dimension == 12


def test_widths_must_agree(distil: Config) -> None:
    with pytest.raises(
        ConfigError, match=r"the model's vectors have 32 dimensions and the teacher's 12; set output_dimension to 12"
    ):
        Trainer(distil(output_dimension=None))


def test_rates(distil: Config) -> None:
    run = distil(token_learning_rate=0.5, learning_rate=0.25, projector_learning_rate=0.125)
    trainer = Trainer(run)
    backbone = trainer.encoder.backbone
    peaks = {id(value): group["peak"] for group in trainer.optimizer.param_groups for value in group["params"]}
    found = {name: peaks[id(value)] for name, value in backbone.named_parameters()}
    assert found["transformer.embed_tokens.weight"] == 0.5
    assert found["head.weight"] == found["head.bias"] == found["projector.linear.weight"] == 0.125
    assert {rate for name, rate in found.items() if name.startswith("transformer.layers")} == {0.25}
    same = build_optimizer(backbone, dataclasses.replace(run, token_learning_rate=None))
    assert {group["peak"] for group in same.param_groups} == {0.25, 0.125}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_computed_as_asked_for(config: Config, attention: str) -> None:
    losses = {}
    for asked in (None, attention):
        trainer = Trainer(config(attention=asked))
        losses[asked] = trainer.train_step(sample_batch(trainer.datasets, trainer.config, 0)).loss
    assert trainer.encoder.backbone.transformer.config._attn_implementation == attention
    assert losses[attention] == pytest.approx(losses[None], rel=1e-4)


def test_with_adapters(distil: Config) -> None:
    final = Trainer(distil(lora_rank=2, steps=2)).train(show_progress=False)
    assert EpicEncoder.from_pretrained(final).dimension == 12


def test_gradients_flow_into_the_student_alone() -> None:
    student = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    student, teacher = student.requires_grad_(), torch.eye(4)[:3].requires_grad_()
    vector_distillation(student, teacher).backward()
    torch.testing.assert_close(student.grad, -torch.eye(4)[:3] / 3)
    assert teacher.grad is None
