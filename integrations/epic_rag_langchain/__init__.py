"""LangChain for epic-rag: `EpicEmbeddings` for any vector store, `EpicRetriever` for an index of `epic-rag index`."""

from __future__ import annotations

from epic_rag.errors import needs_extra

with needs_extra("langchain", "EpicEmbeddings"):
    from epic_rag_langchain.embeddings import EpicEmbeddings
    from epic_rag_langchain.retriever import EpicRetriever

__all__ = ["EpicEmbeddings", "EpicRetriever"]
