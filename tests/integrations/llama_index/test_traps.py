"""Traps of LlamaIndex 0.14: each is reproduced here, or would make its test fail."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_index.core
import numpy as np
import pytest
from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.constants import DEFAULT_CHUNK_SIZE
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseComponent
from llama_index.core.storage.kvstore import SimpleKVStore

from epic_rag import DemonstrationBank, EpicEncoder, FingerprintError
from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from llama_index.embeddings.epic import EpicEmbedding

BANK = DemonstrationBank([("how do I undo this", "To undo a step, press Ctrl+Z.")], instruction="Find the manual page")
OTHER_BANK = DemonstrationBank([("where are settings", "Settings lie in a file.")], instruction="Find the manual page")
TEXTS = ["Paris", "Rome", "Oslo", "Lima"]


def count_calls(monkeypatch: pytest.MonkeyPatch, encoder: EpicEncoder) -> dict[str, list[str]]:
    """Every text that reaches the encoder, by role."""
    calls: dict[str, list[str]] = {"query": [], "document": []}

    def watch(role: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(texts: list[str], *prompt: Any, **options: Any) -> Any:
            calls[role].extend(texts)
            return method(texts, *prompt, **options)

        return call

    monkeypatch.setattr(encoder, "encode_query", watch("query", encoder.encode_query))
    monkeypatch.setattr(encoder, "encode_document", watch("document", encoder.encode_document))
    return calls


# -- embeddings_cache: one key space for queries and documents --------------------------------------------------------


def cached(checkpoint: Path, store: SimpleKVStore, bank: DemonstrationBank | None = None) -> EpicEmbedding:
    return EpicEmbedding(model=str(checkpoint), bank=bank, embeddings_cache=store)


def test_cache_keeps_queries_and_documents_apart(tiny_checkpoint: Path, embedding: EpicEmbedding) -> None:
    for ask_first in (True, False):
        both = cached(tiny_checkpoint, SimpleKVStore(), BANK)
        if ask_first:
            query, text = both.get_query_embedding("Paris"), both.get_text_embedding("Paris")
        else:
            text, query = both.get_text_embedding("Paris"), both.get_query_embedding("Paris")
        assert text == embedding.get_text_embedding("Paris")
        assert query == embedding.with_bank(BANK).get_query_embedding("Paris")
        assert query != text


def test_cache_is_used_by_all_methods(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = cached(tiny_checkpoint, SimpleKVStore())
    calls = count_calls(monkeypatch, embedding.encoder)
    for _ in range(2):
        vectors = embedding.get_text_embedding_batch(TEXTS)
        assert embedding.get_text_embedding("Rome") == vectors[1]
        assert asyncio.run(embedding.aget_text_embedding_batch([*TEXTS[2:], "Bern"]))[:2] == vectors[2:]
        query = embedding.get_query_embedding("Rome")
        assert asyncio.run(embedding.aget_query_embedding("Rome")) == query
    assert calls == {"query": ["Rome"], "document": [*TEXTS, "Bern"]}


def test_cache_is_never_stale(tiny_checkpoint: Path, other_checkpoint: Path) -> None:
    store = SimpleKVStore()
    makers = [(tiny_checkpoint, BANK), (tiny_checkpoint, OTHER_BANK), (other_checkpoint, BANK)]
    for checkpoint, bank in makers:
        shared, alone = cached(checkpoint, store, bank), EpicEmbedding(model=str(checkpoint), bank=bank)
        assert shared.get_query_embedding("Paris") == alone.get_query_embedding("Paris")
        assert shared.get_text_embedding("Paris") == alone.get_text_embedding("Paris")
    # three query vectors, but one document vector per checkpoint: a bank does not change documents
    assert len(store.get_all(collection="embeddings")) == 3 + 2


def test_cache_is_not_a_setting_and_survives_copies(tiny_checkpoint: Path) -> None:
    embedding = cached(tiny_checkpoint, SimpleKVStore())
    assert embedding.to_dict() == EpicEmbedding(model=str(tiny_checkpoint)).to_dict()
    vector = embedding.get_text_embedding("Paris")
    for copied in (embedding.with_bank(BANK), pickle.loads(pickle.dumps(embedding))):
        assert len(copied.embeddings_cache.get_all("embeddings")) == 1
        assert copied.get_text_embedding("Paris") == vector


# -- the IngestionPipeline's cache hashes to_dict() -------------------------------------------------------------------


def ingest(embedding: EpicEmbedding, cache: IngestionCache, texts: list[str] = TEXTS) -> list[list[float]]:
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0), embedding], cache=cache
    )
    nodes = pipeline.run(documents=[Document(text=text, id_=text) for text in texts])
    return [node.embedding or [] for node in nodes]


def test_pipeline_cache_hits_on_the_second_run(embedding: EpicEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, cache = count_calls(monkeypatch, embedding.encoder), IngestionCache()
    first = ingest(embedding, cache)
    assert ingest(EpicEmbedding.from_dict(embedding.to_dict()), cache) == first
    assert ingest(embedding, cache) == first
    assert calls["document"] == TEXTS


def test_pipeline_cache_misses_another_checkpoint_in_the_folder(
    tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    folder, cache = tmp_path / "model", IngestionCache()
    shutil.copytree(tiny_checkpoint, folder)
    before = ingest(EpicEmbedding(model=str(folder)), cache)
    shutil.rmtree(folder)
    shutil.copytree(other_checkpoint, folder)
    after = ingest(EpicEmbedding(model=str(folder)), cache)
    expected = EpicEncoder.from_pretrained(other_checkpoint).encode_document(TEXTS)
    assert np.allclose(after, expected, atol=1e-6)
    assert not np.allclose(after, before, atol=1e-3)


def test_pipeline_cache_misses_another_symmetric_bank_in_the_folder(
    tiny_checkpoint: Path, embedding: EpicEmbedding, tmp_path: Path
) -> None:
    cache, seen = IngestionCache(), []
    for pair in (("a", "b"), ("c", "d")):
        bank = DemonstrationBank([pair], instruction="Retrieve texts of the same meaning", symmetric=True)
        bank.save(tmp_path / "bank")
        adapted = EpicEmbedding(model=str(tiny_checkpoint), bank=str(tmp_path / "bank"))
        seen.append(ingest(adapted, cache))
        assert np.allclose(seen[-1], embedding.encoder.encode_query(TEXTS, bank=bank), atol=1e-6)
    assert not np.allclose(*seen, atol=1e-3)


def test_for_documents_hits_when_the_bank_changes(embedding: EpicEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, cache = count_calls(monkeypatch, embedding.encoder), IngestionCache()
    variants = [
        embedding,
        embedding.with_bank(BANK),
        embedding.with_bank(OTHER_BANK),
        embedding.model_copy(update={"task": "qa"}),
    ]
    vectors = [ingest(variant.for_documents(), cache) for variant in variants]
    assert calls["document"] == TEXTS
    assert all(rows == vectors[0] for rows in vectors)
    # without for_documents() another bank misses the cache: more work for the same vectors
    assert ingest(embedding.with_bank(BANK), cache) == vectors[0]
    assert calls["document"] == TEXTS * 2


def test_for_documents_of_a_symmetric_task(tiny_checkpoint: Path) -> None:
    embedding = EpicEmbedding(model=str(tiny_checkpoint), task="sts")
    assert embedding.for_documents().to_dict() == embedding.to_dict()


# -- copies: __setstate__ re-runs __init__(**fields) ------------------------------------------------------------------


def test_fields_make_an_equal_embedding(embedding: EpicEmbedding) -> None:
    adapted = embedding.with_bank(BANK)
    fields = {name: getattr(adapted, name) for name in EpicEmbedding.model_fields}
    assert EpicEmbedding(**fields).to_dict() == adapted.to_dict()
    # what BaseComponent would do, should a later LlamaIndex call it directly
    restored = EpicEmbedding.__new__(EpicEmbedding)
    BaseComponent.__setstate__(restored, {"__dict__": fields})
    assert restored.get_query_embedding("Paris") == adapted.get_query_embedding("Paris")


def test_unpickled_copy_loads_at_first_use(tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    embedding = EpicEmbedding(model=str(folder))
    sent = pickle.dumps(embedding)
    shutil.rmtree(folder)
    # unpickling must not raise, and so not load: a multiprocessing pool would wait forever
    missing, changed = pickle.loads(sent), pickle.loads(sent)
    with pytest.raises(Exception, match="no checkpoint"):
        missing.get_query_embedding("Paris")
    shutil.copytree(other_checkpoint, folder)
    for embed in (changed.get_query_embedding, changed.get_text_embedding):
        with pytest.raises(FingerprintError):
            embed("Paris")
    with pytest.raises(FingerprintError):
        asyncio.run(changed.aget_query_embedding("Paris"))


def test_from_dict_of_another_checkpoint(tiny_checkpoint: Path, other_checkpoint: Path) -> None:
    tiny, other = (EpicEmbedding(model=str(folder)) for folder in (tiny_checkpoint, other_checkpoint))
    data = {**tiny.to_dict(), "model": str(other_checkpoint)}
    with pytest.raises(FingerprintError) as caught:
        EpicEmbedding.from_dict(data)
    message = str(caught.value)
    assert tiny.encoder.fingerprint in message
    assert other.encoder.fingerprint in message
    assert str(other_checkpoint) in message
    assert "from_dict(data, fingerprint=None)" in message
    assert "\n" not in message
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    # both remedies work
    assert EpicEmbedding.from_dict(data, fingerprint=None).fingerprint == other.fingerprint
    assert EpicEmbedding.from_dict(data, model=str(tiny_checkpoint)).fingerprint == tiny.fingerprint


def test_edited_bank_is_used_and_logged(
    embedding: EpicEmbedding, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    BANK.save(tmp_path)
    data = embedding.with_bank(tmp_path).to_dict()
    OTHER_BANK.save(tmp_path)
    with caplog.at_level(logging.INFO, logger="llama_index.embeddings.epic"):
        again = EpicEmbedding.from_dict(data)
    assert again.fingerprint == embedding.with_bank(OTHER_BANK).fingerprint != data["fingerprint"]
    assert data["fingerprint"] in caplog.text


def test_edited_symmetric_bank_is_an_error(embedding: EpicEmbedding, tmp_path: Path) -> None:
    for pair in (("a", "b"), ("c", "d")):
        DemonstrationBank([pair], symmetric=True).save(tmp_path)
        if pair[0] == "a":
            data = embedding.with_bank(tmp_path).to_dict()
    with pytest.raises(FingerprintError, match="symmetric"):
        EpicEmbedding.from_dict(data)


# -- async: the default methods block the event loop ------------------------------------------------------------------


@pytest.fixture
def gate(embedding: EpicEmbedding, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An encoder that waits until the event loop opens the gate."""
    opened = threading.Event()

    def hold(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(texts: list[str], *prompt: Any, **options: Any) -> Any:
            assert opened.wait(timeout=20), "the event loop is blocked"
            return method(texts, *prompt, **options)

        return call

    for name in ("encode_query", "encode_document"):
        monkeypatch.setattr(embedding.encoder, name, hold(getattr(embedding.encoder, name)))
    yield opened
    opened.set()


@pytest.mark.parametrize("method", ["aget_query_embedding", "aget_text_embedding", "aget_text_embedding_batch"])
def test_async_methods_do_not_block_the_event_loop(
    embedding: EpicEmbedding, gate: threading.Event, method: str
) -> None:
    embedding.embed_batch_size = 2  # more batches than the loop's shared pool has threads

    async def embed() -> Any:
        argument = ["Paris"] * 100 if method.endswith("batch") else "Paris"
        work = asyncio.create_task(getattr(embedding, method)(argument))
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not work.done()
        # the loop's shared thread pool is not filled by waiting batches either
        assert await asyncio.wait_for(asyncio.to_thread(time.monotonic), timeout=10)
        gate.set()
        return await work

    assert asyncio.run(embed())


def test_async_pipeline_does_not_block_the_event_loop(embedding: EpicEmbedding, gate: threading.Event) -> None:
    async def embed() -> Any:
        pipeline = IngestionPipeline(transformations=[embedding], disable_cache=True)
        work = asyncio.create_task(pipeline.arun(documents=[Document(text=text) for text in TEXTS]))
        await asyncio.sleep(0.01)
        gate.set()
        return await work

    nodes = asyncio.run(embed())
    assert [node.embedding for node in nodes] == embedding.get_text_embedding_batch(TEXTS)


def test_encoder_calls_are_serialised(embedding: EpicEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    """EpicEncoder is not thread-safe: threads, event loops and copies of an embedding share one lock."""
    encoder, inside, most = embedding.encoder, 0, 0
    original = encoder.encode_document

    def encode(texts: list[str], **options: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.002)
        inside -= 1
        return original(texts, **options)

    monkeypatch.setattr(encoder, "encode_document", encode)
    others = [embedding, embedding.with_bank(BANK), embedding.model_copy()]
    expected = embedding.get_text_embedding("Paris")
    with ThreadPoolExecutor(6) as pool:
        sync = [pool.submit(other.get_text_embedding, "Paris") for other in others * 4]
        loops = [pool.submit(lambda: asyncio.run(others[1].aget_text_embedding("Paris"))) for _ in range(4)]
        assert all(future.result() == expected for future in [*sync, *loops])
    assert most == 1


# -- the global embed model gets a callback manager assigned ---------------------------------------------------------


def test_global_embed_model(embedding: EpicEmbedding) -> None:
    previous = Settings._embed_model
    try:
        Settings.embed_model = embedding
        index = VectorStoreIndex.from_documents([Document(text=text) for text in TEXTS])
        assert len(index.as_retriever(similarity_top_k=3).retrieve("a fox")) == 3
    finally:
        Settings._embed_model = previous


# -- num_workers ------------------------------------------------------------------------------------------------------


def test_worker_processes_with_a_splitter(embedding: EpicEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.cpu_count", lambda: 2)  # LlamaIndex warns on a machine with one core
    # Without this a worker fetches tiktoken's file; offline, the pool loses its task and waits forever.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"))
    adapted = embedding.with_bank(BANK)
    documents = [Document(text=text, id_=text) for text in TEXTS]
    expected = adapted.get_text_embedding_batch(TEXTS)
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0), adapted], cache=IngestionCache()
    )
    nodes = pipeline.run(documents=documents, num_workers=2)
    assert np.allclose([node.embedding for node in nodes], expected, atol=1e-6)
    # The workers' cache entries came back, one for each half.
    calls = count_calls(monkeypatch, adapted.encoder)
    again = [node for half in (documents[:2], documents[2:]) for node in pipeline.run(documents=half)]
    assert np.allclose([node.embedding for node in again], expected, atol=1e-6)
    assert calls["document"] == []


# -- the default chunk is longer than what the model reads ------------------------------------------------------------


def test_the_page_names_the_default_chunk_and_what_the_model_reads() -> None:
    root = Path(__file__).parents[3]
    config = json.loads((root / "epic_rag" / "checkpoints" / DEFAULT_CHECKPOINT / "epic.json").read_text("utf-8"))
    page = (root / "docs" / "llama_index.md").read_text("utf-8")
    assert f"{DEFAULT_CHUNK_SIZE:,} tokens" in page
    assert f"reads {config['max_document_tokens']}" in page
