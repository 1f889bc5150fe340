"""Chroma collection of an index, with Chroma's pitfalls handled in one place.

* Space "cosine" is set explicitly (Chroma's default is l2); a hit's cosine is 1 - distance.
* `get_or_create_collection` silently keeps an old configuration, so it is not used: a collection is created once,
  opened by its id, and its space is checked.
* Chroma compares embedding functions by name only; the fingerprint is in the collection's metadata.
* `upsert` is used instead of `add`, which ignores existing ids. Batches are not empty and not larger than the limit.
* HNSW: with Chroma's defaults a search misses a quarter of the true ten among random vectors; more neighbours and a
  longer search find nearly all. Rows that are not synced are inserted again by the next write, at the price of a graph
  update each, so they are synced often.
* Chroma's telemetry is off.

The collection is in the index folder or on a server, which may contain collections of others and of other indexes. Only
collections with our mark, and on a server with the index's id, are changed or deleted.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Collection as AbstractCollection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from epic_rag.errors import EpicError
from epic_rag_chroma.errors import ChromaServerError, IndexStateError
from epic_rag_chroma.store.client import (
    DEFAULT_TIMING,
    READER_PATIENCE,
    WRITER_PATIENCE,
    ServerClient,
    Timing,
    folder_client,
)
from epic_rag_chroma.store.database import Record
from epic_rag_chroma.store.paths import CHROMA_FOLDER
from epic_rag_chroma.store.server import Place, ServerPlace

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

__all__ = [
    "COLLECTION",
    "ChunkStore",
    "Metadata",
]


COLLECTION = "epic_rag"
_OWNER = "epic-rag"
_PAGE = 2000
# Size of a request to a server. Chroma accepts 40 MiB, proxies often less; see `_send`.
_REQUEST_BYTES = 8 * 2**20
_METADATA_BYTES = 1000
_ID_BYTES = 40
_HNSW: dict[str, Any] = {
    "space": "cosine",
    "max_neighbors": 32,
    "ef_construction": 200,
    "ef_search": 400,
    "batch_size": 100,
    "sync_threshold": 100,
}
# A server keeps unsynced rows in memory, and a server that is killed while it syncs leaves a broken graph.
_HNSW_ON_SERVER = {**_HNSW, "sync_threshold": 1000}

Metadata = Mapping[str, str | int | float | bool | None]
Vectors = npt.NDArray[np.float32]


class ChunkStore:
    """A collection of chunks in an index folder or on a server.

    Made by `create` or `open`; must be closed.

    Args:
        client: The client.
        collection: Chroma's collection.
        place: Where it is.
        page: Number of rows that are read at a time.
        max_batch: Maximum number of rows in a request; None for the client's limit.
    """

    def __init__(
        self,
        client: ClientAPI | ServerClient,
        collection: Collection,
        place: Place,
        *,
        page: int = _PAGE,
        max_batch: int | None = None,
    ) -> None:
        self._client = client
        self._collection = collection
        self._place = place
        self._max_batch = max_batch or int(client.get_max_batch_size())
        self._page = page
        self._max_bytes = _REQUEST_BYTES

    @classmethod
    def create(
        cls,
        place: Place,
        *,
        source: str,
        model: str,
        fingerprint: str,
        truncate_dim: int | None = None,
        timing: Timing = DEFAULT_TIMING,
    ) -> ChunkStore:
        """Create an empty collection beside the current one, which `publish` replaces by it.

        Args:
            place: The index folder, or the index's place on a server.
            source: The model's name or folder; becomes part of the collection's embedding function.
            model: The model's display name.
            fingerprint: The model's fingerprint.
            truncate_dim: Its dimension, if truncated.
            timing: Pauses and limits of requests to a server.

        Raises:
            ChromaServerError: If the server cannot be reached or refuses; also in all other methods.
        """
        from epic_rag_chroma.embedding_function import EpicEmbeddingFunction  # imports chromadb

        client = _client(place, WRITER_PATIENCE, timing)
        try:
            function = EpicEmbeddingFunction(source, truncate_dim=truncate_dim, fingerprint=fingerprint)
            # A unique name: leftovers of an interrupted rebuild are deleted when a collection is published.
            collection = client.create_collection(
                f"{_public_name(place)}_{uuid.uuid4().hex[:12]}",
                metadata={"owner": _OWNER, "model": model, "fingerprint": fingerprint, **_mark(place)},
                configuration={"hnsw": cast(Any, dict(_HNSW if isinstance(place, Path) else _HNSW_ON_SERVER))},
                embedding_function=cast(Any, function),
            )
            return cls(client, collection, place)
        except BaseException:
            _close(client)
            raise

    @classmethod
    def open(cls, place: Place, collection: str | None, *, patience: float = READER_PATIENCE) -> ChunkStore | None:
        """Open the collection with an id; return None if it does not exist.

        Args:
            place: The index folder, or the index's place on a server.
            collection: The id.
            patience: For how many seconds requests to a server are retried.

        Raises:
            IndexStateError: If Chroma cannot open its files, or the collection has another space than cosine.
        """
        if collection is None:
            return None
        if isinstance(place, Path) and not (place / CHROMA_FOLDER / "chroma.sqlite3").is_file():
            return None  # without letting Chroma create one: two processes that open a new folder can crash
        try:
            client = _client(place, patience)
        except EpicError:
            raise
        except Exception as error:  # Chroma raises whatever its bindings raise
            raise _unreadable(place, error) from error
        try:
            for candidate in _owned(client, place, collection):
                if str(candidate.id) == collection:
                    _check_space(candidate, place)
                    return cls(client, candidate, place)
        except EpicError:
            _close(client)
            raise
        except Exception as error:
            _close(client)
            raise _unreadable(place, error) from error
        _close(client)
        return None

    @staticmethod
    def delete_all(place: ServerPlace) -> None:
        """Delete an index's collections on a server."""
        client = ServerClient(place.server)
        try:
            for collection in list(_owned(client, place)):
                client.delete_collection(collection.name)
        finally:
            client.close()

    @property
    def id(self) -> str:
        """The collection's id, which renaming does not change."""
        return str(self._collection.id)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model that made the vectors."""
        return str((self._collection.metadata or {}).get("fingerprint", ""))

    def publish(self) -> None:
        """Set the collection's public name and delete the index's other collections. Idempotent."""
        for other in list(_owned(self._client, self._place)):
            if str(other.id) != self.id:
                self._client.delete_collection(other.name)
        if self._collection.name != _public_name(self._place):
            self._collection.modify(name=_public_name(self._place))

    def count(self) -> int:
        """Return the number of rows."""
        return int(self._collection.count())

    def upsert(self, ids: Sequence[str], vectors: Vectors, texts: Sequence[str], metadatas: Sequence[Metadata]) -> None:
        """Write rows.

        Args:
            ids: Ids; a row that exists is replaced.
            vectors: (n, dim) float32.
            texts: The rows' documents.
            metadatas: The rows' metadata; None and NaN, which Chroma does not support, are left out.
        """

        def send(part: slice) -> None:
            self._collection.upsert(
                ids=list(ids[part]),
                embeddings=cast(Any, vectors[part]),
                documents=list(texts[part]),
                metadatas=cast(Any, [_storable(metadata) for metadata in metadatas[part]]),
            )

        # A byte of a vector takes 4/3 bytes in base64 (if the server supports it) or about 5 as digits.
        width = 5 * vectors.nbytes // max(1, len(ids))
        self._send([width + 2 * len(text) + _METADATA_BYTES for text in texts], send)

    def update_metadata(self, ids: Sequence[str], metadatas: Sequence[Metadata]) -> None:
        """Change rows' metadata; vectors, texts and the graph stay."""

        def send(part: slice) -> None:
            self._collection.update(
                ids=list(ids[part]), metadatas=cast(Any, [_storable(metadata) for metadata in metadatas[part]])
            )

        self._send([_METADATA_BYTES] * len(ids), send)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete rows."""
        self._send([_ID_BYTES] * len(ids), lambda part: self._collection.delete(ids=list(ids[part])))

    def scan(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield id and metadata of all rows, read in pages. Nothing may be written meanwhile."""
        offset = 0
        while True:
            rows = self._collection.get(limit=self._page, offset=offset, include=["metadatas"])
            for row_id, metadata in zip(rows["ids"], rows["metadatas"] or [], strict=True):
                yield row_id, dict(metadata or {})
            if len(rows["ids"]) < self._page:
                return
            offset += self._page

    def pages(self) -> Iterator[list[tuple[str, str, dict[str, Any], Vectors]]]:
        """Yield pages of all rows: id, text, metadata, vector (dim,). Nothing may be written meanwhile."""
        offset = 0
        while True:
            rows = self._collection.get(
                limit=self._page, offset=offset, include=["documents", "metadatas", "embeddings"]
            )
            ids = rows["ids"]
            vectors: Sequence[Vectors] | Vectors = []
            if ids:
                vectors = np.asarray(rows["embeddings"], dtype=np.float32).reshape(len(ids), -1)
            yield [
                (row_id, str(text or ""), dict(metadata or {}), vector)
                for row_id, text, metadata, vector in zip(
                    ids, rows["documents"] or [], rows["metadatas"] or [], vectors, strict=True
                )
            ]
            if len(ids) < self._page:
                return
            offset += self._page

    def nearest(
        self, vector: Vectors, k: int, allowed: AbstractCollection[str] | None = None
    ) -> list[tuple[str, float]]:
        """Return the k rows nearest to a vector.

        Args:
            vector: Unit vector (dim,).
            k: Maximum number of rows.
            allowed: Ids to search among; None for all.

        Returns:
            (id, cosine), best first; equal cosines in the order of their ids.
        """
        wanted = k if allowed is None else min(k, len(allowed))
        if wanted > self._page:  # Chroma allocates room for as many; counting reads all rows
            wanted = min(wanted, self.count())
        if wanted < 1:
            return []
        rows = self._collection.query(
            query_embeddings=cast(Any, vector[None, :]),
            n_results=wanted,
            ids=None if allowed is None else sorted(allowed),
            include=["distances"],
        )
        distances = (rows["distances"] or [[]])[0]
        found = [(row_id, 1.0 - float(distance)) for row_id, distance in zip(rows["ids"][0], distances, strict=True)]
        return sorted(found, key=lambda row: (-row[1], row[0]))

    def get(self, ids: AbstractCollection[str]) -> dict[str, Record]:
        """Return rows by id, without those that do not exist."""
        wanted = sorted(ids)
        found: dict[str, Record] = {}
        for start in range(0, len(wanted), self._page):
            rows = self._collection.get(
                ids=wanted[start : start + self._page], include=["documents", "metadatas", "embeddings"]
            )
            vectors: Vectors = np.asarray(rows["embeddings"], dtype=np.float32)
            for row_id, text, metadata, vector in zip(
                rows["ids"], rows["documents"] or [], rows["metadatas"] or [], vectors, strict=True
            ):
                found[row_id] = Record(row_id, str(text or ""), dict(metadata or {}), vector)
        return found

    def version(self) -> int:
        """Return a constant: readers reopen a collection that has changed."""
        return 0

    def probe(self) -> None:
        """Flush pending writes, and check that Chroma can read the graph and search in it.

        Raises:
            ChromaServerError: If it cannot.
        """
        rows = self._collection.get(limit=1, include=["embeddings"])
        if rows["ids"]:
            self.nearest(np.asarray(rows["embeddings"], dtype=np.float32)[0], 1)

    def close(self) -> None:
        """Close the client."""
        _close(self._client)

    def _send(self, sizes: Sequence[int], send: Callable[[slice], object]) -> None:
        """Send rows in parts that are not too large for Chroma and for proxies.

        Args:
            sizes: Approximate size of each row in bytes.
            send: Sends a part; may be called again for rows that were sent.
        """
        start = 0
        while start < len(sizes):
            end, total = start, 0
            while end < len(sizes) and end - start < self._max_batch and (end == start or total < self._max_bytes):
                total += sizes[end]
                end += 1
            try:
                send(slice(start, end))
            except ChromaServerError as error:
                if error.status != 413 or end - start == 1:
                    raise
                self._max_bytes = total // 2
                continue
            start = end


def _client(place: Place, patience: float, timing: Timing = DEFAULT_TIMING) -> ClientAPI | ServerClient:
    if isinstance(place, Path):
        return folder_client(place)
    return ServerClient(place.server, patience=patience, timing=timing)


def _close(client: ClientAPI | ServerClient) -> None:
    cast(Any, client).close()


def _public_name(place: Place) -> str:
    """Return the name of the current collection."""
    return COLLECTION if isinstance(place, Path) else f"{COLLECTION}_{place.index_id}"


def _mark(place: Place) -> dict[str, str]:
    return {} if isinstance(place, Path) else {"index": place.index_id}


def _owned(client: ClientAPI | ServerClient, place: Place, collection_id: str | None = None) -> Iterable[Collection]:
    """Yield the index's collections (or the one with an id), but not those of others in the same database."""
    there: Iterable[Collection | None]
    if isinstance(client, ServerClient) and collection_id is not None:
        there = [client.find_collection(collection_id)]
    else:
        there = client.list_collections()
    mark = {"owner": _OWNER, "index": None, **_mark(place)}
    for each in there:
        if each is not None and all((each.metadata or {}).get(key) == value for key, value in mark.items()):
            yield each


def _check_space(collection: Collection, place: Place) -> None:
    space = (collection.configuration_json.get("hnsw") or {}).get("space")
    if space != "cosine":
        raise IndexStateError(
            f"The collection in {place} has space {space}, an index needs cosine. "
            "Run `epic-rag index --rebuild` with the indexed folder."
        )


def _unreadable(place: Place, error: Exception) -> IndexStateError:
    why = " ".join(str(error).split())[:160]
    where = place / CHROMA_FOLDER if isinstance(place, Path) else place
    return IndexStateError(f"Chroma cannot read {where} ({why}). Run `epic-rag clear --yes` and then `epic-rag index`.")


def _storable(metadata: Metadata) -> dict[str, str | int | float | bool]:
    kept = {
        key: value
        for key, value in metadata.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }
    return kept or {"owner": _OWNER}  # Chroma refuses an empty mapping


def sync_collection(
    database: Any, place: Place, *, model: str, source: str, fingerprint: str, truncate_dim: int | None
) -> None:
    mirror = database.mirror()
    if mirror.is_complete:
        return
    store = ChunkStore.create(place, source=source, model=model, fingerprint=fingerprint, truncate_dim=truncate_dim)
    database.begin_mirror(mirror.collection)
    for page in database.pages():
        store.upsert(
            [r.id for r in page], np.stack([r.vector for r in page]), [r.text for r in page], [r.metadata for r in page]
        )
    store.publish()
    database.end_mirror(store.id)
    store.close()


def delete_collections(place: Any, keep: str | None = None) -> None:
    pass


def open_collection(place: Any, collection: str) -> Any:
    return ChunkStore.open(place, collection)
