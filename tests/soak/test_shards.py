"""Shards on a Chroma server that is killed at random moments while they are filled.

EPIC_RAG_SOAK=1 kills 20 times, with a graph that Chroma writes often; the default is twice.
"""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from epic_rag_chroma import ShardedCollection, WriteCounts
from epic_rag_chroma.store import shards as module
from tests.helpers.servers import ChromaProcess
from tests.helpers.soak import SEED, SOAK, report
from tests.helpers.vector_rows import INFO, assert_nearest, assert_stored, exact, make_rows

KILLS = 20 if SOAK else 2
ROWS = 3000 if SOAK else 900
SHARDS = 3


def test_rows_survive_kills_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each kill, one call of `sync` leaves all rows, each once, with text, metadata and vector."""
    monkeypatch.setattr(module, "_HNSW", {**module._HNSW, "batch_size": 10, "sync_threshold": 20})
    monkeypatch.setattr(module, "_MARKED_SECONDS", 0.5)
    moments = random.Random(SEED)
    rows = make_rows(ROWS, dim=64)
    info = replace(INFO, dimension=64)
    batches = [rows[start : start + 300] for start in range(0, ROWS, 300)]
    sent = kills = 0
    with ChromaProcess(tmp_path / "server") as server:
        number = 0
        while kills < KILLS:
            number += 1
            name, done = f"killed-{number}", threading.Event()
            pause = moments.uniform(0.05, 2.0)

            def kill(done: threading.Event = done, pause: float = pause) -> None:
                nonlocal kills
                if not done.wait(pause):
                    server.kill()
                    kills += 1
                    server.start()

            killer = threading.Thread(target=kill)
            with ShardedCollection(server.url, name) as collection:
                killer.start()
                try:
                    counts = collection.sync(lambda: iter(batches), info, shards=SHARDS)
                finally:
                    done.set()
                    killer.join()
                sent += counts.written + counts.changed
                assert collection.sync(lambda: iter(batches), info) == WriteCounts(unchanged=ROWS)
                opened, _ = collection._opened()
                assert collection.count() == ROWS
                assert set(opened.states) == {"complete"}
                assert_stored(opened.get([row.id for row in rows]), rows)
                for row in rows[:: ROWS // 30]:
                    assert_nearest(opened.nearest(row.vector, 3)[:1], exact(rows, row.vector, 1))
        facts = {"kills": kills, "runs": number, "rows": ROWS, "rows_sent": sent, "rows_needed": number * ROWS}
    report("shards", facts)
