"""Fill an index with rows that were embedded elsewhere: Parquet files of a cluster, for instance.

Rows are compared with those of the index by text, metadata and vector, so a run may be repeated at any time, and one
that was interrupted is continued. Rows that do not come leave the index at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from epic_rag.errors import ConfigError
from epic_rag_chroma.store.database import IndexDatabase, Record
from epic_rag_chroma.store.paths import DocumentKey
from epic_rag_chroma.store.state import FileEntry
from epic_rag_chroma.types import IndexReport, ModelInfo

__all__ = ["load_rows"]

# Rows of a transaction.
_BATCH = 2000


def load_rows(
    database: IndexDatabase, rows: Iterable[Sequence[Record]], info: ModelInfo, progress: Callable[[int], None]
) -> IndexReport:
    """Make an index equal to some rows.

    Args:
        database: The index.
        rows: All rows, in batches; of rows with the same id the last one counts.
        info: The encoder of their vectors.
        progress: Called with the number of rows that were read so far.

    Returns:
        Counts of documents and rows; `chunks_total` and `seconds` are 0.

    Raises:
        ConfigError: If a vector has another length than `info` says, or numbers that are not finite.
    """
    known = database.files()
    entries: dict[DocumentKey, FileEntry] = {}
    seen: list[npt.NDArray[np.int64]] = []
    read = stored = 0
    for batch in rows:
        for start in range(0, len(batch), _BATCH):
            part = {row.id: row for row in batch[start : start + _BATCH]}
            for row in part.values():
                if row.vector.shape != (info.dimension,) or not np.isfinite(row.vector).all():
                    raise ConfigError(
                        f"Row {row.id} has no vector of {info.dimension} finite numbers. Write the Parquet files again."
                    )
                key = str(row.metadata.get("root", "")), str(row.metadata.get("path", ""))
                chunks = 1 + (entries[key].chunks if key in entries else 0)
                entries[key] = FileEntry(str(row.metadata.get("content_hash", "")), chunks)
            there = database.get(part)
            kept = {
                row_id
                for row_id, row in there.items()
                if row.text == part[row_id].text and np.array_equal(row.vector, part[row_id].vector)
            }
            changed = [row_id for row_id in kept if there[row_id].metadata != part[row_id].metadata]
            new = [row for row_id, row in part.items() if row_id not in kept]
            if new or changed:
                with database.transaction():
                    database.update_metadata(changed, [part[row_id].metadata for row_id in changed])
                    database.put(new)
            stored += len(new) + len(changed)
            seen.append(np.asarray(database.numbers_of(part), dtype=np.int64))
            read += len(part)
            progress(read)
    gone = np.setdiff1d(database.numbers(), np.concatenate(seen) if seen else np.zeros(0, np.int64))
    for start in range(0, len(gone), _BATCH):
        with database.transaction():
            database.delete(list(database.ids(gone[start : start + _BATCH].tolist()).values()))
    _put_files(database, known, entries)
    changed_files = sum(key in known and known[key].digest != entry.digest for key, entry in entries.items())
    added = len(entries.keys() - known.keys())
    return IndexReport(
        added=added,
        changed=changed_files,
        deleted=len(known.keys() - entries.keys()),
        unchanged=len(entries) - added - changed_files,
        skipped=(),
        chunks_embedded=0,
        chunks_total=0,
        seconds=0.0,
        chunks_reused=stored,
    )


def _put_files(
    database: IndexDatabase, known: dict[DocumentKey, FileEntry], entries: dict[DocumentKey, FileEntry]
) -> None:
    """Store the entries of documents that differ, without times: they may be on another machine."""
    changed = [key for key, entry in entries.items() if known.get(key) != entry]
    gone = list(known.keys() - entries.keys())
    for start in range(0, len(changed), _BATCH):
        with database.transaction():
            for key in changed[start : start + _BATCH]:
                database.put_file(key, entries[key])
    if gone:
        with database.transaction():
            database.delete_files(gone)
