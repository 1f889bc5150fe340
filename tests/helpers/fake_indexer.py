"""An indexer that returns given hits, for tests of the request that it gets and of what is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from epic_rag_chroma import Hit, SearchRequest, StaleState


def hit(**changes: Any) -> Hit:
    values: dict[str, Any] = {
        "rank": 1,
        "score": 0.033,
        "path": "guide/install.md",
        "first_line": 3,
        "last_line": 9,
        "page": None,
        "heading_path": ("Guide", "Install"),
        "text": "Run the installer.\n\nThen read the manual.",
        "id": "abc",
        "cosine": 0.71234,
    }
    return Hit(**{**values, **changes})


class FakeIndexer:
    """Returns given hits and records the calls."""

    hits: tuple[Hit, ...] = ()
    opened: dict[str, Any]
    request: SearchRequest
    texts: list[str]

    def __init__(
        self,
        index_dir: Path,
        *,
        encoder: Callable[[], object] | None = None,
        chroma: object = None,
        dtype: str | None = None,
        device: str | None = None,
    ) -> None:
        type(self).opened = {"index_dir": index_dir, "encoder": encoder, "chroma": chroma}
        type(self).texts = []

    def __enter__(self) -> FakeIndexer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stale_files(self, *, max_files: int) -> dict[str, StaleState]:
        return {}

    def query(self, text: str, request: SearchRequest) -> list[Hit]:
        type(self).request = request
        type(self).texts.append(text)
        return list(self.hits)

    def query_many(self, texts: Sequence[str], request: SearchRequest) -> list[list[Hit]]:
        type(self).request = request
        type(self).texts += texts
        return [list(self.hits) for _ in texts]
