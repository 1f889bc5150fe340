"""An index that has lost some of its files rebuilds them from the others, mostly without the model."""

from __future__ import annotations

import os
import shutil
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromadb
import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer
from epic_rag_chroma.errors import IndexStateError
from tests.helpers.indexes import assert_same, run, start, texts_found, write

Rows = dict[str, tuple[str, dict[str, Any], list[float]]]
ReadRows = Callable[[Path], Rows]

# What is taken away, and what that costs: chunks that the model must read again.
LOST = {
    "manifest.json": 0,
    "broken manifest": 0,
    "rows of Chroma": 0,
    "records": 0,
    "broken records": 0,
    "rows of records": 2,
    "keywords": 0,
    "broken keywords": 0,
    "chroma": 0,
    "broken chroma": 0,
    "a folder for Chroma's database": 0,
    "graph": 0,
    "cut graph": 0,
    "a length in the graph's links": 0,
    "links of a terabyte": 0,
    "chroma and records": None,
}


@pytest.mark.parametrize("lost", LOST)
def test_lost_files_are_rebuilt(tmp_path: Path, tiny_encoder: EpicEncoder, rows: ReadRows, lost: str) -> None:
    folder = start(tmp_path / "docs")
    for number in range(130):  # enough for a graph on the disk
        write(folder, f"more/{number}.txt", f"word{number} alone\n")
    run(folder, tiny_encoder)
    index = folder / ".epic-rag"
    expected = rows(index)
    assert len(expected) > 100
    lose(index, lost, list(expected))
    everything = {(row[1]["path"], row[0]) for row in expected.values()}
    if lost not in ("rows of Chroma", "rows of records", "chroma and records"):
        assert texts_found(folder, tiny_encoder) == everything
    report = run(folder, tiny_encoder)
    assert_same(rows(index), expected)
    cost = LOST[lost]
    assert report.chunks_embedded == (
        len({row[1]["embedded_hash"] for row in expected.values()}) if cost is None else cost
    )
    assert texts_found(folder, tiny_encoder) == everything
    # Nothing of a collection that was made again is left to fill the disk.
    assert len([path for path in (index / "chroma").iterdir() if path.is_dir()]) == 1
    with ChromaIndexer(index, encoder=tiny_encoder) as indexer:
        assert indexer.query("word7", mode="keyword")[0].path == "more/7.txt"


def lose(index: Path, lost: str, ids: list[str]) -> None:
    records, keywords = (next(index.glob(f"{name}-*.sqlite")) for name in ("records", "keywords"))
    graph = next(index.glob("chroma/*/data_level0.bin"))
    match lost:
        case "manifest.json":
            (index / lost).unlink()
        case "broken manifest":
            (index / "manifest.json").write_text('{"version": 2, "files": [1]}')
        case "rows of Chroma":
            with chromadb.PersistentClient(str(index / "chroma")) as client:  # type: ignore[attr-defined]
                client.get_collection("epic_rag", embedding_function=None).delete(ids=ids[:2])
        case "records":
            records.unlink()
        case "broken records":
            records.write_bytes(os.urandom(5000))
        case "rows of records":
            with sqlite3.connect(records) as connection:
                connection.execute("DELETE FROM records WHERE number <= 2")
            connection.close()
        case "keywords":
            keywords.unlink()
        case "broken keywords":
            keywords.write_bytes(keywords.read_bytes()[:3000])
        case "chroma":
            shutil.rmtree(index / "chroma")
        case "broken chroma":
            (index / "chroma/chroma.sqlite3").write_bytes(os.urandom(5000))
        case "a folder for Chroma's database":
            (index / "chroma/chroma.sqlite3").unlink()
            (index / "chroma/chroma.sqlite3").mkdir()
        case "graph":
            shutil.rmtree(graph.parent)
        case "cut graph":
            graph.write_bytes(graph.read_bytes()[:1000])
        case "a length in the graph's links":
            # A whole number of lists, but of more levels than the graph has; the file is long enough for it.
            header, links = (graph.with_name(f"{name}.bin") for name in ("header", "link_lists"))
            (degree,) = struct.unpack_from("=Q", header.read_bytes(), 60)
            content, length = links.read_bytes(), (4 * degree + 4) * 16
            links.write_bytes(struct.pack("=I", length) + content[4:] + bytes(length))
        case "links of a terabyte":
            os.truncate(graph.with_name("link_lists.bin"), 2**40)
        case "chroma and records":
            shutil.rmtree(index / "chroma")
            records.unlink()


def test_rebuild_deletes_old_graphs(tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    folder = start(tmp_path / "docs")
    for number in range(130):
        write(folder, f"more/{number}.txt", f"word{number} alone\n")
    run(folder, tiny_encoder)
    chroma = folder / ".epic-rag/chroma"
    (before,) = (path for path in chroma.iterdir() if path.is_dir())
    with chromadb.PersistentClient(str(chroma)) as client:  # type: ignore[attr-defined]
        other = client.create_collection("somebodys", embedding_function=None)
        other.add(ids=[str(number) for number in range(1100)], embeddings=[[float(n), 1.0] for n in range(1100)])
    kept = [path for path in chroma.iterdir() if path.is_dir() and path != before]
    (chroma / "notes").mkdir()
    run(folder, tiny_encoder, rebuild=True)
    assert not before.exists()
    assert kept
    assert all(path.exists() for path in [*kept, chroma / "notes"])


class PanicException(BaseException):
    """Stand-in for the exception of Chroma's bindings for a Rust panic, which only Rust can create."""


def test_panic_of_chroma(
    tmp_path: Path, tiny_encoder: EpicEncoder, rows: ReadRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = start(tmp_path / "docs")
    run(folder, tiny_encoder)
    expected = rows(folder / ".epic-rag")
    everything = texts_found(folder, tiny_encoder)

    def panic(*arguments: object, **options: object) -> None:
        raise PanicException("no thread to be had")

    with monkeypatch.context() as patched:
        patched.setattr(chromadb, "PersistentClient", panic)
        with pytest.raises(IndexStateError, match=r"no thread to be had.*run `epic-rag index` again"):
            run(folder, tiny_encoder)
        assert texts_found(folder, tiny_encoder) == everything
    assert run(folder, tiny_encoder).chunks_embedded == 0
    assert_same(rows(folder / ".epic-rag"), expected)
