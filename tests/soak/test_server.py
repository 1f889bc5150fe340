"""An index on a Chroma server, with the server and the indexer killed at random moments.

EPIC_RAG_SOAK=1 kills 60 and 20 times; the default is once each.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag_chroma import ChromaIndexer, ChromaServerError, IndexSettings
from epic_rag_chroma.store.collection import ChunkStore
from epic_rag_chroma.store.state import IndexState
from tests.helpers.changing_folder import ChangingFolder
from tests.helpers.fork_server import ForkServer, HashEncoder
from tests.helpers.indexes import Rows, read_rows
from tests.helpers.servers import ChromaProcess, plain_client
from tests.helpers.soak import SEED, SOAK, report

SERVER_KILLS = 60 if SOAK else 1
INDEXER_KILLS = 20 if SOAK else 1
FILES = 40 if SOAK else 20
MOST_REQUESTS = 40 if SOAK else 8
SECONDS_AWAY = 1.0 if SOAK else 0.3
SETTINGS = IndexSettings(chunk_tokens=30, chunk_overlap=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path_factory.mktemp("server")) as started:
        yield started


def count_collections(server: ChromaProcess) -> int:
    with plain_client(server.url) as client:
        return client.count_collections()


def rows_on_server(index_dir: Path, url: str) -> Rows:
    """Read an index's rows from the server with chromadb's own client."""
    state = IndexState.load(index_dir)
    assert state is not None
    with plain_client(url) as client:
        (collection,) = [each for each in client.list_collections() if str(each.id) == state.collection]
        rows = collection.get(include=["documents", "metadatas", "embeddings"])
    return {
        row: (text, dict(metadata), [float(value) for value in vector])
        for row, text, metadata, vector in zip(
            rows["ids"], rows["documents"], rows["metadatas"], rows["embeddings"], strict=True
        )
    }


def clean_rows(forks: ForkServer, folder: Path, place: Path) -> Rows:
    """Return the rows of a clean index of a copy of the folder."""
    copy = Path(shutil.copytree(folder, place / "clean", ignore=shutil.ignore_patterns(".epic-rag")))
    forks.run("index", copy)
    rows = read_rows(copy / ".epic-rag")
    shutil.rmtree(copy)
    return rows


def check(folder: Path, url: str, expected: Rows) -> None:
    """Check that the rows are those of a clean index, and that nearest neighbours have exact cosines."""
    found = rows_on_server(folder / ".epic-rag", url)
    assert {row: value[:2] for row, value in found.items()} == {row: value[:2] for row, value in expected.items()}
    vectors = {row: np.asarray(vector) for row, (_, _, vector) in found.items()}
    for row, vector in vectors.items():
        np.testing.assert_allclose(vector, expected[row][2], atol=1e-5)
    state = IndexState.load(folder / ".epic-rag")
    assert state is not None
    store = ChunkStore.open(state.place(folder / ".epic-rag"), state.collection)
    assert store is not None
    for row, vector in vectors.items():
        best = store.nearest(vector.astype(np.float32), 5)
        assert best[0][1] == pytest.approx(1.0, abs=1e-4), row
        for other, score in best:
            assert score == pytest.approx(float(vectors[other] @ vector), abs=1e-4)
    store.close()


def index(folder: Path, url: str | None = None) -> int:
    """Index a folder, check that everything is searchable and return the number of embedded chunks."""
    with ChromaIndexer(folder / ".epic-rag", encoder=HashEncoder(), chroma=url, batch_chunks=8) as indexer:
        embedded = indexer.index([folder], settings=SETTINGS).chunks_embedded
        assert len(indexer.query("river", k=5, mode="dense")) == 5
        return embedded


def test_server_killed_at_any_moment(
    forks: ForkServer, tmp_path: Path, server: ChromaProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = ChangingFolder(tmp_path / "docs", chance := random.Random(SEED), files=FILES)
    others = count_collections(server)
    requests, moment = 0, 0
    reached = threading.Event()

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal requests
            requests += 1
            if requests == moment:
                reached.set()
            return original(*arguments, **options)

        return call

    for name in ("upsert", "delete", "update_metadata", "publish", "count", "probe"):
        monkeypatch.setattr(ChunkStore, name, counted(getattr(ChunkStore, name)))

    def kill(delay: float, away: float) -> None:
        reached.wait(60)
        time.sleep(delay)
        server.kill()
        time.sleep(away)
        server.start()

    kills = 0
    errors: list[str] = []
    while kills < SERVER_KILLS:
        requests, moment = 0, chance.randint(1, MOST_REQUESTS)
        reached.clear()
        killer = threading.Thread(target=kill, args=[chance.uniform(0, 0.03), chance.uniform(0, SECONDS_AWAY)])
        killer.start()
        try:
            index(docs.folder, server.url)
        except ChromaServerError as error:
            errors.append(str(error))
        kills += reached.is_set()
        reached.set()
        killer.join()
        index(docs.folder)
        assert index(docs.folder) == 0
        check(docs.folder, server.url, clean_rows(forks, docs.folder, tmp_path))
        docs.change()
    assert count_collections(server) == others + 1
    assert all(server.url in error for error in errors)
    report("server", {"server_kills": kills, "runs_that_ended_by_it": len(errors), "seed": SEED})


def test_indexer_killed_at_any_moment(forks: ForkServer, tmp_path: Path, server: ChromaProcess) -> None:
    docs = ChangingFolder(tmp_path / "docs", chance := random.Random(SEED + 1), files=FILES)
    index_dir = docs.folder / ".epic-rag"
    index(docs.folder, server.url)
    kills = 0
    seconds = 1.0
    while kills < INDEXER_KILLS:
        docs.change()
        expected = clean_rows(forks, docs.folder, tmp_path)
        started = time.monotonic()
        job = forks.start("index", docs.folder, pause=0.02)
        time.sleep(chance.uniform(0.1, 1.0) * seconds)
        job.send(signal.SIGKILL)
        if job.wait() is None:
            kills += 1
        else:
            seconds = 0.5 * seconds + 0.5 * (time.monotonic() - started)
        if not SOAK or chance.random() < 0.3:  # the server too
            server.kill()
            with (
                ChromaIndexer(index_dir, encoder=HashEncoder()) as indexer,
                pytest.raises(ChromaServerError, match="No Chroma server answers"),
            ):
                indexer.query("river", mode="dense")
            server.start()
        stored, wanted = (
            {str(metadata["embedded_hash"]) for _, metadata, _ in rows.values()}
            for rows in (rows_on_server(index_dir, server.url), expected)
        )
        assert index(docs.folder) <= len(wanted - stored)
        check(docs.folder, server.url, expected)
    report("server", {"indexer_kills": kills, "seed": SEED})


def test_server_that_lost_its_data_is_filled_again(forks: ForkServer, tmp_path: Path, server: ChromaProcess) -> None:
    docs = ChangingFolder(tmp_path / "docs", random.Random(SEED + 2), files=FILES)
    index(docs.folder, server.url)
    server.kill()
    shutil.rmtree(server.folder)
    server.start()
    with (
        ChromaIndexer(docs.folder / ".epic-rag", encoder=HashEncoder()) as indexer,
        pytest.raises(Exception, match=r"[Rr]un `epic-rag index` with the indexed folder"),
    ):
        indexer.query("river", mode="dense")
    assert index(docs.folder) == 0
    check(docs.folder, server.url, clean_rows(forks, docs.folder, tmp_path))
    assert json.loads((docs.folder / ".epic-rag/index.json").read_text())["chroma"]["url"] == server.url
