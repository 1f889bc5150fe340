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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
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
    same = dataclasses.replace(request, sizes=(1,), methods=(), controls=(), wordings=False)
    facts = [same, store.revision, report.tasks]
    baselines = _Results(store.folder, "baselines", facts)
    read = _Results(store.folder, "readers", [*facts, *(each.fingerprint for each in readers.values())])
    arms = list(_arms(request, trained=readers["reader"].kind == "trained"))
    families_of = families_of_tasks(vectors, request.collections, bm25=request.bm25)
    for number, (known, families) in enumerate(zip(vectors, families_of, strict=True)):
        for family in families:
            for collection, ranking in family.rankings.items():
                for kind, values in ranking.zero.items():
                    report.zero_shot[f"{known.split.name}/{collection}/{kind}"] = float(100 * values.mean())
        foreign = vectors[(number + 1) % len(vectors)]
        for method, control in arms:
            results = read if method in readers else baselines
            for n in request.sizes:
                report.cells += results.get(
                    f"{known.split.name}-{method}-{control}-{n}",
                    partial(_score_arm, method, control, n, known, foreign, families, readers, request),
                )
        if request.wordings:
            report.cells += read.get(
                f"{known.split.name}-wordings",
                lambda known=known, families=families: list(
                    _score_wordings(store, known, families, readers["reader"], request)
                ),
            )
        progress(f"{known.split.name}: scored ({time.monotonic() - started:.0f} s)")
    report.seconds = time.monotonic() - started
    return report


class _Results:
    """Cells that are computed once, kept in a folder under a hash of everything that decides them.

    Args:
        folder: None keeps nothing.
        name: First part of the files' names.
        facts: Settings and versions.
    """

    def __init__(self, folder: Path | None, name: str, facts: Sequence[object]) -> None:
        digest = hashlib.sha256(json.dumps([_VERSION, facts], default=repr, sort_keys=True).encode()).hexdigest()
        self._folder = None if folder is None else folder / f"few-shot-{name}-{digest[:16]}"

    def get(self, name: str, compute: Callable[[], list[FewShotCell]]) -> list[FewShotCell]:
        """Return stored cells, or compute and store them."""
        path = None if self._folder is None else self._folder / f"{name}.json"
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


_VERSION = 1
"""Version of the methods: another one discards stored results."""


def _score_arm(
    method: str,
    control: Control,
    n: int,
    known: TaskVectors,
    foreign: TaskVectors,
    families: Sequence[CollectionFamily],
    readers: Mapping[str, DemonstrationReader],
    request: FewShotRequest,
) -> list[FewShotCell]:
    """Score a method by n demonstrations of one task; no cells where there are too few of them."""
    if n > len(known.pairs) or (control == "foreign" and (foreign is known or n > len(foreign.pairs))):
        return []
    if control.startswith("wrong") and n < _LEAST_FOR_WRONG:
        return []
    gains: dict[tuple[Collection, str], list[npt.NDArray[np.float64]]] = {}
    for draw in range(request.draws):
        pairs, rows = _demonstrations(known, foreign, control, n, request.seed + draw)
        moved = moved_queries(method, readers, known.queries, pairs)
        for family in families:
            if moved is not None:
                scores = moved.astype(np.float32) @ family.documents.documents.T
            else:
                place = next(iter(family.rankings.values())).place
                placed = np.where(rows < 0, -1, place[rows])
                scores = scores_in_collection(method, known.queries, pairs, placed, family.documents)
            for collection, found in family.ndcg(scores):
                for kind, values in found.items():
                    zero = family.rankings[collection].zero[kind]
                    gains.setdefault((collection, kind), []).append(100 * (values - zero))
    return [
        _cell(known.split.name, collection, kind, method, control, n, each)
        for (collection, kind), each in gains.items()
    ]


def _score_wordings(
    store: EmbeddingStore,
    known: TaskVectors,
    families: Sequence[CollectionFamily],
    reader: DemonstrationReader,
    request: FewShotRequest,
) -> Iterator[FewShotCell]:
    """Score the reader, and zero-shot (n = 0, minus zero-shot with the task's instruction), with other wordings."""
    sizes = [n for n in _WORDING_SIZES if n <= len(known.pairs)]
    used = {int(row) for draw in range(request.draws) for row in known.draw(max(sizes, default=0), request.seed + draw)}
    for number, wording in enumerate(WORDINGS):
        other = TaskVectors(store, dataclasses.replace(known.split, instruction=wording), sorted(used))
        zero: dict[tuple[Collection, str], npt.NDArray[np.float64]] = {}
        for family in families:
            for collection, found in family.ndcg(other.queries @ family.documents.documents.T):
                zero[collection, "dense"] = found["dense"]
                difference = 100 * (found["dense"] - family.rankings[collection].zero["dense"])
                yield _cell(known.split.name, collection, "dense", f"wording-{number + 1}", "none", 0, [difference])
        for n in sizes:
            gains: dict[Collection, list[npt.NDArray[np.float64]]] = {}
            for draw in range(request.draws):
                moved = reader.prepare(other.pairs[other.draw(n, request.seed + draw)]).apply(other.queries)
                for family in families:
                    for collection, found in family.ndcg(moved @ family.documents.documents.T):
                        gains.setdefault(collection, []).append(100 * (found["dense"] - zero[collection, "dense"]))
            for collection, each in gains.items():
                yield _cell(known.split.name, collection, "dense", f"wording-{number + 1}", "none", n, each)


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
    yield from (("reader", control) for control in request.controls if control != "none")


def _demonstrations(
    known: TaskVectors, foreign: TaskVectors, control: Control, n: int, seed: int
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


def _describe(task: HeldoutSplit) -> dict[str, object]:
    return {
        "name": task.name,
        "instruction": task.instruction,
        "queries": len(task.queries),
        "documents": len(task.documents),
        "pool": len(task.pool),
        "revision": task.revision,
    }
