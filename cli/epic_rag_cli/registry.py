"""How a command becomes part of an app: one call of `add_command`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import typer

__all__ = ["add_command", "new_app"]


def new_app(name: str, about: Callable[..., None]) -> typer.Typer:
    """Return an app without commands.

    Help is plain: it can be piped, compared and copied, and it comes without the time that rich takes to
    import.

    Args:
        name: The word on the command line.
        about: A function of the Typer context and of options that stand before a command; its docstring is
            the help.
    """
    app = typer.Typer(
        name=name,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True, help=_help_text(about))(about)
    return app


def add_command(app: typer.Typer, name: str, function: Callable[..., None]) -> None:
    """Add `function` to `app` as the command `name`; its docstring is the help.

    The docstring says what the command does and ends with an "Examples:" section of lines that run.
    """
    app.command(name, help=_help_text(function))(function)


def help_when_alone(context: typer.Context) -> None:
    """Print the help and exit as for a wrong command line, if an app was called without a command."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def _help_text(function: Callable[..., Any]) -> str:
    text = inspect.cleandoc(function.__doc__ or "")
    # A line with \b alone tells the formatter to leave the lines of the paragraph as they are.
    return text.replace("\nExamples:\n", "\n\b\nExamples:\n")
