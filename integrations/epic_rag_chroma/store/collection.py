"""The Chroma collection behind an index, with what Chroma must be told and guarded against in one place.

* Cosine is asked for by name (l2 is Chroma's default), and a hit's score is 1 - distance.
* `get_or_create_collection` silently keeps an old configuration, so it is never used: a collection is made once, found
  by its id, and its space checked.
* Chroma takes two embedding functions for the same if their names are; the fingerprint is in the collection's metadata.
* `upsert`, never `add`, which ignores an id that exists. Batches are no longer than the client allows, never empty.
* The graph: with the defaults, a search misses a quarter of the true ten among random vectors; wider lists and a longer
  search find all but a few. Rows that are not yet synced are inserted again by the next write, at the price of an
  update of the graph each, so they are synced often.
* Chroma's telemetry is off.

The collection is in the index folder or on a server, which may hold other people's collections and other indexes. Only
collections with our mark, and on a server with the index's id besides, are ever changed or deleted.
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
from epic_rag_chroma.store.client import READER_PATIENCE, WRITER_PATIENCE, ServerClient, folder_client
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
# What one request to a server may weigh. Chroma itself takes 40 MiB; proxies often take less, see `_send`.
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
# A server keeps in memory what is not synced, and a server that is killed while it syncs leaves a broken graph.
_HNSW_ON_SERVER = {**_HNSW, "sync_threshold": 1000}

Metadata = Mapping[str, str | int | float | bool | None]
Vectors = npt.NDArray[np.float32]


class ChunkStore:
    """One collection of chunks, in an index folder or on a server.

    Make one with `create` or `open`, and close it.
    """

    def __init__(self, client: ClientAPI | ServerClient, collection: Collection, place: Place) -> None:
        self._client = client
        self._collection = collection
        self._place = place
        self._max_batch = int(client.get_max_batch_size())
        self._max_bytes = _REQUEST_BYTES

    @classmethod
    def create(
        cls, place: Place, *, source: str, model: str, fingerprint: str, truncate_dim: int | None = None
    ) -> ChunkStore:
        """Make a new, empty collection beside the one that counts; `publish` lets it take that one's place.

        Args:
            place: The index folder, or the index's place on a server.
            source: What loads the model again; becomes part of the collection's embedding function.
            model: The model's name, for people.
            fingerprint: The model's fingerprint.
            truncate_dim: Its width, if it was cut.

        Raises:
            ChromaServerError: If the server cannot be reached or refuses, as in all that follows.
        """
        from epic_rag_chroma.embedding_function import EpicEmbeddingFunction  # imports chromadb

        client = _client(place, WRITER_PATIENCE)
        try:
            function = EpicEmbeddingFunction(source, truncate_dim=truncate_dim, fingerprint=fingerprint)
            # A name of its own: what an interrupted rebuild left goes when a collection is published, not before.
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
        """Open the collection with an id; None if it is not there.

        Args:
            place: The index folder, or the index's place on a server.
            collection: The id.
            patience: For how many seconds requests to a server are tried again.

        Raises:
            IndexStateError: If Chroma cannot open its files, or the collection does not hold cosines.
        """
        if collection is None:
            return None
        if isinstance(place, Path) and not (place / CHROMA_FOLDER / "chroma.sqlite3").is_file():
            return None  # and let Chroma make none: two processes that open a fresh folder can crash
        try:
            client = _client(place, patience)
        except EpicError:
            raise
        except Exception as error:  # Chroma raises whatever its bindings do
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
        """Delete what an index has on a server."""
        client = ServerClient(place.server)
        try:
            for collection in list(_owned(client, place)):
                client.delete_collection(collection.name)
        finally:
            client.close()

    @property
    def id(self) -> str:
        """The collection's id, which outlives its renaming."""
        return str(self._collection.id)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model that made the vectors."""
        return str((self._collection.metadata or {}).get("fingerprint", ""))

    def publish(self) -> None:
        """Give the collection its public name and delete what else we have here. Safe to repeat after a crash."""
        for other in list(_owned(self._client, self._place)):
            if str(other.id) != self.id:
                self._client.delete_collection(other.name)
        if self._collection.name != _public_name(self._place):
            self._collection.modify(name=_public_name(self._place))

    def count(self) -> int:
        """Number of rows."""
        return int(self._collection.count())

    def upsert(self, ids: Sequence[str], vectors: Vectors, texts: Sequence[str], metadatas: Sequence[Metadata]) -> None:
        """Write rows.

        Args:
            ids: Ids; a row that exists is replaced.
            vectors: (n, dim) float32.
            texts: The rows' documents.
            metadatas: The rows' metadata; None and NaN are left out, as Chroma has no place for them.
        """

        def send(part: slice) -> None:
            self._collection.upsert(
                ids=list(ids[part]),
                embeddings=cast(Any, vectors[part]),
                documents=list(texts[part]),
                metadatas=cast(Any, [_storable(metadata) for metadata in metadatas[part]]),
            )

        # A byte of a vector takes 4/3 in base64 (if the server knows that) or about 5 as digits.
        width = 5 * vectors.nbytes // max(1, len(ids))
        self._send([width + 2 * len(text) + _METADATA_BYTES for text in texts], send)

    def update_metadata(self, ids: Sequence[str], metadatas: Sequence[Metadata]) -> None:
        """Change rows' metadata; vectors and texts stay, and so does the graph."""

        def send(part: slice) -> None:
            self._collection.update(
                ids=list(ids[part]), metadatas=cast(Any, [_storable(metadata) for metadata in metadatas[part]])
            )

        self._send([_METADATA_BYTES] * len(ids), send)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete rows."""
        self._send([_ID_BYTES] * len(ids), lambda part: self._collection.delete(ids=list(ids[part])))

    def scan(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All rows: id and metadata, a page at a time. Nothing may be written meanwhile."""
        offset = 0
        while True:
            rows = self._collection.get(limit=_PAGE, offset=offset, include=["metadatas"])
            for row_id, metadata in zip(rows["ids"], rows["metadatas"] or [], strict=True):
                yield row_id, dict(metadata or {})
            if len(rows["ids"]) < _PAGE:
                return
            offset += _PAGE

    def pages(self) -> Iterator[list[tuple[str, str, dict[str, Any], Vectors]]]:
        """All rows: id, text, metadata and vector (dim,), a page at a time. Nothing may be written meanwhile."""
        offset = 0
        while True:
            rows = self._collection.get(limit=_PAGE, offset=offset, include=["documents", "metadatas", "embeddings"])
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
            if len(ids) < _PAGE:
                return
            offset += _PAGE

    def nearest(
        self, vector: Vectors, k: int, allowed: AbstractCollection[str] | None = None
    ) -> list[tuple[str, float]]:
        """The k rows nearest to a vector.

        Args:
            vector: (dim,), of length 1.
            k: The most rows.
            allowed: Ids of the only rows that may be found; None for all.

        Returns:
            (id, cosine), best first; equal ones in the order of their ids.
        """
        wanted = k if allowed is None else min(k, len(allowed))
        if wanted > _PAGE:  # Chroma makes room for as many; to count its rows, it reads all of them
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
        """Rows by id, with their vectors; those that are not there are left out."""
        wanted = sorted(ids)
        found: dict[str, Record] = {}
        for start in range(0, len(wanted), _PAGE):
            rows = self._collection.get(
                ids=wanted[start : start + _PAGE], include=["documents", "metadatas", "embeddings"]
            )
            vectors: Vectors = np.asarray(rows["embeddings"], dtype=np.float32)
            for row_id, text, metadata, vector in zip(
                rows["ids"], rows["documents"] or [], rows["metadatas"] or [], vectors, strict=True
            ):
                found[row_id] = Record(row_id, str(text or ""), dict(metadata or {}), vector)
        return found

    def version(self) -> int:
        """Always the same: a reader opens a collection anew when it has changed."""
        return 0

    def probe(self) -> None:
        """Let Chroma finish what it has taken, and see that it can read the collection's graph and search in it.

        Raises:
            ChromaServerError: If it cannot.
        """
        rows = self._collection.get(limit=1, include=["embeddings"])
        if rows["ids"]:
            self.nearest(np.asarray(rows["embeddings"], dtype=np.float32)[0], 1)

    def close(self) -> None:
        """Let go of the files."""
        _close(self._client)

    def _send(self, sizes: Sequence[int], send: Callable[[slice], object]) -> None:
        """Send rows in parts that are not too large for Chroma, nor for what lies between.

        Args:
            sizes: About how many bytes each row takes.
            send: Sends a part. It may be called again for rows that were sent.
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


def _client(place: Place, patience: float) -> ClientAPI | ServerClient:
    return folder_client(place) if isinstance(place, Path) else ServerClient(place.server, patience=patience)


def _close(client: ClientAPI | ServerClient) -> None:
    cast(Any, client).close()


def _public_name(place: Place) -> str:
    """The name of the collection that counts."""
    return COLLECTION if isinstance(place, Path) else f"{COLLECTION}_{place.index_id}"


def _mark(place: Place) -> dict[str, str]:
    return {} if isinstance(place, Path) else {"index": place.index_id}


def _owned(client: ClientAPI | ServerClient, place: Place, collection_id: str | None = None) -> Iterable[Collection]:
    """The index's own collections (or the one with an id); what others keep in the same database is not touched."""
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
            f"the collection in {place} has space {space}, an index needs cosine; "
            "run `epic-rag index --rebuild` with the indexed folder to make it anew"
        )


def _unreadable(place: Place, error: Exception) -> IndexStateError:
    why = " ".join(str(error).split())[:160]
    where = place / CHROMA_FOLDER if isinstance(place, Path) else place
    return IndexStateError(f"Chroma cannot read {where} ({why}); run `epic-rag clear --yes` and then `epic-rag index`")


def _storable(metadata: Metadata) -> dict[str, str | int | float | bool]:
    kept = {
        key: value
        for key, value in metadata.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }
    return kept or {"owner": _OWNER}  # Chroma refuses an empty mapping
