"""Files of pairs, held-out rows, batches and their demonstrations."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from epic_rag.errors import DataError
from epic_rag.training import PairDataset, TrainingConfig, load_pairs
from epic_rag.training.data import Pair, load_datasets
from epic_rag.training.sampling import sample_batch

quick = hypothesis_settings(deadline=None, max_examples=60)
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


def label_rows(count: int = 60) -> list[Pair]:
    return [Pair(f"text {number}", ("good", "bad")[number % 2]) for number in range(count)]


# Files


def test_load_pairs(tmp_path: Path) -> None:
    text = (
        '\ufeff{"query": "a", "positive": "b"}\r\n\n'
        '{"query": "c\u2028d", "passage": "e", "negatives": ["f"], "group": 7, "source": "s"}\n'
    )
    plain, zipped = tmp_path / "t.jsonl", tmp_path / "t.jsonl.gz"
    plain.write_text(text, encoding="utf-8", newline="")
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    rows, digest = load_pairs(plain)
    assert rows == [Pair("a", "b"), Pair("c\u2028d", "e", ("f",), "7", "s")]
    assert digest == hashlib.sha256(plain.read_bytes()).hexdigest()
    assert load_pairs(zipped)[0] == rows


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"query": "a"', r"t.jsonl:2 is not .*Expecting"),
        ('{"query": "a"}', r"t.jsonl:2 is not .*'passage'"),
        ('{"positive": "a"}', r"t.jsonl:2 is not .*'query'"),
        ('["a", "b"]', r"t.jsonl:2 is not"),
        ('"a"', r"t.jsonl:2 is not"),
        ('{"query": "a", "positive": " "}', r"t.jsonl:2 has a text that is empty"),
        ('{"query": null, "positive": "b"}', r"t.jsonl:2 has a text that is empty, no string"),
        ('{"query": "a", "positive": "\\ud800"}', r"t.jsonl:2 has a text that is .* no valid Unicode"),
        ('{"query": "a", "positive": "b", "negatives": [3]}', r"t.jsonl:2 has a text that is empty, no string"),
        ('{"query": "a", "positive": "b", "negatives": "cd"}', r't.jsonl:2 has "negatives" that are no list'),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"query": "a", "positive": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=expected) as caught:
        load_pairs(tmp_path / "t.jsonl")
    assert "\n" not in str(caught.value)


def test_files_without_rows_and_broken_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl has no rows"):
        load_pairs(tmp_path / "empty.jsonl")
    whole = gzip.compress(b'{"query": "a", "positive": "b"}\n' * 50)
    # Not gzip at all, cut off, and damaged inside.
    for content in (b"plain", whole[:-12], whole[:12] + bytes(20) + whole[32:], b"\xff\xfe\xff"):
        name = "t.jsonl" if content.startswith(b"\xff") else "t.jsonl.gz"
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} cannot be read"):
            load_pairs(tmp_path / name)


def test_a_missing_file_names_what_is_there(config: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file side\.jsonl or side\.jsonl\.gz in .*data, which has down, up; check"):
        load_datasets(config(tasks=["side"]))
    with pytest.raises(DataError, match=r"in .*nowhere, which has none"):
        load_datasets(config(data=str(tmp_path / "nowhere")))


def test_instructions(config: Callable[..., TrainingConfig], data: Path) -> None:
    def told(**changes: Any) -> list[str | None]:
        return [dataset.instruction for dataset in load_datasets(config(**changes))[0]]

    assert told(tasks={"up": {}, "down": {"instruction": "Sink"}}) == ["Go up", "Sink"]
    (data / "instructions.json").write_text('{"up": "Go up"}')
    assert told() == ["Go up", None]
    assert told(default_instruction="Find it") == ["Go up", "Find it"]
    (data / "instructions.json").unlink()
    assert told() == [None, None]
    (data / "instructions.json").write_text("{")
    with pytest.raises(DataError, match=r"instructions\.json is not valid JSON"):
        told()
    (data / "instructions.json").write_text('["Go up"]')
    with pytest.raises(DataError, match=r"instructions\.json holds a list"):
        told()


# Held-out rows


@given(rows=pairs, count=st.integers(1, 8))
@quick
def test_held_out_rows_share_nothing_with_training_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Pair], count: int
) -> None:
    folder = tmp_path_factory.mktemp("data")
    with (folder / "t.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps({"query": row.query, "positive": row.positive, "group": row.group}) + "\n")
    # A task that is only evaluated: a small one may lose all its training rows.
    config = make_config(data=str(folder), tasks=["other"], evaluation_tasks=["t"], evaluation_rows=count)
    (folder / "other.jsonl").write_text('{"query": "a", "positive": "b"}\n' * 2)
    _, evaluated = load_datasets(config)
    assert [dataset.name for dataset in evaluated] == ["t"]
    dataset = evaluated[0]
    assert not dataset.label_like
    assert len(dataset.held_out) == min(count, len(rows) // 2)
    assert not Counter(dataset.held_out) - Counter(rows)
    positives = {row.positive for row in dataset.held_out}
    groups = {row.group for row in dataset.held_out} - {None}
    for row in dataset.rows:
        assert row.positive not in positives
        assert row.group not in groups
    # Nothing else is lost.
    kept = [row for row in rows if row.positive not in positives and row.group not in groups]
    assert Counter(dataset.rows) == Counter(kept)


def test_label_like_tasks_keep_rows_with_a_held_out_label(
    config: Callable[..., TrainingConfig], data: Path, write_task: Callable[..., Path]
) -> None:
    write_task(data, "mood", [{"query": row.query, "positive": row.positive} for row in label_rows()])
    training, evaluated = load_datasets(config(tasks=["mood"], evaluation_tasks=["mood"], evaluation_rows=10))
    assert training[0] is evaluated[0]
    assert training[0].label_like
    assert len(training[0].rows) == 50
    assert not {row.query for row in training[0].rows} & {row.query for row in training[0].held_out}


def test_held_out_rows_are_the_same_in_every_run(config: Callable[..., TrainingConfig]) -> None:
    first = load_datasets(config(evaluation_tasks=["up"], evaluation_rows=5, seed=1))[1][0]
    second = load_datasets(config(evaluation_tasks=["up"], evaluation_rows=5, seed=2, steps=9))[1][0]
    assert first.held_out == second.held_out
    assert len(first.held_out) == 5


def test_nothing_is_held_out_unasked(config: Callable[..., TrainingConfig]) -> None:
    for changes in ({}, {"evaluation_tasks": ["up"], "evaluation_rows": 0}):
        training, evaluated = load_datasets(config(**changes))
        assert [len(dataset.rows) for dataset in training] == [16, 16]
        assert evaluated == []


def test_too_few_rows_to_train_on(
    config: Callable[..., TrainingConfig], data: Path, write_task: Callable[..., Path]
) -> None:
    write_task(data, "one", [{"query": "a", "positive": "b"}])
    with pytest.raises(DataError, match="one has 1 rows, of which 1 are left"):
        load_datasets(config(tasks=["one"]))
    # One group for all: nothing may stay beside what is held out.
    write_task(data, "group", [{"query": f"q{n}", "positive": f"p{n}", "group": n % 2} for n in range(8)])
    with pytest.raises(DataError, match="group has 8 rows, of which 0 are left for training beside 4 held-out"):
        load_datasets(config(tasks=["group"], evaluation_tasks=["group"]))


# Batches


@given(rows=pairs, other=pairs, step=st.integers(0, 1000), demonstrations=st.integers(0, 6))
@quick
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
    dataset = PairDataset("mood", label_rows())
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
    config = make_config(generic_instruction=0.3, no_instruction=0.3)
    batches = [sample_batch(datasets, config, step) for step in range(6)]
    assert [sample_batch(datasets, config, step) for step in reversed(range(6))] == batches[::-1]
    assert len(set(batches)) == 6
    assert sample_batch(datasets, make_config(generic_instruction=0.3, no_instruction=0.3, seed=1), 0) != batches[0]


def test_shares_follow_size_and_weight() -> None:
    sizes = {"small": 100, "large": 400}

    def counts(power: float, weight: float) -> Counter[str]:
        datasets = [
            PairDataset(name, [Pair(f"q{n}", f"p{n}") for n in range(size)], weight=weight if name == "small" else 1.0)
            for name, size in sizes.items()
        ]
        config = make_config(size_power=power, max_demonstrations=0)
        return Counter(sample_batch(datasets, config, step).tasks[0].name for step in range(600))

    assert 350 < counts(0.5, 1)["large"] < 450  # 20 : 10
    assert 250 < counts(0.0, 1)["large"] < 350  # 1 : 1
    assert 250 < counts(0.5, 2)["large"] < 350  # 20 : 2 * 10


def test_instructions_are_left_out_and_generalised() -> None:
    dataset = PairDataset("a", [Pair(f"q{n}", f"p{n}") for n in range(40)], instruction="Go")
    config = make_config(
        tasks=["a"], generic_instruction=0.5, no_instruction=0.25, generic_instructions=["Find", "Get"]
    )
    seen = Counter(sample_batch([dataset], config, step).tasks[0].instruction for step in range(400))
    assert set(seen) == {"Go", "Find", "Get", None}
    assert 60 < seen["Go"] < 140
    assert 60 < seen[None] < 140


def test_pairs_are_turned_round_but_not_where_that_says_nothing() -> None:
    rows = [Pair(f"q{n}", f"p{n}", ("x",), "g", "s") for n in range(40)]
    plain = PairDataset("a", rows, instruction="Go")
    plain.label_like = False
    config = make_config(tasks=["a"], turned_round=0.5, generic_instructions=["Find"])
    tasks = [sample_batch([plain], config, step).tasks[0] for step in range(60)]
    turned = [task for task in tasks if task.rows[0].query.startswith("p")]
    assert 15 < len(turned) < 45
    for task in turned:
        # The instruction names the other direction, and hard negatives are of the other kind.
        assert task.instruction == "Find"
        assert all(re.fullmatch(r"p\d+", row.query) and row.positive == f"q{row.query[1:]}" for row in task.rows)
        assert all(row.negatives == () and (row.group, row.source) == ("g", "s") for row in task.rows)
    for dataset in (PairDataset("a", rows, symmetric=True), PairDataset("a", label_rows())):
        for step in range(20):
            assert set(sample_batch([dataset], config, step).tasks[0].rows) <= set(dataset.rows)


def test_sources_are_tasks_of_their_own(
    config: Callable[..., TrainingConfig], data: Path, write_task: Callable[..., Path]
) -> None:
    rows = [
        {"query": f"{s} q{n}", "positive": f"{s} p{n}", "source": s} for s in ("one", "two", "three") for n in range(32)
    ]
    write_task(data, "manuals", [*rows, {"query": "rare q", "positive": "rare p", "source": "rare"}])
    run = config(tasks={"manuals": {"sources": 2}}, batch_size=12, tasks_per_batch=1)
    training, _ = load_datasets(run)
    assert sorted(training[0].by_source) == ["one", "three", "two"]  # one row cannot demonstrate for itself
    for step in range(10):
        batch = sample_batch(training, run, step)
        assert batch.pairs == 12
        assert [task.name for task in batch.tasks] == ["manuals", "manuals"]
        sources = [{row.source for row in task.rows} for task in batch.tasks]
        assert all(len(source) == 1 for source in sources)
        assert sources[0] != sources[1]
    with pytest.raises(DataError, match="manuals has 3 sources of 32 rows or more, `sources` asks for 4"):
        load_datasets(config(tasks={"manuals": {"sources": 4}}))


def test_small_tasks_give_what_they_have() -> None:
    datasets = [PairDataset("a", [Pair("q0", "p0"), Pair("q1", "p1")]), PairDataset("b", [Pair("r0", "s0")] * 9)]
    batch = sample_batch(datasets, make_config(tasks_per_batch=2), 0)
    assert {task.name: len(task.rows) for task in batch.tasks} == {"a": 2, "b": 4}
    assert batch.pairs == 6
