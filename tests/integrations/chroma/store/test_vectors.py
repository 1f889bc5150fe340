"""Exact vector search: in any process and after any history, the result of a brute-force search over all rows."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from epic_rag_chroma.store.database import IndexDatabase, Record
from epic_rag_chroma.store.paths import DATABASE_FILE, REBUILD_FILE, VECTORS_FILE
from epic_rag_chroma.store.vectors import OLD_ROWS, VectorSearch, write_vectors

DIM = 3
# Products of these are exact in float32, and many are equal.
QUERIES = [np.array(each, dtype=np.float32) for each in ([0.5, -0.25, 0.125], [0, 1, 1])]
IDS = st.sampled_from([f"chunk{number}" for number in range(12)])
VECTORS = st.tuples(*[st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0])] * DIM)
Found = list[tuple[str, float]]


def record(name: str, vector: tuple[float, ...], text: str = "some text") -> Record:
    metadata = {"doc_id": name, "embedded_hash": str(vector), "path": f"{name}.md"}
    return Record(name, text, metadata, np.array(vector, dtype=np.float32))


def brute_force(rows: list[Record], query: np.ndarray, k: int) -> Found:
    """Rank rows one by one."""
    scored = [(row.id, float(np.dot(row.vector, query))) for row in rows]
    return sorted(scored, key=lambda each: (-each[1], each[0]))[:k]


def check(search: VectorSearch, database: IndexDatabase) -> None:
    """Compare a search with brute force over the same snapshot."""
    with database.snapshot():
        rows = [row for page in database.pages() for row in page]
        numbers = database.numbers_of([row.id for row in rows[::2]])
        for query in QUERIES:
            for k in (0, 1, 3, 100):
                assert search.nearest(query, k) == brute_force(rows, query, k)
            assert search.nearest(query, 2, {*numbers, 10_000}) == brute_force(rows[::2], query, 2)
            assert search.nearest(query, 4, []) == []


class Histories(RuleBasedStateMachine):
    """Any sequence of writes, copies to the file and rebuilds."""

    @initialize()
    def create(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.writer = IndexDatabase.open(self.folder / DATABASE_FILE)
        self.reader = IndexDatabase.open_reading(self.folder / DATABASE_FILE)
        # One searches after each write, the other after several.
        self.search, self.seldom = VectorSearch(self.reader), VectorSearch(self.reader)

    def teardown(self) -> None:
        self.reader.close()
        self.writer.close()
        shutil.rmtree(self.folder)

    @rule(rows=st.dictionaries(IDS, VECTORS, min_size=1, max_size=6))
    def put(self, rows: dict[str, tuple[float, ...]]) -> None:
        with self.writer.transaction():
            self.writer.put([record(*row) for row in rows.items()])

    @rule(ids=st.sets(IDS, max_size=4))
    def delete(self, ids: set[str]) -> None:
        with self.writer.transaction():
            self.writer.delete(ids)

    @rule()
    def update(self) -> None:
        with self.writer.transaction():
            known = self.writer.get([f"chunk{number}" for number in range(4)])
            self.writer.update_metadata(list(known), [{**row.metadata, "lang": "x"} for row in known.values()])

    @rule(rows=st.dictionaries(IDS, VECTORS, max_size=6))
    def rebuild(self, rows: dict[str, tuple[float, ...]]) -> None:
        new = IndexDatabase.open(self.folder / REBUILD_FILE)
        with new.transaction():
            new.put([record(*row) for row in rows.items()])
        new.close()
        self.writer.replace_by(self.folder / REBUILD_FILE)

    @rule(old_rows=st.sampled_from([0, 3, OLD_ROWS]))
    def write_file(self, old_rows: int) -> None:
        write_vectors(self.writer, old_rows=old_rows)

    @rule()
    def lose_file(self) -> None:
        (self.folder / VECTORS_FILE).unlink(missing_ok=True)

    @rule()
    def search_after_several_writes(self) -> None:
        check(self.seldom, self.reader)

    @rule()
    def search_in_a_new_process(self) -> None:
        fresh = IndexDatabase.open_reading(self.folder / DATABASE_FILE)
        check(VectorSearch(fresh), fresh)
        fresh.close()

    @invariant()
    def search_after_each_write(self) -> None:
        check(self.search, self.reader)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[IndexDatabase]:
    """Three chunks with a current file of vectors."""
    made = IndexDatabase.open(tmp_path / DATABASE_FILE)
    with made.transaction():
        made.put([record("a", (1.0, 0.0, 0.0)), record("b", (0.0, 1.0, 0.0)), record("c", (0.0, 1.0, 0.0))])
    write_vectors(made)
    yield made
    made.close()


def test_snapshot_older_than_the_file(database: IndexDatabase) -> None:
    reader = IndexDatabase.open_reading(database.path)
    search = VectorSearch(reader)
    with reader.snapshot():
        before = [row for page in reader.pages() for row in page]
        with database.transaction():
            database.delete(["a"])
            database.put([record("d", (0.0, 0.0, 1.0)), record("b", (-1.0, 0.0, 0.0))])
        write_vectors(database, old_rows=0)
        for query in QUERIES:
            assert search.nearest(query, 9) == brute_force(before, query, 9)
    check(search, reader)
    reader.close()


def test_database_restored_without_the_file(database: IndexDatabase, tmp_path: Path) -> None:
    database.close()
    backup = shutil.copy(database.path, tmp_path / "backup")
    lost = IndexDatabase.open(database.path)
    with lost.transaction():
        lost.put([record("d", (0.0, 0.0, 1.0)), record("e", (0.0, -1.0, 1.0))])
    write_vectors(lost, old_rows=0)
    lost.close()
    shutil.copy(backup, lost.path)
    restored = IndexDatabase.open(lost.path)
    assert restored.count() == 3
    check(VectorSearch(restored), restored)
    with restored.transaction():  # the same number of changes and of rows, with other vectors under the same numbers
        restored.put([record("d", (1.0, 1.0, 1.0)), record("e", (1.0, -1.0, -1.0))])
    check(VectorSearch(restored), restored)
    write_vectors(restored)
    check(VectorSearch(restored), restored)
    restored.close()


def of_another_index(path: Path) -> None:
    other = IndexDatabase.open(path.with_name("other.sqlite"))
    with other.transaction():
        other.put([record(name, (-1.0, -1.0, -1.0)) for name in "abc"])
    write_vectors(other)
    other.close()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "random": lambda path: path.write_bytes(os.urandom(3000)),
    "zeros": lambda path: path.write_bytes(path.read_bytes()[:64] + bytes(path.stat().st_size - 64)),
    "huge count": lambda path: path.write_bytes(path.read_bytes()[:48] + b"\xff" * 8 + path.read_bytes()[56:]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another index's": of_another_index,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file(database: IndexDatabase, damage: str) -> None:
    path = database.path.with_name(VECTORS_FILE)
    search = VectorSearch(database)
    for name in "de":
        with database.transaction():
            database.put([record(name, (0.0, 0.0, 1.0))])
        if name == "d":
            check(search, database)
    write_vectors(database, old_rows=0)
    DAMAGES[damage](path)
    check(search, database)  # has mapped the file before
    check(VectorSearch(database), database)
    if path.is_dir():
        path.rmdir()
    write_vectors(database)
    loaded = path.read_bytes()
    assert len(loaded) == 64 + 5 * (8 + 4 * DIM)
    check(VectorSearch(database), database)
    write_vectors(database)
    assert path.read_bytes() == loaded  # it is current


def test_file_is_kept_while_little_of_it_is_old(database: IndexDatabase) -> None:
    path = database.path.with_name(VECTORS_FILE)
    before = path.read_bytes()
    with database.transaction():
        database.delete(["a"])
        database.put([record("d", (0.0, 0.0, 1.0))])
    write_vectors(database)
    write_vectors(database, old_rows=2)
    assert path.read_bytes() == before
    write_vectors(database, old_rows=1)
    assert path.read_bytes() != before
    assert list(path.parent.glob(".*")) == []


def test_empty_index(tmp_path: Path) -> None:
    database = IndexDatabase.open(tmp_path / DATABASE_FILE)
    write_vectors(database)
    check(VectorSearch(database), database)
    database.close()
