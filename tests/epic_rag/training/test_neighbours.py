"""Groups of rows that share words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from epic_rag.training import Trainer, TrainingConfig
from epic_rag.training.neighbours import neighbour_groups
from epic_rag.training.sampling import sample_batch

SUBJECTS = ["boat sail mast", "bread oven flour", "piano string key", "engine piston valve"]


@given(
    texts=st.lists(st.text(alphabet="ab -.\n", max_size=8), max_size=120),
    size=st.integers(1, 20),
    seed=st.integers(0, 9),
)
@hypothesis_settings(deadline=None, max_examples=30)
def test_every_text_is_in_one_group(texts: list[str], size: int, seed: int) -> None:
    groups = neighbour_groups(texts, size, seed)
    assert sorted(index for group in groups for index in group) == list(range(len(texts)))
    assert sum(len(group) != size for group in groups) <= 1
    assert groups == neighbour_groups(texts, size, seed)


def test_groups_share_words() -> None:
    texts = [f"{SUBJECTS[number % 4]} {number}" for number in range(160)]
    groups = neighbour_groups(texts, 8, seed=1)
    pure = sum(len({index % 4 for index in group}) == 1 for group in groups)
    assert pure >= 16  # of 20; one in a thousand at random


def test_batches_are_whole_groups(
    config: Callable[..., TrainingConfig], data: Path, write_task: Callable[..., Path]
) -> None:
    rows = [
        {"query": f"{SUBJECTS[number % 4]} {number}", "positive": f"about {number}", "source": str(number // 80)}
        for number in range(160)
    ]
    write_task(data, "manuals", rows)
    write_task(data, "same", rows)
    write_task(data, "label", [{**row, "positive": SUBJECTS[0]} for row in rows])
    tasks = {"manuals": {"sources_per_batch": 2}, "same": {"symmetric": True}, "label": {}}
    trainer = Trainer(config(tasks=tasks, neighbours=4, tasks_per_batch=1, batch_size=16))
    manuals, same, label = trainer.datasets
    assert sorted(manuals.groups, key=str) == ["0", "1"]
    # Neighbours in these would mean the same, or have the same label.
    assert same.groups == label.groups == {}
    known = {frozenset(row.query for row in group) for groups in manuals.groups.values() for group in groups}
    for step in range(8):
        for task in sample_batch([manuals], trainer.config, step).tasks:
            drawn = [row.query for row in task.rows]
            assert {frozenset(drawn[:4]), frozenset(drawn[4:])} <= known


@pytest.mark.parametrize("size", [0, 4])
def test_a_run_with_and_without_groups(config: Callable[..., TrainingConfig], size: int) -> None:
    trainer = Trainer(config(neighbours=size))
    result = trainer.train_step(sample_batch(trainer.datasets, trainer.config, 0))
    assert result.pairs == 8
    assert all(bool(dataset.groups) == bool(size) for dataset in trainer.datasets)
