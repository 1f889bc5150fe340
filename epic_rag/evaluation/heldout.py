"""Test queries, a corpus and demonstrations from one file of training pairs that a model has not seen.

The evaluation sets have no demonstrations of their own; a file of (query, positive) pairs has both. It is
split by *components*: rows that share a group, a query or a positive, directly or through other rows, belong
together. Some components give demonstrations, the others give test queries, so a demonstration shares nothing
with any test query.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from epic_rag.demonstrations import Demonstration
from epic_rag.errors import ConfigError, DataError
from epic_rag.evaluation.files import content_revision, read_jsonl, read_mapping
from epic_rag.evaluation.prompts import normalised

__all__ = ["HeldoutSplit", "Pair", "draw_demonstrations", "file_stem", "load_pairs", "make_split", "mismatch"]

logger = logging.getLogger(__name__)

GENERIC_INSTRUCTION = "Given a query, retrieve what belongs to it"
"""For a file that comes without an instruction."""
_DEMONSTRATION_SHARE = 0.25


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


@dataclass(frozen=True)
class HeldoutSplit:
    """A retrieval test made of a pairs file, and the rows that demonstrations are drawn from.

    Args:
        name: The file's name without its endings.
        instruction: The task in words.
        revision: A hash of the file.
        queries: Test queries, all different.
        documents: The corpus, all different.
        relevant: For each query the corpus rows that answer it.
        excluded: For each query the corpus row that is the query itself (and would come first), or None.
        pool: Rows that share nothing with a test query.
        symmetric: Whether documents are encoded like queries.
    """

    name: str
    instruction: str
    revision: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    relevant: tuple[tuple[int, ...], ...]
    excluded: tuple[int | None, ...]
    pool: tuple[Pair, ...]
    symmetric: bool = False


def file_stem(path: Path) -> str:
    """Return a file's name without `.jsonl` and `.gz`."""
    name = path.name
    for ending in (".gz", ".jsonl"):
        name = name.removesuffix(ending)
    return name


def _passage_key(text: str) -> str:
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
        keys: list[Hashable] = [("query", normalised(query)), ("passage", _passage_key(passage))]
        if group is not None:
            keys.append(("group", group))
        for key in keys:
            parent[root(number)] = root(first_with.setdefault(key, number))
    return [root(number) for number in range(len(rows))]


def make_split(
    path: Path,
    *,
    queries: int = 1000,
    documents: int = 5000,
    seed: int = 0,
    instruction: str | None = None,
    symmetric: bool = False,
) -> HeldoutSplit:
    """Split a pairs file into test queries, a corpus and a pool of demonstrations.

    A quarter of the components goes to the pool. Test queries are drawn from the rest; the corpus is made of
    their positives, then of other rows' up to `documents`, and is never cut below the positives.

    Args:
        path: The file.
        queries: Test queries wanted; fewer if the file has not so many.
        documents: Documents wanted in the corpus; fewer if the file has not so many.
        seed: Of everything that is drawn.
        instruction: The task in words; None takes it from `instructions.json` beside the file, or a generic
            one where there is no such file.
        symmetric: Whether documents are encoded like queries.

    Raises:
        ConfigError: `queries` or `documents` is below 1.
        DataError: The file is malformed, `instructions.json` lacks it, or all its rows share something with each
            other.
    """
    if queries < 1 or documents < 1:
        raise ConfigError(f"{queries} test queries and {documents} documents were asked; ask for 1 or more of each")
    name = file_stem(path)
    if instruction is None:
        instruction = _instruction_beside(path, name)
    pairs = load_pairs(path)
    components = sorted({pair.component for pair in pairs})
    if len(components) < 2:
        raise DataError(
            f"{path} has {len(pairs)} rows that all share a query, a positive or a group with each other, so "
            "no demonstration could be kept apart from the test queries; use another file"
        )
    rng = random.Random(seed)
    rng.shuffle(components)
    for_pool = set(components[: math.ceil(len(components) * _DEMONSTRATION_SHARE)])
    pool = [pair for pair in pairs if pair.component in for_pool]
    rest = [pair for pair in pairs if pair.component not in for_pool]
    rng.shuffle(pool)
    rng.shuffle(rest)
    test = _test_rows(rest, queries)
    if not test:
        raise DataError(f"{path} has no row whose query differs from its positive outside the pool; use another file")
    if len(test) < queries:
        logger.info("%s has %d test queries, %d were asked for", name, len(test), queries)
    rows, texts = _corpus(test, rest, documents)
    relevant = _relevant(test, rest, rows)
    by_text = {normalised(text): row for row, text in enumerate(texts)}
    excluded = [by_text.get(normalised(pair.query)) for pair in test]
    return HeldoutSplit(
        name=name,
        instruction=instruction,
        revision=content_revision([path]),
        queries=tuple(pair.query for pair in test),
        documents=tuple(texts),
        relevant=tuple(tuple(sorted(found - {skip})) for found, skip in zip(relevant, excluded, strict=True)),
        excluded=tuple(excluded),
        pool=tuple(pool),
        symmetric=symmetric,
    )


def _instruction_beside(path: Path, name: str) -> str:
    beside = path.parent / "instructions.json"
    if not beside.is_file():
        logger.warning(
            'there is no %s, so the queries get "%s"; --instructions FILE.json gives others',
            beside,
            GENERIC_INSTRUCTION,
        )
        return GENERIC_INSTRUCTION
    instructions = read_mapping(beside)
    if name not in instructions:
        raise DataError(
            f'{beside} has no instruction for "{name}", it has {", ".join(sorted(instructions))}; '
            "add one, or pass --instructions FILE.json"
        )
    return instructions[name]


def _test_rows(rows: Sequence[Pair], count: int) -> list[Pair]:
    """The first `count` rows with different queries, none of which is its own answer."""
    chosen: dict[str, Pair] = {}
    for pair in rows:
        if len(chosen) == count:
            break
        if normalised(pair.query) != normalised(pair.passage):
            chosen.setdefault(normalised(pair.query), pair)
    return list(chosen.values())


def _corpus(test: Sequence[Pair], rest: Sequence[Pair], count: int) -> tuple[dict[str, int], list[str]]:
    """Row by passage key, and the texts: the test rows' passages, then others' until there are `count`."""
    rows: dict[str, int] = {}
    texts: list[str] = []
    for number, pair in enumerate([*test, *rest]):
        if number >= len(test) and len(texts) >= count:
            break
        key = _passage_key(pair.passage)
        if key not in rows:
            rows[key] = len(texts)
            texts.append(pair.passage)
    return rows, texts


def _relevant(test: Sequence[Pair], rest: Sequence[Pair], rows: dict[str, int]) -> list[set[int]]:
    """For each test row the corpus rows of its passage, its group and its query."""
    by_group: dict[str, set[int]] = {}
    by_query: dict[str, set[int]] = {}
    for pair in rest:
        row = rows.get(_passage_key(pair.passage))
        if row is not None:
            by_query.setdefault(normalised(pair.query), set()).add(row)
            if pair.group is not None:
                by_group.setdefault(pair.group, set()).add(row)
    found = []
    for pair in test:
        same_group = by_group.get(pair.group, set()) if pair.group is not None else set()
        found.append({rows[_passage_key(pair.passage)]} | by_query[normalised(pair.query)] | same_group)
    return found


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
    passages = {_passage_key(pool[row].passage) for row in chosen}
    for row in order:
        if len(chosen) >= k:
            break
        if _passage_key(pool[row].passage) not in passages:
            passages.add(_passage_key(pool[row].passage))
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
