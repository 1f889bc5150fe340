"""An index on a Chroma server, with the server and the indexer killed at random moments.

EPIC_RAG_SOAK=1 kills 60 and 20 times; the default is once each.
"""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag_chroma import ChromaIndexer, ChromaServerError, IndexSettings
from epic_rag_chroma.store import collection
from epic_rag_chroma.store.client import Session
from epic_rag_chroma.store.database import IndexDatabase
from epic_rag_chroma.store.paths import DATABASE_FILE
from epic_rag_chroma.store.server import ServerPlace
from tests.helpers.changing_folder import ChangingFolder
from tests.helpers.fork_server import ForkServer, HashEncoder
from tests.helpers.indexes import Rows, read_rows
from tests.helpers.servers import ChromaProcess, plain_client
from tests.helpers.soak import SEED, SOAK, report

SERVER_KILLS = 60 if SOAK else 1
INDEXER_KILLS = 20 if SOAK else 1
FILES = 40 if SOAK else 20
MOST_REQUESTS = 30
SECONDS_AWAY = 1.0 if SOAK else 0.3
SETTINGS = IndexSettings(chunk_tokens=30, chunk_overlap=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path_factory.mktemp("server")) as started:
        yield started


def count_collections(server: ChromaProcess) -> int:
    with plain_client(server.url) as client:
        return client.count_collections()


def place_of(index_dir: Path) -> ServerPlace:
    with closing(IndexDatabase.open_reading(index_dir / DATABASE_FILE)) as database:
        state = database.state()
    assert state is not None
    assert isinstance(state.chroma, ServerPlace)
    return state.chroma


def clean_rows(forks: ForkServer, folder: Path, place: Path) -> Rows:
    """Return the rows of a clean index of a copy of the folder."""
    copy = Path(shutil.copytree(folder, place / "clean", ignore=shutil.ignore_patterns(".epic-rag")))
    forks.run("index", copy)
    rows = read_rows(copy / ".epic-rag")
    shutil.rmtree(copy)
    return rows


def check(folder: Path, url: str, expected: Rows) -> tuple[int, int]:
    """Compare the server's rows with those of a clean index by chromadb's own client.

    Returns:
        The number of lost, stale or different rows, and that of wrong hits among the best five of each row.
    """
    with plain_client(url) as client:
        name = f"epic_rag_{place_of(folder / '.epic-rag').index_id}"
        mirror = client.get_collection(name, embedding_function=None)
        rows = mirror.get(include=["documents", "metadatas", "embeddings"])
        found = dict(zip(rows["ids"], zip(rows["documents"], rows["metadatas"], strict=True), strict=True))
        lost = sum(found.get(row) != value[:2] for row, value in expected.items()) + len(found.keys() - expected.keys())
        vectors = {row: np.asarray(expected[row][2]) for row in expected}
        for row, vector in zip(rows["ids"], rows["embeddings"], strict=True):
            lost += row in vectors and not np.allclose(vector, vectors[row], atol=1e-5)
        answers = mirror.query(
            query_embeddings=[vector.tolist() for vector in vectors.values()], n_results=5, include=["distances"]
        )
    wrong = 0
    for vector, ids, distances in zip(vectors.values(), answers["ids"], answers["distances"], strict=True):
        exact = sorted((float(other @ vector) for other in vectors.values()), reverse=True)[:5]
        scores = [float(vectors[each] @ vector) if each in vectors else -1.0 for each in ids]
        wrong += sum(abs(score - best) > 1e-4 for score, best in zip(scores, exact, strict=True))
        wrong += sum(abs(1 - distance - score) > 1e-4 for distance, score in zip(distances, scores, strict=True))
    return lost, wrong


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
    started, others = time.monotonic(), count_collections(server)
    requests, moment = 0, 0
    reached = threading.Event()
    request = Session.request

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal requests
        requests += 1
        if requests == moment:
            reached.set()
        return request(*arguments, **options)

    monkeypatch.setattr(Session, "request", counted)
    # Chroma writes its graph within each request that writes rows.
    monkeypatch.setitem(collection._HNSW, "batch_size", 10)
    monkeypatch.setitem(collection._HNSW, "sync_threshold", 20)

    def kill(delay: float, away: float) -> None:
        reached.wait(60)
        time.sleep(delay)
        server.kill()
        time.sleep(away)
        server.start()

    index(docs.folder, server.url)
    kills = lost = wrong = 0
    errors: list[str] = []
    while kills < SERVER_KILLS:
        docs.change()
        requests, moment = 0, chance.randint(1, MOST_REQUESTS)
        reached.clear()
        killer = threading.Thread(target=kill, args=[chance.uniform(0, 0.03), chance.uniform(0, SECONDS_AWAY)])
        killer.start()
        try:
            index(docs.folder)
        except ChromaServerError as error:
            errors.append(str(error))
        kills += reached.is_set()
        reached.set()
        killer.join()
        assert index(docs.folder) == 0
        row_errors, hit_errors = check(docs.folder, server.url, clean_rows(forks, docs.folder, tmp_path))
        lost += row_errors
        wrong += hit_errors
    report(
        "server", {"server_kills": kills, "runs_that_ended_by_it": len(errors), "lost_rows": lost, "wrong_hits": wrong}
    )
    report("server", {"server_seconds": round(time.monotonic() - started), "seed": SEED})
    assert (lost, wrong) == (0, 0)
    assert count_collections(server) == others + 1
    assert all(server.url in error and "complete and searchable" in error for error in errors)


def test_indexer_killed_at_any_moment(forks: ForkServer, tmp_path: Path, server: ChromaProcess) -> None:
    docs = ChangingFolder(tmp_path / "docs", chance := random.Random(SEED + 1), files=FILES)
    index_dir = docs.folder / ".epic-rag"
    others = count_collections(server)
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
            with ChromaIndexer(index_dir, encoder=HashEncoder()) as indexer:
                indexer.query("river", mode="dense")
            server.start()
        index(docs.folder)
        assert check(docs.folder, server.url, expected) == (0, 0)
        assert count_collections(server) == others + 1
    report("server", {"indexer_kills": kills, "seed": SEED})


def test_server_that_lost_its_data_is_filled_again(forks: ForkServer, tmp_path: Path, server: ChromaProcess) -> None:
    docs = ChangingFolder(tmp_path / "docs", random.Random(SEED + 2), files=FILES)
    index(docs.folder, server.url)
    server.kill()
    shutil.rmtree(server.folder)
    server.start()
    assert index(docs.folder) == 0
    assert check(docs.folder, server.url, clean_rows(forks, docs.folder, tmp_path)) == (0, 0)
