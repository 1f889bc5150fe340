"""Chroma for epic-rag: an embedding function, and an indexer from folders to a collection.

`EpicEmbeddingFunction` is registered with Chroma when it is imported. Nothing here imports chromadb, torch or
llama_index before it is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epic_rag_chroma.embedding_function import EpicEmbeddingFunction
    from epic_rag_chroma.errors import (
        ChromaServerError,
        IndexLockedError,
        IndexMismatchError,
        IndexNotFoundError,
        IndexStateError,
    )
    from epic_rag_chroma.indexer import ChromaIndexer
    from epic_rag_chroma.store.server import ChromaServer
    from epic_rag_chroma.types import (
        DEFAULT_MODE,
        SEARCH_MODES,
        Hit,
        IndexPlan,
        IndexProgress,
        IndexReport,
        IndexSettings,
        IndexStatus,
        SearchFilters,
        SearchMode,
        SkippedFile,
    )

__all__ = [
    "DEFAULT_MODE",
    "SEARCH_MODES",
    "ChromaIndexer",
    "ChromaServer",
    "ChromaServerError",
    "EpicEmbeddingFunction",
    "Hit",
    "IndexLockedError",
    "IndexMismatchError",
    "IndexNotFoundError",
    "IndexPlan",
    "IndexProgress",
    "IndexReport",
    "IndexSettings",
    "IndexStateError",
    "IndexStatus",
    "SearchFilters",
    "SearchMode",
    "SkippedFile",
]

_MODULES = {
    "ChromaIndexer": "indexer",
    "ChromaServer": "store.server",
    "EpicEmbeddingFunction": "embedding_function",
    "ChromaServerError": "errors",
    "IndexLockedError": "errors",
    "IndexMismatchError": "errors",
    "IndexNotFoundError": "errors",
    "IndexStateError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'types')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
