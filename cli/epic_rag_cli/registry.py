"""How a command becomes part of an app: one call of `add_command`.

Each command also gets the options that are written before or after its name: `--quiet`, `--verbose` and, where a
configuration file counts, `--config`. They are in the program's own help and hidden in the commands'.
"""

from __future__ import annotations

import enum
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from epic_rag_cli.common import CONFIG, QUIET, VERBOSE

__all__ = ["CommandOption", "add_command", "command_options", "help_when_alone", "new_app", "with_common"]

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
