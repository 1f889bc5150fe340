"""Two processes are the run in one: loss, weights and files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from epic_rag.errors import ConfigError
from epic_rag.training import Trainer, TrainingConfig
from epic_rag.training.distributed import World, init_distributed
from tests.helpers.training import WORDS, run_values, write_task

# Trains every configuration of a file, then runs the command: all in one launch, because importing torch takes long.
PROGRAM = """
import json, sys
from epic_rag.training import Trainer, TrainingConfig
from epic_rag_cli.main import run
for values in json.load(open(sys.argv[1])):
    Trainer(TrainingConfig.from_dict(values)).train(show_progress=False)
sys.exit(run(["train", sys.argv[2]]))
"""

VARIANTS: dict[str, dict[str, Any]] = {
    # Without the zero-shot term the slots are the only way to q0, and half of them are another process's rows.
    "slots": {"zero_shot_weight": 0.0},
    "cached": {"grad_cache": True, "micro_batch_tokens": 60, "evaluation_tasks": ["up", "down"], "evaluate_every": 3},
    "detached": {"detach_demonstrations": True, "hard_negatives": 0},
    "text": {"strategy": "text", "max_grad_norm": 0.1},
    "lora": {"lora_rank": 4},
    "bank": {"demonstration_source": "bank", "bank_size": 4},
    "kept": {"retention_texts": 8, "ema_decay": 0.9, "frozen_layers": 1, "reverse_weight": 0.5},
}
# Few steps at a small rate: Adam divides rounding by rounding where a gradient is next to nothing.
SMALL = {"steps": 3, "learning_rate": 1e-4, "projector_learning_rate": 1e-4}


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A program in two processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("--master-addr=127.0.0.1", f"--master-port={port}", *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@dataclass(frozen=True)
class InTwo:
    """Runs in two processes: their folder, and the launcher's output."""

    folder: Path
    result: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> InTwo:
    """Every variant's run, and the command's, which resumes from a checkpoint of one process."""
    folder = tmp_path_factory.mktemp("two")
    write_tasks(folder / "data")
    Trainer(TrainingConfig.from_dict({**run_values(tiny_checkpoint, folder), "stop_at_step": 3})).train()
    (folder / "command.json").write_text(json.dumps(run_values(tiny_checkpoint, folder)))
    (folder / "runs.json").write_text(json.dumps([values(folder, tiny_checkpoint, name) for name in VARIANTS]))
    (folder / "program.py").write_text(PROGRAM)
    result = launch(*(str(folder / name) for name in ("program.py", "runs.json", "command.json")))
    assert result.returncode == 0, result.stderr
    return InTwo(folder, result)


def write_tasks(folder: Path) -> None:
    for name, sign in (("up", "+"), ("down", "-")):
        rows = [{"query": word, "positive": f"{sign} {word}", "negatives": [f"{sign}{sign}", "0"]} for word in WORDS]
        write_task(folder, name, rows)
    (folder / "instructions.json").write_text('{"up": "Go up", "down": "Go down"}')


def values(folder: Path, model: Path, variant: str) -> dict[str, Any]:
    return {
        **run_values(model, folder),
        "output": str(folder / variant),
        **SMALL,
        **VARIANTS[variant],
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_are_one(in_two: InTwo, tiny_checkpoint: Path, tmp_path: Path, variant: str) -> None:
    one = Trainer(
        TrainingConfig.from_dict({**values(in_two.folder, tiny_checkpoint, variant), "output": str(tmp_path)})
    )
    one.train(show_progress=False)
    two = in_two.folder / variant
    entries = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [entry["step"] for entry in one.metrics]
    for left, right in zip(entries, one.metrics, strict=True):
        assert left.get("evaluation") == right.get("evaluation")
        if "loss" in left:
            assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
            assert left["gradient_norm"] == pytest.approx(right["gradient_norm"], rel=1e-4)
            assert (left["tokens"], left["pairs"]) == (right["tokens"], 8)
    states = [load_file(folder / "checkpoint-3" / "state.safetensors") for folder in (tmp_path, two)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        if key.startswith("model."):
            torch.testing.assert_close(states[1][key], value, rtol=0, atol=1e-5, msg=key)
    record = json.loads((two / "final" / "epic.json").read_text())["training"]
    assert record["processes"] == 2
    assert record["hardware"].startswith("2 x ")


def test_the_command_in_two_processes_resumes(in_two: InTwo) -> None:
    run = in_two.folder / "run"
    # Rank 0 alone prints and writes.
    assert in_two.result.stdout == f"{run / 'final'}\n"
    assert in_two.result.stderr.count("note: step 3 of 6") == 1
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_shards_cover_every_row_once() -> None:
    lengths = [5, 9, 1, 7, 7, 3, 2]
    shards = [World(rank, 3).shard(lengths) for rank in range(3)]
    assert sorted(row for shard in shards for row in shard) == list(range(7))
    # Every process gets its part of the long ones.
    assert [lengths[shard[0]] for shard in shards] == [9, 7, 7]
    assert World().shard(lengths) == list(range(7))
    assert World(2, 3).shard([4, 4]) == []


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert init_distributed(None) == (World(), None)
    assert init_distributed("cpu") == (World(), "cpu")
    world = World()
    vectors = torch.ones(2)
    assert world.all_reduce(vectors) is vectors
    assert (world.broadcast_object(3), world.all_gather_object(3), world.is_main) == (3, [3], True)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"process 2 on a machine with 1 GPUs\. Start at most one process"):
        init_distributed("cuda")


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: bool(taken[1:]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: taken.append(backend))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr("atexit.register", lambda _: None)
    for _ in range(2):
        assert init_distributed(None) == (World(3, 4), "cuda:1")
    assert taken == [1, "nccl", 1]
