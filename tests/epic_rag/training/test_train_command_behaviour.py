"""`epic-rag train`: streams, overrides, and one line for every error."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epic_rag import EpicEncoder
from epic_rag.training import Trainer

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def run_file(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of six steps, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("run.json").write_text(json.dumps(settings(output="run", data="data")))
    return Path("run.json")


def test_the_folder_on_stdout_and_the_rest_on_stderr(cli: Any, run_file: Path) -> None:
    result = cli("train", run_file, "--set", "evaluation_tasks=[up]", "--set", "evaluate_every=6")
    assert (result.status, result.out) == (0, "run/final\n")
    lines = result.err.splitlines()
    assert all(line.startswith("note: ") for line in lines)
    assert lines[0] == "note: step 0 of 6, 24 rows in 2 tasks"
    assert lines[1].startswith("note: nDCG@10 on held-out rows at step 0: up k=0 ")
    assert re.fullmatch(r"note: step 1 of 6: loss \d+\.\d{3}", lines[2])
    assert re.fullmatch(r"note: nDCG@10 on held-out rows at step 6: up k=0 [\d.]+, k=8 [\d.]+", lines[-1])
    assert EpicEncoder.from_pretrained("run/final").dimension == 32


def test_json(cli: Any, run_file: Path) -> None:
    result = cli("train", run_file, "--json", "-o", "elsewhere")
    last = json.loads(Path("elsewhere/metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads(result.out) == {"checkpoint": "elsewhere/final", "steps": 6, "loss": last["loss"]}
    assert not Path("run").exists()
    # A second call has nothing left to do and says the same.
    assert json.loads(cli("train", run_file, "--json", "--output", "elsewhere").out) == json.loads(result.out)


def test_settings_from_the_command_line(cli: Any, run_file: Path) -> None:
    result = cli("train", run_file, "--set", "steps=2", "--set", "tasks.up.weight=3", "--set", "learning_rate=1e-4")
    assert result.status == 0
    record = json.loads(Path("run/final/epic.json").read_text())["training"]["config"]
    assert (record["steps"], record["tasks"]["up"]["weight"], record["learning_rate"]) == (2, 3.0, 1e-4)


def test_no_resume(cli: Any, run_file: Path) -> None:
    assert cli("train", run_file).status == 0
    refused = cli("train", run_file, "--set", "seed=5")
    assert (refused.status, refused.out) == (1, "")
    assert "was trained with seed 0, and this run has 5" in refused.err
    assert cli("train", run_file, "--set", "seed=5", "--no-resume").status == 0


def test_own_data_starts_from_the_model_of_the_environment(
    cli: Any, run_file: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPIC_RAG_MODEL", str(tiny_checkpoint))
    result = cli("train", "own-data", "--set", "data=data", "--set", "tasks=[up]", "--set", "steps=2", "-o", "mine")
    assert (result.status, result.out) == (0, "mine/final\n")
    assert json.loads(Path("mine/final/epic.json").read_text())["base_model"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing"], r"No file or recipe nothing\. Pass a YAML or JSON file, or one of the recipes .*own-data.*\."),
        (["own-data"], r"own-data: tasks is empty\. Name at least one file of the data folder\."),
        (["run.json", "--set", "steps"], r"The setting 'steps' is not NAME=VALUE .*"),
        (["run.json", "--set", "steps=none"], r"run\.json: steps is 'none'\. It must be a valid integer\."),
        (
            ["run.json", "--set", "tasks=[side]"],
            r"No file side\.jsonl or side\.jsonl\.gz in data, which has bad, down, up\. .*",
        ),
        (["run.json", "--set", "tasks=[bad]"], r"data/bad\.jsonl:2 is not valid JSON .*"),
        (["run.json", "--set", "model=nowhere"], r"There is no checkpoint nowhere\. .*"),
        (["run.json", "--set", "device=warp"], r"Device 'warp' is not available .*"),
        (["run.json", "--set", "num_layers=9"], r"num_layers is 9, but the model has 2 layers\. .*"),
        (["run.json", "--set", "projector=mlp"], r".* was trained with projector 'linear', not 'mlp'\. .*"),
    ],
)
def test_errors_are_one_line(cli: Any, run_file: Path, arguments: list[str], expected: str) -> None:
    Path("data/bad.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": "a"\n')
    result = cli("train", *arguments)
    assert (result.status, result.out) == (1, "")
    assert re.fullmatch(f"error: {expected}\n", result.err), result.err
    assert not Path("run").exists()


def test_a_missing_extra_is_named(cli: Any, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    for arguments in (["own-data"], [run_file, "--set", "steps=2"]):
        result = cli("train", *arguments)
        assert result.status == 1
        assert result.err.endswith("needs PyYAML, which is not installed. Run `pip install 'epic-rag[train]'`.\n")


def test_wrong_command_line(cli: Any) -> None:
    result = cli("train")
    assert (result.status, result.out) == (2, "")
    assert result.err == "error: Missing argument 'CONFIG'. See `epic-rag train --help`.\n"


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (4, "Interrupted at step 4 of 6. run/checkpoint-3 is complete. Run the command again"),
        (2, "Interrupted at step 2 of 6. Nothing was saved (save_every is 3). Run the same command again"),
    ],
)
def test_interrupted(cli: Any, run_file: Path, monkeypatch: pytest.MonkeyPatch, step: int, expected: str) -> None:
    train_step = Trainer.train_step

    def interrupted(self: Trainer, batch: Any) -> Any:
        if self.step == step:
            raise KeyboardInterrupt
        return train_step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    result = cli("train", run_file)
    assert (result.status, result.out) == (130, "")
    assert result.err.splitlines()[-1].startswith(f"error: {expected}")


def test_interrupted_before_the_first_step(cli: Any, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Trainer, config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "__init__", interrupted)
    result = cli("train", run_file)
    assert result.status == 130
    assert result.err.startswith("error: Interrupted. Nothing was saved")


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom epic_rag_cli.main import run\nassert run(['train', '--help']) == 0\n"
        "print([name for name in ('torch', 'transformers', 'yaml') if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stderr == "[]\n"
    assert "epic-rag train own-data --set data=. --set 'tasks=[pairs]'" in result.stdout


def test_the_example_of_the_help_runs(
    cli: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EPIC_RAG_MODEL", str(tiny_checkpoint))
    # Pairs as for a bank: "passage" or "positive".
    Path("pairs.jsonl").write_text('{"query": "a", "passage": "b"}\n{"query": "c", "positive": "d"}\n')
    result = cli("train", "own-data", "--set", "data=.", "--set", "tasks=[pairs]", "--set", "steps=3", "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["checkpoint"] == "runs/own-data/final"
