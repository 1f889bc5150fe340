"""Exact search over an index's own rows: what answers while Chroma's files may not be opened.

That is so while a run is writing, after one that died, and in a folder that cannot be written to. Every answer is of
one moment: SQLite shows a reader the last commit. The vectors are kept between queries and read again when rows have
changed; where that takes long, at most every tenth of the time is spent on it, and nothing that is gone is ever shown.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from epic_rag_chroma.records import Record, RecordStore

__all__ = ["ExactRows"]

_SHORT_SECONDS = 0.05
_SHARE = 10.0

Vector = npt.NDArray[np.float32]


class ExactRows:
    """The rows of a collection, searched by comparing with every one. Close it. Not for two threads at once.

    Args:
        index_dir: The index folder.
        collection: The collection's id.

    Raises:
        RecordsUnavailableError: If the rows are missing or cannot be read.
    """

    def __init__(self, index_dir: Path, collection: str) -> None:
        self._records = RecordStore.open_reading(index_dir, collection)
        self._version = -1
        self._read_at = 0.0
        self._cost = 0.0
        self._ids: list[str] = []
        self._matrix: Vector = np.zeros((0, 0), dtype=np.float32)

    def close(self) -> None:
        """Let go of the file."""
        self._records.close()

    @contextmanager
    def moment(self) -> Iterator[None]:
        """Everything that is asked inside is answered as of one moment."""
        with self._records.snapshot():
            yield

    def count(self) -> int:
        """Number of rows."""
        return self._records.count()

    def get(self, ids: Collection[str]) -> dict[str, Record]:
        """Rows by id; those that are not there are left out."""
        return self._records.get(ids)

    def scan(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All rows: id and metadata."""
        return self._records.scan()

    def version(self) -> int:
        """Another number whenever rows have changed."""
        return self._records.data_version()

    def nearest(self, vector: Vector, k: int, allowed: Collection[str] | None = None) -> list[tuple[str, float]]:
        """The rows nearest to a vector.

        Args:
            vector: (dim,) float32, of length one.
            k: The most rows.
            allowed: Ids of the only rows that may be found; None for all.

        Returns:
            (id, cosine), best first; equal ones in the order of their ids.
        """
        self._refresh(force=False)
        found = self._nearest(vector, k, allowed)
        if len(self._records.known([row_id for row_id, _ in found])) < len(found):
            # Some have gone since the vectors were read.
            self._refresh(force=True)
            found = self._nearest(vector, k, allowed)
        return found

    def _nearest(self, vector: Vector, k: int, allowed: Collection[str] | None) -> list[tuple[str, float]]:
        if not self._ids or k < 1:
            return []
        # Rounded, since equal rows of a matrix may differ in the last bit of their products.
        scores = np.round(self._matrix @ vector, 6)  # (rows,)
        if allowed is not None:
            known = frozenset(allowed)
            scores = np.where([row_id in known for row_id in self._ids], scores, -np.inf)
        # Ids are sorted, so a stable sort puts equal scores in their order.
        best = np.argsort(-scores, kind="stable")[:k]
        return [(self._ids[at], float(scores[at])) for at in best if np.isfinite(scores[at])]

    def _refresh(self, *, force: bool) -> None:
        version = self._records.data_version()
        now = time.monotonic()
        if not force and version == self._version:
            return
        if not force and self._cost > _SHORT_SECONDS and now - self._read_at < self._cost * _SHARE:
            return
        self._ids, self._matrix = self._records.matrix()
        self._version = version
        self._read_at = time.monotonic()
        self._cost = self._read_at - now
