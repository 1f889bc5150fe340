"""Rows in Chroma: metadata that it accepts, requests of a size that it and proxies accept, settings of its graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from epic_rag_chroma.errors import ChromaServerError

if TYPE_CHECKING:
    from epic_rag_chroma.store.database import Record

__all__ = ["HNSW", "METADATA_BYTES", "OWNER", "RequestSplitter", "row_bytes", "storable"]

OWNER = "epic-rag"
"""Value of `owner` in the metadata of our collections, and of a row that has no metadata."""
HNSW: Mapping[str, Any] = {
    "space": "cosine",
    "max_neighbors": 32,
    "ef_construction": 200,
    "ef_search": 400,
    "batch_size": 100,
    "sync_threshold": 100,
}
METADATA_BYTES = 1000
"""Bytes of a row's metadata in a request, about."""
# Chroma accepts 40 MiB, proxies often less; see `RequestSplitter`.
_REQUEST_BYTES = 8 * 2**20


class RequestSplitter:
    """Sends rows in requests that are not too large for Chroma and for proxies.

    Args:
        max_rows: Most rows of a request.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._max_bytes = _REQUEST_BYTES

    def send(
        self, records: Sequence[Record], size: Callable[[Record], int], send: Callable[[Sequence[Record]], None]
    ) -> None:
        """Call `send` with one part of the rows after the other; a part that is refused as too large is halved.

        Args:
            records: The rows.
            size: Returns the bytes that a row takes in a request.
            send: Sends some rows.

        Raises:
            ChromaServerError: If a request fails.
        """
        start = 0
        while start < len(records):
            end, total = start, 0
            while end < len(records) and end - start < self._max_rows and (end == start or total < self._max_bytes):
                total += size(records[end])
                end += 1
            try:
                send(records[start:end])
            except ChromaServerError as error:
                if error.status != 413 or end - start == 1:
                    raise
                self._max_bytes = total // 2
                continue
            start = end


def row_bytes(row: Record) -> int:
    """Return the bytes that a row takes in a request, about."""
    # A byte of a vector takes 4/3 bytes in base64 (if the server supports it) or about 5 as digits.
    return 5 * row.vector.nbytes + 2 * len(row.text) + METADATA_BYTES


def storable(metadata: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Return metadata without what Chroma refuses: None, numbers that are none, and an empty mapping."""
    kept = {
        key: value
        for key, value in metadata.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }
    return kept or {"owner": OWNER}
