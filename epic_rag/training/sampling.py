"""The batch of a step: which tasks, which rows, and which rows demonstrate for which.

A batch is a function of the configuration and the step's number, so a resumed run needs no state for it.

If instruction and query already say what is wanted, nothing in training makes demonstrations necessary. Five settings
leave it to them:

    generic_instruction, no_instruction    the instruction does not name the task
    tasks_per_batch                        other tasks' documents are among the negatives
    sources                                every manual is a task of its own, under one instruction
    turned_round                           passage -> query instead of query -> passage
    several_tasks                          the same queries under two tasks of one batch: query -> passage, and query ->
                                           the query in other words; each task's documents are the other's negatives

and `mismatched_demonstrations` gives a share of the rows wrong ones, which are to be read as if there were none: a
model that gains from any demonstrations alike does not read them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from epic_rag.training.config import TrainingConfig
from epic_rag.training.data import Pair, PairDataset, TaskRows, TrainingBatch

__all__ = ["allowed", "sample_batch"]

SAME_QUERY = "the same query"
"""What the second task of `several_tasks` is called, after its file's name."""
# Of the words of a query, in its other form.
_WORDS_LEFT_OUT = 0.2


def sample_batch(datasets: Sequence[PairDataset], config: TrainingConfig, step: int) -> TrainingBatch:
    """The batch of a step.

    Args:
        datasets: The mix.
        config: Sizes and shares.
        step: Number of the step, from 0.
    """
    rng = random.Random(f"{config.seed}-{step}")
    shares = [dataset.weight * len(dataset.rows) ** config.size_power for dataset in datasets]
    count = min(config.tasks_per_batch, len(datasets))
    chosen: list[PairDataset] = []
    while len(chosen) < count:
        pick = rng.choices(datasets, shares)[0]
        if pick not in chosen:
            chosen.append(pick)
    per_task = config.batch_size // count
    tasks: list[TaskRows] = []
    for dataset in chosen:
        if config.several_tasks and _asymmetric(dataset) and rng.random() < config.several_tasks:
            tasks.extend(_two_tasks(dataset, per_task // 2, config, rng))
            continue
        pools = _source_pools(dataset, config, rng) if dataset.sources else [dataset.rows]
        tasks.extend(_task_rows(dataset, pool, per_task // len(pools), config, rng) for pool in pools)
    if config.mismatched_demonstrations and config.strategy != "none":
        tasks = _with_mismatched(tasks, config, rng)
    return TrainingBatch(tuple(tasks))


def allowed(rows: Sequence[Pair], index: int, label_like: bool) -> list[int]:
    """Rows that may demonstrate for a row.

    Never itself, and never a row with the same positive or group, which would show the answer. Label-like tasks are
    the exception: there, a rule "never the same label" would make the answer the one label that is *not* shown, and
    showing examples of the right label among others is what such demonstrations are for.
    """
    own = rows[index]
    return [
        other
        for other, row in enumerate(rows)
        if other != index
        and row.query != own.query
        and (label_like or (row.positive != own.positive and (row.group is None or row.group != own.group)))
    ]


def _asymmetric(dataset: PairDataset) -> bool:
    """Whether queries and positives are two kinds of text, so that a pair can be turned round or asked otherwise."""
    return not dataset.symmetric and not dataset.label_like


def _source_pools(dataset: PairDataset, config: TrainingConfig, rng: random.Random) -> list[list[Pair]]:
    """Rows of a few sources, each to be a task of its own.

    The instruction is the same for all, so that which source a query belongs to has to be read from the
    demonstrations: they come from its source, and the other sources' documents are negatives.
    """
    names = list(dataset.by_source)
    shares = [len(dataset.by_source[name]) ** config.size_power for name in names]
    picked: list[str] = []
    while len(picked) < min(dataset.sources, len(names)):
        name = rng.choices(names, shares)[0]
        if name not in picked:
            picked.append(name)
    return [dataset.by_source[name] for name in picked]


def _task_rows(
    dataset: PairDataset, pool: Sequence[Pair], size: int, config: TrainingConfig, rng: random.Random
) -> TaskRows:
    rows = tuple(rng.sample(pool, min(size, len(pool))))
    # Turned round, a pair is another task over the same texts; nothing but demonstrations says which of the two.
    turned = config.turned_round > 0 and _asymmetric(dataset) and rng.random() < config.turned_round
    if turned:
        rows = tuple(Pair(row.positive, row.query, group=row.group, source=row.source) for row in rows)
    draw = rng.random()
    instruction = dataset.instruction
    if turned:
        # The task's instruction would be wrong; a share stays without any, as elsewhere.
        instruction = None if draw < config.no_instruction else rng.choice(config.generic_instructions)
    elif draw < config.generic_instruction:
        instruction = rng.choice(config.generic_instructions)
    elif draw < config.generic_instruction + config.no_instruction:
        instruction = None
    return TaskRows(dataset.name, instruction, dataset.symmetric, rows, _drawn(rows, dataset.label_like, config, rng))


def _two_tasks(dataset: PairDataset, size: int, config: TrainingConfig, rng: random.Random) -> list[TaskRows]:
    """The same queries under two tasks and one instruction, which names neither."""
    drawn = rng.sample(dataset.rows, min(size, len(dataset.rows)))
    answers = tuple(drawn)
    alike = tuple(Pair(row.query, _in_other_words(row.query, rng), source=row.source) for row in drawn)
    bare = rng.random() < config.no_instruction
    instruction = None if bare else rng.choice(config.generic_instructions)
    return [
        TaskRows(name, instruction, False, rows, _drawn(rows, False, config, rng))
        for name, rows in ((dataset.name, answers), (f"{dataset.name}: {SAME_QUERY}", alike))
    ]


def _in_other_words(query: str, rng: random.Random) -> str:
    """A query with some of its words left out and, half of the time, in lower case: a cheap paraphrase."""
    words = query.split()
    kept = [word for word in words if len(words) < 3 or rng.random() >= _WORDS_LEFT_OUT] or words
    text = " ".join(kept)
    return text.lower() if rng.random() < 0.5 else text


def _drawn(
    rows: Sequence[Pair], label_like: bool, config: TrainingConfig, rng: random.Random
) -> tuple[tuple[int, ...], ...]:
    """For each row k ~ Uniform{0..K} demonstrations (EPIC, arXiv 2605.01372, section 3)."""
    demonstrations = []
    for index in range(len(rows)):
        others = allowed(rows, index, label_like)
        k = min(rng.randint(0, config.max_demonstrations), len(others)) if config.strategy != "none" else 0
        demonstrations.append(tuple(rng.sample(others, k)))
    return tuple(demonstrations)


def _with_mismatched(tasks: Sequence[TaskRows], config: TrainingConfig, rng: random.Random) -> list[TaskRows]:
    """Give a share of the rows wrong demonstrations, as many as they had right ones.

    Half of them are shuffled (the row's own demonstrations, each query with another one's passage), half are another
    task's, where the batch has one.
    """
    starts = [sum(len(task.rows) for task in tasks[:number]) for number in range(len(tasks))]
    result = []
    for number, task in enumerate(tasks):
        foreign = [
            starts[other] + row
            for other in range(len(tasks))
            if other != number
            for row in range(len(tasks[other].rows))
        ]
        wrong: list[tuple[tuple[int, int], ...]] = []
        for shown in task.demonstrations:
            if not shown or rng.random() >= config.mismatched_demonstrations:
                wrong.append(())
            elif foreign and (len(shown) < 2 or rng.random() < 0.5):
                wrong.append(tuple((at, at) for at in rng.sample(foreign, min(len(shown), len(foreign)))))
            else:
                wrong.append(_shuffled(task, starts[number], shown))
        result.append(replace(task, mismatched=tuple(wrong)))
    return result


def _shuffled(task: TaskRows, start: int, shown: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Each demonstration's query with the passage of the next; nothing where that would leave a right pair."""
    pairs = [(one, shown[(number + 1) % len(shown)]) for number, one in enumerate(shown)]
    if any(task.rows[query].positive == task.rows[passage].positive for query, passage in pairs):
        return ()
    return tuple((start + query, start + passage) for query, passage in pairs)
