"""An indexer that answers with given hits, for tests of what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from epic_rag_chroma import Hit


def hit(**changes: Any) -> Hit:
    values: dict[str, Any] = {
        "rank": 1,
        "score": 0.71234,
        "path": "guide/install.md",
        "first_line": 3,
        "last_line": 9,
        "page": None,
        "heading_path": ("Guide", "Install"),
        "text": "Run the installer.\n\nThen read the manual.",
        "id": "abc",
    }
    return Hit(**{**values, **changes})


class FakeIndexer:
    """Answers with given hits and remembers what it was asked."""

    hits: tuple[Hit, ...] = ()
    asked: dict[str, Any]

    def __init__(
        self,
        index_dir: Path,
        *,
        encoder: Callable[[], object] | None = None,
        chroma: object = None,
        dtype: str | None = None,
        device: str | None = None,
    ) -> None:
        type(self).asked = {"index_dir": index_dir, "encoder": encoder, "chroma": chroma}

    def __enter__(self) -> FakeIndexer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def query(self, text: str, **options: Any) -> list[Hit]:
        type(self).asked.update(options, text=text)
        return list(self.hits)

    def query_many(self, texts: Sequence[str], **options: Any) -> list[list[Hit]]:
        type(self).asked.update(options, texts=[*type(self).asked.get("texts", []), *texts])
        return [list(self.hits) for _ in texts]
