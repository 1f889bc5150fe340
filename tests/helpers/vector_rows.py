"""Rows with random unit vectors, as a pipeline hands them to a database."""

from __future__ import annotations

from typing import Any

import numpy as np

from epic_rag_chroma import ModelInfo, Record

DIM = 32
INFO = ModelInfo("f1", "tiny", "", DIM)
KINDS = ("markdown", "code", "pdf")


def unit(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def make_rows(count: int, *, seed: int = 0, dim: int = DIM, first: int = 0) -> list[Record]:
    """Rows "id-0", "id-1", ...; the same number gives the same row."""
    rows = []
    for number in range(first, first + count):
        draw = np.random.default_rng((seed, number))
        metadata: dict[str, Any] = {
            "path": f"docs/{number % 7}.md",
            "root": "/corpus",
            "doc_id": f"doc-{number % 7}",
            "position": 1 + number // 7,
            "kind": KINDS[number % 3],
            "first_line": number,
        }
        if number % 2:
            metadata["page"] = number % 5
        rows.append(Record(f"id-{number}", f"text {number}", metadata, unit(draw.standard_normal(dim))))
    return rows


def exact(rows: list[Record], vector: np.ndarray[Any, Any], k: int) -> list[tuple[str, float]]:
    """Brute force: id and cosine of the k nearest rows."""
    scores = [(row.id, round(float(row.vector @ vector), 6)) for row in rows]
    return sorted(scores, key=lambda each: (-each[1], each[0]))[:k]


def assert_nearest(found: list[tuple[str, float]], expected: list[tuple[str, float]]) -> None:
    assert [row for row, _ in found] == [row for row, _ in expected]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], atol=2e-5)


def assert_stored(stored: dict[str, Record], rows: list[Record]) -> None:
    """The same ids, texts, metadata and vectors."""
    assert {row_id: (row.text, row.metadata) for row_id, row in stored.items()} == {
        row.id: (row.text, row.metadata) for row in rows
    }
    for row in rows:
        np.testing.assert_allclose(stored[row.id].vector, row.vector, atol=1e-5)
