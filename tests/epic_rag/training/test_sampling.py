"""Tasks asked twice, and demonstrations that are wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from epic_rag.errors import ConfigError
from epic_rag.training import PairDataset, Trainer, TrainingBatch, TrainingConfig
from epic_rag.training.data import Pair, TaskRows
from epic_rag.training.inputs import build_inputs
from epic_rag.training.losses import asked_elsewhere, false_negatives
from epic_rag.training.sampling import SAME_QUERY, sample_batch

Config = Callable[..., TrainingConfig]


def make_config(**changes: Any) -> TrainingConfig:
    values = {"model": "m", "output": "o", "data": "d", "tasks": ["a", "b"], "batch_size": 16, "max_demonstrations": 4}
    return TrainingConfig.from_dict({**values, **changes})


def dataset(name: str, count: int = 40, **more: Any) -> PairDataset:
    rows = [Pair(f"{name} query number {n}", f"{name} passage {n}") for n in range(count)]
    return PairDataset(name, rows, instruction=f"Do {name}", **more)


def test_a_task_is_asked_twice() -> None:
    config = make_config(tasks=["a"], several_tasks=1.0, no_instruction=0.5, generic_instructions=["Find"])
    instructions = set()
    for step in range(20):
        answers, alike = sample_batch([dataset("a")], config, step).tasks
        assert (answers.name, alike.name) == ("a", f"a: {SAME_QUERY}")
        assert len(answers.rows) == len(alike.rows) == 8
        assert answers.instruction == alike.instruction
        instructions.add(answers.instruction)
        for answer, same in zip(answers.rows, alike.rows, strict=True):
            assert answer.query == same.query
            assert answer.positive.startswith("a passage")
            # Nothing but words of the query, in their order.
            rest = iter(answer.query.lower().split())
            assert all(word in rest for word in same.positive.lower().split())
            assert same.positive
    assert instructions == {"Find", None}


def test_no_task_is_asked_twice_where_the_two_would_be_one() -> None:
    config = make_config(tasks=["a"], several_tasks=1.0)
    labels = PairDataset("a", [Pair(f"text {n}", ("good", "bad")[n % 2]) for n in range(60)])
    for item in (dataset("a", symmetric=True), labels):
        assert [task.name for task in sample_batch([item], config, 0).tasks] == ["a"]


def test_without_demonstrations_the_other_tasks_document_is_no_negative() -> None:
    batch = TrainingBatch(
        (
            TaskRows("a", None, False, (Pair("x", "1"), Pair("y", "2")), ((), ())),
            TaskRows("b", None, False, (Pair("y", "3", negatives=("4",)), Pair("z", "5")), ((), ())),
        )
    )
    # Columns: 1 2 | 3 5 | 4
    assert asked_elsewhere(batch).int().tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    # With demonstrations, which say the task, it is one.
    assert not (false_negatives(batch) & asked_elsewhere(batch)).any()


@given(step=st.integers(0, 500), share=st.sampled_from([0.0, 0.3, 1.0]), tasks=st.integers(1, 2))
@hypothesis_settings(deadline=None, max_examples=60)
def test_mismatched_demonstrations_are_wrong(step: int, share: float, tasks: int) -> None:
    config = make_config(mismatched_demonstrations=share, tasks_per_batch=tasks)
    batch = sample_batch([dataset("a"), dataset("b")], config, step)
    rows = [row for task in batch.tasks for row in task.rows]
    start = 0
    for task in batch.tasks:
        own = range(start, start + len(task.rows))
        for index, shown in enumerate(task.demonstrations):
            wrong = task.mismatched[index] if task.mismatched else ()
            if not shown or share == 0.0:
                assert wrong == ()
            if not wrong:
                # One demonstration cannot be shuffled, and a single task has no other to take from.
                assert share < 1 or not shown or (len(shown) == 1 and tasks == 1)
                continue
            assert len(wrong) == len(shown)
            inside = [query in own for query, _ in wrong]
            assert all(inside) or not any(inside)
            if inside[0]:
                assert {query - start for query, _ in wrong} == set(shown)
                assert {passage - start for _, passage in wrong} == set(shown)
                assert all(rows[query].positive != rows[passage].positive for query, passage in wrong)
            else:
                assert all(query == passage for query, passage in wrong)
        start += len(task.rows)


def test_shuffling_labels_leaves_no_right_pair() -> None:
    labels = PairDataset("a", [Pair(f"text {n}", ("good", "bad")[n % 2]) for n in range(60)])
    config = make_config(tasks=["a"], mismatched_demonstrations=1.0)
    seen = 0
    for step in range(40):
        (task,) = sample_batch([labels], config, step).tasks
        for wrong in task.mismatched:
            seen += len(wrong)
            assert all(task.rows[query].positive != task.rows[passage].positive for query, passage in wrong)
    assert seen


def test_mismatched_rows_are_held_to_zero_shot(config: Config) -> None:
    trainer = Trainer(config(mismatched_weight=0.5))
    tasks = (
        TaskRows(
            "up", None, False, (Pair("a", "1"), Pair("b", "2"), Pair("c", "3")), ((1,), (2,), ()), (((3, 3),), (), ())
        ),
        TaskRows("down", None, False, (Pair("d", "4"), Pair("e", "5")), ((1,), (0,)), ((), ())),
    )
    batch = TrainingBatch(tasks)
    inputs = build_inputs(batch, trainer.prompt, trainer.config)
    assert inputs.mismatched == (0,)
    assert inputs.shown[:2] == [[3, 5 + 3], [2, 5 + 2]]
    terms = trainer.loss(batch)
    assert terms.mismatched is not None
    assert float(terms.mismatched) > 0
    torch.testing.assert_close(
        terms.loss,
        terms.with_demonstrations + trainer.config.zero_shot_weight * terms.zero_shot + 0.5 * terms.mismatched,
    )
    terms.loss.backward()


def test_a_run_with_all_of_it(config: Config) -> None:
    trainer = Trainer(config(several_tasks=1.0, mismatched_demonstrations=0.5, plain_steps=2, steps=6))
    trainer.train(show_progress=False)
    told = [entry for entry in trainer.metrics if "loss" in entry]
    # The first steps show nothing.
    assert [entry["with_demonstrations"] == 0.0 for entry in told] == [True, True, False, False, False, False]
    assert [entry["loss"] == entry["zero_shot"] for entry in told][:2] == [True, True]
    assert any("mismatched" in entry for entry in told)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"several_tasks": 1.5}, "several_tasks is 1.5; give a share"),
        ({"mismatched_demonstrations": -0.1}, "mismatched_demonstrations is -0.1; give a share"),
        ({"plain_steps": -1}, "plain_steps is -1; give a value of 0 or more"),
        ({"several_tasks": 0.5, "batch_size": 3}, "several_tasks is 0.5 and batch_size 3 for 1 tasks in a batch"),
        ({"several_tasks": 0.5, "generic_instructions": []}, "generic_instructions is empty with .*several_tasks 0.5"),
        ({"several_tasks": 0.5, "demonstration_source": "bank"}, "'bank' and several_tasks is 0.5"),
        ({"pooling": "max"}, "pooling is 'max', known are last, mean, cls"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_config(**changes)


def test_pooling_of_a_run(config: Config) -> None:
    assert Trainer(config()).encoder.backbone.pooling == "last"
    trainer = Trainer(config(pooling="mean", steps=1))
    assert trainer.encoder.backbone.pooling == "mean"
    # What the result reads back.
    assert '"pooling": "mean"' in (trainer.train(show_progress=False) / "epic.json").read_text(encoding="utf-8")
