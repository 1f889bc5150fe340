"""The two kinds of tasks of the pipeline: reading sources into `chunks/`, and embedding rows into `parts/`.

Each task writes one file under a name that depends on the task alone, and does nothing if the file is there: a task
that runs twice, or again after a kill, changes nothing. The batch of rows that a killed actor was embedding is all
that is computed again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from epic_rag_chroma import ChunkRecord, IndexSettings
from epic_rag_ray.chunks import CHUNK_SCHEMA, FileChunker, Outcome, chunk_table
from epic_rag_ray.encoder import EpicBatchEncoder
from epic_rag_ray.parts import VECTOR_COLUMN, VectorDtype, embedding_column, embedding_vectors, part_name, part_schema
from epic_rag_ray.sources import SourceFile, is_archive

if TYPE_CHECKING:
    import os

    from epic_rag import EpicEncoder
    from epic_rag_ray.engine import Task
    from epic_rag_ray.storage import Storage

__all__ = ["OUTCOME_SCHEMA", "UNCHANGED", "ChunkWriter", "PartWriter"]

UNCHANGED = "unchanged"
"""Digest of an outcome whose source has the content of the previous run."""
OUTCOME_SCHEMA = pa.schema(
    [
        pa.field("source", pa.int32()),
        pa.field("path", pa.string()),
        pa.field("digest", pa.string()),
        pa.field("chunks", pa.int32()),
        pa.field("reason", pa.string()),
        pa.field("keep", pa.bool_()),
    ]
)
_ROWS_AT_ONCE = 2048


class ChunkWriter:
    """Reads the sources of a task, and writes their passages and the outcome of each.

    Args:
        storage: The folder of the run.
        model: See `FileChunker`.
        settings: See `FileChunker`.
        near_duplicates: See `FileChunker`.
        dtype: See `FileChunker`.
    """

    def __init__(
        self,
        storage: Storage,
        model: str | os.PathLike[str] | Callable[[], EpicEncoder] | None,
        settings: IndexSettings,
        *,
        near_duplicates: bool,
        dtype: str | None,
    ) -> None:
        self._storage = storage
        self._near_duplicates = near_duplicates
        self._chunker = FileChunker(model, settings=settings, dtype=dtype)

    def __call__(self, task: Task) -> Task:
        """Run a task: "generation", "number", "sources" (fields of `SourceFile`) and "digests" of the last run."""
        started = time.monotonic()
        name = part_name(task["generation"], task["number"], "read")
        outcomes: list[tuple[int, Outcome]] = []
        if not self._storage.exists(name):
            chunks = part_name(task["generation"], task["number"], "chunks")
            self._storage.write_tables(chunks, self._tables(task, outcomes), CHUNK_SCHEMA)
            columns: dict[str, list[Any]] = {
                "source": [number for number, _ in outcomes],
                **{
                    field: [getattr(outcome, field) for _, outcome in outcomes]
                    for field in OUTCOME_SCHEMA.names
                    if field != "source"
                },
            }
            # Written last: the task is done.
            self._storage.write_tables(name, [pa.table(columns, schema=OUTCOME_SCHEMA)], OUTCOME_SCHEMA)
        return {
            "done": len(task["sources"]),
            "failures": dict(Counter(_kind_of_reason(each.reason) for _, each in outcomes if each.reason)),
            "seconds": time.monotonic() - started,
        }

    def close(self) -> None:
        """End the process that reads damaged and hostile files."""
        self._chunker.close()

    def _tables(self, task: Task, outcomes: list[tuple[int, Outcome]]) -> Iterator[pa.Table]:
        records: list[ChunkRecord] = []
        numbers: list[int] = []

        def table() -> pa.Table:
            made = chunk_table(records, numbers, near_duplicates=self._near_duplicates)
            records.clear()
            numbers.clear()
            return made

        for number, (fields, digest) in enumerate(zip(task["sources"], task["digests"], strict=True)):
            source = SourceFile(**fields)
            items: Iterator[ChunkRecord | Outcome] = self._chunker.read(source)
            if not is_archive(source.path):
                listed = list(items)
                outcome = listed[-1]
                if isinstance(outcome, Outcome) and digest and outcome.digest == digest and not outcome.reason:
                    listed = [Outcome("", UNCHANGED, 0)]
                items = iter(listed)
            for item in items:
                if isinstance(item, Outcome):
                    outcomes.append((number, item))
                    continue
                records.append(item)
                numbers.append(number)
                if len(records) >= _ROWS_AT_ONCE:
                    yield table()
        yield table()


class PartWriter:
    """Embeds the rows of a task and writes them as a part.

    Args:
        storage: The folder of the run.
        model: See `EpicBatchEncoder`.
        vectors: Number format of the vectors.
        dtype: See `EpicBatchEncoder`.
        device: See `EpicBatchEncoder`.
    """

    def __init__(
        self,
        storage: Storage,
        model: str | os.PathLike[str] | Callable[[], EpicEncoder] | None,
        *,
        vectors: VectorDtype,
        dtype: str | None,
        device: str | None,
    ) -> None:
        self._storage = storage
        self._encoder = EpicBatchEncoder(model, vectors=vectors, dtype=dtype, device=device)
        self._schema = part_schema(self._encoder.info)

    def __call__(self, task: Task) -> Task:
        """Run a task.

        Its entries are "generation" and "number"; "files", "file" and "row" of the rows to write; "parts", "part" and
        "part_row" of rows that have the vector already, -1 for those to embed; and their "tokens".
        """
        name = part_name(task["generation"], task["number"])
        count = len(task["row"])
        if self._storage.exists(name):
            return {"done": count, "embedded": 0, "copied": 0, "tokens": 0, "seconds": 0.0, "failures": {}, "lost": []}
        started = time.monotonic()
        table = self._rows(task)
        vectors = np.zeros((count, self._encoder.info.dimension), np.float32)
        is_copy = task["part"] >= 0
        for number in np.unique(task["part"][is_copy]):
            rows = np.flatnonzero(task["part"] == number)
            stored = self._storage.read_rows(task["parts"][number], task["part_row"][rows], [VECTOR_COLUMN])
            vectors[rows] = embedding_vectors(stored)
        to_embed = np.flatnonzero(~is_copy)
        if len(to_embed):
            texts = pc.coalesce(table["embedded"], table["text"]).take(pa.array(to_embed)).to_pylist()
            vectors[to_embed] = self._encoder.embed(texts)
        finite: npt.NDArray[np.bool_] = np.isfinite(vectors).all(axis=1, keepdims=False).reshape(-1)
        lost = table.filter(pa.array(~finite))["path"].to_pylist()
        table = table.select([name for name in self._schema.names if name != VECTOR_COLUMN])
        table = table.append_column(VECTOR_COLUMN, embedding_column(vectors, self._encoder.info.dtype))
        self._storage.write_tables(name, [table.filter(pa.array(finite))], self._schema)
        return {
            "done": count,
            "embedded": len(to_embed),
            "copied": int(is_copy.sum()),
            "tokens": int(task["tokens"][to_embed].sum()),
            "seconds": time.monotonic() - started,
            "failures": {"no finite vector": len(lost)} if lost else {},
            "lost": lost,
        }

    def close(self) -> None:
        """Do nothing: there is only the model."""

    def _rows(self, task: Task) -> pa.Table:
        """Return the rows of a task in its order, which is that of the files."""
        columns = [*(name for name in self._schema.names if name != VECTOR_COLUMN), "embedded"]
        tables = []
        for number in np.unique(task["file"]):
            rows = task["row"][task["file"] == number]
            tables.append(self._storage.read_rows(task["files"][number], rows, columns))
        return pa.concat_tables(tables).combine_chunks()


def _kind_of_reason(reason: str) -> str:
    """Return what reasons of many files have in common: the text before numbers and details."""
    return reason.partition(":")[0].partition(" (")[0] if not reason.startswith("line ") else "a bad line"
