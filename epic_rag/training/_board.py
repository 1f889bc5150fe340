"""Metrics for TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epic_rag.errors import MissingExtraError

__all__ = ["Board", "require_tensorboard"]


def require_tensorboard() -> None:
    """Raise unless TensorBoard is installed.

    Raises:
        MissingExtraError: It is not.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "train", "the setting tensorboard")


class Board:
    """Writes what `metrics.jsonl` has.

    Args:
        folder: For TensorBoard's files; made if it is missing.
        step: The step that the run goes on from; what an earlier stretch wrote after it is not shown.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add a line of `metrics.jsonl`: numbers of a step under `training/`, of an evaluation under `ndcg@10/`."""
        step = int(entry["step"])
        for task, scores in entry.get("evaluation", {}).items():
            for k, value in scores.items():
                self._scalar(f"ndcg@10/{task}/{k}", value, step)
        for name, value in entry.items():
            if name not in ("step", "evaluation"):
                self._scalar(f"training/{name}", value, step)

    def close(self) -> None:
        """Write what is not on disk yet."""
        self._writer.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)
