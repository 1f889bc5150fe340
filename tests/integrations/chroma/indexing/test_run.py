"""`ChromaIndexer.index`: change detection, roots, moved folders, unreadable files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from epic_rag import EpicEncoder, PromptError
from epic_rag.query_prompt import QUERY_STRATEGIES
from epic_rag_chroma import ChromaIndexer, IndexReport
from epic_rag_chroma.indexing import sync
from epic_rag_chroma.store.database import IndexDatabase
from epic_rag_chroma.store.paths import DATABASE_FILE, FileStamp
from epic_rag_chroma.walk.files import FoundFile

Rows = Callable[[Path], dict[str, tuple[str, dict[str, Any], list[float]]]]
Tree = Callable[[Path, dict[str, str | bytes]], Path]


def counts(report: IndexReport) -> tuple[int, int, int, int]:
    return report.added, report.changed, report.deleted, report.unchanged


def test_lines_of_hits(indexer: ChromaIndexer, docs: Path) -> None:
    report = indexer.index([docs])
    assert counts(report) == (3, 0, 0, 0)
    assert report.chunks_embedded == report.chunks_total == 4
    hits = indexer.query("cats", k=10, mode="dense")
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for hit in hits:
        assert Path(hit.root) == docs
        lines = (Path(hit.root) / hit.path).read_text().split("\n")
        assert "\n".join(lines[hit.first_line - 1 : hit.last_line]) == hit.text  # type: ignore[operator]
    assert {(hit.path, hit.heading_path) for hit in hits} == {
        ("guide.md", ("Guide", "Install")),
        ("guide.md", ("Guide", "Remove")),
        ("notes.txt", ()),
        ("src/tool.py", ("encode",)),
    }


def test_cosines(indexer: ChromaIndexer, docs: Path, tiny_encoder: EpicEncoder) -> None:
    indexer.index([docs])
    text = (docs / "notes.txt").read_text().strip()
    for query in ("cats", text):
        expected = tiny_encoder.similarity(tiny_encoder.encode_query(query), tiny_encoder.encode_document([text]))[0, 0]
        hit = next(hit for hit in indexer.query(query, k=10) if hit.path == "notes.txt")
        assert hit.cosine == pytest.approx(float(expected), abs=1e-4)


def test_prompt_of_a_query(indexer: ChromaIndexer, docs: Path) -> None:
    from epic_rag import DemonstrationBank

    indexer.index([docs])
    bank = DemonstrationBank([("where do cats sleep", "Cats sleep in the sun.")], instruction="Find it")
    scores = [
        [hit.cosine for hit in indexer.query("cats", **arguments)]
        for arguments in ({}, {"task": "docs"}, {"bank": bank}, {"bank": bank, "num_demonstrations": 0}, {"k": 4})
    ]
    assert len({tuple(each) for each in scores}) == 4
    assert scores[0] == scores[4]
    by_strategy = {
        strategy: [
            [hit.cosine for hit in indexer.query("cats", bank=bank, strategy=strategy)],
            [hit.cosine for hit in indexer.query_many(["cats"], bank=bank, strategy=strategy)[0]],
        ]
        for strategy in QUERY_STRATEGIES
    }
    assert by_strategy["epic"] == [scores[2], scores[2]]  # a checkpoint's own unless it says otherwise
    assert len({tuple(one) for one, _ in by_strategy.values()}) == len(QUERY_STRATEGIES)
    assert all(one == many for one, many in by_strategy.values())
    with pytest.raises(PromptError, match="Unknown strategy 'best'"):
        indexer.query("cats", bank=bank, strategy=cast("Any", "best"))


def test_incremental_run(indexer: ChromaIndexer, docs: Path, rows: Rows) -> None:
    indexer.index([docs])
    assert counts(indexer.index([docs])) == (0, 0, 0, 3)
    before = rows(docs / ".epic-rag")
    guide = docs / "guide.md"
    guide.write_text("Before.\n\n" + guide.read_text().replace("Delete", "Remove"))
    (docs / "notes.txt").unlink()
    (docs / "new.md").write_text("# New\n\nText.\n")
    report = indexer.index([docs])
    assert counts(report) == (1, 1, 1, 1)
    # "Before.", the changed section and the new file; the section that only moved keeps its vector
    assert (report.chunks_embedded, report.chunks_total) == (3, 5)
    after = rows(docs / ".epic-rag")
    moved = [row for row in after if row in before and after[row][1]["first_line"] != before[row][1]["first_line"]]
    assert len(moved) == 1
    assert after[moved[0]][1]["first_line"] == before[moved[0]][1]["first_line"] + 2
    assert after[moved[0]][2] == before[moved[0]][2]
    assert not any(metadata["path"] == "notes.txt" for _, metadata, _ in after.values())
    assert len({metadata["content_hash"] for _, metadata, _ in after.values() if metadata["path"] == "guide.md"}) == 1


def test_edit_with_same_size_and_time(indexer: ChromaIndexer, docs: Path) -> None:
    indexer.index([docs])
    notes = docs / "notes.txt"
    info = notes.stat()
    notes.write_text(notes.read_text().replace("Cats", "Dogs"))
    os.utime(notes, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert counts(indexer.index([docs])) == (0, 1, 0, 2)
    assert any(hit.text.startswith("Dogs") for hit in indexer.query("x", k=10))


def test_unchanged_file_is_not_read(indexer: ChromaIndexer, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indexer.index([docs])
    with closing(IndexDatabase.open(docs / ".epic-rag" / DATABASE_FILE)) as database, database.transaction():
        for key, entry in database.files().items():  # as if the files had been old when they were read
            database.put_file(key, replace(entry, checked_ns=entry.checked_ns + 10**10))
    monkeypatch.setattr(sync, "read_file", lambda _: pytest.fail("read"))
    assert counts(indexer.index([docs])) == (0, 0, 0, 3)


def test_touched_files(indexer: ChromaIndexer, docs: Path) -> None:
    indexer.index([docs])
    for path in docs.glob("*.*"):
        os.utime(path, (1, 1))
    report = indexer.index([docs])
    assert (counts(report), report.chunks_embedded) == ((0, 0, 0, 3), 0)


def test_moved_folder(indexer: ChromaIndexer, docs: Path, tiny_encoder: EpicEncoder, rows: Rows) -> None:
    indexer.index([docs])
    before = rows(docs / ".epic-rag")
    indexer.close()
    moved = Path(shutil.move(docs, docs.parent / "elsewhere"))
    for file in (moved / ".epic-rag").rglob("*"):
        assert file.is_dir() or str(docs).encode() not in file.read_bytes(), file
    with ChromaIndexer(moved / ".epic-rag", encoder=tiny_encoder) as again:
        assert Path(again.query("cats")[0].root) == moved
        assert again.status().roots == (str(moved),)
        report = again.index([moved])
        assert (counts(report), report.chunks_embedded) == ((0, 0, 0, 3), 0)
    assert rows(moved / ".epic-rag") == before


def test_several_roots_and_single_files(
    tmp_path: Path, docs: Path, tree: Tree, tiny_encoder: EpicEncoder, rows: Rows
) -> None:
    more = tree(tmp_path / "more", {"notes.txt": "Of more.\n", "a.md": "A.\n", "b.md": "B.\n"})
    with ChromaIndexer(tmp_path / "index", encoder=tiny_encoder) as indexer:
        assert indexer.index([docs, more / "notes.txt"]).added == 4
        # a path inside a root means the root; a root that holds others takes their place
        assert counts(indexer.index([docs / "src"])) == (0, 0, 0, 4)
        assert indexer.status().roots == (str(docs), str(more / "notes.txt"))
        assert counts(indexer.index([more])) == (2, 0, 0, 4)
        (more / "a.md").unlink()
        assert counts(indexer.index([])) == (0, 0, 1, 5)
        assert {(Path(hit.root).name, hit.path) for hit in indexer.query("x", k=20)} == {
            ("docs", "guide.md"), ("docs", "notes.txt"), ("docs", "src/tool.py"), ("more", "b.md"), ("more", "notes.txt"),
        }  # fmt: skip
    assert len(rows(tmp_path / "index")) == 6


def test_deleted_root_file(tmp_path: Path, tree: Tree, tiny_encoder: EpicEncoder) -> None:
    folder = tree(tmp_path / "docs", {"a.md": "A.\n", "b.md": "B.\n"})
    with ChromaIndexer(tmp_path / "index", encoder=tiny_encoder) as indexer:
        indexer.index([folder / "a.md", folder / "b.md"])
        (folder / "a.md").unlink()
        assert counts(indexer.index([folder / "b.md"])) == (0, 0, 1, 1)
        assert indexer.status().roots == (str(folder / "b.md"),)


def test_missing_root(tmp_path: Path, docs: Path, tree: Tree, tiny_encoder: EpicEncoder) -> None:
    away = tree(tmp_path / "away", {"a.md": "A.\n"})
    with ChromaIndexer(tmp_path / "index", encoder=tiny_encoder) as indexer:
        indexer.index([docs, away])
        shutil.rmtree(away)
        report = indexer.index([docs])
        assert counts(report) == (0, 0, 0, 3)
        assert [(file.path, "missing" in file.reason) for file in report.skipped] == [(str(away), True)]
        assert any(hit.path == "a.md" for hit in indexer.query("x", k=20))


def test_missing_folder_of_a_file(tmp_path: Path, docs: Path, tree: Tree, tiny_encoder: EpicEncoder) -> None:
    away = tree(tmp_path / "away", {"a.md": "# A\n\nText of a file on a drive.\n"})
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        total = indexer.index([docs, away / "a.md"]).chunks_total
        away.rename(tmp_path / "unmounted")
        report = indexer.index([])
        assert (report.deleted, report.chunks_total) == (0, total)
        assert [(file.path, "missing" in file.reason) for file in report.skipped] == [(str(away / "a.md"), True)]
        (tmp_path / "unmounted").rename(away)
        (away / "a.md").unlink()
        report = indexer.index([])
        assert (report.deleted, report.chunks_total) == (1, total - 1)


def test_unreadable_files_keep_their_chunks(
    indexer: ChromaIndexer, docs: Path, pdf: Callable[[list[str]], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (docs / "paper.pdf").write_bytes(pdf(["Hello from one", "Second page"]))
    indexer.index([docs])
    (docs / "paper.pdf").write_bytes(b"%PDF-1.4 cut off")
    (docs / "broken.pdf").write_bytes(b"%PDF-1.4 never good")
    (docs / "notes.txt").write_text("changed\n")
    (docs / "photo.md").write_bytes(b"\x89PNG\0\0")
    read = sync.read_file

    def refuse(file: FoundFile) -> tuple[bytes, FileStamp]:
        if file.path == "notes.txt":
            raise PermissionError(13, "Permission denied", file.path)
        return read(file)

    monkeypatch.setattr(sync, "read_file", refuse)
    report = indexer.index([docs])
    assert counts(report) == (0, 0, 0, 2)
    reasons = {file.path: file.reason for file in report.skipped}
    assert reasons["notes.txt"] == "cannot be read: Permission denied"
    assert reasons["photo.md"].startswith("not text")
    assert all(reasons[name].startswith("a broken PDF") for name in ("paper.pdf", "broken.pdf"))
    hits = indexer.query("x", k=20)
    assert {(hit.path, hit.page) for hit in hits if hit.page} == {("paper.pdf", 1), ("paper.pdf", 2)}
    assert any(hit.text.startswith("Cats") for hit in hits)
    monkeypatch.undo()
    assert counts(indexer.index([docs])) == (0, 1, 0, 2)


def test_file_turned_binary(indexer: ChromaIndexer, docs: Path) -> None:
    indexer.index([docs])
    (docs / "notes.txt").write_bytes(b"\0\1\2")
    assert counts(indexer.index([docs])) == (0, 0, 1, 2)


def test_unreadable_folder_keeps_its_chunks(
    indexer: ChromaIndexer, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexer.index([docs])
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("src"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    report = indexer.index([docs])
    assert counts(report) == (0, 0, 0, 2)
    assert report.chunks_total == 4


def test_failing_parser(
    indexer: ChromaIndexer, docs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from epic_rag_chroma.reading.worker import IsolatedReader

    read = IsolatedReader.read

    def fail(self: IsolatedReader, name: str, data: bytes, **options: Any) -> Any:
        if name == "guide.md":
            raise RecursionError("too deep")
        return read(self, name, data, **options)

    monkeypatch.setattr(IsolatedReader, "read", fail)
    report = indexer.index([docs])
    assert (report.added, [file.path for file in report.skipped]) == (2, ["guide.md"])


def test_large_files(indexer: ChromaIndexer, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr("epic_rag_chroma.walk.files.byte_limit", lambda name: 60)
    report = indexer.index([docs])
    assert report.added == 1
    assert {file.path for file in report.skipped} == {"guide.md", "src/tool.py"}


def test_empty_files_and_empty_folders(
    indexer: ChromaIndexer, docs: Path, tmp_path: Path, tiny_encoder: EpicEncoder
) -> None:
    (docs / "empty.md").write_text("")
    (docs / "blank.txt").write_text("\n \n")
    report = indexer.index([docs])
    assert counts(report) == (3, 0, 0, 0)
    assert {file.path: file.reason for file in report.skipped} == {"empty.md": "empty", "blank.txt": "empty"}
    assert counts(indexer.index([docs])) == (0, 0, 0, 3)
    (tmp_path / "nothing").mkdir()
    with ChromaIndexer(tmp_path / "nothing/.epic-rag", encoder=tiny_encoder) as empty:
        assert empty.index([tmp_path / "nothing"]).chunks_total == 0
        assert empty.query("x") == []
