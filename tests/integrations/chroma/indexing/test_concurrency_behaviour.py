"""Queries during a run and after a crash: consistent results, and Chroma's files stay untouched."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag_chroma import ChromaIndexer, IndexProgress
from epic_rag_chroma.errors import IndexLockedError
from epic_rag_chroma.store.database import BruteForceIndex, RecordStore
from epic_rag_chroma.store.lock import DirtyMarker, chroma_lock, corrupt_collections, try_chroma_lock

Tree = Callable[[Path, dict[str, str | bytes]], Path]


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


def test_brute_force_gives_the_same_hits(docs: Path, tree: Tree, tiny_encoder: EpicEncoder) -> None:
    tree(docs, {f"more{number}.txt": f"Something about {number} cats.\n" for number in range(30)})
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        indexer.index([docs])
        with_chroma = {mode: indexer.query("cats", k=10, mode=mode) for mode in ("dense", "hybrid", "keyword")}
        indexer.close()
        with chroma_lock(docs / ".epic-rag"):  # as a run would
            for mode, expected in with_chroma.items():
                hits = indexer.query("cats", k=10, mode=mode)
                assert [hit.id for hit in hits] == [hit.id for hit in expected], mode
                assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-5)


def test_queries_after_a_crash(docs: Path, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    from epic_rag_chroma.store.collection import ChunkStore

    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        indexer.index([docs])
        expected = found(indexer)
    DirtyMarker(docs / ".epic-rag", "some-id").begin()
    with monkeypatch.context() as patch, ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        patch.setattr(ChunkStore, "open", lambda *_, **__: pytest.fail("opened"))
        assert found(indexer) == expected
        assert indexer.status().state == "interrupted"
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        indexer.index([docs])
        assert indexer.status().state == "complete"


def test_dirty_marker(tmp_path: Path) -> None:
    (tmp_path / "chroma/segment").mkdir(parents=True)
    graph = tmp_path / "chroma/segment/data_level0.bin"
    graph.write_bytes(b"old")
    assert corrupt_collections(tmp_path, "mine") == frozenset()
    running = DirtyMarker(tmp_path, "mine", frozenset({"older"}))
    with running.writing():
        graph.write_bytes(b"newer")
    assert corrupt_collections(tmp_path, "mine") == {"older"}
    # The process dies after, or before, it has touched the graph.
    for content, torn in ((b"newer", {"older"}), (b"newest", {"older", "mine"})):
        running = DirtyMarker(tmp_path, "mine", frozenset({"older"}))
        with suppress(ZeroDivisionError), running.writing():
            if content == b"newest":
                graph.write_bytes(content)
            raise ZeroDivisionError
        assert corrupt_collections(tmp_path, "mine") == torn
    running.end()
    with suppress(KeyboardInterrupt), running.writing():
        graph.write_bytes(b"interrupted after Chroma had done its work")
        raise KeyboardInterrupt
    assert corrupt_collections(tmp_path, "mine") == {"older"}
    mark = tmp_path / "running.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "boot": "before the power went"}))
    assert corrupt_collections(tmp_path, "mine") == {"older", "mine"}
    for broken in ("", "{", "[]", '{"torn": 1}'):
        mark.write_text(broken)
        assert corrupt_collections(tmp_path, "mine") == {"mine"}
        assert corrupt_collections(tmp_path, None) == frozenset()


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


def test_brute_force_sees_each_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from epic_rag_chroma.store.database import Record

    def record(name: str, *vector: float) -> Record:
        metadata: dict[str, Any] = {"doc_id": name, "embedded_hash": name}
        return Record(name, f"text of {name}", metadata, np.array(vector, dtype=np.float32))

    store = RecordStore.open(tmp_path, "id")
    store.write([record("a", 1, 0), record("b", 0, 1), record("c", 0, 1)])
    query = np.array([0, 1], dtype=np.float32)
    rows = BruteForceIndex(tmp_path, "id")
    assert rows.nearest(query, 5) == [("b", 1.0), ("c", 1.0), ("a", 0.0)]
    assert rows.nearest(query, 1) == [("b", 1.0)]
    assert rows.nearest(query, 5, allowed={"a", "c", "missing"}) == [("c", 1.0), ("a", 0.0)]
    assert rows.nearest(query, 0) == []
    store.write([record("d", 0, 1)])
    assert [row for row, _ in rows.nearest(query, 5)] == ["b", "c", "d", "a"]
    # With throttled reloading new rows may appear later, deleted rows may not appear.
    rows.close()
    rows = BruteForceIndex(tmp_path, "id", free_reload_seconds=-1.0, throttle=1e9)
    assert len(rows.nearest(query, 5)) == 4
    store.write([record("e", 0, 1)])
    assert [row for row, _ in rows.nearest(query, 5)] == ["b", "c", "d", "a"]
    store.delete(["c"])
    assert [row for row, _ in rows.nearest(query, 5)] == ["b", "d", "e", "a"]
    with rows.snapshot():
        store.delete(["b", "d"])
        assert set(rows.get(["b", "d"])) == {"b", "d"}
        assert [row for row, _ in rows.nearest(query, 5)] == ["b", "d", "e", "a"]
    assert rows.count() == 2
    rows.close()
    store.close()
