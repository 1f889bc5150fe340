"""`EpicRetriever`: an index that `epic-rag index` made, as a retriever of LlamaIndex."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

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

from epic_rag.errors import ConfigError
from epic_rag_chroma import (
    DEFAULT_MODE,
    HEADING_SEPARATOR,
    SEARCH_MODES,
    ChromaIndexer,
    Combination,
    Comparison,
    Condition,
    Hit,
    SearchFilters,
    SearchMode,
)

if TYPE_CHECKING:
    from llama_index.core.llms import LLM

    from epic_rag import DemonstrationBank, EpicEncoder
    from epic_rag.task_vector import QueryStrategy
    from epic_rag_chroma import ChromaServer, Embedded, Reranker

__all__ = ["EpicRetriever", "to_nodes", "to_search_filters"]


# --- from _filters
# LlamaIndex's `MetadataFilters` as the filters of an index.


def to_search_filters(filters: MetadataFilters) -> SearchFilters:
    """Translate metadata filters, nested ones too; they mean what LlamaIndex's SimpleVectorStore makes of them.

    What is meaningless for an index (an unknown key, `>` on a text, a number compared with a text) is refused, where
    a vector store would find nothing, or everything, without a word.

    Args:
        filters: Conditions on the metadata of nodes: the keys that EpicRetriever's nodes have, and the others in
            `epic_rag_chroma.KNOWN_KEYS`.

    Raises:
        ConfigError: If a filter has no meaning; it is named.

    Example:
        >>> from dataclasses import replace
        >>> from datetime import datetime, timedelta, timezone
        >>> from llama_index.core.vector_stores import MetadataFilter, MetadataFilters
        >>> python = MetadataFilters(filters=[MetadataFilter(key="lang", value="python")])
        >>> week_ago = datetime.now(timezone.utc) - timedelta(days=7)
        >>> fresh = replace(to_search_filters(python), since=week_ago)
    """
    return SearchFilters(condition=_combination(filters))


def _combination(filters: MetadataFilters) -> Combination:
    # None is allowed by the type and means the default.
    condition = filters.condition or FilterCondition.AND
    return Combination(condition.value, tuple(_part(each) for each in filters.filters))


def _part(part: MetadataFilter | MetadataFilters) -> Condition:
    if isinstance(part, MetadataFilters):
        return _combination(part)
    value: Any = tuple(part.value) if isinstance(part.value, list) else part.value
    return Comparison(part.key, part.operator.value, value)


# --- from _nodes
# Hits of an index as nodes of LlamaIndex.

# What a LLM can name its source with; the rest would cost it tokens, and an absolute path is nobody else's business.
_FOR_LLM = ("path", "first_line", "last_line", "page", "heading_path")
# What the index's own encoder reads beside the text.
_FOR_EMBEDDING = ("heading_path",)


def to_nodes(hits: Sequence[Hit]) -> list[NodeWithScore]:
    """Nodes with scores, in the order of the hits.

    A node holds nothing that depends on the query (no cosine, no rank, no list of duplicates): LlamaIndex recognises
    nodes by a hash over their metadata, and fusion of several queries would take one chunk for two.

    Args:
        hits: Hits, best first.
    """
    return [NodeWithScore(node=_node(hit), score=hit.score) for hit in hits]


def _node(hit: Hit) -> TextNode:
    root = Path(hit.root)
    values: dict[str, Any] = {
        "path": hit.path,
        "file_path": str(root / hit.path),
        "file_name": PurePosixPath(hit.path).name,
        "first_line": hit.first_line,
        "last_line": hit.last_line,
        "page": hit.page,
        "heading_path": HEADING_SEPARATOR.join(hit.heading_path),
        "kind": hit.kind,
        "lang": hit.lang,
    }
    # Flat and without None or "": other vector stores refuse the one, and a LLM need not read the other.
    metadata = {key: value for key, value in values.items() if value not in (None, "")}
    return TextNode(
        id_=hit.id,
        text=hit.text,
        metadata=metadata,
        excluded_llm_metadata_keys=[key for key in metadata if key not in _FOR_LLM],
        excluded_embed_metadata_keys=[key for key in metadata if key not in _FOR_EMBEDDING],
        relationships={
            NodeRelationship.SOURCE: RelatedNodeInfo(node_id=hit.document_id, node_type=ObjectType.DOCUMENT)
        },
    )


logger = logging.getLogger(__name__)


class _Engine:
    """An open index and the thread that async callers use, shared by all copies of a retriever.

    Args:
        indexer: The index. It takes calls from several threads.
    """

    def __init__(self, indexer: ChromaIndexer) -> None:
        self.indexer = indexer
        # Of one thread, like EpicEmbedding's: the encoder takes one call at a time, and with `asyncio.to_thread` the
        # calls that wait for it could fill the event loop's pool, which the application's own calls need.
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="epic-retriever")


@dataclass(frozen=True)
class _Question:
    """How a retriever asks its index."""

    similarity_top_k: int
    task: str | None
    bank: DemonstrationBank | str | os.PathLike[str] | None
    instruction: str | None
    num_demonstrations: int | None
    strategy: QueryStrategy | None
    mode: SearchMode | None
    filters: SearchFilters | None
    collapse: bool
    reranker: str | os.PathLike[str] | Reranker | None

    def __post_init__(self) -> None:
        if self.similarity_top_k < 1:
            raise ConfigError(f"similarity_top_k is {self.similarity_top_k}; it must be at least 1")
        if self.strategy is not None:
            from epic_rag.task_vector import known_strategy  # torch, which importing a retriever must not load

            known_strategy(self.strategy)
        if self.mode is not None and self.mode not in SEARCH_MODES:
            raise ConfigError(f"mode is {self.mode!r}; it must be one of {', '.join(SEARCH_MODES)}")


class EpicRetriever(BaseRetriever):
    """Retrieve from an index folder: dense, by keywords or both, with demonstrations, filters and a reranker.

    Nodes have the chunk's id in Chroma, its exact text, and in `metadata` where it stands: `path` (relative to the
    folder that was indexed), `file_path` (absolute), `file_name`, `first_line` and `last_line` or `page`,
    `heading_path`, `kind`, and `lang` of source code. A LLM is shown path, lines or page, and headings; an embedding
    model headings alone. The same chunk is the same node for every query.

    Scores never rise from one node to the next, as LlamaIndex sorts by them in many places: in dense mode a score is
    the cosine, in keyword mode BM25, in hybrid mode the sum of reciprocal ranks, with a reranker what that gave.

    The encoder is loaded, and the index opened, by the first query. Everything may be called from several threads; the
    async methods use a thread of their own.

    Args:
        index_dir: The index folder; see `epic-rag index` and `ChromaIndexer.index`.
        similarity_top_k: The most nodes.
        task: A known task: its instruction, and its bank if `num_demonstrations` is given.
        bank: Demonstrations: a DemonstrationBank, a bank folder or a built-in name.
        instruction: Overrides the task's or the bank's; "" for none.
        num_demonstrations: How many demonstrations to show.
        strategy: How they reach a query, see `EpicEncoder.encode_query`; None for the checkpoint's own.
        mode: "dense", "hybrid" or "keyword"; None for the default of the index.
        filters: What may be found: LlamaIndex's MetadataFilters, or the SearchFilters of an index.
        collapse: Leave out near-duplicates of a better node.
        reranker: Name or folder of a sentence-transformers CrossEncoder, or a function `(query, texts) -> scores`.
        encoder: An encoder, or a function that loads one; None for the model that the index was built with.
        chroma: Address of the Chroma server that has the vectors, if it is not the one that the index names.
        callback_manager: As of every retriever of LlamaIndex, and so the next three.
        object_map: Objects that index nodes stand for.
        objects: The same as index nodes.
        verbose: Print the way through such objects.

    Raises:
        ConfigError: If an argument, or a filter, has no meaning.
        PromptError: If the strategy is unknown.

    Example:
        >>> retriever = EpicRetriever("docs/.epic-rag", similarity_top_k=3, task="docs")
        >>> retriever.retrieve("how do I undo a commit?")[0].node.metadata["path"]
        'guide.md'
    """

    def __init__(
        self,
        index_dir: str | os.PathLike[str],
        *,
        similarity_top_k: int = 5,
        task: str | None = None,
        bank: DemonstrationBank | str | os.PathLike[str] | None = None,
        instruction: str | None = None,
        num_demonstrations: int | None = None,
        strategy: QueryStrategy | None = None,
        mode: SearchMode | None = None,
        filters: MetadataFilters | SearchFilters | None = None,
        collapse: bool = True,
        reranker: str | os.PathLike[str] | Reranker | None = None,
        encoder: EpicEncoder | Callable[[], EpicEncoder] | None = None,
        chroma: str | ChromaServer | None = None,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[IndexNode] | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            callback_manager=callback_manager or Settings.callback_manager,
            object_map=object_map,
            objects=objects,
            verbose=verbose,
        )
        self._index_dir = Path(index_dir).resolve()
        self._encoder = encoder
        self._chroma = chroma
        self._asked = _Question(
            similarity_top_k=similarity_top_k,
            task=task,
            bank=bank,
            instruction=instruction,
            num_demonstrations=num_demonstrations,
            strategy=strategy,
            mode=mode,
            filters=_as_search_filters(filters),
            collapse=collapse,
            reranker=reranker,
        )
        self._engine = self._open()

    def _open(self) -> _Engine:
        return _Engine(ChromaIndexer(self._index_dir, encoder=self._encoder, chroma=self._chroma))

    @property
    def indexer(self) -> ChromaIndexer:
        """The index underneath."""
        return self._engine.indexer

    @property
    def similarity_top_k(self) -> int:
        """The most nodes; can be set."""
        return self._asked.similarity_top_k

    @similarity_top_k.setter
    def similarity_top_k(self, value: int) -> None:
        self._asked = replace(self._asked, similarity_top_k=value)

    def with_settings(self, **changes: Any) -> EpicRetriever:
        """A retriever of the same index with other settings; it shares the encoder and the open index with this one.

        Args:
            **changes: Those of EpicRetriever's arguments that say how the index is asked: `similarity_top_k`, `task`,
                `bank`, `instruction`, `num_demonstrations`, `strategy`, `mode`, `filters`, `collapse`, `reranker`.

        Raises:
            ConfigError: If an argument is unknown or has no meaning.
        """
        unknown = sorted(set(changes) - set(_Question.__dataclass_fields__))
        if unknown:
            raise ConfigError(
                f"with_settings got {', '.join(unknown)}; it takes {', '.join(_Question.__dataclass_fields__)}; "
                "for another index or encoder make another EpicRetriever"
            )
        if "filters" in changes:
            changes["filters"] = _as_search_filters(changes["filters"])
        other = copy.copy(self)
        other._asked = replace(self._asked, **changes)
        return other

    def as_query_engine(self, llm: LLM | None = None, **options: Any) -> RetrieverQueryEngine:
        """A query engine that answers from what this retriever finds.

        Args:
            llm: The model that writes the answer; None for `Settings.llm`.
            **options: Of `RetrieverQueryEngine.from_args`: `response_mode`, `node_postprocessors`, ...
        """
        return RetrieverQueryEngine.from_args(self, llm=llm, **options)

    def close(self) -> None:
        """Let go of the index's files, for all that share them; a later query opens them again."""
        self._engine.indexer.close()

    def __enter__(self) -> EpicRetriever:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- nodes --------------------------------------------------------------------------------------------

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return to_nodes(self._hits(query_bundle))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        # As asyncio.to_thread does it: what is logged there belongs to this task's context.
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._engine.thread, context.run, self._retrieve, query_bundle)

    def _hits(self, bundle: QueryBundle) -> list[Hit]:
        asked = self._asked
        embedded: Embedded | None = bundle.custom_embedding_strs or None
        if bundle.embedding is not None:
            embedded = np.asarray(bundle.embedding, dtype=np.float32)
        return self._engine.indexer.query(
            bundle.query_str,
            k=asked.similarity_top_k,
            task=asked.task,
            bank=asked.bank,
            instruction=asked.instruction,
            num_demonstrations=asked.num_demonstrations,
            strategy=asked.strategy,
            mode=asked.mode or DEFAULT_MODE,
            filters=asked.filters,
            collapse=asked.collapse,
            reranker=asked.reranker,
            embedded=embedded,
        )

    # -- copies -------------------------------------------------------------------------------------------

    def __copy__(self) -> EpicRetriever:
        """A copy that shares the encoder and the open index: neither is changed by asking."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> EpicRetriever:
        """As `__copy__`: what is shared holds a model, open files and a thread."""
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone: the index is opened, and its model loaded, where they arrive."""
        state = {name: value for name, value in self.__dict__.items() if name != "_engine"}
        if hasattr(self._encoder, "encode_document"):
            del state["_encoder"]  # weights do not travel; an index tells its model, and refuses another
        try:
            pickle.dumps(state["callback_manager"])
        except Exception:  # whatever a third party's handler raises
            logger.warning("callback_manager of EpicRetriever cannot be pickled; the copy goes without")
            state["callback_manager"] = CallbackManager()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the settings; nothing is opened yet."""
        self.__dict__.update({"_encoder": None, **state})
        self._engine = self._open()


def _as_search_filters(filters: MetadataFilters | SearchFilters | None) -> SearchFilters | None:
    return to_search_filters(filters) if isinstance(filters, MetadataFilters) else filters
