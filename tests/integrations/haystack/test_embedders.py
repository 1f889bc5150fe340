"""Embedders in Haystack: vectors, settings, YAML, and pipelines of Haystack."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import haystack
import numpy as np
import pytest
from haystack import Document, Pipeline
from haystack.components.retrievers import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import ComponentDevice

from epic_rag import BankError, CheckpointError, DemonstrationBank, EpicEncoder, PromptError, TaskError
from epic_rag_haystack import EpicDocumentEmbedder, EpicTextEmbedder
from tests.helpers.banks import embedded

# Haystack 2 has a class of its own for event loops.
AsyncPipeline: Any = getattr(haystack, "AsyncPipeline", Pipeline)
# And Haystack 3 makes objects of a YAML file only of modules that the caller trusts.
TRUSTED: dict[str, Any] = {} if haystack.__version__.startswith("2") else {"allowed_modules": ["epic_rag_haystack"]}
TEXTS = ["To install the package, run pip.", "A brown fox.", "def encode(texts): return texts"]
BANK = DemonstrationBank([("how do I undo this", "Press Ctrl+Z."), ("where are settings", "In a file.")], task="docs")


@pytest.fixture
def documents() -> list[Document]:
    return [Document(content=text, meta={"title": f"Title {number}"}) for number, text in enumerate(TEXTS)]


def vectors_of(found: list[Document]) -> Any:
    return np.array([document.embedding for document in found])


def test_vectors_are_the_encoders(tiny_checkpoint: Path, documents: list[Document]) -> None:
    text, document = EpicTextEmbedder(tiny_checkpoint, bank=BANK), EpicDocumentEmbedder(str(tiny_checkpoint))
    for component in (text, document):
        component.warm_up()
    encoder = text.encoder
    vector = text.run("a fox")["embedding"]
    assert all(type(value) is float for value in vector)
    np.testing.assert_allclose(vector, encoder.encode_query("a fox", bank=BANK), atol=1e-6)
    found = document.run(documents)["documents"]
    np.testing.assert_allclose(vectors_of(found), encoder.encode_document(TEXTS), atol=1e-6)
    assert [each.embedding for each in documents] == [None] * 3
    assert [(each.id, each.content, each.meta) for each in found] == [(d.id, d.content, d.meta) for d in documents]
    assert document.run([]) == {"documents": []}


def test_metadata_stands_before_the_text(tiny_checkpoint: Path) -> None:
    component = EpicDocumentEmbedder(tiny_checkpoint, meta_fields_to_embed=["title", "page"], embedding_separator=" | ")
    given = [Document(content="Text", meta={"title": "A", "page": 3}), Document(content=None, meta={"title": "B"})]
    found = component.run(given)["documents"]
    expected = component.encoder.encode_document(["A | 3 | Text", "B | "])
    np.testing.assert_allclose(vectors_of(found), expected, atol=1e-6)


def test_a_long_document_is_read_to_its_end(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = "the quick brown fox " * 60
    component = EpicDocumentEmbedder(tiny_checkpoint)
    documents = component.run([Document(content=long + end) for end in ("jumps", "sleeps")])["documents"]
    first, second = vectors_of(documents)
    assert not np.allclose(first, second, atol=1e-4)
    assert sum("reads 128 at a time" in record.getMessage() for record in caplog.records) == 1


def test_a_symmetric_task_embeds_documents_like_queries(tiny_checkpoint: Path) -> None:
    text, document = (each(tiny_checkpoint, task="sts") for each in (EpicTextEmbedder, EpicDocumentEmbedder))
    [found] = document.run([Document(content="a fox")])["documents"]
    np.testing.assert_allclose(found.embedding, text.run("a fox")["embedding"], atol=1e-6)


@pytest.mark.parametrize("bank", [BANK, "docs", None, "folder"])
def test_settings_survive_a_dictionary(tiny_checkpoint: Path, bank: Any, tmp_path: Path) -> None:
    if bank == "folder":
        embedded(DemonstrationBank(BANK.demonstrations), EpicEncoder.from_pretrained(tiny_checkpoint)).save(
            tmp_path / "bank"
        )
        bank = tmp_path / "bank"
    settings: dict[str, Any] = {"task": "docs", "bank": bank, "truncate_dim": 16, "max_query_tokens": 32}
    for kind in (EpicTextEmbedder, EpicDocumentEmbedder):
        made = kind(tiny_checkpoint, device=ComponentDevice.from_str("cpu"), **settings)
        data = made.to_dict()
        again = kind.from_dict(data)
        assert again.to_dict() == data
        assert data["init_parameters"]["device"] == "cpu"
        assert data["type"] == f"epic_rag_haystack.embedders.{kind.__name__}"
    one, other = (each(tiny_checkpoint, **settings).run("cats") for each in (EpicTextEmbedder,) * 2)
    assert one == other


def test_pipelines_and_their_yaml(tiny_checkpoint: Path, documents: list[Document]) -> None:
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    indexing = Pipeline()
    indexing.add_component("embedder", EpicDocumentEmbedder(tiny_checkpoint))
    indexing.add_component("writer", DocumentWriter(document_store=store))
    indexing.connect("embedder.documents", "writer.documents")
    again = Pipeline.loads(indexing.dumps(), **TRUSTED)
    assert again.to_dict() == indexing.to_dict()
    indexing.run({"embedder": {"documents": documents}})
    assert store.count_documents() == 3

    def asking(kind: Any) -> Any:
        pipeline = kind()
        pipeline.add_component("embedder", EpicTextEmbedder(tiny_checkpoint, bank=BANK))
        pipeline.add_component("retriever", InMemoryEmbeddingRetriever(document_store=store, top_k=3))
        pipeline.connect("embedder.embedding", "retriever.query_embedding")
        return pipeline

    found = asking(Pipeline).run({"embedder": {"text": "the fox"}})["retriever"]["documents"]
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    cosines = encoder.encode_document(TEXTS) @ encoder.encode_query("the fox", bank=BANK)
    assert [each.content for each in found] == [TEXTS[row] for row in np.argsort(-cosines)]
    later = asyncio.run(asking(AsyncPipeline).run_async({"embedder": {"text": "the fox"}}))
    assert [each.content for each in later["retriever"]["documents"]] == [each.content for each in found]


def test_wrong_inputs_and_settings(tiny_checkpoint: Path) -> None:
    with pytest.raises(TypeError, match="takes one text"):
        EpicTextEmbedder(tiny_checkpoint).run([Document(content="a")])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a list of Documents"):
        EpicDocumentEmbedder(tiny_checkpoint).run("a text")  # type: ignore[arg-type]
    with pytest.raises(TaskError):
        EpicTextEmbedder(task="cooking")
    with pytest.raises(BankError):
        EpicTextEmbedder(bank="no-such-bank")
    with pytest.raises(PromptError, match="the bank has 2"):
        EpicTextEmbedder(bank=BANK, num_demonstrations=3)
    with pytest.raises(CheckpointError):
        EpicTextEmbedder("no-such-model").warm_up()
