"""Arms are trained within the budget, scored, remembered and compared."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag.errors import TrainingError
from epic_rag.evaluation.ablation import (
    AblationReport,
    Budget,
    GridEvaluation,
    failed_arms,
    load_grid,
    planned_steps,
    run_ablation,
    split_of_task,
)
from epic_rag.training import Trainer, TrainingConfig
from epic_rag.training.data import Pair, PairDataset
from epic_rag_cli.main import run


def cells(report: AblationReport) -> list[dict[str, str]]:
    """The table's rows by column."""
    lines = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_an_ablation_from_end_to_end(values: dict[str, Any], write_grid: Callable[..., str], tmp_path: Path) -> None:
    said: list[str] = []
    grid = load_grid(write_grid(values))
    report = run_ablation(grid, progress=said.append, command=("epic-rag", "ablate"))
    assert failed_arms(report) is None
    assert [line.label for line in report.lines()] == ["epic", "none, shown as epic", "none, shown as text"]

    epic, none_epic, none_text = cells(report)
    assert epic["trained tokens"] == f"{report.records['epic'].trained.tokens:,}"  # type: ignore[union-attr]
    assert set(epic) > {
        f"{part}: {column}"
        for part in ("trained tasks", "held-out tasks")
        for column in ("k = 0", "k = 2", "k = 2 minus k = 0", "own minus shuffled", "own minus foreign", "minus epic")
    }
    assert epic["held-out tasks: minus epic"] == "+0.00 ± 0.00"
    # At k = 0 nothing is shown, in whatever way.
    assert none_epic["trained tasks: k = 0"] == none_text["trained tasks: k = 0"]

    folder = tmp_path / "runs/grid"
    stored = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
    assert (folder / "ablation.md").read_text(encoding="utf-8") == report.to_markdown() + "\n"
    assert stored["command"] == ["epic-rag", "ablate"]
    assert [arm["trained"]["steps"] for arm in stored["arms"]] == [3, 3]
    scores = stored["arms"][0]["scores"]
    assert {(score["part"], score["task"]) for score in scores} == {
        *(("trained", "up"), ("trained", "down"), ("heldout", "far"), ("heldout", "near"))
    }
    assert {(score["condition"], score["k"]) for score in scores} == {
        ("none", 0),
        *((condition, k) for condition in ("own", "shuffled", "foreign") for k in (1, 2)),
    }
    for score in scores:
        assert score["standard_error"] >= 0
        assert (score["versus_zero"] is None) == (score["k"] == 0)
        assert (score["versus_shuffled"] is None) == (score["condition"] != "own")
    assert {path.name for path in (folder / "plots").iterdir()} == {
        f"{name}.{ending}" for name in ("strategy", "differences") for ending in ("svg", "png")
    }
    # The optimiser's state is gone, the checkpoint is there.
    assert list(folder.glob("arms/*/checkpoint-*")) == []
    assert len(list(folder.glob("arms/*/final/model.safetensors"))) == 2

    # Again: nothing is trained, nothing is scored, and the figures are the same.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("arms/*/final/*")}
    said.clear()
    again = run_ablation(load_grid("grid.yaml"), progress=said.append)
    assert said == ["arm epic (1 of 2): done before", "arm none (2 of 2): done before"]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("arms/*/final/*")} == before
    assert again.to_json()["arms"] == report.to_json()["arms"]

    # Other questions: scored anew, not trained anew. Another setting: trained anew, and it is said why.
    said.clear()
    run_ablation(load_grid("grid.yaml", ["evaluation.num_demonstrations=[1]"]), only=["epic"], progress=said.append)
    assert [line.rpartition("; ")[2] for line in said] == ["is scored"]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("arms/*/final/*")} == before
    said.clear()
    values["arms"]["none"]["learning_rate"] = 0.01
    report = run_ablation(load_grid(write_grid(values)), only=["none"], progress=said.append)
    assert "has other settings (learning_rate 0.001 -> 0.01); it is trained afresh" in said[0]
    # The arm that was not asked for has other scores than this grid's evaluation, so it is not in the report.
    assert list(report.records) == ["none"]


def test_differences_are_paired_by_query(values: dict[str, Any], write_grid: Callable[..., str]) -> None:
    report = run_ablation(load_grid(write_grid(values)))
    epic, none = report.scores("epic"), report.scores("none")
    score = next(s for s in none.scores if (s.task, s.condition, s.k, s.shown) == ("far", "own", 2, "epic"))
    ours = np.array(none.by_query["epic", "heldout", "far"].values["own-2"])
    theirs = np.array(epic.by_query["epic", "heldout", "far"].values["own-2"])
    assert len(ours) == score.queries == 6
    assert score.versus_reference is not None
    assert score.versus_reference.difference == pytest.approx((ours - theirs).mean())
    assert score.versus_reference.standard_error == pytest.approx((ours - theirs).std(ddof=1) / 6**0.5)
    line = report.lines()[1]
    mean = report.mean(line, "heldout", "own", 2)
    of_tasks = [s for s in none.scores if (s.part, s.condition, s.k, s.shown) == ("heldout", "own", 2, "epic")]
    assert mean is not None
    assert mean.ndcg_at_10 == pytest.approx(np.mean([s.ndcg_at_10 for s in of_tasks]))
    assert mean.standard_error == pytest.approx(sum(s.standard_error**2 for s in of_tasks) ** 0.5 / 2)


def test_an_interrupted_arm_goes_on(
    values: dict[str, Any], write_grid: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = write_grid(values)
    whole = run_ablation(load_grid(file, output=tmp_path / "whole"), only=["epic"])
    steps: list[int] = []
    train_step = Trainer.train_step

    def interrupted(self: Trainer, batch: Any) -> Any:
        if self.step == 2 and len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(self.step)
        return train_step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_ablation(load_grid(file), only=["epic"])
    said: list[str] = []
    steps.append(-1)
    report = run_ablation(load_grid(file), only=["epic"], progress=said.append)
    assert said[0] == "arm epic (1 of 1): goes on"
    assert steps == [0, 1, -1, 2]
    assert report.records["epic"].fingerprint == whole.records["epic"].fingerprint


def test_an_arm_that_fails_stops_no_other(values: dict[str, Any], write_grid: Callable[..., str]) -> None:
    values["arms"] = {"bad": {"learning_rate": 1.0e30, "max_grad_norm": 1.0e30}, **values["arms"]}
    report = run_ablation(load_grid(write_grid(values)))
    assert list(report.records) == ["epic", "none"]
    failure = failed_arms(report)
    assert isinstance(failure, TrainingError)
    assert "1 of 3 arms failed, bad for one: the " in str(failure)
    assert "- bad failed: the " in report.to_markdown()
    assert list(report.to_json()["failures"]) == ["bad"]


def test_more_demonstrations_than_there_are_or_fit(values: dict[str, Any], write_grid: Callable[..., str]) -> None:
    values["evaluation"] |= {"num_demonstrations": [0, 2, 12]}
    report = run_ablation(load_grid(write_grid(values)), only=["epic"])
    skipped = report.records["epic"].scores.skipped  # type: ignore[union-attr]
    assert skipped == [
        f"{name} at k = 12, shown as epic: 6 rows are free for demonstrations" for name in ("far", "near")
    ]
    assert "- epic: not scored: far at k = 12" in report.to_markdown()
    [row] = cells(report)
    assert row["held-out tasks: k = 12"] == "–"
    assert row["trained tasks: k = 12"] != "–"


@pytest.mark.parametrize("strategy", ["epic", "text", "none"])
def test_a_budget_of_tokens_ends_with_the_step_that_reaches_it(
    values: dict[str, Any], write_grid: Callable[..., str], strategy: str
) -> None:
    values["arms"] = {"one": {"strategy": strategy}}
    values["reference"] = "one"
    [arm] = load_grid(write_grid(values), ["budget.tokens=2000"]).arms
    steps = planned_steps(arm.config, Budget("tokens", 2000))
    trainer = Trainer(TrainingConfig.from_dict({**arm.config.to_dict(), "steps": steps, "output": "plain"}))
    trainer.train(show_progress=False)
    tokens = [entry["tokens"] for entry in trainer.metrics]
    assert sum(tokens) >= 2000 > sum(tokens[:-1])


def test_a_budget_of_minutes(
    values: dict[str, Any], write_grid: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls) -> float:
            return cls.now

    train_step = Trainer.train_step

    def slow(self: Trainer, batch: Any) -> Any:
        Clock.now += 10.0
        return train_step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", slow)
    for module in ("epic_rag.evaluation.ablation", "epic_rag.training.trainer"):
        monkeypatch.setattr(f"{module}.time", Clock)
    report = run_ablation(load_grid(write_grid(values), ["budget.minutes=0.75"]), only=["epic"])
    record = report.records["epic"]
    assert record.steps == 5  # 45 seconds at 10 a step
    assert record.trained is not None
    assert (record.trained.steps, record.trained.seconds) == (5, 50.0)
    assert str(report.grid.budget) == "0.75 minutes"


def test_rows_that_training_left_out() -> None:
    rows = [Pair(f"q{number}", f"p{number}") for number in range(12)]
    # p0 is asked by a held-out row; so is the query q1, by a row that was trained on: neither may demonstrate.
    dataset = PairDataset(
        "task", rows=[*rows[2:], Pair("q1", "other")], held_out=rows[:2], instruction="Go", sha256="f" * 64
    )
    split = split_of_task(dataset, queries=10, documents=6)
    assert split is not None
    assert split.queries == ("q0", "q1")
    assert len(split.documents) == 6
    assert {"p0", "p1"} <= set(split.documents)
    assert {pair.query for pair in split.pool} == {f"q{number}" for number in range(2, 12)}
    assert (split.name, split.instruction, split.revision) == ("task", "Go", "f" * 16)


def test_label_tasks_demonstrate_with_every_label() -> None:
    labels = [Pair(f"text {number}", ("pay", "lost")[number % 2]) for number in range(42)]
    dataset = PairDataset("labels", rows=labels[2:], held_out=labels[:2])
    assert dataset.label_like
    split = split_of_task(dataset, queries=10, documents=10)
    assert split is not None
    assert split.documents == ("pay", "lost")
    assert split.relevant == ((0,), (1,))
    assert {pair.passage for pair in split.pool} == {"pay", "lost"}
    assert len(split.pool) == 40


def test_the_page(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs/evaluation.md").read_text(encoding="utf-8")
    [grid] = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    [command] = re.findall(r"^    epic-rag ablate (.*)$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EPIC_RAG_MODEL", str(tiny_checkpoint))
    Path("my-pairs").mkdir()
    for name in ("faq", "tickets", "wiki"):
        rows = [{"query": f"{name} {number}", "positive": f"about {name} {number}"} for number in range(60)]
        Path(f"my-pairs/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("grid.yaml").write_text(grid, encoding="utf-8")
    assert run(["ablate", *command.split(), "--set", "budget.steps=2", "--set", "batch_size=8", "--quiet"]) == 0
    written = json.loads(Path("runs/ablation/ablation.json").read_text(encoding="utf-8"))
    assert [arm["name"] for arm in written["arms"]] == ["epic", "none", "K4", "faq-alone"]
    assert {path.stem for path in Path("runs/ablation/plots").iterdir()} == {"strategy", "k", "tasks", "differences"}
    explained = {
        match for row in re.findall(r"^\| (.*?) \|", page, re.MULTILINE) for match in re.findall(r"`([\w.]+)`", row)
    }
    for name in GridEvaluation.__dataclass_fields__:
        assert {name, f"evaluation.{name}"} & explained, f"docs/evaluation.md does not explain {name}"


def test_the_command(values: dict[str, Any], write_grid: Callable[..., str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "epic_rag_cli", "ablate", write_grid(values), "--only", "epic"]
    command += ["--set", "budget.steps=2", "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "note: arm epic (1 of 1): trains" in done.stderr
    assert "| strategy | epic |" in done.stdout
    quiet = subprocess.run(
        [*command, "--quiet", "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert [arm["name"] for arm in json.loads(quiet.stdout)["arms"]] == ["epic"]

    shutil.rmtree(tmp_path / "out")
    (tmp_path / "data/up.jsonl").unlink()
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert failed.returncode == 1
    assert "- epic failed: no file up.jsonl" in failed.stdout
    assert "error: 1 of 2 arms failed, epic for one: no file up.jsonl" in failed.stderr
