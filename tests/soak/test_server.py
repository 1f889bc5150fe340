"""An index on a Chroma server, with the server and the indexer killed at random moments.

EPIC_RAG_SOAK=1 kills 60 and 20 times; the default is a few. EPIC_RAG_SOAK_SEED chooses other moments.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer
from epic_rag_chroma.errors import ChromaServerError
from epic_rag_chroma.store.collection import ChunkStore
from epic_rag_chroma.store.state import IndexState
from tests.helpers.servers import ChromaProcess, plain_client

SOAK = os.environ.get("EPIC_RAG_SOAK") == "1"
SERVER_KILLS = 60 if SOAK else 3
INDEXER_KILLS = 20 if SOAK else 1
REPORT = Path(__file__).parents[2] / "runs" / "soak" / "server.json"
SEED = int(os.environ.get("EPIC_RAG_SOAK_SEED", "1"))
FILES = 40
Row = tuple[str, dict[str, Any], "np.ndarray[Any, np.dtype[np.float32]]"]

INDEX = """
import sys
from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer
with ChromaIndexer(sys.argv[1] + "/.epic-rag", encoder=EpicEncoder.from_pretrained(sys.argv[2]), batch_chunks=8) as indexer:
    print("begins", flush=True)
    indexer.index([sys.argv[1]])
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path / "server") as started:
        yield started


@pytest.fixture
def encoder(tiny_checkpoint: Path) -> EpicEncoder:
    return EpicEncoder.from_pretrained(tiny_checkpoint)


def rows_of(index_dir: Path, url: str) -> dict[str, Row]:
    """What the server has of an index, through a client of Chroma's own."""
    state = IndexState.load(index_dir)
    assert state is not None
    with plain_client(url) as client:
        (collection,) = [each for each in client.list_collections() if str(each.id) == state.collection]
        rows = collection.get(include=["documents", "metadatas", "embeddings"])
    return {
        row: (text, dict(metadata), np.asarray(vector, dtype=np.float32))
        for row, text, metadata, vector in zip(
            rows["ids"], rows["documents"], rows["metadatas"], rows["embeddings"], strict=True
        )
    }


def clean(folder: Path, place: Path, encoder: EpicEncoder) -> dict[str, Row]:
    """The rows of a clean index of a copy of the folder, in a folder."""
    copy = Path(shutil.copytree(folder, place, ignore=shutil.ignore_patterns(".epic-rag")))
    with ChromaIndexer(copy / ".epic-rag", encoder=encoder) as indexer:
        indexer.index([copy])
    client = chromadb.PersistentClient(str(copy / ".epic-rag/chroma"))
    rows = client.get_collection("epic_rag", embedding_function=None).get(
        include=["documents", "metadatas", "embeddings"]
    )
    client.close()
    shutil.rmtree(copy)
    return {
        row: (text, dict(metadata), np.asarray(vector, dtype=np.float32))
        for row, text, metadata, vector in zip(
            rows["ids"], rows["documents"], rows["metadatas"], rows["embeddings"], strict=True
        )
    }


def text(chance: random.Random) -> str:
    words = ["index", "query", "folder", "vector", "server", "chunk", "model", "passage"]
    return "\n\n".join(
        f"## {chance.choice(words)} {chance.randrange(10**6)}\n\n" + " ".join(chance.choices(words, k=12))
        for _ in range(chance.randint(1, 6))
    )


def edit(folder: Path, chance: random.Random) -> None:
    """Add, change, rename and delete some files."""
    there = sorted(folder.glob("*.md"))
    for path in chance.sample(there, min(6, len(there))):
        match chance.choice(["change", "rename", "delete"]):
            case "change":
                path.write_text(text(chance))
            case "rename":
                path.rename(folder / f"renamed{chance.randrange(10**6)}.md")
            case _:
                path.unlink()
    while len(list(folder.glob("*.md"))) < FILES:
        (folder / f"new{chance.randrange(10**6)}.md").write_text(text(chance))


def check(folder: Path, url: str, encoder: EpicEncoder, place: Path) -> None:
    """The index is what a clean one would be, and every row of it is found."""
    found, expected = rows_of(folder / ".epic-rag", url), clean(folder, place, encoder)
    assert {row: value[:2] for row, value in found.items()} == {row: value[:2] for row, value in expected.items()}
    for row, value in found.items():
        # The sums of a matrix product depend on what else is in the batch.
        np.testing.assert_allclose(value[2], expected[row][2], atol=1e-5)
    state = IndexState.load(folder / ".epic-rag")
    assert state is not None
    store = ChunkStore.open(state.place(folder / ".epic-rag"), state.collection)
    assert store is not None
    for row, value in found.items():
        best = store.nearest(value[2], 5)
        assert best[0][1] == pytest.approx(1.0, abs=1e-4), row
        for other, score in best:
            assert score == pytest.approx(float(found[other][2] @ value[2]), abs=1e-4)
    store.close()


def report(**facts: int) -> None:
    """Add to the file that docs/reliability.md is filled from; only full counts go there."""
    if SOAK:
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(REPORT.read_text()) if REPORT.exists() else {}
        REPORT.write_text(json.dumps({**known, **facts, "seed": SEED}, indent=2) + "\n")


def embedded_hashes(rows: dict[str, Row]) -> set[str]:
    return {str(metadata["embedded_hash"]) for _, metadata, _ in rows.values()}


def test_the_server_is_killed_at_random_moments(
    tmp_path: Path, server: ChromaProcess, encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, chance = tmp_path / "docs", random.Random(SEED)
    folder.mkdir()
    requests, moment = 0, 0
    wanted = threading.Event()

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal requests
            requests += 1
            if requests == moment:
                wanted.set()
            return original(*arguments, **options)

        return call

    for name in ("upsert", "delete", "update_metadata", "publish", "count", "probe"):
        monkeypatch.setattr(ChunkStore, name, counted(getattr(ChunkStore, name)))

    def kill(delay: float, away: float) -> None:
        wanted.wait(60)
        time.sleep(delay)
        server.kill()
        time.sleep(away)
        server.start()

    kills = mended = 0
    errors: list[str] = []
    while kills < SERVER_KILLS:
        edit(folder, chance)
        requests, moment = 0, chance.randint(1, 40)
        wanted.clear()
        killer = threading.Thread(target=kill, args=[chance.uniform(0, 0.03), chance.uniform(0, 1)])
        killer.start()
        try:
            with ChromaIndexer(folder / ".epic-rag", encoder=encoder, chroma=server.url, batch_chunks=8) as indexer:
                indexer.index([folder])
        except ChromaServerError as error:
            mended += 1
            errors.append(str(error))
        was_killed = wanted.is_set()
        wanted.set()
        killer.join()
        kills += was_killed
        with ChromaIndexer(folder / ".epic-rag", encoder=encoder) as indexer:
            indexer.index([folder])
            assert indexer.index([folder]).chunks_embedded == 0
            assert len(indexer.query("server", k=5, mode="dense")) == 5
        check(folder, server.url, encoder, tmp_path / "clean")
    with plain_client(server.url) as client:
        assert client.count_collections() == 1
    assert all(server.url in error for error in errors)
    report(server_kills=kills, runs_that_ended_by_it=mended)


def test_the_indexer_is_killed_at_random_moments(
    tmp_path: Path, server: ChromaProcess, encoder: EpicEncoder, tiny_checkpoint: Path
) -> None:
    folder, chance = tmp_path / "docs", random.Random(SEED + 1)
    folder.mkdir()
    edit(folder, chance)
    with ChromaIndexer(folder / ".epic-rag", encoder=encoder, chroma=server.url) as indexer:
        indexer.index([folder])
    kills = 0
    while kills < INDEXER_KILLS:
        edit(folder, chance)
        expected = clean(folder, tmp_path / "clean", encoder)
        with subprocess.Popen(
            [sys.executable, "-c", INDEX, str(folder), str(tiny_checkpoint)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begins\n"
            try:
                process.wait(timeout=chance.uniform(0.3, 2.5))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
        both = chance.random() < 0.3
        if both:
            server.kill()
            with (
                ChromaIndexer(folder / ".epic-rag", encoder=encoder) as indexer,
                pytest.raises(ChromaServerError, match="no Chroma server answers"),
            ):
                indexer.query("server", mode="dense")
            server.start()
        stored = embedded_hashes(rows_of(folder / ".epic-rag", server.url))
        with ChromaIndexer(folder / ".epic-rag", encoder=encoder) as indexer:
            ended = indexer.index([folder])
            assert ended.chunks_embedded <= len(embedded_hashes(expected) - stored)
            assert len(indexer.query("server", k=5, mode="dense")) == 5
        check(folder, server.url, encoder, tmp_path / "clean")
    report(indexer_kills=kills)


def test_a_server_that_lost_everything_gets_it_again(
    tmp_path: Path, server: ChromaProcess, encoder: EpicEncoder
) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    edit(folder, random.Random(SEED + 2))
    with ChromaIndexer(folder / ".epic-rag", encoder=encoder, chroma=server.url) as indexer:
        indexer.index([folder])
    server.kill()
    shutil.rmtree(server.folder)
    server.start()
    with ChromaIndexer(folder / ".epic-rag", encoder=encoder) as indexer:
        with pytest.raises(Exception, match="run `epic-rag index` with the indexed folder"):
            indexer.query("server", mode="dense")
        assert indexer.index([folder]).chunks_embedded == 0
    check(folder, server.url, encoder, tmp_path / "clean")
    assert json.loads((folder / ".epic-rag/index.json").read_text())["chroma"]["url"] == server.url
