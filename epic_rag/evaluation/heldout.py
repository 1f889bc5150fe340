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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from epic_rag.errors import ConfigError, DataError
from epic_rag.evaluation.files import content_revision, read_mapping
from epic_rag.evaluation.pairs import (
    Pair,
    draw_demonstrations,
    file_stem,
    load_pairs,
    mismatch,
    passage_key,
    with_components,
)
from epic_rag.evaluation.prompts import normalised

__all__ = [
    "Collection",
    "HeldoutSplit",
    "InstructionSource",
    "Pair",
    "assemble_split",
    "draw_demonstrations",
    "file_stem",
    "load_pairs",
    "make_split",
    "mismatch",
    "passage_key",
    "query_rows",
    "rows_of_queries",
    "with_components",
]

logger = logging.getLogger(__name__)

GENERIC_INSTRUCTION = "Given a query, retrieve what belongs to it"
"""For a file that comes without an instruction."""
_DEMONSTRATION_SHARE = 0.25

Collection = Literal["own", "pooled", "pooled-with-queries"]
"""What the queries are ranked in: the file's own documents, those of all files, or those and queries as documents."""
InstructionSource = Literal["own", "default", "none"]
"""Whose instruction the queries get: the file's, the checkpoint's default, or none."""


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
        excluded: For each query the corpus rows that are the query itself (and would come first).
        pool: Rows that share nothing with a test query.
        symmetric: Whether documents are encoded like queries.
        other_queries: Queries of rows that are neither in the test nor in the pool, all different and none of
            them a test query; a corpus can hold them as documents that answer nothing.
        collection: What the corpus is.
        instruction_source: Whose instruction it is.
        parts: The lists of texts that a pooled corpus was put together from, each encoded once for all of its
            files; empty for a file's own corpus.
    """

    name: str
    instruction: str
    revision: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    relevant: tuple[tuple[int, ...], ...]
    excluded: tuple[tuple[int, ...], ...]
    pool: tuple[Pair, ...]
    symmetric: bool = False
    other_queries: tuple[str, ...] = ()
    collection: Collection = "own"
    instruction_source: InstructionSource = "own"
    parts: tuple[tuple[str, ...], ...] = ()


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
    test = query_rows(rest, queries)
    if not test:
        raise DataError(f"{path} has no row whose query differs from its positive outside the pool; use another file")
    if len(test) < queries:
        logger.info("%s has %d test queries, %d were asked for", name, len(test), queries)
    return assemble_split(
        name,
        test=test,
        rest=rest,
        pool=pool,
        documents=documents,
        instruction=instruction,
        revision=content_revision([path]),
        symmetric=symmetric,
    )


def assemble_split(
    name: str,
    *,
    test: Sequence[Pair],
    rest: Sequence[Pair],
    pool: Sequence[Pair],
    documents: int,
    instruction: str,
    revision: str,
    symmetric: bool = False,
) -> HeldoutSplit:
    """Make a retrieval test of rows that have been chosen already.

    Args:
        name: What the report calls it.
        test: Rows whose queries are asked, all different.
        rest: Rows that fill the corpus up and say what else is relevant; the test rows among them.
        pool: Rows that demonstrations are drawn from.
        documents: Documents wanted in the corpus, which is never cut below the test rows' passages.
        instruction: The task in words.
        revision: A hash of the data.
        symmetric: Whether documents are encoded like queries.
    """
    rows, texts = _corpus(test, rest, documents)
    relevant = _relevant(test, rest, rows)
    excluded = rows_of_queries([pair.query for pair in test], texts)
    return HeldoutSplit(
        name=name,
        instruction=instruction,
        revision=revision,
        queries=tuple(pair.query for pair in test),
        documents=tuple(texts),
        relevant=tuple(tuple(sorted(found - {*skip})) for found, skip in zip(relevant, excluded, strict=True)),
        excluded=excluded,
        pool=tuple(pool),
        symmetric=symmetric,
        other_queries=_other_queries(test, rest, documents),
    )


def rows_of_queries(queries: Sequence[str], documents: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """For each query the rows of the documents that are the query itself but for case and spacing."""
    rows: dict[str, list[int]] = {normalised(query): [] for query in queries}
    for row, text in enumerate(documents):
        found = rows.get(normalised(text))
        if found is not None:
            found.append(row)
    return tuple(tuple(rows[normalised(query)]) for query in queries)


def _other_queries(test: Sequence[Pair], rest: Sequence[Pair], count: int) -> tuple[str, ...]:
    """The first `count` different queries of rows that ask none of the test's queries."""
    asked = {normalised(pair.query) for pair in test}
    found: dict[str, str] = {}
    for pair in rest:
        if len(found) == count:
            break
        if normalised(pair.query) not in asked:
            found.setdefault(normalised(pair.query), pair.query)
    return tuple(found.values())


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


def query_rows(rows: Sequence[Pair], count: int) -> list[Pair]:
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
        key = passage_key(pair.passage)
        if key not in rows:
            rows[key] = len(texts)
            texts.append(pair.passage)
    return rows, texts


def _relevant(test: Sequence[Pair], rest: Sequence[Pair], rows: dict[str, int]) -> list[set[int]]:
    """For each test row the corpus rows of its passage, its group and its query."""
    by_group: dict[str, set[int]] = {}
    by_query: dict[str, set[int]] = {}
    for pair in rest:
        row = rows.get(passage_key(pair.passage))
        if row is not None:
            by_query.setdefault(normalised(pair.query), set()).add(row)
            if pair.group is not None:
                by_group.setdefault(pair.group, set()).add(row)
    found = []
    for pair in test:
        same_group = by_group.get(pair.group, set()) if pair.group is not None else set()
        found.append({rows[passage_key(pair.passage)]} | by_query[normalised(pair.query)] | same_group)
    return found
