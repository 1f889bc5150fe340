"""The end of a run that gives the vectors the covariance of the teacher's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag.training import Trainer, TrainingConfig
from epic_rag.training.distillation import match_covariance, paired_states, transport
from tests.conftest import make_encoder

Config = Callable[..., TrainingConfig]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """An encoder of the tiny checkpoint's width, whose vectors lie along few directions."""
    encoder = make_encoder(seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        encoder.backbone.set_head(torch.nn.Linear(32, 32))
    head = encoder.backbone.head
    assert head is not None
    with torch.no_grad():
        head.weight *= torch.linspace(0.2, 3.0, 32).unsqueeze(1)
    encoder.backbone.eval()
    encoder.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def matched(config: Config, teacher: Path) -> Config:
    """A run that trains nothing."""

    def make(**changes: Any) -> TrainingConfig:
        values = {"teacher": str(teacher), "teacher_weight": 1.0, "teacher_covariance": True, "steps": 0}
        return config(**{**values, **changes})

    return make


def covariance(rows: np.ndarray[Any, Any], dim: int) -> torch.Tensor:
    return torch.cov(torch.from_numpy(rows).T) + 1e-3 * torch.eye(dim, dtype=torch.float64)


@given(dim=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_the_map_takes_one_covariance_to_the_other(dim: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    start, goal = (covariance(generator.normal(size=(40, dim)), dim).reshape(dim, dim) for _ in range(2))
    matrix = transport(start, goal)
    torch.testing.assert_close(matrix, matrix.T)
    assert (torch.linalg.eigvalsh(matrix) > 0).all()
    torch.testing.assert_close(matrix @ start @ matrix, goal)
    torch.testing.assert_close(transport(goal, goal), torch.eye(dim, dtype=torch.float64))


@pytest.mark.parametrize("head", [False, True])
def test_the_vectors_spread_as_the_teachers(matched: Config, head: bool) -> None:
    trainer = Trainer(matched(output_dimension=32 if head else None))
    backbone = trainer.encoder.backbone.eval()
    assert trainer.teacher is not None
    states, goals = paired_states(trainer, trainer.teacher, 8192)
    fingerprint, projector = trainer.encoder.fingerprint, backbone.projector.linear.weight.detach().clone()
    raw = states if backbone.head is None else backbone.head(states).detach()
    slots = backbone.projector(backbone.project_and_normalize(states)).detach()
    match_covariance(trainer)
    assert backbone.head is not None
    assert trainer.encoder.fingerprint != fingerprint
    # The map is made for vectors of length one, whose covariance becomes the teacher's.
    mapped = backbone.head(states).detach() / raw.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.cov(mapped.T), torch.cov(goals.T), atol=2e-3, rtol=0)
    assert (torch.cov(mapped.T) - torch.cov(goals.T)).norm() < 0.02 * torch.cov(goals.T).norm()
    # What the model reads in a slot has the direction that it had, and about the length.
    assert not torch.equal(backbone.projector.linear.weight, projector)
    after = backbone.projector(backbone.project_and_normalize(states)).detach()
    assert torch.nn.functional.cosine_similarity(slots, after).min() > 0.99
    assert float((after.norm(dim=1) / slots.norm(dim=1)).mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("projector", ["scale", "mlp"])
def test_other_projectors_stay_as_they_are(matched: Config, projector: str) -> None:
    trainer = Trainer(matched(projector=projector, new_projector=True))
    before = {name: value.clone() for name, value in trainer.encoder.backbone.projector.state_dict().items()}
    match_covariance(trainer)
    after = trainer.encoder.backbone.projector.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_of_no_steps(matched: Config, tmp_path: Path) -> None:
    run = matched(evaluate_every=1, evaluation_rows=4, evaluation_tasks=["up"], evaluation_demonstrations=[0, 2])
    final = Trainer(run).train(show_progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 0]  # before and after
    loaded = EpicEncoder.from_pretrained(final)
    record = loaded.config.training
    assert (record["steps"], record["tokens"], record["config"]["teacher_covariance"]) == (0, 0, True)
    assert loaded.backbone.head is not None
    vectors = loaded.encode_query(["cat"], bank=DemonstrationBank([("dog", "+ dog"), ("pen", "+ pen")]))
    assert np.isfinite(vectors).all()
    # The same texts, and so the same map.
    again = Trainer(dataclasses.replace(run, output=str(tmp_path / "again"))).train(show_progress=False)
    assert EpicEncoder.from_pretrained(again).fingerprint == loaded.fingerprint


def test_a_run_that_is_finished_is_not_mapped_twice(matched: Config) -> None:
    run = matched(steps=3, save_every=3)
    first = EpicEncoder.from_pretrained(Trainer(run).train(show_progress=False)).fingerprint
    assert EpicEncoder.from_pretrained(Trainer(run).train(show_progress=False)).fingerprint == first


def test_adapters(matched: Config) -> None:
    pytest.importorskip("peft")
    final = Trainer(matched(lora_rank=2, steps=2)).train(show_progress=False)
    assert EpicEncoder.from_pretrained(final).backbone.head is not None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": None, "teacher_weight": 0.0}, "teacher_covariance is true and there is no teacher; name one"),
        ({"teacher_covariance": False}, "steps is 0, which trains nothing"),
    ],
)
def test_settings_that_cannot_work(matched: Config, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        matched(**changes)


def test_widths_must_agree(matched: Config) -> None:
    with pytest.raises(ConfigError, match=r"teacher_covariance is true, the model's vectors have 12 .* teacher's 32"):
        Trainer(matched(output_dimension=12))
