"""Shards: one set of rows on a Chroma server, kept in several collections by a hash of the id.

A collection of Chroma is one HNSW graph in one server's memory, and building it is sequential. Shards are built side by
side, and one that is damaged is made again without the others. A query asks all of them and merges what they return.

A single shard has the name of the whole, so that other programs find it; of several, shard i is called `NAME.i`. The
metadata of each says how many there are, which encoder made the vectors, and its state:

    complete    nobody is writing
    writing     a run is writing, or was when it died; the rows that are there are checked by samples
    in doubt    a request that writes rows failed after the server had got it

Chroma overwrites the files of a graph in place, within the requests that write rows. A server that is killed in one can
come back with a torn graph, which finds less or crashes whoever loads it. So the writer that lost the request marks
the shard, no writer touches it again, and the next run that has all rows makes a new one. A refused connection is no
such failure: nothing was sent, so the request is repeated when the server is back, after the time in which other
writers mark their shards.

Writing is idempotent, as tasks of a cluster run at least once: a row that is there with the same text, metadata and
vector is left alone, since writing it again would be a costly change of the graph.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from epic_rag.errors import ConfigError
from epic_rag_chroma.errors import ChromaServerError, IndexMismatchError, IndexNotFoundError, IndexStateError
from epic_rag_chroma.store.chroma_rows import HNSW, METADATA_BYTES, OWNER, RequestSplitter, row_bytes, storable
from epic_rag_chroma.store.client import PATIENCE, RUN_PATIENCE, ServerClient, is_not_started
from epic_rag_chroma.store.database import Record
from epic_rag_chroma.store.server import ChromaServer
from epic_rag_chroma.types import ModelInfo, WriteCounts

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection as ChromaCollection

__all__ = ["MAX_SHARDS", "ShardInDoubtError", "ShardState", "Shards", "shard_of"]

logger = logging.getLogger(__name__)

ShardState = Literal["complete", "writing", "in doubt"]
MAX_SHARDS = 1000
# The graph is written to disk within a request, and a request has up to 1,000 rows: once or twice each.
_HNSW = {**HNSW, "batch_size": 100, "sync_threshold": 1000}
_PAGE = 1000
_IDS_PAGE = 10_000
# Rows whose own vector must find them, in this many pages, after a run that died.
_SAMPLES, _SAMPLE_PAGES = 256, 8
# Cosine distance of a stored vector to itself, and difference of its numbers, at most.
_SAME = 1e-3
_SAME_NUMBER = 1e-5
# Most connections of a query; a server computes in as many threads as it has cores.
_THREADS = 8
# Longer than the pauses in which other writers notice that the server is back, and mark their shards.
_MARKED_SECONDS = 1.0


class ShardInDoubtError(ChromaServerError):
    """A shard may be damaged, because its server failed while rows were written."""


def shard_of(row_id: str, shards: int) -> int:
    """Return the number of the shard of an id, the same on every machine."""
    digest = hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % shards


@dataclass(frozen=True)
class _Shard:
    number: int
    collection: ChromaCollection

    @property
    def state(self) -> ShardState:
        return cast(ShardState, (self.collection.metadata or {}).get("state", "complete"))

    @property
    def version(self) -> str:
        return str((self.collection.metadata or {}).get("version", ""))


class Shards:
    """The shards of one name on a Chroma server. Must be closed. Not thread-safe.

    Args:
        server: The server.
        name: The name.
        headers: Headers with credentials; None for those of the environment.
        patience: Seconds that a writer waits for a server that went away.

    Attributes:
        info: The encoder of the vectors.
        version: The version of the rows that the last `end` has named, if all shards have it; "" otherwise.

    Raises:
        ChromaServerError: If the server cannot be reached, or refuses.
    """

    def __init__(
        self,
        server: ChromaServer,
        name: str,
        *,
        headers: Mapping[str, str] | None = None,
        patience: float = RUN_PATIENCE,
    ) -> None:
        self.server = server
        self.name = name
        self._patience = patience
        self._client = ServerClient(server, patience, min(patience, PATIENCE), headers=headers)
        self._requests = RequestSplitter(min(_PAGE, self._client.get_max_batch_size()))
        self._shards: list[_Shard] = []
        self._count = 1
        self._in_doubt: set[int] = set()
        self._pool: ThreadPoolExecutor | None = None
        self.info: ModelInfo | None = None
        self.version = ""

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def states(self) -> list[ShardState]:
        """State of each shard, as of `open` or `begin`."""
        return [shard.state for shard in self._shards]

    def close(self) -> None:
        """Close the connections."""
        if self._pool is not None:
            self._pool.shutdown()
        self._client.close()

    def open(self) -> ModelInfo:
        """Open the existing shards and return the encoder of their vectors.

        Raises:
            IndexNotFoundError: If there are none.
            IndexStateError: If the name belongs to others, or shards are missing.
            ChromaServerError: If the server fails.
        """
        first = self._find(0, 1) or self._find(0, 2)
        if first is None:
            raise IndexNotFoundError(
                f"{self.server} has no collection {self.name} of epic-rag. Run `epic-rag index --from-parquet DIR "
                f"--chroma {self.server.url} --collection {self.name}`."
            )
        metadata = first.metadata or {}
        count = int(metadata.get("shards", 1))
        found = [first, *(self._find(number, count) for number in range(1, count))]
        missing = [number for number, collection in enumerate(found) if collection is None]
        if missing:
            raise IndexStateError(
                f"{len(missing)} of the {count} shards of {self.name} are missing on {self.server}, "
                f"{_shard_name(self.name, missing[0], count)} for instance. Write all rows again."
            )
        self._shards = [_Shard(number, cast(Any, collection)) for number, collection in enumerate(found)]
        self._count = count
        self.version = self._common_version()
        self.info = _info(metadata)
        return self.info

    def begin(self, info: ModelInfo, shards: int | None, *, has_all_rows: bool) -> None:
        """Create the shards, or open them for writing, and mark them as being written.

        Args:
            info: The encoder of the vectors to be written.
            shards: Number of shards; None for that of existing ones, or 1.
            has_all_rows: True if the run writes every row, so that shards in doubt can be made again.

        Raises:
            ConfigError: If the number of shards is out of range.
            IndexMismatchError: If existing shards have vectors of another encoder, or another number.
            IndexStateError: If the name belongs to others, or shards are in doubt and the run lacks some rows.
            ChromaServerError: If the server fails.
        """
        if shards is not None and not 1 <= shards <= MAX_SHARDS:
            raise ConfigError(f"{shards} shards are not possible. Use 1 to {MAX_SHARDS}.")
        count = shards or 1
        first = self._find(0, 1) or self._find(0, 2) or self._find_any()
        if first is not None:
            metadata = first.metadata or {}
            count = int(metadata.get("shards", 1))
            known = _info(metadata)
            if known.fingerprint != info.fingerprint:
                raise IndexMismatchError(
                    f"{self.name} on {self.server} has vectors of {known.model} ({known.fingerprint}), not of "
                    f"{info.model} ({info.fingerprint}). Use another collection name."
                )
            if shards not in (None, count):
                raise IndexMismatchError(
                    f"{self.name} on {self.server} has {count} shards, not {shards}. Use another collection name."
                )
        self.info = info
        self._count = count
        self._in_doubt = set()
        self._shards = []
        for number in range(count):
            collection = self._find(number, count)
            shard = None if collection is None else _Shard(number, collection)
            if shard is not None and shard.state != "complete" and not self._is_sound(shard):
                if not has_all_rows:
                    raise IndexStateError(
                        f"Shard {number} of {self.name} on {self.server} is in doubt, since the server failed while "
                        "rows were written. Write all rows, with `epic-rag index --from-parquet` for instance."
                    )
                logger.warning("Shard %d of %s is made again, since the server failed in a write", number, self.name)
                self._client.delete_collection(_shard_name(self.name, number, count))
                shard = None
            if shard is None:
                shard = _Shard(number, self._create(number))
            self._shards.append(shard)
        self.version = self._common_version()
        for shard in self._shards:
            self._set_state(shard, "writing")

    def join(self, info: ModelInfo) -> None:
        """Open shards that another process has begun to write.

        Raises:
            IndexStateError: If they are not there.
            ChromaServerError: If the server fails.
        """
        if self.open().fingerprint != info.fingerprint:
            raise IndexMismatchError(f"{self.name} on {self.server} has vectors of another encoder. Run it again.")

    def end(self, version: str = "") -> None:
        """Mark the shards as complete.

        Args:
            version: What they hold now, for `version`; "" if that is not known.

        Raises:
            ShardInDoubtError: If some are in doubt. The others are complete.
        """
        for shard in self._shards:
            if self._is_marked(shard):
                self._in_doubt.add(shard.number)
            else:
                self._set_state(shard, "complete", version)
        self.check()

    def check(self) -> None:
        """Raise if shards are known to be in doubt.

        Raises:
            ShardInDoubtError: If so.
        """
        if self._in_doubt:
            raise ShardInDoubtError(
                f"{len(self._in_doubt)} of {len(self._shards)} shards of {self.name} are in doubt, since {self.server} "
                "failed while rows were written. Run it again: they are made again, and other rows are not sent twice.",
                503,
            )

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, records: Sequence[Record]) -> WriteCounts:
        """Store rows; those that are there already are left alone. Rows of a shard in doubt are not sent.

        Raises:
            ConfigError: If a vector has another length.
            ChromaServerError: If the server refuses, or stays away.
        """
        assert self.info is not None, "begin or open first"
        by_shard: dict[int, dict[str, Record]] = {}
        for record in records:
            if record.vector.shape != (self.info.dimension,):
                raise ConfigError(
                    f"Row {record.id} has a vector of shape {record.vector.shape}, not ({self.info.dimension},). "
                    "Write vectors of one encoder."
                )
            by_shard.setdefault(shard_of(record.id, len(self._shards)), {})[record.id] = record
        total = WriteCounts()
        # In another order than other writers, which otherwise all wait for the same shard.
        for number in random.sample(sorted(by_shard), len(by_shard)):
            shard, rows = self._shards[number], list(by_shard[number].values())
            for start in range(0, len(rows), _PAGE):
                total += self._write_part(shard, rows[start : start + _PAGE])
        return total

    def _write_part(self, shard: _Shard, rows: Sequence[Record]) -> WriteCounts:
        try:
            self._check_shard(shard)
            there = self._stored(shard, [row.id for row in rows])
            new, changed = [], []
            for row in rows:
                stored = there.get(row.id)
                if stored is None or stored.text != row.text or not _same_vector(stored.vector, row.vector):
                    new.append(row)
                elif storable(stored.metadata) != storable(row.metadata):
                    changed.append(row)

            def metadatas(part: Sequence[Record]) -> Any:
                old = {row.id: there[row.id].metadata for row in part if row.id in there}
                return [{**dict.fromkeys(old.get(row.id, ())), **storable(row.metadata)} for row in part]

            def update(part: Sequence[Record]) -> None:
                given = metadatas(part)  # None removes a key
                self._send(shard, lambda: shard.collection.update(ids=[row.id for row in part], metadatas=given))

            def upsert(part: Sequence[Record]) -> None:
                self._send(
                    shard,
                    lambda: shard.collection.upsert(
                        ids=[row.id for row in part],
                        embeddings=cast(Any, np.stack([row.vector for row in part])),
                        documents=[row.text for row in part],
                        metadatas=metadatas(part),
                    ),
                )

            self._requests.send(changed, lambda _: METADATA_BYTES, update)
            self._requests.send(new, row_bytes, upsert)
        except ShardInDoubtError:
            return WriteCounts(left_out=len(rows))
        replaced = sum(row.id in there for row in new)
        return WriteCounts(
            written=len(new) - replaced,
            changed=len(changed) + replaced,
            unchanged=len(rows) - len(new) - len(changed),
        )

    def delete(self, ids: Collection[str]) -> int:
        """Delete rows, and return how many there were; unknown ids are ignored.

        Raises:
            ChromaServerError: If the server refuses, or stays away.
        """
        by_shard: dict[int, list[str]] = {}
        for row_id in dict.fromkeys(ids):
            by_shard.setdefault(shard_of(row_id, len(self._shards)), []).append(row_id)
        deleted = 0
        for number, some in by_shard.items():
            with suppress(ShardInDoubtError):
                for start in range(0, len(some), _PAGE):
                    deleted += self._delete_part(self._shards[number], some[start : start + _PAGE])
        return deleted

    def _delete_part(self, shard: _Shard, ids: list[str]) -> int:
        self._check_shard(shard)
        there = list(shard.collection.get(ids=ids, include=[])["ids"])
        if there:
            self._send(shard, lambda: shard.collection.delete(ids=there))
        return len(there)

    def ids(self) -> Iterator[list[str]]:
        """Yield the ids of all rows, page by page. Rows must not be deleted meanwhile."""
        for shard in self._shards:
            if shard.number in self._in_doubt:
                continue
            for offset in range(0, int(shard.collection.count()), _IDS_PAGE):
                yield list(shard.collection.get(limit=_IDS_PAGE, offset=offset, include=[])["ids"])

    def _send(self, shard: _Shard, request: Callable[[], object]) -> None:
        """Send a request that writes rows.

        Raises:
            ShardInDoubtError: If it failed after the server may have begun with it.
            ChromaServerError: If the server refuses it, or stays away.
        """
        end = time.monotonic() + self._patience
        while True:
            try:
                request()
                return
            except ChromaServerError as error:
                if is_not_started(error) and time.monotonic() < end:
                    self._client.wait(max(0.0, end - time.monotonic()))
                    time.sleep(_MARKED_SECONDS)
                    self._check_shard(shard)
                    continue
                if is_not_started(error) or (error.status is not None and error.status < 500):
                    raise
                self._mark(shard, end)
                raise ShardInDoubtError(f"{error} Shard {shard.number} of {self.name} is in doubt.", 503) from error

    def _check_shard(self, shard: _Shard) -> None:
        """Raise a `ShardInDoubtError` if this or another writer has marked a shard."""
        if shard.number in self._in_doubt or self._is_marked(shard):
            self._in_doubt.add(shard.number)
            raise ShardInDoubtError(f"Shard {shard.number} of {self.name} is in doubt. Write all rows again.", 503)

    def _is_marked(self, shard: _Shard) -> bool:
        now = self._client.find_collection(shard.collection.name)
        return now is None or str(now.id) != str(shard.collection.id) or _Shard(shard.number, now).state == "in doubt"

    def _mark(self, shard: _Shard, end: float) -> None:
        self._in_doubt.add(shard.number)
        logger.warning("%s failed while rows of shard %d of %s were written", self.server, shard.number, self.name)
        self._client.wait(max(1.0, end - time.monotonic()))
        self._set_state(shard, "in doubt")

    def _set_state(self, shard: _Shard, state: ShardState, version: str | None = None) -> None:
        version = shard.version if version is None else version
        if (shard.state, shard.version) != (state, version):
            shard.collection.modify(metadata=self._metadata(shard.number, state, version))

    def _common_version(self) -> str:
        versions = {shard.version for shard in self._shards}
        return versions.pop() if len(versions) == 1 else ""

    def _metadata(self, number: int, state: ShardState, version: str = "") -> dict[str, Any]:
        assert self.info is not None
        info = {name: value for name, value in asdict(self.info).items() if value is not None}
        if version:
            info["version"] = version
        return {"owner": OWNER, "collection": self.name, "shards": self._count, "shard": number, "state": state, **info}

    def _is_sound(self, shard: _Shard) -> bool:
        """Return whether rows spread over a shard that was being written are found by their own vectors."""
        if shard.state == "in doubt":
            return False
        count = int(shard.collection.count())
        for page in range(_SAMPLE_PAGES if count else 0):
            rows = shard.collection.get(
                limit=_SAMPLES // _SAMPLE_PAGES, offset=count * page // _SAMPLE_PAGES, include=["embeddings"]
            )
            vectors = list(cast(Any, rows["embeddings"]))
            if not vectors:
                return False
            found = shard.collection.query(query_embeddings=vectors, n_results=1, include=["distances"])["distances"]
            if not all(bool(each) and each[0] < _SAME for each in found or []):
                return False
        return True

    def _create(self, number: int) -> ChromaCollection:
        from epic_rag_chroma.embedding_function import EpicEmbeddingFunction

        assert self.info is not None
        function = None
        if self.info.source:  # so that programs which know Chroma alone can query by text
            function = EpicEmbeddingFunction.build_from_config(
                {
                    "model": self.info.source,
                    "truncate_dim": self.info.truncate_dim,
                    "fingerprint": self.info.fingerprint,
                }
            )
        try:
            return self._client.create_collection(
                _shard_name(self.name, number, self._count),
                metadata=self._metadata(number, "writing"),
                configuration={"hnsw": dict(_HNSW)},
                embedding_function=function,
            )
        except ChromaServerError as error:
            made = self._find(number, self._count) if error.status == 409 else None  # the answer was lost
            if made is None:
                raise
            return made

    def _find(self, number: int, count: int) -> ChromaCollection | None:
        name = _shard_name(self.name, number, count)
        found = self._client.find_collection(name)
        metadata = {} if found is None else found.metadata or {}
        if found is not None and (metadata.get("owner") != OWNER or metadata.get("collection") != self.name):
            raise IndexStateError(
                f"{self.server} has a collection {name} that is not a shard of epic-rag. Use another collection name."
            )
        return found

    def _find_any(self) -> ChromaCollection | None:
        """Return one of the shards, if the first is missing."""
        mark = {"owner": OWNER, "collection": self.name}
        return next(
            (each for each in self._client.list_collections() if mark.items() <= dict(each.metadata or {}).items()),
            None,
        )

    def _stored(self, shard: _Shard, ids: list[str]) -> dict[str, Record]:
        rows = shard.collection.get(ids=ids, include=["documents", "metadatas", "embeddings"])
        columns = (rows["ids"], rows["documents"], rows["metadatas"], rows["embeddings"])
        return {
            row_id: Record(row_id, text or "", dict(metadata or {}), np.asarray(vector, dtype=np.float32))
            for row_id, text, metadata, vector in zip(*cast(Any, columns), strict=True)
        }

    # -- reading -------------------------------------------------------------------------------------------------------

    def count(self) -> int:
        """Return the number of rows."""
        return sum(self._map(lambda shard: int(shard.collection.count())))

    def nearest(
        self, vector: npt.NDArray[np.float32], k: int, where: Mapping[str, Any] | None = None
    ) -> list[tuple[str, float]]:
        """Return id and cosine of the k rows of all shards nearest to a vector; equal ones in the order of their ids.

        The k best of all rows are among the k best of each shard, so merging loses nothing: with exact search in the
        shards, the result is that of one collection.

        Args:
            vector: Unit vector (dim,).
            k: Number of rows.
            where: Condition on the metadata, as Chroma takes it.
        """

        def search(shard: _Shard) -> list[tuple[str, float]]:
            wanted = k
            if k > _PAGE:  # Chroma allocates room for as many
                wanted = min(k, int(shard.collection.count()))
            if wanted < 1:
                return []
            rows = shard.collection.query(
                query_embeddings=cast(Any, vector[None, :]),
                n_results=wanted,
                where=cast(Any, dict(where) if where else None),
                include=["distances"],
            )
            distances = (rows["distances"] or [[]])[0]
            # Rounded, since equal rows may differ in the last bit.
            return [(row, round(1.0 - float(each), 6)) for row, each in zip(rows["ids"][0], distances, strict=True)]

        found = [row for rows in self._map(search) for row in rows]
        return sorted(found, key=lambda row: (-row[1], row[0]))[:k]

    def get(self, ids: Iterable[str]) -> dict[str, Record]:
        """Return rows by id, without those that do not exist."""
        by_shard: dict[int, list[str]] = {}
        for row_id in dict.fromkeys(ids):
            by_shard.setdefault(shard_of(row_id, len(self._shards)), []).append(row_id)
        found: dict[str, Record] = {}
        for rows in self._map(
            lambda shard: self._stored(shard, by_shard[shard.number]) if shard.number in by_shard else {}
        ):
            found |= rows
        return found

    def where(self, condition: Mapping[str, Any]) -> list[Record]:
        """Return all rows whose metadata meets a condition."""

        def select(shard: _Shard) -> list[Record]:
            ids = list(shard.collection.get(where=cast(Any, dict(condition)), include=[])["ids"])
            return list(self._stored(shard, ids).values()) if ids else []

        return [row for rows in self._map(select) for row in rows]

    def _map(self, call: Callable[[_Shard], Any]) -> list[Any]:
        if len(self._shards) == 1:
            return [call(self._shards[0])]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(_THREADS, max(1, len(self._shards))), thread_name_prefix="epic-shards")
        return list(self._pool.map(call, self._shards))


def _shard_name(name: str, number: int, count: int) -> str:
    return name if count == 1 else f"{name}.{number}"


def _info(metadata: Mapping[str, Any]) -> ModelInfo:
    return ModelInfo(**{field.name: metadata[field.name] for field in fields(ModelInfo) if field.name in metadata})


def _same_vector(stored: npt.NDArray[np.float32], given: npt.NDArray[np.float32]) -> bool:
    """Return whether a vector is the stored one, which Chroma has normalised."""
    length = float(np.linalg.norm(given)) or 1.0
    return bool(np.allclose(stored, given / np.float32(length), atol=_SAME_NUMBER))
