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
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.changing_folder import ChangingFolder, Texts
from tests.helpers.fork_server import ForkServer, Job
from tests.helpers.indexes import read_rows
from tests.helpers.soak import SEED, SOAK, report

KILLS = 60 if SOAK else 3
FILES = 90 if SOAK else 20
INTERRUPTS = 30 if SOAK else 2
LIMITED = 20 if SOAK else 2
PATIENCE = 40.0

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


def select(index_dir: Path, statement: str) -> list[tuple[Any, ...]]:
    """Query the database of an index; return nothing if it is not there yet."""
    if not (index_dir / "index.sqlite").exists():
        return []
    with closing(sqlite3.connect(index_dir / "index.sqlite")) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():  # killed before it had tables
            return []
        return connection.execute(statement).fetchall()


def has_index(index_dir: Path) -> bool:
    return bool(select(index_dir, "SELECT 1 FROM settings WHERE name = 'state'"))


def is_mirror_dirty(index_dir: Path) -> bool:
    found = select(index_dir, "SELECT value FROM settings WHERE name = 'mirror'")
    return bool(found) and json.loads(found[0][0])["is_dirty"]


def assert_clean(forks: ForkServer, docs: ChangingFolder, place: Path) -> None:
    """Finish the run, and compare database and mirror with an index that was made in one run."""
    index_dir = docs.folder / ".epic-rag"
    stored = {
        row[0] for table in ("chunks", "spare") for row in select(index_dir, f"SELECT embedded_hash FROM {table}")
    }
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
    for folder in (index_dir, copy / ".epic-rag"):
        assert not select(folder, "SELECT 1 FROM settings WHERE name = 'run'")
        assert not select(folder, "SELECT 1 FROM outbox")
        assert not is_mirror_dirty(folder)
        database = select(folder, "SELECT id, text, metadata, vector FROM chunks JOIN vectors USING (number)")
        assert {row: (text, json.loads(metadata)) for row, text, metadata, _ in database} == {
            row: value[:2] for row, value in found.items()
        }
        for row, _, _, vector in database:
            assert np.frombuffer(vector, "<f4") == pytest.approx(found[row][2], abs=1e-6)
        keywords = select(folder, "SELECT id FROM keywords JOIN chunks ON keywords.rowid = number")
        assert sorted(row[0] for row in keywords) == sorted(found)
        assert not select(folder, "INSERT INTO keywords (keywords) VALUES ('integrity-check')")
    shutil.rmtree(copy)


def assert_complete(forks: ForkServer, docs: ChangingFolder, place: Path, before: Found) -> Found:
    """Finish the run, and check that the index is a clean one in which everything is found."""
    assert_clean(forks, docs, place)
    found = assert_nothing_is_lost(forks, docs, before)
    assert set(found) == {"dense", "keyword"}
    assert all(files == docs.texts() for files in found.values())
    return found


def mirror_files(index_dir: Path) -> tuple[tuple[int, int], ...]:
    found = []
    for path in sorted(index_dir.glob("chroma/**/*")):
        with suppress(FileNotFoundError):
            info = path.stat()
            found.append((info.st_mtime_ns, info.st_size))
    return tuple(found)


def kill_while_the_mirror_is_written(job: Job, chance: random.Random, index_dir: Path) -> None:
    """Kill at one of the moments when Chroma writes its files."""
    changes = chance.randint(1, 12)
    seen = mirror_files(index_dir)
    while job.is_alive() and changes:
        state = mirror_files(index_dir)
        if state != seen:
            seen = state
            changes -= 1
        time.sleep(0.0002)
    job.send(signal.SIGKILL)


def kill_at_the_swap(job: Job, chance: random.Random, index_dir: Path) -> None:
    """Kill while a rebuilt database takes the place of the current one."""
    rebuilt, log = index_dir / "rebuild.sqlite", index_dir / "index.sqlite-wal"
    while job.is_alive() and not rebuilt.exists():
        time.sleep(0.0002)
    size = log.stat().st_size if log.exists() else 0
    while job.is_alive() and rebuilt.exists() and (log.stat().st_size if log.exists() else 0) == size:
        time.sleep(0.0002)
    time.sleep(chance.uniform(0.0, 0.02))
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
        moment = chance.choice(["time", "mirror", "mirror", "swap" if rebuild else "time"])
        if not SOAK:  # each of the moments once
            moment = next(name for name in ("mirror", "time", "swap") if not killed[name])
            rebuild = moment == "swap"
        started = time.monotonic()
        job = forks.start("index", docs.folder, rebuild=rebuild, pause=0.005)
        if moment == "time":
            time.sleep(chance.uniform(0.0, seconds))
            job.send(signal.SIGKILL)
        elif moment == "mirror":
            kill_while_the_mirror_is_written(job, chance, index_dir)
        else:
            kill_at_the_swap(job, chance, index_dir)
        answer = job.wait()
        if answer is None:
            killed[moment] += 1
        else:
            assert "result" in answer, answer["trace"]
            seconds = 0.5 * seconds + 0.5 * (time.monotonic() - started)
        while_writing += is_mirror_dirty(index_dir)
        if has_index(index_dir):
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
        if has_index(docs.folder / ".epic-rag"):
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
        job = forks.start("index", docs.folder, limits={limit: value}, rebuild=number % 4 == 3)
        try:
            answer = job.wait(PATIENCE)
        except TimeoutError:  # Chroma waits for ever for a thread that it could not start; the job is killed
            answer = None
            outcomes["hung"] += 1
            assert limit == "RLIMIT_AS"
        if answer is None:
            outcomes["died"] += 1  # by a signal: C++ and Rust abort when memory is refused
        elif "result" in answer:
            outcomes["fitted"] += 1
        else:
            assert answer["expected"], answer["trace"]
            assert "epic-rag index" in answer["message"]
            outcomes["refused"] += 1
        if has_index(docs.folder / ".epic-rag"):
            before = assert_nothing_is_lost(forks, docs, before)
        if number % 2:
            before = assert_complete(forks, docs, tmp_path, before)
        docs.change()
    outcomes["died"] -= outcomes["hung"]
    report("crash", {limit: {"runs": LIMITED, **outcomes, "seed": SEED + 2}})
