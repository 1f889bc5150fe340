"""Few-shot evaluation: nDCG@10 gained over zero-shot by n demonstrations, n from 1 to 1,500.

For each task (`few_shot_tasks`), collection and number of demonstrations, several draws of demonstrations move the
queries by each *method*: the strategies of the encoder, and baselines that need as little: mean-centring, a prior on
documents, a ridge map, a memory of known pairs. Controls have passages shuffled, demonstrations of another task, or a
share of wrong pairs. Rankings are exact, by cosine and fused with BM25 as `epic-rag query` fuses them.

Texts are encoded once for all methods and draws, so with a folder for vectors a second run takes minutes.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from epic_rag.errors import ConfigError, DataError
from epic_rag.evaluation.bm25 import Bm25Index
from epic_rag.evaluation.datasets import find_local_sets, set_kind
from epic_rag.evaluation.embedding_store import EmbeddingStore, make_prompt
from epic_rag.evaluation.few_shot_tasks import few_shot_task_of_pairs, few_shot_task_of_set, parse_pairs_source
from epic_rag.evaluation.heldout import (
    Collection,
    HeldoutSplit,
    InstructionSource,
    in_collection,
    passage_key,
    with_instruction,
)
from epic_rag.evaluation.report import markdown_table, versions
from epic_rag.files import write_atomically
from epic_rag.metrics import unit_rows
from epic_rag.reader import DemonstrationReader
from epic_rag.task_vector import apply_task_vector

__all__ = [
    "CONTROLS",
    "METHODS",
    "FewShotCell",
    "FewShotReport",
    "FewShotRequest",
    "evaluate_few_shot",
    "load_few_shot_tasks",
]

Vectors = npt.NDArray[np.float32]
Control = Literal["none", "shuffled", "foreign", "wrong-10", "wrong-25"]
CONTROLS: tuple[Control, ...] = ("none", "shuffled", "foreign", "wrong-10", "wrong-25")
METHODS = ("reader", "universal", "task-vector", "ridge", "memory", "prior", "centring")
_DEPTH = 100
_RANK_CONSTANT = 5
_MEMORY_WEIGHT = 0.2
_RIDGE = 16.0
_LOSS = 0.5
_SPARE = 200


@dataclass(frozen=True)
class FewShotRequest:
    """Settings of a few-shot evaluation.

    Args:
        sizes: Numbers of demonstrations; those that exceed a task's pool are left out there.
        draws: Draws of demonstrations for each number; a draw's smaller number is a prefix of its larger one.
        collections: Collections that queries are ranked in.
        methods: Names from `METHODS`.
        controls: Names from `CONTROLS` that are scored for the method "reader".
        seed: Seed of the draws.
        bm25: Also score rankings that are fused with BM25.

    Raises:
        ConfigError: A value cannot work.
    """

    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1500)
    draws: int = 5
    collections: tuple[Collection, ...] = ("own", "pooled", "pooled-with-queries")
    methods: tuple[str, ...] = METHODS
    controls: tuple[Control, ...] = ()
    seed: int = 0
    bm25: bool = True

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ConfigError(f"The numbers of demonstrations are {list(self.sizes)}. Use 1 or more.")
        if self.draws < 1:
            raise ConfigError(f"draws is {self.draws}. Use 1 or more.")
        for given, known in ((self.methods, METHODS), (self.controls, CONTROLS)):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ConfigError(f"Unknown name {unknown[0]!r}. Choose from {', '.join(known)}.")


@dataclass(frozen=True)
class FewShotCell:
    """Gain over zero-shot of one method by n demonstrations on one task in one collection, in points of nDCG@10.

    Args:
        ranking: "dense" or "hybrid" (fused with BM25; compared with zero-shot fused in the same way).
        gains: Mean gain of each test query over the draws.
        by_draw: Mean gain of each draw over the queries.
    """

    task: str
    collection: Collection
    ranking: str
    method: str
    control: Control
    n: int
    gains: tuple[float, ...]
    by_draw: tuple[float, ...]

    @property
    def gain(self) -> float:
        """Mean gain over queries and draws."""
        return float(np.mean(self.by_draw))


@dataclass
class FewShotReport:
    """Gains of a few-shot evaluation.

    Attributes:
        request: The settings.
        model: The model's revision.
        tasks: Name, instruction and sizes of each task.
        cells: One for each task, collection, ranking, method, control and number of demonstrations.
        zero_shot: nDCG@10 times 100 without demonstrations, by "task/collection/ranking".
        seconds: Wall time.
    """

    request: FewShotRequest
    model: str
    tasks: list[dict[str, object]]
    cells: list[FewShotCell] = field(default_factory=list)
    zero_shot: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def summary(self, cells: Sequence[FewShotCell], *, samples: int = 1000) -> dict[str, float]:
        """Return mean over tasks, its 95% interval, the worst task, and the share of tasks and draws that lose 0.5.

        The interval is a paired bootstrap: queries are drawn again within each task, and means of tasks averaged.
        """
        rng = np.random.default_rng(0)
        means = np.zeros(samples)
        for cell in cells:
            gains = np.array(cell.gains)
            means += gains[rng.integers(len(gains), size=(samples, len(gains)))].mean(axis=1) / len(cells)
        low, high = np.percentile(means, [2.5, 97.5])
        draws = np.concatenate([np.array(cell.by_draw) for cell in cells])
        return {
            "tasks": len(cells),
            "gain": float(np.mean([cell.gain for cell in cells])),
            "low": float(low),
            "high": float(high),
            "worst": min(cell.gain for cell in cells),
            "losses": float((draws < -_LOSS).mean()),
        }

    def select(self, **wanted: object) -> list[FewShotCell]:
        """Return the cells whose fields have these values."""
        return [cell for cell in self.cells if all(getattr(cell, name) == value for name, value in wanted.items())]

    def to_markdown(self) -> str:
        """Return the tables: gains of all methods, details of the reader, controls, and the reader on each task."""
        parts = []
        for collection in self.request.collections:
            for ranking in dict.fromkeys(cell.ranking for cell in self.cells):
                found = self.select(collection=collection, ranking=ranking)
                parts.append(f"**{collection}, {ranking}**: gain in nDCG@10, mean of tasks")
                parts.append(self._methods_table(found))
                parts.append(self._reader_table(found))
        dense = self.select(ranking="dense", method="reader", control="none")
        parts.append("**The reader on each task**, dense")
        rows = [
            [
                task,
                collection,
                f"{self.zero_shot[f'{task}/{collection}/dense']:.2f}",
                *self._line(dense, task, collection),
            ]
            for task in dict.fromkeys(cell.task for cell in dense)
            for collection in self.request.collections
        ]
        parts.append(markdown_table(["task", "collection", "n = 0", *self._sizes()], rows, text_columns=2))
        return "\n\n".join(parts)

    def _sizes(self) -> list[str]:
        return [f"n = {n}" for n in self.request.sizes]

    def _line(self, cells: Sequence[FewShotCell], task: str, collection: str) -> list[str]:
        gains = {cell.n: cell.gain for cell in cells if (cell.task, cell.collection) == (task, collection)}
        return [f"{gains[n]:+.2f}" if n in gains else "" for n in self.request.sizes]

    def _methods_table(self, cells: Sequence[FewShotCell]) -> str:
        arms = dict.fromkeys((cell.method, cell.control) for cell in cells)
        rows = []
        for method, control in arms:
            line = [method if control == "none" else f"{method}, {control}"]
            for n in self.request.sizes:
                found = [cell for cell in cells if (cell.method, cell.control, cell.n) == (method, control, n)]
                line.append(f"{np.mean([cell.gain for cell in found]):+.2f}" if found else "")
            rows.append(line)
        return markdown_table(["method", *self._sizes()], rows, text_columns=1)

    def _reader_table(self, cells: Sequence[FewShotCell]) -> str:
        rows: dict[str, list[str]] = {"tasks": [], "95% interval": [], "worst task": [], "loss of 0.5 or more": []}
        for n in self.request.sizes:
            found = [cell for cell in cells if (cell.method, cell.control, cell.n) == ("reader", "none", n)]
            values = self.summary(found) if found else None
            rows["tasks"].append(f"{values['tasks']:.0f}" if values else "")
            rows["95% interval"].append(f"{values['low']:+.2f} to {values['high']:+.2f}" if values else "")
            rows["worst task"].append(f"{values['worst']:+.2f}" if values else "")
            rows["loss of 0.5 or more"].append(f"{100 * values['losses']:.0f}%" if values else "")
        return markdown_table(
            ["reader", *self._sizes()], [[name, *line] for name, line in rows.items()], text_columns=1
        )

    def to_json(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return {
            "format_version": 1,
            "model": self.model,
            "seconds": round(self.seconds, 1),
            "versions": versions(),
            "settings": dataclasses.asdict(self.request),
            "tasks": self.tasks,
            "zero_shot": {name: round(value, 3) for name, value in self.zero_shot.items()},
            "cells": [
                {
                    **{
                        name: getattr(cell, name)
                        for name in ("task", "collection", "ranking", "method", "control", "n")
                    },
                    "gain": round(cell.gain, 4),
                    "by_draw": [round(value, 4) for value in cell.by_draw],
                }
                for cell in self.cells
            ],
        }

    def write(self, path: Path) -> None:
        """Write the JSON, and beside it the tables (`.md`) and, where matplotlib is installed, a plot (`.svg`)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")
        write_atomically(path.with_suffix(".md"), self.to_markdown() + "\n")
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(5.0 * len(self.request.collections), 3.6), layout="constrained")
        for number, collection in enumerate(self.request.collections, start=1):
            axes = figure.add_subplot(1, len(self.request.collections), number)
            for method in self.request.methods:
                found = self.select(collection=collection, ranking="dense", method=method, control="none")
                points = [(n, [cell.gain for cell in found if cell.n == n]) for n in self.request.sizes]
                known = [(n, float(np.mean(gains))) for n, gains in points if gains]
                axes.plot([n for n, _ in known], [gain for _, gain in known], marker="o", markersize=3, label=method)
            axes.set_xscale("log")
            axes.axhline(0.0, color="grey", linewidth=0.5)
            axes.set_title(collection, fontsize=9)
            axes.set_xlabel("demonstrations")
            axes.set_ylabel("gain in nDCG@10")
        figure.axes[0].legend(fontsize=7)
        figure.savefig(path.with_suffix(".svg"), format="svg", metadata={"Date": None})


class _TaskVectors:
    """Vectors of one task, and its rankings' scores."""

    def __init__(self, store: EmbeddingStore, split: HeldoutSplit) -> None:
        self.split = split
        prompt = make_prompt(split.instruction)
        texts = [*split.queries, *(pair.query for pair in split.pool)]
        vectors = store.queries(texts, prompt)
        self.queries = vectors[: len(split.queries)]
        self.documents = store.documents(split.documents)
        self.others = store.documents(split.other_queries)
        rows = {passage_key(text): row for row, text in enumerate(split.documents)}
        self.passage_rows = np.array([rows[passage_key(pair.passage)] for pair in split.pool])
        self.pairs = np.stack([vectors[len(split.queries) :], self.documents[self.passage_rows]], axis=1)

    def draw(self, n: int, seed: int) -> npt.NDArray[np.intp]:
        """Return n rows of the pool; the first ones of a permutation that depends on seed and task alone."""
        order = list(range(len(self.pairs)))
        random.Random(f"few-shot-{self.split.name}-{seed}").shuffle(order)
        return np.array(order[:n])


@dataclass
class _Collection:
    """Documents that a task's queries are ranked in, and the zero-shot scores there."""

    vectors: Vectors
    relevant: tuple[tuple[int, ...], ...]
    excluded: tuple[tuple[int, ...], ...]
    rows: npt.NDArray[np.intp]
    """Rows of the task's own documents."""
    lexical: list[npt.NDArray[np.intp]] | None
    zero: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)


def load_few_shot_tasks(
    pairs: Sequence[str | Path],
    data: Path | None,
    names: Sequence[str] | None,
    *,
    queries: int,
    documents: int,
    sizes: Sequence[int],
    instruction: InstructionSource,
    default_instruction: str | None,
    seed: int = 0,
) -> list[HeldoutSplit]:
    """Read the tasks of an evaluation.

    Args:
        pairs: Files of pairs, `FILE` or `FILE#SOURCE`.
        data: Folder of evaluation sets.
        names: Sets in it; None for all of labels, documents or candidates.
        queries: Most test queries of a task.
        documents: Documents of a task, if it has as many.
        sizes: Numbers of demonstrations; pools hold a few more than the largest.
        instruction: Origin of the queries' instruction.
        default_instruction: The checkpoint's.
        seed: Seed of the splits.

    Raises:
        DataError: A file or set is missing, malformed or too small.
    """
    limits = {"queries": queries, "documents": documents, "pool": max(sizes) + _SPARE, "seed": seed}
    tasks = []
    for each in pairs:
        path, source = parse_pairs_source(str(each))
        tasks.append(few_shot_task_of_pairs(path, source, **limits))
    if data is not None:
        known = [name for name in find_local_sets(data) if set_kind(data / name) != "sts"]
        tasks += [few_shot_task_of_set(data / name, **limits) for name in (known if names is None else names)]
    repeated = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if repeated or not tasks:
        fact = f"Two tasks are called {repeated[0]}" if repeated else "There is no task"
        raise DataError(f"{fact}. Pass files of pairs with --heldout, or sets with --data and --tasks.")
    return [with_instruction(task, instruction, default=default_instruction) for task in tasks]


def evaluate_few_shot(
    store: EmbeddingStore,
    tasks: Sequence[HeldoutSplit],
    request: FewShotRequest,
    *,
    reader: DemonstrationReader | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> FewShotReport:
    """Score methods of using demonstrations.

    Args:
        store: The model's vectors.
        tasks: See `few_shot_tasks`.
        request: The settings.
        reader: The model's reader, method "reader"; None takes the universal one.
        progress: Called with one line for each task.

    Returns:
        The gains of every task, collection, method and number of demonstrations.

    Raises:
        MissingExtraError: bm25s is not installed and rankings are to be fused.
    """
    started = time.monotonic()
    vectors = []
    for task in tasks:
        vectors.append(_TaskVectors(store, task))
        progress(f"{task.name}: embedded ({time.monotonic() - started:.0f} s)")
    report = FewShotReport(request, model=store.revision, tasks=[_describe(task) for task in tasks])
    readers = {"reader": reader or DemonstrationReader.universal(), "universal": DemonstrationReader.universal()}
    for collection in request.collections:
        merged = in_collection(list(tasks), collection)
        shared = _collect(vectors, merged, collection) if collection != "own" else None
        keywords = Bm25Index(merged[0].documents) if request.bm25 and shared is not None else None
        for number, (known, split) in enumerate(zip(vectors, merged, strict=True)):
            documents = known.documents if shared is None else shared
            place = _own_rows(known.split, split)
            index = keywords if shared is not None or not request.bm25 else Bm25Index(split.documents)
            lexical = None if index is None else _best(np.stack(list(index.scores(split.queries))))
            corpus = _Collection(documents, split.relevant, split.excluded, place, lexical)
            corpus.zero = _ndcg(corpus, known.queries @ documents.T)
            foreign = vectors[(number + 1) % len(vectors)]
            for n in request.sizes:
                if n > len(known.pairs):
                    continue
                for method, control in _arms(request, trained=readers["reader"].kind == "trained"):
                    if control == "foreign" and (foreign is known or n > len(foreign.pairs)):
                        continue
                    if control.startswith("wrong") and n < 8:
                        continue
                    found: dict[str, list[npt.NDArray[np.float64]]] = {}
                    for draw in range(request.draws):
                        pairs, rows = _demonstrations(known, foreign, control, n, request.seed + draw)
                        scores = _scores(method, readers, known, corpus, pairs, rows)
                        for ranking, values in _ndcg(corpus, scores).items():
                            found.setdefault(ranking, []).append(100 * (values - corpus.zero[ranking]))
                    for ranking, gains in found.items():
                        table = np.stack(gains)
                        report.cells.append(
                            FewShotCell(
                                split.name,
                                collection,
                                ranking,
                                method,
                                control,
                                n,
                                tuple(map(float, table.mean(axis=0))),
                                tuple(map(float, table.mean(axis=1))),
                            )
                        )
            for ranking, values in corpus.zero.items():
                report.zero_shot[f"{split.name}/{collection}/{ranking}"] = float(100 * values.mean())
            progress(f"{split.name}, {collection}: scored ({time.monotonic() - started:.0f} s)")
    report.seconds = time.monotonic() - started
    return report


def _arms(request: FewShotRequest, *, trained: bool) -> Iterable[tuple[str, Control]]:
    # Without a trained reader, "reader" is the universal one.
    yield from ((method, "none") for method in request.methods if trained or method != "universal")
    yield from (("reader", control) for control in request.controls if control != "none")


def _collect(vectors: Sequence[_TaskVectors], merged: Sequence[HeldoutSplit], collection: Collection) -> Vectors:
    """Return the vectors of a collection of all tasks' documents, in its order."""
    by_key: dict[str, npt.NDArray[np.float32]] = {}
    others: dict[str, npt.NDArray[np.float32]] = {}
    for known in vectors:
        for text, vector in zip(known.split.documents, known.documents, strict=True):
            by_key.setdefault(passage_key(text), vector)
        if collection == "pooled-with-queries":
            others.update(zip(known.split.other_queries, known.others, strict=True))
    return np.stack(
        [by_key[passage_key(text)] if passage_key(text) in by_key else others[text] for text in merged[0].documents]
    )


def _own_rows(own: HeldoutSplit, merged: HeldoutSplit) -> npt.NDArray[np.intp]:
    rows = {passage_key(text): row for row, text in reversed(list(enumerate(merged.documents)))}
    return np.array([rows[passage_key(text)] for text in own.documents])


def _demonstrations(
    known: _TaskVectors, foreign: _TaskVectors, control: Control, n: int, seed: int
) -> tuple[Vectors, npt.NDArray[np.intp]]:
    """Draw n demonstrations: (n, 2, dim), and the rows of their passages among the task's documents (-1: none)."""
    if control == "foreign":
        rows = foreign.draw(n, seed)
        return foreign.pairs[rows], np.full(n, -1)
    rows = known.draw(n, seed)
    pairs, places = known.pairs[rows].copy(), known.passage_rows[rows].copy()
    if control == "shuffled":
        if n == 1:
            spare = known.draw(len(known.pairs), seed)[-1:]
            return np.stack([pairs[:, 0], known.pairs[spare, 1]], axis=1), known.passage_rows[spare]
        wrong = np.arange(n)
    else:
        wrong = np.arange(max(2, round({"wrong-10": 0.1, "wrong-25": 0.25}.get(control, 0.0) * n)))
    if control != "none":
        pairs[wrong, 1] = np.roll(pairs[wrong, 1], 1, axis=0)
        places[wrong] = np.roll(places[wrong], 1)
    return pairs, places


def _scores(
    method: str,
    readers: Mapping[str, DemonstrationReader],
    known: _TaskVectors,
    corpus: _Collection,
    pairs: Vectors,
    rows: npt.NDArray[np.intp],
) -> Vectors:
    """Return (queries, documents) scores of a method."""
    queries, documents = known.queries, corpus.vectors
    n = len(pairs)
    if method in readers:
        moved = readers[method].prepare(pairs).apply(queries)
    elif method == "task-vector":
        moved = apply_task_vector(queries, [pairs] * len(queries))
    elif method == "ridge":
        # The map from queries to passages that stays near the identity, by least squares, beside the mean difference.
        differences = pairs[:, 1] - pairs[:, 0]
        shift, middle = differences.mean(axis=0), pairs[:, 0].mean(axis=0)
        centred = pairs[:, 0] - middle
        gram = centred.T @ centred + np.float32(_RIDGE) * np.eye(pairs.shape[2], dtype=np.float32)
        linear = np.linalg.solve(gram, centred.T @ (differences - shift))
        moved = unit_rows(queries + 0.7 * n / (n + 2) * shift + (queries - middle) @ linear)
    elif method == "prior":
        # A prior on documents alone: the passages' mean, seen from that of the collection.
        moved = queries + 0.7 * n / (n + 2) * (pairs[:, 1].mean(axis=0) - documents.mean(axis=0))
    elif method == "centring":
        moved = unit_rows(queries - pairs[:, 0].mean(axis=0) * n / (n + 2))
        documents = unit_rows(documents - documents.mean(axis=0))
    else:  # memory
        moved = queries
    scores: Vectors = moved.astype(np.float32) @ documents.T
    if method == "memory":
        near = np.maximum(queries @ pairs[:, 0].T, 0.0)
        # The nearest known queries vote for their passages.
        kept = np.argsort(-near, axis=1)[:, :10]
        for query, chosen in enumerate(kept):
            inside = chosen[rows[chosen] >= 0]
            np.add.at(scores[query], corpus.rows[rows[inside]], _MEMORY_WEIGHT * near[query, inside])
    return scores


def _best(scores: npt.NDArray[np.float32]) -> list[npt.NDArray[np.intp]]:
    """Return the rows of each query's highest finite scores, best first, equal ones in the order of the rows."""
    depth = min(_DEPTH, scores.shape[1])
    kept = np.sort(np.argpartition(-scores, depth - 1, axis=1)[:, :depth], axis=1)
    values = np.take_along_axis(scores, kept, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    ranked = np.take_along_axis(kept, order, axis=1)
    finite = np.isfinite(values).sum(axis=1)
    return [row[:count] for row, count in zip(ranked, finite, strict=True)]


def _ndcg(corpus: _Collection, scores: Vectors) -> dict[str, npt.NDArray[np.float64]]:
    """Return nDCG@10 of each query, by kind of ranking."""
    discounts = 1.0 / np.log2(np.arange(2, 12))
    ideal = np.cumsum(discounts)
    found = {"dense": np.zeros(len(scores))}
    if corpus.lexical is not None:
        found["hybrid"] = np.zeros(len(scores))
    weights = 1.0 / (_RANK_CONSTANT + np.arange(1, _DEPTH + 1))
    for query, skip in enumerate(corpus.excluded):
        scores[query, list(skip)] = -np.inf
    for query, best in enumerate(_best(scores)):
        relevant = set(corpus.relevant[query])
        if not relevant:
            continue
        skip = corpus.excluded[query]
        rankings = {"dense": best}
        if corpus.lexical is not None:
            fused: dict[int, float] = {}
            for ranking in (best, corpus.lexical[query]):
                for document, weight in zip(ranking.tolist(), weights, strict=False):
                    if document not in skip:
                        fused[document] = fused.get(document, 0.0) + weight
            rankings["hybrid"] = np.array(sorted(fused, key=lambda document: (-fused[document], document))[:10])
        for name, ranking in rankings.items():
            hits = [rank for rank, document in enumerate(ranking[:10].tolist()) if document in relevant]
            found[name][query] = discounts[hits].sum() / ideal[min(len(relevant), 10) - 1]
    return found


def _describe(task: HeldoutSplit) -> dict[str, object]:
    return {
        "name": task.name,
        "instruction": task.instruction,
        "queries": len(task.queries),
        "documents": len(task.documents),
        "pool": len(task.pool),
        "revision": task.revision,
    }
