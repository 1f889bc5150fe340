"""Configurations: files, recipes, overrides, and one line for everything that cannot work."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.errors import ConfigError, MissingExtraError
from epic_rag.training import TaskConfig, TrainingConfig, list_recipes, load_recipe

MINIMAL = {"model": "m", "output": "o", "data": "d", "tasks": {"faq": {}}}


def make(**changes: Any) -> TrainingConfig:
    return TrainingConfig.from_dict({**MINIMAL, **changes})


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    yaml, plain = tmp_path / "run.yaml", tmp_path / "run.json"
    yaml.write_text(
        "model: m\noutput: o\ndata: d\nlearning_rate: 3e-5\nevaluation_demonstrations: [0, 4]\n"
        "tasks:\n  faq: {weight: 2, symmetric: true}\n  notes:\n"
    )
    values = {**MINIMAL, "learning_rate": 3e-5, "evaluation_demonstrations": [0, 4]}
    plain.write_text(json.dumps({**values, "tasks": {"faq": {"weight": 2, "symmetric": True}, "notes": {}}}))
    config = TrainingConfig.from_file(yaml)
    assert config == TrainingConfig.from_file(plain)
    assert config.learning_rate == 3e-5  # which YAML reads as a string
    assert config.evaluation_demonstrations == (0, 4)
    assert config.tasks == {"faq": TaskConfig(weight=2.0, symmetric=True), "notes": TaskConfig()}
    assert TrainingConfig.from_file(yaml, steps=7).steps == 7


def test_round_trip() -> None:
    config = make(steps=3, tasks={"faq": {"weight": 2}}, evaluation_tasks=["faq"])
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_tasks_can_be_a_list() -> None:
    assert make(tasks=["b", "a"]).tasks == {"b": TaskConfig(), "a": TaskConfig()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stepps": 3}, "there is no stepps; known are model, "),
        ({"steps": "many"}, "steps is 'many', expected a whole number"),
        ({"steps": 2.5}, "steps is 2.5, expected a whole number"),
        ({"steps": True}, "steps is True, expected a whole number"),
        ({"steps": 0}, "steps is 0, which trains nothing; give a value of at least 1"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', expected a number"),
        ({"learning_rate": 0}, "learning_rate is 0.0; give a value above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"temperature": -1}, "temperature is -1.0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"max_demonstrations": -1}, "max_demonstrations is -1; give a value of 0 or more"),
        ({"num_layers": 0}, "num_layers is 0; give a value at least 1"),
        ({"num_layers": "two"}, "num_layers is 'two', expected a whole number"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"detach_demonstrations": "no"}, "detach_demonstrations is 'no', expected true or false"),
        ({"strategy": "magic"}, "strategy is 'magic', known are epic, text, none"),
        ({"projector": "big"}, "projector is 'big', known are scale, linear, mlp"),
        ({"separators": "commas"}, "separators is 'commas', known are words, none"),
        ({"dtype": "int8"}, "dtype is 'int8', known are auto, float32, bfloat16, float16"),
        ({"warmup": 2}, "warmup is 2.0; give a share"),
        ({"lora_rank": 0}, "lora_rank is 0; give a value at least 1"),
        ({"lora_alpha": 0}, "lora_alpha is 0.0; give a value above 0"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5; give a share"),
        ({"lora_rank": 4, "lora_targets": []}, "lora_rank is 4 and lora_targets is empty; name modules"),
        ({"lora_targets": "q_proj"}, "lora_targets is 'q_proj', expected a list"),
        ({"grad_cache": 1}, "grad_cache is 1, expected true or false"),
        ({"hard_negatives": -1}, "hard_negatives is -1; give a value of 0 or more"),
        ({"matryoshka_dims": [64, 0]}, "matryoshka_dims is [64, 0]; give widths of 1 or more"),
        ({"false_negative_margin": math.nan}, "false_negative_margin is nan; give a difference of cosines"),
        ({"teacher": "m"}, "teacher is 'm' and teacher_weight is 0; give a weight"),
        ({"teacher_weight": 1}, "teacher_weight is 1.0 and there is no teacher; name one"),
        (
            {"contrastive_weight": 0},
            "contrastive_weight is 0 and there is no teacher, which leaves nothing to learn from",
        ),
        ({"contrastive_weight": -1}, "contrastive_weight is -1.0; give a value of 0 or more"),
        ({"teacher_loss": "words"}, "teacher_loss is 'words', known are cosines, vectors; choose one of them"),
        ({"attention": "flash"}, "attention is 'flash', known are eager, sdpa; choose one of them"),
        ({"output_dimension": 0}, "output_dimension is 0; give a value at least 1"),
        ({"teacher": "m", "teacher_weight": -1}, "teacher_weight is -1.0; give a value of 0 or more"),
        ({"mismatched_weight": -1}, "mismatched_weight is -1.0; give a value of 0 or more"),
        ({"demonstration_source": "web"}, "demonstration_source is 'web', known are batch, bank"),
        ({"demonstration_instructions": "none"}, "demonstration_instructions is 'none', known are shared, each"),
        ({"demonstration_source": "bank", "bank_size": 4}, "bank_size is 4 and max_demonstrations is 8; a bank"),
        ({"demonstration_source": "bank", "turned_round": 0.5}, "'bank' and turned_round is 0.5"),
        ({"demonstration_source": "bank", "tasks": {"faq": {"sources": 2}}}, "'bank' and tasks.faq.sources is 2"),
        (
            {"tasks": {"faq": {"in_batch_negatives": False}}, "hard_negatives": 0},
            "tasks.faq.in_batch_negatives is false and hard_negatives is 0",
        ),
        (
            {"tasks": {"faq": {"in_batch_negatives": False}}, "turned_round": 0.5},
            "tasks.faq.in_batch_negatives is false and turned_round is 0.5",
        ),
        ({"turned_round": 1.5}, "turned_round is 1.5; give a share"),
        ({"generic_instruction": 0.7, "no_instruction": 0.7}, "together they are at most 1"),
        ({"generic_instruction": 0.7, "generic_instructions": []}, "generic_instructions is empty"),
        ({"turned_round": 0.7, "generic_instructions": []}, "generic_instructions is empty"),
        ({"evaluation_tasks": "faq"}, "evaluation_tasks is 'faq', expected a list"),
        ({"evaluation_demonstrations": [0, "four"]}, "'four', expected a whole number"),
        ({"evaluation_demonstrations": [0, -4]}, "evaluation_demonstrations is [0, -4]"),
        ({"device": "cuda:0,cuda:1"}, "device is 'cuda:0,cuda:1', a process that trains has one; leave it out"),
        ({"tasks": {}}, "tasks is empty"),
        ({"tasks": "faq"}, "tasks is 'faq', expected names of files"),
        ({"tasks": {"faq": 3}}, "tasks.faq is 3, expected settings"),
        ({"tasks": {"faq": {"wait": 2}}}, "tasks.faq: there is no wait; known are weight, "),
        ({"tasks": {"faq": {"weight": 0}}}, "tasks.faq: weight is 0.0"),
        ({"tasks": {"faq": {"weight": "heavy"}}}, "tasks.faq: weight is 'heavy', expected a number"),
        ({"tasks": {"faq": {"sources": -1}}}, "tasks.faq: sources is -1"),
        ({"tasks": {"faq": {"sources": 9}}, "batch_size": 16}, "tasks.faq.sources is 9, which leaves 1"),
        ({"batch_size": 3, "tasks_per_batch": 2}, "batch_size is 3 for 2 tasks in a batch"),
    ],
)
def test_a_setting_that_cannot_work_is_named(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)
    # What is wrong is followed by what to do.
    assert ";" in str(caught.value)


def test_required_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="does not set data, tasks; add it"):
        TrainingConfig.from_dict({"model": "m", "output": "o"})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("run.yaml", "model: m\noutput: [o\ndata: d\n", r"run.yaml:3 is not valid YAML"),
        ("run.yaml", "model: m\n\tdata: d\n", r"run.yaml:2 is not valid YAML"),
        ("run.json", '{"model": "m",\n oops}', r"run.json:2 is not valid JSON"),
        ("run.yaml", "- a\n- b\n", r"run.yaml holds a list, expected names and values"),
        ("run.yaml", "", r"run.yaml holds a NoneType"),
        ("run.yaml", "steps: 3\n1: 2\n", r"run.yaml does not set data, model, output, tasks"),
        ("run.yaml", "model: m\noutput: o\ndata: d\ntasks: [a]\n1: 2\n", r"run.yaml .*there is no 1; known are"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, expected: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=expected):
        TrainingConfig.from_file(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        TrainingConfig.from_file(tmp_path / "nowhere.yaml")


def test_yaml_without_pyyaml_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("model: m\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'epic-rag[train]'")):
        TrainingConfig.from_file(tmp_path / "run.yaml")


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_loads(name: str) -> None:
    config = load_recipe(name, ["tasks=[faq]"] if name == "own-data" else [])
    assert config.description
    assert config.tasks
    assert not Path(config.output).is_absolute()


def test_there_are_recipes() -> None:
    assert "own-data" in list_recipes()


def test_a_file_wins_over_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own-data").write_text("model: m\noutput: o\ndata: d\ntasks: [mine]\n")
    assert list(load_recipe("own-data").tasks) == ["mine"]


def test_unknown_recipe() -> None:
    with pytest.raises(ConfigError, match=r"no file nothing, and the recipes are .*own-data.*; pass"):
        load_recipe("nothing")


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., TrainingConfig]:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\noutput: o\ndata: d\ntasks: {faq: {weight: 3}, notes: }\n")
    return lambda *settings, **options: load_recipe(str(file), settings, **options)


def test_overrides(recipe: Callable[..., TrainingConfig]) -> None:
    config = recipe("steps=7", "learning_rate=1e-4", "num_layers=null", "description=a = b", "evaluation_tasks=[faq]")
    assert (config.steps, config.learning_rate, config.num_layers) == (7, 1e-4, None)
    assert (config.description, config.evaluation_tasks) == ("a = b", ("faq",))


def test_overrides_of_a_task(recipe: Callable[..., TrainingConfig]) -> None:
    config = recipe("tasks.faq.symmetric=true", "tasks.notes.weight=2", "tasks.v1.2.weight=4")
    assert config.tasks == {
        "faq": TaskConfig(weight=3.0, symmetric=True),
        "notes": TaskConfig(weight=2.0),
        "v1.2": TaskConfig(weight=4.0),
    }
    assert recipe("tasks=[a]", "tasks.a.weight=2").tasks == {"a": TaskConfig(weight=2.0)}


@pytest.mark.parametrize("setting", ["steps", "stepps=3", "=3", "tasks.faq=3", "steps.faq.weight=3", ""])
def test_an_override_of_nothing(recipe: Callable[..., TrainingConfig], setting: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"the setting {setting!r} is not NAME=VALUE")):
        recipe(setting)


def test_an_override_that_is_not_yaml(recipe: Callable[..., TrainingConfig]) -> None:
    with pytest.raises(ConfigError, match="not valid YAML; put it in quotes"):
        recipe("description=[a")


def test_output_and_default_model(tmp_path: Path, recipe: Callable[..., TrainingConfig]) -> None:
    assert recipe(output="elsewhere", default_model="other").output == "elsewhere"
    assert recipe(default_model="other").model == "m"
    (tmp_path / "run.yaml").write_text("output: o\ndata: d\ntasks: [a]\n")
    assert recipe(default_model="other").model == "other"
    assert recipe().model == DEFAULT_CHECKPOINT
