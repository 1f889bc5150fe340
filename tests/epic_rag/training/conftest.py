"""Two small tasks, a configuration of a run over them, and the command in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from epic_rag.training import TrainingConfig
from epic_rag_cli.main import run
from tests.helpers.training import WORDS, run_values, write_task


@dataclass(frozen=True)
class Result:
    """What a call of the command left behind."""

    status: int
    out: str
    err: str


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
        return {**run_values(tiny_checkpoint, tmp_path), **changes}

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
