"""Several indexes searched as one rank as one index of all folders does."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag_chroma import (
    ChromaIndexer,
    FederatedIndex,
    Hit,
    IndexMismatchError,
    IndexNotFoundError,
    SearchFilters,
    SearchMode,
)

WORDS = [
    "undo",
    "commit",
    "branch",
    "reset",
    "cat",
    "sleep",
    "food",
    "manual",
    "setup",
    "drop",
    "folder",
    "printer",
    "paper",
    "water",
    "pump",
    "tap",
]
QUERIES = ("undo the commit", "cats", "printer paper food water", "tap tap tap", "zebra")
PLACES = ("one", "two", "three")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: EpicEncoder) -> Path:
    """Three folders with an index each, and an index of all of them.

    All texts have the same number of words, because BM25 compares lengths with the average of an index.
    """
    folder = tmp_path_factory.mktemp("federated")
    draw = random.Random(5)
    for place, name in enumerate(PLACES):
        for number in range(12 + 8 * place):
            # A word is common in one folder and rare in another.
            words = [draw.choice(WORDS[4 * place :] if draw.random() < 0.7 else WORDS) for _ in range(7)]
            (folder / name / "sub").mkdir(parents=True, exist_ok=True)
            (folder / name / "sub" / f"{name}{number}.txt").write_text(" ".join([*words, f"{name}{number}"]) + "\n")
        with ChromaIndexer(folder / name / ".epic-rag", encoder=tiny_encoder) as indexer:
            indexer.index([folder / name])
    with ChromaIndexer(folder / "all", encoder=tiny_encoder) as indexer:
        indexer.index([folder / name for name in PLACES])
    return folder


@pytest.fixture
def federated(folder: Path, tiny_encoder: EpicEncoder) -> Iterator[FederatedIndex]:
    with FederatedIndex([folder / name / ".epic-rag" for name in PLACES], encoder=tiny_encoder) as index:
        yield index


@pytest.fixture
def union(folder: Path, tiny_encoder: EpicEncoder) -> Iterator[ChromaIndexer]:
    with ChromaIndexer(folder / "all", encoder=tiny_encoder) as index:
        yield index


def comparable(hits: list[Hit]) -> list[tuple[float, str, str, float | None, float | None]]:
    """What is equal in both cases; equal scores are in the order of ids, which depend on the index folder."""
    rows = [
        (round(hit.score, 5), hit.root, hit.path, hit.cosine and round(hit.cosine, 5), hit.bm25 and round(hit.bm25, 5))
        for hit in hits
    ]
    return sorted(rows, key=lambda row: (-row[0], row[2]))


@pytest.mark.parametrize("mode", ["dense", "keyword"])
@pytest.mark.parametrize("query", QUERIES)
def test_ranks_and_scores_are_those_of_one_index(
    federated: FederatedIndex, union: ChromaIndexer, query: str, mode: SearchMode
) -> None:
    hits = federated.query(query, k=100, mode=mode, collapse=False)
    assert comparable(hits) == comparable(union.query(query, k=100, mode=mode, collapse=False))
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert len({Path(hit.root).name for hit in hits}) == (0 if (query, mode) == ("zebra", "keyword") else 3)
    assert federated.query(query, k=4, mode=mode, collapse=False) == hits[:4]


@pytest.mark.parametrize("query", QUERIES)
def test_hybrid_fuses_the_joint_rankings(federated: FederatedIndex, union: ChromaIndexer, query: str) -> None:
    def ranks(index: FederatedIndex | ChromaIndexer) -> list[tuple[str, float | None, float | None]]:
        hits = index.query(query, k=100, collapse=False)
        return sorted((hit.path, hit.cosine and round(hit.cosine, 5), hit.bm25 and round(hit.bm25, 5)) for hit in hits)

    assert ranks(federated) == ranks(union)
    best, other = (index.query(query, k=1, collapse=False)[0] for index in (federated, union))
    assert best.score == pytest.approx(other.score)


def test_filters(federated: FederatedIndex, union: ChromaIndexer) -> None:
    tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
    for filters, count in (
        (SearchFilters(paths=("*one1*",)), 3),
        (SearchFilters(paths=("sub/t*",)), 48),
        (SearchFilters(where=("file_name=two3.txt",)), 1),
        (SearchFilters(since=tomorrow - timedelta(days=2)), 60),
        (SearchFilters(since=tomorrow), 0),
    ):
        hits = federated.query("undo", k=100, mode="dense", collapse=False, filters=filters)
        assert len(hits) == count
        assert comparable(hits) == comparable(union.query("undo", k=100, mode="dense", collapse=False, filters=filters))
        words = federated.query("undo cats", k=100, mode="keyword", collapse=False, filters=filters)
        others = union.query("undo cats", k=100, mode="keyword", collapse=False, filters=filters)
        assert comparable(words) == comparable(others)


def test_copies_are_folded_across_indexes(folder: Path, tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    """A copied folder has the same chunk ids in its index; a hit has the id that its own index knows."""
    copied = Path(shutil.copytree(folder / "one", tmp_path / "copied"))
    places = [folder / "one/.epic-rag", copied / ".epic-rag", folder / "one/sub/../.epic-rag"]
    with FederatedIndex(places, encoder=tiny_encoder) as index:
        hits = index.query("undo", k=100, mode="dense", collapse=False)
        assert len(hits) == 24
        assert {hit.root for hit in hits} == {str(folder / "one"), str(copied)}
        assert len({hit.id for hit in hits}) == 12
        folded = index.query("undo", k=100, mode="dense")
        assert len(folded) == 12
        assert all(len(hit.duplicates) == 1 for hit in folded)
        (copied / "sub/one3.txt").unlink()
        stale = {hit.path: hit.stale for hit in index.query("undo", k=100, mode="dense", collapse=False) if hit.stale}
        assert stale == {"sub/one3.txt": "deleted"}
        assert index.stale_files() == {str(copied / "sub/one3.txt"): "deleted"}
        assert index.stale_files(max_files=5) is None


def test_reranking_and_replaced_queries(federated: FederatedIndex, tiny_encoder: EpicEncoder) -> None:
    last = federated.query("undo", k=3, reranker=lambda query, texts: [float(text > "t") for text in texts])
    assert [hit.score for hit in last] == [hit.rerank_score for hit in last]
    vector = tiny_encoder.encode_query("cats")
    assert federated.query("x", mode="dense", embedded=vector) == federated.query("cats", mode="dense")
    with pytest.raises(ConfigError, match="2 entries for 1 queries"):
        federated.query_many(["x"], embedded=["a", "b"])


def test_the_model_is_loaded_once(folder: Path, tiny_encoder: EpicEncoder) -> None:
    loaded: list[int] = []

    def load() -> EpicEncoder:
        loaded.append(1)
        return tiny_encoder

    with FederatedIndex([folder / name / ".epic-rag" for name in PLACES], encoder=load) as index:
        assert len(index.status()) == 3
        index.query("undo", mode="keyword")
        assert loaded == []
        assert len(index.query_many(["undo", "cats"])) == 2
        index.query("undo")
    assert loaded == [1]


def test_other_models_are_refused(
    folder: Path, tmp_path: Path, tiny_encoder: EpicEncoder, tiny_bidirectional_encoder: EpicEncoder
) -> None:
    (tmp_path / "a.txt").write_text("undo the commit\n")
    with ChromaIndexer(tmp_path / "idx", encoder=tiny_bidirectional_encoder) as indexer:
        indexer.index([tmp_path / "a.txt"])
    with FederatedIndex([folder / "one/.epic-rag", tmp_path / "idx"], encoder=tiny_encoder) as index:
        with pytest.raises(IndexMismatchError, match="their cosines cannot be compared") as error:
            index.query("undo")
        assert str(folder / "one/.epic-rag") in str(error.value)
        assert str(tmp_path / "idx") in str(error.value)
        found = {hit.path for hit in index.query("undo commit", mode="keyword", k=100)}
        assert "a.txt" in found
        assert len(found) > 1
    with pytest.raises(IndexNotFoundError), FederatedIndex([folder / "one/.epic-rag", tmp_path / "none"]) as index:
        index.query("undo", mode="keyword")
    with pytest.raises(ConfigError, match="There is no index to search"):
        FederatedIndex([])


def test_threads(federated: FederatedIndex) -> None:
    expected = federated.query("undo", mode="keyword", k=50)
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda _: federated.query("undo", mode="keyword", k=50), range(20))
        assert all(answer == expected for answer in answers)
