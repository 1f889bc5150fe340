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
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import chromadb
import numpy as np
import numpy.typing as npt
from chromadb.config import Settings

from epic_rag.errors import IndexStateError
from epic_rag_chroma.embedding_function import EpicEmbeddingFunction
from epic_rag_chroma.folder import CHROMA_FOLDER

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

__all__ = ["COLLECTION", "ChunkStore", "Found", "Metadata"]

COLLECTION = "epic_rag"
_OWNER = "epic-rag"
_PAGE = 2000
_IDS_IN_FILTER = 100
_HNSW: dict[str, Any] = {
    "space": "cosine",
    "max_neighbors": 32,
    "ef_construction": 200,
    "ef_search": 400,
    "batch_size": 100,
    "sync_threshold": 100,
}

Metadata = Mapping[str, str | int | float | bool | None]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Found:
    """A row that a query found; score is the cosine."""

    id: str
    score: float
    text: str
    metadata: dict[str, Any]


class ChunkStore:
    """One collection of chunks in a Chroma folder.

    Make one with `create` or `open`, and close it.
    """

    def __init__(self, client: ClientAPI, collection: Collection) -> None:
        self._client = client
        self._collection = collection
        self._max_batch = int(client.get_max_batch_size())

    @classmethod
    def create(
        cls, index_dir: Path, *, source: str, model: str, fingerprint: str, truncate_dim: int | None = None
    ) -> ChunkStore:
        """Make a new, empty collection beside the one that counts; `publish` lets it take that one's place.

        Args:
            index_dir: The index folder.
            source: What loads the model again; becomes part of the collection's embedding function.
            model: The model's name, for people.
            fingerprint: The model's fingerprint.
            truncate_dim: Its width, if it was cut.
        """
        client = _client(index_dir)
        try:
            function = EpicEmbeddingFunction(source, truncate_dim=truncate_dim, fingerprint=fingerprint)
            # A name of its own: what an interrupted rebuild left goes when a collection is published, not before.
            collection = client.create_collection(
                f"{COLLECTION}_{uuid.uuid4().hex[:12]}",
                metadata={"owner": _OWNER, "model": model, "fingerprint": fingerprint},
                configuration={"hnsw": cast(Any, dict(_HNSW))},
                embedding_function=cast(Any, function),
            )
            return cls(client, collection)
        except BaseException:
            _close(client)
            raise

    @classmethod
    def open(cls, index_dir: Path, collection: str | None) -> ChunkStore | None:
        """Open the collection with an id; None if it is not there.

        Raises:
            IndexStateError: If Chroma cannot open its files, or the collection does not hold cosines.
        """
        if collection is None or not (index_dir / CHROMA_FOLDER / "chroma.sqlite3").is_file():
            return None  # and let Chroma make none: two processes that open a fresh folder can crash
        try:
            client = _client(index_dir)
        except Exception as error:  # Chroma raises whatever its bindings do
            raise _unreadable(index_dir, error) from error
        try:
            for candidate in _owned(client):
                if str(candidate.id) == collection:
                    _check_space(candidate, index_dir)
                    return cls(client, candidate)
        except IndexStateError:
            _close(client)
            raise
        except Exception as error:
            _close(client)
            raise _unreadable(index_dir, error) from error
        _close(client)
        return None

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
        for other in _owned(self._client):
            if str(other.id) != self.id:
                self._client.delete_collection(other.name)
        if self._collection.name != COLLECTION:
            self._collection.modify(name=COLLECTION)

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
        for part in self._parts(len(ids)):
            self._collection.upsert(
                ids=list(ids[part]),
                embeddings=cast(Any, vectors[part]),
                documents=list(texts[part]),
                metadatas=cast(Any, [_storable(metadata) for metadata in metadatas[part]]),
            )

    def update_metadata(self, ids: Sequence[str], metadatas: Sequence[Metadata]) -> None:
        """Change rows' metadata; vectors and texts stay, and so does the graph."""
        for part in self._parts(len(ids)):
            self._collection.update(
                ids=list(ids[part]), metadatas=cast(Any, [_storable(metadata) for metadata in metadatas[part]])
            )

    def delete(self, ids: Sequence[str]) -> None:
        """Delete rows."""
        for part in self._parts(len(ids)):
            self._collection.delete(ids=list(ids[part]))

    def ids_by_document(self, documents: Sequence[str]) -> dict[str, set[str]]:
        """Ids of the rows of documents, by their `doc_id`."""
        found: dict[str, set[str]] = {document: set() for document in documents}
        for start in range(0, len(documents), _IDS_IN_FILTER):
            some = list(documents[start : start + _IDS_IN_FILTER])
            rows = self._collection.get(where=cast(Any, {"doc_id": {"$in": some}}), include=["metadatas"])
            for row_id, metadata in zip(rows["ids"], rows["metadatas"] or [], strict=True):
                found[str(metadata["doc_id"])].add(row_id)
        return found

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

    def query(self, vector: Vectors, k: int) -> list[Found]:
        """The k rows nearest to a vector (dim,), best first; equal ones in the order of their ids."""
        wanted = min(k, self.count())
        if wanted == 0:
            return []
        rows = self._collection.query(
            query_embeddings=cast(Any, vector[None, :]),
            n_results=wanted,
            include=["documents", "metadatas", "distances"],
        )
        found = [
            Found(row_id, 1.0 - float(distance), str(text or ""), dict(metadata or {}))
            for row_id, distance, text, metadata in zip(
                rows["ids"][0],
                (rows["distances"] or [[]])[0],
                (rows["documents"] or [[]])[0],
                (rows["metadatas"] or [[]])[0],
                strict=True,
            )
        ]
        return sorted(found, key=lambda row: (-row.score, row.id))

    def close(self) -> None:
        """Let go of the files."""
        _close(self._client)

    def _parts(self, total: int) -> Iterator[slice]:
        return (slice(start, start + self._max_batch) for start in range(0, total, self._max_batch))


def _client(index_dir: Path) -> ClientAPI:
    # Chroma shares one system between the clients of a path and refuses a second one with other settings. The dot
    # makes ours a path of its own, so that a user's client with default settings can open the same folder.
    path = str(index_dir / CHROMA_FOLDER) + "/."
    return chromadb.PersistentClient(path, settings=Settings(anonymized_telemetry=False))


def _close(client: ClientAPI) -> None:
    cast(Any, client).close()


def _owned(client: ClientAPI) -> list[Collection]:
    """Our own collections; what others keep in the same database is not touched."""
    return [each for each in client.list_collections() if (each.metadata or {}).get("owner") == _OWNER]


def _check_space(collection: Collection, index_dir: Path) -> None:
    space = (collection.configuration_json.get("hnsw") or {}).get("space")
    if space != "cosine":
        raise IndexStateError(
            f"the collection in {index_dir} has space {space}, an index needs cosine; "
            "run `epic-rag index --rebuild` with the indexed folder to make it anew"
        )


def _unreadable(index_dir: Path, error: Exception) -> IndexStateError:
    why = " ".join(str(error).split())[:160]
    return IndexStateError(
        f"Chroma cannot read {index_dir / CHROMA_FOLDER} ({why}); run `epic-rag clear --yes` and then `epic-rag index`"
    )


def _storable(metadata: Metadata) -> dict[str, str | int | float | bool]:
    kept = {
        key: value
        for key, value in metadata.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }
    return kept or {"owner": _OWNER}  # Chroma refuses an empty mapping
