"""Retrieval from an epic-rag index for LlamaIndex: `from llama_index.retrievers.epic import EpicRetriever`.

`llama_index` and `llama_index.retrievers` are namespace packages that many distributions share, so neither
folder above this one may hold an `__init__.py`.
"""

from epic_rag.errors import needs_extra

with needs_extra("llama-index", "EpicRetriever"):
    from llama_index.retrievers.epic.retriever import EpicRetriever, to_search_filters

__all__ = ["EpicRetriever", "to_search_filters"]
