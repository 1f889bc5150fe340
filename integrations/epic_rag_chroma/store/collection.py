"""Chroma's mirror of an index: a collection of the same rows, brought up to date in one burst when a run ends.

The database is the index. The collection is for plain `chromadb`, LlamaIndex's `ChromaVectorStore`, and large indexes.
`sync_collection` applies the rows that have changed since the last sync. In doubt it makes a new collection from the
database, which needs no model; the index answers queries meanwhile.

In doubt means: the last sync did not end (the database marks the mirror as dirty before the first write), a request
that writes rows failed, rows are missing, or rows are not found by their own vectors. Chroma overwrites the files of
its graph in place and does not check them when it loads them: after a kill in a write, it fails, finds less, or crashes
the process that loads them. It writes them within the requests that write rows only, so a server that is killed between
two requests loses nothing. A collection in doubt is never loaded, only deleted.

Pitfalls of Chroma that are handled here:

* The space is "cosine" (Chroma's default is l2); a hit's cosine is 1 - distance.
* `get_or_create_collection` silently keeps an old configuration: a collection is created once and opened by its id.
* Embedding functions are compared by name only; the fingerprint is in the collection's metadata.
* `add` ignores existing ids, `upsert` and `update` merge metadata: keys that a row no longer has are sent as None.
* HNSW: with Chroma's defaults a search misses a quarter of the true ten among random vectors. A row that is written
  again is a costly graph update that can make others unreachable, so rows that exist get their metadata changed only.
* Whoever opens a collection inserts the rows that are not in the graph's files yet, so these are written often.

The collection's folder or database may hold others' collections. Only those with our mark, and on a server with the
index's id, are changed or deleted. Rows that others add to ours stay until a new collection is made.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from epic_rag.errors import EpicError
from epic_rag.files import write_atomically
from epic_rag_chroma.errors import ChromaServerError, IndexStateError
from epic_rag_chroma.store.chroma_rows import (
    HNSW,
    METADATA_BYTES,
    OWNER,
    RequestSplitter,
    row_bytes,
    storable,
)
from epic_rag_chroma.store.paths import BROKEN_FOLDER, CHROMA_FOLDER, absolute_source
from epic_rag_chroma.store.server import Place, ServerPlace, collection_name

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

    from epic_rag_chroma.store.client import ServerClient
    from epic_rag_chroma.store.database import IndexDatabase, Record

__all__ = ["Mirror", "delete_collections", "open_collection", "sync_collection"]

logger = logging.getLogger(__name__)

# In Chroma's folder: the graph's files as the last sync has left them.
_STAMPS_FILE = "epic-rag.json"
_HNSW: dict[str, Any] = dict(HNSW)
# New collections that one sync makes on a server that fails again and again.
_ATTEMPTS = 6
_PAGE = 1000
_SAMPLES = 8
# Cosine distance of a stored vector to itself, at most.
_SAME = 1e-3
_CHECK_SECONDS = 2.0
_TRIAL_SECONDS = 600
_TRIAL = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from epic_rag_chroma.store.collection import _try_graph; _try_graph(sys.argv[2], sys.argv[3])"
)


def sync_collection(
    database: IndexDatabase,
    place: Place,
    *,
    model: str,
    source: str,
    fingerprint: str,
    truncate_dim: int | None = None,
) -> None:
    """Make the mirror equal to the rows of the database.

    With nothing to do, chromadb is not imported. A folder is compared with the stamps of its files; a server is asked
    for the number of rows, in one request, and if it cannot be reached, the mirror is taken for unchanged: there is
    nothing to send, and an index works offline.

    Args:
        database: The index.
        place: The index folder, or the index's place on a server.
        model: Name of the model, for the collection's metadata.
        source: Name or folder of the checkpoint, for the collection's embedding function.
        fingerprint: Fingerprint of the model. A collection with another one is replaced.
        truncate_dim: Dimension of the vectors, if they are truncated.

    Raises:
        ChromaServerError: If the server cannot be reached, refuses, or fails again and again. The index is complete.
        IndexStateError: If the folder cannot be written to, for lack of space, memory or permissions.
    """
    state = database.mirror()
    trusted = None if state.is_dirty else state.collection
    if trusted is not None and not database.unmirrored() and _is_in_place(place, trusted, database):
        return

    from epic_rag_chroma.embedding_function import EpicEmbeddingFunction  # imports chromadb
    from epic_rag_chroma.store.client import PATIENCE, RUN_PATIENCE, is_transient

    # As from a collection: the checkpoint may be gone, and nothing is embedded here.
    function = EpicEmbeddingFunction.build_from_config(
        {"model": absolute_source(source), "truncate_dim": truncate_dim, "fingerprint": fingerprint}
    )
    metadata = {"owner": OWNER, "model": model, "fingerprint": fingerprint, **_index_mark(place)}
    for attempt in range(_ATTEMPTS):
        is_open = False
        try:
            with _open_client(place, RUN_PATIENCE, RUN_PATIENCE if attempt else PATIENCE) as client:
                is_open = True
                sync = _Sync(database, place, client)
                if trusted is None or not sync.update(trusted, fingerprint):
                    trusted = sync.fill(metadata, function)
            if isinstance(place, Path):
                _write_stamps(place, trusted)
            database.end_mirror(trusted)
            return
        except ChromaServerError as error:
            # A new attempt waits for the server; not if it was away from the start.
            # 404: it has lost the collection. 409: the answer to the request that made it was lost.
            is_final = attempt + 1 == _ATTEMPTS or not (is_transient(error) or error.status in (404, 409))
            if not is_open or is_final:
                raise ChromaServerError(
                    f"{error} The index itself is complete and searchable; the next run updates the server.",
                    error.status,
                ) from error
            logger.warning("%s; the collection is made again from the index's rows", _fact(error))
        except IndexStateError as error:
            # Once for the collection, once for a folder that is not a database.
            if not isinstance(place, Path) or (trusted is None and not _set_aside(place)):
                raise
            logger.warning("%s; the collection is made again from the index's rows", _fact(error))
        trusted = None


def delete_collections(place: Place, *, keep: str | None = None) -> None:
    """Delete an index's collections: when it is deleted, or when its mirror has moved.

    Args:
        place: The index folder, whose Chroma folder is deleted, or a place on a server.
        keep: Id of a collection that stays, since an old and a new address may be of the same server.

    Raises:
        ChromaServerError: If the server cannot be reached, or refuses.
    """
    if isinstance(place, Path):
        with suppress(FileNotFoundError):
            shutil.rmtree(place / CHROMA_FOLDER)
        return
    with _open_client(place) as client:
        for collection in _owned(client, place):
            if str(collection.id) != keep:
                client.delete_collection(collection.name)


def open_collection(place: Place, collection_id: str) -> Mirror | None:
    """Open the collection of a clean mirror for reading.

    Returns:
        The mirror; None if it is missing, or if its files are not those that the last sync has left, so that loading
        them could crash the process.

    Raises:
        ChromaServerError: If the server cannot be reached, or refuses.
        IndexStateError: If Chroma cannot read its files.
    """
    if isinstance(place, Path) and not _has_stamps(place, collection_id):
        return None
    with ExitStack() as stack:
        client = stack.enter_context(_open_client(place))
        collection = _find(client, place, collection_id)
        if collection is None:
            return None
        collection.get(limit=1, include=["embeddings"])  # loads the graph now, while no run writes to it
        return Mirror(collection, place, stack.pop_all())


class Mirror:
    """A collection that is open for reading. Made by `open_collection`; must be closed."""

    def __init__(self, collection: Collection, place: Place, resources: ExitStack) -> None:
        self._collection = collection
        self._place = place
        self._resources = resources

    def nearest(self, vector: npt.NDArray[np.float32], k: int) -> list[tuple[str, float]]:
        """Return id and cosine of the k rows nearest to a unit vector (dim,), best first; equal ones in id order."""
        with _errors(self._place):
            if k > _PAGE:  # Chroma allocates room for as many; counting reads all rows
                k = min(k, int(self._collection.count()))
            if k < 1:
                return []
            rows = self._collection.query(
                query_embeddings=cast(Any, vector[None, :]), n_results=k, include=["distances"]
            )
        distances = (rows["distances"] or [[]])[0]
        found = [(row_id, 1.0 - float(distance)) for row_id, distance in zip(rows["ids"][0], distances, strict=True)]
        return sorted(found, key=lambda row: (-row[1], row[0]))

    def close(self) -> None:
        """Close the client."""
        self._resources.close()


class _Sync:
    """One attempt to make a collection equal to the rows."""

    def __init__(
        self,
        database: IndexDatabase,
        place: Place,
        client: ClientAPI | ServerClient,
    ) -> None:
        self._database = database
        self._place = place
        self._client = client
        self._max_rows = min(_PAGE, int(client.get_max_batch_size()))
        self._requests = RequestSplitter(self._max_rows)

    def update(self, collection_id: str, fingerprint: str) -> bool:
        """Apply the rows that have changed; return False if the collection has to be made again."""
        collection = _find(self._client, self._place, collection_id)
        if collection is None or (collection.metadata or {}).get("fingerprint") != fingerprint:
            return False
        if (collection.configuration_json.get("hnsw") or {}).get("space") != "cosine":
            return False
        if isinstance(self._place, Path) and not _is_loadable(self._place, collection_id):
            return False
        if not _finds_its_rows(collection):
            return False
        ids = self._database.unmirrored()
        if ids:
            self._database.begin_mirror(collection_id)
        for start in range(0, len(ids), self._max_rows):
            part = ids[start : start + self._max_rows]
            self._apply(collection, part, self._database.get(part))
        if not self._has_all_rows(collection):
            return False
        self._publish(collection)
        return True

    def fill(self, metadata: dict[str, Any], function: Any) -> str:
        """Create a collection of all rows, put it in the place of the index's others, and return its id."""
        for other in list(_owned(self._client, self._place)):
            if other.name != collection_name(self._place):  # of an attempt that failed
                self._client.delete_collection(other.name)
        self._delete_orphaned_graphs()
        collection = self._client.create_collection(
            f"{collection_name(self._place)}_{uuid.uuid4().hex[:12]}",
            metadata=metadata,
            configuration={"hnsw": cast(Any, dict(_HNSW))},
            embedding_function=function,
        )
        self._database.begin_mirror(str(collection.id))
        for records in self._database.pages():
            self._upsert(collection, records)
        if int(collection.count()) != self._database.count() or not _finds_its_rows(collection):
            message = f"Chroma has lost rows of the new collection in {self._place}. Run `epic-rag index` again."
            raise IndexStateError(message) if isinstance(self._place, Path) else ChromaServerError(message, 500)
        self._publish(collection)
        self._delete_orphaned_graphs()
        return str(collection.id)

    def _apply(self, collection: Collection, ids: list[str], rows: Mapping[str, Record]) -> None:
        found = collection.get(ids=ids, include=["metadatas"])
        there = dict(zip(found["ids"], found["metadatas"] or [], strict=True))
        gone = [row for row in there if row not in rows]
        if gone:
            collection.delete(ids=gone)
        # An id is derived from text and file, and a model has its own collection: text and vector are the same.
        changed = [rows[row] for row in there if row in rows]

        def update(part: Sequence[Record]) -> None:
            metadatas = [
                {**dict.fromkeys(there[row.id] or {}), **storable(row.metadata)}  # None removes a key
                for row in part
            ]
            collection.update(ids=[row.id for row in part], metadatas=cast(Any, metadatas))

        self._requests.send(changed, lambda _: METADATA_BYTES, update)
        self._upsert(collection, [record for row, record in rows.items() if row not in there])

    def _upsert(self, collection: Collection, records: Sequence[Record]) -> None:
        def upsert(part: Sequence[Record]) -> None:
            collection.upsert(
                ids=[row.id for row in part],
                embeddings=cast(Any, np.stack([row.vector for row in part])),
                documents=[row.text for row in part],
                metadatas=cast(Any, [storable(row.metadata) for row in part]),
            )

        self._requests.send(records, row_bytes, upsert)

    def _has_all_rows(self, collection: Collection) -> bool:
        """Return whether a collection has as many rows as the database, and perhaps others'."""
        foreign = int(collection.count()) - self._database.count()
        if foreign > 0:
            logger.warning(
                "the collection has %d rows that epic-rag did not write; they are left alone, and no query finds them",
                foreign,
            )
        return foreign >= 0

    def _publish(self, collection: Collection) -> None:
        """Set the collection's public name and delete the index's other collections. Idempotent."""
        for other in list(_owned(self._client, self._place)):
            if other.id != collection.id:
                self._client.delete_collection(other.name)
        if collection.name != collection_name(self._place):
            collection.modify(name=collection_name(self._place))

    def _delete_orphaned_graphs(self) -> None:
        """Delete graph files of deleted collections, which Chroma 1.5 leaves behind in a folder."""
        if not isinstance(self._place, Path):
            return
        folder = self._place / CHROMA_FOLDER
        with closing(sqlite3.connect(f"{(folder / 'chroma.sqlite3').as_uri()}?mode=ro", uri=True)) as database:
            known = {str(row[0]) for row in database.execute("SELECT id FROM segments")}
        for path in folder.iterdir():
            if path.name not in known and re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", path.name):
                shutil.rmtree(path, ignore_errors=True)  # on Windows a reader may have it open; the next run repeats it


@contextmanager
def _open_client(
    place: Place, patience: float | None = None, check_patience: float | None = None
) -> Iterator[ClientAPI | ServerClient]:
    from epic_rag_chroma.store.client import PATIENCE, ServerClient, folder_client

    with _errors(place):
        client: ClientAPI | ServerClient
        if isinstance(place, Path):
            client = folder_client(place)
        else:
            client = ServerClient(place.server, patience or PATIENCE, check_patience or PATIENCE)
        with closing(cast(Any, client)):
            yield client


@contextmanager
def _errors(place: Place) -> Iterator[None]:
    """Turn the exceptions of Chroma's bindings, which are of any kind, into errors with a remedy."""
    try:
        yield
    except (EpicError, MemoryError):
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of Rust code; not an `Exception`
        if not isinstance(error, Exception) and not is_panic:
            raise
        why = " ".join(str(error).split())[:160] or type(error).__name__
        if isinstance(place, ServerPlace):
            if isinstance(error, (OSError, sqlite3.Error)):
                raise
            raise ChromaServerError(
                f"{place} gives an unexpected answer ({why}). Check that it is a Chroma server of version 1."
            ) from error
        raise IndexStateError(
            f"Chroma cannot use {place / CHROMA_FOLDER} ({why}). Stored data is intact. Free disk space and memory or "
            "fix permissions, then run `epic-rag index` again."
        ) from error


def _index_mark(place: Place) -> dict[str, str]:
    return {} if isinstance(place, Path) else {"index": place.index_id}


def _owned(client: ClientAPI | ServerClient, place: Place) -> list[Collection]:
    """Return the index's collections, but not those of others in the same database."""
    mark = {"owner": OWNER, "index": None, **_index_mark(place)}
    return [
        each
        for each in client.list_collections()
        if all((each.metadata or {}).get(key) == value for key, value in mark.items())
    ]


def _find(client: ClientAPI | ServerClient, place: Place, collection_id: str) -> Collection | None:
    return next((each for each in _owned(client, place) if str(each.id) == collection_id), None)


def _finds_its_rows(collection: Collection) -> bool:
    """Return whether rows spread over a collection are found by id and by their own vectors."""
    count = int(collection.count())
    vectors: list[Any] = []
    for offset in sorted({count * sample // _SAMPLES for sample in range(_SAMPLES)} if count else ()):
        vectors += list(cast(Any, collection.get(limit=1, offset=offset, include=["embeddings"])["embeddings"]))
    if not vectors:
        return count == 0
    distances = collection.query(query_embeddings=vectors, n_results=1, include=["distances"])["distances"] or []
    return all(bool(found) and found[0] < _SAME for found in distances)


def _is_in_place(place: Place, collection_id: str, database: IndexDatabase) -> bool:
    """Return whether a clean mirror is unchanged, as far as that is cheap to find out."""
    if isinstance(place, Path):
        return _has_stamps(place, collection_id)
    from epic_rag_chroma.store.client import Session

    with Session(place.server, patience=0.0) as session:
        try:
            stored = session.get_json(f"{session.url}/collections/{collection_id}/count", timeout=_CHECK_SECONDS)
        except ChromaServerError as error:
            logger.info("%s", error)
            return True
    return isinstance(stored, int) and stored >= database.count()


def _stamps(index_dir: Path, collection_id: str) -> dict[str, Any]:
    """Return size and time of the graphs' files, and the database's size: opening it changes its time."""
    folder = index_dir / CHROMA_FOLDER
    graph = {path.relative_to(folder).as_posix(): path.stat() for path in _graph_files(folder)}
    files = {name: [info.st_size, info.st_mtime_ns] for name, info in graph.items()}
    return {"collection": collection_id, "files": files, "database": (folder / "chroma.sqlite3").stat().st_size}


def _graph_files(folder: Path) -> list[Path]:
    """Return the files of the graphs that were written: small ones are made anew whenever they are opened."""
    return [path for written in folder.glob("*/index_metadata.pickle") for path in sorted(written.parent.iterdir())]


def _write_stamps(index_dir: Path, collection_id: str) -> None:
    for path in _graph_files(index_dir / CHROMA_FOLDER):  # Chroma does not call fsync
        with suppress(OSError), open(path, "rb") as file:
            os.fsync(file.fileno())
    stamps = _stamps(index_dir, collection_id)
    write_atomically(index_dir / CHROMA_FOLDER / _STAMPS_FILE, json.dumps(stamps))


def _has_stamps(index_dir: Path, collection_id: str) -> bool:
    """Return whether Chroma's files are as the last sync has left them."""
    try:
        content = json.loads((index_dir / CHROMA_FOLDER / _STAMPS_FILE).read_text(encoding="utf-8"))
        return bool(content == _stamps(index_dir, collection_id))
    except (OSError, ValueError, RecursionError):
        return False


def _is_loadable(index_dir: Path, collection_id: str) -> bool:
    """Return whether Chroma can load a collection that others may have written to.

    Its loader trusts the files, and crashes on some damaged ones, so it is tried in a process of its own.
    """
    if _has_stamps(index_dir, collection_id):
        return True
    command = [sys.executable, "-I", "-c", _TRIAL, json.dumps(sys.path), str(index_dir), collection_id]
    try:
        return subprocess.run(command, capture_output=True, timeout=_TRIAL_SECONDS, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _try_graph(index_dir: str, collection_id: str) -> None:
    """Exit with status 0 if a collection can be searched."""
    with _open_client(Path(index_dir)) as client:
        collection = _find(client, Path(index_dir), collection_id)
        sys.exit(0 if collection is not None and _finds_its_rows(collection) else 1)


def _set_aside(index_dir: Path) -> bool:
    """Move Chroma's files away if they are not a database; a valid one may hold other collections."""
    database = index_dir / CHROMA_FOLDER / "chroma.sqlite3"
    if not database.exists():
        return False
    try:
        with closing(sqlite3.connect(database)) as connection:
            if connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok":
                return False
    except sqlite3.OperationalError:  # locked, or it cannot be opened now: a new database would not help
        if database.is_file():
            return False
    except sqlite3.DatabaseError:
        pass
    shutil.rmtree(index_dir / BROKEN_FOLDER, ignore_errors=True)
    os.replace(index_dir / CHROMA_FOLDER, index_dir / BROKEN_FOLDER)
    logger.warning("%s is not a database; it was moved to %s", database, BROKEN_FOLDER)
    return True


def _fact(error: EpicError) -> str:
    """Return the fact of an error message without the remedy."""
    return re.split(r"; |\. ", str(error))[0]
