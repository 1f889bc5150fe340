"""Demonstrations from a fixed pool: `demonstration_source: bank`.

Each task's pool is a few of its rows, drawn once by the seed and taken out of the training pairs. A step encodes the
ones that it shows beside the batch and shows the same ones, in the same order, to all rows of the task: what a user
does with a bank. With `demonstration_source: batch` every row is shown other rows of the batch instead, at no cost.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from epic_rag.errors import DataError
from epic_rag.training.config import TrainingConfig
from epic_rag.training.data import Pair, PairDataset, TrainingBatch

__all__ = ["drawn_demonstrations", "take_banks"]


def take_banks(datasets: Sequence[PairDataset], config: TrainingConfig) -> dict[str, tuple[Pair, ...]]:
    """Take each task's pool out of its training rows.

    Rows that share a query, a positive or a group with one of the pool leave training too, because the pool would show
    their answer. In label-like tasks they stay, as do demonstrations with the row's own label there.

    Args:
        datasets: Loaded tasks; their `rows` shrink.
        config: Its seed decides which rows.

    Returns:
        Task -> its pool, `bank_size` rows.

    Raises:
        DataError: If fewer than two rows would be left to train on.
    """
    banks: dict[str, tuple[Pair, ...]] = {}
    for dataset in datasets:
        order = list(range(len(dataset.rows)))
        random.Random(f"{config.seed}-bank-{dataset.name}").shuffle(order)
        taken = set(order[: config.bank_size])
        bank = tuple(dataset.rows[index] for index in order[: config.bank_size])
        if not dataset.label_like:
            known = {key for row in bank for key in _keys(row)}
            taken |= {index for index, row in enumerate(dataset.rows) if not known.isdisjoint(_keys(row))}
        left = [row for index, row in enumerate(dataset.rows) if index not in taken]
        if len(left) < 2:
            raise DataError(
                f"{dataset.name} has {len(dataset.rows)} rows, of which a bank of {config.bank_size} leaves "
                f"{len(left)} for training, and in-batch negatives need at least 2; lower bank_size, add rows, or set "
                "demonstration_source to batch"
            )
        dataset.rows = left
        banks[dataset.name] = bank
    return banks


def drawn_demonstrations(
    banks: Mapping[str, Sequence[Pair]], batch: TrainingBatch, config: TrainingConfig, step: int
) -> list[tuple[Pair, ...]]:
    """What a step shows: for each task's part of the batch k ~ Uniform{0..K} rows of its pool.

    A function of configuration and step alone, as the batch is.
    """
    rng = random.Random(f"{config.seed}-{step}-bank")
    shown = []
    for task in batch.tasks:
        pool = banks[task.name]
        k = min(rng.randint(0, config.max_demonstrations), len(pool)) if config.strategy != "none" else 0
        shown.append(tuple(rng.sample(pool, k)))
    return shown


def _keys(row: Pair) -> list[tuple[str, str]]:
    keys = [("query", row.query), ("positive", row.positive)]
    return keys if row.group is None else [*keys, ("group", row.group)]
