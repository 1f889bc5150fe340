"""The configuration file: what the options of `index`, `query` and `status` are when nobody gives them.

`epic-rag.toml`, or `[tool.epic-rag]` in `pyproject.toml`, of the working directory or the nearest folder above it; the
search ends at a repository's top and at the home folder. Keys are long option names, in a table for each command, or
before the tables for the options that several commands share. A command line and the environment outdo it.

A folder from elsewhere may bring such a file along, so one that was found, rather than named with `--config`, can
neither send text to another machine, nor read or write outside its own folder, nor choose code or an editor to run.
"""

from __future__ import annotations

import enum
import functools
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from epic_rag.errors import ConfigError
from epic_rag_cli.terminal import Verbosity, ask, message

__all__ = [
    "CONFIG",
    "CONFIG_NAME",
    "CONFIG_VARIABLE",
    "QUIET",
    "READERS",
    "SECTIONS",
    "SHARED",
    "VERBOSE",
    "CommandOption",
    "Config",
    "Setting",
    "add_command",
    "command_options",
    "find",
    "help_when_alone",
    "load",
    "new_app",
    "with_common",
]


# --- from common
# The options that stand before a command or after it: `--quiet`, `--verbose`, `--config`.
#
# Each acts when it is read, before the command's own options are: what the configuration file says has to be known by
# then, as their default.

_COMMAND_LINE = "COMMANDLINE"


def CONFIG(hidden: bool) -> tuple[Any, Any]:  # noqa: N802 - an option, made anew for each command
    """Return the annotation and the default of `--config`."""
    option = typer.Option(
        "--config",
        metavar="FILE",
        envvar="EPIC_RAG_CONFIG",
        is_eager=True,
        hidden=hidden,
        callback=_configure,
        help="The configuration file, instead of the nearest epic-rag.toml or pyproject.toml. Also after a command.",
    )
    return Annotated[Path | None, option], None


def QUIET(hidden: bool) -> tuple[Any, Any]:  # noqa: N802
    """Return the annotation and the default of `--quiet`."""
    option = typer.Option(
        "--quiet",
        "-q",
        is_eager=True,
        hidden=hidden,
        callback=_quiet,
        help="Print errors and data only. Also after a command.",
    )
    return Annotated[bool, option], False


def VERBOSE(hidden: bool) -> tuple[Any, Any]:  # noqa: N802
    """Return the annotation and the default of `--verbose`."""
    option = typer.Option(
        "--verbose",
        "-v",
        is_eager=True,
        hidden=hidden,
        callback=_verbose,
        help="Also say what is read, embedded and reused. Also after a command.",
    )
    return Annotated[bool, option], False


def _quiet(context: typer.Context, value: bool) -> bool:
    return _volume(context, "quiet", value, Verbosity.QUIET)


def _verbose(context: typer.Context, value: bool) -> bool:
    return _volume(context, "verbose", value, Verbosity.VERBOSE)


def _volume(context: typer.Context, name: str, value: bool, level: Verbosity) -> bool:
    if value and not context.resilient_parsing:
        source = context.get_parameter_source(name)
        ask(level, firm=source is not None and source.name == _COMMAND_LINE)
        if level is Verbosity.VERBOSE:
            from epic_rag_cli.terminal import listen

            listen()
    return value


def _configure(context: typer.Context, value: Path | None) -> Path | None:
    """Give the command's options the defaults that the configuration file says."""
    if context.resilient_parsing:  # completion: nothing is read or said
        return value

    if context.parent is None:
        # The program's own; its commands read it.
        context.obj = value
        return value
    if value is None or not _is_own(context):
        value = context.parent.obj or value
    context.obj = value
    if context.info_name in READERS:
        settings = load(value).values.get(context.info_name or "", {})
        context.default_map = {name: setting.value for name, setting in settings.items()}
    return value


def _is_own(context: typer.Context) -> bool:
    """Whether `--config` stands after the command, which is nearer than before it or in the environment."""
    source = context.get_parameter_source("config_file")
    return source is not None and source.name == _COMMAND_LINE


# --- from registry
# How a command becomes part of an app: one call of `add_command`.
#
# Each command also gets the options that are written before or after its name: `--quiet`, `--verbose` and, where a
# configuration file counts, `--config`. They are in the program's own help and hidden in the commands'.

_COMMANDS: dict[str, Callable[..., None]] = {}


def new_app(name: str, about: Callable[..., None], *, program: bool = False) -> typer.Typer:
    """Return an app without commands.

    Help is plain: it can be piped, compared and copied, and it comes without the time that rich takes to
    import.

    Args:
        name: The word on the command line.
        about: A function of the Typer context and of options that stand before a command; its docstring is
            the help.
        program: Whether this is the program itself, whose help shows the common options.
    """
    app = typer.Typer(
        name=name,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True, help=_help_text(about))(
        with_common(about, hidden=not program, config=program)
    )
    return app


def add_command(
    app: typer.Typer,
    name: str,
    function: Callable[..., None],
    *,
    configured: bool = False,
    cls: type[TyperCommand] | None = None,
) -> None:
    """Add `function` to `app` as the command `name`; its docstring is the help.

    The docstring says what the command does and ends with an "Examples:" section of lines that run.

    Args:
        app: Where it belongs.
        name: The word on the command line.
        function: The command.
        configured: Whether a configuration file sets its options.
        cls: What reads the command line; None for Typer's own.
    """
    if configured:
        _COMMANDS[name] = function
    app.command(name, help=_help_text(function), cls=cls)(with_common(function, hidden=True, config=configured))


def with_common(function: Callable[..., None], *, hidden: bool, config: bool) -> Callable[..., None]:
    """Return a command that has the common options besides its own; they act before it is called."""
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints.get(name, parameter.annotation), kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
    ]
    common = {"config_file": CONFIG} if config else {}
    common |= {"quiet": QUIET, "verbose": VERBOSE}
    for name, make in common.items():
        annotation, default = make(hidden)
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )

    @functools.wraps(function)
    def command(**values: Any) -> None:
        function(**{name: value for name, value in values.items() if name not in common})

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def help_when_alone(context: typer.Context) -> None:
    """Print the help and exit as for a wrong command line, if an app was called without a command."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@dataclass(frozen=True)
class CommandOption:
    """An option of a command, as its function declares it.

    Args:
        name: The function's parameter.
        key: The long option without its dashes.
        kind: bool, int, float or str; a path is a str.
        several: Whether it can be repeated.
        is_path: Whether it names a file or folder.
        choices: The values that it can have; none for any.
        low: The smallest number.
        high: The largest number.
        variable: The environment variable, if there is one.
        default: Its default.
    """

    name: str
    key: str
    kind: type
    several: bool
    is_path: bool
    choices: tuple[str, ...]
    low: float
    high: float
    variable: str | None
    default: Any

    @property
    def wanted(self) -> str:
        """What a value must be, in words."""
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[self.kind]
        if self.choices:
            words = " or ".join(map(repr, self.choices))
        if self.low > -math.inf:
            words += f" from {self.low:g}" + (f" to {self.high:g}" if self.high < math.inf else "")
        return f"{words}, or a list of such" if self.several else words


def command_options(name: str) -> list[CommandOption]:
    """Return the options of a command that a configuration file can set."""
    if name not in _COMMANDS:
        return []
    found = []
    for parameter in inspect.signature(with_common(_COMMANDS[name], hidden=True, config=False)).parameters.values():
        if typing.get_origin(parameter.annotation) is not Annotated:
            continue
        annotation, *notes = typing.get_args(parameter.annotation)
        info = next((note for note in notes if isinstance(note, OptionInfo)), None)
        if info is None:  # an argument
            continue
        words = [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)]
        key = next((word[2:].partition("/")[0] for word in words if word.startswith("--")), "")
        if key:
            found.append(_described(parameter.name, key, annotation, info, parameter.default))
    return found


def _described(name: str, key: str, annotation: Any, info: OptionInfo, default: Any) -> CommandOption:
    annotation = _without_none(annotation)
    several = typing.get_origin(annotation) in (list, tuple)
    if several:
        annotation = _without_none(typing.get_args(annotation)[0])
    choices: tuple[str, ...] = ()
    if typing.get_origin(annotation) is Literal:
        choices, annotation = typing.get_args(annotation), str
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        choices, annotation = tuple(str(member.value) for member in annotation), str
    is_path = annotation is Path
    kind = annotation if annotation in (bool, int, float) else str
    low, high = (bound if bound is not None else edge for bound, edge in ((info.min, -math.inf), (info.max, math.inf)))
    variable = info.envvar if isinstance(info.envvar, str) else next(iter(info.envvar or ()), None)
    return CommandOption(name, key, kind, several, is_path, choices, low, high, variable, default)


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation
    return next(part for part in typing.get_args(annotation) if part is not type(None))


def _help_text(function: Callable[..., Any]) -> str:
    text = inspect.cleandoc(function.__doc__ or "")
    # A line with \b alone tells the formatter to leave the lines of the paragraph as they are.
    return text.replace("\nExamples:\n", "\n\b\nExamples:\n")


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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
