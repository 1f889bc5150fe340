"""Chroma for epic-rag: `ChromaIndexer` indexes and searches folders, `EpicEmbeddingFunction` serves any collection.

Import everything from here. Names are loaded when they are first used: importing this package, `ChromaIndexer` and
`SearchRequest` loads neither chromadb nor torch. `EpicEmbeddingFunction` is registered with Chroma as soon as both are
imported, in either order.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from epic_rag.errors import needs_extra
from epic_rag_chroma.registration import register_with_chroma

if TYPE_CHECKING:
    from epic_rag_chroma.embedding_function import EpicEmbeddingFunction
    from epic_rag_chroma.errors import (
        ChromaServerError,
        IndexLockedError,
        IndexMismatchError,
        IndexNotFoundError,
        IndexStateError,
    )
    from epic_rag_chroma.federation import FederatedIndex
    from epic_rag_chroma.indexer import ChromaIndexer
    from epic_rag_chroma.indexing.documents import (
        ChunkRecord,
        DocumentSplitter,
        SplitDocument,
        find_documents,
        select_documents,
    )
    from epic_rag_chroma.query_server import (
        LOCAL_QUERY_PATH,
        ServedModel,
        ServerAnswer,
        announce_server,
        query_running_server,
        search_request_of,
    )
    from epic_rag_chroma.reading.document import HEADING_SEPARATOR
    from epic_rag_chroma.search.conditions import KNOWN_KEYS, Combination, Comparison, Condition
    from epic_rag_chroma.search.filters import parse_filters
    from epic_rag_chroma.search.highlight import QueryWords, Span
    from epic_rag_chroma.search.request import SearchRequest, SearchSettings
    from epic_rag_chroma.search.reranking import Reranker
    from epic_rag_chroma.search.searcher import Embedded
    from epic_rag_chroma.sharded import ShardedCollection
    from epic_rag_chroma.store.database import Record
    from epic_rag_chroma.store.keyword_index import KeywordsUnavailableError
    from epic_rag_chroma.store.server import LOCAL, NO_CHROMA, ChromaServer, parse_server, request_headers
    from epic_rag_chroma.store.shards import ShardInDoubtError, Shards, shard_of
    from epic_rag_chroma.types import (
        DEFAULT_MODE,
        DEFAULT_PER_FILE,
        INDEX_FOLDER,
        SEARCH_MODES,
        Hit,
        IndexedPassage,
        IndexPlan,
        IndexProgress,
        IndexReport,
        IndexSettings,
        IndexStatus,
        Mark,
        ModelInfo,
        SearchFilters,
        SearchMode,
        SkippedFile,
        StaleState,
        WriteCounts,
    )
    from epic_rag_chroma.walk.files import FoundFile

__all__ = [
    "DEFAULT_MODE",
    "DEFAULT_PER_FILE",
    "HEADING_SEPARATOR",
    "INDEX_FOLDER",
    "KNOWN_KEYS",
    "LOCAL",
    "LOCAL_QUERY_PATH",
    "NO_CHROMA",
    "SEARCH_MODES",
    "ChromaIndexer",
    "ChromaServer",
    "ChromaServerError",
    "ChunkRecord",
    "Combination",
    "Comparison",
    "Condition",
    "DocumentSplitter",
    "Embedded",
    "EpicEmbeddingFunction",
    "FederatedIndex",
    "FoundFile",
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
    "IndexedPassage",
    "KeywordsUnavailableError",
    "Mark",
    "ModelInfo",
    "QueryWords",
    "Record",
    "Reranker",
    "SearchFilters",
    "SearchMode",
    "SearchRequest",
    "SearchSettings",
    "ServedModel",
    "ServerAnswer",
    "ShardInDoubtError",
    "ShardedCollection",
    "Shards",
    "SkippedFile",
    "Span",
    "SplitDocument",
    "StaleState",
    "WriteCounts",
    "announce_server",
    "find_documents",
    "parse_filters",
    "parse_server",
    "query_running_server",
    "request_headers",
    "search_request_of",
    "select_documents",
    "shard_of",
]

_NAMES = {
    "embedding_function": ("EpicEmbeddingFunction",),
    "errors": ("ChromaServerError", "IndexLockedError", "IndexMismatchError", "IndexNotFoundError", "IndexStateError"),
    "federation": ("FederatedIndex",),
    "indexer": ("ChromaIndexer",),
    "indexing.documents": (
        "ChunkRecord",
        "DocumentSplitter",
        "SplitDocument",
        "find_documents",
        "select_documents",
    ),
    "query_server": (
        "LOCAL_QUERY_PATH",
        "ServedModel",
        "ServerAnswer",
        "announce_server",
        "query_running_server",
        "search_request_of",
    ),
    "reading.document": ("HEADING_SEPARATOR",),
    "search.conditions": ("KNOWN_KEYS", "Combination", "Comparison", "Condition"),
    "search.filters": ("parse_filters",),
    "search.highlight": ("QueryWords", "Span"),
    "search.request": ("SearchRequest", "SearchSettings"),
    "search.reranking": ("Reranker",),
    "search.searcher": ("Embedded",),
    "sharded": ("ShardedCollection",),
    "store.database": ("Record",),
    "store.keyword_index": ("KeywordsUnavailableError",),
    "store.server": ("LOCAL", "NO_CHROMA", "ChromaServer", "parse_server", "request_headers"),
    "store.shards": ("ShardInDoubtError", "Shards", "shard_of"),
    "types": (
        "DEFAULT_MODE",
        "DEFAULT_PER_FILE",
        "INDEX_FOLDER",
        "SEARCH_MODES",
        "Hit",
        "IndexPlan",
        "IndexProgress",
        "IndexReport",
        "IndexSettings",
        "IndexStatus",
        "IndexedPassage",
        "Mark",
        "ModelInfo",
        "SearchFilters",
        "SearchMode",
        "SkippedFile",
        "StaleState",
        "WriteCounts",
    ),
    "walk.files": ("FoundFile",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs_extra("index", name):
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_chroma()
