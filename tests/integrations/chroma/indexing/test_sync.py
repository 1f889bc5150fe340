"""Synchronisation: vectors are reused for renamed, moved and copied text; plans; batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epic_rag import EpicEncoder
from epic_rag.errors import DataError
from epic_rag_chroma import ChromaIndexer, IndexPlan, IndexReport, IndexSettings

Rows = Callable[[Path], dict[str, tuple[str, dict[str, Any], list[float]]]]
Tree = Callable[[Path, dict[str, str | bytes]], Path]

SECTIONS = {name: f"## {name}\n\nAll that is to be said of {name}.\n" for name in ("one", "two", "three", "four")}


def doc(*names: str) -> str:
    return "# Book\n\n" + "\n".join(SECTIONS[name] for name in names)


@pytest.fixture
def books(tmp_path: Path, tree: Tree) -> Path:
    files: dict[str, str | bytes] = {"a.md": doc("one", "two"), "b.md": doc("three"), "c.md": "# Empty\n"}
    return tree(tmp_path / "books", files)


def counts(report: IndexReport) -> dict[str, int]:
    """Return the counts that are not zero."""
    names = ("added", "changed", "deleted", "renamed", "unchanged", "chunks_embedded", "chunks_reused")
    return {name: getattr(report, name) for name in names if getattr(report, name)}


def rename(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "a.md").rename(folder / "deep/z.md")


def copy(folder: Path) -> None:
    (folder / "copy.md").write_bytes((folder / "a.md").read_bytes())


def move_section(folder: Path) -> None:
    # To a file that is read later; its old place is gone from the index by then.
    (folder / "a.md").write_text(doc("one"))
    (folder / "b.md").write_text(doc("three", "two"))


def swap(folder: Path) -> None:
    first, second = (folder / "a.md").read_text(), (folder / "b.md").read_text()
    (folder / "a.md").write_text(second)
    (folder / "b.md").write_text(first)


def twins(folder: Path) -> None:
    for number in range(3):
        (folder / f"twin{number}.md").write_text(doc("four"))


def rename_and_edit(folder: Path) -> None:
    (folder / "a.md").rename(folder / "y.md")
    (folder / "y.md").write_text(doc("one", "four"))


def rename_one_of_two(folder: Path) -> None:
    copy(folder)
    (folder / "a.md").rename(folder / "x.md")


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (rename, {"renamed": 1, "unchanged": 2, "chunks_reused": 2}),
        (copy, {"added": 1, "unchanged": 3, "chunks_reused": 2}),
        (move_section, {"changed": 2, "unchanged": 1, "chunks_reused": 3}),
        (swap, {"changed": 2, "unchanged": 1, "chunks_reused": 3}),
        (twins, {"added": 3, "unchanged": 3, "chunks_embedded": 1, "chunks_reused": 2}),
        (rename_and_edit, {"added": 1, "deleted": 1, "unchanged": 2, "chunks_embedded": 1, "chunks_reused": 1}),
        (rename_one_of_two, {"added": 1, "renamed": 1, "unchanged": 2, "chunks_reused": 4}),
    ],
)
@pytest.mark.parametrize("batch", [512, 1])
def test_vectors_are_reused(
    books: Path,
    tiny_encoder: EpicEncoder,
    rows: Rows,
    edit: Callable[[Path], None],
    expected: dict[str, int],
    batch: int,
    tmp_path: Path,
) -> None:
    with ChromaIndexer(books / ".epic-rag", encoder=tiny_encoder, batch_chunks=batch) as indexer:
        indexer.index([books])
        edit(books)
        assert counts(indexer.index([books])) == expected
    with ChromaIndexer(tmp_path / "clean", encoder=tiny_encoder) as clean:
        clean.index([books])
    found, wanted = rows(books / ".epic-rag"), rows(tmp_path / "clean")
    assert sorted(text for text, _, _ in found.values()) == sorted(text for text, _, _ in wanted.values())
    vectors = {metadata["embedded_hash"]: vector for _, metadata, vector in wanted.values()}
    for _, metadata, vector in found.values():
        assert vector == pytest.approx(vectors[metadata["embedded_hash"]], abs=1e-4)


def test_row_metadata(indexer: ChromaIndexer, docs: Path, rows: Rows) -> None:
    indexer.index([docs])
    kinds = {
        metadata["path"]: (metadata["kind"], metadata["lang"]) for _, metadata, _ in rows(docs / ".epic-rag").values()
    }
    assert kinds == {"guide.md": ("markdown", ""), "notes.txt": ("text", ""), "src/tool.py": ("code", "python")}
    assert len({metadata["embedded_hash"] for _, metadata, _ in rows(docs / ".epic-rag").values()}) == 4


def test_last_run(indexer: ChromaIndexer, docs: Path) -> None:
    report = indexer.index([docs])
    last = indexer.status().last_run
    assert last is not None
    assert (last["added"], last["chunks_embedded"], last["chunks_total"]) == (3, 4, 4)
    assert last["seconds"] == pytest.approx(report.seconds, abs=1e-3)
    (docs / "notes.txt").rename(docs / "other.txt")
    indexer.index([docs])
    last = indexer.status().last_run
    assert last is not None
    assert (last["renamed"], last["added"], last["chunks_reused"], last["unchanged"]) == (1, 0, 1, 2)
    assert indexer.status().state == "complete"


def test_plan(books: Path, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with ChromaIndexer(books / ".epic-rag", encoder=tiny_encoder) as indexer:
        everything = ("a.md", "b.md", "c.md")
        assert ChromaIndexer(books / ".epic-rag").plan([books]) == IndexPlan(everything, (), (), (), 0, ())
        assert not (books / ".epic-rag").exists()
        indexer.index([books])
        (books / "a.md").rename(books / "z.md")
        (books / "b.md").write_text(doc("four"))
        (books / "c.md").unlink()
        (books / "new.md").write_text("new\n")
        (books / "bad.pdf").write_bytes(b"%PDF-1.4 cut off")
        before = snapshot(books)
        other = ChromaIndexer(books / ".epic-rag", encoder=lambda: pytest.fail("loaded"))
        plan = other.plan([books])
        assert (plan.added, plan.changed, plan.deleted) == (("new.md",), ("b.md",), ("c.md",))
        assert (plan.renamed, plan.unchanged) == ((("a.md", "z.md"),), 0)
        assert [file.path for file in plan.skipped] == ["bad.pdf"]
        assert snapshot(books) == before
        only = other.plan([books], settings=IndexSettings(include=("z.md",)))
        assert (only.renamed, only.deleted, only.added) == ((("a.md", "z.md"),), ("b.md", "c.md"), ())
        report = indexer.index([books])
        assert (report.added, report.changed, report.deleted, report.renamed) == (1, 1, 1, 1)
        assert indexer.plan([books]).unchanged == 3
        with pytest.raises(DataError, match="No such file or folder"):
            other.plan([books / "missing"])


def test_plan_during_a_run(books: Path, tiny_encoder: EpicEncoder) -> None:
    planned: list[IndexPlan] = []
    with ChromaIndexer(books / ".epic-rag", encoder=tiny_encoder) as indexer:
        indexer.index([books], progress=lambda _: planned.append(ChromaIndexer(books / ".epic-rag").plan([books])))
    assert planned


def test_plan_after_a_crash(books: Path, tiny_encoder: EpicEncoder) -> None:
    def die(event: Any) -> None:
        if event.path == "b.md":
            raise KeyboardInterrupt

    with ChromaIndexer(books / ".epic-rag", encoder=tiny_encoder, batch_chunks=1) as indexer:
        with pytest.raises(KeyboardInterrupt):
            indexer.index([books], progress=die)
        assert indexer.status().state == "interrupted"
        plan = indexer.plan([books])
        assert (plan.added, plan.unchanged) == (("b.md", "c.md"), 1)
        assert indexer.index([books]).unchanged == 1
        assert indexer.status().state == "complete"


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        os.fspath(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(("-shm", "-wal"))  # of a reader; both are empty
    }
