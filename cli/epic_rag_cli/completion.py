"""What the shell offers for an option's value: names that are known without loading anything."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from epic_rag_cli.defaults import ComputeDtype, ShownBy

__all__ = [
    "complete_banks",
    "complete_dtypes",
    "complete_models",
    "complete_modes",
    "complete_strategies",
    "complete_tasks",
]


def complete_models(incomplete: str) -> list[str]:
    """Return the models that ship with the package, and folders that hold a checkpoint."""
    from epic_rag.checkpoints import list_checkpoints

    return [*_starting([info.name for info in list_checkpoints()], incomplete), *_folders(incomplete, "config.json")]


def complete_banks(incomplete: str) -> list[str]:
    """Return the built-in banks, and folders that hold one."""
    from epic_rag.demonstrations import built_in_banks

    return [*_starting(list(built_in_banks()), incomplete), *_folders(incomplete, "bank.json")]


def complete_dtypes(incomplete: str) -> list[str]:
    """Return what a model can compute in."""
    return _starting(list(get_args(ComputeDtype)), incomplete)


def complete_tasks(incomplete: str) -> list[str]:
    """Return the tasks."""
    from epic_rag.tasks import list_tasks

    return _starting([task.name for task in list_tasks()], incomplete)


def complete_modes(incomplete: str) -> list[str]:
    """Return the ways to search."""
    from epic_rag_chroma.types import SEARCH_MODES

    return _starting(list(SEARCH_MODES), incomplete)


def complete_strategies(incomplete: str) -> list[str]:
    """Return the ways in which demonstrations reach a query."""
    return _starting(list(get_args(ShownBy)), incomplete)


def _starting(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _folders(incomplete: str, file: str) -> list[str]:
    """Return folders whose path begins like this: those that hold `file`, and with a slash those to look further in."""
    given, slash, _ = incomplete.rpartition("/")
    parent = Path(given or slash or ".")
    found = []
    try:
        for folder in sorted(parent.iterdir()):
            shown = f"{given}{slash}{folder.name}"
            hidden = folder.name.startswith(".") and not incomplete.rpartition("/")[2].startswith(".")
            if hidden or not shown.startswith(incomplete) or not folder.is_dir():
                continue
            found.append(shown if (folder / file).is_file() else f"{shown}/")
    except OSError:
        return []
    return found
