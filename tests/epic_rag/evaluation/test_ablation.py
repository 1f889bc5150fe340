"""Grids become configurations; arms are trained, scored, kept and compared."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from epic_rag.errors import ConfigError, DataError, TrainingError
from epic_rag.evaluation.ablation import (
    AblationReport,
    GridEvaluation,
    list_grids,
    load_grid,
    run_ablation,
    score_key,
)
from epic_rag.evaluation.heldout import split_of_task
from epic_rag.training.data import Pair, PairDataset
from epic_rag_cli.main import run

WORDS = [
    f"{first}{second}" for first in ("cat", "dog", "pen", "cup", "hat", "sun") for second in ("ly", "er", "ing", "s")
]
TASKS = {"up": "+ {}", "down": "- {}", "far": "go to {}", "near": "stay by {}"}


def make_data(folder: Path) -> None:
    """Write two tasks to train on, and two files to hold out."""
    folder.mkdir()
    for name, text in TASKS.items():
        rows = [{"query": word, "positive": text.format(word)} for word in WORDS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    instructions = {name: f"Go {name}" for name in TASKS}
    (folder / "instructions.json").write_text(json.dumps(instructions), encoding="utf-8")


def make_values(data: Path, checkpoint: Path) -> dict[str, Any]:
    """Return a grid of two arms over two tasks, with two files held out."""
    return {
        "recipe": {
            "model": str(checkpoint),
            "data": str(data),
            "tasks": ["up", "down"],
            "batch_size": 8,
            "temperature": 0.1,
            "learning_rate": 1.0e-3,
            "max_query_tokens": 16,
            "max_document_tokens": 16,
            "steps": 50,
            "stop_at_step": 20,
        },
        "base": {"max_demonstrations": 2, "evaluation_tasks": ["up", "down"], "evaluation_rows": 5, "steps": 3},
        "reference": "epic",
        "evaluation": {"heldout": ["far", "near"], "num_demonstrations": [2], "queries": 6, "documents": 12},
        "arms": {"epic": {"axis": "strategy"}, "none": {"axis": "strategy", "strategy": "none"}},
    }


def write(folder: Path, values: dict[str, Any]) -> str:
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return str(file)


@pytest.fixture
def values(tmp_path: Path, tiny_checkpoint: Path) -> dict[str, Any]:
    """A grid whose data need not be there."""
    return make_values(tmp_path / "data", tiny_checkpoint)


def test_a_grid_becomes_configurations(values: dict[str, Any], tmp_path: Path) -> None:
    values["arms"]["wide"] = {"axis": "K", "max_demonstrations": 4, "tasks": {"up": {"weight": 2.0}}, "steps": 9}
    values["arms"]["less"] = {"axis": "tasks", "without": ["down"], "projector": "mlp"}
    values["base"]["evaluation_tasks"] = ["up", "far"]
    grid = load_grid(write(tmp_path, values), ["learning_rate=0.5", "evaluation.queries=3"])
    epic, none, wide, less = (arm.config for arm in grid.arms)
    assert (grid.reference, grid.folder) == ("epic", Path("runs/grid"))
    assert (grid.evaluation.queries, grid.evaluation.table_k) == (3, 2)
    assert [arm.strategies for arm in grid.arms] == [("epic",), ("epic", "text"), ("epic",), ("epic",)]
    assert {arm.config.learning_rate for arm in grid.arms} == {0.5}
    assert [arm.config.steps for arm in grid.arms] == [3, 3, 9, 3]
    assert (epic.max_demonstrations, wide.max_demonstrations) == (2, 4)
    assert wide.tasks["up"].weight == 2.0
    assert (list(wide.tasks), list(less.tasks)) == (["up", "down"], ["up"])
    assert (less.projector, none.output) == ("mlp", "runs/grid/arms/none")
    # Only trained tasks are scored as such, and only when an arm is done.
    assert {arm.config.evaluation_tasks for arm in grid.arms} == {("up",)}
    assert {(arm.config.evaluate_every, arm.config.stop_at_step) for arm in grid.arms} == {(0, None)}


def test_settings_override_arms(values: dict[str, Any], tmp_path: Path) -> None:
    values["arms"]["none"]["steps"] = 9
    grid = load_grid(write(tmp_path, values), ["steps=2", "tasks.up.weight=3"], output=tmp_path / "out")
    assert {(arm.config.steps, arm.config.tasks["up"].weight) for arm in grid.arms} == {(2, 3)}
    assert grid.folder == tmp_path / "out"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("arms", {}, "reference is epic. The arms are missing"),
        ("nonsense", 1, "nonsense is 1. Extra inputs are not permitted"),
        ("recipe", "unheard", "No file or recipe unheard"),
        ("reference", "nobody", "reference is nobody. The arms are epic, none"),
        ("arms.epic", {"projector": "cube"}, "Arm epic: "),
        ("arms.epic", {"max_demos": 1}, "Arm epic: "),
        ("arms.epic", {"max_demonstrations": "x"}, "Arm epic: "),
        ("arms.epic", 3, "arms.epic is 3. It must be a valid dictionary"),
        ("arms", {"../up": {}}, "arms.../up.[key] is '../up'. String should match"),
        ("arms.epic", {"without": ["up"]}, "Arm epic leaves out up, which the base scores as a trained task"),
        ("arms.epic", {"without": ["other"]}, "Arm epic leaves out other, which the base does not train"),
        ("arms.epic", {"tasks": {"far": {}}}, "Arm epic trains on far of evaluation.heldout"),
        ("evaluation.kinds", 1, "evaluation.kinds is 1. Extra inputs are not permitted. docs/evaluation.md"),
        ("evaluation.queries", 0, "evaluation.queries is 0. It must be greater than"),
        ("evaluation.controls", 1, "evaluation.controls is 1. It must be a valid boolean"),
        ("evaluation.num_demonstrations", [-1], "evaluation.num_demonstrations.0 is -1. It must be greater"),
        ("evaluation.num_demonstrations", 8, "evaluation.num_demonstrations is 8. It must be a valid list"),
        ("evaluation.heldout", [], "scores nothing"),
    ],
)
def test_grids_that_cannot_work(values: dict[str, Any], tmp_path: Path, path: str, value: Any, said: str) -> None:
    *parents, last = path.split(".")
    place = values
    for key in parents:
        place = place[key]
    place[last] = value
    if said == "scores nothing":
        values["base"]["evaluation_tasks"] = []
    with pytest.raises(ConfigError) as error:
        load_grid(write(tmp_path, values))
    assert said in str(error.value)


def test_settings_and_names_that_cannot_work(values: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, values)
    with pytest.raises(ConfigError, match=r"'evaluation.queries=\[' is not valid YAML"):
        load_grid(file, ["evaluation.queries=["])
    with pytest.raises(ConfigError, match=r"Arm epic: .*nonsense"):
        load_grid(file, ["nonsense=1"])
    with pytest.raises(ConfigError, match=r"No file nowhere.yaml. Pass a file, or one of the grids ablation"):
        load_grid("nowhere.yaml")
    with pytest.raises(ConfigError, match=r"--only names nobody. The arms of .*grid.yaml are epic, none"):
        run_ablation(load_grid(file), only=["nobody"])
    with pytest.raises(DataError, match=r"No file far, and no far.jsonl or far.jsonl.gz in"):
        run_ablation(load_grid(file))


@pytest.mark.parametrize("name", list_grids())
def test_shipped_grids_name_settings_that_exist(name: str) -> None:
    grid = load_grid(name)
    names = [arm.name for arm in grid.arms]
    assert len(names) == len(set(names))
    assert grid.reference in names
    # Every arm but the reference differs from it in something.
    runs = {json.dumps({**arm.config.to_dict(), "name": "", "output": ""}, sort_keys=True) for arm in grid.arms}
    assert len(runs) == len(names)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> tuple[dict[str, Any], AblationReport]:
    """A grid with one arm that diverges, and its report."""
    folder = tmp_path_factory.mktemp("ablation")
    make_data(folder / "data")
    values = make_values(folder / "data", tiny_checkpoint)
    values["arms"]["bad"] = {"learning_rate": 1.0e30, "max_grad_norm": 1.0e30}
    values["evaluation"]["num_demonstrations"] = [1, 2, 12]
    grid = load_grid(write(folder, values), output=folder / "out")
    return values, run_ablation(grid, command=("epic-rag", "ablate"))


def cells(report: AblationReport) -> list[dict[str, str]]:
    """Return the table's rows by column."""
    lines = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_the_table(finished: tuple[dict[str, Any], AblationReport]) -> None:
    _, report = finished
    epic, none_epic, none_text = cells(report)
    assert [row["arm"] for row in (epic, none_epic, none_text)] == [
        "epic",
        "none, shown as epic",
        "none, shown as text",
    ]
    trained = report.results["epic"]["trained"]
    assert (epic["steps"], epic["tokens"]) == ("3", f"{trained['tokens']:,}")
    columns = ["k = 0", "k = 12 minus k = 0", "own minus shuffled", "own minus foreign", "minus epic"]
    assert list(epic) == [
        *("axis", "arm", "steps", "tokens", "seconds"),
        *(f"{part}: {column}" for part in ("trained tasks", "held-out tasks") for column in columns),
    ]
    assert epic["trained tasks: minus epic"] == "+0.00 ± 0.00"
    # At k = 0 nothing is shown, in whatever way.
    assert none_epic["trained tasks: k = 0"] == none_text["trained tasks: k = 0"]
    # The held-out files have fewer than 12 rows for demonstrations.
    assert epic["held-out tasks: k = 12 minus k = 0"] == epic["held-out tasks: minus epic"] == "–"
    assert "- epic: not scored: far at k = 12, shown as epic: 6 rows are free" in report.to_markdown()


def test_files(finished: tuple[dict[str, Any], AblationReport]) -> None:
    _, report = finished
    folder = report.grid.folder
    stored = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
    assert stored == report.to_json()
    assert (folder / "ablation.md").read_text(encoding="utf-8") == report.to_markdown() + "\n"
    assert stored["command"] == ["epic-rag", "ablate"]
    assert [(arm["name"], arm["trained"]["steps"]) for arm in stored["arms"]] == [("epic", 3), ("none", 3)]
    keys = {tuple(key.split()) for key in stored["arms"][0]["scores"]}
    assert {(part, task) for _, part, task, _, _ in keys} == {
        *(("trained", "up"), ("trained", "down"), ("heldout", "far"), ("heldout", "near"))
    }
    conditions = {(condition, k) for _, part, _, condition, k in keys if part == "heldout"}
    assert conditions == {("none", "0"), *((c, k) for c in ("own", "shuffled", "foreign") for k in ("1", "2"))}
    assert sorted(path.name for path in (folder / "arms/epic").iterdir() if path.name.startswith("checkpoint")) == []


def test_differences_are_paired_by_query(finished: tuple[dict[str, Any], AblationReport]) -> None:
    _, report = finished
    differences = []
    for task in ("far", "near"):
        key = score_key("epic", "heldout", task, "own", 2)
        ours, theirs = (np.array(report.results[arm]["scores"][key]) for arm in ("none", "epic"))
        assert len(ours) == 6
        differences.append(
            (ours - theirs).mean(),
        )
        assert report.results["none"]["tests"][task] == report.results["epic"]["tests"][task]
    found = report.difference("heldout", ("none", "epic", "own", 2), ("epic", "epic", "own", 2))
    assert found is not None
    assert found.difference == pytest.approx(np.mean(differences))
    assert found.standard_error >= 0
    assert report.difference("heldout", ("none", "epic", "own", 12), ("epic", "epic", "own", 12)) is None


def test_an_arm_that_fails_stops_no_other(finished: tuple[dict[str, Any], AblationReport]) -> None:
    _, report = finished
    assert list(report.results) == ["epic", "none"]
    with pytest.raises(TrainingError, match=r"1 of 3 arms failed\. bad: "):
        report.check()
    assert "- bad failed: " in report.to_markdown()
    assert list(report.to_json()["failures"]) == ["bad"]


def test_a_result_on_disk_is_used(finished: tuple[dict[str, Any], AblationReport]) -> None:
    values, report = finished
    values = deepcopy(values)
    folder = report.grid.folder
    del values["arms"]["bad"]
    said: list[str] = []
    file = write(folder.parent, values)
    again = run_ablation(load_grid(file, output=folder), progress=said.append)
    assert said == ["arm epic (1 of 2): done before", "arm none (2 of 2): done before"]
    assert again.results == report.results
    # Another setting, or another evaluation: trained again.
    values["arms"]["none"]["learning_rate"] = 0.01
    said.clear()
    changed = run_ablation(load_grid(write(folder.parent, values), output=folder), progress=said.append)
    assert said[:2] == ["arm epic (1 of 2): done before", "arm none (2 of 2): training"]
    assert changed.results["none"]["fingerprint"] != report.results["none"]["fingerprint"]
    other = run_ablation(load_grid(file, ["evaluation.queries=3"], output=folder), only=["epic"])
    assert list(other.results) == ["epic"]


def test_rows_that_training_left_out() -> None:
    rows = [Pair(f"q{number}", f"p{number}") for number in range(12)]
    # A held-out row shares p0, and a trained row shares the query q1: neither may demonstrate.
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


def test_the_page_and_the_command(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[3] / "docs/evaluation.md").read_text(encoding="utf-8")
    [grid] = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    [arguments] = re.findall(r"^    epic-rag ablate (.*)$", page, re.MULTILINE)
    for name in GridEvaluation.model_fields:
        assert f"`{name}`" in page or f"`evaluation.{name}`" in page, f"docs/evaluation.md does not explain {name}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EPIC_RAG_MODEL", str(tiny_checkpoint))
    Path("my-pairs").mkdir()
    for name in ("faq", "tickets", "wiki"):
        rows = [{"query": f"{name} {number}", "positive": f"about {name} {number}"} for number in range(60)]
        Path(f"my-pairs/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("grid.yaml").write_text(grid, encoding="utf-8")
    assert len(load_grid("grid.yaml").arms) == 4
    command = ["ablate", *arguments.split(), "--set", "steps=2", "--set", "batch_size=8", "--only", "faq-only"]
    assert run([*command, "--json"]) == 0
    output = capsys.readouterr()
    assert "arm faq-only (4 of 4): training" in output.err
    assert [arm["name"] for arm in json.loads(output.out)["arms"]] == ["faq-only"]
    assert run([*command, "--quiet"]) == 0
    output = capsys.readouterr()
    assert "| tasks | faq-only |" in output.out
    assert output.err == ""

    Path("my-pairs/faq.jsonl").unlink()
    assert run(command) == 1
    output = capsys.readouterr()
    assert "- faq-only failed: No file faq" in output.out
    assert "error: 1 of 4 arms failed. faq-only: No file faq" in output.err
