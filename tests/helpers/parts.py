"""The rows of a folder of parts."""

from __future__ import annotations

import os
from typing import Any

from epic_rag_ray import VectorParts, embedding_vectors


def contents(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Return the live rows by id; an id that occurs twice is an error."""
    rows: dict[str, dict[str, Any]] = {}
    for table in VectorParts(folder).tables():
        for row, vector in zip(table.drop_columns(["embedding"]).to_pylist(), embedding_vectors(table), strict=True):
            assert row["id"] not in rows
            rows[row["id"]] = {**row, "embedding": vector}
    return rows
