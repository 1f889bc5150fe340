"""`ShardedCollection`: rows on a Chroma server, in one collection or in shards, searched as one.

An index folder holds its texts and vectors; this is for corpora that no single machine holds. There is no keyword index
on the server, so search is by vectors alone. Filters that Chroma can evaluate are sent with the query. For the others
the ranking is read deeper until enough rows pass.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from epic_rag.errors import ConfigError
from epic_rag_chroma.errors import ChromaServerError, IndexMismatchError
from epic_rag_chroma.indexer import marking_bank
from epic_rag_chroma.search.conditions import Combination, Condition
from epic_rag_chroma.search.filters import Filter, parse_where
from epic_rag_chroma.search.request import SearchRequest
from epic_rag_chroma.search.searcher import Searcher, replace_queries
from epic_rag_chroma.search.where import Where, to_where
from epic_rag_chroma.store.client import RUN_PATIENCE
from epic_rag_chroma.store.server import ChromaServer, parse_server
from epic_rag_chroma.store.shards import ShardInDoubtError, Shards
from epic_rag_chroma.types import Hit, ModelInfo, SearchFilters, WriteCounts

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from epic_rag import EpicEncoder
    from epic_rag_chroma.search.index_reader import IndexReader, IndexSnapshot, Ranking
    from epic_rag_chroma.search.request import SearchSettings
    from epic_rag_chroma.search.searcher import Embedded, Encode, Vectors
    from epic_rag_chroma.store.database import Record

__all__ = ["ShardedCollection"]

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Changes: TypeAlias = "tuple[Iterable[Sequence[Record]], Collection[str]]"
"""Rows that are new or differ, in batches, and ids that are gone."""

# How often shards in doubt are made again by one `sync`.
_ATTEMPTS = 6
# How much deeper than needed a ranking is read for filters that Chroma cannot evaluate, first and at most.
_OVERSAMPLING = 4
_DEEPEST = 16_384


class ShardedCollection:
    """The rows of one name on a Chroma server, searched as one. Thread-safe for queries.

    Args:
        server: Address of the server (tenant and database from the environment), or a `ChromaServer`.
        name: Name of the collection, or of its shards.
        encoder: An encoder of queries, or a function that loads one; None for the model that made the vectors.
        headers: Headers with credentials; None for those of the environment.
        dtype: Data type of a model that is loaded here; see `EpicEncoder.from_pretrained`.
        device: Its device or devices; see `EpicEncoder.from_pretrained`.

    Raises:
        ConfigError: If `server` is not an address.

    Example:
        >>> collection = ShardedCollection("http://chroma:8000", "docs")
        >>> collection.query("how do I undo a commit?", k=3, bank="docs")
    """

    def __init__(
        self,
        server: str | ChromaServer,
        name: str,
        *,
        encoder: EpicEncoder | Callable[[], EpicEncoder] | None = None,
        headers: Mapping[str, str] | None = None,
        dtype: str | None = None,
        device: str | None = None,
    ) -> None:
        place = parse_server(server)
        if not isinstance(place, ChromaServer):
            raise ConfigError(f"{server!r} is not the address of a Chroma server. Use http://host:port.")
        self.server = place
        self.name = name
        self._headers = headers
        self._dtype, self._device = dtype, device
        self._given = encoder
        self._open_nothing()

    def _open_nothing(self) -> None:
        self._encoder: EpicEncoder | None = None
        self._shards: Shards | None = None
        self._lock = threading.RLock()
        self._encoder_lock = threading.Lock()
        # A row's root is an address or absolute, so the searcher's folder decides nothing.
        self._searcher = Searcher(Path("/"), cast("IndexReader", self))
        self._filters: SearchFilters | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings; the other process connects and loads the model by itself."""
        kept = ("server", "name", "_headers", "_dtype", "_device", "_given")
        state = {name: self.__dict__[name] for name in kept}
        if hasattr(self._given, "encode_document"):
            state["_given"] = None  # weights are not pickled; the collection names its model
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the settings."""
        self.__dict__.update(state)
        self._open_nothing()

    def __enter__(self) -> ShardedCollection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; a later query opens them again."""
        with self._lock:
            if self._shards is not None:
                self._shards.close()
            self._shards = None

    @property
    def info(self) -> ModelInfo:
        """The encoder of the vectors.

        Raises:
            IndexNotFoundError: If there is no such collection.
            ChromaServerError: If the server cannot be reached, or refuses.
        """
        return self._opened()[1]

    @property
    def shards(self) -> int:
        """Number of shards; errors as for `info`."""
        return len(self._opened()[0])

    def count(self) -> int:
        """Return the number of rows; errors as for `info`."""
        return self._opened()[0].count()

    # -- filling -------------------------------------------------------------------------------------------------------

    def sync(
        self,
        rows: Callable[[], Iterable[Sequence[Record]]],
        info: ModelInfo,
        *,
        shards: int | None = None,
        version: str = "",
        changes: Callable[[str], Changes | None] | None = None,
        progress: Callable[[int], None] | None = None,
        patience: float = RUN_PATIENCE,
    ) -> WriteCounts:
        """Make the collection equal to some rows: add, change and delete what differs.

        Rows that are there already are not sent again. If the server fails in the middle of a write, the shard is made
        again, up to five times; other shards keep their rows.

        Args:
            rows: Returns all rows in batches; called once for each attempt.
            info: The encoder of their vectors.
            shards: Number of shards; None for that of an existing collection, or 1.
            version: Name of this state of the rows, which the collection keeps.
            changes: Returns what has changed since the version that the collection has: rows that are new or differ,
                and ids that are gone. Then only these are read and sent. None, or a result of None, compares all rows.
            progress: Called with the number of rows that were read so far.
            patience: Seconds to wait for a server that went away.

        Returns:
            Counts; rows of a shard that was made again count twice.

        Raises:
            ConfigError: If the number of shards is out of range, or a vector has another length.
            IndexMismatchError: If the collection has vectors of another encoder, or another number of shards.
            IndexStateError: If the name belongs to others.
            ChromaServerError: If the server cannot be reached, refuses, or fails again and again.
        """
        self.close()
        total = WriteCounts()
        for attempt in range(_ATTEMPTS):
            try:
                with Shards(self.server, self.name, headers=self._headers, patience=patience) as opened:
                    opened.begin(info, shards, has_all_rows=True)
                    hashes: list[npt.NDArray[np.uint64]] = []
                    counts, done = WriteCounts(), 0
                    changed = changes(opened.version) if changes is not None and opened.version else None
                    for batch in rows() if changed is None else changed[0]:
                        hashes.append(_hashes(row.id for row in batch))
                        counts += opened.write(batch)
                        done += len(batch)
                        if progress is not None:
                            progress(done)
                    gone = _unknown(opened.ids(), hashes) if changed is None else changed[1]
                    counts = replace(counts, deleted=opened.delete(gone))
                    unchanged = counts.unchanged
                    if changed is not None:
                        unchanged = opened.count() - counts.written - counts.changed
                    total = replace(total + counts, unchanged=unchanged, left_out=0)
                    opened.end(version)
                return total
            except ShardInDoubtError as error:
                if attempt + 1 == _ATTEMPTS:
                    raise
                logger.warning("%s", error)
        raise AssertionError("unreachable")

    # -- queries -------------------------------------------------------------------------------------------------------

    def query(
        self,
        text: str,
        request: SearchRequest | None = None,
        *,
        embedded: Embedded | None = None,
        **settings: Unpack[SearchSettings],
    ) -> list[Hit]:
        """Find the rows of all shards that answer a query; see `ChromaIndexer.query`. The mode is "dense".

        Raises:
            ConfigError: If a setting or a filter is invalid, or needs what a server has not: keywords, times of files.
            PromptError: If the prompt's settings do not fit together.
            CheckpointError: If the reranker cannot be loaded.
            IndexNotFoundError: If there is no such collection.
            IndexMismatchError: If the encoder is not the one that made the vectors.
            ChromaServerError: If the server cannot be reached, or refuses.
        """
        return self.query_many([text], request, embedded=None if embedded is None else [embedded], **settings)[0]

    def query_many(
        self,
        texts: Sequence[str],
        request: SearchRequest | None = None,
        *,
        embedded: Sequence[Embedded | None] | None = None,
        **settings: Unpack[SearchSettings],
    ) -> list[list[Hit]]:
        """Find the rows that answer each query; the model encodes all queries in one call. See `query`.

        Raises:
            EpicError: See `query`.
        """
        if request is None:
            settings.setdefault("mode", "dense")
        request = SearchRequest.of(request, settings)
        if request.mode != "dense":
            raise ConfigError(
                f"A collection on a server has no keyword index, which mode {request.mode} needs. Search it with mode "
                "dense, or search an index folder."
            )
        if request.filters is not None and request.filters.since is not None:
            raise ConfigError("A collection on a server has no times of files. Search without since.")
        info = self.info

        def encode_queries(queries: Sequence[str]) -> Vectors:
            encoder = self._load(info)
            with self._encoder_lock:
                return encoder.encode_query(queries, request.prompt)

        encode: Encode = encode_queries
        if embedded is not None:
            if len(embedded) != len(texts):
                raise ConfigError(f"embedded has {len(embedded)} entries for {len(texts)} queries. Give one for each.")
            encode = replace_queries(encode_queries, embedded, info.dimension)
        with self._lock:
            self._filters = request.filters
            plain = replace(request, filters=None)  # the snapshot applies them
            try:
                return self._searcher.search(texts, plain, encode, bank=marking_bank(request))
            except ChromaServerError as error:
                if error.status != 404:
                    raise
            self.close()  # a shard was made again
            return self._searcher.search(texts, plain, encode, bank=marking_bank(request))

    def read(self, query: Callable[[IndexSnapshot], Answer], *, needs_vectors: bool = True) -> Answer:
        """Call a function with the rows, as `IndexReader.read` does; for `Searcher`."""
        shards, _ = self._opened()
        return query(cast("IndexSnapshot", _Snapshot(shards, self._filters)))

    def _opened(self) -> tuple[Shards, ModelInfo]:
        with self._lock:
            if self._shards is None:
                shards = Shards(self.server, self.name, headers=self._headers)
                try:
                    shards.open()
                except BaseException:
                    shards.close()
                    raise
                self._shards = shards
            assert self._shards.info is not None
            return self._shards, self._shards.info

    def _load(self, info: ModelInfo) -> EpicEncoder:
        if self._encoder is None:
            given: Any = self._given
            if given is None:
                from epic_rag import EpicEncoder

                given = EpicEncoder.from_pretrained(
                    info.source or None, truncate_dim=info.truncate_dim, dtype=self._dtype, device=self._device
                )
            self._encoder = given if hasattr(given, "encode_document") else given()
        encoder: EpicEncoder = self._encoder
        if encoder.fingerprint != info.fingerprint:
            raise IndexMismatchError(
                f"{self.name} on {self.server} has vectors of {info.model} ({info.fingerprint}), queries are encoded "
                f"by {encoder.name} ({encoder.fingerprint}). Pass the encoder that made the vectors."
            )
        return encoder


def _unknown(pages: Iterable[Sequence[str]], hashes: Sequence[npt.NDArray[np.uint64]]) -> list[str]:
    """Return the ids of some pages that have none of some hashes."""
    known = np.unique(np.concatenate(hashes)) if hashes else np.zeros(0, np.uint64)
    return [
        row_id
        for page in pages
        for row_id, is_known in zip(page, np.isin(_hashes(page), known), strict=True)
        if not is_known
    ]


class _Snapshot:
    """The rows of all shards that pass some filters, with the methods of `IndexSnapshot` and its database."""

    def __init__(self, shards: Shards, filters: SearchFilters | None) -> None:
        self.database = self
        self._shards = shards
        self._where: Where | None = None
        self._passes: Filter | None = None
        if filters:
            conditions: list[Condition] = [parse_where(text) for text in filters.where]
            if filters.condition is not None:
                conditions.append(filters.condition)
            self._where, rest = to_where(tuple(conditions))
            if rest or filters.paths:
                self._passes = Filter(
                    SearchFilters(paths=filters.paths, condition=Combination("and", rest) if rest else None), Path("/")
                )

    def nearest(self, vector: Vectors, k: int, allowed: Collection[int] | None = None) -> Ranking:
        """Return the k rows nearest to a vector (dim,) among those that pass."""
        if self._passes is None:
            return self._shards.nearest(vector, k, self._where)
        depth = _OVERSAMPLING * k
        while True:
            ranking = self._shards.nearest(vector, depth, self._where)
            rows = self.get([row_id for row_id, _ in ranking])
            passed = [each for each in ranking if each[0] in rows and self._passes(rows[each[0]].metadata)]
            if len(passed) >= k or len(ranking) < depth:
                return passed[:k]
            if depth >= _DEEPEST:
                logger.warning("Only the %d best rows were compared with the filters; %d pass.", depth, len(passed))
                return passed
            depth = min(4 * depth, _DEEPEST)

    def get(self, ids: Collection[str]) -> dict[str, Record]:
        """Return rows by id, without those that do not exist."""
        found: dict[str, Record] = {}
        wanted = list(ids)
        for start in range(0, len(wanted), 1000):
            found |= self._shards.get(wanted[start : start + 1000])
        return found

    def neighbours(self, row_id: str, first: int, last: int) -> list[Record]:
        """Return the rows of a row's document from one position to another, in order."""
        row = self.get([row_id]).get(row_id)
        document = None if row is None else row.metadata.get("doc_id")
        if not document:
            return []
        rows = self._shards.where(
            {"$and": [{"doc_id": document}, {"position": {"$gte": first}}, {"position": {"$lte": last}}]}
        )
        return sorted(rows, key=lambda each: int(each.metadata["position"]))

    def match(self, *_: object, **__: object) -> Ranking:
        """Return nothing: there is no keyword index."""
        return []

    def state(self) -> None:
        """Return nothing: the encoder was compared when it was loaded."""

    def file(self, key: object) -> None:
        """Return nothing: there are no files."""

    def version(self) -> tuple[str, int]:
        """Return a constant, since nothing is kept between queries."""
        return "", 0


def _hashes(ids: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Return a hash of each id: 8 bytes where the id takes a hundred."""
    digests = b"".join(hashlib.blake2b(each.encode("utf-8", "surrogatepass"), digest_size=8).digest() for each in ids)
    return np.frombuffer(digests, dtype=np.uint64)
