"""A database of rows in memory that has a mirror in Chroma, and plain reads of that mirror."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import numpy.typing as npt

from epic_rag_chroma.store.collection import sync_collection
from epic_rag_chroma.store.database import Record
from epic_rag_chroma.store.server import Place
from epic_rag_chroma.store.state import MirrorState
from tests.helpers.servers import plain_client

Row = tuple[str, dict[str, Any], list[float]]
DIMENSION = 16


class MemoryDatabase:
    """Rows in memory, as far as a mirror needs them.

    Args:
        state_file: A file for the state of the mirror, which outlives the process; None to keep it in memory.
        page: Number of rows of a page.
    """

    def __init__(self, state_file: Path | None = None, page: int = 50) -> None:
        self.rows: dict[str, Record] = {}
        self.outbox: set[str] = set()
        self.page = page
        self._file = state_file
        self._state = MirrorState()
        if state_file is not None and state_file.exists():
            self._state = MirrorState(**json.loads(state_file.read_text()))

    def put(self, row: str, text: str | None = None, **metadata: Any) -> None:
        """Add a row, or change its metadata; the vector depends on id and text."""
        text = f"text of {row}" if text is None else text
        seed = [*f"{row} {text}".encode()]
        self.rows[row] = Record(row, text, {"doc_id": row.split("-")[0], **metadata}, unit_vector(seed))
        self.outbox.add(row)

    def remove(self, row: str) -> None:
        del self.rows[row]
        self.outbox.add(row)

    def count(self) -> int:
        return len(self.rows)

    def pages(self) -> Iterator[list[Record]]:
        rows = [self.rows[row] for row in sorted(self.rows)]
        for start in range(0, len(rows), self.page):
            yield rows[start : start + self.page]

    def get(self, ids: Collection[str]) -> dict[str, Record]:
        return {row: self.rows[row] for row in ids if row in self.rows}

    def unmirrored(self) -> list[str]:
        return sorted(self.outbox)

    def mirror(self) -> MirrorState:
        return self._state

    def begin_mirror(self, collection: str | None) -> None:
        self._save(MirrorState(collection, is_dirty=True))

    def end_mirror(self, collection: str | None) -> None:
        self._save(MirrorState(collection))
        self.outbox.clear()

    def _save(self, state: MirrorState) -> None:
        self._state = state
        if self._file is not None:
            beside = self._file.with_suffix(".next")
            beside.write_text(json.dumps(vars(state)))
            beside.replace(self._file)


def unit_vector(seed: int | list[int], dim: int = DIMENSION) -> npt.NDArray[np.float32]:
    vector = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def sync(database: MemoryDatabase, place: Place, fingerprint: str = "abc", **options: Any) -> str:
    """Bring the mirror up to date and return the id of its collection."""
    sync_collection(database, place, model="tiny", source="tiny", fingerprint=fingerprint, **options)
    state = database.mirror()
    assert state.collection is not None
    assert not state.is_dirty
    assert database.outbox == set()
    return state.collection


def mirrored_rows(place: Place) -> dict[str, Row]:
    """Read the mirror with chromadb's own client."""
    if isinstance(place, Path):
        client = chromadb.PersistentClient(str(place / "chroma"))
        try:
            return _rows(client.get_collection("epic_rag", embedding_function=None))
        finally:
            client.close()
    with plain_client(place.server.url) as client:
        return _rows(client.get_collection(f"epic_rag_{place.index_id}", embedding_function=None))


def _rows(collection: Any) -> dict[str, Row]:
    rows = collection.get(include=["documents", "metadatas", "embeddings"])
    found = {
        row: (text, dict(metadata), [float(value) for value in vector])
        for row, text, metadata, vector in zip(
            rows["ids"], rows["documents"], rows["metadatas"], rows["embeddings"], strict=True
        )
    }
    if found:
        vectors = [vector for _, _, vector in found.values()]
        nearest = collection.query(query_embeddings=vectors, n_results=1, include=["distances"])
        lost = [row for row, (distance,) in zip(found, nearest["distances"], strict=True) if not distance < 1e-4]
        assert lost == []  # by its own vector
    return found


def assert_mirrored(database: MemoryDatabase, place: Place, others: Collection[str] = ()) -> None:
    """Check that the mirror has the rows of the database, each found by its own vector, and others' rows."""
    found = mirrored_rows(place)
    assert set(found) == set(database.rows) | set(others)
    for row, record in database.rows.items():
        text, metadata, vector = found[row]
        assert (text, metadata) == (record.text, record.metadata)
        np.testing.assert_allclose(vector, record.vector, atol=1e-6)
