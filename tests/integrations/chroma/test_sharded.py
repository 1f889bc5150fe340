"""ShardedCollection: synchronised with rows, searched with banks and filters, by itself and through EpicRetriever."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag_chroma import (
    ChromaIndexer,
    Combination,
    Comparison,
    ModelInfo,
    Record,
    SearchFilters,
    ShardedCollection,
    WriteCounts,
)
from epic_rag_chroma.errors import IndexMismatchError, IndexNotFoundError
from epic_rag_chroma.store.database import IndexDatabase
from llama_index.retrievers.epic import EpicRetriever
from tests.helpers.indexes import write_tree
from tests.helpers.servers import ChromaProcess, plain_client
from tests.helpers.vector_rows import INFO, assert_stored, make_rows

PAGES = {
    f"{folder}/{name}.md": f"# {name.title()}\n\n## Use\n\nHow to use the {name}: press {number} times.\n\n"
    f"## Repair\n\nTo repair the {name}, open it and replace part {number}.\n"
    for folder in ("kitchen", "office")
    for number, name in enumerate(("kettle", "toaster", "printer", "lamp", "mixer"))
}
QUESTION = "how do I repair the printer"


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def indexer(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: EpicEncoder) -> Iterator[ChromaIndexer]:
    """An index of ten pages."""
    folder = write_tree(tmp_path_factory.mktemp("pages"), dict(PAGES))
    with ChromaIndexer(folder / ".epic-rag", encoder=tiny_encoder, chroma="none") as made:
        made.index([folder])
        yield made


@pytest.fixture(scope="module")
def collection(chroma: ChromaProcess, indexer: ChromaIndexer, tiny_encoder: EpicEncoder) -> Iterator[ShardedCollection]:
    """The rows of that index in three shards."""
    database = IndexDatabase.open_reading(Path(indexer.status().index_dir) / "index.sqlite")
    rows = [row for page in database.pages() for row in page]
    database.close()
    info = ModelInfo(tiny_encoder.fingerprint, "tiny", "", tiny_encoder.dimension)
    with ShardedCollection(chroma.url, "pages", encoder=tiny_encoder) as made:
        assert made.sync(lambda: [rows], info, shards=3) == WriteCounts(written=len(rows))
        yield made


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "_TENANT", "_DATABASE", "_TOKEN", "_HEADERS"):
        monkeypatch.delenv(f"EPIC_RAG_CHROMA{name}", raising=False)


BANK = DemonstrationBank([("the kettle is broken", "To repair the kettle, open it and replace part 0.")])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bank": BANK, "strategy": "task-vector"},
        {"bank": BANK, "strategy": "epic"},
        {"collapse": False, "k": 50},
        {"k": 3, "per_file": 1},
        {"min_score": 0.2, "k": 50},
        {"full_section": True},
        {"filters": SearchFilters(paths=("kitchen/**",))},
        {"filters": SearchFilters(where=("first_line>=5",)), "k": 20},
        {"filters": SearchFilters(paths=("*.md",), where=("path!=office/lamp.md", "kind=markdown")), "k": 20},
        {"filters": SearchFilters(condition=Comparison("heading_path", "contains", "Repair")), "k": 20},
        {
            "filters": SearchFilters(
                condition=Combination(
                    "or", (Comparison("file_name", "==", "lamp.md"), Comparison("path", "==", "kitchen/kettle.md"))
                )
            ),
            "k": 20,
        },
    ],
)
def test_hits_are_those_of_an_index(collection: ShardedCollection, indexer: ChromaIndexer, settings: dict) -> None:  # type: ignore[type-arg]
    found = collection.query(QUESTION, **settings)
    expected = indexer.query(QUESTION, mode="dense", **settings)
    assert [hit.id for hit in found] == [hit.id for hit in expected] != []
    for one, other in zip(found, expected, strict=True):
        assert (one.path, one.text, one.heading_path, one.first_line, one.last_line, one.duplicates, one.marked) == (
            other.path,
            other.text,
            other.heading_path,
            other.first_line,
            other.last_line,
            other.duplicates,
            other.marked,
        )
        assert one.score == pytest.approx(other.score, abs=1e-5)
        assert one.stale is None


def test_the_retriever_takes_a_collection(collection: ShardedCollection, indexer: ChromaIndexer) -> None:
    filters = MetadataFilters(filters=[MetadataFilter(key="path", value="kitchen", operator="text_match")])  # type: ignore[arg-type]
    retriever = EpicRetriever(collection, similarity_top_k=4, bank=BANK, strategy="task-vector")
    for each in (retriever, copy.copy(retriever), retriever.with_settings(filters=filters)):
        hits = indexer.query(
            QUESTION, k=4, mode="dense", merge=False, per_file=0, bank=BANK, strategy="task-vector",
            filters=SearchFilters(paths=("kitchen/**",)) if each._request.filters else None,
        )  # fmt: skip
        nodes = each.retrieve(QUESTION)
        assert [node.node.node_id for node in nodes] == [hit.id for hit in hits] != []
        assert [node.text for node in nodes] == [hit.text for hit in hits]
    assert retriever.indexer is collection
    with pytest.raises(ConfigError, match="ShardedCollection has its own encoder"):
        EpicRetriever(collection, chroma="http://localhost:1")
    with pytest.raises(ConfigError, match=r"no keyword index, which mode hybrid needs\. Search it with mode dense"):
        retriever.with_settings(mode="hybrid").retrieve(QUESTION)


def test_a_pickle_connects_by_itself(chroma: ChromaProcess, tiny_checkpoint: Path) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    info = ModelInfo(encoder.fingerprint, "tiny", str(tiny_checkpoint), encoder.dimension)
    vectors = encoder.encode_document(["cats sleep", "dogs bark"])
    rows = [Record(f"{n}", text, {"path": "a.md"}, vectors[n]) for n, text in enumerate(("cats sleep", "dogs bark"))]
    with ShardedCollection(chroma.url, "pickled", encoder=encoder) as first:
        first.sync(lambda: [rows], info)
        expected = first.query("cats")
        with pickle.loads(pickle.dumps(first)) as second:
            assert second.query("cats") == expected != []
        retriever = pickle.loads(pickle.dumps(EpicRetriever(first, similarity_top_k=1)))
        assert [node.text for node in retriever.retrieve("cats")] == [expected[0].text]
        retriever.close()


def test_the_encoder_must_have_made_the_vectors(collection: ShardedCollection, other_checkpoint: Path) -> None:
    other = EpicEncoder.from_pretrained(other_checkpoint)
    with (
        ShardedCollection(collection.server, "pages", encoder=lambda: other) as wrong,
        pytest.raises(IndexMismatchError, match=r"pages on .* has vectors of tiny .*\. Pass the encoder that made"),
    ):
        wrong.query("x")
    vector = np.ones(32, dtype=np.float32)
    with ShardedCollection(collection.server, "pages", encoder=lambda: other) as wrong:
        assert len(wrong.query("x", embedded=vector)) == 5  # the caller's vector needs no encoder


def test_what_a_server_has_not(collection: ShardedCollection) -> None:
    with pytest.raises(ConfigError, match=r"no keyword index, which mode keyword needs"):
        collection.query("x", mode="keyword")
    now = datetime.now(timezone.utc)
    with pytest.raises(ConfigError, match=r"no times of files\. Search without since"):
        collection.query("x", filters=SearchFilters(since=now))
    with pytest.raises(ConfigError, match=r"2 entries for 1 queries"):
        collection.query_many(["x"], embedded=[None, None])
    with (
        ShardedCollection(collection.server, "nothing") as missing,
        pytest.raises(IndexNotFoundError, match="has no collection nothing"),
    ):
        missing.query("x")
    with pytest.raises(ConfigError, match=r"'folder' is not the address of a Chroma server"):
        ShardedCollection("folder", "x")


def test_a_filter_that_few_rows_pass_is_not_searched_for_ever(
    collection: ShardedCollection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("epic_rag_chroma.sharded._DEEPEST", 10)
    monkeypatch.setattr(collection._searcher, "_fusion_depth", 2)
    with caplog.at_level(logging.WARNING):
        assert collection.query("x", k=1, filters=SearchFilters(paths=("no/**",))) == []
    assert "Only the 10 best rows were compared with the filters; 0 pass." in caplog.text


def test_sync_makes_the_collection_equal_to_the_rows(chroma: ChromaProcess) -> None:
    rows = make_rows(90)
    progress: list[int] = []
    with ShardedCollection(chroma.url, "synced") as made:
        batches = [rows[:50], rows[50:]]
        assert made.sync(lambda: iter(batches), INFO, shards=4, progress=progress.append) == WriteCounts(written=90)
        assert progress == [50, 90]
        assert (made.count(), made.shards, made.info) == (90, 4, INFO)
        kept = [*(replace(row, text="new") for row in rows[:3]), *rows[10:], *make_rows(5, first=200)]
        assert made.sync(lambda: [kept], INFO) == WriteCounts(written=5, changed=3, unchanged=80, deleted=7)
        assert_stored(made._opened()[0].get([row.id for row in [*rows, *kept]]), kept)
        assert made.sync(list, INFO) == WriteCounts(deleted=88)
        assert made.count() == 0
        assert made.query("x", embedded=np.ones(32, dtype=np.float32)) == []
        with pytest.raises(IndexMismatchError, match="not of"):
            made.sync(list, replace(INFO, fingerprint="f2"))


def test_only_the_changes_since_the_last_version_are_read(chroma: ChromaProcess) -> None:
    rows, read, asked = make_rows(90), [], []

    def changes(version: str) -> tuple[list[list[Record]], list[str]] | None:
        asked.append(version)
        return ([make_rows(3, first=88)], ["id-0", "id-1"]) if version == "1" else None

    def all_rows() -> list[list[Record]]:
        read.append("all")
        return [rows]

    with ShardedCollection(chroma.url, "versions") as made:
        made.sync(all_rows, INFO, shards=3, version="1", changes=changes)
        assert (read, asked) == (["all"], [])
        counts = made.sync(all_rows, INFO, version="2", changes=changes)
        assert counts == WriteCounts(written=1, unchanged=88, deleted=2)
        assert (read, asked) == (["all"], ["1"])
        wanted = [*rows[2:], *make_rows(1, first=90)]
        assert_stored(made._opened()[0].get([row.id for row in [*rows, *wanted]]), wanted)
        # A version that is not known any more, and one that is not known at all: all rows are compared.
        assert made.sync(all_rows, INFO, version="3", changes=changes) == WriteCounts(
            written=2, unchanged=88, deleted=1
        )
        made.sync(all_rows, INFO)
        made.sync(all_rows, INFO, version="1", changes=changes)
        assert (len(read), asked) == (4, ["1", "2"])
        # One shard that is made again has no version.
        with plain_client(chroma.url) as client:
            client.delete_collection("versions.1")
        assert made.sync(all_rows, INFO, version="2", changes=changes).written > 0
        assert (len(read), asked) == (5, ["1", "2"])
        assert_stored(made._opened()[0].get([row.id for row in rows]), rows)


def test_a_shard_that_is_made_again_is_found(chroma: ChromaProcess) -> None:
    rows = make_rows(40)
    with ShardedCollection(chroma.url, "again") as made, ShardedCollection(chroma.url, "again") as reader:
        made.sync(lambda: [rows], INFO, shards=2)
        expected = reader.query("x", k=40, embedded=rows[0].vector)
        with plain_client(chroma.url) as client:
            client.delete_collection("again.1")
        made.sync(lambda: [rows], INFO)
        assert reader.query("x", k=40, embedded=rows[0].vector) == expected != []
