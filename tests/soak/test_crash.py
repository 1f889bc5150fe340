"""A run may end at any moment: what was found stays found, and the next run ends where a clean index would.

EPIC_RAG_SOAK=1 kills 60 times; the default is a few. A failure names the seed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.conftest import read_rows
from tests.soak import worker
from tests.soak.worker import Job, Pool

SOAK = os.environ.get("EPIC_RAG_SOAK") == "1"
KILLS = 60 if SOAK else 6
FILES = 90 if SOAK else 40
INTERRUPTS = 30 if SOAK else 3
LIMITED = 20 if SOAK else 3
REPORT = Path(__file__).parents[2] / "runs" / "soak" / "crash.json"

# Of a file, the texts of its passages.
Texts = dict[str, tuple[str, ...]]
# The files that are found, by the way to search.
Found = dict[str, Texts]

SEED = int(os.environ.get("EPIC_RAG_SOAK_SEED", "1"))
WORDS = ("alpha", "beta", "gamma", "delta", "river", "stone", "cloud", "green", "under", "seven", "paper", "light")


class Library:
    """A folder of files that are edited at random; no two passages are alike."""

    def __init__(self, folder: Path, chance: random.Random, files: int) -> None:
        self.folder = folder
        self._chance = chance
        self._made = 0
        self._passages = 0
        self._left_alone: frozenset[str] = frozenset()
        # Every passage that a path ever had.
        self.history: defaultdict[str, set[str]] = defaultdict(set)
        folder.mkdir()
        for _ in range(files):
            self.add()

    def _passage(self) -> str:
        self._passages += 1
        words = " ".join(self._chance.choice(WORDS) for _ in range(self._chance.randint(15, 24)))
        return f"unique{self._passages:05} {words}"

    def leave_alone(self, *folders: str) -> None:
        """Never change what lies in these folders."""
        self._left_alone = frozenset(folders)

    def _paths(self) -> list[Path]:
        """The files that may be changed."""
        return [path for path in self._every_path() if self._left_alone.isdisjoint(path.parts)]

    def _every_path(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*.txt") if ".epic-rag" not in path.parts)

    def add(self) -> None:
        self._made += 1
        path = self.folder / self._chance.choice(["", "sub", "sub/deep"]) / f"file{self._made:04}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(self._passage() for _ in range(self._chance.randint(1, 6))) + "\n")

    def edit(self) -> None:
        path = self._chance.choice(self._paths())
        passages = path.read_text().rstrip("\n").split("\n\n")
        at = self._chance.randrange(len(passages))
        match self._chance.randrange(3):
            case 0:
                passages[at] = self._passage()
            case 1:
                passages.insert(at, self._passage())
            case _ if len(passages) > 1:
                del passages[at]
        path.write_text("\n\n".join(passages) + "\n")

    def rename(self) -> None:
        path = self._chance.choice(self._paths())
        self._made += 1
        path.rename(path.with_name(f"file{self._made:04}.txt"))

    def move_passage(self) -> None:
        """From one file to another."""
        source, target = self._chance.sample(self._paths(), 2)
        passages = source.read_text().rstrip("\n").split("\n\n")
        if len(passages) > 1:
            moved = passages.pop(self._chance.randrange(len(passages)))
            source.write_text("\n\n".join(passages) + "\n")
            target.write_text(target.read_text() + "\n" + moved + "\n")

    def delete(self) -> None:
        self._chance.choice(self._paths()).unlink()

    def change(self) -> None:
        for step, times in ((self.add, 8), (self.edit, 12), (self.rename, 5), (self.move_passage, 4), (self.delete, 5)):
            for _ in range(self._chance.randint(0, times)):
                step()

    def change_once(self) -> None:
        self._chance.choice([self.add, self.edit, self.edit, self.rename, self.move_passage, self.delete])()

    def texts(self) -> Texts:
        """What the files hold now."""
        now = {
            path.relative_to(self.folder).as_posix(): tuple(path.read_text().rstrip("\n").split("\n\n"))
            for path in self._every_path()
        }
        for path, texts in now.items():
            self.history[path].update(texts)
        return now


def assert_nothing_is_lost(pool: Pool, library: Library, before: Found) -> Found:
    """Every file that was found before and is still there, under whatever name, is found, as it was or as it is.

    Returns:
        For each way to search, the files that are found now, with the texts that they are found with.
    """
    now = library.texts()
    by_content = {texts: path for path, texts in now.items()}
    asked = sorted({text for files in (*before.values(), now) for texts in files.values() for text in texts})
    found = pool.run("find", library.folder, texts=asked)
    visible: dict[str, set[tuple[str, str]]] = {
        mode: {(path, text) for hits in each for path, text in hits} for mode, each in found.items()
    }
    for mode, each in found.items():
        for text, hits in zip(asked, each, strict=True):
            # Never an answer that the file does not hold and never held.
            for path, shown in hits:
                assert shown in library.history[path], (mode, path, shown)
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
    """What has a vector in the index, by the hash of what the model reads."""
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


def assert_clean(pool: Pool, library: Library, place: Path) -> None:
    """Finish the work, and compare with an index that was made in one go."""
    index_dir = library.folder / ".epic-rag"
    stored = stored_hashes(index_dir)
    report = pool.run("index", library.folder)
    copy = Path(shutil.copytree(library.folder, place / "copy", ignore=shutil.ignore_patterns(".epic-rag")))
    pool.run("index", copy)
    found, expected = read_rows(index_dir), read_rows(copy / ".epic-rag")
    assert {row: value[:2] for row, value in found.items()} == {row: value[:2] for row, value in expected.items()}
    for row, (_, _, vector) in found.items():
        assert vector == pytest.approx(expected[row][2], abs=1e-6)
    wanted = {metadata["embedded_hash"] for _, metadata, _ in expected.values()}
    assert report["chunks_embedded"] == len(wanted - stored)
    assert not (index_dir / "running.json").exists()
    words = [
        {row[0] for row in sqlite3.connect(next(folder.glob("keywords-*.sqlite"))).execute("SELECT id FROM chunks")}
        for folder in (index_dir, copy / ".epic-rag")
    ]
    assert words[0] == words[1] == set(found)
    shutil.rmtree(copy)


def graph_state(index_dir: Path) -> tuple[int, ...]:
    return tuple(path.stat().st_mtime_ns for path in sorted(index_dir.glob("chroma/*/*.bin")))


def kill_at_random(job: Job, chance: random.Random, seconds: float) -> None:
    time.sleep(chance.uniform(0.0, seconds))
    job.send(signal.SIGKILL)


def kill_while_the_graph_is_written(job: Job, chance: random.Random, index_dir: Path) -> None:
    """At one of the moments when Chroma overwrites its graph."""
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
    """Just after index.json says something else: a collection is about to take another's place."""
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


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with worker.pool(tmp_path_factory.mktemp("answers")) as made:
        yield made


def test_killed_at_any_moment(pool: Pool, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    library = Library(tmp_path / "docs", chance, files=FILES)
    index_dir = library.folder / ".epic-rag"
    before: Found = {}
    killed: Counter[str] = Counter()
    torn = 0
    seconds = 1.0
    number = 0
    while killed.total() < KILLS:
        number += 1
        rebuild = number % 4 == 3
        way = chance.choice(["time", "graph", "graph", "swap" if rebuild or number < 3 else "time"])
        started = time.monotonic()
        job = pool.start("index", library.folder, rebuild=rebuild, pause=0.005)
        if way == "time":
            kill_at_random(job, chance, seconds)
        elif way == "graph":
            kill_while_the_graph_is_written(job, chance, index_dir)
        else:
            kill_at_the_swap(job, chance, index_dir)
        answer = job.wait()
        if answer is None:
            killed[way] += 1
        else:
            assert "result" in answer, answer["trace"]
            seconds = 0.5 * seconds + 0.5 * (time.monotonic() - started)
        running = index_dir / "running.json"
        if running.exists():
            torn += json.loads(running.read_text())["busy"] is not None
        if (index_dir / "index.json").exists():
            before = assert_nothing_is_lost(pool, library, before)
        if number % 3:
            assert_clean(pool, library, tmp_path)
            before = assert_nothing_is_lost(pool, library, before)
            assert set(before) == {"dense", "keyword"}
            assert all(files == library.texts() for files in before.values())
        # Otherwise it is killed once more, upon what the last one left.
        library.change()
    report("kills", {"kills": killed.total(), "by_moment": dict(killed), "while_chroma_wrote": torn, "seed": SEED})


def test_interrupted_at_any_moment(pool: Pool, tmp_path: Path) -> None:
    chance = random.Random(SEED + 1)
    library = Library(tmp_path / "docs", chance, files=FILES)
    before: Found = {}
    done = 0
    seconds = 0.7
    while done < INTERRUPTS:
        started = time.monotonic()
        job = pool.start("index", library.folder, pause=0.005, rebuild=done % 5 == 4)
        time.sleep(chance.uniform(0.05, seconds))
        job.send(signal.SIGINT)
        answer = job.wait()
        assert answer is not None, job.errors()
        if "result" in answer:
            seconds = 0.5 * seconds + 0.5 * (time.monotonic() - started)
        else:
            assert answer["error"] == "KeyboardInterrupt", answer["trace"]
            done += 1
        if (library.folder / ".epic-rag/index.json").exists():
            before = assert_nothing_is_lost(pool, library, before)
        if done % 2:
            assert_clean(pool, library, tmp_path)
            before = assert_nothing_is_lost(pool, library, before)
        library.change()
    report("interrupts", {"interrupts": done, "seed": SEED + 1})


@pytest.mark.parametrize("limit", ["RLIMIT_FSIZE", "RLIMIT_AS"])
def test_a_full_disk_or_memory(pool: Pool, tmp_path: Path, limit: str) -> None:
    """No file may grow beyond, or no memory be had beyond, a limit that is met somewhere in the run."""
    chance = random.Random(SEED + 2)
    library = Library(tmp_path / "docs", chance, files=FILES)
    index_dir = library.folder / ".epic-rag"
    before: Found = {}
    outcomes: Counter[str] = Counter()
    for number in range(LIMITED):
        value = chance.randint(4_000, 900_000) if limit == "RLIMIT_FSIZE" else chance.randint(0, 40 * 2**20)
        job = pool.start("index", library.folder, limits={limit: value}, rebuild=number % 4 == 3)
        answer = job.wait()
        if answer is None:
            outcomes["died"] += 1  # as by a signal: C++ and Rust end the process when memory is refused
        elif "result" in answer:
            outcomes["fitted"] += 1
        else:
            assert answer["expected"], answer["trace"]
            assert "epic-rag index" in answer["message"]
            outcomes["refused"] += 1
        if (index_dir / "index.json").exists():
            before = assert_nothing_is_lost(pool, library, before)
        if number % 2:
            assert_clean(pool, library, tmp_path)
            before = assert_nothing_is_lost(pool, library, before)
        library.change()
    report(limit, {"runs": LIMITED, **outcomes, "seed": SEED + 2})


def report(name: str, facts: dict[str, Any]) -> None:
    """Add to the file that docs/reliability.md is filled from; only full counts go there."""
    if not SOAK:
        return
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    REPORT.write_text(json.dumps({**known, name: facts}, indent=2) + "\n")
