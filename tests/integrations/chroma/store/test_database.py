"""Index database: transactions, snapshots, replacement, and files that are damaged, foreign or forbidden."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag_chroma.errors import (
    IndexDamagedError,
    IndexMismatchError,
    IndexNotFoundError,
    IndexStateError,
)
from epic_rag_chroma.store.database import IndexDatabase, Record
from epic_rag_chroma.store.paths import DATABASE_FILE, FileStamp
from epic_rag_chroma.store.state import FileEntry, IndexState, MirrorState
from epic_rag_chroma.types import IndexSettings
from tests.helpers.users import as_another_user, make_readable

ENTRY = FileEntry("digest", 2, FileStamp(10, 2**62, 3, 4), 2**62)
STATE = IndexState("tiny", "tiny", "fingerprint", 4, IndexSettings(include=("*.md",)), ("..",))


def record(name: str, *, text: str = "", document: str = "doc", vector: int = 0) -> Record:
    metadata: dict[str, Any] = {"doc_id": document, "embedded_hash": f"hash of {vector}", "path": "a.md", "page": 3}
    return Record(name, text or f"text of {name}", metadata, np.eye(4, dtype=np.float32)[vector])


def content(database: IndexDatabase) -> tuple[Any, ...]:
    """Return everything that a database holds, by its public methods."""
    with database.snapshot():
        rows = [(row.id, row.text, row.metadata, row.vector.tolist()) for page in database.pages() for row in page]
        return (
            rows,
            database.files(),
            database.match("text of everything", 100),
            [part.tolist() for part in database.vectors_after(-1)],
            database.numbers().tolist(),
            database.count(),
            database.version(),
            database.state(),
            sorted(database.unmirrored()),
        )


@pytest.fixture
def database(tmp_path: Path) -> Iterator[IndexDatabase]:
    """An index of three chunks in one file, its run finished."""
    (tmp_path / "index").mkdir()
    made = IndexDatabase.open(tmp_path / "index" / DATABASE_FILE)
    with made.transaction():
        made.put([record("a"), record("b", vector=1), record("c", vector=2)])
        made.put_file(("..", "a.md"), ENTRY)
    made.finish_run(STATE)
    yield made
    made.close()


def test_round_trip(database: IndexDatabase) -> None:
    many = [record(f"n{number}", document=f"doc{number}", vector=3) for number in range(2500)]  # several statements
    with database.transaction():
        database.put(many)
    ids = [row.id for row in many]
    found = database.get([*ids, "unknown"])
    assert {row_id: (row.text, row.metadata) for row_id, row in found.items()} == {
        row.id: (row.text, row.metadata) for row in many
    }
    assert all((row.vector == many[0].vector).all() and row.vector.dtype == np.float32 for row in found.values())
    assert [row.id for page in database.pages() for row in page] == ["a", "b", "c", *ids]
    numbers = database.numbers_of(ids)
    assert database.ids(numbers) == dict(zip(sorted(numbers), ids, strict=True))
    assert database.ids_by_document(["doc5", "none"]) == {"doc5": {"n5"}, "none": set()}
    assert {number: metadata["doc_id"] for number, metadata in database.scan()}[max(numbers)] == "doc2499"
    assert database.files() == {("..", "a.md"): ENTRY}
    assert (database.file(("..", "a.md")), database.file(("..", "b.md"))) == (ENTRY, None)
    assert database.state() == STATE


def test_numbers_are_never_used_again(database: IndexDatabase) -> None:
    assert database.numbers().tolist() == [1, 2, 3]
    with database.transaction():
        database.delete(["c"])
        database.put([record("c"), record("a", vector=3)])
    database.close()
    with closing(IndexDatabase.open(database.path)) as again:
        with again.transaction():
            again.delete(["a", "c"])
            again.put([record("d")])
        assert again.numbers().tolist() == [2, 6]


def test_vectors_of_deleted_chunks_stay_until_the_run_ends(database: IndexDatabase) -> None:
    with database.transaction():
        database.delete(["b"])
    assert database.vectors_by_hash(["hash of 1", "hash of 2", "x"]).keys() == {"hash of 1", "hash of 2"}
    assert database.is_unfinished
    database.finish_run(STATE)
    assert database.vectors_by_hash(["hash of 1", "hash of 2"]).keys() == {"hash of 2"}
    assert not database.is_unfinished


def test_failed_transaction_changes_nothing(database: IndexDatabase) -> None:
    before = content(database)

    def fail() -> None:
        with database.transaction():
            database.put([record("a", text="other"), record("d")])
            database.update_metadata(["b"], [{"doc_id": "moved"}])
            database.delete(["c"])
            database.put_file(("..", "b.md"), ENTRY)
            database.delete_files([("..", "a.md")])
            database.save_state(IndexState("other", "other", "x", 4, IndexSettings(), ()))
            assert database.count() == 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert content(database) == before
    assert not database.is_unfinished
    with database.transaction():
        database.put([record("d")])
    assert database.count() == 4


def test_snapshots(database: IndexDatabase) -> None:
    """A reader sees one state during a snapshot, and the last commit after it; nobody waits."""
    with closing(IndexDatabase.open_reading(database.path)) as reader:
        before = content(reader)
        with reader.snapshot():
            reader.count()
            with database.transaction():
                database.put([record("a", text="other"), record("d")])
                database.delete(["c"])
                database.put_file(("..", "b.md"), ENTRY)
                assert reader.count() == 3
            assert reader.get(["a", "b", "c", "d"]).keys() == {"a", "b", "c"}
            assert [row_id for row_id, _ in reader.match("text of everything", 9)] == ["a", "b", "c"]
            assert (reader.version(), reader.files()) == (before[6], before[1])
        assert content(reader) == content(database) != before
        with pytest.raises(IndexStateError, match="cannot be written"), reader.transaction():
            reader.delete(["a"])


@pytest.mark.parametrize("collection", [None, "mine"])
def test_replaced_while_it_is_read(database: IndexDatabase, collection: str | None) -> None:
    database.end_mirror(collection)
    other = IndexDatabase.open(database.path.with_name("rebuild.sqlite"))
    with other.transaction():
        other.put([record("x", vector=3)])
    other.finish_run(STATE)
    expected = content(other)
    other.close()
    with closing(IndexDatabase.open_reading(database.path)) as reader:
        before = content(reader)
        with reader.snapshot():
            reader.count()
            database.replace_by(other.path)
            assert [row.id for page in reader.pages() for row in page] == ["a", "b", "c"]
            assert reader.version() == before[6]
        assert content(reader)[:-1] == content(database)[:-1] == expected[:-1]
        assert reader.mirror() == MirrorState(collection, is_dirty=True)
    assert [path.name for path in database.path.parent.iterdir() if path.name.startswith("rebuild")] == []
    assert not database.is_unfinished


def test_mirror(database: IndexDatabase) -> None:
    assert (database.mirror(), sorted(database.unmirrored())) == (MirrorState(is_behind=True), ["a", "b", "c"])
    database.begin_mirror("mine")
    assert database.mirror() == MirrorState("mine", is_dirty=True, is_behind=True)
    database.end_mirror("mine")
    assert (database.mirror(), database.unmirrored()) == (MirrorState("mine"), [])
    assert database.mirror().is_complete
    with database.transaction():
        database.delete(["b"])
        database.update_metadata(["a"], [{"doc_id": "moved"}])
    assert (database.mirror(), sorted(database.unmirrored())) == (MirrorState("mine", is_behind=True), ["a", "b"])


# -- files in any condition ----------------------------------------------------------------------------------------


def overwrite_pages(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))


def drop_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE chunks")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "random": lambda path: path.write_bytes(os.urandom(5000)),
    "text": lambda path: path.write_text("no database at all\n" * 300),
    "header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "random pages": overwrite_pages,
    "no table": drop_table,
}


def read_all(path: Path) -> tuple[Any, ...]:
    with closing(IndexDatabase.open_reading(path)) as reader:
        return content(reader)


def write_one(path: Path) -> None:
    with closing(IndexDatabase.open(path)) as writer, writer.transaction():
        writer.put([record("new")])
        writer.put_file(("..", "new.md"), ENTRY)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(database: IndexDatabase, damage: str) -> None:
    database.close()
    DAMAGES[damage](database.path)
    damaged = database.path.read_bytes()
    for call in (read_all, write_one):
        with pytest.raises(IndexDamagedError, match=r"index\.sqlite cannot be read \(.+\)\. Run `epic-rag index --reb"):
            call(database.path)
    if damage != "no table":
        assert database.path.read_bytes() == damaged


def test_damage_is_found_after_a_crash(database: IndexDatabase) -> None:
    """A run after one that did not finish checks all pages before it writes."""
    with database.transaction():
        database.put([record(f"n{number}", text=f"word{number} " * 100) for number in range(100)])
    database.close()
    with open(database.path, "r+b") as file:
        file.seek(database.path.stat().st_size - 4096 * 3)
        file.write(b"\xff" * 4096)
    with pytest.raises(IndexDamagedError):
        IndexDatabase.open(database.path)


def test_file_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / DATABASE_FILE
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE settings (name, value)")
        connection.execute("INSERT INTO settings VALUES ('id', 'mine')")
    before = path.read_bytes()
    for call in (read_all, write_one):
        with pytest.raises(IndexStateError, match=r"is a database of another program\. Run .* --index-dir") as caught:
            call(path)
        assert not isinstance(caught.value, IndexDamagedError)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [DATABASE_FILE]


def test_other_format(database: IndexDatabase) -> None:
    database.close()
    with closing(sqlite3.connect(database.path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    for call in (read_all, write_one):
        with pytest.raises(IndexMismatchError, match=r"has format 99, this version .* Run `pip install --upgrade"):
            call(database.path)


def test_settings_that_are_none(database: IndexDatabase) -> None:
    for text in ("{", "[]", "{}", "[" * 100_000, '{"settings": {"chunk_tokens": 0}}'):
        with closing(sqlite3.connect(database.path)) as connection, connection:
            connection.execute("UPDATE settings SET value = ? WHERE name = 'state'", (text,))
        with pytest.raises(IndexDamagedError, match=r"its settings: .*--rebuild"):
            database.state()


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b""), sqlite3.connect])
def test_empty_file(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    """A process that died while it created the file leaves an empty one."""
    made = make(tmp_path / DATABASE_FILE)
    if isinstance(made, sqlite3.Connection):
        made.execute(f"PRAGMA application_id = {0x45504943}")
        made.close()
    with pytest.raises(IndexNotFoundError, match="Run `epic-rag index PATH`"):
        read_all(tmp_path / DATABASE_FILE)
    write_one(tmp_path / DATABASE_FILE)
    assert read_all(tmp_path / DATABASE_FILE)[5] == 1


def test_missing_file_and_folder_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / DATABASE_FILE
    with pytest.raises(IndexStateError, match=r"is missing\. Run `epic-rag index`"):
        read_all(path)
    assert not path.exists()
    path.mkdir()
    for call in (read_all, write_one):
        with pytest.raises(IndexStateError) as caught:
            call(path)
        assert not isinstance(caught.value, IndexDamagedError)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to become another user")
def test_permissions(database: IndexDatabase) -> None:
    """Another user may read a read-only folder, without leaving a file, and gets a remedy for all else."""
    expected = content(database)
    database.close()
    folder = database.path.parent
    make_readable(folder)
    with as_another_user():
        assert read_all(database.path) == expected
        with pytest.raises(
            IndexStateError, match=r"Permission denied \(.*Stored data is intact\. Make it writable"
        ) as caught:
            write_one(database.path)
        assert not isinstance(caught.value, IndexDamagedError)
    assert [path.name for path in folder.iterdir()] == [DATABASE_FILE]
    database.path.chmod(0)
    with as_another_user():
        for call in (read_all, write_one):
            with pytest.raises(IndexStateError, match=r"permission|permissions") as caught:
                call(database.path)
            assert not isinstance(caught.value, IndexDamagedError)
    database.path.chmod(0o644)
    assert read_all(database.path) == expected


@pytest.mark.skipif(os.name != "posix", reason="file permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        database = IndexDatabase.open(tmp_path / DATABASE_FILE)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        database.close()
    finally:
        os.umask(before)
    assert set(modes.values()) == {mode}
    assert DATABASE_FILE in modes


def test_copied_file_is_complete(database: IndexDatabase, tmp_path: Path) -> None:
    """One file is the index: a copy of it has everything."""
    expected = content(database)
    database.close()
    shutil.copy(database.path, tmp_path / "copy.sqlite")
    assert read_all(tmp_path / "copy.sqlite") == expected
