"""Rows of (query, positive) pairs: reading a file of them, which rows belong together, drawing demonstrations."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from epic_rag.demonstrations import Demonstration
from epic_rag.errors import DataError
from epic_rag.evaluation.files import read_jsonl
from epic_rag.evaluation.prompts import normalised

__all__ = ["Pair", "draw_demonstrations", "file_stem", "load_pairs", "mismatch", "passage_key", "with_components"]


@dataclass(frozen=True)
class Pair:
    """A row of a pairs file.

    Args:
        query: The query.
        passage: Its positive.
        group: Rows with the same group are each other's positives; None for a row of its own.
        component: Number of the rows that this one shares anything with; set by `load_pairs`.
    """

    query: str
    passage: str
    group: str | None = None
    component: int = -1


def file_stem(path: Path) -> str:
    """Return a file's name without `.jsonl` and `.gz`."""
    name = path.name
    for ending in (".gz", ".jsonl"):
        name = name.removesuffix(ending)
    return name


def passage_key(text: str) -> str:
    """A passage without regard to spacing, for asking whether two passages are the same one."""
    return " ".join(text.split())  # case says something in a command, spacing does not


def load_pairs(path: Path) -> list[Pair]:
    """Read a pairs file: {"query", "positive" (or "passage"), "group"?} a line.

    Returns:
        The rows in order, with their components.

    Raises:
        DataError: The file is missing or a line is malformed.
    """
    rows: list[tuple[str, str, str | None]] = []
    for row in read_jsonl(path):
        group = row.values.get("group")
        query, passage = row.text("query"), row.text("passage" if "passage" in row.values else "positive")
        if not (query.strip() and passage.strip()):
            raise row.error('"query" and "positive" may not be empty; correct this line')
        rows.append((query, passage, None if group is None else str(group)))
    return with_components(rows)


def with_components(rows: Sequence[tuple[str, str, str | None]]) -> list[Pair]:
    """Turn (query, passage, group) rows into pairs with the numbers of their components.

    Rows that share a query, a passage or a group, directly or through other rows, form a component.
    """
    return [
        Pair(query, passage, group, component)
        for (query, passage, group), component in zip(rows, _components(rows), strict=True)
    ]


def _components(rows: Sequence[tuple[str, str, str | None]]) -> list[int]:
    """Number the connected components of rows that share a query, a passage or a group."""
    parent = list(range(len(rows)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first_with: dict[Hashable, int] = {}
    for number, (query, passage, group) in enumerate(rows):
        keys: list[Hashable] = [("query", normalised(query)), ("passage", passage_key(passage))]
        if group is not None:
            keys.append(("group", group))
        for key in keys:
            parent[root(number)] = root(first_with.setdefault(key, number))
    return [root(number) for number in range(len(rows))]


def draw_demonstrations(pool: Sequence[Pair], k: int, *, seed: int) -> list[Pair]:
    """Draw k rows, as different from each other as the pool allows; a smaller k is a prefix of a larger one.

    Raises:
        DataError: The pool has fewer than k rows.
    """
    if k > len(pool):
        raise DataError(
            f"{k} demonstrations were asked, {len(pool)} rows are free for them; lower --num-demonstrations"
        )
    rng = random.Random(seed)
    order = rng.sample(range(len(pool)), len(pool))
    # Rows of new components first, then rows of new passages, then the rest.
    chosen: dict[int, None] = {}
    components: set[int] = set()
    for row in order:
        if pool[row].component not in components:
            components.add(pool[row].component)
            chosen[row] = None
    passages = {passage_key(pool[row].passage) for row in chosen}
    for row in order:
        if len(chosen) >= k:
            break
        if passage_key(pool[row].passage) not in passages:
            passages.add(passage_key(pool[row].passage))
            chosen[row] = None
    chosen.update(dict.fromkeys(order))
    return [pool[row] for row in list(chosen)[:k]]


def mismatch(demonstrations: Sequence[Pair], pool: Sequence[Pair], *, seed: int) -> list[Demonstration] | None:
    """Give each demonstration's query the passage of another one, of another component, so that it is wrong.

    Passages come from the demonstrations themselves where they can (the same vectors, paired wrongly),
    otherwise from the pool.

    Returns:
        The wrong demonstrations, or None if the pool has no passage that is wrong for one of them.
    """
    rng = random.Random(seed)
    spare = [pool[row] for row in rng.sample(range(len(pool)), len(pool))]
    wrong: list[Demonstration] = []
    used: set[int] = set()
    for number, pair in enumerate(demonstrations):
        others = [*demonstrations[number + 1 :], *demonstrations[:number], *spare]
        fitting = [other for other in others if other.component != pair.component]
        if not fitting:
            return None
        passage = next((other for other in fitting if id(other) not in used), fitting[0])
        used.add(id(passage))
        wrong.append(Demonstration(pair.query, passage.passage))
    return wrong
