"""`ChromaDatasink`: rows of a Ray Dataset into a Chroma server, in one collection or in shards.

    dataset.write_datasink(ChromaDatasink("http://chroma:8000", "docs", info), concurrency=4)

Ray runs write tasks at least once, so writing is idempotent: ids come with the rows, and a row that is there already is
left alone. Each task connects by itself, with the credentials of the process that made the sink. Few writers suffice: a
server builds graphs in as many threads as it has cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from epic_rag.errors import ConfigError, FingerprintError, MissingExtraError
from epic_rag_chroma import ChromaServer, Shards, WriteCounts, parse_server, request_headers
from epic_rag_ray.parts import VECTOR_COLUMN, VectorInfo
from epic_rag_ray.stores import ROWS, model_info, records

try:
    from ray.data import Datasink
except ImportError as error:
    raise MissingExtraError("ray", "ray", "writing a Dataset") from error

if TYPE_CHECKING:
    from ray.data.datasource import WriteResult

__all__ = ["ChromaDatasink"]


class ChromaDatasink(Datasink[WriteCounts]):
    """Writes a Dataset with the columns `id`, `text`, vectors and metadata to a Chroma server.

    The metadata of the collections has the encoder's fingerprint, and vectors of another one are refused. One job
    writes to a collection at a time. If the server is killed in the middle of a write, the job ends with a
    `ShardInDoubtError`, and writing once more completes the collection.

    Args:
        server: Address of the server (tenant and database from the environment), or a `ChromaServer`; that of a
            distributed Chroma as well.
        collection: Name of the collection, or of its shards.
        info: The encoder of the vectors: `VectorParts.info`, for instance.
        shards: Number of shards; None for that of an existing collection, or 1. Rows are spread by a hash of the id.
        vector_column: The column of the vectors, lists of a fixed size.
        has_all_rows: The Dataset has every row of the collection, so that shards whose server was killed in a write
            can be made again. Without it such a shard is an error.
        headers: Headers with credentials; None takes those of the environment, now. They are pickled with the sink.

    Attributes:
        counts: Counts of rows, when the job has ended.

    Raises:
        ConfigError: If the address is invalid.
        DataError: If the vectors are those of queries.
    """

    def __init__(
        self,
        server: str | ChromaServer,
        collection: str,
        info: VectorInfo,
        *,
        shards: int | None = None,
        vector_column: str = VECTOR_COLUMN,
        has_all_rows: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        place = parse_server(server)
        if not isinstance(place, ChromaServer):
            raise ConfigError(f"{server!r} is not the address of a Chroma server. Use http://host:port.")
        self._server = place
        self._collection = collection
        self._info = model_info(info)
        self._number_of_shards = shards
        self._vector_column = vector_column
        self._has_all_rows = has_all_rows
        self._headers = dict(request_headers() if headers is None else headers)
        self.counts = WriteCounts()

    def __repr__(self) -> str:
        # Without credentials.
        return f"ChromaDatasink({str(self._server)!r}, {self._collection!r})"

    def get_name(self) -> str:
        """Return the name that Ray shows."""
        return "Chroma"

    @property
    def min_rows_per_write(self) -> int:
        """Rows that Ray collects for a task: several requests' worth."""
        return ROWS

    def on_write_start(self, schema: Any = None) -> None:
        """Create the shards, or check those that exist, before the first task.

        Args:
            schema: The schema of the Dataset, if Ray knows it. If it names the encoder, that must be the sink's.

        Raises:
            FingerprintError: If the Dataset has vectors of another encoder than `info` says.
            IndexMismatchError: If the collection has.
            IndexStateError: If the name belongs to others, or a shard is in doubt.
            ChromaServerError: If the server cannot be reached, or refuses.
        """
        if b"epic_rag" in (getattr(schema, "metadata", None) or {}):
            found = VectorInfo.of(schema)
            if found.fingerprint != self._info.fingerprint:
                raise FingerprintError(
                    f"The Dataset has vectors of {found.model} ({found.fingerprint}), the sink is for "
                    f"{self._info.model} ({self._info.fingerprint}). Give the sink the info of the Dataset."
                )
        with self._connect() as shards:
            shards.begin(self._info, self._number_of_shards, has_all_rows=self._has_all_rows)

    def write(self, blocks: Iterable[Any], ctx: Any) -> WriteCounts:
        """Write the blocks of one task.

        Raises:
            DataError: If a column is missing.
            ChromaServerError: If the server refuses, or stays away.
        """
        from ray.data.block import BlockAccessor

        counts = WriteCounts()
        with self._connect() as shards:
            shards.join(self._info)
            for block in blocks:
                table = BlockAccessor.for_block(block).to_arrow()
                for start in range(0, table.num_rows, ROWS):
                    counts += shards.write(records(table.slice(start, ROWS), self._vector_column))
        return counts

    def on_write_complete(self, write_result: WriteResult[WriteCounts]) -> None:
        """Mark the shards as complete, and add up the counts of the tasks.

        Raises:
            ShardInDoubtError: If the server failed while rows of a shard were written. Write again.
        """
        self.counts = sum(write_result.write_returns, WriteCounts())
        with self._connect() as shards:
            shards.join(self._info)
            shards.end()

    def _connect(self) -> Shards:
        return Shards(self._server, self._collection, headers=self._headers)
