"""Indexers and queries in processes of their own, on one index, while its files change.

EPIC_RAG_SOAK=1 runs for 60 seconds; the default is a few.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.soak import worker
from tests.soak.test_crash import Library
from tests.soak.worker import Job, Pool

SOAK = os.environ.get("EPIC_RAG_SOAK") == "1"
SECONDS = 60.0 if SOAK else 6.0
INDEXERS = 2
READERS = 4
SEED = int(os.environ.get("EPIC_RAG_SOAK_SEED", "1"))
REPORT = Path(__file__).parents[2] / "runs" / "soak" / "processes.json"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with worker.pool(tmp_path_factory.mktemp("answers")) as made:
        yield made


def test_two_indexers_and_four_queries(pool: Pool, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    library = Library(tmp_path / "docs", chance, files=40)
    index_dir = library.folder / ".epic-rag"
    # These never change, and must be found by every query.
    kept = {f"kept/kept{number}.txt": f"forever{number} " + " ".join(["stays"] * 15) for number in range(10)}
    (library.folder / "kept").mkdir()
    pool.run("index", library.folder)
    for path, text in kept.items():
        (library.folder / path).write_text(text + "\n")
    pool.run("index", library.folder)
    library.texts()
    until = time.time() + SECONDS
    jobs = [
        pool.start("keep_indexing", library.folder, until=until, pause=0.005, rebuild_every=7 + number)
        for number in range(INDEXERS)
    ]
    readers = [
        pool.start("keep_asking", library.folder, until=until, kept=kept, seed=SEED + number)
        for number in range(READERS)
    ]
    library.leave_alone("kept")
    while time.time() < until:
        library.change_once()
        library.texts()
        time.sleep(0.05)
    indexed = [_answer(job, SECONDS) for job in jobs]
    asked = [_answer(job, SECONDS) for job in readers]
    for reader in asked:
        assert reader["missing"] == []
        for path, text in reader["seen"]:
            assert text in library.history[path], f"{path} never had the text {text!r}"
    assert sum(each["runs"] for each in indexed) > 1
    assert all(each["queries"] > 0 for each in asked)
    pool.run("index", library.folder)
    final = [text for texts in library.texts().values() for text in texts]
    for hits in pool.run("find", library.folder, texts=final).values():
        assert [each[0][1] for each in hits] == final
    assert not (index_dir / "running.json").exists()
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "seconds": SECONDS,
        "indexers": INDEXERS,
        "readers": READERS,
        "runs": sum(each["runs"] for each in indexed),
        "turned_away": sum(each["turned_away"] for each in indexed),
        "queries": sum(each["queries"] for each in asked),
        "slowest_query_seconds": round(max(each["slowest"] for each in asked), 3),
        "seed": SEED,
    }
    if SOAK:
        REPORT.write_text(json.dumps({"concurrent": facts}, indent=2) + "\n")


def _answer(job: Job, seconds: float) -> Any:
    answer = job.wait(seconds + 120)
    assert answer is not None, job.errors()
    assert "result" in answer, answer.get("trace")
    return answer["result"]


def test_a_second_indexer_can_wait(pool: Pool, tmp_path: Path) -> None:
    library = Library(tmp_path / "docs", random.Random(SEED), files=20)
    first = pool.start("index", library.folder, pause=0.05)
    while not (library.folder / ".epic-rag/running.json").exists():
        time.sleep(0.005)
    refused = pool.start("index", library.folder).wait()
    assert refused is not None
    assert refused["error"] == "IndexLockedError"
    assert f"process {first.pid} on" in refused["message"]
    assert "--wait" in refused["message"]
    impatient = pool.start("index", library.folder, wait=0.2).wait()
    assert impatient is not None
    assert "still being written after 0.2 s" in impatient["message"]
    patient = pool.start("index", library.folder, wait=None)
    assert _answer(first, 60)["added"] == 20
    assert _answer(patient, 60)["unchanged"] == 20
