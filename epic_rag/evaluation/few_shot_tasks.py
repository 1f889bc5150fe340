"""Tasks of the few-shot evaluation: test queries, documents, and many pairs that demonstrations are drawn from.

A task is a `HeldoutSplit` with a large pool. It is made of

    a file of pairs, or the rows of one `source` of it       `nl2bash.jsonl.gz`, `docs_sections.jsonl.gz#sqlite3-doc`
    an evaluation set with labels                            message to message of the same label
    an evaluation set with documents or candidates           its judged queries, some of them for demonstrations
    the documents of a set whose ids begin with a prefix     `manuals#git`: one manual of several

Rows that share a query, a passage or a group are kept on one side, so that a demonstration shares nothing with a test
query. In a set of labels both sides have the same labels, and no message in common. A demonstration's passage is one of
the documents, as a pair that a user has confirmed in their own index is.

The other queries of a collection with queries are up to 300 of each file or set of judged queries: of rows that are
neither tests nor demonstrations in a file, and those that are no tests in a set, which has too few. Messages with
labels have none, as another message is a document already.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from epic_rag.errors import DataError
from epic_rag.evaluation.datasets import (
    ClassificationData,
    ClusteringData,
    LocalSet,
    RerankingData,
    RetrievalData,
    content_revision,
    entry_for,
    load_local_set,
    normalize_text,
    read_mapping,
)
from epic_rag.evaluation.heldout import (
    GENERIC_INSTRUCTION,
    HeldoutSplit,
    Pair,
    assemble_split,
    file_stem,
    passage_key,
    query_rows,
    with_components,
)

__all__ = [
    "SOURCE_MARK",
    "few_shot_task_of_pairs",
    "few_shot_task_of_set",
    "parse_pairs_source",
    "read_pairs_of_source",
]

SOURCE_MARK = "#"
"""Separates a file of pairs from the `source` whose rows are the task."""
_OTHER_QUERIES = 300
_OTHER_ROWS = 150


def parse_pairs_source(text: str) -> tuple[Path, str | None]:
    """Split `FILE` or `FILE#SOURCE`."""
    if Path(text).is_file():
        return Path(text), None
    file, mark, source = text.rpartition(SOURCE_MARK)
    return (Path(file), source) if mark else (Path(text), None)


def read_pairs_of_source(path: Path, source: str | None) -> list[Pair]:
    """Read the rows of a file, or those with one `source`, with their components.

    Raises:
        DataError: The file is malformed, or has no row with this source.
    """
    from epic_rag.training.data import load_pairs

    rows = [row for row in load_pairs(path)[0] if source is None or row.source == source]
    if not rows:
        raise DataError(f'{path} has no row with the source "{source}". Correct the part behind {SOURCE_MARK}.')
    return with_components(rows)


def few_shot_task_of_pairs(
    path: Path, source: str | None = None, *, queries: int = 300, pool: int = 1900, documents: int = 2000, seed: int = 0
) -> HeldoutSplit:
    """Make a task of a file of pairs.

    Args:
        path: Lines of {"query", "positive", "group"?, "source"?}.
        source: Rows of this source only; None for all.
        queries: Most test queries.
        pool: Most pairs for demonstrations.
        documents: Most documents; passages of tests come first, then those of the pool.
        seed: Seed of the split.

    Raises:
        DataError: The file is malformed, has no row with this source, or too few unconnected rows.
    """
    pairs = read_pairs_of_source(path, source)
    components: dict[int, list[Pair]] = {}
    for pair in pairs:
        components.setdefault(pair.component, []).append(pair)
    order = sorted(components)
    random.Random(seed).shuffle(order)
    # A component that holds much of the file can be no test: nothing would be left for demonstrations.
    order.sort(key=lambda number: len(components[number]) > 0.2 * len(pairs))
    wanted = min(queries, len(pairs) // 4)
    test_rows: list[Pair] = []
    used = 0
    while used < len(order) - 1 and len(query_rows(test_rows, wanted)) < wanted and len(test_rows) < len(pairs) // 2:
        test_rows += components[order[used]]
        used += 1
    test = query_rows(test_rows, wanted)
    others: list[Pair] = []
    while used < len(order) - 1 and len(others) < min(_OTHER_ROWS, len(pairs) // 10):
        others += components[order[used]]
        used += 1
    rest = [pair for number in order[used:] for pair in components[number]]
    random.Random(seed).shuffle(rest)
    free = rest[:pool]
    if not test or not free:
        raise DataError(f"{path} has too few rows that share nothing with each other. Use another file.")
    beside = path.parent / "instructions.json"
    instruction = read_mapping(beside).get(file_stem(path)) if beside.is_file() else None
    split = assemble_split(
        file_stem(path) if source is None else source,
        test=test,
        rest=[*test_rows, *free, *others],
        pool=free,
        documents=max(documents, len(test_rows) + len(free)),  # a demonstration's passage is a document
        instruction=instruction or GENERIC_INSTRUCTION,
        revision=content_revision([path]),
    )
    shown = {normalize_text(pair.query) for pair in free}
    beyond = [pair for pair in rest[pool:] if normalize_text(pair.query) not in shown]
    return _with_other_queries(split, [pair.query for pair in [*others, *beyond]])


def few_shot_task_of_set(
    folder: Path,
    prefix: str | None = None,
    *,
    queries: int = 300,
    pool: int = 1900,
    documents: int = 2000,
    seed: int = 0,
) -> HeldoutSplit:
    """Make a task of an evaluation set.

    Args:
        folder: The set.
        prefix: Only documents whose ids begin with it, and queries that they answer; None for all.
        queries: As in `few_shot_task_of_pairs`.
        pool: As there.
        documents: As there.
        seed: As there.

    Test queries are those of the set's test split. In a set of labels demonstrations are drawn from its training split;
    in one of judged queries, half of the queries are set apart for them.

    Raises:
        DataError: The set is malformed, of a kind without queries and documents, or has no document with the prefix.
    """
    found = load_local_set(folder)
    instruction = entry_for(found.name, found.kind).instruction
    if prefix is not None:
        found = _with_prefix(found, prefix)
    build: dict[type, Callable[..., HeldoutSplit]] = {
        ClassificationData: _of_labels,
        ClusteringData: _of_labels,
        RetrievalData: _of_judgements,
        RerankingData: _of_judgements,
    }
    if type(found.data) not in build:
        raise DataError(f"{found.name} is a set of sentence pairs. Use sets of documents or labels.")
    make = build[type(found.data)]
    split = make(found, queries=queries, pool=pool, documents=documents, rng=random.Random(seed))
    return replace(split, instruction=instruction)


def _with_prefix(found: LocalSet, prefix: str) -> LocalSet:
    """Return a set with the documents whose ids begin with a prefix, and the queries that they answer."""
    if not isinstance(found.data, RetrievalData):
        raise DataError(f"{found.name} has no ids of documents. Name the whole set.")
    corpus = tuple(item for item in found.data.corpus if item.id.startswith(prefix))
    if not corpus:
        raise DataError(f'No document of {found.name} has an id that begins with "{prefix}". Correct the prefix.')
    known = {item.id for item in corpus}
    relevant = {query: grades for query, grades in found.data.relevant.items() if known.issuperset(grades)}
    return replace(found, name=f"{found.name}-{prefix}", data=replace(found.data, corpus=corpus, relevant=relevant))


def _of_labels(found: LocalSet, *, queries: int, pool: int, documents: int, rng: random.Random) -> HeldoutSplit:
    if isinstance(found.data, ClassificationData):
        test, train = list(found.data.test), list(found.data.train)
        rng.shuffle(test)
    else:
        assert isinstance(found.data, ClusteringData)
        rows = list(zip(found.data.texts, found.data.labels, strict=True))
        rng.shuffle(rows)
        test, train = rows[: len(rows) // 3], rows[len(rows) // 3 :]
    rng.shuffle(train)
    tested = dict(reversed([(normalize_text(text), (text, label)) for text, label in test]))
    tests = list(tested.values())[:queries]
    corpus = list(
        {passage_key(text): (text, label) for text, label in train if normalize_text(text) not in tested}.values()
    )
    corpus = corpus[:documents]
    by_label: dict[int, list[int]] = {}
    for row, (_, label) in enumerate(corpus):
        by_label.setdefault(label, []).append(row)
    # A message and the next one of its label: every message is a query once and a passage once.
    pairs = [
        Pair(corpus[row][0], corpus[after][0], str(label))
        for label, rows_of_label in by_label.items()
        for row, after in zip(rows_of_label, [*rows_of_label[1:], rows_of_label[0]], strict=True)
        if row != after
    ]
    rng.shuffle(pairs)
    kept = [(text, label) for text, label in tests if label in by_label]
    return HeldoutSplit(
        name=found.name,
        instruction="",
        revision=found.revision,
        queries=tuple(text for text, _ in kept),
        documents=tuple(text for text, _ in corpus),
        relevant=tuple(tuple(by_label[label]) for _, label in kept),
        excluded=tuple(() for _ in kept),
        pool=tuple(pairs[:pool]),
    )


def _of_judgements(found: LocalSet, *, queries: int, pool: int, documents: int, rng: random.Random) -> HeldoutSplit:
    judged: list[tuple[str, list[str]]] = []
    others: list[str] = []
    if isinstance(found.data, RetrievalData):
        texts = {item.id: f"{item.title} {item.text}".strip() for item in found.data.corpus}
        for number, grades in found.data.relevant.items():
            best = sorted((name for name, grade in grades.items() if grade > 0), key=lambda name: -grades[name])
            if best:
                judged.append((found.data.queries[number], [texts[name] for name in best]))
        others = list(texts.values())
    else:
        assert isinstance(found.data, RerankingData)
        judged = [(query, list(right)) for query, right in zip(found.data.queries, found.data.positives, strict=True)]
        others = [text for wrong in found.data.negatives for text in wrong]
    rng.shuffle(judged)
    rng.shuffle(others)
    tests, shown = judged[: min(queries, len(judged) // 2)], judged[min(queries, len(judged) // 2) :]
    tested = {normalize_text(query) for query, _ in tests}
    answers = {passage_key(text) for _, right in tests for text in right}
    pairs = [
        Pair(query, text)
        for query, right in shown
        for text in right
        if normalize_text(query) not in tested and passage_key(text) not in answers
    ]
    rng.shuffle(pairs)
    rows: dict[str, int] = {}
    corpus: list[str] = []
    for text in [*(text for _, right in judged for text in right), *others]:
        if passage_key(text) not in rows and (len(corpus) < documents or passage_key(text) in answers):
            rows[passage_key(text)] = len(corpus)
            corpus.append(text)
    split = HeldoutSplit(
        name=found.name,
        instruction="",
        revision=found.revision,
        queries=tuple(query for query, _ in tests),
        documents=tuple(corpus),
        relevant=tuple(
            tuple(sorted({rows[passage_key(text)] for text in right if passage_key(text) in rows}))
            for _, right in tests
        ),
        excluded=tuple(() for _ in tests),
        pool=tuple(pairs[:pool]),
    )
    return _with_other_queries(split, [query for query, _ in shown])


def _with_other_queries(split: HeldoutSplit, texts: Sequence[str]) -> HeldoutSplit:
    tested = {normalize_text(query) for query in split.queries}
    unique = {normalize_text(text): text for text in texts if normalize_text(text) not in tested}
    return replace(split, other_queries=tuple(unique.values())[:_OTHER_QUERIES])
