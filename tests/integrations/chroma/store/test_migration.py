"""Indexes of format 2 are converted without embedding anything again, or left as they are with a remedy."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer, Hit, IndexReport
from epic_rag_chroma.errors import IndexMismatchError, IndexStateError
from epic_rag_chroma.store import migration
from epic_rag_chroma.store.database import IndexDatabase
from epic_rag_chroma.store.layout import TRUSTED_VARIABLE
from epic_rag_chroma.store.paths import DATABASE_FILE
from tests.helpers.indexes import Rows, assert_same
from tests.helpers.old_indexes import make_old
from tests.helpers.users import as_another_user, make_readable

OLD = ("index.json", "manifest.json", "records-", "keywords-", "running.json")


def results(indexer: ChromaIndexer) -> list[list[Hit]]:
    return [indexer.query("cats sleep", k=9, mode=mode) for mode in ("dense", "hybrid", "keyword")]


def old_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(OLD))


def rows_of(folder: Path) -> Path:
    return next(path for path in folder.glob("records-*.sqlite"))


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing may be embedded."""
    monkeypatch.setattr(EpicEncoder, "encode_document", lambda *_, **__: pytest.fail("embedded"))
    return monkeypatch


@pytest.fixture
def old(docs: Path, indexer: ChromaIndexer) -> Iterator[tuple[Path, list[list[Hit]]]]:
    """An index folder of format 2, and what searches in it found."""
    indexer.index([docs])
    expected = results(indexer)
    indexer.close()
    make_old(docs / ".epic-rag")
    return docs / ".epic-rag", expected


Old = tuple[Path, list[list[Hit]]]


def unchanged(report: IndexReport) -> None:
    assert (report.added, report.changed, report.deleted, report.unchanged) == (0, 0, 0, 3)
    assert (report.chunks_embedded, report.chunks_total) == (0, 4)


def test_conversion(
    old: Old, indexer: ChromaIndexer, docs: Path, rows: Callable[[Path], Rows], never: pytest.MonkeyPatch
) -> None:
    folder, expected = old
    before = rows(folder)
    assert len(old_files(folder)) == 4
    for call in (lambda: indexer.query("cats"), indexer.status, lambda: indexer.plan([docs])):
        with pytest.raises(
            IndexMismatchError, match=r"older version\. Run `epic-rag index --index-dir .*not embedded again"
        ):
            call()
    unchanged(indexer.index([]))
    assert old_files(folder) == []
    assert results(indexer) == expected
    assert_same(rows(folder), before)
    assert indexer.status().state == "complete"
    unchanged(indexer.index([docs]))


def test_crash_while_converting(
    old: Old, indexer: ChromaIndexer, docs: Path, never: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = old

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    before = old_files(folder)
    for owner, name in ((IndexDatabase, "put_file"), (IndexDatabase, "save_state"), (migration, "delete_old")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, die)
            with pytest.raises(KeyboardInterrupt):
                indexer.index([docs])
        assert old_files(folder) == before
        if owner is IndexDatabase:  # not converted yet
            with pytest.raises(IndexMismatchError, match="older version"):
                indexer.query("cats")
    assert results(indexer) == expected
    unchanged(indexer.index([docs]))
    assert old_files(folder) == []
    assert results(indexer) == expected


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def break_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"version": 2, "files": [1]}')


def interrupt_run(folder: Path) -> None:
    """Leave a row and an entry of a file that was being written, and the mark of an unfinished run."""
    (folder / "running.json").write_text("{}")
    with closing(sqlite3.connect(rows_of(folder))) as records, records:
        records.execute("DELETE FROM records WHERE json_extract(metadata, '$.path') = 'notes.txt'")
        records.execute(
            "INSERT INTO records SELECT 99, 'stale', doc_id, 'stale', 'stale', metadata, vector FROM records LIMIT 1"
        )


def lose_rows(folder: Path) -> None:
    with closing(sqlite3.connect(rows_of(folder))) as records, records:
        records.execute("DELETE FROM records WHERE json_extract(metadata, '$.path') = 'notes.txt'")


def lose_keywords(folder: Path) -> None:
    next(folder.glob("keywords-*")).unlink()


@pytest.mark.parametrize(
    ("damage", "embedded"),
    [(lose_manifest, 0), (break_manifest, 0), (interrupt_run, 1), (lose_rows, 1), (lose_keywords, 0)],
)
def test_damaged_parts(
    old: Old, indexer: ChromaIndexer, docs: Path, damage: Callable[[Path], None], embedded: int
) -> None:
    folder, expected = old
    damage(folder)
    assert indexer.index([docs]).chunks_embedded == embedded
    assert results(indexer) == expected
    unchanged(indexer.index([docs]))


def lose_all_rows(folder: Path) -> None:
    rows_of(folder).unlink()


def break_rows(folder: Path) -> None:
    rows_of(folder).write_bytes(os.urandom(5000))


def break_settings(folder: Path) -> None:
    (folder / "index.json").write_text("[" * 100_000)


def lose_settings(folder: Path) -> None:
    (folder / "index.json").unlink()


def make_first_format(folder: Path) -> None:
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**content, "format_version": 1}))


@pytest.mark.parametrize("damage", [lose_all_rows, break_rows, break_settings, lose_settings, make_first_format])
def test_index_that_cannot_be_converted(
    old: Old, indexer: ChromaIndexer, docs: Path, damage: Callable[[Path], None]
) -> None:
    folder, expected = old
    damage(folder)
    before = old_files(folder)
    for _ in range(2):
        with pytest.raises(IndexMismatchError, match=r"cannot be converted \(.+\)\. Run `epic-rag index --rebuild`"):
            indexer.index([docs])
    for call in (lambda: indexer.query("cats"), indexer.status, lambda: indexer.plan([docs])):
        with pytest.raises(IndexMismatchError, match="older version"):
            call()
    assert old_files(folder) == before
    assert indexer.index([docs], rebuild=True).chunks_embedded == 4
    assert old_files(folder) == []
    assert results(indexer) == expected


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to become another user")
def test_forbidden_files_are_never_replaced(
    old: Old, docs: Path, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = old
    make_readable(docs)
    folder.chmod(0o777)
    (folder / "lock").chmod(0o666)
    before = old_files(folder)
    rows_of(folder).chmod(0)
    monkeypatch.setenv(TRUSTED_VARIABLE, str(folder))
    with as_another_user(), ChromaIndexer(folder, encoder=tiny_encoder) as indexer:
        for rebuild in (False, True):
            with pytest.raises(IndexStateError, match=r"may not be read.*permissions"):
                indexer.index([docs], rebuild=rebuild)
    assert old_files(folder) == before
    rows_of(folder).chmod(0o644)
    with ChromaIndexer(folder, encoder=tiny_encoder) as indexer:
        unchanged(indexer.index([docs]))
        assert results(indexer) == expected


def test_place_on_a_server(old: Old, tmp_path: Path) -> None:
    folder, _ = old
    place = {"url": "http://localhost:8000", "tenant": "t", "database": "d", "index_id": "0" * 32}
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**content, "chroma": place}))
    known = migration.old_place(folder)
    assert known is not None
    with closing(IndexDatabase.open(folder / DATABASE_FILE)) as database:
        migration.migrate(folder, database)
        state = database.state()
        assert state is not None
        assert state.chroma == known
        assert not database.mirror().is_complete


def test_rows_of_another_program(docs: Path, tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/records-2024.sqlite").write_bytes(b"mine")
    with ChromaIndexer(tmp_path / "mine", encoder=tiny_encoder) as indexer:
        for call in (lambda: indexer.index([docs]), indexer.clear, lambda: indexer.index([docs], rebuild=True)):
            with pytest.raises(IndexStateError, match=r"contains records-2024\.sqlite and no index|No index in"):
                call()
    assert (tmp_path / "mine/records-2024.sqlite").read_bytes() == b"mine"


def test_index_json_of_another_program(docs: Path, tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.json").write_text('{"pages": []}')
    (tmp_path / "site/chroma").mkdir()
    with ChromaIndexer(tmp_path / "site", encoder=tiny_encoder) as indexer:
        for call in (lambda: indexer.index([docs]), indexer.clear, lambda: indexer.index([docs], rebuild=True)):
            with pytest.raises(IndexStateError, match=r"contains chroma and no index\.sqlite|No index in"):
                call()
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["chroma", "index.json"]
