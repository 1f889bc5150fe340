"""The way of an evaluation run: models, sets and held-out files in, one report out."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path

from epic_rag.evaluation.bm25 import require_bm25
from epic_rag.evaluation.catalogue import SYMMETRIC_PAIRS
from epic_rag.evaluation.collection import in_collection
from epic_rag.evaluation.heldout import HeldoutSplit, make_split
from epic_rag.evaluation.pairs import file_stem
from epic_rag.evaluation.report import EvaluationReport
from epic_rag.evaluation.request import EvaluationRequest
from epic_rag.evaluation.scorers import Scorer, load_scorer
from epic_rag.evaluation.set_plans import PlannedSet, plan_sets

__all__ = ["run_evaluation"]

Progress = Callable[[str], None]
OnUpdate = Callable[[EvaluationReport], None]


def run_evaluation(
    request: EvaluationRequest, *, progress: Progress | None = None, on_update: OnUpdate | None = None
) -> EvaluationReport:
    """Evaluate models on evaluation sets and held-out files.

    Everything is read and checked before the first text is encoded. A model's documents are encoded once,
    however many values of k, collections and instructions there are.

    Args:
        request: What to do.
        progress: Called with one line of text for each step.
        on_update: Called with the report after each new result, for example to write it.

    Returns:
        The report.

    Raises:
        EpicError: Data, models or settings that cannot work; a package is missing that a set or BM25 needs.
    """
    say = progress or (lambda line: None)
    started = time.monotonic()
    report = EvaluationReport(
        settings=request.record(),
        command=request.command,
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )

    def updated() -> None:
        report.seconds = time.monotonic() - started
        if on_update is not None:
            on_update(report)

    if any(spec.mode == "bm25" for spec in request.models):
        require_bm25()
    planned = plan_sets(request)
    collections = _make_splits(request)
    for spec in request.models:
        scorer = load_scorer(spec, request)
        record = scorer.record
        say(f"{record.label}: loaded, fingerprint {record.fingerprint}{', plain' if record.plain else ''}")
        report.models.append(record)
        _score_sets(scorer, planned, report, say, updated)
        for splits in collections:
            _score_splits(scorer, splits, report, say, updated)
    updated()
    return report


def _score_sets(
    scorer: Scorer, planned: list[PlannedSet], report: EvaluationReport, say: Progress, updated: Callable[[], None]
) -> None:
    for item in planned:
        for k in scorer.values_of_k(item):
            score = scorer.score_set(item, k)
            report.sets.append(score)
            say(f"{scorer.record.label}, {item.name}, k = {k}: {100 * score.score:.2f} ({score.seconds:.0f} s)")
            updated()


def _score_splits(
    scorer: Scorer, splits: list[HeldoutSplit], report: EvaluationReport, say: Progress, updated: Callable[[], None]
) -> None:
    """Score one collection's files; another task's demonstrations are those of the next file."""
    label = scorer.record.label
    for number, split in enumerate(splits):
        foreign = splits[(number + 1) % len(splits)].pool if len(splits) > 1 else None
        for result in scorer.score_split(split, foreign):
            report.heldout.append((label, result))
            best = ", ".join(f"k = {s.k} {s.condition} {100 * s.ndcg_at_10:.2f}" for s in result.scores)
            where = f"{split.collection}, instruction {result.instruction_source}"
            say(f"{label}, {split.name} ({where}): {best} ({result.seconds:.0f} s)")
            updated()


def _make_splits(request: EvaluationRequest) -> list[list[HeldoutSplit]]:
    """The held-out files' tests, in each of the collections."""
    splits = [_make_split(path, request) for path in request.heldout]
    return [in_collection(splits, collection) for collection in request.heldout_collections] if splits else []


def _make_split(path: Path, request: EvaluationRequest) -> HeldoutSplit:
    name = file_stem(path)
    return make_split(
        path,
        queries=request.heldout_queries,
        documents=request.heldout_documents,
        seed=request.seed,
        instruction=request.instructions.get(name),
        symmetric=name in SYMMETRIC_PAIRS,
    )
