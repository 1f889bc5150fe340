"""Configurations by name or file, and settings from a command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.errors import ConfigError
from epic_rag.training._values import read_values, yaml_module
from epic_rag.training.config import TrainingConfig

__all__ = ["change_setting", "list_recipes", "load_recipe", "recipe_values"]

_RECIPES = Path(__file__).parent / "recipes"


def list_recipes() -> list[str]:
    """Names of the configurations that ship with the package, sorted."""
    return sorted(file.stem for file in _RECIPES.glob("*.yaml"))


def load_recipe(
    name_or_path: str,
    settings: Sequence[str] = (),
    *,
    output: str | None = None,
    default_model: str = DEFAULT_CHECKPOINT,
) -> TrainingConfig:
    """Read a configuration.

    Args:
        name_or_path: A YAML or JSON file, or the name of a shipped recipe. A file wins.
        settings: Overrides such as "steps=100" or "tasks.faq.weight=2"; values are read as YAML.
        output: Replaces the run's folder.
        default_model: The backbone where the configuration names none.

    Raises:
        ConfigError: If there is no such file or recipe, or a setting cannot work.
        MissingExtraError: If PyYAML is needed and not installed.
    """
    values = recipe_values(name_or_path)
    for setting in settings:
        change_setting(values, setting)
    values.setdefault("model", default_model)
    if output is not None:
        values["output"] = output
    return TrainingConfig.from_dict(values, origin=name_or_path)


def recipe_values(name_or_path: str) -> dict[str, Any]:
    """Read the plain values of a configuration, which are not checked.

    Args:
        name_or_path: A YAML or JSON file, or the name of a shipped recipe. A file wins.

    Raises:
        ConfigError: If there is no such file or recipe.
        MissingExtraError: If PyYAML is needed and not installed.
    """
    file = Path(name_or_path).expanduser()
    if not file.is_file():
        known = list_recipes()
        if name_or_path not in known:
            raise ConfigError(
                f"no file {name_or_path}, and the recipes are {', '.join(known)}; "
                "pass a YAML or JSON file, or one of them"
            )
        file = _RECIPES / f"{name_or_path}.yaml"
    return read_values(file)


def change_setting(values: dict[str, Any], setting: str) -> None:
    """Put a setting such as "steps=100" or "tasks.faq.weight=2" into plain values.

    Raises:
        ConfigError: If there is no such setting, or its value is no YAML.
    """
    name, equals, text = setting.partition("=")
    path = name.strip().split(".")
    # A name of a task may have dots of its own.
    path = [path[0], ".".join(path[1:-1]), path[-1]] if len(path) > 2 else path
    known = [item.name for item in fields(TrainingConfig)]
    if not equals or path[0] not in known or (len(path) > 1 and (path[0] != "tasks" or len(path) != 3)):
        raise ConfigError(
            f"the setting {setting!r} is not NAME=VALUE or tasks.TASK.NAME=VALUE; names are {', '.join(known)}"
        )
    yaml = yaml_module()
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the setting {setting!r} has a value that is not valid YAML; put it in quotes") from error
    if len(path) == 1:
        values[path[0]] = value
        return
    tasks = values.get("tasks") or {}
    tasks = dict.fromkeys(tasks) if isinstance(tasks, list) else dict(tasks)
    tasks[path[1]] = {**(tasks.get(path[1]) or {}), path[2]: value}
    values["tasks"] = tasks
