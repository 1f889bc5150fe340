"""Batches: demonstrations, shares, instructions, sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from epic_rag.errors import DataError
from epic_rag.training import PairDataset, TrainingConfig
from epic_rag.training.data import Pair, load_datasets
from epic_rag.training.sampling import sample_batch

# Few different texts, so that rows share queries, positives and groups; below ten rows no task is label-like.
pairs = st.lists(
    st.builds(
        Pair,
        query=st.sampled_from([f"q{number}" for number in range(6)]),
        positive=st.sampled_from([f"p{number}" for number in range(6)]),
        group=st.none() | st.sampled_from(["g0", "g1", "g2"]),
    ),
    min_size=2,
    max_size=9,
)


def make_config(**changes: Any) -> TrainingConfig:
    values = {"model": "m", "output": "o", "data": "d", "tasks": ["a", "b"], "batch_size": 8, "max_demonstrations": 4}
    return TrainingConfig.from_dict({**values, **changes})


@given(rows=pairs, other=pairs, step=st.integers(0, 1000), demonstrations=st.integers(0, 6))
@hypothesis_settings(deadline=None, max_examples=60)
def test_demonstrations_never_show_the_answer(
    rows: list[Pair], other: list[Pair], step: int, demonstrations: int
) -> None:
    datasets = [PairDataset("a", rows), PairDataset("b", other)]
    config = make_config(tasks_per_batch=2, batch_size=16, max_demonstrations=demonstrations)
    batch = sample_batch(datasets, config, step)
    assert [task.name for task in batch.tasks] in (["a", "b"], ["b", "a"])
    for task in batch.tasks:
        assert len(task.rows) == len(task.demonstrations) == min(8, len(rows if task.name == "a" else other))
        for row, chosen in zip(task.rows, task.demonstrations, strict=True):
            assert len(chosen) <= demonstrations
            assert len(set(chosen)) == len(chosen)
            for shown in (task.rows[index] for index in chosen):
                assert shown is not row
                assert shown.query != row.query
                assert shown.positive != row.positive
                assert shown.group is None or shown.group != row.group


def test_demonstrations_of_label_like_tasks_may_show_the_label() -> None:
    dataset = PairDataset("mood", [Pair(f"text {number}", ("good", "bad")[number % 2]) for number in range(60)])
    assert dataset.label_like
    same = other = 0
    for step in range(20):
        task = sample_batch([dataset], make_config(tasks=["mood"]), step).tasks[0]
        for row, chosen in zip(task.rows, task.demonstrations, strict=True):
            shown = [task.rows[index] for index in chosen]
            assert row not in shown
            same += sum(item.positive == row.positive for item in shown)
            other += sum(item.positive != row.positive for item in shown)
    assert min(same, other) > 50


def test_the_number_of_demonstrations_is_uniform() -> None:
    dataset = PairDataset("a", [Pair(f"q{n}", f"p{n}") for n in range(50)])
    config = make_config(tasks=["a"], batch_size=40, max_demonstrations=4)
    seen = Counter(
        len(chosen) for step in range(50) for chosen in sample_batch([dataset], config, step).tasks[0].demonstrations
    )
    assert set(seen) == {0, 1, 2, 3, 4}
    assert all(300 < count < 500 for count in seen.values()), seen  # 2,000 draws, 400 each
    none = make_config(tasks=["a"], strategy="none")
    assert not any(any(task.demonstrations) for task in sample_batch([dataset], none, 0).tasks)


def test_a_batch_is_a_function_of_configuration_and_step() -> None:
    datasets = [PairDataset(name, [Pair(f"{name} q{n}", f"{name} p{n}") for n in range(40)]) for name in "ab"]
    config = make_config(generic_instruction_p=0.3, drop_instruction_p=0.3)
    batches = [sample_batch(datasets, config, step) for step in range(6)]
    assert [sample_batch(datasets, config, step) for step in reversed(range(6))] == batches[::-1]
    assert len(set(batches)) == 6
    assert (
        sample_batch(datasets, make_config(generic_instruction_p=0.3, drop_instruction_p=0.3, seed=1), 0) != batches[0]
    )


def test_shares_follow_size_and_weight() -> None:
    sizes = {"small": 100, "large": 400}

    def counts(power: float, weight: float) -> Counter[str]:
        datasets = [
            PairDataset(name, [Pair(f"q{n}", f"p{n}") for n in range(size)], weight=weight if name == "small" else 1.0)
            for name, size in sizes.items()
        ]
        config = make_config(sampling_alpha=power, max_demonstrations=0)
        return Counter(sample_batch(datasets, config, step).tasks[0].name for step in range(600))

    assert 350 < counts(0.5, 1)["large"] < 450  # 20 : 10
    assert 250 < counts(0.0, 1)["large"] < 350  # 1 : 1
    assert 250 < counts(0.5, 2)["large"] < 350  # 20 : 2 * 10


def test_instructions_are_left_out_and_generalised() -> None:
    dataset = PairDataset("a", [Pair(f"q{n}", f"p{n}") for n in range(40)], instruction="Go")
    config = make_config(
        tasks=["a"], generic_instruction_p=0.5, drop_instruction_p=0.25, generic_instructions=["Find", "Get"]
    )
    seen = Counter(sample_batch([dataset], config, step).tasks[0].instruction for step in range(400))
    assert set(seen) == {"Go", "Find", "Get", None}
    assert 60 < seen["Go"] < 140
    assert 60 < seen[None] < 140


def test_sources_are_tasks(config: Callable[..., TrainingConfig], data: Path, write_task: Callable[..., Path]) -> None:
    rows = [
        {"query": f"{s} q{n}", "positive": f"{s} p{n}", "source": s} for s in ("one", "two", "three") for n in range(32)
    ]
    write_task(data, "manuals", [*rows, {"query": "rare q", "positive": "rare p", "source": "rare"}])
    run = config(tasks={"manuals": {"sources_per_batch": 2}}, batch_size=12, tasks_per_batch=1)
    training, _ = load_datasets(run)
    assert sorted(training[0].by_source) == ["one", "three", "two"]  # one row is too few
    for step in range(10):
        batch = sample_batch(training, run, step)
        assert batch.pairs == 12
        assert [task.name for task in batch.tasks] == ["manuals", "manuals"]
        sources = [{row.source for row in task.rows} for task in batch.tasks]
        assert all(len(source) == 1 for source in sources)
        assert sources[0] != sources[1]
    with pytest.raises(DataError, match="manuals has 3 sources of 32 rows or more, and sources_per_batch is 4"):
        load_datasets(config(tasks={"manuals": {"sources_per_batch": 4}}))


def test_small_tasks_give_what_they_have() -> None:
    datasets = [PairDataset("a", [Pair("q0", "p0"), Pair("q1", "p1")]), PairDataset("b", [Pair("r0", "s0")] * 9)]
    batch = sample_batch(datasets, make_config(tasks_per_batch=2), 0)
    assert {task.name: len(task.rows) for task in batch.tasks} == {"a": 2, "b": 4}
    assert batch.pairs == 6
