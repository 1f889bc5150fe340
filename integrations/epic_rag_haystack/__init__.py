"""Haystack for epic-rag: `EpicTextEmbedder` for queries and `EpicDocumentEmbedder` for documents."""

from __future__ import annotations

from epic_rag.errors import needs_extra

with needs_extra("haystack", "EpicTextEmbedder"):
    from epic_rag_haystack.embedders import EpicDocumentEmbedder, EpicTextEmbedder

__all__ = ["EpicDocumentEmbedder", "EpicTextEmbedder"]
