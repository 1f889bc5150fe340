"""The hits of the last query, kept in the user's state folder, so that `bank add` can name one by its number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from epic_rag.errors import DataError
from epic_rag.files import write_atomically

if TYPE_CHECKING:
    from epic_rag_chroma import Hit

__all__ = ["LastQuery", "load_last_query", "save_last_query"]


@dataclass(frozen=True)
class LastQuery:
    """A query and the passages that it found, best first."""

    query: str
    passages: tuple[str, ...]


def save_last_query(query: str, hits: Sequence[Hit]) -> None:
    """Store a query with its hits, readable by the user alone. A folder that cannot be written is no error."""
    file = _file()
    data = json.dumps({"query": query, "passages": [hit.text for hit in hits]})
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch(0o600)
        write_atomically(file, data)
        file.chmod(0o600)


def load_last_query() -> LastQuery:
    """Return the last query.

    Raises:
        DataError: If there was none, or its file is damaged.
    """
    try:
        data = json.loads(_file().read_text(encoding="utf-8"))
        return LastQuery(str(data["query"]), tuple(map(str, data["passages"])))
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError("There is no last query. Run `epic-rag query`, or name a passage as FILE:LINE.") from None


def _file() -> Path:
    from platformdirs import user_state_path

    return user_state_path("epic-rag", appauthor=False) / "last_query.json"
