"""`EpicRetriever` of LangChain: the hits of an index as documents, in chains and event loops."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from epic_rag import ConfigError, DemonstrationBank, EpicEncoder
from epic_rag_chroma import ChromaIndexer, IndexNotFoundError, SearchFilters
from epic_rag_langchain import EpicRetriever


@pytest.fixture
def retriever(indexer: ChromaIndexer, docs: Path, tiny_encoder: EpicEncoder) -> Iterator[EpicRetriever]:
    indexer.index([docs])
    made = EpicRetriever(docs / ".epic-rag", encoder=tiny_encoder, k=2)
    yield made
    made.close()


def test_documents_are_the_hits(retriever: EpicRetriever, indexer: ChromaIndexer, docs: Path) -> None:
    hits = indexer.query("cats", k=2)
    documents = retriever.invoke("cats")
    assert [(each.id, each.page_content) for each in documents] == [(hit.id, hit.text) for hit in hits]
    for document, hit in zip(documents, hits, strict=True):
        place = document.metadata
        assert (place["path"], place.get("first_line"), place["score"]) == (hit.path, hit.first_line, hit.score)
        assert Path(place["source"]).read_text(encoding="utf-8").count(hit.text.splitlines()[0])
        assert None not in place.values()


def test_settings_of_one_call(retriever: EpicRetriever, indexer: ChromaIndexer) -> None:
    bank = DemonstrationBank([("cats", "Cats sleep.")])
    found = retriever.invoke("cats", k=3, mode="dense", bank=bank)
    hits = indexer.query("cats", k=3, mode="dense", bank=bank)
    assert [each.id for each in found] == [hit.id for hit in hits]
    assert len(retriever.invoke("cats", filters=SearchFilters(paths=("*.none",)))) == 0
    with pytest.raises(ConfigError, match="Unknown setting top_k"):
        retriever.invoke("cats", top_k=3)


def test_chains_batches_and_event_loops(retriever: EpicRetriever) -> None:
    expected = [each.id for each in retriever.invoke("cats")]
    chain = retriever | (lambda documents: [each.id for each in documents])
    assert chain.invoke("cats") == expected
    assert [[each.id for each in found] for found in retriever.batch(["cats", "cats"])] == [expected] * 2

    async def ask() -> list[list[str | None]]:
        answers = await asyncio.gather(*(retriever.ainvoke("cats") for _ in range(4)))
        return [[each.id for each in found] for found in answers]

    assert asyncio.run(ask()) == [expected] * 4


def test_several_indexes_and_none(retriever: EpicRetriever, docs: Path, tiny_encoder: EpicEncoder) -> None:
    both = EpicRetriever([docs / ".epic-rag"], encoder=tiny_encoder, k=2)
    assert [each.id for each in both.invoke("cats")] == [each.id for each in retriever.invoke("cats")]
    both.close()
    with pytest.raises(IndexNotFoundError):
        EpicRetriever(docs / "nowhere", encoder=tiny_encoder).invoke("cats")
    with pytest.raises(ConfigError, match="k is 0"):
        EpicRetriever(docs / ".epic-rag", k=0)
