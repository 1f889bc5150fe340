"""Files of pairs, held-out rows, banks."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from epic_rag.errors import DataError
from epic_rag.training import PairDataset, Trainer, TrainingConfig, load_pairs
from epic_rag.training.data import Pair, load_datasets, split_off_banks

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
        ('{"query": "a"', r"t.jsonl:2 is not valid JSON"),
        ('{"query": "a"}', r't.jsonl:2 has no text for "positive"\.'),
        ('{"positive": "a"}', r't.jsonl:2 has no text for "query"\.'),
        ('["a", "b"]', r"t.jsonl:2 is not a JSON object"),
        ('"a"', r"t.jsonl:2 is not a JSON object"),
        ('{"query": "a", "positive": " "}', r't.jsonl:2 has no text for "positive"'),
        ('{"query": null, "positive": "b"}', r't.jsonl:2 has no text for "query"'),
        ('{"query": "a", "positive": "\\ud800"}', r't.jsonl:2 has a "positive" that is not valid Unicode'),
        ('{"query": "a", "positive": "b", "negatives": [3]}', r't.jsonl:2 has no text for "negatives"'),
        ('{"query": "a", "positive": "b", "negatives": "cd"}', r't.jsonl:2 has "negatives" that are not a list'),
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
        with pytest.raises(DataError, match=rf"{name} cannot be read|{name}:1 is not UTF-8"):
            load_pairs(tmp_path / name)


def test_a_missing_file_names_what_is_there(config: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"No file side\.jsonl or side\.jsonl\.gz in .*data, which has down, up\. Check"
    ):
        load_datasets(config(tasks=["side"]))
    with pytest.raises(DataError, match=r"in .*nowhere, which has none"):
        load_datasets(config(data=str(tmp_path / "nowhere")))


def test_instructions(config: Callable[..., TrainingConfig], data: Path) -> None:
    def instructions(**changes: Any) -> list[str | None]:
        return [dataset.instruction for dataset in load_datasets(config(**changes))[0]]

    assert instructions(tasks={"up": {}, "down": {"instruction": "Sink"}}) == ["Go up", "Sink"]
    (data / "instructions.json").write_text('{"up": "Go up"}')
    assert instructions() == ["Go up", None]
    assert instructions(default_instruction="Find it") == ["Go up", "Find it"]
    (data / "instructions.json").unlink()
    assert instructions() == [None, None]
    (data / "instructions.json").write_text("{")
    with pytest.raises(DataError, match=r"instructions\.json is not valid JSON"):
        instructions()
    (data / "instructions.json").write_text('["Go up"]')
    with pytest.raises(DataError, match=r"instructions\.json holds a list"):
        instructions()


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


def test_nothing_is_held_out_by_default(config: Callable[..., TrainingConfig]) -> None:
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


# Banks


def banked(config: Callable[..., TrainingConfig], **changes: object) -> Trainer:
    return Trainer(config(demonstration_source="bank", bank_size=4, **changes))


def test_a_pool_is_not_trained_on(config: Callable[..., TrainingConfig]) -> None:
    trainer = banked(config)
    assert trainer.banks is not None
    for dataset in trainer.datasets:
        pool = trainer.banks[dataset.name]
        assert len(pool) == 4
        assert len(dataset.rows) == 12
        assert not set(pool) & set(dataset.rows)
    assert banked(config).banks == trainer.banks
    assert banked(config, seed=1).banks != trainer.banks


def test_rows_that_the_pool_would_answer_leave_too(config: Callable[..., TrainingConfig]) -> None:
    run = config(demonstration_source="bank", bank_size=3, max_demonstrations=2)
    rows = [Pair(f"q{n}", f"p{n // 2}", group=str(n // 4)) for n in range(24)]
    dataset = PairDataset("t", rows)
    pool = split_off_banks([dataset], run)["t"]
    assert len(pool) == 3
    assert {row.group for row in pool}.isdisjoint(row.group for row in dataset.rows)
    # Where rows share a few labels, others with the pool's labels stay.
    rows = [Pair(f"q{n}", "yes" if n % 2 else "no") for n in range(40)]
    dataset = PairDataset("t", rows)
    assert dataset.label_like
    split_off_banks([dataset], run)
    assert len(dataset.rows) == 37


def test_too_few_rows_are_left(config: Callable[..., TrainingConfig]) -> None:
    with pytest.raises(DataError, match=r"up has 16 rows, of which a bank of 15 leaves 1 for training.*: lower"):
        Trainer(config(demonstration_source="bank", bank_size=15))


def test_a_task_without_in_batch_negatives_needs_hard_ones(config: Callable[..., TrainingConfig]) -> None:
    load_datasets(config(tasks={"up": {}, "down": {"in_batch_negatives": False}}))
    with pytest.raises(DataError, match=r"up has 16 rows, 16 of them without hard negatives.*\. Give each row"):
        load_datasets(config(tasks={"up": {"in_batch_negatives": False}, "down": {}}))


def test_whole_sources_are_held_out(
    config: Callable[..., TrainingConfig], data: Path, write_task: Callable[..., Path]
) -> None:
    rows = [{"query": f"{s} q{n}", "positive": f"{s} p{n}", "source": s} for s in ("old", "new") for n in range(20)]
    write_task(data, "manuals", rows)
    task = {"manuals": {"held_out_sources": ["new"]}}
    [training], [evaluated] = load_datasets(config(tasks=task, evaluation_tasks=["manuals"], evaluation_rows=5))
    assert training is evaluated
    assert {row.source for row in training.rows} == {"old"}
    assert len(training.rows) == 20
    assert training.distractors is not None
    assert (len(training.held_out), len(training.distractors)) == (5, 15)
    assert {row.query for row in [*training.held_out, *training.distractors]} == {f"new q{n}" for n in range(20)}
    # Without an evaluation they are not trained on either.
    [training], evaluated_tasks = load_datasets(config(tasks=task))
    assert {row.source for row in training.rows} == {"old"}
    assert evaluated_tasks == []
    # The rows that are ranked with the held-out ones are of the new source, and so are the demonstrations.
    trainer = Trainer(config(tasks=task, tasks_per_batch=1, evaluation_tasks=["manuals"], evaluation_rows=5))
    assert set(trainer.evaluate()["manuals"]) == {"k=0", "k=8"}
