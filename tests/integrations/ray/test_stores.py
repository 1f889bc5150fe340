"""Parts into an index folder and onto a Chroma server: incremental, idempotent, continued after a kill, guarded."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError, DataError
from epic_rag_chroma import ChromaIndexer, Record, ShardedCollection, WriteCounts
from epic_rag_chroma.errors import IndexMismatchError, IndexStateError
from epic_rag_chroma.store.database import IndexDatabase
from epic_rag_ray import PipelineSettings, VectorInfo, VectorParts, fill_chroma, fill_index, records, run_pipeline
from tests.helpers.indexes import FILES, Rows, assert_same, read_rows, write_tree
from tests.helpers.servers import ChromaProcess

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EPIC_RAG_")]:
        monkeypatch.delenv(name)


def embed(folder: Path, to: Path, model: Path) -> None:
    run_pipeline([folder], to, PipelineSettings(model=str(model), duplicates="keep"))


@pytest.fixture
def corpus(tmp_path: Path, tiny_checkpoint: Path) -> tuple[Path, Path]:
    """A folder of three files, and its parts."""
    folder = write_tree(tmp_path / "docs", dict(FILES))
    embed(folder, tmp_path / "parts", tiny_checkpoint)
    return folder, tmp_path / "parts"


def dump(index_dir: Path) -> dict[str, tuple[str, dict[str, Any], bytes]]:
    database = IndexDatabase.open_reading(index_dir / "index.sqlite")
    try:
        return {row.id: (row.text, row.metadata, row.vector.tobytes()) for page in database.pages() for row in page}
    finally:
        database.close()


def live(parts: Path) -> list[Record]:
    return [row for table in VectorParts(parts).tables() for row in records(table)]


def test_an_index_from_parts_answers_as_one_of_the_files(
    corpus: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    folder, parts = corpus
    with ChromaIndexer(tmp_path / "from-parts") as indexer:
        report = fill_index(parts, indexer)
        assert (report.added, report.changed, report.deleted, report.unchanged) == (3, 0, 0, 0)
        assert (report.chunks_embedded, report.chunks_total) == (0, report.chunks_reused)
        status = indexer.status()
        assert (status.parts, status.roots, status.state) == (str(parts), (), "complete")
        assert (status.files, status.chunks, status.chroma) == (3, report.chunks_total, None)
        assert status.kinds == {"code": 1, "markdown": 1, "text": 1}
        assert indexer.stale_files() == {}
        encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
        with ChromaIndexer(tmp_path / "from-files", encoder=encoder) as other:
            other.index([folder])
            for text in ("remove the package", "cats", "encode texts"):
                for mode in ("dense", "hybrid", "keyword"):
                    found, expected = indexer.query(text, mode=mode), other.query(text, mode=mode)
                    assert [(hit.path, hit.text) for hit in found] == [(hit.path, hit.text) for hit in expected] != []
                    np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in expected], atol=1e-5)
                    assert all(hit.stale is None and Path(hit.root) == folder for hit in found)
    # The copy for programs that read Chroma.
    expected_rows: Rows = {row.id: (row.text, row.metadata, row.vector.tolist()) for row in live(parts)}
    assert_same(read_rows(tmp_path / "from-parts"), expected_rows)


def test_only_what_differs_is_written(corpus: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder, parts = corpus
    index = tmp_path / "index"
    with ChromaIndexer(index, chroma="none") as indexer:
        fill_index(parts, indexer)
        database = IndexDatabase.open_reading(index / "index.sqlite")
        before = database.version()
        again = fill_index(parts, indexer)
        assert (again.unchanged, again.chunks_reused) == (3, 0)
        assert database.version() == before
        database.close()
        (folder / "notes.txt").write_text("Cats sleep most of the day.\nDogs do not.\n")
        (folder / "guide.md").unlink()
        (folder / "new.md").write_text("# New\n\nA new page.\n")
        embed(folder, parts, tiny_checkpoint)
        report = fill_index(parts, indexer)
        assert (report.added, report.changed, report.deleted, report.unchanged) == (1, 1, 1, 1)
        assert report.chunks_reused == 2
        assert set(indexer.paths()) == {"notes.txt", "new.md", "src/tool.py"}
        assert not indexer.query("installer", mode="keyword")
        assert indexer.query("dogs", mode="keyword")[0].path == "notes.txt"
    assert dump(index) == {row.id: (row.text, row.metadata, row.vector.tobytes()) for row in live(parts)}


def test_other_vectors_and_other_indexes_are_refused(
    corpus: tuple[Path, Path], tmp_path: Path, tiny_encoder: EpicEncoder, other_checkpoint: Path
) -> None:
    folder, parts = corpus
    embed(folder, tmp_path / "other-parts", other_checkpoint)
    index = tmp_path / "index"
    with ChromaIndexer(index, chroma="none") as indexer:
        fill_index(parts, indexer)
        before = dump(index)
        with pytest.raises(
            IndexMismatchError, match=r"was built with tiny .*, the vectors in .* are of .*--rebuild --from"
        ):
            fill_index(tmp_path / "other-parts", indexer)
        assert dump(index) == before
        with pytest.raises(IndexStateError, match=r"filled from the Parquet files in .*--from-parquet .*parts"):
            indexer.index([folder])
        assert dump(index) == before
        report = fill_index(tmp_path / "other-parts", indexer, rebuild=True)
        assert report.added == 3
        assert dump(index).keys() == before.keys()
        assert dump(index) != before
    with ChromaIndexer(tmp_path / "files", encoder=tiny_encoder, chroma="none") as indexer:
        indexer.index([folder])
        before = dump(tmp_path / "files")
        with pytest.raises(IndexStateError, match=r"holds files of folders, which Parquet files would replace\. Use"):
            fill_index(parts, indexer)
        assert dump(tmp_path / "files") == before
    with ChromaIndexer(tmp_path / "nothing") as indexer, pytest.raises(DataError, match="no vectors of a complete run"):
        fill_index(tmp_path / "empty", indexer)
    assert not (tmp_path / "nothing").exists()


def test_malformed_rows_are_refused() -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(4, np.float32)), 2)
    good = pa.table({"id": ["a", "b"], "text": ["x", None], "embedding": vectors, "page": [None, 3]})
    assert [(row.id, row.text, row.metadata) for row in records(good)] == [("a", "x", {}), ("b", "", {"page": 3})]
    with pytest.raises(DataError, match="no column text"):
        records(good.drop_columns(["text"]))
    with pytest.raises(DataError, match="no id or no vector"):
        records(good.set_column(0, "id", pa.array(["a", None])))
    with pytest.raises(DataError, match="no lists of a fixed size"):
        records(good.set_column(2, "embedding", pa.array([[1.0, 2.0], [1.0, 2.0]])))


def test_vectors_of_queries_and_of_a_wrong_length_are_refused(tmp_path: Path) -> None:
    from epic_rag_chroma import ModelInfo
    from epic_rag_ray.stores import model_info

    with pytest.raises(DataError, match="those of queries"):
        model_info(VectorInfo("f", "m", "m", 2, role="query"))
    with ChromaIndexer(tmp_path / "index", chroma="none") as indexer:
        for vector in (np.ones(3, np.float32), np.array([1, np.nan], np.float32)):
            row = Record("a", "x", {"path": "a"}, vector)
            with pytest.raises(ConfigError, match="Row a has no vector of 2 finite numbers"):
                indexer.load_rows([[row]], ModelInfo("f", "m", "m", 2), parts="x")


def test_a_killed_run_is_continued(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """Kill the process that fills an index, between two of its transactions; the next run completes it."""
    _, parts = corpus
    index = tmp_path / "index"
    code = (
        "import os, signal, sys\n"
        "from epic_rag_chroma import ChromaIndexer\n"
        "import epic_rag_ray.stores as stores\n"
        "stores.ROWS = 2\n"
        "def progress(done):\n"
        "    if done >= 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"stores.fill_index({str(parts)!r}, ChromaIndexer({str(index)!r}, chroma='none'), progress=progress)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    rows = {row.id: (row.text, row.metadata, row.vector.tobytes()) for row in live(parts)}
    with ChromaIndexer(index, chroma="none") as indexer:
        assert indexer.status().state == "interrupted"
        stored = dump(index)
        assert 0 < len(stored) < len(rows)
        assert fill_index(parts, indexer).chunks_reused == len(rows) - len(stored)
        assert indexer.status().state == "complete"
    assert dump(index) == rows


def test_a_server_from_parts(
    corpus: tuple[Path, Path], chroma: ChromaProcess, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder, parts = corpus
    rows = live(parts)
    progress: list[int] = []
    assert fill_chroma(parts, chroma.url, "docs", shards=2, progress=progress.append) == WriteCounts(written=len(rows))
    assert progress[-1] == len(rows)
    assert fill_chroma(parts, chroma.url, "docs") == WriteCounts(unchanged=len(rows))
    (folder / "guide.md").unlink()
    (folder / "new.md").write_text("# New\n\nA new page.\n")
    embed(folder, parts, tiny_checkpoint)
    progress.clear()
    gone = len(rows) + 1 - len(live(parts))
    counts = WriteCounts(written=1, unchanged=len(rows) - gone, deleted=gone)
    assert fill_chroma(parts, chroma.url, "docs", progress=progress.append) == counts
    assert progress == [1]  # of the new generation alone
    # Other parts at the same address are compared as a whole.
    shutil.rmtree(parts)
    embed(folder, parts, tiny_checkpoint)
    progress.clear()
    counts = fill_chroma(parts, chroma.url, "docs", progress=progress.append)
    assert counts == WriteCounts(unchanged=len(live(parts)))
    assert progress[-1] == len(live(parts))
    # Both load the model that the parts name.
    with ShardedCollection(chroma.url, "docs") as collection, ChromaIndexer(tmp_path / "index") as indexer:
        fill_index(parts, indexer)
        expected = indexer.query("encode texts", mode="dense", k=3)
        assert [hit.id for hit in collection.query("encode texts", k=3)] == [hit.id for hit in expected] != []


def test_waiting_is_bounded(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    from epic_rag_chroma.errors import IndexLockedError
    from epic_rag_chroma.store.lock import write_lock

    index = tmp_path / "index"
    index.mkdir()
    started = time.monotonic()
    with write_lock(index, wait=0.0), ChromaIndexer(index) as indexer, pytest.raises(IndexLockedError):
        fill_index(corpus[1], indexer, wait=0.2)
    assert time.monotonic() - started < 30
