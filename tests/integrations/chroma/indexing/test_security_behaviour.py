"""Index folders of other users, or damaged: a clear error or a repair."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import epic_rag_chroma
from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer
from epic_rag_chroma.errors import IndexStateError
from epic_rag_chroma.store.database import IndexDatabase
from epic_rag_chroma.store.layout import TRUSTED_VARIABLE, check_owner, is_safe_relative_path
from epic_rag_chroma.store.paths import DATABASE_FILE, VECTORS_FILE
from tests.helpers.indexes import FILES
from tests.helpers.users import NOBODY, as_another_user, make_readable

Calls = list[Callable[[], Any]]


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: EpicEncoder) -> Path:
    """A folder of three files with its index, to be copied."""
    folder = tmp_path_factory.mktemp("indexed") / "docs"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with ChromaIndexer(folder / ".epic-rag", encoder=tiny_encoder) as indexer:
        indexer.index([folder])
    return folder


@pytest.fixture
def docs(indexed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(indexed, tmp_path / "docs"))


@pytest.fixture
def calls(indexer: ChromaIndexer, docs: Path) -> Calls:
    """All calls on an existing index."""
    return [
        lambda: indexer.query("x"),
        lambda: indexer.query("cats", mode="keyword"),
        indexer.status,
        lambda: indexer.index([docs]),
        lambda: indexer.plan([docs]),
        indexer.clear,
    ]


def pretend_to_be(patch: pytest.MonkeyPatch, user: int) -> None:
    patch.setattr(os, "geteuid", lambda: user)


@pytest.mark.parametrize("name", [".", DATABASE_FILE, VECTORS_FILE, "chroma"])
def test_index_of_another_user(calls: Calls, docs: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = docs / ".epic-rag" / name
    original = Path.stat

    def owned(self: Path, **options: Any) -> os.stat_result:
        info = original(self, **options)
        if self.name != place.name:
            return info
        return os.stat_result((*info[:4], 4242, *info[5:10]))

    monkeypatch.setattr(Path, "stat", owned)
    pretend_to_be(monkeypatch, 1000)
    for call in calls:
        with pytest.raises(
            IndexStateError, match=r"belongs to user 4242 and you are .*EPIC_RAG_TRUSTED_INDEX=.*\.epic-rag"
        ):
            call()
    monkeypatch.setenv(TRUSTED_VARIABLE, f"/elsewhere{os.pathsep}{docs / '.epic-rag'}")
    check_owner(docs / ".epic-rag")
    monkeypatch.setenv(TRUSTED_VARIABLE, "*")
    check_owner(docs / ".epic-rag")


@pytest.mark.parametrize(
    ("user", "owner", "fine"), [(0, 1000, True), (1000, 0, True), (1000, 1000, True), (1000, 1001, False)]
)
def test_trusted_owners(tmp_path: Path, user: int, owner: int, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path.stat()
    monkeypatch.setattr(Path, "stat", lambda *_, **__: os.stat_result((*info[:4], owner, *info[5:10])))
    pretend_to_be(monkeypatch, user)
    if fine:
        check_owner(tmp_path)
    else:
        with pytest.raises(IndexStateError):
            check_owner(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users here")
@pytest.mark.parametrize("name", [".", DATABASE_FILE, "chroma"])
def test_world_writable_index(calls: Calls, docs: Path, name: str) -> None:
    place = docs / ".epic-rag" / name
    mode = stat.S_IMODE(place.stat().st_mode)
    place.chmod(mode | stat.S_IWOTH)
    for call in calls:
        with pytest.raises(IndexStateError, match=r"Every user may write to .*Run `chmod o-w "):
            call()
    place.chmod(mode)
    for call in calls:
        call()


BROKEN: dict[str, Callable[[Path], object]] = {
    "random": lambda path: path.write_bytes(os.urandom(3000)),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "text": lambda path: path.write_text("[" * 100_000),
}


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return the result of a call, or the message of its error."""
    try:
        return call(), ""
    except IndexStateError as error:
        return None, str(error)


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("name", [DATABASE_FILE, VECTORS_FILE, "chroma/chroma.sqlite3", "lock.holder"])
def test_broken_files(docs: Path, tiny_encoder: EpicEncoder, name: str, how: str) -> None:
    """Broken files give hits of the index or a remedy, and following it gives an index."""
    index_dir = docs / ".epic-rag"
    with ChromaIndexer(index_dir, encoder=tiny_encoder) as indexer:
        expected = {hit.id for hit in indexer.query("cats", k=9, mode="dense")}
    path = index_dir / name
    path.touch()
    BROKEN[how](path)
    with ChromaIndexer(index_dir, encoder=tiny_encoder) as indexer:
        for mode in ("dense", "hybrid", "keyword"):
            hits, message = attempt(lambda mode=mode: indexer.query("cats", k=9, mode=mode))  # type: ignore[misc]
            assert "Run `epic-rag" in message or {hit.id for hit in hits or ()} <= expected
        attempt(indexer.status)
        attempt(lambda: indexer.plan([docs]))
        report, message = attempt(lambda: indexer.index([docs]))
        if report is None:
            assert "un `epic-rag" in message
            if path.is_dir():
                path.rmdir()
            indexer.index([docs], rebuild=True)
        assert {hit.id for hit in indexer.query("cats", k=9, mode="dense")} == expected
        assert indexer.query("cats", mode="keyword")[0].path == "notes.txt"
        assert indexer.index([docs]).unchanged == 3


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("a.md", True),
        ("a/b c/..d.md", True),
        ("../a", False),
        ("a/../../b", False),
        ("/etc/passwd", False),
        ("", False),
        ("a\0b", False),
    ],
)
def test_safe_relative_paths(path: str, inside: bool) -> None:
    assert is_safe_relative_path(path) is inside


@pytest.mark.parametrize("path", ["../../../../etc/passwd", "/etc/passwd"])
def test_rows_with_hostile_paths(docs: Path, tiny_encoder: EpicEncoder, path: str) -> None:
    database_file = docs / ".epic-rag" / DATABASE_FILE
    with closing(sqlite3.connect(database_file)) as connection, connection:
        ((number, metadata),) = connection.execute("SELECT number, metadata FROM chunks LIMIT 1").fetchall()
        crafted = json.dumps({**json.loads(metadata), "path": path})
        connection.execute("UPDATE chunks SET metadata = ? WHERE number = ?", (crafted, number))
        connection.execute("INSERT INTO files VALUES ('..', ?, '0', 0, NULL, NULL, NULL, NULL, 0)", (path,))
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        for mode in ("dense", "hybrid", "keyword"):
            assert path not in {hit.path for hit in indexer.query("cats", k=9, mode=mode)}
        indexer.index([docs])
        assert len(indexer.query("x", k=9, mode="dense")) == 3
    with closing(IndexDatabase.open_reading(database_file)) as database:
        assert path not in {name for _, name in database.files()}


def test_clear_does_not_follow_links(indexer: ChromaIndexer, docs: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    index_dir = docs / ".epic-rag"
    (index_dir / "chroma").rename(tmp_path / "moved")
    (index_dir / "chroma").symlink_to(precious)
    (index_dir / f"records-{uuid.uuid4()}.sqlite").symlink_to(precious / "file")
    indexer.clear()
    assert (precious / "file").read_text() == "mine"
    assert not index_dir.exists()


def test_file_instead_of_index_folder(docs: Path, tiny_encoder: EpicEncoder) -> None:
    (docs / "plain").write_text("x")
    with pytest.raises(IndexStateError, match="is a file, an index is a folder"):
        ChromaIndexer(docs / "plain", encoder=tiny_encoder).index([docs])


def test_no_pickle() -> None:
    sources = [*Path(epic_rag_chroma.__file__).parent.rglob("*.py")]
    assert len(sources) > 20
    for source in sources:
        text = source.read_text()
        for word in ("import pickle", "pickle.load", "torch.load", "joblib", "eval(", "exec("):
            assert word not in text, (source.name, word)


def delete_companions(docs: Path) -> None:
    """Delete what SQLite needs to open the database with locks, and cannot create in a read-only folder."""
    for companion in (docs / ".epic-rag").glob(f"{DATABASE_FILE}-*"):
        companion.unlink()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to become another user")
def test_read_only_index(docs: Path, tiny_encoder: EpicEncoder) -> None:
    """Query as a user who may only read the index; a run reports the permissions."""
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        expected = [hit.id for hit in indexer.query("cats", k=9, mode="dense")]
    delete_companions(docs)
    make_readable(docs)
    with as_another_user(), ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        assert [hit.id for hit in indexer.query("cats", k=9, mode="dense")] == expected
        assert indexer.query("cats", mode="keyword")[0].path == "notes.txt"
        assert indexer.status().state == "complete"
        with pytest.raises(IndexStateError, match=r"lock: Permission denied \(.* has mode 644 and belongs to root"):
            indexer.index([docs])
        # The owner changes the index; a process that cannot take SQLite's locks follows.
        os.seteuid(0)
        (docs / "notes.txt").write_text("Dogs run.\n")
        with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as owner:
            owner.index([docs])
        delete_companions(docs)
        os.seteuid(NOBODY)
        assert indexer.query("cats", mode="keyword") == []
        assert indexer.query("dogs", mode="keyword")[0].path == "notes.txt"
