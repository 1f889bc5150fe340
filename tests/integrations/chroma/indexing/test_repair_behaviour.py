"""An index that has lost its copies makes them again from the database, without the model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import chromadb
import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer
from epic_rag_chroma.store.paths import CHROMA_FOLDER, DATABASE_FILE, VECTORS_FILE
from tests.helpers.indexes import Rows, assert_same, run, start, texts_found, write

MANY = 130  # enough for a graph on the disk


def lose_rows_of_chroma(index: Path) -> None:
    with chromadb.PersistentClient(str(index / CHROMA_FOLDER)) as client:  # type: ignore[attr-defined]
        collection = client.get_collection("epic_rag", embedding_function=None)
        collection.delete(ids=collection.get(limit=2, include=[])["ids"])


LOST: dict[str, Callable[[Path], object]] = {
    "vectors": lambda index: (index / VECTORS_FILE).unlink(),
    "half of the vectors": lambda index: os.truncate(index / VECTORS_FILE, 5000),
    "chroma": lambda index: shutil.rmtree(index / CHROMA_FOLDER),
    "half of chroma": lambda index: os.truncate(index / CHROMA_FOLDER / "chroma.sqlite3", 5000),
    "rows of chroma": lose_rows_of_chroma,
    "the graph": lambda index: shutil.rmtree(next(index.glob("chroma/*/data_level0.bin")).parent),
}


@pytest.mark.parametrize("lost", LOST)
def test_lost_copies(tmp_path: Path, tiny_encoder: EpicEncoder, rows: Callable[[Path], Rows], lost: str) -> None:
    folder = start(tmp_path / "docs")
    for number in range(MANY):
        write(folder, f"more/{number}.txt", f"word{number} alone\n")
    run(folder, tiny_encoder)
    index = folder / ".epic-rag"
    expected, everything = rows(index), texts_found(folder, tiny_encoder)
    LOST[lost](index)
    assert texts_found(folder, tiny_encoder) == everything
    report = run(folder, tiny_encoder)
    assert (report.added, report.changed, report.chunks_embedded) == (0, 0, 0)
    assert texts_found(folder, tiny_encoder) == everything
    # Rows that somebody deletes from the collection come back with the next change.
    write(folder, "more/0.txt", "word0 alone, changed\n")
    run(folder, tiny_encoder)
    now = rows(index)
    assert len(now) == len(expected)
    assert_same({row: now[row] for row in now.keys() & expected.keys()}, {row: expected[row] for row in now if row in expected})  # fmt: skip
    with ChromaIndexer(index, encoder=tiny_encoder) as indexer:
        assert indexer.query("word7", mode="keyword")[0].path == "more/7.txt"


@pytest.mark.parametrize("has_chroma", [True, False])
def test_lost_database(
    tmp_path: Path, tiny_encoder: EpicEncoder, rows: Callable[[Path], Rows], has_chroma: bool
) -> None:
    folder = start(tmp_path / "docs")
    run(folder, tiny_encoder)
    index = folder / ".epic-rag"
    expected, everything = rows(index), texts_found(folder, tiny_encoder)
    for path in index.glob(f"{DATABASE_FILE}*"):
        path.unlink()
    if not has_chroma:
        shutil.rmtree(index / CHROMA_FOLDER)
    assert run(folder, tiny_encoder).chunks_embedded == len({row[1]["embedded_hash"] for row in expected.values()})
    assert_same(rows(index), expected)
    assert texts_found(folder, tiny_encoder) == everything


def test_rebuild_leaves_one_graph(tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    folder = start(tmp_path / "docs")
    for number in range(MANY):
        write(folder, f"more/{number}.txt", f"word{number} alone\n")
    run(folder, tiny_encoder)
    chroma = folder / ".epic-rag" / CHROMA_FOLDER
    before = [path for path in chroma.iterdir() if path.is_dir()]
    run(folder, tiny_encoder, rebuild=True)
    after = [path for path in chroma.iterdir() if path.is_dir()]
    assert (len(before), len(after)) == (1, 1)
