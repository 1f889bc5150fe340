"""EPIC embeddings for LlamaIndex: `from llama_index.embeddings.epic import EpicEmbedding`.

`llama_index` and `llama_index.embeddings` are namespace packages that many distributions share, so neither
folder above this one may hold an `__init__.py`.
"""

from epic_rag.errors import needs_extra

with needs_extra("llama-index", "EpicEmbedding"):
    from llama_index.embeddings.epic.embedding import EpicEmbedding

__all__ = ["EpicEmbedding"]
