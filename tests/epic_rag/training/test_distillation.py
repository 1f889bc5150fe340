"""Teachers: their vectors, the two losses, a fitted head, covariance matching."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.errors import CheckpointError, ConfigError
from epic_rag.training import Trainer, TrainingBatch, TrainingConfig
from epic_rag.training.data import Pair, TaskRows
from epic_rag.training.distillation import (
    Teacher,
    fit_head,
    fitting_batches,
    match_covariance,
    paired_states,
    transport,
)
from epic_rag.training.distributed import World
from epic_rag.training.optimizer import build_optimizer
from epic_rag.training.sampling import sample_batch
from tests.conftest import make_encoder

Config = Callable[..., TrainingConfig]


def save_teacher(folder: Path, width: int) -> Path:
    """An encoder with a head of this width, whose vectors lie along few directions."""
    encoder = make_encoder(seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        encoder.backbone.set_head(torch.nn.Linear(32, width))
    assert encoder.backbone.head is not None
    with torch.no_grad():
        encoder.backbone.head.weight *= torch.linspace(0.2, 3.0, width).unsqueeze(1)
    encoder.backbone.eval()
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Teachers by the width of their vectors; 32 is the tiny checkpoint's."""
    folder = tmp_path_factory.mktemp("teachers")
    return {width: save_teacher(folder / str(width), width) for width in (12, 32)}


@pytest.fixture
def vectors(config: Config, teachers: dict[int, Path]) -> Config:
    """A run that only imitates the narrow teacher's vectors."""

    def make(**changes: Any) -> TrainingConfig:
        values: dict[str, Any] = {
            "teacher": str(teachers[12]),
            "teacher_weight": 1.0,
            "teacher_loss": "vectors",
            "contrastive_weight": 0.0,
            "output_dimension": 12,
            "strategy": "none",
        }
        return config(**{**values, **changes})

    return make


@pytest.fixture
def matched(config: Config, teachers: dict[int, Path]) -> Config:
    """A run without steps that matches the wide teacher's covariance."""

    def make(**changes: Any) -> TrainingConfig:
        values = {"teacher": str(teachers[32]), "teacher_weight": 1.0, "teacher_covariance": True, "steps": 0}
        return config(**{**values, **changes})

    return make


def texts_of(batch: TrainingBatch) -> list[str]:
    rows = [row for task in batch.tasks for row in task.rows]
    return (
        [row.query for row in rows] + [row.positive for row in rows] + [text for row in rows for text in row.negatives]
    )


def states_of(trainer: Trainer, texts: int) -> tuple[torch.Tensor, torch.Tensor]:
    assert trainer.teacher is not None
    batches: Iterator[TrainingBatch] = fitting_batches(trainer.datasets, trainer.config, texts)
    return paired_states(batches, trainer.prompt, trainer.forward, trainer.teacher)


# The teacher


@pytest.mark.parametrize("cached", [False, True])
def test_cosines_of_a_teacher(config: Config, other_checkpoint: Path, cached: bool) -> None:
    trainer = Trainer(config(teacher=str(other_checkpoint), teacher_weight=2.0, grad_cache=cached, steps=2))
    teacher = trainer.teacher
    assert teacher is not None
    before = {name: value.clone() for name, value in teacher.encoder.backbone.state_dict().items()}
    batch = sample_batch(trainer.datasets, trainer.config, 0)
    _, inputs = trainer.prepare(batch)
    terms = trainer.loss(batch, inputs)
    # It has no training record, so its queries have no instruction.
    goal = torch.from_numpy(teacher.encoder.encode_document(texts_of(batch)))
    torch.testing.assert_close(teacher(batch, World()), goal, atol=1e-5, rtol=0)
    mine = torch.cat([trainer.forward(inputs.queries), trainer.forward(inputs.documents)]).detach()
    expected = ((mine @ mine.T - goal @ goal.T) ** 2).mean()
    torch.testing.assert_close(terms.teacher, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(terms.loss.detach(), terms.with_demonstrations + terms.zero_shot + 2.0 * terms.teacher)
    final = trainer.train(show_progress=False)
    assert all("teacher" in entry for entry in trainer.metrics)
    assert all(torch.equal(value, before[name]) for name, value in teacher.encoder.backbone.state_dict().items())
    record = json.loads((final / "epic.json").read_text())["training"]
    assert record["teacher"] == {"name": "tiny", "fingerprint": teacher.encoder.fingerprint}
    assert record["config"]["teacher"] == "other"  # without the machine's folders


def test_a_teacher_with_a_training_record_gets_instructions(config: Config, tmp_path: Path) -> None:
    Trainer(config(steps=1, output=str(tmp_path / "first"))).train(show_progress=False)
    run = config(teacher=str(tmp_path / "first" / "final"), teacher_weight=1.0)
    teacher = Teacher(run, torch.device("cpu"))
    batch = TrainingBatch(
        (
            TaskRows("t", "Go", False, (Pair("a", "1", ("9",)), Pair("b", "2")), ((), ())),
            TaskRows("u", "Go", True, (Pair("c", "3"), Pair("d", "4")), ((), ())),
        )
    )
    queries = teacher.encoder.encode_query(["a", "b", "c", "d"], instruction="Go")
    documents = teacher.encoder.encode_document(["1", "2"])
    symmetric = teacher.encoder.encode_query(["3", "4"], instruction="Go")
    last = teacher.encoder.encode_document(["9"])
    expected = torch.from_numpy(np.concatenate([queries, documents, symmetric, last]))
    torch.testing.assert_close(teacher(batch, World()), expected, atol=1e-5, rtol=0)


def test_an_unknown_teacher(config: Config) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Trainer(config(teacher="nowhere", teacher_weight=1.0))


def test_the_weight_of_a_teacher(config: Config, other_checkpoint: Path, tmp_path: Path) -> None:
    ends: dict[float, Any] = {}
    for weight in (0.01, 100.0):
        changes = {"teacher": str(other_checkpoint), "teacher_weight": weight, "output": str(tmp_path / str(weight))}
        trainer = Trainer(config(**changes, steps=15))
        trainer.train(show_progress=False)
        ends[weight] = trainer.metrics[-1]["teacher"]
    assert ends[100.0] < 0.5 * ends[0.01]


# Vectors


@pytest.mark.parametrize("cached", [False, True])
def test_distance_to_the_teachers_vectors(vectors: Config, teachers: dict[int, Path], cached: bool) -> None:
    trainer = Trainer(vectors(grad_cache=cached))
    batch = sample_batch(trainer.datasets, trainer.config, 0)
    goal = torch.from_numpy(EpicEncoder.from_pretrained(teachers[12]).encode_document(texts_of(batch)))
    _, inputs = trainer.prepare(batch)
    mine = torch.cat([trainer.forward(inputs.queries), trainer.forward(inputs.documents)]).detach()
    expected = 1 - (mine * goal).sum(dim=1).mean()
    result = trainer.train_step(batch)
    assert result.loss == result.teacher == pytest.approx(float(expected), abs=1e-5)
    assert result.zero_shot > 0  # reported, with weight 0


def test_both_terms_together(vectors: Config) -> None:
    trainer = Trainer(vectors(contrastive_weight=0.25, teacher_weight=3.0, strategy="epic", zero_shot_weight=0.5))
    terms = trainer.loss(*trainer.prepare(sample_batch(trainer.datasets, trainer.config, 0)))
    assert terms.teacher is not None
    contrast = terms.with_demonstrations + 0.5 * terms.zero_shot
    torch.testing.assert_close(terms.loss.detach(), 0.25 * contrast + 3.0 * terms.teacher)


def test_a_fitted_head_is_the_best_linear_map(vectors: Config) -> None:
    trainer = Trainer(vectors(batch_size=16))
    prepared = trainer.prepare(sample_batch(trainer.datasets, trainer.config, 0))
    plain = trainer.loss(*prepared).loss
    head = trainer.encoder.backbone.head
    assert head is not None
    torch.testing.assert_close(head.weight.detach(), torch.eye(12, 32))
    fit_head(head, *states_of(trainer, 2048))
    fitted = trainer.loss(*prepared).loss
    assert fitted < 0.5 * plain
    # The loss rises along random directions.
    for seed in range(5):
        start = head.weight.detach().clone()
        moved = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            head.weight += 0.05 * moved * start.norm() / moved.norm()
            assert trainer.loss(*prepared).loss > fitted
            head.weight.copy_(start)


def test_imitation_resumes_and_its_head_continues(vectors: Config, tmp_path: Path) -> None:
    straight = Trainer(vectors(steps=12)).train(show_progress=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < sum(losses[:3])
    parts = vectors(steps=12, output=str(tmp_path / "parts"), save_every=5)
    Trainer(dataclasses.replace(parts, stop_at_step=5)).train(show_progress=False)
    resumed = Trainer(parts).train(show_progress=False)
    for file in ("model.safetensors", "2_Dense/model.safetensors", "projector.safetensors"):
        one, other = load_file(straight / file), load_file(resumed / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), file
    loaded = EpicEncoder.from_pretrained(straight)
    assert loaded.dimension == 12
    # The next stage starts with the head, unfitted.
    changes = {"output_dimension": None, "strategy": "epic", "contrastive_weight": 1.0, "steps": 2}
    second = Trainer(vectors(model=str(straight), output=str(tmp_path / "second"), **changes))
    weight = second.encoder.backbone.state_dict()["head.weight"].clone()
    assert torch.equal(weight, load_file(straight / "2_Dense" / "model.safetensors")["linear.weight"].float())
    second._fit_head()
    assert torch.equal(weight, second.encoder.backbone.state_dict()["head.weight"])
    assert EpicEncoder.from_pretrained(second.train(show_progress=False)).dimension == 12


def test_widths_must_agree(vectors: Config, matched: Config) -> None:
    with pytest.raises(ConfigError, match=r"have 32 dimensions and the teacher's 12\. Set output_dimension to 12"):
        Trainer(vectors(output_dimension=None))
    with pytest.raises(ConfigError, match=r"teacher_covariance is true, the model's vectors have 12 .* teacher's 32"):
        Trainer(matched(output_dimension=12))


def test_learning_rates(vectors: Config) -> None:
    run = vectors(token_learning_rate=0.5, learning_rate=0.25, projector_learning_rate=0.125)
    trainer = Trainer(run)
    backbone = trainer.encoder.backbone
    peaks = {id(value): group["peak"] for group in trainer.optimizer.param_groups for value in group["params"]}
    found = {name: peaks[id(value)] for name, value in backbone.named_parameters()}
    assert found["transformer.embed_tokens.weight"] == 0.5
    assert found["head.weight"] == found["head.bias"] == found["projector.linear.weight"] == 0.125
    assert {rate for name, rate in found.items() if name.startswith("transformer.layers")} == {0.25}
    same = build_optimizer(backbone, dataclasses.replace(run, token_learning_rate=None))
    assert {group["peak"] for group in same.param_groups} == {0.25, 0.125}


# Covariance


def covariance(rows: np.ndarray[Any, Any], dim: int) -> torch.Tensor:
    return torch.cov(torch.from_numpy(rows).T) + 1e-3 * torch.eye(dim, dtype=torch.float64)


@given(dim=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_transport_maps_one_covariance_to_the_other(dim: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    start, goal = (covariance(generator.normal(size=(40, dim)), dim).reshape(dim, dim) for _ in range(2))
    matrix = transport(start, goal)
    torch.testing.assert_close(matrix, matrix.T)
    assert (torch.linalg.eigvalsh(matrix) > 0).all()
    torch.testing.assert_close(matrix @ start @ matrix, goal)
    torch.testing.assert_close(transport(goal, goal), torch.eye(dim, dtype=torch.float64))


@pytest.mark.parametrize("head", [False, True])
def test_vectors_get_the_teachers_covariance(matched: Config, head: bool) -> None:
    trainer = Trainer(matched(output_dimension=32 if head else None))
    backbone = trainer.encoder.backbone.eval()
    states, goals = states_of(trainer, 2048)
    projector = backbone.projector.linear.weight.detach().clone()
    raw = states if backbone.head is None else backbone.head(states).detach()
    slots = backbone.projector(backbone.project_and_normalize(states)).detach()
    match_covariance(backbone, states, goals)
    assert backbone.head is not None
    # The map is made for vectors of length one, whose covariance becomes the teacher's.
    mapped = backbone.head(states).detach() / raw.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.cov(mapped.T), torch.cov(goals.T), atol=2e-3, rtol=0)
    assert (torch.cov(mapped.T) - torch.cov(goals.T)).norm() < 0.02 * torch.cov(goals.T).norm()
    # A slot's input keeps its direction, and about its length.
    assert not torch.equal(backbone.projector.linear.weight, projector)
    after = backbone.projector(backbone.project_and_normalize(states)).detach()
    assert torch.nn.functional.cosine_similarity(slots, after).min() > 0.99
    assert float((after.norm(dim=1) / slots.norm(dim=1)).mean()) == pytest.approx(1, abs=0.1)
    # Other projectors stay.
    for kind in ("scale", "mlp"):
        backbone.reset_projector(kind)
        before = {name: value.clone() for name, value in backbone.projector.state_dict().items()}
        match_covariance(backbone, states, goals)
        assert all(torch.equal(value, before[name]) for name, value in backbone.projector.state_dict().items())


def test_a_run_without_steps(matched: Config, tmp_path: Path) -> None:
    run = matched(evaluate_every=1, evaluation_rows=4, evaluation_tasks=["up"], evaluation_demonstrations=[0, 2])
    run = dataclasses.replace(run, batch_size=16)
    final = Trainer(run).train(show_progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 0]  # before and after
    loaded = EpicEncoder.from_pretrained(final)
    record = json.loads((final / "epic.json").read_text())["training"]
    assert (record["steps"], record["tokens"], record["config"]["teacher_covariance"]) == (0, 0, True)
    assert loaded.backbone.head is not None
    vectors = loaded.encode_query(["cat"], bank=DemonstrationBank([("dog", "+ dog"), ("pen", "+ pen")]))
    assert np.isfinite(vectors).all()
    # The same texts, and so the same map.
    again = Trainer(dataclasses.replace(run, output=str(tmp_path / "again"))).train(show_progress=False)
    assert EpicEncoder.from_pretrained(again).fingerprint == loaded.fingerprint


def test_a_finished_run_is_mapped_once(matched: Config) -> None:
    run = matched(steps=3, save_every=3)
    first = EpicEncoder.from_pretrained(Trainer(run).train(show_progress=False)).fingerprint
    assert EpicEncoder.from_pretrained(Trainer(run).train(show_progress=False)).fingerprint == first


def test_with_adapters(matched: Config, vectors: Config, tmp_path: Path) -> None:
    final = Trainer(matched(lora_rank=2, steps=2)).train(show_progress=False)
    assert EpicEncoder.from_pretrained(final).backbone.head is not None
    final = Trainer(vectors(lora_rank=2, steps=2, output=str(tmp_path / "vectors"))).train(show_progress=False)
    assert EpicEncoder.from_pretrained(final).dimension == 12
