"""Indexers and searches in separate processes on one index, while its files change.

EPIC_RAG_SOAK=1 runs for 60 seconds; the default is a few.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.helpers.changing_folder import ChangingFolder
from tests.helpers.fork_server import ForkServer
from tests.helpers.soak import SEED, SOAK, report

SECONDS = 60.0 if SOAK else 2.0
FILES = 40 if SOAK else 20
INDEXERS = 2
READERS = 4


def test_two_indexers_and_four_readers(forks: ForkServer, tmp_path: Path) -> None:
    docs = ChangingFolder(tmp_path / "docs", random.Random(SEED), files=FILES)
    # These never change, and every search must find them.
    kept = {f"kept/kept{number}.txt": f"forever{number} " + " ".join(["stays"] * 15) for number in range(10)}
    (docs.folder / "kept").mkdir()
    for path, text in kept.items():
        (docs.folder / path).write_text(text + "\n")
    docs.protect("kept")
    forks.run("index", docs.folder)
    docs.texts()
    until = time.time() + SECONDS
    indexers = [
        forks.start(
            "index_repeatedly", docs.folder, until=until, pause=0.005, rebuild_every=(7 if SOAK else 2) + number
        )
        for number in range(INDEXERS)
    ]
    readers = [
        forks.start("search_repeatedly", docs.folder, until=until, kept=kept, seed=SEED + number)
        for number in range(READERS)
    ]
    while time.time() < until:
        docs.change_once()
        docs.texts()
        time.sleep(0.05)
    indexed = [job.result(SECONDS + 120) for job in indexers]
    searched = [job.result(SECONDS + 120) for job in readers]
    for reader in searched:
        assert reader["missing"] == []
        for path, text in reader["seen"]:
            assert text in docs.history[path], f"{path} never had the text {text!r}"
    assert sum(each["runs"] for each in indexed) > 1
    assert all(each["queries"] > 0 for each in searched)
    forks.run("index", docs.folder)
    final = [text for texts in docs.texts().values() for text in texts]
    for hits in forks.run("search", docs.folder, texts=final).values():
        assert [each[0][1] for each in hits] == final
    facts = {
        "seconds": SECONDS,
        "indexers": INDEXERS,
        "readers": READERS,
        "runs": sum(each["runs"] for each in indexed),
        "turned_away": sum(each["turned_away"] for each in indexed),
        "queries": sum(each["queries"] for each in searched),
        "slowest_query_seconds": round(max(each["slowest"] for each in searched), 3),
        "seed": SEED,
    }
    report("processes", {"concurrent": facts})


def test_second_indexer_waits(forks: ForkServer, tmp_path: Path) -> None:
    docs = ChangingFolder(tmp_path / "docs", random.Random(SEED), files=20)
    first = forks.start("index", docs.folder, pause=0.2)
    while not (docs.folder / ".epic-rag/lock.holder").exists():
        time.sleep(0.005)
    refused = forks.start("index", docs.folder).wait()
    assert refused is not None
    assert refused["error"] == "IndexLockedError"
    assert f"process {first.pid} on" in refused["message"]
    assert "--wait" in refused["message"]
    impatient = forks.start("index", docs.folder, wait=0.1).wait()
    assert impatient is not None
    assert "still being written after 0.1 s" in impatient["message"]
    patient = forks.start("index", docs.folder, wait=None)
    assert first.result()["added"] == 20
    assert patient.result()["unchanged"] == 20
