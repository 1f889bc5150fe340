"""A run may end at any moment: what was found is still found, and the next run ends where a clean index would.

EPIC_RAG_SOAK=1 kills 60 times; the default is a few. A failure names the seed.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers.changing_folder import ChangingFolder, Texts
from tests.helpers.fork_server import ForkServer, Job
from tests.helpers.indexes import read_rows
from tests.helpers.soak import SEED, SOAK, report

KILLS = 60 if SOAK else 3
FILES = 90 if SOAK else 20
INTERRUPTS = 30 if SOAK else 2
LIMITED = 20 if SOAK else 2

Found = dict[str, Texts]
"""Files that are found, by search mode."""


def assert_nothing_is_lost(forks: ForkServer, docs: ChangingFolder, before: Found) -> Found:
    """Check that every file that was found before and still exists is found, with its old or its new content.

    Returns:
        For each search mode, the files that are found now, with the texts that they are found with.
    """
    now = docs.texts()
    by_content = {texts: path for path, texts in now.items()}
    queries = sorted({text for files in (*before.values(), now) for texts in files.values() for text in texts})
    found = forks.run("search", docs.folder, texts=queries)
    visible: dict[str, set[tuple[str, str]]] = {
        mode: {(path, text) for hits in each for path, text in hits} for mode, each in found.items()
    }
    for mode, each in found.items():
        for text, hits in zip(queries, each, strict=True):
            for path, shown in hits:
                assert shown in docs.history[path], (mode, path, shown)
            if any(shown == text for _, shown in hits):
                assert hits[0][1] == text, f"{mode}: {text!r} is not the best answer to itself"

    def is_whole(mode: str, path: str, texts: tuple[str, ...]) -> bool:
        return all((path, text) in visible[mode] for text in texts)

    for mode in visible:
        for path, texts in before.get(mode, {}).items():
            if path in now:
                assert is_whole(mode, path, texts) or is_whole(mode, path, now[path]), f"{mode}: {path} is not found"
            elif texts in by_content:
                assert is_whole(mode, path, texts) or is_whole(mode, by_content[texts], texts), (
                    f"{mode}: {path}, now {by_content[texts]}, is not found"
                )
    held: Found = {mode: {} for mode in visible}
    for mode, files in held.items():
        for path in {*before.get(mode, {}), *now}:
            for texts in (now.get(path), before.get(mode, {}).get(path)):
                if texts is not None and is_whole(mode, path, texts):
                    files[path] = texts
                    break
    return held


def stored_hashes(index_dir: Path) -> set[str]:
    """Return the hashes of the texts that have a vector in the index."""
    try:
        collection = json.loads((index_dir / "index.json").read_text())["collection"]
    except FileNotFoundError:
        return set()
    file = index_dir / f"records-{collection}.sqlite"
    if not file.exists():
        return set()
    with closing(sqlite3.connect(file)) as connection:
        return {
            row[0] for table in ("records", "spare") for row in connection.execute(f"SELECT embedded_hash FROM {table}")
        }


def assert_clean(forks: ForkServer, docs: ChangingFolder, place: Path) -> None:
    """Finish the run, and compare with an index that was made in one run."""
    index_dir = docs.folder / ".epic-rag"
    stored = stored_hashes(index_dir)
    copy = Path(shutil.copytree(docs.folder, place / "copy", ignore=shutil.ignore_patterns(".epic-rag")))
    in_one_run = forks.start("index", copy)
    indexed = forks.run("index", docs.folder)
    in_one_run.result()
    found, expected = read_rows(index_dir), read_rows(copy / ".epic-rag")
    assert {row: value[:2] for row, value in found.items()} == {row: value[:2] for row, value in expected.items()}
    for row, (_, _, vector) in found.items():
        assert vector == pytest.approx(expected[row][2], abs=1e-6)
    wanted = {metadata["embedded_hash"] for _, metadata, _ in expected.values()}
    assert indexed["chunks_embedded"] == len(wanted - stored)
    assert not (index_dir / "running.json").exists()
    for folder in (index_dir, copy / ".epic-rag"):
        with closing(sqlite3.connect(next(folder.glob("keywords-*.sqlite")))) as keywords:
            assert {row[0] for row in keywords.execute("SELECT id FROM chunks")} == set(found)
    shutil.rmtree(copy)


def assert_complete(forks: ForkServer, docs: ChangingFolder, place: Path, before: Found) -> Found:
    """Finish the run, and check that the index is a clean one in which everything is found."""
    assert_clean(forks, docs, place)
    found = assert_nothing_is_lost(forks, docs, before)
    assert set(found) == {"dense", "keyword"}
    assert all(files == docs.texts() for files in found.values())
    return found


def graph_state(index_dir: Path) -> tuple[int, ...]:
    return tuple(path.stat().st_mtime_ns for path in sorted(index_dir.glob("chroma/*/*.bin")))


def kill_while_the_graph_is_written(job: Job, chance: random.Random, index_dir: Path) -> None:
    """Kill at one of the moments when Chroma overwrites its graph."""
    changes = chance.randint(1, 6)
    seen = graph_state(index_dir)
    while job.is_alive() and changes:
        try:
            state = graph_state(index_dir)
        except FileNotFoundError:
            continue
        if state != seen:
            seen = state
            changes -= 1
        time.sleep(0.0002)
    job.send(signal.SIGKILL)


def kill_at_the_swap(job: Job, chance: random.Random, index_dir: Path) -> None:
    """Kill just after index.json changed: one collection is about to replace another."""
    seen = (index_dir / "index.json").stat().st_mtime_ns if (index_dir / "index.json").exists() else 0
    while job.is_alive():
        try:
            if (index_dir / "index.json").stat().st_mtime_ns != seen:
                break
        except FileNotFoundError:
            continue
        time.sleep(0.0002)
    time.sleep(chance.uniform(0.0, 0.03))
    job.send(signal.SIGKILL)


def test_killed_at_any_moment(forks: ForkServer, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    docs = ChangingFolder(tmp_path / "docs", chance, files=FILES)
    index_dir = docs.folder / ".epic-rag"
    before: Found = {}
    killed: Counter[str] = Counter()
    while_writing = 0
    seconds = 1.0
    number = 0
    while killed.total() < KILLS:
        number += 1
        rebuild = number % 4 == 3
        swaps = rebuild or number < 3
        moment = chance.choice(["time", "graph", "graph", "swap" if swaps else "time"])
        if not SOAK:  # each of the moments once
            moment = next(name for name in ("graph", "time", "swap") if not killed[name])
        started = time.monotonic()
        job = forks.start("index", docs.folder, rebuild=rebuild, pause=0.005)
        if moment == "time":
            time.sleep(chance.uniform(0.0, seconds))
            job.send(signal.SIGKILL)
        elif moment == "graph":
            kill_while_the_graph_is_written(job, chance, index_dir)
        else:
            kill_at_the_swap(job, chance, index_dir)
        answer = job.wait()
        if answer is None:
            killed[moment] += 1
        else:
            assert "result" in answer, answer["trace"]
            seconds = 0.5 * seconds + 0.5 * (time.monotonic() - started)
        running = index_dir / "running.json"
        if running.exists():
            while_writing += json.loads(running.read_text())["busy"] is not None
        if (index_dir / "index.json").exists():
            before = assert_nothing_is_lost(forks, docs, before)
        if number % 3:
            before = assert_complete(forks, docs, tmp_path, before)
        # Otherwise the next run is killed on top of what this one left.
        docs.change()
    assert_complete(forks, docs, tmp_path, before)
    by_moment = {"kills": killed.total(), "by_moment": dict(killed), "while_chroma_wrote": while_writing, "seed": SEED}
    report("crash", {"kills": by_moment})


def test_interrupted_at_any_moment(forks: ForkServer, tmp_path: Path) -> None:
    chance = random.Random(SEED + 1)
    docs = ChangingFolder(tmp_path / "docs", chance, files=FILES)
    before: Found = {}
    done = 0
    seconds = 0.7
    while done < INTERRUPTS:
        started = time.monotonic()
        job = forks.start("index", docs.folder, pause=0.005, rebuild=done % 5 == 4)
        time.sleep(chance.uniform(0.05, seconds))
        job.send(signal.SIGINT)
        answer = job.wait()
        assert answer is not None
        if "result" in answer:
            seconds = 0.5 * seconds + 0.5 * (time.monotonic() - started)
        else:
            assert answer["error"] == "KeyboardInterrupt", answer["trace"]
            done += 1
        if (docs.folder / ".epic-rag/index.json").exists():
            before = assert_nothing_is_lost(forks, docs, before)
        if done % 2:
            before = assert_complete(forks, docs, tmp_path, before)
        docs.change()
    report("crash", {"interrupts": {"interrupts": done, "seed": SEED + 1}})


@pytest.mark.parametrize("limit", ["RLIMIT_FSIZE", "RLIMIT_AS"])
def test_full_disk_or_memory(forks: ForkServer, tmp_path: Path, limit: str) -> None:
    """A run meets a limit on the size of files, or on memory, somewhere."""
    chance = random.Random(SEED + 2)
    docs = ChangingFolder(tmp_path / "docs", chance, files=FILES)
    before: Found = {}
    outcomes: Counter[str] = Counter()
    for number in range(LIMITED):
        value = chance.randint(4_000, 900_000) if limit == "RLIMIT_FSIZE" else chance.randint(0, 40 * 2**20)
        answer = forks.start("index", docs.folder, limits={limit: value}, rebuild=number % 4 == 3).wait()
        if answer is None:
            outcomes["died"] += 1  # by a signal: C++ and Rust abort when memory is refused
        elif "result" in answer:
            outcomes["fitted"] += 1
        else:
            assert answer["expected"], answer["trace"]
            assert "epic-rag index" in answer["message"]
            outcomes["refused"] += 1
        if (docs.folder / ".epic-rag/index.json").exists():
            before = assert_nothing_is_lost(forks, docs, before)
        if number % 2:
            before = assert_complete(forks, docs, tmp_path, before)
        docs.change()
    report("crash", {limit: {"runs": LIMITED, **outcomes, "seed": SEED + 2}})
