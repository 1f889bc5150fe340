"""epic-rag: few-shot retrieval with demonstrations as embeddings (EPIC, arXiv 2605.01372)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epic_rag.checkpoints import CheckpointInfo, list_checkpoints
    from epic_rag.demonstrations import Demonstration, DemonstrationBank
    from epic_rag.encoder import EpicEncoder
    from epic_rag.errors import (
        BankError,
        CheckpointError,
        ConfigError,
        DataError,
        EpicError,
        FingerprintError,
        MissingExtraError,
        PromptError,
        RemoteModelError,
        TaskError,
        TrainingError,
    )
    from epic_rag.query_prompt import QueryPrompt
    from epic_rag.tasks import Task, get_task, list_tasks

__version__ = "0.1.0"

# Names are resolved on first use, so that `import epic_rag` (and every `--help`) costs no torch.
_HOMES = {
    "CheckpointInfo": "epic_rag.checkpoints",
    "Demonstration": "epic_rag.demonstrations",
    "DemonstrationBank": "epic_rag.demonstrations",
    "EpicEncoder": "epic_rag.encoder",
    "QueryPrompt": "epic_rag.query_prompt",
    "Task": "epic_rag.tasks",
    "get_task": "epic_rag.tasks",
    "list_checkpoints": "epic_rag.checkpoints",
    "list_tasks": "epic_rag.tasks",
}

__all__ = [
    "BankError",
    "CheckpointError",
    "CheckpointInfo",
    "ConfigError",
    "DataError",
    "Demonstration",
    "DemonstrationBank",
    "EpicEncoder",
    "EpicError",
    "FingerprintError",
    "MissingExtraError",
    "PromptError",
    "QueryPrompt",
    "RemoteModelError",
    "Task",
    "TaskError",
    "TrainingError",
    "__version__",
    "get_task",
    "list_checkpoints",
    "list_tasks",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'epic_rag' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "epic_rag.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
