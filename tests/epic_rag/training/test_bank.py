"""Demonstrations from a fixed pool, and an instruction before each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.errors import DataError
from epic_rag.training import PairDataset, Trainer, TrainingConfig
from epic_rag.training.data import Pair, drawn_demonstrations, take_banks
from epic_rag.training.inputs import SlotTable
from epic_rag.training.sampling import sample_batch

Config = Callable[..., TrainingConfig]


def banked(config: Config, **changes: object) -> Trainer:
    return Trainer(config(demonstration_source="bank", bank_size=4, **changes))


def test_a_pool_is_not_trained_on(config: Config) -> None:
    trainer = banked(config)
    assert trainer.banks is not None
    for dataset in trainer.datasets:
        pool = trainer.banks[dataset.name]
        assert len(pool) == 4
        assert len(dataset.rows) == 12
        assert not set(pool) & set(dataset.rows)
    assert banked(config).banks == trainer.banks
    assert banked(config, seed=1).banks != trainer.banks


def test_rows_that_the_pool_would_answer_leave_too(config: Config) -> None:
    run = config(demonstration_source="bank", bank_size=3, max_demonstrations=2)
    rows = [Pair(f"q{n}", f"p{n // 2}", group=str(n // 4)) for n in range(24)]
    dataset = PairDataset("t", rows)
    pool = take_banks([dataset], run)["t"]
    assert len(pool) == 3
    assert {row.group for row in pool}.isdisjoint(row.group for row in dataset.rows)
    # Where rows share a few labels, others with the pool's labels stay.
    rows = [Pair(f"q{n}", "yes" if n % 2 else "no") for n in range(40)]
    dataset = PairDataset("t", rows)
    assert dataset.label_like
    take_banks([dataset], run)
    assert len(dataset.rows) == 37


def test_too_few_rows_are_left(config: Config) -> None:
    with pytest.raises(DataError, match=r"up has 16 rows, of which a bank of 15 leaves 1 for training.*; lower"):
        Trainer(config(demonstration_source="bank", bank_size=15))


def test_a_step_shows_all_rows_of_a_task_the_same(config: Config) -> None:
    trainer = banked(config)
    assert trainer.banks is not None
    counts = set()
    for step in range(12):
        trainer.step = step
        batch, inputs = trainer.prepare(sample_batch(trainer.datasets, trainer.config, step))
        shown = drawn_demonstrations(trainer.banks, batch, trainer.config, step)
        counts |= {len(part) for part in shown}
        extra = sum(len(part) for part in shown)
        assert (len(inputs.queries), len(inputs.documents)) == (8 + extra, inputs.counted + extra)
        assert inputs.mask.shape == (8, inputs.counted)
        start = 0
        for task, part in zip(batch.tasks, shown, strict=True):
            assert set(part) <= set(trainer.banks[task.name])
            assert len({tuple(inputs.shown[start + index]) for index in range(len(task.rows))}) == 1
            start += len(task.rows)
    assert counts == {0, 1, 2, 3}


def test_what_is_shown_is_what_a_bank_shows(config: Config) -> None:
    trainer = banked(config)
    assert trainer.banks is not None
    trainer.encoder.backbone.eval()
    encoder = EpicEncoder(trainer.encoder.backbone, trainer.prompt)
    for step in range(4):
        trainer.step = step
        batch, inputs = trainer.prepare(sample_batch(trainer.datasets, trainer.config, step))
        with torch.no_grad():
            table = torch.cat([trainer.forward(inputs.queries), trainer.forward(inputs.documents)])
            vectors = trainer.forward(inputs.prompted, SlotTable(table, inputs.shown)).numpy()
        expected = []
        for task, part in zip(
            batch.tasks, drawn_demonstrations(trainer.banks, batch, trainer.config, step), strict=True
        ):
            bank = DemonstrationBank([(pair.query, pair.positive) for pair in part], instruction=task.instruction)
            expected.append(encoder.encode_query([row.query for row in task.rows], bank=bank))
        np.testing.assert_allclose(vectors, np.concatenate(expected), atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"strategy": "text"}, {"strategy": "none"}])
def test_a_run_with_a_bank(config: Config, changes: dict[str, str]) -> None:
    trainer = banked(config, evaluation_tasks=["up"], evaluation_rows=4, evaluate_every=3, steps=3, **changes)
    trainer.train(show_progress=False)
    assert set(trainer.metrics[-1]["evaluation"]["up"]) == {"k=0", "k=8"}


def test_an_instruction_for_each(config: Config, tmp_path: Path) -> None:
    trainer = Trainer(config(demonstration_instructions="each", steps=1))
    _, inputs = trainer.prepare(sample_batch(trainer.datasets, trainer.config, 0))
    row, count = max(((row, len(row.slots) // 2) for row in inputs.prompted), key=lambda item: item[1])
    assert count > 0
    assert trainer.prompt.tokenizer.decode(row.ids).count("Instruct: Go") == count + 1
    final = trainer.train(show_progress=False)
    assert json.loads((final / "epic.json").read_text())["template"]["demonstration_instructions"] == "each"
    loaded = EpicEncoder.from_pretrained(final)
    assert loaded.prompt.template.demonstration_instructions == "each"
    shared = Trainer(config(steps=1, output=str(tmp_path / "shared"))).train(show_progress=False)
    assert "demonstration_instructions" not in json.loads((shared / "epic.json").read_text())["template"]
