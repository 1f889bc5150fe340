"""Errors of an index and of Chroma servers.

EpicError
├── ChromaServerError           a Chroma server cannot be reached, or refuses a request
└── IndexStateError             an index folder is not in the required state
    ├── IndexNotFoundError      there is no index
    ├── IndexDamagedError       its content cannot be read; a rebuild replaces it
    ├── IndexLockedError        another process is writing to it
    └── IndexMismatchError      it was built with another model or other settings
"""

from __future__ import annotations

from epic_rag.errors import EpicError

__all__ = [
    "ChromaServerError",
    "IndexDamagedError",
    "IndexLockedError",
    "IndexMismatchError",
    "IndexNotFoundError",
    "IndexStateError",
]


class ChromaServerError(EpicError):
    """A Chroma server cannot be reached, or refuses a request.

    Args:
        message: Fact and remedy.
        status: The HTTP status of its answer; None without an answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class IndexStateError(EpicError):
    """An index folder is not in the required state."""


class IndexNotFoundError(IndexStateError):
    """There is no index at the given place."""


class IndexDamagedError(IndexStateError):
    """The content of an index cannot be read. A rebuild replaces it."""


class IndexLockedError(IndexStateError):
    """Another process is writing to the index."""


class IndexMismatchError(IndexStateError):
    """The index was built with another model or other settings than the call asks for."""
