"""Fill an index folder or a Chroma server from a folder of parts. Needs neither Ray nor a model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from epic_rag.errors import DataError
from epic_rag_chroma import (
    ChromaIndexer,
    ChromaServer,
    IndexReport,
    IndexSettings,
    ModelInfo,
    Record,
    ShardedCollection,
    WriteCounts,
)
from epic_rag_ray.parts import VECTOR_COLUMN, VectorInfo, VectorParts, embedding_vectors, row_metadata

if TYPE_CHECKING:
    import pyarrow as pa

    from epic_rag_ray.storage import Storage

__all__ = ["ROWS", "fill_chroma", "fill_index", "model_info", "records"]

ROWS = 4096
"""Rows that are in memory at a time."""


def model_info(info: VectorInfo) -> ModelInfo:
    """Return the encoder that vectors of parts were made by.

    Raises:
        DataError: If they are vectors of queries.
    """
    if info.role != "document":
        raise DataError("The vectors are those of queries, which no index holds. Embed documents.")
    return ModelInfo(info.fingerprint, info.model, info.source, info.dimension, info.truncate_dim)


def records(table: pa.Table, vector_column: str = VECTOR_COLUMN) -> list[Record]:
    """Return the rows of a table as Chroma and an index store them: id, text, metadata, vector (dim,) float32.

    Args:
        table: Columns `id`, `text`, the vectors as lists of a fixed size, and metadata.
        vector_column: The column of the vectors.

    Raises:
        DataError: If a column is missing, or a row has no id or no vector.
    """
    missing = [name for name in ("id", "text", vector_column) if name not in table.column_names]
    if missing:
        raise DataError(f"The rows have no column {missing[0]}. They need id, text and {vector_column}.")
    if not hasattr(table.schema.field(vector_column).type, "list_size"):
        raise DataError(
            f"The column {vector_column} holds no lists of a fixed size. Cast it with pyarrow.list_(.., n)."
        )
    if table["id"].null_count or table[vector_column].null_count:
        raise DataError("A row has no id or no vector. Filter such rows out.")
    vectors = embedding_vectors(table, vector_column)
    metadata = row_metadata(table.drop_columns([vector_column]))
    texts = (text or "" for text in table["text"].to_pylist())
    ids = map(str, table["id"].to_pylist())
    return [Record(*row) for row in zip(ids, texts, metadata, vectors, strict=True)]


def fill_index(
    parts: VectorParts | Storage | str | os.PathLike[str],
    indexer: ChromaIndexer,
    *,
    rebuild: bool = False,
    progress: Callable[[int], None] | None = None,
    wait: float | None = 0.0,
) -> IndexReport:
    """Make an index folder equal to the live rows of a folder of parts: chunks, keyword index, documents, Chroma copy.

    It may be repeated at any time; only what differs is written.

    Args:
        parts: The folder, or its address.
        indexer: The index; see `ChromaIndexer.load_rows` for the other arguments.
        rebuild: Replace an index of another encoder, or of folders.
        progress: Called with the number of rows that were read so far.
        wait: Seconds to wait for another process that writes to the index; None without limit.

    Raises:
        DataError: If there are no parts, or they cannot be read.
        IndexMismatchError: If the index has vectors of another encoder.
        IndexStateError: If it holds files of folders, or cannot be read or written.
    """
    live = parts if isinstance(parts, VectorParts) else VectorParts(parts)
    settings = live.storage.read_json("settings.json", "vectors")
    sizes = {name: settings[name] for name in ("chunk_tokens", "chunk_overlap") if name in settings}
    return indexer.load_rows(
        _batches(live),
        model_info(live.info),
        parts=live.storage.address,
        settings=IndexSettings(**sizes),
        rebuild=rebuild,
        progress=progress,
        wait=wait,
    )


def fill_chroma(
    parts: VectorParts | Storage | str | os.PathLike[str],
    server: str | ChromaServer,
    collection: str,
    *,
    shards: int | None = None,
    headers: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> WriteCounts:
    """Make a collection on a Chroma server equal to the live rows of a folder of parts.

    It may be repeated at any time: rows that are there are not sent again, rows that are gone are deleted, and shards
    whose server was killed in a write are made again. The collection remembers the generation of the parts that it was
    filled from, so that the next call reads the later ones only.

    Args:
        parts: The folder, or its address.
        server: Address of the server (tenant and database from the environment), or a `ChromaServer`.
        collection: Name of the collection, or of its shards.
        shards: Number of shards; None for that of an existing collection, or 1.
        headers: Headers with credentials; None for those of the environment.
        progress: Called with the number of rows that were read so far.

    Returns:
        Counts of rows; see `ShardedCollection.sync`.

    Raises:
        DataError: If there are no parts, or they cannot be read.
        IndexMismatchError: If the collection has vectors of another encoder, or another number of shards.
        IndexStateError: If the name belongs to others.
        ChromaServerError: If the server cannot be reached, refuses, or fails again and again.
    """
    live = parts if isinstance(parts, VectorParts) else VectorParts(parts)

    def changes(version: str) -> tuple[Iterator[list[Record]], list[str]] | None:
        generation = int(version.partition(":")[0])
        if generation not in live.generations or version != _version(live, generation):
            return None  # of other parts, or of ones that were deleted and made again
        return _batches(live, since=generation), live.deleted(since=generation)

    with ShardedCollection(server, collection, headers=headers) as target:
        return target.sync(
            lambda: _batches(live),
            model_info(live.info),
            shards=shards,
            version=_version(live, live.generations[-1]),
            changes=changes,
            progress=progress,
        )


def _batches(parts: VectorParts, since: int = 0) -> Iterator[list[Record]]:
    return (records(table) for table in parts.tables(since=since, rows=ROWS))


def _version(parts: VectorParts, generation: int) -> str:
    """Return the generation and a hash of the record of its run, which no other run has."""
    run = parts.storage.read_bytes(f"runs/{generation:06d}.json")
    return f"{generation}:{hashlib.sha256(run).hexdigest()[:16]}"
