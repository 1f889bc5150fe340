"""Evaluation: mteb's tasks and metrics over local folders, and held-out files of training pairs.

    epic-rag eval --data FOLDER --model epic-minilm --num-demonstrations 0,8
    python -m epic_rag.evaluation --help
    epic-rag ablate GRID.yaml

Arrows point one way: runner -> {scorers, set_plans, collection} -> {mteb_runs, heldout_scores, report} ->
{embedding, bm25, prompts, heldout, pairs, local_sets}. ablation -> {plots, ablation_report} ->
ablation_arms -> {training, ablation_scores, ablation_grid}. Only the modules called mteb_... import mteb
(`pip install 'epic-rag[eval]'`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epic_rag.evaluation.ablation import AblationGrid, AblationReport, load_grid, run_ablation
    from epic_rag.evaluation.datasets import LocalSet, find_local_sets, load_local_set
    from epic_rag.evaluation.efficiency import EfficiencyReport, measure_queries
    from epic_rag.evaluation.embedding import EmbeddingStore, QueryPrompt
    from epic_rag.evaluation.heldout import HeldoutResult, HeldoutSplit, make_split, score_heldout
    from epic_rag.evaluation.mteb import EpicMtebEncoder, make_task
    from epic_rag.evaluation.report import EvaluationReport
    from epic_rag.evaluation.runner import EvaluationRequest, ModelSpec, run_evaluation
    from epic_rag.evaluation.training_cost import measure_training

# Resolved on first use: mteb takes seconds to import and need not be installed.
_HOMES = {
    "AblationGrid": "ablation",
    "AblationReport": "ablation",
    "EfficiencyReport": "efficiency",
    "EmbeddingStore": "embedding",
    "EpicMtebEncoder": "mteb",
    "EvaluationReport": "report",
    "EvaluationRequest": "runner",
    "HeldoutResult": "heldout",
    "HeldoutSplit": "heldout",
    "LocalSet": "datasets",
    "ModelSpec": "runner",
    "QueryPrompt": "embedding",
    "find_local_sets": "datasets",
    "load_grid": "ablation",
    "load_local_set": "datasets",
    "make_split": "heldout",
    "make_task": "mteb",
    "measure_queries": "efficiency",
    "measure_training": "training_cost",
    "run_ablation": "ablation",
    "run_evaluation": "runner",
    "score_heldout": "heldout",
}

__all__ = [
    "AblationGrid",
    "AblationReport",
    "EfficiencyReport",
    "EmbeddingStore",
    "EpicMtebEncoder",
    "EvaluationReport",
    "EvaluationRequest",
    "HeldoutResult",
    "HeldoutSplit",
    "LocalSet",
    "ModelSpec",
    "QueryPrompt",
    "find_local_sets",
    "load_grid",
    "load_local_set",
    "make_split",
    "make_task",
    "measure_queries",
    "measure_training",
    "run_ablation",
    "run_evaluation",
    "score_heldout",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("mteb", "datasets"):
            raise
        from epic_rag.errors import MissingExtraError

        raise MissingExtraError("mteb", "eval", name) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
