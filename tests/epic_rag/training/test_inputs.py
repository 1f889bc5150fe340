"""Rows of a step: which documents are negatives, which demonstrations fill which slots, chunks of forward passes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.training import TaskConfig, Trainer, TrainingBatch, TrainingConfig
from epic_rag.training.data import Pair, TaskRows, draw_bank_demonstrations
from epic_rag.training.inputs import (
    SlotTable,
    build_inputs,
    draw_hard_negatives,
    false_negatives,
    hard_negatives_mask,
    negatives_mask,
)
from epic_rag.training.sampling import sample_batch

Config = Callable[..., TrainingConfig]


def batch(*tasks: tuple[str, list[Pair]], symmetric: bool = False) -> TrainingBatch:
    return TrainingBatch(tuple(TaskRows(name, "Go", symmetric, tuple(rows), ((),) * len(rows)) for name, rows in tasks))


def columns(mask: torch.Tensor) -> list[list[int]]:
    return [torch.nonzero(row).flatten().tolist() for row in mask]


def test_unrelated_rows_are_negatives() -> None:
    rows = [Pair("a", "1"), Pair("b", "2", ("3",)), Pair("c", "4")]
    mask = false_negatives(batch(("t", rows)))
    assert (mask.shape, mask.dtype) == ((3, 4), torch.bool)
    assert columns(mask) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # The same positive.
        ([Pair("a", "1"), Pair("b", "1"), Pair("c", "2")], [[0, 1], [0, 1], [2]]),
        # The same group, other texts.
        ([Pair("a", "1", group="g"), Pair("b", "2", group="g"), Pair("c", "3", group="h")], [[0, 1], [0, 1], [2]]),
        # The same query, another positive.
        ([Pair("a", "1"), Pair("a", "2"), Pair("c", "3")], [[0, 1], [0, 1], [2]]),
        # A hard negative that is this query's positive, or another's: false for its query only.
        ([Pair("a", "1", ("2",)), Pair("b", "2", ("9",))], [[0], [1, 2]]),
        # A hard negative is a negative of all rows, also of its group's.
        ([Pair("a", "1", ("8",), group="g"), Pair("b", "2", ("9",), group="g")], [[0, 1], [0, 1]]),
        # A text that is a positive of the row's group, wherever it stands.
        ([Pair("a", "1", group="g"), Pair("b", "2", group="g"), Pair("c", "2")], [[0, 1, 2], [0, 1, 2], [1, 2]]),
    ],
)
def test_false_negatives(rows: list[Pair], expected: list[list[int]]) -> None:
    assert columns(false_negatives(batch(("t", rows)))) == expected


def test_false_negatives_across_tasks() -> None:
    one = [Pair("a", "1", group="g"), Pair("b", "2")]
    two = [Pair("a", "3", group="g"), Pair("c", "2", ("1",))]
    # The same query or group in another task wants another document. An equal text is never a negative.
    assert columns(false_negatives(batch(("x", one), ("y", two)))) == [[0, 4], [1, 3], [2], [1, 3]]
    # Two parts of one task, as with sources.
    assert columns(false_negatives(batch(("x", one), ("x", two)))) == [[0, 2, 4], [1, 3], [0, 2, 4], [1, 3]]


def test_symmetric_tasks_exclude_the_query() -> None:
    rows = [Pair("a", "b"), Pair("c", "a")]
    assert columns(false_negatives(batch(("t", rows), symmetric=True))) == [[0, 1], [1]]
    assert columns(false_negatives(batch(("t", rows)))) == [[0], [1]]


def test_tasks_without_in_batch_negatives() -> None:
    value = batch(("t", [Pair("a", "1", ("7", "8")), Pair("b", "2", ("9",))]), ("u", [Pair("c", "3")]))
    assert columns(hard_negatives_mask(value)) == [[3, 4], [5], []]
    tasks = {"t": TaskConfig(in_batch_negatives=False), "u": TaskConfig()}
    counted = columns(~negatives_mask(value, TrainingConfig("m", "o", "d", tasks)))
    assert counted == [[3, 4], [5], [0, 1, 3, 4, 5]]


def test_hard_negatives_are_drawn_by_seed_and_step() -> None:
    value = batch(("t", [Pair("a", "1", tuple("vwxyz")), Pair("b", "2", ("k",)), Pair("c", "3")]))

    def drawn(count: int, seed: int, step: int) -> list[tuple[str, ...]]:
        return [row.negatives for row in draw_hard_negatives(value, count, seed, step).tasks[0].rows]

    first = drawn(2, 0, 0)
    assert [len(texts) for texts in first] == [2, 1, 0]
    assert set(first[0]) <= set("vwxyz")
    assert drawn(2, 0, 0) == first
    assert {drawn(2, 0, step)[0] for step in range(20)} != {first[0]}
    assert {drawn(2, seed, 0)[0] for seed in range(20)} != {first[0]}
    assert drawn(0, 0, 0) == [(), (), ()]


def test_hard_negatives_of_a_step(config: Config) -> None:
    for changes, counted in (({"hard_negatives": 0}, 8), ({}, 8 + 4)):
        trainer = Trainer(config(**changes))
        _, inputs = trainer.prepare(sample_batch(trainer.datasets, trainer.config, 0))
        assert len(inputs.documents) == inputs.counted == counted


def test_slots_of_every_row(config: Config) -> None:
    trainer = Trainer(config())
    tasks = (
        TaskRows("up", "Go", False, (Pair("a", "1"), Pair("b", "2"), Pair("c", "3")), ((2,), (), (1, 0))),
        TaskRows("down", None, False, (Pair("d", "4"), Pair("e", "5")), ((1,), (0,))),
    )
    inputs = build_inputs(TrainingBatch(tasks), trainer.prompt, trainer.config)
    # Five queries and five positives.
    table = SlotTable(torch.cat([torch.arange(5.0), 10 + torch.arange(5.0)])[:, None], inputs.shown)
    slots = [table.take([row]).flatten().tolist() for row in range(5)]
    assert slots == [[2, 12], [], [1, 11, 0, 10], [4, 14], [3, 13]]
    assert table.take([3, 1, 0]).flatten().tolist() == [4, 14, 2, 12]
    assert [len(row.slots) for row in inputs.prompted] == [2, 0, 4, 2, 2]
    text = [trainer.prompt.tokenizer.decode(row.ids[row.pool_start :]) for row in inputs.prompted]
    assert text == [f" {letter}<eos>" for letter in "abcde"]
    # The same demonstrations as texts.
    task = TaskRows("up", "Go", False, (Pair("a", "1"), Pair("b", "2")), ((1,), ()))
    as_text = Trainer(config(strategy="text"))
    inputs = build_inputs(TrainingBatch((task,)), as_text.prompt, as_text.config)
    decoded = [trainer.prompt.tokenizer.decode(row.ids) for row in inputs.prompted]
    assert decoded == ["Instruct: Go\nQuery: b\nResponse: 2\nQuery: a<eos>", "Instruct: Go\nQuery: b<eos>"]
    assert not any(len(row.slots) for row in inputs.prompted)
    assert inputs.shown == [[], []]


def test_an_instruction_before_each_demonstration(config: Config) -> None:
    trainer = Trainer(config(demonstration_instructions="each"))
    _, inputs = trainer.prepare(sample_batch(trainer.datasets, trainer.config, 0))
    row, count = max(((row, len(row.slots) // 2) for row in inputs.prompted), key=lambda item: item[1])
    assert count > 0
    assert trainer.prompt.tokenizer.decode(row.ids).count("Instruct: Go") == count + 1


def test_symmetric_tasks_encode_both_sides_as_queries(config: Config) -> None:
    trainer = Trainer(config())
    rows = (Pair("cat", "cat"), Pair("dog", "dog"))
    for symmetric in (True, False):
        task = TaskRows("t", "Go", symmetric, rows, ((1,), (0,)))
        inputs = build_inputs(TrainingBatch((task,)), trainer.prompt, trainer.config)
        same = [list(row.ids) for row in inputs.queries] == [list(row.ids) for row in inputs.documents]
        assert same == symmetric


def test_a_bank_is_shown_to_all_rows_of_a_task(config: Config) -> None:
    trainer = Trainer(config(demonstration_source="bank", bank_size=4))
    banks = trainer.banks
    assert banks is not None
    trainer.encoder.backbone.eval()
    encoder = EpicEncoder(trainer.encoder.backbone, trainer.prompt)
    counts = set()
    for step in range(12):
        trainer.step = step
        value, inputs = trainer.prepare(sample_batch(trainer.datasets, trainer.config, step))
        shown = draw_bank_demonstrations(banks, value, trainer.config, step)
        counts |= {len(part) for part in shown}
        extra = sum(len(part) for part in shown)
        assert (len(inputs.queries), len(inputs.documents)) == (8 + extra, inputs.counted + extra)
        assert inputs.mask.shape == (8, inputs.counted)
        start = 0
        for task, part in zip(value.tasks, shown, strict=True):
            assert set(part) <= set(banks[task.name])
            assert len({tuple(inputs.shown[start + index]) for index in range(len(task.rows))}) == 1
            start += len(task.rows)
        if step < 4:
            # The vectors are those that the encoder gives with a bank.
            with torch.no_grad():
                table = torch.cat([trainer.forward(inputs.queries), trainer.forward(inputs.documents)])
                vectors = trainer.forward(inputs.prompted, SlotTable(table, inputs.shown)).numpy()
            expected = []
            for task, part in zip(value.tasks, shown, strict=True):
                bank = DemonstrationBank([(pair.query, pair.positive) for pair in part], instruction=task.instruction)
                queries = [row.query for row in task.rows]
                expected.append(encoder.encode_query(queries, bank=bank, num_demonstrations=len(part)))
            np.testing.assert_allclose(vectors, np.concatenate(expected), atol=1e-5)
    assert counts == {0, 1, 2, 3}


def test_chunks_do_not_change_vectors(config: Config) -> None:
    losses = []
    for tokens in (1, 40, 8192):
        trainer = Trainer(config(micro_batch_tokens=tokens))
        prepared = trainer.prepare(sample_batch(trainer.datasets, trainer.config, 0))
        losses.append(float(trainer.loss(*prepared).loss.detach()))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
