"""Plain values of a configuration: read from YAML or JSON, given the types that the fields have."""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import Any

from epic_rag.errors import ConfigError, MissingExtraError

__all__ = ["coerced", "read_values", "yaml_module"]


def read_values(file: Path) -> dict[str, Any]:
    """Read a YAML or JSON file of settings, which are not checked.

    Raises:
        ConfigError: If the file is missing or malformed.
        MissingExtraError: If it is YAML and PyYAML is not installed.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); pass a training configuration") from error
    if file.suffix == ".json":
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}:{error.lineno} is not valid JSON ({error.msg}); mend the line") from error
    else:
        data = _parse_yaml(text, file)
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds a {type(data).__name__}, expected names and values; see docs/training.md")
    return data


def yaml_module() -> types.ModuleType:
    """PyYAML.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("PyYAML", "train", "reading a YAML configuration") from error
    return yaml


def coerced(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    """Values of the types that a dataclass's fields have.

    Raises:
        TypeError: If there is no such field, or its type is another; names the field.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(str(name) for name in data if name not in hints)
    if unknown:
        raise TypeError(f"there is no {', '.join(unknown)}; known are {', '.join(hints)}")
    return {name: _value(name, value, hints[name]) for name, value in data.items()}


def _parse_yaml(text: str, file: Path) -> Any:
    yaml = yaml_module()
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{file}{line} is not valid YAML; mend the line") from error


_WORDS = {int: "a whole number", str: "a text", bool: "true or false"}


def _value(name: str, value: Any, hint: Any) -> Any:
    """YAML reads 3e-5 as a string and a list for a tuple; everything else must have its type already."""
    inner = typing.get_args(hint)
    if type(None) in inner:
        return None if value is None else _value(name, value, inner[0])
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} is {value!r}, expected a list")
        return tuple(_value(name, item, inner[0]) for item in value)
    if hint is float and type(value) in (int, float, str):
        try:
            return float(value)
        except ValueError:
            raise TypeError(f"{name} is {value!r}, expected a number") from None
    if hint in (int, str, bool) and type(value) is not hint:
        raise TypeError(f"{name} is {value!r}, expected {_WORDS[hint]}")
    return value
