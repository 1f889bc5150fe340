"""Evaluation: mteb's tasks and metrics over local folders, held-out files of training pairs, and ablations.

    epic-rag eval --data FOLDER --model epic-minilm --num-demonstrations 0,8
    epic-rag ablate GRID.yaml

`runner` runs an evaluation; it uses `datasets` (local sets), `heldout` (tests made of pairs), `mteb`, `bm25` and
`report`. `embedding_store` caches vectors for all of them. `ablation` trains and scores the arms of a grid. Only the
module `mteb` imports mteb (`pip install 'epic-rag[eval]'`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epic_rag.evaluation.ablation import AblationGrid, AblationReport, load_grid, run_ablation
    from epic_rag.evaluation.datasets import LocalSet, find_local_sets, load_local_set
    from epic_rag.evaluation.embedding_store import EmbeddingStore
    from epic_rag.evaluation.heldout import HeldoutResult, HeldoutSplit, make_split, score_heldout
    from epic_rag.evaluation.mteb import EpicMtebEncoder, make_task
    from epic_rag.evaluation.report import EvaluationReport
    from epic_rag.evaluation.runner import EvaluationRequest, ModelSpec, run_evaluation

# Resolved on first use: mteb takes seconds to import and need not be installed.
_MODULES = {
    "ablation": ["AblationGrid", "AblationReport", "load_grid", "run_ablation"],
    "datasets": ["LocalSet", "find_local_sets", "load_local_set"],
    "embedding_store": ["EmbeddingStore"],
    "heldout": ["HeldoutResult", "HeldoutSplit", "make_split", "score_heldout"],
    "mteb": ["EpicMtebEncoder", "make_task"],
    "report": ["EvaluationReport"],
    "runner": ["EvaluationRequest", "ModelSpec", "run_evaluation"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AblationGrid",
    "AblationReport",
    "EmbeddingStore",
    "EpicMtebEncoder",
    "EvaluationReport",
    "EvaluationRequest",
    "HeldoutResult",
    "HeldoutSplit",
    "LocalSet",
    "ModelSpec",
    "find_local_sets",
    "load_grid",
    "load_local_set",
    "make_split",
    "make_task",
    "run_ablation",
    "run_evaluation",
    "score_heldout",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
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
