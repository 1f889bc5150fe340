"""Queries during a run, a rebuild and after a crash; two runs at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag_chroma import ChromaIndexer, IndexProgress
from epic_rag_chroma.errors import IndexLockedError, IndexNotFoundError
from epic_rag_chroma.store.lock import chroma_lock, try_chroma_lock


def found(indexer: ChromaIndexer) -> list[tuple[str, str, float]]:
    hits = indexer.query("cats", k=50, mode="dense", collapse=False)
    return [(hit.path, hit.text, round(hit.score, 4)) for hit in hits]


@pytest.mark.parametrize("same", [True, False], ids=["same object", "another"])
def test_queries_during_a_run(docs: Path, tiny_encoder: EpicEncoder, same: bool) -> None:
    index_dir = docs / ".epic-rag"
    with (
        ChromaIndexer(index_dir, encoder=tiny_encoder) as indexer,
        ChromaIndexer(index_dir, encoder=tiny_encoder) as own,
    ):
        indexer.index([docs])
        reader = indexer if same else own
        before = found(reader)
        assert len(before) == 4
        (docs / "notes.txt").write_text("Dogs.\n")
        seen: list[list[tuple[str, str, float]]] = []
        states: list[str] = []

        def meanwhile(_: IndexProgress) -> None:
            seen.append(found(reader))
            states.append(reader.status().state)

        indexer.index([docs], progress=meanwhile)
        after = found(reader)
        assert seen[0] == before
        assert ("notes.txt", "Dogs.") in {hit[:2] for hit in after}
        for each in seen:
            texts = {text for path, text, _ in each if path == "notes.txt"}
            assert texts & {"Dogs.", before[0][1], *(text for path, text, _ in before if path == "notes.txt")}
        assert set(states) <= {"complete", "running"}
        assert reader.status().state == "complete"


def test_queries_do_not_wait(docs: Path, tiny_encoder: EpicEncoder) -> None:
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        indexer.index([docs])
        (docs / "new.md").write_text("new\n")
        answers: list[int] = []

        def meanwhile(_: IndexProgress) -> None:
            thread = threading.Thread(target=lambda: answers.append(len(found(indexer))))
            thread.start()
            thread.join(30)
            assert not thread.is_alive()

        indexer.index([docs], progress=meanwhile)
        assert set(answers) <= {4, 5}
        assert answers


def test_queries_after_a_crash(docs: Path, tiny_encoder: EpicEncoder) -> None:
    """What a run has stored is found before the next run completes it."""

    def die(event: IndexProgress) -> None:
        if event.path == "src/tool.py":
            raise KeyboardInterrupt

    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder, batch_chunks=1) as indexer:
        with pytest.raises(KeyboardInterrupt):
            indexer.index([docs], progress=die)
        assert {path for path, _, _ in found(indexer)} == {"guide.md", "notes.txt"}
        assert indexer.status().state == "interrupted"
        assert indexer.index([docs]).unchanged == 2
        assert {path for path, _, _ in found(indexer)} == {"guide.md", "notes.txt", "src/tool.py"}
        assert indexer.status().state == "complete"


def test_queries_during_a_rebuild(docs: Path, tiny_encoder: EpicEncoder) -> None:
    """The old index answers until the new one is complete, also if the rebuild fails."""
    index_dir = docs / ".epic-rag"
    with (
        ChromaIndexer(index_dir, encoder=tiny_encoder) as indexer,
        ChromaIndexer(index_dir, encoder=tiny_encoder) as reader,
    ):
        indexer.index([docs])
        before = found(reader)
        (docs / "notes.txt").write_text("Dogs.\n")

        def meanwhile(event: IndexProgress) -> None:
            assert found(reader) == before
            if event.stage == "indexing" and event.path is None and is_failing:
                raise KeyboardInterrupt

        is_failing = True
        with pytest.raises(KeyboardInterrupt):
            indexer.index([docs], rebuild=True, progress=meanwhile)
        assert found(reader) == before
        is_failing = False
        indexer.index([docs], rebuild=True, progress=meanwhile)
        assert ("notes.txt", "Dogs.") in {hit[:2] for hit in found(reader)}
        assert list(index_dir.glob("rebuild*")) == []


def test_index_that_is_made_again(docs: Path, tiny_encoder: EpicEncoder) -> None:
    """A long-lived reader follows when another process deletes the index and makes another one."""
    index_dir = docs / ".epic-rag"
    with (
        ChromaIndexer(index_dir, encoder=tiny_encoder) as indexer,
        ChromaIndexer(index_dir, encoder=tiny_encoder) as reader,
    ):
        indexer.index([docs])
        assert len(found(reader)) == 4
        indexer.clear()
        with pytest.raises(IndexNotFoundError):
            found(reader)
        (docs / "guide.md").unlink()
        indexer.index([docs])
        assert {path for path, _, _ in found(reader)} == {"notes.txt", "src/tool.py"}


def test_chroma_lock(tmp_path: Path) -> None:
    with try_chroma_lock(tmp_path) as first, try_chroma_lock(tmp_path) as second:
        assert (first, second) == (True, False)
    with chroma_lock(tmp_path), try_chroma_lock(tmp_path) as free:
        assert not free


def test_wait_for_the_lock(docs: Path, tiny_encoder: EpicEncoder) -> None:
    first, second = (ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) for _ in range(2))
    begun, go_on = threading.Event(), threading.Event()

    def hold(_: IndexProgress) -> None:
        begun.set()
        assert go_on.wait(30)

    thread = threading.Thread(target=lambda: first.index([docs], progress=hold))
    thread.start()
    assert begun.wait(30)
    with pytest.raises(IndexLockedError, match=r"is being written by process .*--wait"):
        second.index([docs])
    with pytest.raises(IndexLockedError, match=r"is still being written after 0\.15 s by process"):
        second.index([docs], wait=0.15)
    with pytest.raises(ConfigError, match="wait is -1"):
        second.index([docs], wait=-1)
    threading.Timer(0.2, go_on.set).start()
    assert second.index([docs], wait=None).unchanged == 3
    thread.join()
