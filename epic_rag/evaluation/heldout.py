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
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from epic_rag.demonstrations import Demonstration
from epic_rag.errors import ConfigError, DataError
from epic_rag.evaluation.bm25 import Bm25Index
from epic_rag.evaluation.datasets import content_revision, normalised, read_jsonl, read_mapping
from epic_rag.evaluation.embedding import EmbeddingStore, QueryPrompt, Vectors
from epic_rag.metrics import mean_and_error, ndcg_at_k, ndcg_of_scores
from epic_rag.task_vector import QueryStrategy

__all__ = [
    "CONDITIONS",
    "Collection",
    "Comparison",
    "Condition",
    "HeldoutResult",
    "HeldoutScore",
    "HeldoutSplit",
    "InstructionSource",
    "Observe",
    "Pair",
    "assemble_split",
    "draw_demonstrations",
    "file_stem",
    "in_collection",
    "load_pairs",
    "make_split",
    "mismatch",
    "passage_key",
    "query_rows",
    "rows_of_queries",
    "score_heldout",
    "score_heldout_bm25",
    "with_components",
    "with_instruction",
]


# --- from pairs
# Rows of (query, positive) pairs: reading a file of them, which rows belong together, drawing demonstrations.


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


# --- from collection
# Held-out files in one collection, and with other instructions than their own.
#
# In a file's own corpus all documents are of the kind that its queries want, so an encoder need not know what is
# wanted. A person's index holds many kinds side by side. `pooled` is such an index: one corpus of all files'
# documents, in which each file's queries look for theirs. `pooled-with-queries` holds the queries of other rows,
# too, as a collection holds questions and headings beside answers; what is most like a query there is not what
# answers it.


def in_collection(splits: Sequence[HeldoutSplit], collection: Collection) -> list[HeldoutSplit]:
    """Put the documents of some files into one corpus, or leave each file its own.

    Equal documents (but for spacing) are one document, and relevant to every query that it answers by any
    file. A text that is a test query of any file is never put in as another row's query.

    Args:
        splits: The files, each with its own corpus.
        collection: What the queries are ranked in.

    Returns:
        The same tests, in order, over the collection.

    Raises:
        ConfigError: A file is symmetric: its documents are encoded with its instruction, others bare.
    """
    if collection == "own":
        return list(splits)
    symmetric = [split.name for split in splits if split.symmetric]
    if symmetric:
        raise ConfigError(
            f"the documents of {', '.join(symmetric)} are encoded like queries, those of a {collection} collection "
            "bare; leave the file out, or use --heldout-collection own for it"
        )
    rows: dict[str, int] = {}
    texts: list[str] = []
    for text in (text for split in splits for text in split.documents):
        if passage_key(text) not in rows:
            rows[passage_key(text)] = len(texts)
            texts.append(text)
    parts = [split.documents for split in splits]
    if collection == "pooled-with-queries":
        taken = {normalised(text) for text in texts}
        taken.update(normalised(query) for split in splits for query in split.queries)
        for split in splits:
            added = [query for query in split.other_queries if normalised(query) not in taken]
            taken.update(normalised(query) for query in added)
            texts += added
            parts.append(tuple(added))
    documents = tuple(texts)
    return [_over(split, documents, rows, tuple(parts), collection) for split in splits]


def _over(
    split: HeldoutSplit,
    documents: tuple[str, ...],
    rows: dict[str, int],
    parts: tuple[tuple[str, ...], ...],
    collection: Collection,
) -> HeldoutSplit:
    """One file's test over a pooled corpus; `rows` has the row of each passage key."""
    place = [rows[passage_key(text)] for text in split.documents]
    excluded = rows_of_queries(split.queries, documents)
    relevant = tuple(
        tuple(sorted({place[row] for row in found} - {*skip}))
        for found, skip in zip(split.relevant, excluded, strict=True)
    )
    return replace(split, documents=documents, relevant=relevant, excluded=excluded, parts=parts, collection=collection)


def with_instruction(split: HeldoutSplit, source: InstructionSource, *, default: str | None) -> HeldoutSplit:
    """Return the same test with the file's own instruction, a checkpoint's default, or none.

    Args:
        split: The test.
        source: Which one.
        default: The checkpoint's default instruction; None for one that has none, whose queries then go
            without.
    """
    if source == "own":
        return split
    return replace(split, instruction=(default or "") if source == "default" else "", instruction_source=source)


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


# --- from heldout_scores
# Scores of one model, or of BM25, on held-out pairs: without demonstrations, with them, and with wrong ones.

Condition = Literal["none", "own", "shuffled", "foreign"]
CONDITIONS: dict[Condition, str] = {
    "none": "none",
    "own": "own",
    "shuffled": "own, passages shuffled",
    "foreign": "of another task",
}
"""What is shown to the model, and how the report calls it."""

_Scores = npt.NDArray[np.float64]
Observe = Callable[[Condition, int, _Scores], None]
"""Takes a condition, its k, and (draws, queries) scores."""


@dataclass(frozen=True)
class Comparison:
    """A paired difference of nDCG@10 over the test queries, averaged over draws first.

    Args:
        difference: Its mean.
        standard_error: Of the mean, over test queries.
    """

    difference: float
    standard_error: float


@dataclass(frozen=True)
class HeldoutScore:
    """nDCG@10 at one k under one condition.

    Args:
        condition: What is shown.
        k: How many.
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
    """All scores of one model on one file.

    Args:
        name: The file's name.
        revision: A hash of the file.
        instruction: What the queries got, "" for none; None for a plain model and for BM25.
        queries: Number of test queries.
        documents: Number of documents.
        pool: Number of rows that demonstrations were drawn from.
        scores: By condition and k.
        seconds: Wall time.
        collection: What the queries were ranked in.
        instruction_source: Whose instruction it is; "plain" for a model that gets none at all.
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
    observe: Observe | None = None,
) -> HeldoutResult:
    """Score a model on held-out pairs.

    Args:
        store: The model's embeddings.
        split: The test.
        ks: Numbers of demonstrations; 0 is always scored, because differences are taken to it.
        draws: Draws of demonstrations for each k.
        controls: Also show shuffled demonstrations and, given `foreign_pool`, another task's.
        foreign_pool: Rows of another file.
        plain: No instruction and no demonstrations; `ks` above 0 are left out.
        strategy: How demonstrations are shown.
        observe: Called with the single queries' scores behind every line of the result, for example to compare two
            models query by query.
    """
    started = time.monotonic()
    instruction = None if plain else split.instruction
    wanted = [] if plain else sorted({k for k in ks if k > 0})
    documents = _documents(store, split, instruction)

    def score(demonstrations: Sequence[Demonstration]) -> _Scores:
        prompt = QueryPrompt(instruction, tuple(demonstrations), split.symmetric, strategy)
        return ndcg_at_k(store.queries(split.queries, prompt), documents, split.relevant, excluded=split.excluded)

    zero = score(())
    see = observe or (lambda condition, k, scores: None)
    see("none", 0, zero[None])
    scores = [_without(zero)]
    for k in wanted:
        shown = {
            condition: np.stack([score(demonstrations) for demonstrations in variants])
            for condition, variants in _variants(split, k, draws, controls, foreign_pool).items()
        }
        for condition, values in shown.items():
            see(condition, k, values)
            scores.append(_summary(condition, k, shown, zero))
    return _result(split, instruction, scores, started)


def score_heldout_bm25(split: HeldoutSplit) -> HeldoutResult:
    """Score BM25 on held-out pairs, at k = 0: it reads neither instructions nor demonstrations.

    Raises:
        MissingExtraError: bm25s is not installed.
    """
    started = time.monotonic()
    index = Bm25Index(split.documents)
    zero = ndcg_of_scores(index.found(split.queries), split.relevant, excluded=split.excluded)
    return _result(split, None, [_without(zero)], started)


def _documents(store: EmbeddingStore, split: HeldoutSplit, instruction: str | None) -> Vectors:
    """(m, dim) vectors of the corpus; texts that several corpora share are encoded once."""
    if split.symmetric:
        # The documents of a symmetric task are queries without demonstrations, as in training.
        return store.queries(split.documents, QueryPrompt(instruction))
    if not split.parts:
        return store.documents(split.documents)
    vectors = np.concatenate([store.documents(part) for part in split.parts])
    rows = {text: row for row, text in enumerate(text for part in split.parts for text in part)}
    return vectors[[rows[text] for text in split.documents]]


def _result(
    split: HeldoutSplit, instruction: str | None, scores: Sequence[HeldoutScore], started: float
) -> HeldoutResult:
    return HeldoutResult(
        name=split.name,
        revision=split.revision,
        instruction=instruction,
        queries=len(split.queries),
        documents=len(split.documents),
        pool=len(split.pool),
        scores=tuple(scores),
        seconds=time.monotonic() - started,
        collection=split.collection,
        instruction_source="plain" if instruction is None else split.instruction_source,
    )


def _without(zero: _Scores) -> HeldoutScore:
    """The line without demonstrations."""
    mean = float(zero.mean())
    return HeldoutScore("none", 0, mean, (mean,), 0.0)


def _variants(
    split: HeldoutSplit, k: int, draws: int, controls: bool, foreign_pool: Sequence[Pair] | None
) -> dict[Condition, list[list[Demonstration]]]:
    """For each condition the demonstrations of every draw."""
    rows = [draw_demonstrations(split.pool, k, seed=draw) for draw in range(draws)]
    variants: dict[Condition, list[list[Demonstration]]] = {"own": [_shown(drawn) for drawn in rows]}
    if controls:
        wrong = [mismatch(drawn, split.pool, seed=draw) for draw, drawn in enumerate(rows)]
        if all(item is not None for item in wrong):
            variants["shuffled"] = [item for item in wrong if item is not None]
        else:
            logger.warning("%s has no wrong passages to shuffle in at k = %d; left out", split.name, k)
        if foreign_pool is not None:
            variants["foreign"] = [_shown(draw_demonstrations(foreign_pool, k, seed=draw)) for draw in range(draws)]
    return variants


def _shown(rows: Sequence[Pair]) -> list[Demonstration]:
    return [Demonstration(row.query, row.passage) for row in rows]


def _summary(condition: Condition, k: int, shown: Mapping[Condition, _Scores], zero: _Scores) -> HeldoutScore:
    """One line of the report from (draws, queries) scores."""
    means = shown[condition].mean(axis=1)

    def versus(other: Condition) -> Comparison | None:
        if condition != "own" or other not in shown:
            return None
        return _compare(shown["own"], shown[other].mean(axis=0))

    return HeldoutScore(
        condition=condition,
        k=k,
        ndcg_at_10=float(means.mean()),
        draws=tuple(float(mean) for mean in means),
        spread=float(means.std(ddof=1)) if len(means) > 1 else 0.0,
        versus_zero=_compare(shown[condition], zero),
        versus_shuffled=versus("shuffled"),
        versus_foreign=versus("foreign"),
    )


def _compare(scores: _Scores, baseline: _Scores) -> Comparison:
    """Paired over queries: (draws, queries) scores, averaged over draws, minus (queries,) ones."""
    return Comparison(*mean_and_error(scores.mean(axis=0) - baseline))
