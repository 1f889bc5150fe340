"""Index reader: Chroma answers for it only while the mirror is that of the index and nobody writes to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import chromadb
import numpy as np
import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer
from epic_rag_chroma.search.index_reader import IndexReader, Ranking
from epic_rag_chroma.store import collection as mirrors
from epic_rag_chroma.store.database import IndexDatabase
from epic_rag_chroma.store.lock import chroma_lock
from epic_rag_chroma.store.paths import DATABASE_FILE


@pytest.fixture
def folder(docs: Path, indexer: ChromaIndexer) -> Path:
    """An index of 204 chunks, many with equal vectors."""
    for number in range(200):
        (docs / f"more{number}.txt").write_text(f"Something about {number % 50} cats.\n")
    indexer.index([docs])
    indexer.close()
    return docs / ".epic-rag"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the collections that are opened."""
    seen: list[str] = []
    open_collection = mirrors.open_collection

    def spy(place: Path, collection: str) -> mirrors.Mirror | None:
        seen.append(collection)
        return open_collection(place, collection)

    monkeypatch.setattr(mirrors, "open_collection", spy)
    return seen


@pytest.fixture
def search(folder: Path, tiny_encoder: EpicEncoder) -> Iterator[Callable[..., Ranking]]:
    """Search with a reader that takes Chroma from some number of chunks on."""
    vector = tiny_encoder.encode_query("cats")
    readers: dict[int, IndexReader] = {}

    def search_from(chroma_from_chunks: int, k: int = 20) -> Ranking:
        reader = readers.setdefault(chroma_from_chunks, IndexReader(folder, chroma_from_chunks=chroma_from_chunks))
        return reader.read(lambda index: index.nearest(vector, k))

    yield search_from
    for reader in readers.values():
        with reader.closed():
            pass


def assert_equal(found: Ranking, expected: Ranking) -> None:
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert len({row_id for row_id, _ in found} & {row_id for row_id, _ in expected}) >= len(expected) - 2  # ties


def test_chroma_and_exact_search_agree(search: Callable[..., Ranking], opened: list[str]) -> None:
    exact = [search(205, k) for k in (1, 20, 500)]
    assert opened == []
    for k, expected in zip((1, 20, 500), exact, strict=True):
        assert_equal(search(204, k), expected)
    assert len(opened) == 1
    assert len(exact[-1]) == 204


def dirty(folder: Path) -> None:
    with closing(IndexDatabase.open(folder / DATABASE_FILE)) as database:
        database.begin_mirror(database.mirror().collection)


def behind(folder: Path) -> None:
    with closing(IndexDatabase.open(folder / DATABASE_FILE)) as database, database.transaction():
        database.delete(list(database.ids([1]).values()))


def without_files(folder: Path) -> None:
    shutil.rmtree(folder / "chroma")


def with_rows_of_others(folder: Path) -> None:
    with chromadb.PersistentClient(str(folder / "chroma")) as client:  # type: ignore[attr-defined]
        collection = client.get_collection("epic_rag", embedding_function=None)
        vectors = collection.get(limit=30, include=["embeddings"])["embeddings"]
        collection.add(ids=[f"theirs{number}" for number in range(30)], embeddings=np.asarray(vectors))


@pytest.mark.parametrize("change", [dirty, behind, without_files, with_rows_of_others])
def test_exact_search_answers_instead(
    folder: Path, search: Callable[..., Ranking], opened: list[str], change: Callable[[Path], None]
) -> None:
    change(folder)
    assert search(1, 500) == search(10_000, 500)
    if change in (dirty, behind):
        assert opened == []


def test_exact_search_answers_during_a_write_to_chroma(
    folder: Path, search: Callable[..., Ranking], opened: list[str]
) -> None:
    with chroma_lock(folder):
        assert search(1) == search(10_000)
        assert opened == []


def test_open_mirror_is_given_up_when_the_index_changes(
    folder: Path, search: Callable[..., Ranking], docs: Path, tiny_encoder: EpicEncoder, opened: list[str]
) -> None:
    search(1)
    (docs / "more7.txt").write_text("cats\n")
    with ChromaIndexer(folder, encoder=tiny_encoder) as other:
        other.index([docs])
    assert_equal(search(1), search(10_000))
    assert len(opened) == 2
