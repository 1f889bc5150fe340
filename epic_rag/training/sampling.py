"""The batch of a step: its tasks, its rows, and which rows demonstrate for which.

A batch is a function of the configuration and the step's number, so a resumed run needs no state for it.

Where instruction and query already determine the answer, training teaches the model to ignore demonstrations. Four
settings leave something to them: `generic_instruction_p` and `drop_instruction_p` (the instruction does not name the
task), `tasks_per_batch` (other tasks' documents are among the negatives) and `sources_per_batch` (each manual is a
task under one instruction). With `neighbours`, rows come in groups that share words, so that a batch has hard negatives
without mining.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from epic_rag.training.config import TrainingConfig
from epic_rag.training.data import Pair, PairDataset, TaskRows, TrainingBatch

__all__ = ["allowed_demonstrations", "sample_batch"]


def sample_batch(datasets: Sequence[PairDataset], config: TrainingConfig, step: int) -> TrainingBatch:
    """Draw the batch of a step.

    Args:
        datasets: The mix.
        config: Sizes and probabilities.
        step: Number of the step, from 0.
    """
    rng = random.Random(f"{config.seed}-{step}")
    shares = [dataset.weight * len(dataset.rows) ** config.sampling_alpha for dataset in datasets]
    count = min(config.tasks_per_batch, len(datasets))
    chosen: list[PairDataset] = []
    while len(chosen) < count:
        pick = rng.choices(datasets, shares)[0]
        if pick not in chosen:
            chosen.append(pick)
    per_task = config.batch_size // count
    tasks: list[TaskRows] = []
    for dataset in chosen:
        sources = _draw_sources(dataset, config, rng) if dataset.sources_per_batch else [None]
        for source in sources:
            rows = _draw_rows(dataset, source, per_task // len(sources), rng)
            tasks.append(_task_rows(dataset, rows, config, rng))
    return TrainingBatch(tuple(tasks))


def allowed_demonstrations(rows: Sequence[Pair], index: int, label_like: bool) -> list[int]:
    """Return the positions of the rows that may demonstrate for a row.

    Never the row itself, nor a row with the same query, positive or group, which would show the answer. Label-like
    tasks allow the same label: if it were excluded, the answer would be the one label that is *not* shown.
    """
    target = rows[index]
    return [
        other
        for other, row in enumerate(rows)
        if other != index
        and row.query != target.query
        and (label_like or (row.positive != target.positive and (row.group is None or row.group != target.group)))
    ]


def _draw_sources(dataset: PairDataset, config: TrainingConfig, rng: random.Random) -> list[str | None]:
    """Draw a few sources, each to be a task: demonstrations come from it, the other sources give negatives."""
    names = list(dataset.by_source)
    shares = [len(dataset.by_source[name]) ** config.sampling_alpha for name in names]
    picked: list[str | None] = []
    while len(picked) < min(dataset.sources_per_batch, len(names)):
        name = rng.choices(names, shares)[0]
        if name not in picked:
            picked.append(name)
    return picked


def _draw_rows(dataset: PairDataset, source: str | None, size: int, rng: random.Random) -> list[Pair]:
    """Draw rows of a source, or of the whole file: single ones, or groups of neighbours if there are any."""
    pool = dataset.rows if source is None else dataset.by_source[source]
    groups = dataset.groups.get(source)
    if groups is None:
        return rng.sample(pool, min(size, len(pool)))
    rows: list[Pair] = []
    for group in rng.sample(groups, len(groups)):
        rows.extend(group)
        if len(rows) >= size:
            break
    return rows[:size]


def _task_rows(dataset: PairDataset, rows: Sequence[Pair], config: TrainingConfig, rng: random.Random) -> TaskRows:
    draw = rng.random()
    instruction = dataset.instruction
    if draw < config.generic_instruction_p:
        instruction = rng.choice(config.generic_instructions)
    elif draw < config.generic_instruction_p + config.drop_instruction_p:
        instruction = None
    demonstrations = []
    for index in range(len(rows)):
        others = allowed_demonstrations(rows, index, dataset.label_like)
        # EPIC: k ~ Uniform{0..K}
        k = min(rng.randint(0, config.max_demonstrations), len(others)) if config.strategy != "none" else 0
        demonstrations.append(tuple(rng.sample(others, k)))
    return TaskRows(dataset.name, instruction, dataset.symmetric, tuple(rows), tuple(demonstrations))
