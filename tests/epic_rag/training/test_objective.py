"""The loss of a step: widths, margins, teachers, wrong demonstrations, and rows with their own negatives alone."""

from __future__ import annotations

import dataclasses
import doctest
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from epic_rag import EpicEncoder
from epic_rag.errors import CheckpointError, ConfigError, DataError
from epic_rag.training import TaskConfig, Trainer, TrainingBatch, TrainingConfig, info_nce
from epic_rag.training import losses as module
from epic_rag.training.data import Pair, TaskRows
from epic_rag.training.distillation import Teacher
from epic_rag.training.distributed import World
from epic_rag.training.inputs import SlotTable, draw_negatives
from epic_rag.training.losses import (
    consistency,
    cosine_distillation,
    margin_mask,
    matryoshka_info_nce,
    negatives_mask,
    own_negatives,
)
from epic_rag.training.sampling import sample_batch

Config = Callable[..., TrainingConfig]
UNIT = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
OTHER = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), dim=-1)


def rows(*pairs: Pair, name: str = "t", symmetric: bool = False) -> TaskRows:
    return TaskRows(name, "Go", symmetric, pairs, ((),) * len(pairs))


def test_the_examples_of_the_docstrings_run() -> None:
    results = doctest.testmod(module)
    assert (results.failed, results.attempted > 8) == (0, True)


def test_targets_name_the_positives() -> None:
    targets = torch.tensor([2, 0, 1])
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 2] = mask[1, 4] = True  # the first is its positive, which is never masked
    found = info_nce(UNIT, OTHER, temperature=0.5, mask=mask, targets=targets)
    scores = UNIT @ OTHER.T / 0.5
    scores[1, 4] = -torch.inf
    expected = -(scores.log_softmax(dim=1)[torch.arange(3), targets]).mean()
    torch.testing.assert_close(found, expected)


def test_matryoshka_is_the_mean_over_renormalised_prefixes() -> None:
    parts = [info_nce(UNIT, OTHER, temperature=0.1)]
    for width in (2, 5):
        left, right = (side[:, :width] / side[:, :width].norm(dim=1, keepdim=True) for side in (UNIT, OTHER))
        parts.append(info_nce(left, right, temperature=0.1))
    for widths in ([2, 5], [5, 2, 8, 2]):
        found = matryoshka_info_nce(UNIT, OTHER, widths=widths, temperature=0.1)
        torch.testing.assert_close(found, sum(parts) / 3)


def test_distillation_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]], requires_grad=True)
    loss = cosine_distillation(student, teacher)
    assert float(loss.detach()) == pytest.approx(2 * 0.6**2 / 4)
    loss.backward()
    assert teacher.grad is None
    assert float(student.grad.abs().max()) > 0


def test_consistency_by_hand() -> None:
    prompted = torch.tensor([[1.0, 0.0], [0.6, 0.8]], requires_grad=True)
    zero_shot = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    loss = consistency(prompted, zero_shot)
    assert float(loss.detach()) == pytest.approx((0 + 0.4) / 2)
    loss.backward()
    assert zero_shot.grad is None


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (0.0, [[2], [0]]),
        (0.05, [[1, 2], [0]]),
        (0.15, [[1, 2], [0, 2]]),
        # Only what scores above the positive by more than 0.3.
        (-0.3, [[], [0]]),
    ],
)
def test_margins(margin: float, expected: list[list[int]]) -> None:
    scores = torch.tensor([[0.5, 0.46, 0.7, 0.9], [0.9, 0.4, 0.3, 0.0]])
    own = torch.zeros(2, 4, dtype=torch.bool)
    own[0, 3] = True  # a hard negative of the first row: chosen for it, so it always counts
    mask = margin_mask(scores, own, margin)
    assert [torch.nonzero(row).flatten().tolist() for row in mask] == expected


def test_the_margin_is_of_the_current_zero_shot_scores(config: Config) -> None:
    trainer = Trainer(config(false_negative_margin=0.0))
    batch, inputs = trainer.prepare(sample_batch(trainer.datasets, trainer.config, 0))
    q0, d = trainer.forward(inputs.queries), trainer.forward(inputs.documents)
    mask = inputs.mask | margin_mask((q0 @ d.T).detach(), inputs.own, 0.0)
    assert mask.sum() > inputs.mask.sum()
    expected = info_nce(q0, d, temperature=trainer.config.temperature, mask=mask | inputs.elsewhere)
    torch.testing.assert_close(trainer.loss(batch).zero_shot, expected.detach())


def test_own_negatives_alone() -> None:
    batch = TrainingBatch((rows(Pair("a", "1", ("8", "2")), Pair("b", "2", ("9",))), rows(Pair("c", "3"), name="u")))
    # Columns: positives 1 2 3, then 8 2 9.
    assert [torch.nonzero(row).flatten().tolist() for row in own_negatives(batch)] == [[3, 4], [5], []]
    tasks = {"t": TaskConfig(in_batch_negatives=False), "u": TaskConfig()}
    config = TrainingConfig("m", "o", "d", tasks)
    counted = [torch.nonzero(~row).flatten().tolist() for row in negatives_mask(batch, config)]
    assert counted == [[3, 4], [5], [0, 1, 3, 4, 5]]


def test_a_task_without_in_batch_negatives_needs_hard_ones(config: Config) -> None:
    tasks = {"up": {}, "down": {"in_batch_negatives": False}}
    Trainer(config(tasks=tasks))
    tasks = {"up": {"in_batch_negatives": False}, "down": {}}
    with pytest.raises(DataError, match=r"up has 16 rows, 16 of them without hard negatives.*; give each row"):
        Trainer(config(tasks=tasks))


def test_hard_negatives_are_drawn_by_seed_and_step() -> None:
    batch = TrainingBatch((rows(Pair("a", "1", tuple("vwxyz")), Pair("b", "2", ("k",)), Pair("c", "3")),))

    def drawn(count: int, seed: int, step: int) -> list[tuple[str, ...]]:
        return [row.negatives for row in draw_negatives(batch, count, seed, step).tasks[0].rows]

    first = drawn(2, 0, 0)
    assert [len(texts) for texts in first] == [2, 1, 0]
    assert set(first[0]) <= set("vwxyz")
    assert drawn(2, 0, 0) == first
    assert {drawn(2, 0, step)[0] for step in range(20)} != {first[0]}
    assert {drawn(2, seed, 0)[0] for seed in range(20)} != {first[0]}
    assert drawn(0, 0, 0) == [(), (), ()]


def test_hard_negatives_in_a_step(config: Config) -> None:
    trainer = Trainer(config(hard_negatives=0))
    _, inputs = trainer.prepare(sample_batch(trainer.datasets, trainer.config, 0))
    assert len(inputs.documents) == inputs.counted == 8
    trainer = Trainer(config())
    _, inputs = trainer.prepare(sample_batch(trainer.datasets, trainer.config, 0))
    assert inputs.counted == 8 + 4


def test_matryoshka_widths_are_in_the_checkpoint(config: Config) -> None:
    trainer = Trainer(config(matryoshka_dims=[16, 8], steps=1))
    plain = Trainer(config())
    batch = sample_batch(trainer.datasets, trainer.config, 0)
    both, full = (float(each.loss(batch).loss.detach()) for each in (trainer, plain))
    assert both != pytest.approx(full, rel=1e-3)
    final = trainer.train(show_progress=False)
    assert json.loads((final / "epic.json").read_text())["matryoshka_dims"] == [8, 16]
    loaded = EpicEncoder.from_pretrained(final, truncate_dim=8)
    assert loaded.config.matryoshka_dims == [8, 16]
    assert loaded.encode_document("cat").shape == (8,)


def test_matryoshka_widths_are_at_most_the_models(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"matryoshka_dims is \[64\], the model's vectors have 32 dimensions; give"):
        Trainer(config(matryoshka_dims=[64]))


def mismatched(batch: TrainingBatch, which: set[int]) -> TrainingBatch:
    """The batch with wrong demonstrations for some rows: the whole batch's first query, its last positive."""
    tasks, start = [], 0
    for task in batch.tasks:
        wrong = tuple(((0, batch.pairs - 1),) if start + index in which else () for index in range(len(task.rows)))
        tasks.append(dataclasses.replace(task, mismatched=wrong))
        start += len(task.rows)
    return TrainingBatch(tuple(tasks))


@pytest.mark.parametrize("which", [{1, 6}, set(range(8))])
def test_wrong_demonstrations_are_to_be_read_as_none(config: Config, which: set[int]) -> None:
    trainer = Trainer(config(mismatched_weight=0.5))
    batch = mismatched(sample_batch(trainer.datasets, trainer.config, 0), which)
    _, inputs = trainer.prepare(batch)
    assert set(inputs.mismatched) == which
    for row in which:
        assert inputs.shown[row] == [0, len(inputs.queries) + 7]
    q0, d = trainer.forward(inputs.queries), trainer.forward(inputs.documents)

    q1 = trainer.forward(inputs.prompted, SlotTable(torch.cat([q0, d]), inputs.shown))
    terms = trainer.objective(inputs, q0, d, q1)
    wrong, right = sorted(which), [row for row in range(8) if row not in which]
    cosines = (q1[wrong] * q0[wrong]).sum(dim=1)
    torch.testing.assert_close(terms.mismatched, (1 - cosines).mean().detach())
    expected = torch.zeros(())
    mask = inputs.mask | (inputs.elsewhere & inputs.bare)
    if right:
        expected = info_nce(q1[right], d, temperature=0.1, mask=mask[right], targets=torch.tensor(right))
    torch.testing.assert_close(terms.with_demonstrations, expected.detach())
    torch.testing.assert_close(
        terms.loss.detach(), terms.with_demonstrations + terms.zero_shot + 0.5 * terms.mismatched
    )
    # And in a step, plain or cached.
    results = [Trainer(config(mismatched_weight=0.5, grad_cache=each)).train_step(batch) for each in (False, True)]
    assert results[0].mismatched == pytest.approx(results[1].mismatched, rel=1e-4)
    assert results[0].gradient_norm == pytest.approx(results[1].gradient_norm, rel=1e-3)


@pytest.mark.parametrize("cached", [False, True])
def test_a_teacher(config: Config, other_checkpoint: Path, cached: bool) -> None:
    trainer = Trainer(config(teacher=str(other_checkpoint), teacher_weight=2.0, grad_cache=cached, steps=2))
    teacher = trainer.teacher
    assert teacher is not None
    before = {name: value.clone() for name, value in teacher.encoder.backbone.state_dict().items()}
    batch = sample_batch(trainer.datasets, trainer.config, 0)
    terms = trainer.loss(batch)
    texts = [row.query for task in batch.tasks for row in task.rows]
    texts += [row.positive for task in batch.tasks for row in task.rows]
    texts += [text for task in batch.tasks for row in task.rows for text in row.negatives]
    # It has no training record, so its queries are bare.
    goal = torch.from_numpy(teacher.encoder.encode_document(texts))
    torch.testing.assert_close(teacher(batch, World()), goal, atol=1e-5, rtol=0)
    _, inputs = trainer.prepare(batch)
    mine = torch.cat([trainer.forward(inputs.queries), trainer.forward(inputs.documents)]).detach()
    expected = ((mine @ mine.T - goal @ goal.T) ** 2).mean()
    torch.testing.assert_close(terms.teacher, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(terms.loss.detach(), terms.with_demonstrations + terms.zero_shot + 2.0 * terms.teacher)
    final = trainer.train(show_progress=False)
    assert all("teacher" in entry for entry in trainer.metrics)
    assert all(torch.equal(value, before[name]) for name, value in teacher.encoder.backbone.state_dict().items())
    record = json.loads((final / "epic.json").read_text())["training"]
    assert record["teacher"] == {"name": "tiny", "fingerprint": teacher.encoder.fingerprint}
    # The folder's own name, without the machine's.
    assert record["config"]["teacher"] == "other"


def test_a_teacher_that_was_trained_with_instructions_gets_them(config: Config, tmp_path: Path) -> None:
    Trainer(config(steps=1, output=str(tmp_path / "first"))).train(show_progress=False)
    run = config(teacher=str(tmp_path / "first" / "final"), teacher_weight=1.0)
    teacher = Teacher(run, torch.device("cpu"))
    batch = TrainingBatch(
        (rows(Pair("a", "1", ("9",)), Pair("b", "2")), rows(Pair("c", "3"), Pair("d", "4"), name="u", symmetric=True))
    )
    asked = teacher.encoder.encode_query(["a", "b", "c", "d"], instruction="Go")
    documents = teacher.encoder.encode_document(["1", "2"])
    alike = teacher.encoder.encode_query(["3", "4"], instruction="Go")
    last = teacher.encoder.encode_document(["9"])
    expected = torch.from_numpy(np.concatenate([asked, documents, alike, last]))
    torch.testing.assert_close(teacher(batch, World()), expected, atol=1e-5, rtol=0)


def test_a_teacher_that_is_not_there(config: Config) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Trainer(config(teacher="nowhere", teacher_weight=1.0))


def test_a_teacher_draws_the_student_near(config: Config, other_checkpoint: Path, tmp_path: Path) -> None:
    ends: dict[float, Any] = {}
    for weight in (0.01, 100.0):
        trainer = Trainer(
            config(teacher=str(other_checkpoint), teacher_weight=weight, steps=15, output=str(tmp_path / str(weight)))
        )
        trainer.train(show_progress=False)
        ends[weight] = trainer.metrics[-1]["teacher"]
    assert ends[100.0] < 0.5 * ends[0.01]
