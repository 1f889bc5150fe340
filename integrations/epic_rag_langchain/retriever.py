"""`EpicRetriever`: an index made by `epic-rag index` as a LangChain retriever.

It holds one `SearchRequest` and passes it to `ChromaIndexer.query` with each query. Importing this module loads neither
torch nor chromadb.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import PrivateAttr

from epic_rag_chroma import HEADING_SEPARATOR, ChromaIndexer, FederatedIndex, Hit, SearchRequest

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from epic_rag import EpicEncoder
    from epic_rag_chroma import ChromaServer, SearchSettings

__all__ = ["EpicRetriever", "to_documents"]


class EpicRetriever(BaseRetriever):
    """Retrieve from an index folder: dense, by keywords or both, with demonstrations, filters and a reranker.

    A document has the exact text of the hit, its id, and in `metadata` its place: `source` (the file's absolute path),
    `path` (relative to the indexed folder), `first_line` and `last_line` or `page`, `heading_path`, `kind`, `lang` of
    source code, and `score`. Settings of one call are given to `invoke`: `retriever.invoke(query, k=3)`.

    The first query loads the encoder and opens the index. Thread-safe; async methods use a thread of the retriever.

    Args:
        index_dir: The index folder; several folders of one model are searched as one.
        encoder: An encoder, or a function that loads one; None for the model that the index was built with.
        chroma: Address of the Chroma server that holds the vectors, if it is not the one that the index names.
        tags: As in every LangChain retriever.
        metadata: The same.
        **settings: See `SearchRequest`: `k` (5), `mode`, `filters`, `task`, `bank`, `reranker`, ...

    Raises:
        ConfigError: If a setting is unknown or has no meaning.
        PromptError: If the prompt's settings do not fit together.

    Example:
        >>> retriever = EpicRetriever("docs/.epic-rag", k=3, task="docs")
        >>> retriever.invoke("how do I undo a commit?")[0].metadata["path"]
        'guide.md'
    """

    _indexer: ChromaIndexer | FederatedIndex = PrivateAttr()
    _request: SearchRequest = PrivateAttr()
    _thread: ThreadPoolExecutor = PrivateAttr()

    def __init__(
        self,
        index_dir: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        encoder: EpicEncoder | Callable[[], EpicEncoder] | None = None,
        chroma: str | ChromaServer | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **settings: Unpack[SearchSettings],
    ) -> None:
        super().__init__(tags=tags, metadata=metadata)
        self._request = SearchRequest().with_settings(**settings)
        if isinstance(index_dir, (str, os.PathLike)):
            self._indexer = ChromaIndexer(index_dir, encoder=encoder, chroma=chroma)
        else:
            self._indexer = FederatedIndex(list(index_dir), encoder=encoder, chroma=chroma)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="epic-retriever")

    @property
    def indexer(self) -> ChromaIndexer | FederatedIndex:
        """The index, or all of them."""
        return self._indexer

    def close(self) -> None:
        """Close the index; a later query opens it again."""
        self._indexer.close()

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **settings: Unpack[SearchSettings]
    ) -> list[Document]:
        return self._search(query, settings)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **settings: Unpack[SearchSettings]
    ) -> list[Document]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._search, query, settings)

    def _search(self, query: str, settings: SearchSettings) -> list[Document]:
        return to_documents(self._indexer.query(query, self._request.with_settings(**settings)))


def to_documents(hits: Sequence[Hit]) -> list[Document]:
    """Return LangChain documents, in the order of the hits.

    Args:
        hits: Hits, best first.
    """
    documents = []
    for hit in hits:
        values: dict[str, Any] = {
            "source": str(Path(hit.root) / hit.path),
            "path": hit.path,
            "first_line": hit.first_line,
            "last_line": hit.last_line,
            "page": hit.page,
            "heading_path": HEADING_SEPARATOR.join(hit.heading_path),
            "kind": hit.kind,
            "lang": hit.lang,
            "score": hit.score,
        }
        metadata = {key: value for key, value in values.items() if value not in (None, "")}
        documents.append(Document(id=hit.id, page_content=hit.text, metadata=metadata))
    return documents
