"""Training data: files of pairs, tasks with held-out rows, batches, and banks of demonstrations.

A file is JSON lines of {"query", "positive", "negatives"?, "group"?, "source"?}, gzipped or not, one file a task.
"passage" is accepted for "positive", as in a bank's file. Rows with the same group or positive are not negatives of
each other. `sampling` draws a step's batch from the datasets.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epic_rag.errors import DataError
from epic_rag.files import describe_os_error, read_jsonl
from epic_rag.training.config import TrainingConfig

__all__ = [
    "Pair",
    "PairDataset",
    "TaskRows",
    "TrainingBatch",
    "draw_bank_demonstrations",
    "load_datasets",
    "load_instructions",
    "load_pairs",
    "split_off_banks",
]

# A smaller source would show the same demonstrations again and again.
_SOURCE_ROWS = 32


@dataclass(frozen=True)
class Pair:
    """One training row."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    group: str | None = None
    source: str | None = None


@dataclass
class PairDataset:
    """The rows of one task.

    Attributes:
        name: Name of the task.
        rows: Training rows.
        instruction: Instruction of the task's queries.
        symmetric: True if positives are encoded like queries.
        weight: Multiplies the task's share of the mix.
        held_out: Rows that are kept for evaluation, never trained on.
        label_like: True if many rows share a few targets (labels, topics). See `sampling.allowed_demonstrations`.
        sha256: Hash of the file, for the training record.
        sources_per_batch: Number of sources that share a task's part of a step; 0 draws its rows together.
        by_source: Rows of each source with at least 32 of them; filled by `load_datasets`.
        distractors: Rows whose positives are ranked with the held-out ones; None for training rows.
        groups: Groups of neighbouring rows, by source (None for the whole file); filled by `neighbours.group_rows`.
    """

    name: str
    rows: list[Pair]
    instruction: str | None = None
    symmetric: bool = False
    weight: float = 1.0
    held_out: list[Pair] = field(default_factory=list)
    sha256: str = ""
    sources_per_batch: int = 0
    by_source: dict[str, list[Pair]] = field(default_factory=dict)
    distractors: list[Pair] | None = None
    groups: dict[str | None, list[list[Pair]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        targets = {row.positive if row.group is None else row.group for row in [*self.rows, *self.held_out]}
        self.label_like = len(targets) * 10 <= len(self.rows)


@dataclass(frozen=True)
class TaskRows:
    """One task's part of a batch.

    Attributes:
        name: Name of the task.
        instruction: The instruction of these rows; None for none.
        symmetric: True if positives are encoded like queries.
        rows: The pairs.
        demonstrations: For each row, positions (within `rows`) of its demonstrations.
    """

    name: str
    instruction: str | None
    symmetric: bool
    rows: tuple[Pair, ...]
    demonstrations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TrainingBatch:
    """The tasks of one step."""

    tasks: tuple[TaskRows, ...]

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return sum(len(task.rows) for task in self.tasks)


def load_pairs(path: Path) -> tuple[list[Pair], str]:
    """Read a file of pairs.

    Returns:
        The pairs and the SHA-256 of the file.

    Raises:
        DataError: If the file is missing or a line is malformed; names file and line.
    """
    pairs = [_parse(row, f"{path}:{number}") for number, row in read_jsonl(path)]
    if not pairs:
        raise DataError(f'{path} has no rows. Each line is {{"query": "...", "positive": "..."}}.')
    return pairs, hashlib.sha256(path.read_bytes()).hexdigest()


def _parse(row: Mapping[str, Any], place: str) -> Pair:
    query, positive = row.get("query"), row.get("positive", row.get("passage"))
    negatives = row.get("negatives") or []
    # A string would pass for a sequence of one-letter texts.
    if not isinstance(negatives, list):
        raise DataError(f'{place} has "negatives" that are not a list. Write {{"negatives": ["..."]}}.')
    for name, text in (("query", query), ("positive", positive), *(("negatives", text) for text in negatives)):
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f'{place} has no text for "{name}". Each line is {{"query": "...", "positive": "..."}}: correct or '
                "delete it."
            )
        try:
            # JSON can spell half of a surrogate pair, which tokenizers reject.
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f'{place} has a "{name}" that is not valid Unicode. Correct or delete the line.') from error
    group, source = (None if row.get(name) is None else str(row[name]) for name in ("group", "source"))
    return Pair(str(query), str(positive), tuple(negatives), group, source)


def load_datasets(config: TrainingConfig) -> tuple[list[PairDataset], list[PairDataset]]:
    """Load the mix and the evaluation tasks.

    Held-out rows are the first `evaluation_rows` queries of a shuffle by task name. Every row that shares a positive
    or a group with one of them leaves training too, except in label-like tasks, where all rows do. In a task with
    `held_out_sources`, all rows of these sources leave training, and the held-out rows are drawn from them.

    Returns:
        Training datasets; evaluation datasets (those with held-out rows). A task in both is the same object.

    Raises:
        DataError: If a file is missing or malformed, has too few rows to train on, or lacks hard negatives that its
            task needs.
    """
    folder = Path(config.data)
    instructions = load_instructions(folder)
    loaded: dict[str, PairDataset] = {}
    for name in dict.fromkeys([*config.tasks, *config.evaluation_tasks]):
        task = config.tasks.get(name)
        rows, digest = load_pairs(_find(folder, name))
        dataset = PairDataset(
            name=name,
            rows=rows,
            instruction=(task.instruction if task else None) or instructions.get(name, config.default_instruction),
            symmetric=task.symmetric if task else False,
            weight=task.weight if task else 0.0,
            sha256=digest,
            sources_per_batch=task.sources_per_batch if task else 0,
        )
        new = task.held_out_sources if task else ()
        if new:
            dataset.distractors = [row for row in rows if row.source in new]
            dataset.rows = [row for row in rows if row.source not in new]
        if name in config.evaluation_tasks and config.evaluation_rows:
            _hold_out(dataset, config.evaluation_rows)
        if task and task.max_rows is not None and task.max_rows < len(dataset.rows):
            dataset.rows = random.Random(f"{config.seed}-rows-{name}").sample(dataset.rows, task.max_rows)
        if task and len(dataset.rows) < 2:
            raise DataError(
                f"{name} has {len(rows)} rows, of which {len(dataset.rows)} are left for training beside "
                f"{len(dataset.held_out)} held-out ones. In-batch negatives need at least 2: add rows, or remove it "
                "from evaluation_tasks."
            )
        if task and not task.in_batch_negatives:
            _require_hard_negatives(dataset)
        if dataset.sources_per_batch:
            _group_by_source(dataset)
        loaded[name] = dataset
    evaluated = [loaded[name] for name in config.evaluation_tasks]
    return [loaded[name] for name in config.tasks], [dataset for dataset in evaluated if dataset.held_out]


def load_instructions(folder: Path) -> dict[str, str]:
    """Read `instructions.json` of a data folder (task -> instruction); an empty mapping if there is none.

    Raises:
        DataError: If the file is malformed.
    """
    file = folder / "instructions.json"
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except PermissionError as error:
        raise DataError(f"{describe_os_error(error)}. Make it readable or move it elsewhere.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not valid JSON ({error}). Correct it.") from error
    if not isinstance(data, dict):
        raise DataError(f'{file} holds a {type(data).__name__}. Write {{"task": "instruction", ...}}.')
    return {str(key): str(value) for key, value in data.items()}


def _find(folder: Path, name: str) -> Path:
    for suffix in (".jsonl.gz", ".jsonl"):
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    there = sorted(file.name.split(".")[0] for file in folder.glob("*.jsonl*")) if folder.is_dir() else []
    raise DataError(
        f"No file {name}.jsonl or {name}.jsonl.gz in {folder}, which has {', '.join(there) or 'none'}. "
        "Check `tasks` and `data` of the configuration."
    )


def _hold_out(dataset: PairDataset, count: int) -> None:
    if dataset.distractors is not None:
        rows = random.Random(f"held-out-{dataset.name}").sample(dataset.distractors, len(dataset.distractors))
        dataset.held_out, dataset.distractors = rows[:count], rows[count:]
        return
    order = list(range(len(dataset.rows)))
    random.Random(f"held-out-{dataset.name}").shuffle(order)
    held = order[: min(count, len(order) // 2)]
    dataset.held_out = [dataset.rows[row] for row in held]
    removed = set(held)
    if not dataset.label_like:
        positives = {row.positive for row in dataset.held_out}
        groups = {row.group for row in dataset.held_out if row.group is not None}
        removed |= {index for index, row in enumerate(dataset.rows) if row.positive in positives or row.group in groups}
    dataset.rows = [row for index, row in enumerate(dataset.rows) if index not in removed]


def _require_hard_negatives(dataset: PairDataset) -> None:
    without = sum(not row.negatives for row in dataset.rows)
    if without:
        raise DataError(
            f"{dataset.name} has {len(dataset.rows)} rows, {without} of them without hard negatives, and its "
            'in_batch_negatives is false. Give each row "negatives", or set in_batch_negatives to true.'
        )


def _group_by_source(dataset: PairDataset) -> None:
    groups: dict[str, list[Pair]] = {}
    for row in dataset.rows:
        if row.source is not None:
            groups.setdefault(row.source, []).append(row)
    dataset.by_source = {name: rows for name, rows in sorted(groups.items()) if len(rows) >= _SOURCE_ROWS}
    if len(dataset.by_source) < dataset.sources_per_batch:
        raise DataError(
            f"{dataset.name} has {len(dataset.by_source)} sources of {_SOURCE_ROWS} rows or more, and "
            f'sources_per_batch is {dataset.sources_per_batch}. Give its rows a "source", or lower sources_per_batch.'
        )


def split_off_banks(datasets: Sequence[PairDataset], config: TrainingConfig) -> dict[str, tuple[Pair, ...]]:
    """Take a bank of demonstrations out of each task's training rows, for `demonstration_source: bank`.

    Rows that share a query, a positive or a group with one of the bank leave training too, because the bank would
    show their answer. In label-like tasks they stay, as do demonstrations with the row's own label there.

    Args:
        datasets: Loaded tasks; their `rows` shrink.
        config: Its seed decides the rows.

    Returns:
        Task -> its bank, `bank_size` rows.

    Raises:
        DataError: If fewer than two rows would be left to train on.
    """
    banks: dict[str, tuple[Pair, ...]] = {}
    for dataset in datasets:
        order = list(range(len(dataset.rows)))
        random.Random(f"{config.seed}-bank-{dataset.name}").shuffle(order)
        removed = set(order[: config.bank_size])
        bank = tuple(dataset.rows[index] for index in order[: config.bank_size])
        if not dataset.label_like:
            known = {key for row in bank for key in _keys(row)}
            removed |= {index for index, row in enumerate(dataset.rows) if not known.isdisjoint(_keys(row))}
        left = [row for index, row in enumerate(dataset.rows) if index not in removed]
        if len(left) < 2:
            raise DataError(
                f"{dataset.name} has {len(dataset.rows)} rows, of which a bank of {config.bank_size} leaves "
                f"{len(left)} for training. In-batch negatives need at least 2: lower bank_size, add rows, or set "
                "demonstration_source to batch."
            )
        dataset.rows = left
        banks[dataset.name] = bank
    return banks


def _keys(row: Pair) -> list[tuple[str, str]]:
    keys = [("query", row.query), ("positive", row.positive)]
    return keys if row.group is None else [*keys, ("group", row.group)]


def draw_bank_demonstrations(
    banks: Mapping[str, Sequence[Pair]], batch: TrainingBatch, config: TrainingConfig, step: int
) -> list[tuple[Pair, ...]]:
    """Draw a step's demonstrations from the banks: for each task of the batch k ~ Uniform{0..K} rows.

    A function of configuration and step alone, as the batch is.
    """
    rng = random.Random(f"{config.seed}-{step}-bank")
    drawn = []
    for task in batch.tasks:
        bank = banks[task.name]
        k = min(rng.randint(0, config.max_demonstrations), len(bank)) if config.strategy != "none" else 0
        drawn.append(tuple(rng.sample(bank, k)))
    return drawn
