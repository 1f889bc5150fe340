"""Few-shot evaluation: nDCG@10 gained over zero-shot by n demonstrations, n from 1 to 1,500.

For each task (`few_shot_tasks`), collection and number of demonstrations, several draws of demonstrations are given to
each method (`few_shot_methods`): the strategies of the encoder, and baselines that need as little. Controls have
passages shuffled, demonstrations of another task, a share of wrong pairs, or other wordings of the instruction.
Rankings are exact, by cosine and fused with BM25 as `epic-rag query` fuses them.

Texts are encoded once for all methods and draws. With a folder for vectors, a run that was stopped continues with the
next task, and a second run takes minutes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from epic_rag.errors import DataError
from epic_rag.evaluation.datasets import find_local_sets, set_kind
from epic_rag.evaluation.embedding_store import EmbeddingStore
from epic_rag.evaluation.few_shot_collections import CollectionFamily, TaskVectors, families_of_tasks
from epic_rag.evaluation.few_shot_methods import moved_queries, scores_in_collection
from epic_rag.evaluation.few_shot_report import WORDINGS, Control, FewShotCell, FewShotReport, FewShotRequest
from epic_rag.evaluation.few_shot_tasks import (
    SOURCE_MARK,
    few_shot_task_of_pairs,
    few_shot_task_of_set,
    parse_pairs_source,
)
from epic_rag.evaluation.heldout import (
    Collection,
    HeldoutSplit,
    InstructionSource,
    with_instruction,
)
from epic_rag.files import write_atomically
from epic_rag.reader import DemonstrationReader

__all__ = ["evaluate_few_shot", "load_few_shot_tasks"]

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]
_SPARE = 200
_WORDING_SIZES = (8, 128)
_LEAST_FOR_WRONG = 8


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
        names: Sets in it, `NAME` or `NAME#PREFIX`; None for all of labels, documents or candidates.
        queries: Most test queries of a task.
        documents: Documents of a task, if it has as many.
        sizes: Numbers of demonstrations; pools hold a few more than the largest.
        instruction: Origin of the queries' instruction.
        default_instruction: The checkpoint's.
        seed: Seed of the splits.

    Raises:
        DataError: A file or set is missing, malformed or too small.
    """
    limits: dict[str, int] = {"queries": queries, "documents": documents, "pool": max(sizes) + _SPARE, "seed": seed}
    tasks = []
    for each in pairs:
        path, source = parse_pairs_source(str(each))
        tasks.append(few_shot_task_of_pairs(path, source, **limits))
    if data is not None:
        known = [name for name in find_local_sets(data) if set_kind(data / name) != "sts"]
        for each in known if names is None else names:
            name, mark, prefix = each.partition(SOURCE_MARK)
            tasks.append(few_shot_task_of_set(data / name, prefix if mark else None, **limits))
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
        store: The model's vectors; results of finished tasks are kept in its folder, too.
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
        vectors.append(TaskVectors(store, task))
        progress(f"{task.name}: embedded ({time.monotonic() - started:.0f} s)")
    report = FewShotReport(request, model=store.revision, tasks=[_describe(task) for task in tasks])
    readers = {"reader": reader or DemonstrationReader.universal(), "universal": DemonstrationReader.universal()}
    results = _Results(store.folder)
    using = {"reader-against", *readers}
    arms = list(_arms(request, trained=readers["reader"].kind == "trained"))
    families_of = families_of_tasks(vectors, request.collections, bm25=request.bm25)
    for number, (known, families) in enumerate(zip(vectors, families_of, strict=True)):
        for family in families:
            for collection, ranking in family.rankings.items():
                for kind, values in ranking.zero.items():
                    report.zero_shot[f"{known.split.name}/{collection}/{kind}"] = float(100 * values.mean())
        foreign = vectors[(number + 1) % len(vectors)]
        for method, control in arms:
            for n in (n for n in request.sizes if _is_possible(control, n, known, foreign)):
                # Moved queries are the same in all collections.
                moved = cache(partial(_moved, method, control, n, known, foreign, readers, request.seed))
                for family in families:
                    facts = [
                        *_facts(store, request, family, report.tasks, number),
                        report.tasks[(number + 1) % len(vectors)] if control == "foreign" else None,
                        readers[method.removesuffix("-against")].fingerprint if method in using else None,
                    ]
                    report.cells += results.get(
                        f"{known.split.name}-{method}-{control}-{n}",
                        facts,
                        partial(_score_arm, method, control, n, known, family, moved, readers["reader"], request.draws),
                    )
        for family in families if request.wordings else ():
            facts = [*_facts(store, request, family, report.tasks, number), readers["reader"].fingerprint]
            report.cells += results.get(
                f"{known.split.name}-wordings",
                facts,
                partial(_score_wordings, store, known, family, readers["reader"], request),
            )
        progress(f"{known.split.name}: scored ({time.monotonic() - started:.0f} s)")
    report.seconds = time.monotonic() - started
    return report


_VERSION = 4
"""Version of the methods: another one discards stored results."""


def _facts(
    store: EmbeddingStore,
    request: FewShotRequest,
    family: CollectionFamily,
    tasks: Sequence[Mapping[str, object]],
    number: int,
) -> list[object]:
    """Return what decides the cells of a task in a collection: mixed ones hold the documents of all tasks."""
    documents = tasks[number] if "own" in family.rankings else tasks
    settings = [request.draws, request.seed, request.bm25, list(family.rankings)]
    return [_VERSION, store.revision, settings, tasks[number], documents]


class _Results:
    """Cells that are computed once and kept in a folder.

    Args:
        folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / "few-shot"

    def get(self, name: str, facts: Sequence[object], compute: Callable[[], list[FewShotCell]]) -> list[FewShotCell]:
        """Return stored cells, or compute and store them.

        Args:
            name: First part of the file's name.
            facts: Everything that decides the cells.
            compute: Called if they are not stored.
        """
        digest = hashlib.sha256(json.dumps(facts, default=repr, sort_keys=True).encode()).hexdigest()
        path = None if self._folder is None else self._folder / f"{name}-{digest[:16]}.json"
        if path is not None and path.is_file():
            try:
                return [
                    FewShotCell(**{**cell, "gains": tuple(cell["gains"]), "by_draw": tuple(cell["by_draw"])})
                    for cell in json.loads(path.read_text(encoding="utf-8"))
                ]
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("Results in %s cannot be read (%s). They are computed again.", path, error)
        cells = compute()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps([dataclasses.asdict(cell) for cell in cells]))
        return cells


def _is_possible(control: Control, n: int, known: TaskVectors, foreign: TaskVectors) -> bool:
    """Return whether there are enough demonstrations."""
    if control == "foreign" and (foreign is known or n > len(foreign.pairs)):
        return False
    return n <= len(known.pairs) and (n >= _LEAST_FOR_WRONG or not control.startswith("wrong"))


def _moved(
    method: str,
    control: Control,
    n: int,
    known: TaskVectors,
    foreign: TaskVectors,
    readers: Mapping[str, DemonstrationReader],
    seed: int,
    draw: int,
) -> tuple[Vectors | None, Vectors, npt.NDArray[np.intp]]:
    """Return the moved queries of a draw (None: they depend on the collection), its demonstrations and their rows."""
    pairs, rows = _demonstrations(known, foreign, control, n, seed + draw)
    return moved_queries(method, readers, known.queries, pairs), pairs, rows


def _score_arm(
    method: str,
    control: Control,
    n: int,
    known: TaskVectors,
    family: CollectionFamily,
    moved: Callable[[int], tuple[Vectors | None, Vectors, npt.NDArray[np.intp]]],
    reader: DemonstrationReader,
    draws: int,
) -> list[FewShotCell]:
    """Score a method by n demonstrations of one task in collections that share documents."""
    gains: dict[tuple[Collection, str], list[npt.NDArray[np.float64]]] = {}
    documents = family.documents.documents
    for draw in range(draws):
        queries, pairs, rows = moved(draw)
        ranked: Iterable[tuple[Collection, dict[str, npt.NDArray[np.float64]]]]
        if queries is not None:
            ranked = family.ndcg(queries.astype(np.float32) @ documents.T)
        elif method == "reader-against":
            ranked = _ranked_against(reader, known.queries, pairs, family)
        else:
            place = next(iter(family.rankings.values())).place
            placed = np.where(rows < 0, -1, place[rows])
            ranked = family.ndcg(scores_in_collection(method, known.queries, pairs, placed, family.documents))
        for collection, found in ranked:
            for kind, values in found.items():
                zero = family.rankings[collection].zero[kind]
                gains.setdefault((collection, kind), []).append(100 * (values - zero))
    return [
        _cell(known.split.name, collection, kind, method, control, n, each)
        for (collection, kind), each in gains.items()
    ]


def _ranked_against(
    reader: DemonstrationReader, queries: Vectors, pairs: Vectors, family: CollectionFamily
) -> Iterable[tuple[Collection, dict[str, npt.NDArray[np.float64]]]]:
    """Yield each collection's nDCG@10 of queries that are moved by demonstrations prepared against it."""
    for collection, ranking in family.rankings.items():
        documents = family.documents.documents[: ranking.documents]
        moved = reader.prepare(pairs, documents).apply(queries)
        yield collection, family.ndcg_in(collection, moved @ documents.T)


def _score_wordings(
    store: EmbeddingStore,
    known: TaskVectors,
    family: CollectionFamily,
    reader: DemonstrationReader,
    request: FewShotRequest,
) -> list[FewShotCell]:
    """Score the reader, and zero-shot (n = 0, minus zero-shot with the task's instruction), with other wordings."""
    sizes = [n for n in _WORDING_SIZES if n <= len(known.pairs)]
    used = {int(row) for draw in range(request.draws) for row in known.draw(max(sizes, default=0), request.seed + draw)}
    documents = family.documents.documents
    cells = []
    for number, wording in enumerate(WORDINGS, start=1):
        other = TaskVectors(store, dataclasses.replace(known.split, instruction=wording), sorted(used))
        zero = {name: found["dense"] for name, found in family.ndcg(other.queries @ documents.T)}
        gains = {(name, 0): [100 * (values - family.rankings[name].zero["dense"])] for name, values in zero.items()}
        for n in sizes:
            for draw in range(request.draws):
                moved = reader.prepare(other.pairs[other.draw(n, request.seed + draw)]).apply(other.queries)
                for name, found in family.ndcg(moved @ documents.T):
                    gains.setdefault((name, n), []).append(100 * (found["dense"] - zero[name]))
        cells += [
            _cell(known.split.name, name, "dense", f"wording-{number}", "none", n, each)
            for (name, n), each in gains.items()
        ]
    return cells


def _cell(
    task: str,
    collection: Collection,
    ranking: str,
    method: str,
    control: Control,
    n: int,
    gains: Sequence[npt.NDArray[np.float64]],
) -> FewShotCell:
    table = np.stack(gains)
    by_query, by_draw = tuple(map(float, table.mean(axis=0))), tuple(map(float, table.mean(axis=1)))
    return FewShotCell(task, collection, ranking, method, control, n, by_query, by_draw)


def _arms(request: FewShotRequest, *, trained: bool) -> Iterable[tuple[str, Control]]:
    # Without a trained reader, "reader" is the universal one.
    yield from ((method, "none") for method in request.methods if trained or method != "universal")
    controlled = "reader-against" if "reader-against" in request.methods else "reader"
    yield from ((controlled, control) for control in request.controls if control != "none")


def _demonstrations(
    known: TaskVectors, foreign: TaskVectors, control: Control, n: int, seed: int
) -> tuple[Vectors, npt.NDArray[np.intp]]:
    """Draw n demonstrations: (n, 3, dim), and the rows of their passages among the task's documents (-1: none)."""
    if control == "foreign":
        rows = foreign.draw(n, seed)
        return foreign.pairs[rows], np.full(n, -1)
    rows = known.draw(n, seed)
    pairs, places = known.pairs[rows].copy(), known.passage_rows[rows].copy()
    if control == "shuffled":
        if n == 1:
            spare = known.draw(len(known.pairs), seed)[-1:]
            pairs[:, 1] = known.pairs[spare, 1]
            return pairs, known.passage_rows[spare]
        wrong = np.arange(n)
    else:
        wrong = np.arange(max(2, round({"wrong-10": 0.1, "wrong-25": 0.25}.get(control, 0.0) * n)))
    if control != "none":
        pairs[wrong, 1] = np.roll(pairs[wrong, 1], 1, axis=0)
        places[wrong] = np.roll(places[wrong], 1)
    return pairs, places


def _describe(task: HeldoutSplit) -> dict[str, object]:
    return {
        "name": task.name,
        "instruction": task.instruction,
        "queries": len(task.queries),
        "documents": len(task.documents),
        "pool": len(task.pool),
        "other_queries": len(task.other_queries),
        "revision": task.revision,
    }
