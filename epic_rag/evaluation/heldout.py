"""Retrieval tests made of a file of training pairs that a model has not seen, and scores on them.

Evaluation sets have no demonstrations; a file of (query, positive) pairs has. It is split by *components*: rows that
share a group, a query or a positive, directly or through other rows. Some components give demonstrations, the others
give test queries, so a demonstration shares nothing with any test query.

`make_split` reads a file, `in_collection` merges the corpora of several files into one, and `score_heldout` computes
nDCG@10 without demonstrations, with draws of them, and with controls: passages shuffled, or demonstrations of another
file.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from epic_rag.demonstrations import Demonstration
from epic_rag.errors import ConfigError, DataError
from epic_rag.evaluation.bm25 import Bm25Index
from epic_rag.evaluation.datasets import SYMMETRIC_PAIRS, content_revision, normalize_text, read_mapping
from epic_rag.evaluation.embedding_store import EmbeddingStore, make_prompt
from epic_rag.metrics import mean_and_error, ndcg_at_k, ndcg_of_scores
from epic_rag.query_prompt import QueryStrategy

if TYPE_CHECKING:
    from epic_rag.training.data import Pair as TrainingPair
    from epic_rag.training.data import PairDataset

__all__ = [
    "CONDITIONS",
    "Collection",
    "Comparison",
    "Condition",
    "HeldoutResult",
    "HeldoutScore",
    "HeldoutSplit",
    "InstructionSource",
    "Pair",
    "QueryScores",
    "assemble_split",
    "condition_scores",
    "draw_demonstrations",
    "file_stem",
    "in_collection",
    "load_pairs",
    "make_split",
    "passage_key",
    "query_rows",
    "rows_of_queries",
    "score_heldout",
    "score_heldout_bm25",
    "shuffle_passages",
    "split_of_task",
    "with_components",
    "with_instruction",
]

logger = logging.getLogger(__name__)

GENERIC_INSTRUCTION = "Given a query, retrieve what belongs to it"
"""For a file that comes without an instruction."""
POOL_SHARE = 0.25
"""Share of a file's components that demonstrations are drawn from."""

Collection = Literal["own", "pooled", "pooled-with-queries"]
"""Documents that queries are ranked in: the file's, those of all files, or those and other rows' queries."""
InstructionSource = Literal["own", "default", "none"]
"""Instruction of the queries: the file's, the checkpoint's default, or none."""
Condition = Literal["none", "own", "shuffled", "foreign"]
CONDITIONS: dict[Condition, str] = {
    "none": "none",
    "own": "own",
    "shuffled": "own, passages shuffled",
    "foreign": "of another task",
}
"""Kinds of demonstrations, and their names in reports."""
QueryScores = npt.NDArray[np.float64]
"""(draws, queries) nDCG@10; (1, queries) without demonstrations."""


@dataclass(frozen=True)
class Pair:
    """Row of a pairs file; rows with the same group are each other's positives, `component` counts connected rows."""

    query: str
    passage: str
    group: str | None = None
    component: int = -1


@dataclass(frozen=True)
class HeldoutSplit:
    """Retrieval test made of a pairs file, and the rows that demonstrations are drawn from.

    Args:
        revision: A hash of the file.
        queries: Test queries, all different.
        documents: The corpus, all different.
        relevant: For each query the corpus rows that answer it.
        excluded: For each query the corpus rows that are the query itself (and would come first).
        pool: Rows that share nothing with a test query.
        symmetric: True if documents are encoded like queries.
        other_queries: Queries of rows that are neither in the test nor in the pool, all different and none of
            them a test query; a corpus can hold them as documents that answer nothing.
        parts: The lists of texts that a pooled corpus was made of, each encoded once for all of its files; empty
            for a file's own corpus.
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


def file_stem(path: Path) -> str:
    """Return a file's name without `.jsonl` and `.gz`."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def passage_key(text: str) -> str:
    """Return a passage with single blanks, for comparing passages; case counts, as in commands."""
    return " ".join(text.split())


def load_pairs(path: Path) -> list[Pair]:
    """Read a pairs file: {"query", "positive" (or "passage"), "group"?} a line.

    Returns:
        The rows in order, with their components.

    Raises:
        DataError: The file cannot be read or a line is malformed.
    """
    from epic_rag.training.data import load_pairs as load_training_pairs

    return with_components(load_training_pairs(path)[0])


def with_components(rows: Sequence[TrainingPair]) -> list[Pair]:
    """Return rows with the numbers of their connected components.

    Rows that share a query, a passage or a group, directly or through other rows, form a component.
    """
    parent = list(range(len(rows)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first_with: dict[tuple[str, str], int] = {}
    for number, row in enumerate(rows):
        keys = [("query", normalize_text(row.query)), ("passage", passage_key(row.positive))]
        if row.group is not None:
            keys.append(("group", row.group))
        for key in keys:
            parent[root(number)] = root(first_with.setdefault(key, number))
    return [Pair(row.query, row.positive, row.group, root(number)) for number, row in enumerate(rows)]


def draw_demonstrations(pool: Sequence[Pair], k: int, *, seed: int) -> list[Pair]:
    """Draw k rows, as different from each other as the pool allows; a smaller k is a prefix of a larger one.

    Raises:
        DataError: The pool has fewer than k rows.
    """
    if k > len(pool):
        raise DataError(f"{len(pool)} rows are free for {k} demonstrations. Lower --num-demonstrations.")
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


def shuffle_passages(demonstrations: Sequence[Pair], pool: Sequence[Pair], *, seed: int) -> list[Demonstration] | None:
    """Pair each demonstration's query with the passage of another component, so that the pair is wrong.

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


def make_split(
    path: Path,
    *,
    queries: int = 1000,
    documents: int = 5000,
    seed: int = 0,
    instruction: str | None = None,
) -> HeldoutSplit:
    """Split a pairs file into test queries, a corpus and a pool of demonstrations.

    A quarter of the components goes to the pool. Test queries are drawn from the rest; the corpus is made of
    their positives, then of other rows' up to `documents`, and is never cut below the positives.

    Args:
        path: The file.
        queries: Test queries wanted; fewer if the file has fewer.
        documents: Documents wanted in the corpus; fewer if the file has fewer.
        seed: Seed of all draws.
        instruction: The task in words; None takes it from `instructions.json` beside the file, or a generic
            one where there is no such file.

    Raises:
        ConfigError: `queries` or `documents` is below 1.
        DataError: The file is malformed, `instructions.json` lacks it, or all its rows are connected.
    """
    if queries < 1 or documents < 1:
        raise ConfigError(f"{queries} test queries and {documents} documents are too few. Use 1 or more of each.")
    name = file_stem(path)
    if instruction is None:
        beside = path.parent / "instructions.json"
        instruction = GENERIC_INSTRUCTION
        if beside.is_file():
            instructions = read_mapping(beside)
            if name not in instructions:
                raise DataError(f'{beside} has no instruction for "{name}". Add one, or pass --instructions FILE.json.')
            instruction = instructions[name]
        else:
            logger.warning('No %s: queries get "%s". Pass --instructions FILE.json.', beside, GENERIC_INSTRUCTION)
    pairs = load_pairs(path)
    components = sorted({pair.component for pair in pairs})
    if len(components) < 2:
        raise DataError(
            f"All {len(pairs)} rows of {path} are connected by a query, a positive or a group, so no demonstration "
            "can be kept apart from the test queries. Use another file."
        )
    rng = random.Random(seed)
    rng.shuffle(components)
    for_pool = set(components[: math.ceil(len(components) * POOL_SHARE)])
    pool = [pair for pair in pairs if pair.component in for_pool]
    rest = [pair for pair in pairs if pair.component not in for_pool]
    rng.shuffle(pool)
    rng.shuffle(rest)
    test = query_rows(rest, queries)
    if not test:
        raise DataError(f"No row of {path} has a query that differs from its positive. Use another file.")
    if len(test) < queries:
        logger.info("%s has %d test queries (%d were requested).", name, len(test), queries)
    return assemble_split(
        name,
        test=test,
        rest=rest,
        pool=pool,
        documents=documents,
        instruction=instruction,
        revision=content_revision([path]),
        symmetric=name in SYMMETRIC_PAIRS,
    )


def query_rows(rows: Sequence[Pair], count: int) -> list[Pair]:
    """Return the first `count` rows with different queries that are not their own answer."""
    chosen: dict[str, Pair] = {}
    for pair in rows:
        if len(chosen) == count:
            break
        if normalize_text(pair.query) != normalize_text(pair.passage):
            chosen.setdefault(normalize_text(pair.query), pair)
    return list(chosen.values())


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
    """Make a retrieval test of chosen rows.

    The corpus is made of the test rows' passages, filled up to `documents` with those of `rest`, which also decides
    further relevant documents and holds the test rows, too.
    """
    rows: dict[str, int] = {}
    texts: list[str] = []
    for number, pair in enumerate([*test, *rest]):
        if number >= len(test) and len(texts) >= documents:
            break
        key = passage_key(pair.passage)
        if key not in rows:
            rows[key] = len(texts)
            texts.append(pair.passage)
    # Relevant: the query's passage, and those of rows with the same query or group.
    by_group: dict[str, set[int]] = {}
    by_query: dict[str, set[int]] = {}
    for pair in rest:
        row = rows.get(passage_key(pair.passage))
        if row is not None:
            by_query.setdefault(normalize_text(pair.query), set()).add(row)
            if pair.group is not None:
                by_group.setdefault(pair.group, set()).add(row)
    relevant = []
    for pair in test:
        same_group = by_group.get(pair.group, set()) if pair.group is not None else set()
        same_query = by_query[normalize_text(pair.query)]
        relevant.append({rows[passage_key(pair.passage)]} | same_query | same_group)
    tested = {normalize_text(pair.query) for pair in test}
    others: dict[str, str] = {}
    for pair in rest:
        if len(others) == documents:
            break
        if normalize_text(pair.query) not in tested:
            others.setdefault(normalize_text(pair.query), pair.query)
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
        other_queries=tuple(others.values()),
    )


def split_of_task(dataset: PairDataset, *, queries: int, documents: int) -> HeldoutSplit | None:
    """Make a retrieval test of the rows that training left out; None if no held-out row can be a query.

    The pool of demonstrations is made of trained rows that share nothing with a test query. In a task with few targets
    (labels), where every label is in the pool, they share no query with one.
    """
    pairs = with_components([*dataset.held_out, *dataset.rows])
    held, trained = pairs[: len(dataset.held_out)], pairs[len(dataset.held_out) :]
    test = query_rows(held, queries)
    if not test:
        return None
    random.Random(f"ablation-{dataset.name}").shuffle(trained)
    if dataset.label_like:
        tested = {normalize_text(pair.query) for pair in test}
        pool = [pair for pair in trained if normalize_text(pair.query) not in tested]
    else:
        components = {pair.component for pair in held}
        pool = [pair for pair in trained if pair.component not in components]
    return assemble_split(
        dataset.name,
        test=test,
        rest=[*held, *trained],
        pool=pool,
        documents=documents,
        instruction=dataset.instruction or "",
        revision=dataset.sha256[:16],
        symmetric=dataset.symmetric,
    )


def rows_of_queries(queries: Sequence[str], documents: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return for each query the rows of the documents that equal it but for case and spacing."""
    rows: dict[str, list[int]] = {normalize_text(query): [] for query in queries}
    for row, text in enumerate(documents):
        found = rows.get(normalize_text(text))
        if found is not None:
            found.append(row)
    return tuple(tuple(rows[normalize_text(query)]) for query in queries)


def in_collection(splits: Sequence[HeldoutSplit], collection: Collection) -> list[HeldoutSplit]:
    """Merge the documents of some files into one corpus, or leave each file its own.

    In a file's own corpus all documents are of the kind that its queries want; an index of a real folder holds many
    kinds. Equal documents (but for spacing) are one document, and relevant to every query that it answers by any
    file. A text that is a test query of any file is never added as another row's query.

    Raises:
        ConfigError: A file is symmetric: its documents are encoded with its instruction, others bare.
    """
    if collection == "own":
        return list(splits)
    symmetric = [split.name for split in splits if split.symmetric]
    if symmetric:
        raise ConfigError(
            f"Documents of {', '.join(symmetric)} are encoded like queries and cannot be in a {collection} collection. "
            "Leave the file out, or use --heldout-collection own."
        )
    rows: dict[str, int] = {}
    texts: list[str] = []
    for text in (text for split in splits for text in split.documents):
        if passage_key(text) not in rows:
            rows[passage_key(text)] = len(texts)
            texts.append(text)
    parts = [split.documents for split in splits]
    if collection == "pooled-with-queries":
        taken = {normalize_text(text) for text in texts}
        taken.update(normalize_text(query) for split in splits for query in split.queries)
        for split in splits:
            added = [query for query in split.other_queries if normalize_text(query) not in taken]
            taken.update(normalize_text(query) for query in added)
            texts += added
            parts.append(tuple(added))
    pooled = []
    for split in splits:
        place = [rows[passage_key(text)] for text in split.documents]
        excluded = rows_of_queries(split.queries, texts)
        relevant = tuple(
            tuple(sorted({place[row] for row in found} - {*skip}))
            for found, skip in zip(split.relevant, excluded, strict=True)
        )
        pooled.append(
            replace(
                split,
                documents=tuple(texts),
                relevant=relevant,
                excluded=excluded,
                parts=tuple(parts),
                collection=collection,
            )
        )
    return pooled


def with_instruction(split: HeldoutSplit, source: InstructionSource, *, default: str | None) -> HeldoutSplit:
    """Return the same test with the file's own instruction, the checkpoint's `default`, or none."""
    if source == "own":
        return split
    return replace(split, instruction=(default or "") if source == "default" else "", instruction_source=source)


@dataclass(frozen=True)
class Comparison:
    """Paired difference of nDCG@10, averaged over draws: its mean and standard error over the test queries."""

    difference: float
    standard_error: float


@dataclass(frozen=True)
class HeldoutScore:
    """nDCG@10 at one k under one condition.

    Args:
        ndcg_at_10: Mean over draws and queries.
        draws: nDCG@10 of each draw of demonstrations.
        spread: Standard deviation over the draws (0 for one draw).
        versus_zero: This minus k = 0; None for k = 0 itself.
        versus_shuffled: Own demonstrations minus shuffled ones; None where that was not scored.
        versus_foreign: Own demonstrations minus another task's; None where that was not scored.
    """

    condition: Condition
    k: int
    ndcg_at_10: float
    draws: tuple[float, ...]
    spread: float
    versus_zero: Comparison | None = None
    versus_shuffled: Comparison | None = None
    versus_foreign: Comparison | None = None


@dataclass(frozen=True)
class HeldoutResult:
    """All scores of one model on one file, with the numbers of its queries, documents and rows for demonstrations.

    Args:
        instruction: The queries' instruction, "" for none; None for a plain model and for BM25.
        scores: By condition and k.
        instruction_source: "plain" for a model without an instruction.
    """

    name: str
    revision: str
    instruction: str | None
    queries: int
    documents: int
    pool: int
    scores: tuple[HeldoutScore, ...]
    seconds: float = field(compare=False)
    collection: Collection = "own"
    instruction_source: InstructionSource | Literal["plain"] = "own"


def score_heldout(
    store: EmbeddingStore,
    split: HeldoutSplit,
    *,
    ks: Sequence[int],
    draws: int = 3,
    controls: bool = False,
    foreign_pool: Sequence[Pair] | None = None,
    plain: bool = False,
    strategy: QueryStrategy = "epic",
) -> HeldoutResult:
    """Score a model on held-out pairs.

    Args:
        store: The model's embeddings.
        split: The test.
        ks: Numbers of demonstrations; 0 is always scored, because differences are taken to it.
        draws: Draws of demonstrations for each k.
        controls: Also score shuffled demonstrations and, given `foreign_pool`, another task's.
        foreign_pool: Rows of another file.
        plain: No instruction and no demonstrations; `ks` above 0 are left out.
        strategy: How demonstrations are used.
    """
    started = time.monotonic()
    scores = condition_scores(
        store,
        split,
        ks=() if plain else ks,
        draws=draws,
        controls=controls,
        foreign_pool=foreign_pool,
        plain=plain,
        strategy=strategy,
    )
    return _result(split, scores, started, plain=plain)


def condition_scores(
    store: EmbeddingStore,
    split: HeldoutSplit,
    *,
    ks: Sequence[int],
    draws: int = 3,
    controls: bool = False,
    foreign_pool: Sequence[Pair] | None = None,
    plain: bool = False,
    strategy: QueryStrategy = "epic",
) -> dict[tuple[Condition, int], QueryScores]:
    """Return the scores of single queries under each condition and k, k = 0 first; see `score_heldout`."""
    instruction = None if plain else split.instruction
    if split.symmetric:
        # The documents of a symmetric task are queries without demonstrations, as in training.
        documents = store.queries(split.documents, make_prompt(instruction))
    elif split.parts:  # texts that several corpora share are encoded once
        vectors = np.concatenate([store.documents(part) for part in split.parts])
        rows = {text: row for row, text in enumerate(text for part in split.parts for text in part)}
        documents = vectors[[rows[text] for text in split.documents]]
    else:
        documents = store.documents(split.documents)

    def score(variants: Sequence[Sequence[Demonstration]]) -> QueryScores:
        prompts = [make_prompt(instruction, shown, symmetric=split.symmetric, strategy=strategy) for shown in variants]
        return np.stack(
            [
                ndcg_at_k(store.queries(split.queries, prompt), documents, split.relevant, excluded=split.excluded)
                for prompt in prompts
            ]
        )

    found: dict[tuple[Condition, int], QueryScores] = {("none", 0): score([()])}
    for k in sorted({k for k in ks if k > 0}):
        drawn = [draw_demonstrations(split.pool, k, seed=draw) for draw in range(draws)]
        found["own", k] = score([_as_demonstrations(rows) for rows in drawn])
        if controls:
            wrong = [shuffle_passages(rows, split.pool, seed=draw) for draw, rows in enumerate(drawn)]
            if None in wrong:
                logger.warning("%s has no wrong passages to shuffle in at k = %d. They are left out.", split.name, k)
            else:
                found["shuffled", k] = score([rows for rows in wrong if rows is not None])
        if controls and foreign_pool is not None:
            foreign = [draw_demonstrations(foreign_pool, k, seed=draw) for draw in range(draws)]
            found["foreign", k] = score([_as_demonstrations(rows) for rows in foreign])
    return found


def _as_demonstrations(rows: Sequence[Pair]) -> list[Demonstration]:
    return [Demonstration(row.query, row.passage) for row in rows]


def score_heldout_bm25(split: HeldoutSplit) -> HeldoutResult:
    """Score BM25 on held-out pairs, at k = 0: it reads neither instructions nor demonstrations.

    Raises:
        MissingExtraError: bm25s is not installed.
    """
    started = time.monotonic()
    index = Bm25Index(split.documents)
    zero = ndcg_of_scores(index.scores(split.queries), split.relevant, excluded=split.excluded)
    return _result(split, {("none", 0): zero[None]}, started, plain=True)


def _result(
    split: HeldoutSplit, scores: Mapping[tuple[Condition, int], QueryScores], started: float, *, plain: bool
) -> HeldoutResult:
    """Return means over draws and queries, and paired differences to k = 0 and to the controls."""

    def versus(values: QueryScores, other: QueryScores | None) -> Comparison | None:
        return None if other is None else Comparison(*mean_and_error(values.mean(axis=0) - other.mean(axis=0)))

    found = []
    for (condition, k), values in scores.items():
        draws = values.mean(axis=1)
        controls = {other: scores.get((other, k)) if condition == "own" else None for other in CONDITIONS}
        found.append(
            HeldoutScore(
                condition=condition,
                k=k,
                ndcg_at_10=float(draws.mean()),
                draws=tuple(map(float, draws)),
                spread=float(draws.std(ddof=1)) if len(draws) > 1 else 0.0,
                versus_zero=versus(values, scores["none", 0] if k else None),
                versus_shuffled=versus(values, controls["shuffled"]),
                versus_foreign=versus(values, controls["foreign"]),
            )
        )
    return HeldoutResult(
        name=split.name,
        revision=split.revision,
        instruction=None if plain else split.instruction,
        queries=len(split.queries),
        documents=len(split.documents),
        pool=len(split.pool),
        scores=tuple(found),
        seconds=time.monotonic() - started,
        collection=split.collection,
        instruction_source="plain" if plain else split.instruction_source,
    )
