"""Two small tasks, a configuration of a run over them, and the command in this process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from epic_rag.training import TrainingConfig
from epic_rag_cli.main import run

WORDS = ["cat", "dog", "pen", "cup", "hat", "sun", "map", "key", "box", "jar", "fox", "owl", "ant", "bee", "elm", "oak"]


@dataclass(frozen=True)
class Result:
    """What a call of the command left behind."""

    status: int
    out: str
    err: str


def write_task(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(name="write_task")
def _write_task() -> Callable[..., Path]:
    """Write a file of rows: (folder, name, rows)."""
    return write_task


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the tasks `up` and `down`, 16 rows each, and their instructions."""
    folder = tmp_path / "data"
    write_task(folder, "up", [{"query": word, "positive": f"+ {word}"} for word in WORDS])
    write_task(folder, "down", [{"query": word, "positive": f"- {word}", "negatives": ["0"]} for word in WORDS])
    (folder / "instructions.json").write_text('{"up": "Go up", "down": "Go down"}', encoding="utf-8")
    return folder


@pytest.fixture
def settings(tmp_path: Path, data: Path, tiny_checkpoint: Path) -> Callable[..., dict[str, Any]]:
    """Plain values of a run of six steps over both tasks, with changes."""

    def make(**changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "model": str(tiny_checkpoint),
            "output": str(tmp_path / "run"),
            "data": str(data),
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
        return {**values, **changes}

    return make


@pytest.fixture
def config(settings: Callable[..., dict[str, Any]]) -> Callable[..., TrainingConfig]:
    """The same as a configuration."""
    return lambda **changes: TrainingConfig.from_dict(settings(**changes))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command in this process, without the variables of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("EPIC_RAG_")]:
        monkeypatch.delenv(name)

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call
