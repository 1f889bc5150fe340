"""LlamaIndex's `MetadataFilters` as the filters of an index."""

from __future__ import annotations

from typing import Any

from llama_index.core.vector_stores.types import FilterCondition, MetadataFilter, MetadataFilters

from epic_rag_chroma.conditions import Combination, Comparison, Condition
from epic_rag_chroma.types import SearchFilters

__all__ = ["to_search_filters"]


def to_search_filters(filters: MetadataFilters) -> SearchFilters:
    """Translate metadata filters, nested ones too; they mean what LlamaIndex's SimpleVectorStore makes of them.

    What is meaningless for an index (an unknown key, `>` on a text, a number compared with a text) is refused, where
    a vector store would find nothing, or everything, without a word.

    Args:
        filters: Conditions on the metadata of nodes: the keys that EpicRetriever's nodes have, and the others in
            `epic_rag_chroma.conditions.KNOWN_KEYS`.

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
