"""Grids are read, checked, and become configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epic_rag.errors import ConfigError, DataError
from epic_rag.evaluation.ablation import list_grids, load_grid, run_ablation


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one value set, or removed if it is None."""
    copy: dict[str, Any] = json.loads(json.dumps(values))
    *parents, last = path.split(".")
    place = copy
    for key in parents:
        place = place[key]
    if value is None:
        place.pop(last)
    else:
        place[last] = value
    return copy


def test_a_grid_becomes_configurations(values: dict[str, Any], write_grid: Callable[..., str]) -> None:
    values["arms"]["wide"] = {"axis": "K", "max_demonstrations": 4, "tasks": {"up": {"weight": 2.0}}}
    values["arms"]["less"] = {"axis": "tasks", "without": ["down"], "projector": "mlp"}
    values["base"]["evaluation_tasks"] = ["up", "far"]
    grid = load_grid(
        write_grid(values),
        ["learning_rate=0.5", "budget.tokens=900", "evaluation.queries=3", "arms.none.separators=none"],
    )
    epic, none, wide, less = grid.arms
    assert (str(grid.budget), grid.reference, grid.folder) == ("900 tokens", "epic", Path("runs/grid"))
    assert grid.evaluation.queries == 3
    assert grid.evaluation.table_k == 2
    assert [arm.strategies for arm in grid.arms] == [("epic",), ("epic", "text"), ("epic",), ("epic",)]
    assert {arm.config.learning_rate for arm in grid.arms} == {0.5}
    assert (epic.config.separators, none.config.separators) == ("words", "none")
    assert (epic.config.max_demonstrations, wide.config.max_demonstrations) == (2, 4)
    assert wide.config.tasks["up"].weight == 2.0
    assert list(wide.config.tasks) == ["up", "down"]
    assert list(less.config.tasks) == ["up"]
    assert less.changes == {"projector": "mlp", "without": ["down"]}
    assert none.config.output == "runs/grid/arms/none"
    # A file that is no trained task is not one of the trained tasks that are scored.
    assert {arm.config.evaluation_tasks for arm in grid.arms} == {("up",)}
    assert {arm.config.evaluate_every for arm in grid.arms} == {0}


def test_steps_replace_those_of_the_recipe(values: dict[str, Any], write_grid: Callable[..., str]) -> None:
    values["recipe"] |= {"steps": 50, "stop_after": 20}
    [config, _] = [arm.config for arm in load_grid(write_grid(values), ["budget.steps=7"]).arms]
    assert (config.steps, config.stop_after) == (7, None)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("arms", {}, "grid.yaml has no arms"),
        ("nonsense", 1, "grid.yaml has nonsense; known are recipe, base"),
        ("recipe", "unheard", "no file unheard, and the recipes are"),
        ("recipe", 3, "recipe: 3, expected a recipe's name"),
        ("reference", "nobody", "reference names nobody, the arms are epic, none"),
        ("budget", {"hours": 1}, "budget is {'hours': 1}; give one of steps, tokens, minutes"),
        ("budget.steps", 0, "budget.steps is 0; give a whole number above 0"),
        ("budget.steps", 2.5, "budget.steps is 2.5; give a whole number"),
        ("arms.epic", {"steps": 9}, "arm epic sets steps, which is the same for all arms; it comes from budget"),
        ("arms.epic", {"projector": "cube"}, "arm epic: projector is 'cube', known are"),
        ("arms.epic", {"max_demos": 1}, "arm epic does not make a training run: there is no max_demos"),
        ("arms.epic", {"max_demonstrations": "x"}, "arm epic does not make a training run: max_demonstrations is 'x'"),
        ("arms.epic", 3, "arm epic is 3; write epic: {SETTING: VALUE}"),
        ("arms.../up", {}, "an arm is called '../up'; use letters"),
        ("arms.epic", {"without": ["up"]}, "arm epic leaves out up, which the base scores as a trained task"),
        ("arms.epic", {"without": ["other"]}, "arm epic leaves out other, which the base does not train"),
        ("arms.epic", {"tasks": {"far": {}}}, "arm epic trains on far, which evaluation.heldout scores as never"),
        ("evaluation.kinds", 1, "evaluation has kinds; known are heldout"),
        ("evaluation.queries", 0, "evaluation.queries is 0; give a whole number of 1 or more"),
        ("evaluation.controls", 1, "evaluation.controls is 1; give true or false"),
        ("evaluation.num_demonstrations", [-1], "give numbers of 0 or more"),
        ("evaluation.num_demonstrations", 8, "evaluation.num_demonstrations is 8; give a list"),
        ("evaluation.strategies", {"epic": ["magic"]}, "write {ARM: [epic, text]}"),
        ("evaluation.strategies", {"nobody": ["epic"]}, "evaluation.strategies names nobody"),
    ],
)
def test_what_cannot_work(
    values: dict[str, Any], write_grid: Callable[..., str], path: str, value: Any, said: str
) -> None:
    if path == "arms.../up":
        values["arms"]["../up"] = value
    else:
        values = changed(values, path, value)
    with pytest.raises(ConfigError) as error:
        load_grid(write_grid(values))
    assert said in str(error.value)


def test_nothing_to_score(values: dict[str, Any], write_grid: Callable[..., str]) -> None:
    values = changed(changed(values, "evaluation.heldout", []), "base.evaluation_tasks", [])
    with pytest.raises(ConfigError, match=r"scores nothing: evaluation.heldout is empty"):
        load_grid(write_grid(values))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("evaluation.queries", "the setting 'evaluation.queries' is not evaluation.NAME=VALUE"),
        ("evaluation.queries=[", "has a value that is not valid YAML"),
        ("nonsense=1", "the setting 'nonsense=1' is not NAME=VALUE"),
        ("arms.nobody.projector=mlp", "is not arms.ARM.NAME=VALUE; the arms are epic, none"),
        ("arms.epic.steps=3", "arm epic sets steps"),
    ],
)
def test_settings_that_are_none(
    values: dict[str, Any], write_grid: Callable[..., str], setting: str, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_grid(write_grid(values), [setting])
    assert said in str(error.value)


def test_unknown_grid_file_and_arm(values: dict[str, Any], write_grid: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=r"no file nowhere.yaml, and the shipped grids are ablation"):
        load_grid("nowhere.yaml")
    with pytest.raises(ConfigError, match=r"--only names nobody, the arms of grid.yaml are epic, none"):
        run_ablation(load_grid(write_grid(values)), only=["nobody"])
    values["evaluation"]["heldout"] = ["gone"]
    with pytest.raises(DataError, match=r"evaluation.heldout names gone, which is no file and no gone.jsonl"):
        run_ablation(load_grid(write_grid(values)))


@pytest.mark.parametrize("name", list_grids())
def test_shipped_grids_name_settings_that_exist(name: str) -> None:
    grid = load_grid(name)
    names = [arm.name for arm in grid.arms]
    assert len(names) == len(set(names))
    assert grid.reference in names
    # Every arm but the reference differs from it in something.
    runs = {json.dumps({**arm.config.to_dict(), "name": "", "output": ""}, sort_keys=True) for arm in grid.arms}
    assert len(runs) == len(names)
