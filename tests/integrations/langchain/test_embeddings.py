"""`EpicEmbeddings` in LangChain: vectors, banks, copies, threads, and a vector store of LangChain."""

from __future__ import annotations

import asyncio
import copy
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore

from epic_rag import (
    BankError,
    CheckpointError,
    ConfigError,
    DemonstrationBank,
    EpicEncoder,
    FingerprintError,
    PromptError,
    QueryPrompt,
    TaskError,
)
from epic_rag.query_prompt import QUERY_STRATEGIES
from epic_rag_langchain import EpicEmbeddings
from tests.conftest import make_encoder
from tests.helpers.banks import embedded

TEXTS = ["To install the package, run pip.", "A brown fox.", "def encode(texts): return texts"]
PAIRS = [("how do I undo this", "To undo a step, press Ctrl+Z."), ("where are settings", "Settings lie in a file.")]


@pytest.fixture
def bank() -> DemonstrationBank:
    return DemonstrationBank(PAIRS, instruction="Given a question, retrieve passages that answer it")


@pytest.fixture
def embeddings(tiny_encoder: EpicEncoder) -> EpicEmbeddings:
    return EpicEmbeddings(tiny_encoder)


def test_vectors_are_the_encoders(embeddings: EpicEmbeddings, bank: DemonstrationBank) -> None:
    encoder = embeddings.encoder
    np.testing.assert_allclose(embeddings.embed_documents(TEXTS), encoder.encode_document(TEXTS), atol=1e-6)
    vector = embeddings.embed_query("a fox")
    assert all(type(value) is float for value in vector)
    np.testing.assert_allclose(vector, encoder.encode_query("a fox"), atol=1e-6)
    for strategy in QUERY_STRATEGIES:
        adapted = embeddings.with_bank(bank, strategy=strategy, num_demonstrations=1, selection="nearest")
        expected = encoder.encode_query(
            "a fox", bank=bank, strategy=strategy, num_demonstrations=1, selection="nearest"
        )
        np.testing.assert_allclose(adapted.embed_query("a fox"), expected, atol=1e-6)
        np.testing.assert_allclose(adapted.embed_documents(TEXTS), encoder.encode_document(TEXTS), atol=1e-6)
    assert embeddings.embed_documents([]) == []


def test_prompt_as_an_object_and_as_settings(tiny_checkpoint: Path, bank: DemonstrationBank, tmp_path: Path) -> None:
    embedded(bank, EpicEncoder.from_pretrained(tiny_checkpoint)).save(tmp_path / "bank")
    given = EpicEmbeddings(tiny_checkpoint, QueryPrompt(task="docs", bank=bank))
    named = EpicEmbeddings(str(tiny_checkpoint), task="docs", bank=tmp_path / "bank")
    np.testing.assert_allclose(given.embed_query("cats"), named.embed_query("cats"), atol=1e-6)
    small = EpicEmbeddings(tiny_checkpoint, truncate_dim=8, dtype="bfloat16", device="cpu", max_document_tokens=24)
    assert len(small.embed_query("cats")) == 8
    assert str(small.encoder.dtype) == "torch.bfloat16"
    assert small.encoder.max_document_tokens == 24


def test_a_long_text_is_read_to_its_end_and_reported_once(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings = EpicEmbeddings(tiny_checkpoint)
    long = "the quick brown fox " * 60
    first, second = embeddings.embed_documents([long + "jumps over the dog", long + "reads a window manual"])
    assert not np.allclose(first, second, atol=1e-4)
    (record,) = caplog.records
    assert "reads 128 at a time" in record.getMessage()


def test_a_symmetric_task_embeds_documents_like_queries(embeddings: EpicEmbeddings, tiny_encoder: EpicEncoder) -> None:
    alike = EpicEmbeddings(tiny_encoder, task="sts")
    np.testing.assert_allclose(alike.embed_documents(["a fox"])[0], alike.embed_query("a fox"), atol=1e-6)
    bank = DemonstrationBank(PAIRS, symmetric=True)
    names = {each.document_fingerprint for each in (embeddings, alike, embeddings.with_bank(bank))}
    assert len(names) == 3
    assert all(name.startswith(tiny_encoder.fingerprint) for name in names)


def test_async_and_threads_give_the_same_vectors(embeddings: EpicEmbeddings) -> None:
    async def embed() -> tuple[list[float], list[list[list[float]]]]:
        query = await embeddings.aembed_query("a fox")
        return query, await asyncio.gather(*(embeddings.aembed_documents(TEXTS) for _ in range(4)))

    query, documents = asyncio.run(embed())
    expected = embeddings.embed_documents(TEXTS)
    np.testing.assert_allclose(query, embeddings.embed_query("a fox"), atol=1e-6)
    for found in documents:
        np.testing.assert_allclose(found, expected, atol=1e-6)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(embeddings.embed_documents, [TEXTS] * 8):
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_copies_share_the_model_and_pickles_hold_settings(tiny_checkpoint: Path, bank: DemonstrationBank) -> None:
    embeddings = EpicEmbeddings(tiny_checkpoint, bank=bank)
    for each in (copy.copy(embeddings), copy.deepcopy(embeddings), embeddings.with_bank(None)):
        assert each.encoder is embeddings.encoder
    data = pickle.dumps(embeddings)
    assert len(data) < 10_000 + 4 * bank.embeddings.nbytes if bank.embeddings is not None else len(data) < 10_000
    again = pickle.loads(data)
    assert again.encoder is not embeddings.encoder
    np.testing.assert_allclose(again.embed_query("a fox"), embeddings.embed_query("a fox"), atol=1e-6)


def test_a_pickle_of_another_checkpoint_is_refused(
    tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    data = pickle.dumps(EpicEmbeddings(tmp_path / "model"))
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(other_checkpoint, tmp_path / "model")
    with pytest.raises(FingerprintError, match="has fingerprint"):
        pickle.loads(data).embed_query("a fox")


def test_an_encoder_without_a_source_cannot_be_loaded_again() -> None:
    data = pickle.dumps(EpicEmbeddings(make_encoder(seed=5)))
    with pytest.raises(CheckpointError):
        pickle.loads(data).embed_query("a fox")


def test_wrong_settings_are_errors_at_once(tiny_encoder: EpicEncoder, bank: DemonstrationBank) -> None:
    with pytest.raises(CheckpointError):
        EpicEmbeddings("no-such-model")
    with pytest.raises(TaskError):
        EpicEmbeddings(tiny_encoder, task="cooking")
    with pytest.raises(BankError):
        EpicEmbeddings(tiny_encoder, bank="no-such-bank")
    with pytest.raises(PromptError, match="the bank has 2"):
        EpicEmbeddings(tiny_encoder, bank=bank, num_demonstrations=3)
    with pytest.raises(ConfigError, match="Leave out device"):
        EpicEmbeddings(tiny_encoder, device="cpu")
    with pytest.raises(ConfigError, match="Unknown setting instructions"):
        EpicEmbeddings(tiny_encoder, instructions="Find it")  # type: ignore[call-arg]


def test_a_vector_store_of_langchain(embeddings: EpicEmbeddings, bank: DemonstrationBank) -> None:
    adapted = embeddings.with_bank(bank)
    store = InMemoryVectorStore(adapted)
    store.add_documents([Document(text, id=str(number)) for number, text in enumerate(TEXTS)])
    found = store.similarity_search_with_score("where is the fox", k=3)
    query, documents = np.array(adapted.embed_query("where is the fox")), np.array(adapted.embed_documents(TEXTS))
    order = np.argsort(-(documents @ query))
    assert [document.id for document, _ in found] == [str(number) for number in order]
    np.testing.assert_allclose([score for _, score in found], (documents @ query)[order], atol=1e-5)
    retrieved = asyncio.run(store.as_retriever(search_kwargs={"k": 1}).ainvoke("where is the fox"))
    assert retrieved[0].id == str(order[0])
