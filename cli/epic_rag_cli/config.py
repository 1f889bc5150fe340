"""Configuration files: TOML that gives the options of `index`, `query`, `status` and `clear` their defaults.

Precedence: command line, environment, `epic-rag.toml` or `[tool.epic-rag]` of `pyproject.toml` in the working directory
or the nearest folder above it (up to a repository's top or the home folder), the user's `config.toml`. A file named by
`--config` or EPIC_RAG_CONFIG replaces both. Keys are long option names, in a table for each command, or above the
tables for the options that several commands share. Values reach the commands through click's `default_map`, so that
they are parsed as on the command line.

A downloaded folder may contain such a file. A project file is therefore restricted: it can neither send text to another
machine, nor read or write outside its folder, nor choose code or an editor to run.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epic_rag.errors import ConfigError
from epic_rag.files import describe_os_error
from epic_rag_cli.terminal import message

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "COMMANDS",
    "CONFIG_NAME",
    "SHARED_KEYS",
    "Config",
    "find_project_file",
    "load",
    "option_keys",
    "user_file",
]

COMMANDS = ("index", "query", "status", "clear")
"""Commands that read configuration files; all but `clear` have a table."""

SHARED_KEYS = ("model", "index-dir", "chroma", "quiet", "verbose")
"""Keys above the tables, for every command that has the option."""

CONFIG_NAME = "epic-rag.toml"
_PROJECT_NAME = "pyproject.toml"
_PROJECT_TABLE = re.compile(rb"^[ \t]*\[tool\.epic-rag[.\]]", re.MULTILINE)
_MAX_BYTES = 2**20
# Options of one run, and options that only the user may choose.
_NOT_IN_TABLES = frozenset(
    {"from-parquet", "collection", "shards", "to", "ray", "actors", "cpus", "gpus", "vectors", "duplicates"}
    | {"remove", "rebuild", "dry-run", "watch", "batch", "open", "yes", "quiet", "verbose", "config", "help"}
)
_RESTRICTED = frozenset({"chroma", "follow-links", "rerank"})
# Names that are folders relative to the file if there is such a folder.
_NAMES_OR_FOLDERS = frozenset({"model", "bank", "rerank"})


@dataclass
class Config:
    """Settings of configuration files.

    Args:
        files: The files that were read, in increasing precedence.
        values: For each command, the default of each parameter (a `default_map`).
        origins: For each command, the file that sets a parameter.
    """

    files: list[Path] = field(default_factory=list)
    values: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: {} for name in COMMANDS})
    origins: dict[str, dict[str, Path]] = field(default_factory=lambda: {name: {} for name in COMMANDS})


def load(context: Any, given: Path | None) -> Config:
    """Return the settings of the configuration files that apply; they are read once for each command line.

    Args:
        context: The click context; its root command has the options of all commands.
        given: The file that `--config` or EPIC_RAG_CONFIG names; None for the user's and the project's file.

    Raises:
        ConfigError: If a file cannot be read, or has an unknown key or a value that is not allowed there.
    """
    read: dict[Path | None, Config] = context.meta.setdefault(__name__, {})
    if given in read:
        return read[given]
    config = Config()
    options = {name: option_keys(context.find_root().command.commands[name]) for name in COMMANDS}
    if given is not None:
        _add(config, given, options, trusted=True)
    else:
        if user_file().is_file():
            _add(config, user_file(), options, trusted=True)
        project = find_project_file(Path.cwd())
        if project is not None:
            _add(config, project, options, trusted=False)
    read[given] = config
    return config


def user_file() -> Path:
    """Return the path of the user's configuration file, below $XDG_CONFIG_HOME or the platform's equivalent."""
    from platformdirs import user_config_path

    return user_config_path("epic-rag", appauthor=False) / "config.toml"


def find_project_file(start: Path) -> Path | None:
    """Return the configuration file of `start` or of the nearest folder above it."""
    home = Path.home()
    for folder in (start, *start.parents):
        for name in (CONFIG_NAME, _PROJECT_NAME):
            file = folder / name
            if file.is_file() and (name == CONFIG_NAME or _PROJECT_TABLE.search(_start_of(file))):
                # The same rule as git's for a repository: the owner is this user or root.
                if hasattr(os, "geteuid") and file.stat().st_uid not in (os.geteuid(), 0):
                    message(
                        "warning", f"{file} belongs to another user and is ignored. To use it, pass it to --config."
                    )
                    continue
                return file
        if folder == home or (folder / ".git").exists():
            break
    return None


def option_keys(command: Any) -> dict[str, Any]:
    """Return the options of a click command by their long names without dashes."""
    found = {}
    for option in command.params:
        long = next((name for name in option.opts if name.startswith("--")), None)
        if option.param_type_name == "option" and long is not None:
            found[long[2:]] = option
    return found


def _start_of(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_BYTES)
    except OSError:
        return b""


def _add(config: Config, path: Path, options: dict[str, dict[str, Any]], *, trusted: bool) -> None:
    content = _read(path)
    if path.name == _PROJECT_NAME:
        content = _table(path, "tool.epic-rag", _table(path, "tool", content.get("tool", {})).get("epic-rag", {}))
    config.files.append(path)
    tables = {name: _table(path, name, content.pop(name, {})) for name in COMMANDS if name != "clear"}
    known = [*SHARED_KEYS, *(f"[{name}]" for name in tables)]
    for key in content:
        if key not in SHARED_KEYS:
            raise ConfigError(f"{path}: unknown key {key!r}. Known are {', '.join(known)}.")
    for name, command_options in options.items():
        table = tables.get(name, {})
        allowed = sorted(command_options.keys() - _NOT_IN_TABLES)
        for key in table:
            if key not in allowed:
                raise ConfigError(f"{path}: unknown key {key!r} in [{name}]. Known are {', '.join(allowed)}.")
        shared = {key: value for key, value in content.items() if key in command_options}
        for key, value in {**shared, **table}.items():
            option = command_options[key]
            config.values[name][option.name] = _default(path, key, value, option.multiple, trusted)
            config.origins[name][option.name] = path


def _default(path: Path, key: str, value: object, multiple: bool, trusted: bool) -> Any:
    """Return a value of a file as its option takes it: words as on the command line, paths relative to the file."""
    folder = path.absolute().parent
    if multiple and key != "index-dir":  # a file names one index
        words = [_word(path, key, one) for one in (value if isinstance(value, list) else [value])]
        places = [Path(os.path.normpath(folder / word)) for word in words]
        is_name = key not in _NAMES_OR_FOLDERS
        found = [
            word if is_name or not place.exists() else str(place) for word, place in zip(words, places, strict=True)
        ]
        return found[0] if key == "bank" and not isinstance(value, list) else found
    word = _word(path, key, value)
    place = Path(os.path.normpath(folder / word))
    if key in _RESTRICTED and not trusted:
        raise ConfigError(
            f"{path}: {key} is not allowed in a project's file. If you trust the file, run with --config {path}."
        )
    if key in _NAMES_OR_FOLDERS and place.exists():
        return str(place)
    if key != "index-dir":
        return word
    if not trusted and not place.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{path}: {key} is {word}, outside {folder}. If you trust the file, run with --config {path}."
        )
    return str(place)


def _word(path: Path, key: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (str, int, float)):
        raise ConfigError(f"{path}: {key} is {_short(value)}. Use a string, a number, true or false.")
    if value == "":
        raise ConfigError(f"{path}: {key} is empty. Give it a value or delete the key.")
    return str(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(
                f"{path} is larger than {_MAX_BYTES // 2**20} MiB. Pass a configuration file to --config."
            )
        return tomllib.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{describe_os_error(error)}. Make it readable or pass another file to --config.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML ({error}). Correct it.") from error


def _table(path: Path, key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key} is {_short(value)}. Make it a table, [{key}].")
    return value


def _short(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
