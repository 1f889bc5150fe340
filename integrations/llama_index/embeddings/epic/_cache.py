"""A view of a LlamaIndex key-value store that keeps queries and documents apart.

`BaseEmbedding.embeddings_cache` looks a vector up by the bare text. One key space for both roles means that
a query for "Paris" is answered with the vector of the document "Paris", and that a store which outlives the
process serves the vectors of another checkpoint. `RoleKeyedCache` wraps the user's store: to BaseEmbedding
it is a store that never holds anything, so every text reaches `EpicEmbedding`'s own methods, and these call
`lookup` and `remember`, whose keys name the role and the fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from llama_index.core.storage.kvstore.types import DEFAULT_COLLECTION, BaseKVStore

_COLLECTION = "embeddings"
_VALUE = "embedding"


class RoleKeyedCache(BaseKVStore):
    """The user's store behind keys of role, fingerprint and text.

    Args:
        store: Any LlamaIndex key-value store.
    """

    def __init__(self, store: BaseKVStore) -> None:
        self.store = store

    def lookup(self, role: str, fingerprint: str, texts: Sequence[str]) -> list[list[float] | None]:
        """The cached vector of each text, None where there is none."""
        found: list[list[float] | None] = []
        for text in texts:
            value = self.store.get(_key(role, fingerprint, text), collection=_COLLECTION)
            found.append(None if value is None else value[_VALUE])
        return found

    def remember(self, role: str, fingerprint: str, texts: Sequence[str], vectors: Sequence[list[float]]) -> None:
        """Store one vector a text."""
        for text, vector in zip(texts, vectors, strict=True):
            self.store.put(_key(role, fingerprint, text), {_VALUE: vector}, collection=_COLLECTION)

    # What BaseEmbedding calls, with the bare text as the key: always a miss, never a write.

    def put(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """Write nothing: a bare text does not say whether it is a query or a document."""

    async def aput(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """Write nothing, as `put`."""

    def get(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """Find nothing, so that the text reaches `EpicEmbedding`, which knows the role."""
        return None

    async def aget(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """Find nothing, as `get`."""
        return None

    def get_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """Everything in the user's store."""
        return self.store.get_all(collection=collection)

    async def aget_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """Everything in the user's store."""
        return await self.store.aget_all(collection=collection)

    def delete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """Delete a key, as `get_all` names it, from the user's store."""
        return self.store.delete(key, collection=collection)

    async def adelete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """Delete a key, as `aget_all` names it, from the user's store."""
        return await self.store.adelete(key, collection=collection)


def _key(role: str, fingerprint: str, text: str) -> str:
    """Hashed, because some stores limit the length or the characters of a key."""
    return f"{role}:{fingerprint}:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
