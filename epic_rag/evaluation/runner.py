"""The way of an evaluation run: models, sets and held-out files in, one report out."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from epic_rag.errors import DataError, MissingExtraError
from epic_rag.evaluation.catalogue import SYMMETRIC_PAIRS, entry_for
from epic_rag.evaluation.embedding import EmbeddingStore
from epic_rag.evaluation.heldout import HeldoutSplit, file_stem, make_split
from epic_rag.evaluation.heldout_scores import score_heldout
from epic_rag.evaluation.local_sets import LocalSet, find_local_sets, load_local_set
from epic_rag.evaluation.prompts import PromptPlan, load_demonstrations, plan_prompts
from epic_rag.evaluation.report import EvaluationReport, ModelRecord, SetScore
from epic_rag.evaluation.request import EvaluationRequest, ModelSpec

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from epic_rag.encoder import EpicEncoder

__all__ = ["run_evaluation"]

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
OnUpdate = Callable[[EvaluationReport], None]


@dataclass(frozen=True)
class _Planned:
    """An evaluation set that is ready to run; `local` is None for a task of the hub."""

    name: str
    kind: str
    local: LocalSet | None
    plan: PromptPlan


def run_evaluation(
    request: EvaluationRequest, *, progress: Progress | None = None, on_update: OnUpdate | None = None
) -> EvaluationReport:
    """Evaluate models on evaluation sets and held-out files.

    Everything is read and checked before the first text is encoded. A model's documents are encoded once,
    however many values of k there are.

    Args:
        request: What to do.
        progress: Called with one line of text for each step.
        on_update: Called with the report after each new result, for example to write it.

    Returns:
        The report.

    Raises:
        EpicError: Data, models or settings that cannot work; mteb is missing and a set was asked for.
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

    planned = _plan_sets(request)
    splits = _make_splits(request)
    for spec in request.models:
        encoder, plain = _load(spec, request)
        say(f"{spec.label}: loaded, fingerprint {encoder.fingerprint}{', plain' if plain else ''}")
        record = _model_record(spec, encoder, plain)
        report.models.append(record)
        store = EmbeddingStore(
            encoder,
            folder=request.cache_dir,
            precision=record.dtype,
            batch_size=request.batch_size,
            show_progress=sys.stderr.isatty(),
        )
        for item in planned:
            for k in _values_of_k(request, item, plain):
                score = _score_set(item, store, spec, k, request, plain)
                report.sets.append(score)
                say(f"{spec.label}, {item.name}, k = {k}: {100 * score.score:.2f} ({score.seconds:.0f} s)")
                updated()
        for number, split in enumerate(splits):
            foreign = splits[(number + 1) % len(splits)].pool if len(splits) > 1 else None
            result = score_heldout(
                store,
                split,
                ks=request.num_demonstrations,
                draws=request.draws,
                controls=request.controls,
                foreign_pool=foreign,
                plain=plain,
                strategy=request.strategy,
            )
            report.heldout.append((spec.label, result))
            best = ", ".join(f"k = {s.k} {s.condition} {100 * s.ndcg_at_10:.2f}" for s in result.scores)
            say(f"{spec.label}, {split.name}: {best} ({result.seconds:.0f} s)")
            updated()
    updated()
    return report


def _load(spec: ModelSpec, request: EvaluationRequest) -> tuple[EpicEncoder, bool]:
    """A model, and whether its queries go bare."""
    from epic_rag.encoder import EpicEncoder

    encoder = EpicEncoder.from_pretrained(
        spec.source,
        device=request.device,
        dtype=request.dtype,
        max_document_tokens=request.max_document_tokens,
    )
    plain = spec.mode == "plain" or (spec.mode == "auto" and not encoder.settings.get("training"))
    if plain and spec.mode == "auto":
        logger.info("%s has no training record: no instructions and no demonstrations for it", spec.label)
    return encoder, plain


def _model_record(spec: ModelSpec, encoder: EpicEncoder, plain: bool) -> ModelRecord:
    return ModelRecord(
        label=spec.label,
        source=spec.source,
        fingerprint=encoder.fingerprint,
        dimension=encoder.dimension,
        plain=plain,
        max_query_tokens=encoder.max_query_tokens,
        max_document_tokens=encoder.max_document_tokens,
        device=str(encoder.device),
        dtype=str(encoder.dtype).removeprefix("torch."),
    )


def _plan_sets(request: EvaluationRequest) -> list[_Planned]:
    """Read the sets and settle their prompts."""
    available = find_local_sets(request.data) if request.data is not None else []
    names = available if request.tasks is None else list(dict.fromkeys(request.tasks))
    if request.tasks is None and request.data is not None and not available:
        raise DataError(f"{request.data} holds no evaluation set; give --data the folder that holds the sets' folders")
    if names:
        _require_mteb()
    max_k = max(request.num_demonstrations)
    planned = []
    for name in names:
        if request.data is not None and name in available:
            local = load_local_set(request.data / name)
            plan = plan_prompts(
                local,
                entry_for(name, local.kind),
                max_k=max_k,
                instructions=request.instructions,
                banks=request.banks,
                seed=request.seed,
            )
            planned.append(_Planned(name, local.kind, local, plan))
        else:
            planned.append(_plan_hub_task(name, request, max_k))
    for item in planned:
        if item.plan.source is None and max_k > 0:
            logger.warning(
                "%s has no demonstrations to show and is scored at k = 0 alone; --bank %s=SOURCE names some",
                item.name,
                item.name,
            )
        elif item.plan.source is not None:
            item.plan.prompt(max_k)  # says now, and not in an hour, that there are too few
    return planned


def _plan_hub_task(name: str, request: EvaluationRequest, max_k: int) -> _Planned:
    from epic_rag.evaluation.mteb_runs import hub_instruction, hub_task

    task = hub_task(name)
    instruction = request.instructions.get(name) or hub_instruction(task)
    plan = PromptPlan(instruction)
    if name in request.banks and max_k > 0:
        found = load_demonstrations(request.banks[name], None, count=max_k, seed=request.seed)
        plan = PromptPlan(instruction, found.source, found.demonstrations, found.symmetric)
    return _Planned(name, task.metadata.type.lower(), None, plan)


def _require_mteb() -> None:
    try:
        import mteb  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("mteb", "eval", "evaluating on retrieval, STS and other sets") from error


def _make_splits(request: EvaluationRequest) -> list[HeldoutSplit]:
    return [_make_split(path, request) for path in request.heldout]


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


def _values_of_k(request: EvaluationRequest, item: _Planned, plain: bool) -> list[int]:
    if plain:
        return [0]
    return [k for k in request.num_demonstrations if k == 0 or item.plan.source is not None]


def _new_task(item: _Planned) -> AbsTask:
    from epic_rag.evaluation.mteb_runs import hub_task
    from epic_rag.evaluation.mteb_tasks import make_task

    return make_task(item.local) if item.local is not None else hub_task(item.name)


def _score_set(
    item: _Planned, store: EmbeddingStore, spec: ModelSpec, k: int, request: EvaluationRequest, plain: bool
) -> SetScore:
    from epic_rag.evaluation.mteb_runs import run_task

    started = time.monotonic()
    task = _new_task(item)
    prompt = item.plan.prompt(k, plain=plain, strategy=request.strategy)
    score, numbers = run_task(task, store, prompt, model_name=spec.label, output=request.mteb_output)
    return SetScore(
        model=spec.label,
        set_name=item.name,
        kind=item.kind,
        revision=str(task.metadata.revision),
        metric=task.metadata.main_score,
        k=k,
        score=score,
        instruction=prompt.instruction,
        demonstrations=item.plan.source if k else None,
        prompt=prompt.fingerprint,
        scores=numbers,
        seconds=time.monotonic() - started,
    )
