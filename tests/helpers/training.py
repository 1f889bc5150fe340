"""Small tasks and configurations for tests of training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

WORDS = ["cat", "dog", "pen", "cup", "hat", "sun", "map", "key", "box", "jar", "fox", "owl", "ant", "bee", "elm", "oak"]


def write_task(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a file of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def run_values(model: Path, folder: Path) -> dict[str, Any]:
    """Return plain values of a run of six steps over the tasks `up` and `down`, with `data/` and `run/` in a folder."""
    return {
        "model": str(model),
        "output": str(folder / "run"),
        "data": str(folder / "data"),
        "tasks": {"up": {}, "down": {}},
        "steps": 6,
        "batch_size": 8,
        "tasks_per_batch": 2,
        "max_demonstrations": 3,
        "temperature": 0.1,
        "learning_rate": 1e-3,
        "projector_learning_rate": 1e-3,
        "max_query_tokens": 16,
        "max_document_tokens": 16,
        "save_every": 3,
    }
