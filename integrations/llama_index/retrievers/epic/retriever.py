"""`EpicRetriever`: an index made by `epic-rag index` as a LlamaIndex retriever.

A retriever holds one `SearchRequest`, made from its keyword settings, and passes it to `ChromaIndexer.query` with each
query. LlamaIndex's `MetadataFilters` become `SearchFilters` on the way in, hits become nodes on the way out. Importing
this module loads neither torch nor chromadb.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import (
    IndexNode,
    NodeRelationship,
    NodeWithScore,
    ObjectType,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.settings import Settings
from llama_index.core.vector_stores.types import FilterCondition, MetadataFilter, MetadataFilters
from typing_extensions import Unpack

from epic_rag.errors import ConfigError
from epic_rag.query_prompt import PromptSettings
from epic_rag_chroma import (
    HEADING_SEPARATOR,
    ChromaIndexer,
    Combination,
    Comparison,
    FederatedIndex,
    Hit,
    SearchFilters,
    SearchMode,
    SearchRequest,
    ShardedCollection,
)

if TYPE_CHECKING:
    from llama_index.core.llms import LLM

    from epic_rag import EpicEncoder
    from epic_rag_chroma import ChromaServer, Condition, Embedded, Reranker, SearchSettings

__all__ = ["EpicRetriever", "RetrieverSettings", "to_nodes", "to_search_filters"]

logger = logging.getLogger(__name__)

# Metadata that an LLM needs to name its source. More would cost tokens, and absolute paths are private.
_FOR_LLM = ("path", "first_line", "last_line", "page", "heading_path")
# Metadata that the index's encoder reads before the text.
_FOR_EMBEDDING = ("heading_path",)


class RetrieverSettings(PromptSettings, total=False):
    """Keyword settings of `EpicRetriever`, beside those of the query's prompt."""

    similarity_top_k: int
    mode: SearchMode
    filters: MetadataFilters | SearchFilters | None
    collapse: bool
    merge: bool
    per_file: int | None
    min_score: float | None
    full_section: bool
    reranker: str | os.PathLike[str] | Reranker | None


class EpicRetriever(BaseRetriever):
    """Retrieve from an index folder: dense, by keywords or both, with demonstrations, filters and a reranker.

    A `ShardedCollection` on a Chroma server takes the place of an index folder; its mode is dense.

    A node has the chunk's id, its exact text, and in `metadata` its place: `path` (relative to the indexed folder),
    `file_path` (absolute), `file_name`, `first_line` and `last_line` or `page`, `heading_path`, `kind`, and `lang` of
    source code. An LLM sees path, lines or page, and headings; an embedding model sees headings. The same chunk is the
    same node for every query. A node's score is what nodes are ordered by: the fused score in hybrid mode,
    the cosine in dense mode, BM25 in keyword mode, and the reranker's score where there is one.

    The first query loads the encoder and opens the index. All methods are thread-safe; async methods use a thread of
    the retriever.

    Args:
        index_dir: The index folder; see `epic-rag index` and `ChromaIndexer.index`. Several folders of one model are
            searched as one; see `FederatedIndex`. Or a `ShardedCollection`, which has an encoder of its own.
        encoder: An encoder, or a function that loads one; None for the model that the index was built with.
        chroma: Address of the Chroma server that holds the vectors, if it is not the one that the index names.
        callback_manager: As in every LlamaIndex retriever, and so the next three.
        object_map: Objects that index nodes stand for.
        objects: The same as index nodes.
        verbose: Print the way through such objects.
        **settings: `similarity_top_k` (5): maximum number of nodes.
            `task`, `bank`, `instruction`, `num_demonstrations`, `strategy`, `selection`: see `QueryPrompt`.
            `mode` ("hybrid"): "dense", "hybrid" or "keyword".
            `filters`: LlamaIndex's MetadataFilters, or SearchFilters.
            `collapse` (True): leave out near-duplicates of a better node.
            `merge` (False): join chunks of a section that follow one another. A node's text then depends on the query,
            and a fusion of several queries does not recognise it.
            `per_file` (0), `min_score` (None): see `SearchRequest`.
            `full_section` (False): make each node the whole section of the chunk that was found.
            `reranker`: name or folder of a CrossEncoder, or a function `(query, texts) -> scores`.

    Raises:
        ConfigError: If a setting or a filter is unknown or has no meaning.
        PromptError: If the strategy or the selection is unknown, or demonstrations are requested without a bank.

    Example:
        >>> retriever = EpicRetriever("docs/.epic-rag", similarity_top_k=3, task="docs")
        >>> retriever.retrieve("how do I undo a commit?")[0].node.metadata["path"]
        'guide.md'
    """

    def __init__(
        self,
        index_dir: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | ShardedCollection,
        *,
        encoder: EpicEncoder | Callable[[], EpicEncoder] | None = None,
        chroma: str | ChromaServer | None = None,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[IndexNode] | None = None,
        verbose: bool = False,
        **settings: Unpack[RetrieverSettings],
    ) -> None:
        super().__init__(
            callback_manager=callback_manager or Settings.callback_manager,
            object_map=object_map,
            objects=objects,
            verbose=verbose,
        )
        self._collection = index_dir if isinstance(index_dir, ShardedCollection) else None
        if isinstance(index_dir, ShardedCollection):
            if encoder is not None or chroma is not None:
                raise ConfigError("A ShardedCollection has its own encoder and server. Pass them to it.")
            settings.setdefault("mode", "dense")
            folders: Sequence[str | os.PathLike[str]] = []
        else:
            folders = [index_dir] if isinstance(index_dir, (str, os.PathLike)) else index_dir
        self._index_dirs = [Path(folder).resolve() for folder in folders]
        self._encoder = encoder
        self._chroma = chroma
        # A node is a chunk, unless the settings say otherwise: LlamaIndex recognises nodes by their text.
        self._request = SearchRequest(merge=False, per_file=0).with_settings(**_search_settings(settings))
        self._open()

    def _open(self) -> None:
        self._indexer: ChromaIndexer | FederatedIndex | ShardedCollection
        if self._collection is not None:
            self._indexer = self._collection
        elif len(self._index_dirs) == 1:
            self._indexer = ChromaIndexer(self._index_dirs[0], encoder=self._encoder, chroma=self._chroma)
        else:
            self._indexer = FederatedIndex(self._index_dirs, encoder=self._encoder, chroma=self._chroma)
        # One thread for async callers, as in EpicEmbedding: the encoder takes one call at a time, and calls that wait
        # for it would fill the event loop's shared pool.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="epic-retriever")

    @property
    def indexer(self) -> ChromaIndexer | FederatedIndex | ShardedCollection:
        """The index, or all of them, or the collection."""
        return self._indexer

    @property
    def similarity_top_k(self) -> int:
        """Maximum number of nodes; can be set."""
        return self._request.k

    @similarity_top_k.setter
    def similarity_top_k(self, value: int) -> None:
        self._request = self._request.with_settings(**_search_settings({"similarity_top_k": value}))

    def with_settings(self, **changes: Unpack[RetrieverSettings]) -> EpicRetriever:
        """Return a retriever with other settings that shares encoder and open index with this one.

        Raises:
            ConfigError: If a setting is unknown or has no meaning.
            PromptError: As for the class.
        """
        other = copy.copy(self)
        other._request = self._request.with_settings(**_search_settings(changes))
        return other

    def as_query_engine(self, llm: LLM | None = None, **options: Any) -> RetrieverQueryEngine:
        """Return a query engine that answers from the nodes of this retriever.

        Args:
            llm: The model that writes the answer; None for `Settings.llm`.
            **options: Of `RetrieverQueryEngine.from_args`: `response_mode`, `node_postprocessors`, ...
        """
        return RetrieverQueryEngine.from_args(self, llm=llm, **options)

    def close(self) -> None:
        """Close the index, for all retrievers that share it; a later query opens it again."""
        self._indexer.close()

    def __enter__(self) -> EpicRetriever:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- retrieval ----------------------------------------------------------------------------------------

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        embedded: Embedded | None = query_bundle.custom_embedding_strs or None
        if query_bundle.embedding is not None:
            embedded = np.asarray(query_bundle.embedding, dtype=np.float32)
        return to_nodes(self._indexer.query(query_bundle.query_str, self._request, embedded=embedded))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        context = contextvars.copy_context()  # as in asyncio.to_thread: instrumentation belongs to this task
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, context.run, self._retrieve, query_bundle)

    # -- copies -------------------------------------------------------------------------------------------

    def __copy__(self) -> EpicRetriever:
        """Return a copy that shares the encoder and the open index; queries change neither."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> EpicRetriever:
        """Return a copy as `__copy__` does: a model, open files and a thread cannot be copied."""
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings only; the other process opens the index and loads its model."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("_indexer", "_thread")}
        if hasattr(self._encoder, "encode_document"):
            state["_encoder"] = None  # weights are not pickled; the index names its model and refuses any other
        try:
            pickle.dumps(state["callback_manager"])
        except Exception:  # raised by third-party handlers
            logger.warning("callback_manager of EpicRetriever cannot be pickled. The copy has none.")
            state["callback_manager"] = CallbackManager()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the settings; the first query opens the index."""
        self.__dict__.update(state)
        self._open()


def _search_settings(settings: RetrieverSettings) -> SearchSettings:
    """Translate settings of a retriever to those of a SearchRequest.

    Raises:
        ConfigError: If a setting is unknown, or a number or a filter has no meaning.
    """
    known = RetrieverSettings.__annotations__
    unknown = ", ".join(sorted(set(settings) - set(known)))
    if unknown:
        raise ConfigError(f"Unknown setting {unknown}. Known are {', '.join(known)}.")
    values: dict[str, Any] = dict(settings)
    if "similarity_top_k" in values:
        values["k"] = values.pop("similarity_top_k")
        if values["k"] < 1:
            raise ConfigError(f"similarity_top_k is {values['k']}. Use 1 or more.")
    if isinstance(values.get("filters"), MetadataFilters):
        values["filters"] = to_search_filters(values["filters"])
    return cast("SearchSettings", values)


def to_search_filters(filters: MetadataFilters) -> SearchFilters:
    """Translate metadata filters, also nested ones, with the meaning that LlamaIndex's SimpleVectorStore gives them.

    A filter without meaning for an index (an unknown key, `>` on a text, a number compared with a text) is an error,
    where a vector store would silently find nothing, or everything.

    Args:
        filters: Conditions on the keys of EpicRetriever's nodes and on those of a row (docs/chroma.md).

    Raises:
        ConfigError: If a filter has no meaning; names the filter.

    Example:
        >>> from dataclasses import replace
        >>> from datetime import datetime, timedelta, timezone
        >>> from llama_index.core.vector_stores import MetadataFilter, MetadataFilters
        >>> python = MetadataFilters(filters=[MetadataFilter(key="lang", value="python")])
        >>> week_ago = datetime.now(timezone.utc) - timedelta(days=7)
        >>> fresh = replace(to_search_filters(python), since=week_ago)
    """
    return SearchFilters(condition=_condition(filters))


def _condition(part: MetadataFilter | MetadataFilters) -> Condition:
    if isinstance(part, MetadataFilters):
        condition = part.condition or FilterCondition.AND  # its type allows None, which means the default
        return Combination(condition.value, tuple(_condition(each) for each in part.filters))
    value: Any = tuple(part.value) if isinstance(part.value, list) else part.value
    return Comparison(part.key, part.operator.value, value)


def to_nodes(hits: Sequence[Hit]) -> list[NodeWithScore]:
    """Return nodes with scores, in the order of the hits.

    A node's content does not depend on the query (no cosine, rank or duplicates in its metadata): LlamaIndex recognises
    nodes by a hash over their metadata, and fusion of several queries would count one chunk twice.

    Args:
        hits: Hits, best first.
    """
    nodes = []
    for hit in hits:
        values: dict[str, Any] = {
            "path": hit.path,
            "file_path": str(Path(hit.root) / hit.path),
            "file_name": PurePosixPath(hit.path).name,
            "first_line": hit.first_line,
            "last_line": hit.last_line,
            "page": hit.page,
            "heading_path": HEADING_SEPARATOR.join(hit.heading_path),
            "kind": hit.kind,
            "lang": hit.lang,
        }
        # Flat and without None or "": some vector stores refuse None, and an LLM need not read "".
        metadata = {key: value for key, value in values.items() if value not in (None, "")}
        source = RelatedNodeInfo(node_id=hit.document_id, node_type=ObjectType.DOCUMENT)
        node = TextNode(
            id_=hit.id,
            text=hit.text,
            metadata=metadata,
            excluded_llm_metadata_keys=[key for key in metadata if key not in _FOR_LLM],
            excluded_embed_metadata_keys=[key for key in metadata if key not in _FOR_EMBEDDING],
            relationships={NodeRelationship.SOURCE: source},
        )
        nodes.append(NodeWithScore(node=node, score=hit.score))
    return nodes
