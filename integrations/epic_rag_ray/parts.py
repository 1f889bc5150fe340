"""Vectors in Parquet files, the parts: what the pipeline writes, and what indexes and Chroma are filled from.

A folder of parts, on any file system (`Storage`), grows by generations, one for each complete run:

    settings.json                     model, fingerprint, chunk sizes
    chunks/000001-000000.parquet      generation 1: passages as they were read, without vectors
    parts/000001-000000.parquet       the same passages with vectors, without duplicates
    parts/000002-000000.parquet       generation 2: new and changed passages only
    deleted/000002.parquet            ids that generation 2 deletes or replaces in the parts before it
    duplicates/000002.parquet         passages without a part of their own: id, kept id, kind
    documents/000002.parquet          every document after generation 2: address, stamp, digest, reason if it failed
    runs/000002.json                  counts of generation 2; written last, so the generation is complete
    progress.json                     the run that is or was at work

Files never change, and a part that exists is never computed again. `VectorParts` reads the rows that are live.

**Columns of a part** (`part_schema`): `id` (32 hex digits; the same for the same text in the same document), `text`
(what is shown; Chroma's document), `embedding` (fixed-size list of float32 or float16 unit vectors), and the metadata
of an index's chunks, under the same names: `path`, `root`, `doc_id`, `content_hash`, `chunks`, `position`,
`heading_path`, `first_line`, `last_line`, `page`, `kind`, `lang`, `embedded_hash`, `front_matter`, `words`. Columns of
other names are metadata as well, except `row_hash`, a hash of the metadata that finds changed rows. A null is a key
that the row lacks (`row_metadata`).

**Schema metadata**: under the key `epic_rag` the JSON of a `VectorInfo`: fingerprint, model, dimension, dtype, role.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from epic_rag.errors import DataError
from epic_rag_ray.storage import Storage

__all__ = [
    "DATA_COLUMNS",
    "VECTOR_COLUMN",
    "VectorDtype",
    "VectorInfo",
    "VectorParts",
    "embedding_column",
    "embedding_vectors",
    "part_name",
    "part_schema",
    "row_metadata",
]

VectorDtype = Literal["float32", "float16"]
VECTOR_COLUMN = "embedding"
DATA_COLUMNS = ("id", "text", VECTOR_COLUMN, "row_hash")
"""The columns of a part that are no metadata."""
FORMAT = 1
_METADATA_KEY = b"epic_rag"
CHUNK_FIELDS: tuple[tuple[str, pa.DataType], ...] = (
    ("id", pa.string()),
    ("text", pa.large_string()),
    ("path", pa.string()),
    ("root", pa.string()),
    ("doc_id", pa.string()),
    ("content_hash", pa.string()),
    ("chunks", pa.int32()),
    ("position", pa.int32()),
    ("heading_path", pa.string()),
    ("first_line", pa.int32()),
    ("last_line", pa.int32()),
    ("page", pa.int32()),
    ("kind", pa.string()),
    ("lang", pa.string()),
    ("embedded_hash", pa.string()),
    ("front_matter", pa.string()),
    ("words", pa.large_string()),
    ("row_hash", pa.uint64()),
)
"""The columns of a passage, as the pipeline reads it; those of the metadata are named as in an index."""


@dataclass(frozen=True)
class VectorInfo:
    """Origin and format of the vectors of a file.

    Args:
        fingerprint: Fingerprint of the encoder; vectors of different ones cannot be compared.
        model: The model's display name.
        source: Name or folder that the model is loaded from.
        dimension: Length of a vector.
        dtype: Number format of the stored vectors.
        role: "document" or "query".
        truncate_dim: Dimension that vectors were truncated to; None for all of them.
    """

    fingerprint: str
    model: str
    source: str
    dimension: int
    dtype: VectorDtype = "float32"
    role: Literal["document", "query"] = "document"
    truncate_dim: int | None = None

    def add_to(self, schema: pa.Schema) -> pa.Schema:
        """Return a schema with this in its metadata."""
        facts = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True).encode()
        return schema.with_metadata({**(schema.metadata or {}), _METADATA_KEY: facts})

    @classmethod
    def of(cls, schema: pa.Schema, name: str = "The table") -> VectorInfo:
        """Read it from the metadata of a schema.

        Args:
            schema: The schema of a part, or of a table of `EpicBatchEncoder`.
            name: The file, for messages.

        Raises:
            DataError: If it is not there, or of a newer version.
        """
        stored = (schema.metadata or {}).get(_METADATA_KEY)
        if stored is None:
            raise DataError(f"{name} does not state the model of its vectors. Write it with `epic-rag index --to`.")
        facts = json.loads(stored)
        if facts.pop("format", FORMAT) > FORMAT:
            raise DataError(f"{name} was written by a newer version of epic-rag. Upgrade epic-rag.")
        return cls(**facts)


def part_schema(info: VectorInfo) -> pa.Schema:
    """Return the schema of a part: the columns of a passage, and the vectors."""
    value = pa.float16() if info.dtype == "float16" else pa.float32()
    vectors = pa.field(VECTOR_COLUMN, pa.list_(value, info.dimension))
    return info.add_to(pa.schema([*(pa.field(name, kind) for name, kind in CHUNK_FIELDS), vectors]))


def part_name(generation: int, number: int, folder: str = "parts") -> str:
    """Return the name of a part."""
    return f"{folder}/{generation:06d}-{number:06d}.parquet"


def embedding_column(vectors: npt.NDArray[np.float32], dtype: VectorDtype) -> pa.FixedSizeListArray:
    """Return vectors (n, dim) as a column of fixed-size lists."""
    values = np.ascontiguousarray(vectors, np.float16 if dtype == "float16" else np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def embedding_vectors(table: pa.Table, column: str = VECTOR_COLUMN) -> npt.NDArray[np.float32]:
    """Return the vectors of a table, (n, dim) float32."""
    lists = table[column].combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # combine_chunks returns one for a table without rows
        lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], table.schema.field(column).type)
    # flatten respects the offset of a slice, and values does not.
    values = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), np.float32)
    return values.reshape(len(lists), table.schema.field(column).type.list_size)


def row_metadata(table: pa.Table) -> list[dict[str, Any]]:
    """Return the metadata of each row: all columns but `DATA_COLUMNS`, without nulls."""
    rows = table.drop_columns([name for name in DATA_COLUMNS if name in table.column_names]).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


class VectorParts:
    """The live rows of a folder of parts. Only complete generations are read.

    Args:
        storage: The folder, or its address.

    Raises:
        DataError: If there are no parts of a complete run, or they cannot be read.
    """

    def __init__(self, storage: Storage | str | os.PathLike[str]) -> None:
        self.storage = storage if isinstance(storage, Storage) else Storage(storage)
        self.generations = [_generation(name) for name in self.storage.list("runs", ".json")]
        if not self.generations:
            raise DataError(
                f"{self.storage.address} has no vectors of a complete run. Run `epic-rag index --to` with it first."
            )

    @cached_property
    def info(self) -> VectorInfo:
        """Origin and format of the vectors."""
        settings = self.storage.read_json("settings.json", "vectors")
        return VectorInfo(**settings["vectors"])

    def files(self, *, since: int = 0) -> list[str]:
        """Return the names of the parts of the generations after `since`."""
        wanted = {generation for generation in self.generations if generation > since}
        return [name for name in self.storage.list("parts", ".parquet") if _generation(name) in wanted]

    def tables(self, columns: Sequence[str] | None = None, *, since: int = 0, rows: int = 4096) -> Iterator[pa.Table]:
        """Yield the live rows of the generations after `since`.

        Args:
            columns: The columns to read; None for all.
            since: A generation; 0 for all rows.
            rows: Most rows of a table.

        Raises:
            DataError: If a part cannot be read.
        """
        for name in self.files(since=since):
            yield from self.part_tables(name, columns, rows=rows)

    def part_tables(self, name: str, columns: Sequence[str] | None = None, *, rows: int = 4096) -> Iterator[pa.Table]:
        """Yield the live rows of one part, so that actors can share the parts; see `tables`."""
        wanted = None if columns is None else list(dict.fromkeys([*columns, "id"]))
        for table in self.storage.read_batches(name, rows, wanted):
            table = table.filter(pa.array(self.live_mask(name, table["id"])))
            if table.num_rows:
                yield table if columns is None else table.select([c for c in columns if c in table.column_names])

    def live_mask(self, name: str, ids: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """Return which ids of a part are live: no later generation deletes or replaces them."""
        mask = np.ones(len(ids), bool)
        for generation, deleted in self._deleted.items():
            if generation > _generation(name):
                mask &= ~pc.is_in(ids, value_set=deleted).to_numpy()
        return mask

    def deleted(self, *, since: int = 0) -> list[str]:
        """Return the ids that generations after `since` have deleted and that are not live, sorted."""
        gone = {str(id_) for generation, ids in self._deleted.items() if generation > since for id_ in ids.to_pylist()}
        if gone:
            for table in self.tables(["id"], since=since):
                gone.difference_update(table["id"].to_pylist())
        return sorted(gone)

    def count(self) -> int:
        """Return the number of live rows."""
        return sum(table.num_rows for table in self.tables(["id"], rows=65536))

    @cached_property
    def _deleted(self) -> Mapping[int, pa.Array]:
        """The ids that each generation deletes or replaces in the parts before it."""
        known = set(self.generations)
        names = [name for name in self.storage.list("deleted", ".parquet") if _generation(name) in known]
        tables = {_generation(name): self.storage.read_table(name, ["id"]) for name in names}
        return {
            generation: pa.concat_arrays(table["id"].chunks) for generation, table in tables.items() if table.num_rows
        }


def _generation(name: str) -> int:
    """Return the generation of a file of a folder of parts, which its name begins with."""
    return int(name.rpartition("/")[2][:6])
