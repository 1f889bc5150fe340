"""Cache of single vectors with separate keys for queries and documents.

`BaseEmbedding.embeddings_cache` looks a vector up by the bare text. With one key space for both roles, the query
"Paris" gets the vector of the document "Paris", and a store that outlives the process serves vectors of another
checkpoint. `RoleKeyedCache` wraps the user's store: BaseEmbedding sees an empty store that ignores writes, so every
text reaches `EpicEmbedding`, which calls `lookup` and `store_vectors`; their keys contain role and fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from llama_index.core.storage.kvstore.types import DEFAULT_COLLECTION, BaseKVStore

__all__ = ["Role", "RoleKeyedCache"]

Role = Literal["query", "document"]

_COLLECTION = "embeddings"
_VALUE = "embedding"


class RoleKeyedCache(BaseKVStore):
    """A user's key-value store under keys of role, fingerprint and text.

    Args:
        store: Any LlamaIndex key-value store.
    """

    def __init__(self, store: BaseKVStore) -> None:
        self.store = store

    def lookup(self, role: Role, fingerprint: str, texts: Sequence[str]) -> list[list[float] | None]:
        """Return the cached vector of each text, None where there is none."""
        found: list[list[float] | None] = []
        for text in texts:
            value = self.store.get(_key(role, fingerprint, text), collection=_COLLECTION)
            found.append(None if value is None else value[_VALUE])
        return found

    def store_vectors(self, role: Role, fingerprint: str, texts: Sequence[str], vectors: Sequence[list[float]]) -> None:
        """Store one vector per text."""
        for text, vector in zip(texts, vectors, strict=True):
            self.store.put(_key(role, fingerprint, text), {_VALUE: vector}, collection=_COLLECTION)

    # BaseEmbedding calls these four with the bare text as the key: always a miss, never a write.

    def put(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """Ignore the write: the key does not contain the role."""

    async def aput(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """Ignore the write, as `put`."""

    def get(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """Return None, so that the text reaches `EpicEmbedding`, which knows the role."""
        return None

    async def aget(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """Return None, as `get`."""
        return None

    def get_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """Return everything in the user's store."""
        return self.store.get_all(collection=collection)

    async def aget_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """Return everything in the user's store."""
        return await self.store.aget_all(collection=collection)

    def delete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """Delete a key that `get_all` returned from the user's store."""
        return self.store.delete(key, collection=collection)

    async def adelete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """Delete a key that `aget_all` returned from the user's store."""
        return await self.store.adelete(key, collection=collection)


def _key(role: Role, fingerprint: str, text: str) -> str:
    # Hashed, because some stores limit the length or the characters of a key.
    return f"{role}:{fingerprint}:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
