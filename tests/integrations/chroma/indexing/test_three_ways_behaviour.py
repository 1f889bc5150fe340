"""An index made by the command returns the same hits in three ways.

Plain chromadb with EpicEmbeddingFunction, LlamaIndex's ChromaVectorStore with EpicEmbedding, and EpicRetriever; also with
foreign rows in the index's collection.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chromadb
import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from llama_index.vector_stores.chroma import ChromaVectorStore

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag_chroma import ChromaIndexer, EpicEmbeddingFunction, Hit
from epic_rag_cli.main import run
from llama_index.embeddings.epic import EpicEmbedding
from llama_index.retrievers.epic import EpicRetriever

ROOT = Path(__file__).resolve().parents[4]
SOAK = os.environ.get("EPIC_RAG_SOAK") == "1"
QUESTIONS = [
    "how do I index a folder",
    "undo the last commit",
    "which demonstrations does a bank show?",
    "fingerprint of a checkpoint",
    "cosine",
]
PAIRS = [
    ("take back my commit", "Reset softly to the commit before it."),
    ("get rid of it", "Delete the folder."),
    ("make it faster", "Encode in batches, sorted by length."),
    ("where is it kept", "The index is in the folder .epic-rag."),
]


@dataclass(frozen=True)
class Answer:
    """The top ten of one way: ids, texts, cosines."""

    ids: list[str]
    texts: list[str]
    scores: list[float]

    def check(self, other: Answer) -> None:
        assert self.ids == other.ids
        assert self.texts == other.texts
        assert self.scores == pytest.approx(other.scores, abs=1e-5)


@contextmanager
def opened(index_dir: Path, **options: Any) -> Iterator[Any]:
    """Open the index's collection with a plain Chroma client."""
    client = chromadb.PersistentClient(str(index_dir / "chroma"))
    try:
        yield client.get_collection("epic_rag", **options)
    finally:
        client.close()


def by_chroma(index_dir: Path, questions: Sequence[str], function: EpicEmbeddingFunction | None) -> list[Answer]:
    with opened(index_dir, **({} if function is None else {"embedding_function": function})) as collection:
        found = collection.query(query_texts=list(questions), n_results=10)
    return [
        Answer(ids, texts, [1 - each for each in distances])
        for ids, texts, distances in zip(found["ids"], found["documents"], found["distances"], strict=True)
    ]


def by_vector_store(index_dir: Path, questions: Sequence[str], embedding: EpicEmbedding) -> list[Answer]:
    with opened(index_dir, embedding_function=None) as collection:
        embedding.check_documents(collection.metadata["fingerprint"])
        store = ChromaVectorStore(chroma_collection=collection)
        retriever = VectorStoreIndex.from_vector_store(store, embed_model=embedding).as_retriever(similarity_top_k=10)
        found = [retriever.retrieve(question) for question in questions]
    return [
        # ChromaVectorStore reports exp(-distance).
        Answer([x.node.node_id for x in nodes], [x.text for x in nodes], [1 + math.log(x.score or 0.0) for x in nodes])
        for nodes in found
    ]


def by_retriever(index_dir: Path, questions: Sequence[str], **settings: Any) -> list[Answer]:
    with EpicRetriever(index_dir, similarity_top_k=10, mode="dense", collapse=False, **settings) as retriever:
        found = [retriever.retrieve(question) for question in questions]
    return [
        Answer([x.node.node_id for x in nodes], [x.text for x in nodes], [x.score or 0.0 for x in nodes])
        for nodes in found
    ]


def indexed(folder: Path, *arguments: str | Path) -> Path:
    """Index files with the command; return the index folder."""
    assert run(["index", *map(str, arguments), "--index-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bank")
    DemonstrationBank(PAIRS, instruction="Given a wish in plain words, find the section that says how").save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_index(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("three")
    return indexed(folder / "index", ROOT / "docs" / "architecture.md", "--model", str(tiny_checkpoint))


def test_three_ways_zero_shot(tiny_index: Path, tiny_checkpoint: Path) -> None:
    # A collection knows its embedding function by itself.
    plain = by_chroma(tiny_index, QUESTIONS, None)
    stored = by_vector_store(tiny_index, QUESTIONS, EpicEmbedding(model=str(tiny_checkpoint)))
    for ours, *others in zip(by_retriever(tiny_index, QUESTIONS), plain, stored, strict=True):
        assert len(ours.ids) == 10
        for other in others:
            ours.check(other)


@pytest.mark.parametrize("settings", [{}, {"num_demonstrations": 2}, {"task": "docs"}])
def test_three_ways_with_demonstrations(
    tiny_index: Path, tiny_checkpoint: Path, bank: str, settings: dict[str, Any]
) -> None:
    asked = {"bank": bank, **settings}
    plain = by_chroma(tiny_index, QUESTIONS, EpicEmbeddingFunction(tiny_checkpoint, **asked))
    stored = by_vector_store(tiny_index, QUESTIONS, EpicEmbedding(model=str(tiny_checkpoint), **asked))
    zero_shot = by_retriever(tiny_index, QUESTIONS)
    for ours, bare, *others in zip(by_retriever(tiny_index, QUESTIONS, **asked), zero_shot, plain, stored, strict=True):
        assert ours.scores != bare.scores
        for other in others:
            ours.check(other)


def test_three_ways_with_the_shipped_checkpoint(tmp_path: Path) -> None:
    # The default run has a few pages, because embedding takes its time; the long one all of the documentation.
    pages = [ROOT / "docs"] if SOAK else [ROOT / "docs" / name for name in ("chroma.md", "llama_index.md")]
    index_dir = indexed(tmp_path / "index", *pages)
    with opened(index_dir, embedding_function=None) as collection:
        assert collection.count() > (200 if SOAK else 30)
    for settings in ({"task": "docs"}, {"task": "docs", "bank": "docs", "num_demonstrations": 4}):
        plain = by_chroma(index_dir, QUESTIONS, EpicEmbeddingFunction(**settings))  # type: ignore[arg-type]
        stored = by_vector_store(index_dir, QUESTIONS, EpicEmbedding(**settings))  # type: ignore[arg-type]
        for ours, *others in zip(by_retriever(index_dir, QUESTIONS, **settings), plain, stored, strict=True):
            assert len(ours.ids) == 10
            for other in others:
                ours.check(other)


def test_nodes_of_the_vector_store(tiny_index: Path, tiny_checkpoint: Path) -> None:
    # Its nodes come by the way that ChromaVectorStore keeps for rows which LlamaIndex did not write.
    with opened(tiny_index, embedding_function=None) as collection:
        index = VectorStoreIndex.from_vector_store(
            ChromaVectorStore(chroma_collection=collection), embed_model=EpicEmbedding(model=str(tiny_checkpoint))
        )
        late = MetadataFilters(filters=[MetadataFilter(key="first_line", value=50, operator=FilterOperator.GTE)])
        nodes = index.as_retriever(similarity_top_k=5, filters=late).retrieve("cosine")
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    for each in nodes:
        assert each.node.metadata["path"] == "architecture.md"
        first, last = each.node.metadata["first_line"], each.node.metadata["last_line"]
        assert first >= 50
        assert "\n".join(lines[first - 1 : last]) == each.text
    assert len(nodes) == 5


# -- somebody else's rows in the collection ---------------------------------------------------------------------

Rows = Callable[[Path], dict[str, tuple[str, dict[str, Any], list[float]]]]


def write_from_outside(index_dir: Path, model: str) -> list[str]:
    """Add two nodes to the index's collection by LlamaIndex, with one of our own nodes among them."""
    embedding = EpicEmbedding(model=model)
    with opened(index_dir, embedding_function=None) as collection:
        store = ChromaVectorStore(chroma_collection=collection)
        ours = store.get_nodes(None)[0]
        index = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
        index.insert(Document(text="A note from elsewhere about cats.", id_="note"))
        copied = TextNode(text=ours.get_content(), metadata=ours.metadata, id_="copy")
        VectorStoreIndex(
            [copied, ours], embed_model=embedding, storage_context=StorageContext.from_defaults(vector_store=store)
        )
        rows = collection.get(where={"document_id": {"$in": ["note", "None"]}}, include=[])["ids"]
    assert len(rows) == 2
    return sorted(rows)


def test_foreign_rows(
    docs: Path, tmp_path: Path, tiny_checkpoint: Path, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    def found(indexer: ChromaIndexer) -> list[list[Hit]]:
        return [indexer.query("cats sleep", k=99, mode=mode) for mode in ("dense", "hybrid", "keyword")]

    index_dir = tmp_path / "index"
    with ChromaIndexer(index_dir, encoder=lambda: EpicEncoder.from_pretrained(tiny_checkpoint)) as indexer:
        first = indexer.index([docs])
        clean, before = rows(index_dir), found(indexer)
        foreign = write_from_outside(index_dir, str(tiny_checkpoint))

        # Nothing to do, and nothing done: neither to our rows nor to theirs.
        report = indexer.index([docs])
        assert (report.added, report.changed, report.deleted, report.chunks_embedded) == (0, 0, 0, 0)
        assert (report.unchanged, report.chunks_total) == (first.added, first.chunks_total)
        assert "the collection has 2 rows that epic-rag did not write; they are left alone" in caplog.text
        now = rows(index_dir)
        assert {row: value for row, value in now.items() if row not in foreign} == clean
        assert set(foreign) <= set(now)
        assert found(indexer) == before  # what has no file is not found
        for k in range(1, 5):
            assert indexer.query("cats sleep", k=k, mode="dense", collapse=False) == before[0][:k]
        assert indexer.status().chunks == first.chunks_total

        # An edit and a deletion work as ever.
        (docs / "notes.txt").write_text("Dogs run.\n")
        (docs / "guide.md").unlink()
        report = indexer.index([docs])
        assert (report.added, report.changed, report.deleted) == (0, 1, 1)
        assert set(foreign) <= set(rows(index_dir))
        for hits in found(indexer):
            assert {hit.path for hit in hits} <= {"notes.txt", "src/tool.py"}

        # A rebuild is a new collection: they are gone with the old one.
        indexer.index([docs], rebuild=True)
        assert not set(foreign) & set(rows(index_dir))
