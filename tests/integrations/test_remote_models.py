"""Remote models by one name in the command line, LlamaIndex, Chroma and LangChain: index, query, bank, reader."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from llama_index.core import Document, VectorStoreIndex

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.reader import DemonstrationReader
from epic_rag_chroma import EpicEmbeddingFunction
from epic_rag_cli.main import run
from epic_rag_langchain import EpicEmbeddings
from llama_index.embeddings.epic import EpicEmbedding
from llama_index.retrievers.epic import EpicRetriever
from tests.helpers.remote_service import SHAPES, RemoteService, remote_service

FILES = {
    "cats.md": "# Cats\n\nCats sleep most of the day.\n",
    "backup.md": "# Backup\n\nRestore the dump of the last night.\n",
    "printer.md": "# Printer\n\nOpen the rear cover to clear a jam.\n",
}
# Queries share words with their passages: the service's vectors are sums over words.
BANK = [
    ("jam behind the rear cover", "Open the rear cover to clear a jam."),
    ("restore last night dump", "Restore the dump of the last night."),
    ("red paint wall dry", "Let the red paint on the wall dry."),
    ("oil the bicycle chain", "Oil the chain of the bicycle once a month."),
]


@pytest.fixture(scope="module")
def service() -> Iterator[RemoteService]:
    with remote_service() as made:
        yield made


@pytest.fixture(params=SHAPES)
def name(
    request: pytest.FixtureRequest, service: RemoteService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The name of the model in one shape; the working directory is empty, and no key is set."""
    monkeypatch.chdir(tmp_path)
    for variable in ("OPENAI_API_KEY", "OLLAMA_API_KEY", "TEI_API_KEY", "HF_TOKEN", "COHERE_API_KEY", "CO_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    service.requests.clear()
    return str(request.param.format(service.url))


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    status = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def save_bank(encoder: EpicEncoder, folder: Path) -> DemonstrationBank:
    bank = DemonstrationBank(BANK)
    bank.embed(encoder)
    bank.save(folder)
    return bank


def test_the_command_line_and_the_retriever(
    name: str, service: RemoteService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, text in FILES.items():
        Path(file).write_text(text)
    Path("pairs.jsonl").write_text("".join(json.dumps({"query": q, "passage": p}) + "\n" for q, p in BANK))
    report = printed(capsys, "index", "cats.md", "backup.md", "printer.md", "--model", name, "--json")
    assert report["chunks_embedded"] == 3
    service.requests.clear()
    assert printed(capsys, "index", "--json")["chunks_embedded"] == 0
    assert not any("Cats sleep" in text for text in service.texts())
    assert run(["bank", "build", "pairs.jsonl", "--out", "bank", "--task", "docs", "--model", name]) == 0
    plain = printed(capsys, "query", "my cover jam", "--mode", "dense", "--json")["hits"]
    few_shot = ("--bank", "bank", "--strategy", "task-vector")
    moved = printed(capsys, "query", "my cover jam", "--mode", "dense", *few_shot, "--json")["hits"]
    cosines = [{hit["path"]: hit["cosine"] for hit in hits} for hits in (plain, moved)]
    assert cosines[1]["printer.md"] > cosines[0]["printer.md"]
    with EpicRetriever(".epic-rag", similarity_top_k=3, mode="dense", bank="bank", strategy="task-vector") as retriever:
        found = retriever.retrieve("my cover jam")
    assert [hit.node.metadata["path"] for hit in found] == [hit["path"] for hit in moved]
    facts = {fact["name"]: fact["value"] for fact in printed(capsys, "models", "show", name, "--json")}
    assert facts["dimensions"] == "16"


def test_llama_index_chroma_and_langchain_by_the_same_name(name: str, tmp_path: Path) -> None:
    encoder = EpicEncoder.from_pretrained(name)
    bank = save_bank(encoder, tmp_path / "bank")
    texts = list(FILES.values())
    expected, query = encoder.encode_document(texts), encoder.encode_query("paper jam", bank=bank)
    order = np.argsort(-(expected @ query)).tolist()

    embedding = EpicEmbedding(model=name, bank=bank)
    index = VectorStoreIndex.from_documents(
        [Document(text=text, id_=str(row)) for row, text in enumerate(texts)], embed_model=embedding
    )
    hits = index.as_retriever(similarity_top_k=3).retrieve("paper jam")
    assert [hit.node.ref_doc_id for hit in hits] == [str(row) for row in order]
    again = EpicEmbedding.from_dict(embedding.to_dict())
    np.testing.assert_allclose(again.get_query_embedding("paper jam"), query, atol=1e-6)

    with chromadb.PersistentClient(str(tmp_path / "chroma")) as client:  # type: ignore[attr-defined]
        function = EpicEmbeddingFunction(name, bank=tmp_path / "bank")
        collection = client.create_collection("texts", embedding_function=function)
        collection.add(ids=[str(row) for row in range(3)], documents=texts)
        found = client.get_collection("texts").query(query_texts=["paper jam"], n_results=3)
        assert found["ids"] == [[str(row) for row in order]]

    embeddings = EpicEmbeddings(name, bank=bank)
    np.testing.assert_allclose(embeddings.embed_documents(texts), expected, atol=1e-6)
    np.testing.assert_allclose(embeddings.embed_query("paper jam"), query, atol=1e-6)


def test_a_reader_is_trained_for_a_remote_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import epic_rag.training.reader_training as module

    options = module.ReaderTrainingOptions(rows=60, episodes=8, largest=16, steps=10)
    monkeypatch.setattr(module, "ReaderTrainingOptions", lambda: options)
    rows = ({"query": f"term {number}", "positive": f"what {number} means"} for number in range(60))
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["train", "reader", "--model", name, "--data", "pairs.jsonl"]) == 2
    assert "Pass --output DIR" in " ".join(capsys.readouterr().err.split())
    printed(capsys, "train", "reader", "--model", name, "--data", "pairs.jsonl", "-o", "reader", "--json")
    trained = EpicEncoder.from_pretrained(f"{name}?reader=reader")
    assert trained.reader.fingerprint == DemonstrationReader.load("reader").fingerprint
    bank = DemonstrationBank([(f"term {number}", f"what {number} means") for number in range(20)])
    universal = EpicEncoder.from_pretrained(name)
    moved = trained.encode_query("term 99", bank=bank)
    assert math.isclose(float(np.linalg.norm(moved)), 1.0, abs_tol=1e-5)
    assert not np.allclose(moved, universal.encode_query("term 99", bank=bank), atol=1e-4)
