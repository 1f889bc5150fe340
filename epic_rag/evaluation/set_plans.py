"""Which evaluation sets a run scores, and the prompt of each; read and checked before any model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from epic_rag.errors import DataError, MissingExtraError
from epic_rag.evaluation.catalogue import entry_for
from epic_rag.evaluation.local_sets import LocalSet, find_local_sets, load_local_set, set_kind
from epic_rag.evaluation.prompts import PromptPlan, load_demonstrations, plan_prompts
from epic_rag.evaluation.request import EvaluationRequest

__all__ = ["PlannedSet", "plan_sets"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedSet:
    """An evaluation set that is ready to run.

    Args:
        name: The set.
        kind: What is measured.
        local: Its contents; None for a task of the hub.
        plan: Its instruction and demonstrations.
    """

    name: str
    kind: str
    local: LocalSet | None
    plan: PromptPlan


def plan_sets(request: EvaluationRequest) -> list[PlannedSet]:
    """Read the sets of a request and settle their prompts.

    Returns:
        Sets that were named, in this order; otherwise all of the folder, in the order of `find_local_sets`.

    Raises:
        DataError: There is no set, none of the wanted kinds, or a file is malformed.
        MissingExtraError: mteb is missing.
        PromptError: A set has fewer demonstrations than were asked.
        TaskError: A name is neither a local set nor a task of mteb.
    """
    available = find_local_sets(request.data) if request.data is not None else []
    names = available if request.tasks is None else list(dict.fromkeys(request.tasks))
    if request.tasks is None and request.data is not None and not available:
        raise DataError(f"{request.data} holds no evaluation set; give --data the folder that holds the sets' folders")
    if names:
        _require_mteb()
    planned = []
    for name in names:
        folder = request.data / name if request.data is not None and name in available else None
        item = _plan_hub_task(name, request) if folder is None else _plan_local_set(folder, request)
        if item is not None:
            planned.append(item)
    if names and not planned:
        raise DataError(
            f"none of {', '.join(names)} is of the kinds {', '.join(request.kinds or ())}; "
            "name others with --kinds or --tasks"
        )
    _check_demonstrations(planned, max(request.num_demonstrations))
    return planned


def _check_demonstrations(planned: Sequence[PlannedSet], max_k: int) -> None:
    for item in planned:
        if item.plan.source is None and max_k > 0:
            logger.warning(
                "%s has no demonstrations to show and is scored at k = 0 alone; --bank %s=SOURCE names some",
                item.name,
                item.name,
            )
        elif item.plan.source is not None:
            item.plan.prompt(max_k)  # says now, and not in an hour, that there are too few


def _plan_local_set(folder: Path, request: EvaluationRequest) -> PlannedSet | None:
    """A folder's plan; None for one of a kind that is not wanted, which is not read."""
    if request.kinds is not None and set_kind(folder) not in request.kinds:
        return None
    local = load_local_set(folder)
    plan = plan_prompts(
        local,
        entry_for(local.name, local.kind),
        max_k=max(request.num_demonstrations),
        instructions=request.instructions,
        banks=request.banks,
        seed=request.seed,
    )
    return PlannedSet(local.name, local.kind, local, plan)


def _plan_hub_task(name: str, request: EvaluationRequest) -> PlannedSet | None:
    from epic_rag.evaluation.mteb_runs import hub_instruction, hub_task

    task = hub_task(name)
    kind = task.metadata.type.lower()
    if request.kinds is not None and kind not in request.kinds:
        return None
    instruction = request.instructions.get(name) or hub_instruction(task)
    plan = PromptPlan(instruction)
    max_k = max(request.num_demonstrations)
    if name in request.banks and max_k > 0:
        found = load_demonstrations(request.banks[name], None, count=max_k, seed=request.seed)
        plan = PromptPlan(instruction, found.source, found.demonstrations, found.symmetric)
    return PlannedSet(name, kind, None, plan)


def _require_mteb() -> None:
    try:
        import mteb  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("mteb", "eval", "evaluating on retrieval, STS and other sets") from error
