"""Errors of epic-rag.

    EpicError
    ├── CheckpointError        a checkpoint is missing, broken or unknown
    ├── BankError              a demonstration bank is missing or malformed
    ├── DataError              a data file or a path is missing or malformed (names file and line)
    ├── TaskError              an unknown task
    ├── PromptError            a prompt that cannot be built (too long, bad k)
    ├── ConfigError            a setting with a value that cannot work
    ├── FingerprintError       stored vectors were made by another checkpoint
    ├── MissingExtraError      an optional package is not installed
    ├── RemoteModelError       a remote model does not answer, or refuses
    └── TrainingError          training cannot start, or went wrong (NaN loss, broken resume)

A message is a fact and a remedy in two short sentences. Code that calls epic-rag catches `EpicError`; the command line
prints it and exits with status 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "BankError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EpicError",
    "FingerprintError",
    "MissingExtraError",
    "PromptError",
    "RemoteModelError",
    "TaskError",
    "TrainingError",
]


class EpicError(Exception):
    """Base of every error that epic-rag raises on purpose."""


class CheckpointError(EpicError):
    """A checkpoint is missing, broken or has an unknown name."""


class BankError(EpicError):
    """A demonstration bank is missing or malformed."""


class DataError(EpicError):
    """A data file or a path is missing or malformed; the message names the file and, where there is one, the line."""


class TaskError(EpicError):
    """A task name is unknown; the message lists the known ones."""


class PromptError(EpicError):
    """A prompt cannot be built: it does not fit the model, or asks for demonstrations that are not there."""


class ConfigError(EpicError):
    """A setting has a value that cannot work."""


class FingerprintError(EpicError):
    """Stored vectors were computed by another checkpoint."""


class MissingExtraError(EpicError, ImportError):
    """An optional package is not installed; an ImportError, too, as programs expect of an import.

    Args:
        package: The package that could not be imported.
        extra: The extra of epic-rag that brings it.
        purpose: Its use, as the subject of "needs" ("reading PDF files").
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        subject = purpose[:1].upper() + purpose[1:]
        super().__init__(f"{subject} needs {package}, which is not installed. Run `pip install 'epic-rag[{extra}]'`.")
        self.package = package
        self.extra = extra
        self.purpose = purpose

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        # Exception pickles with args alone, which here is the finished message; workers need the three parts.
        return type(self), (self.package, self.extra, self.purpose)


class RemoteModelError(EpicError):
    """A remote embedding model does not answer, refuses, or answers with something else than vectors."""


class TrainingError(EpicError):
    """Training cannot start, or failed in a way that continuing would hide."""


@contextmanager
def needs_extra(extra: str, purpose: str, package: str | None = None) -> Iterator[None]:
    """Raise a `MissingExtraError` if a module that the block imports is not installed.

    A package that is installed and broken raises what it raises.

    Args:
        extra: The extra of epic-rag that brings it.
        purpose: See `MissingExtraError`.
        package: Its name in the message; None for the name of the module that is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(package or error.name or "a package", extra, purpose) from error


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
