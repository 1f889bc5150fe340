"""The configuration file: what the options of `index`, `query` and `status` are when nobody gives them.

`epic-rag.toml`, or `[tool.epic-rag]` in `pyproject.toml`, of the working directory or the nearest folder above it; the
search ends at a repository's top and at the home folder. Keys are long option names, in a table for each command, or
before the tables for the options that several commands share. A command line and the environment outdo it.

A folder from elsewhere may bring such a file along, so one that was found, rather than named with `--config`, can
neither send text to another machine, nor read or write outside its own folder, nor choose code or an editor to run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epic_rag.errors import ConfigError
from epic_rag_cli.output import message
from epic_rag_cli.registry import CommandOption, command_options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["CONFIG_NAME", "CONFIG_VARIABLE", "READERS", "SECTIONS", "SHARED", "Config", "Setting", "find", "load"]

CONFIG_NAME = "epic-rag.toml"
CONFIG_VARIABLE = "EPIC_RAG_CONFIG"
_PROJECT_NAME = "pyproject.toml"
_MOST_BYTES = 2**20

SECTIONS = ("index", "query", "status")
"""Commands that have a table of their own."""

READERS = (*SECTIONS, "clear")
"""Commands that take what stands before the tables, too."""

SHARED = ("model", "index-dir", "chroma", "quiet", "verbose")
"""Keys that stand before the tables, for every command that has the option."""

# What a command does once, on purpose, is no setting.
_NEVER = frozenset({"rebuild", "dry-run", "watch", "batch", "open", "yes", "quiet", "verbose"})
_ONLY_NAMED = frozenset({"chroma", "follow-links", "rerank"})
# Names that may be folders; where they are, they are relative to the file.
_NAMES = frozenset({"model", "bank", "rerank"})


@dataclass(frozen=True)
class Setting:
    """A value in a configuration file: its key as written there, and what the option gets."""

    key: str
    value: Any


@dataclass(frozen=True)
class Config:
    """A configuration file that was read: for each command, by the name of a parameter, what it sets."""

    path: Path | None = None
    values: Mapping[str, Mapping[str, Setting]] = field(default_factory=dict)


def find(start: Path) -> Path | None:
    """Return the configuration file for a folder: its own or that of the nearest folder above, if there is one."""
    home = Path.home()
    for folder in (start, *start.parents):
        for name in (CONFIG_NAME, _PROJECT_NAME):
            file = folder / name
            if file.is_file() and (name == CONFIG_NAME or _speaks_of_us(file)) and _is_trusted(file):
                return file
        if folder == home or (folder / ".git").exists():
            break
    return None


def load(given: Path | None) -> Config:
    """Return the configuration file that counts.

    Args:
        given: The file that `--config` or its variable names; None looks for one.

    Raises:
        ConfigError: The file cannot be read, or says something that is unknown or has the wrong type.
    """
    path = given if given is not None else find(Path.cwd())
    if path is None:
        return Config()
    content = _read(path)
    if path.name == _PROJECT_NAME:
        content = _table(path, "tool", content.get("tool", {})).get("epic-rag", {})
        content = _table(path, "tool.epic-rag", content)
    file = _File(path, named=given is not None)
    values: dict[str, dict[str, Setting]] = {name: {} for name in READERS}
    options = {name: {option.key: option for option in command_options(name)} for name in READERS}
    for key, value in content.items():
        if key in SECTIONS:
            known = {word: option for word, option in options[key].items() if word not in _NEVER}
            for word, one in _table(path, key, value).items():
                if word not in known:
                    raise file.unknown(word, f"[{key}]", known)
                values[key][known[word].name] = Setting(f"{key}.{word}", file.value(word, one, known[word]))
        elif key not in SHARED:
            raise file.unknown(key, "", (*SHARED, *(f"[{name}]" for name in SECTIONS)))
    for key in SHARED:
        for name in READERS if key in content else ():
            option = options[name].get(key)
            if option is not None:  # a command's own table is nearer
                values[name].setdefault(option.name, Setting(key, file.value(key, content[key], option)))
    return Config(path, values)


def _speaks_of_us(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MOST_BYTES)
    except OSError:
        return False
    # Most projects have nothing to say here, and one that is not to be parsed is not for us to complain about.
    if b"epic-rag" not in data:
        return False
    try:
        return "epic-rag" in tomllib.loads(data.decode("utf-8", "replace")).get("tool", {})
    except tomllib.TOMLDecodeError:
        return b"[tool.epic-rag" in data


def _is_trusted(file: Path) -> bool:
    """Whether a file that was found is this user's, or root's, as git asks of a repository."""
    if not hasattr(os, "geteuid"):
        return True
    if file.stat().st_uid in (os.geteuid(), 0):
        return True
    message("warning", f"{file} belongs to another user and does not count; give it with --config if you trust it")
    return False


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ConfigError(f"{path} is larger than {_MOST_BYTES // 2**20} MiB; give --config a configuration file")
        return tomllib.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give --config a file that can") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is no TOML ({error}); correct it, or give --config another file") from error


def _table(path: Path, key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key} is {_shown(value)}; it must be a table, [{key}]")
    return value


@dataclass(frozen=True)
class _File:
    """Where values come from, and whether the user named the file or it was just there."""

    path: Path
    named: bool

    def value(self, key: str, value: object, option: CommandOption) -> Any:
        """What an option gets for a value in the file."""
        if key in _ONLY_NAMED and not self.named:
            raise self._error(
                key, f"counts only in a file that is named; run the command with --config {self.path} if you trust it"
            )
        if not option.several:
            return self._one(key, value, option)
        return [self._one(key, one, option) for one in (value if isinstance(value, list) else [value])]

    def unknown(self, key: str, where: str, known: Iterable[str]) -> ConfigError:
        """The error for a key that no command has."""
        place = f"unknown key {key!r}" + (f" in {where}" if where else "")
        return ConfigError(f"{self.path}: {place}; known are {', '.join(sorted(known))}")

    def _one(self, key: str, value: object, option: CommandOption) -> Any:
        fits = isinstance(value, option.kind if option.kind is not float else (int, float))
        if option.kind is not bool and isinstance(value, bool):
            fits = False
        if not fits or (option.choices and value not in option.choices):
            raise self._error(key, f"is {_shown(value)}; it must be {option.wanted}")
        if isinstance(value, (int, float)) and not option.low <= value <= option.high:
            raise self._error(key, f"is {_shown(value)}; it must be {option.wanted}")
        if not isinstance(value, str):
            return value
        if not value:
            raise self._error(key, "is empty; leave it out, or give it a value")
        return self._place(key, value, option)

    def _place(self, key: str, value: str, option: CommandOption) -> str:
        folder = self.path.absolute().parent
        place = Path(os.path.normpath(folder / value))
        if key in _NAMES:
            return str(place) if place.exists() else value
        if not option.is_path:
            return value
        if not self.named and not place.resolve().is_relative_to(folder.resolve()):
            raise self._error(
                key,
                f"is {value}, which is outside of {folder}; that counts only in a file that is named: run the command "
                f"with --config {self.path} if you trust it",
            )
        return str(place)

    def _error(self, key: str, text: str) -> ConfigError:
        return ConfigError(f"{self.path}: {key} {text}")


def _shown(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
