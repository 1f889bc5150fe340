"""Nearest neighbours: an exact scan of vectors mapped into memory against Chroma's graph.

    python benchmarks/vector_search.py --sizes 10000,30000,100000,300000 --output DIR

Synthetic unit vectors in clusters, as those of documents are. "First" is what a new process pays beside its imports:
open the index or the collection, and answer one query. The scan is also timed over a copy in float16, and its product
with BLAS instead of `vecdot`. The size from which on queries use Chroma
(`epic_rag_chroma.search.index_reader.CHROMA_FROM_CHUNKS`) rests on this table. Writes vector_search.json and
vector_search.md to DIR.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import run_main, say, write

from epic_rag.errors import ConfigError
from epic_rag.evaluation.report import markdown_table
from epic_rag_chroma.store.collection import open_collection, sync_collection
from epic_rag_chroma.store.database import IndexDatabase, Record
from epic_rag_chroma.store.paths import DATABASE_FILE, VECTORS_FILE
from epic_rag_chroma.store.vectors import VectorSearch, write_vectors

CLUSTERS = 500
SPREAD = 0.7
PAGE = 5000
NEAREST = 100
BLOCK = 4096


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--sizes", default="10000,30000,100000,300000", help="numbers of chunks")
    options.add_argument("--dim", type=int, default=384)
    options.add_argument("--queries", type=int, default=25, metavar="N")
    options.add_argument("--output", required=True, type=Path, metavar="DIR")
    return options


def unit(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def fill(database: IndexDatabase, count: int, dim: int, draw: np.random.Generator) -> np.ndarray[Any, Any]:
    """Store chunks with random vectors, and return the centres of their clusters (CLUSTERS, dim)."""
    centres = unit(draw.standard_normal((CLUSTERS, dim)))
    for start in range(0, count, PAGE):
        some = min(PAGE, count - start)
        noise = draw.standard_normal((some, dim)) * SPREAD / dim**0.5
        vectors = unit(centres[draw.integers(0, CLUSTERS, some)] + noise)
        with database.transaction():
            database.put([Record(f"{start + row:08}", "text", {"doc_id": "file"}, vectors[row]) for row in range(some)])
    return centres


def names(ranking: list[tuple[str, float]]) -> set[str]:
    return {name for name, _ in ranking}


def milliseconds(call: Callable[[int], object], count: int) -> float:
    """Return the median time of a call."""
    seconds = []
    for number in range(count):
        started = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds)) * 1e3


def scan_float16(rows: np.ndarray[Any, Any], query: np.ndarray[Any, Any]) -> None:
    """Find the nearest rows (n, dim) float16, which are converted block by block."""
    scores = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), BLOCK):
        scores[start : start + BLOCK] = np.vecdot(rows[start : start + BLOCK].astype(np.float32), query)
    np.argpartition(-scores, min(NEAREST, len(rows) - 1))


def measure_one(count: int, dim: int, number_of_queries: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    found: dict[str, Any] = {"chunks": count}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        database = IndexDatabase.open(folder / DATABASE_FILE)
        try:
            centres = fill(database, count, dim, draw)
            noise = draw.standard_normal((number_of_queries, dim)) * SPREAD / dim**0.5
            queries = unit(centres[draw.integers(0, CLUSTERS, number_of_queries)] + noise)
            write_vectors(database)
            found["file_mb"] = (folder / VECTORS_FILE).stat().st_size / 1e6
            started = time.perf_counter()
            scan = VectorSearch(database)
            scan.nearest(queries[0], NEAREST)
            found["scan_first"] = (time.perf_counter() - started) * 1e3
            found["scan"] = milliseconds(lambda row: scan.nearest(queries[row], NEAREST), number_of_queries)
            matrix = database.vectors_after(-1)[1]
            found["scan_blas"] = milliseconds(lambda row: matrix @ queries[row], number_of_queries)
            half = matrix.astype(np.float16)
            found["scan_float16"] = milliseconds(
                lambda row: scan_float16(half, queries[row]), min(5, number_of_queries)
            )
            started = time.perf_counter()
            sync_collection(database, folder, model="m", source="m", fingerprint="f", truncate_dim=None)
            found["fill_seconds"] = time.perf_counter() - started
            started = time.perf_counter()
            collection = open_collection(folder, str(database.mirror().collection))
            assert collection is not None
            try:
                collection.nearest(queries[0], NEAREST)
                found["chroma_first"] = (time.perf_counter() - started) * 1e3
                found["chroma"] = milliseconds(lambda row: collection.nearest(queries[row], NEAREST), number_of_queries)
                shared = [
                    len(
                        {each for each, _ in scan.nearest(query, 10)}
                        & {each for each, _ in collection.nearest(query, 10)}
                    )
                    for query in queries
                ]
                found["recall"] = float(np.mean(shared)) / 10
            finally:
                collection.close()
        finally:
            database.close()
    return found


def measure(options: argparse.Namespace) -> int:
    try:
        sizes = [int(size) for size in options.sizes.split(",")]
    except ValueError:
        raise ConfigError(f"--sizes is {options.sizes}. Give numbers separated by commas.") from None
    rows = []
    for size in sizes:
        say(f"{size:,} chunks")
        rows.append(measure_one(size, options.dim, options.queries))
    columns = {
        "scan": "scan, ms",
        "scan_first": "first",
        "scan_blas": "its product by BLAS",
        "scan_float16": "in float16",
        "chroma": "Chroma, ms",
        "chroma_first": "first",
        "recall": "its recall@10",
        "fill_seconds": "filling it, s",
        "file_mb": "vectors.bin, MB",
    }
    table = markdown_table(
        ["chunks", *columns.values()],
        [
            [f"{row['chunks']:,}", *(f"{row[name]:.{3 if name == 'recall' else 1}f}" for name in columns)]
            for row in rows
        ],
        text_columns=0,
    )
    head = f"{options.dim} dimensions, the {NEAREST} nearest, medians of {options.queries} queries."
    write(options.output, "vector_search", f"{head}\n\n{table}", [], torch.device("cpu"), rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
