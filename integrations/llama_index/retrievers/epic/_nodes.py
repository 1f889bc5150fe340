"""Hits of an index as nodes of LlamaIndex."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from llama_index.core.schema import NodeRelationship, NodeWithScore, ObjectType, RelatedNodeInfo, TextNode

from epic_rag_chroma import roots
from epic_rag_chroma.chunking import HEADING_SEPARATOR
from epic_rag_chroma.sync import document_id
from epic_rag_chroma.types import Hit

__all__ = ["to_nodes"]

# What a LLM can name its source with; the rest would cost it tokens, and an absolute path is nobody else's business.
_FOR_LLM = ("path", "first_line", "last_line", "page", "heading_path")
# What the index's own encoder reads beside the text.
_FOR_EMBEDDING = ("heading_path",)


def to_nodes(hits: Sequence[Hit], index_dir: Path) -> list[NodeWithScore]:
    """Nodes with scores, in the order of the hits.

    A node holds nothing that depends on the query (no cosine, no rank, no list of duplicates): LlamaIndex recognises
    nodes by a hash over their metadata, and fusion of several queries would take one chunk for two.

    Args:
        hits: Hits, best first.
        index_dir: The index folder that they come from.
    """
    return [
        NodeWithScore(node=_node(hit, index_dir), score=score) for hit, score in zip(hits, _falling(hits), strict=True)
    ]


def _falling(hits: Sequence[Hit]) -> list[float]:
    """Scores that never rise with the rank: each is the highest from there on.

    LlamaIndex's fusion, reordering and merging sort by score, and would undo a hybrid ranking that a mere cosine
    contradicts. Where all hits were reranked, that is what they are ranked by.
    """
    reranked = [hit.rerank_score for hit in hits if hit.rerank_score is not None]
    scores = reranked if len(reranked) == len(hits) else [hit.score for hit in hits]
    for place in range(len(scores) - 2, -1, -1):
        scores[place] = max(scores[place], scores[place + 1])
    return scores


def _node(hit: Hit, index_dir: Path) -> TextNode:
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
            NodeRelationship.SOURCE: RelatedNodeInfo(
                node_id=document_id((roots.relative(root, index_dir), hit.path)), node_type=ObjectType.DOCUMENT
            )
        },
    )
