"""Clients as they are installed, against a server on loopback; requests of others in their exact shapes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from epic_rag import EpicEncoder
from epic_rag_server import AccessPolicy
from tests.conftest import make_encoder
from tests.integrations.server.conftest import Running, index_files, serving

KEY = "k3y-of-the-tests"
TEXTS = ["install the package", "undo\nthe last commit", "猫 sleeps"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with a key, as clients insist on one."""
    folder = tmp_path_factory.mktemp("clients")
    encoder = make_encoder()
    with serving(
        encoder,
        folder,
        indexes={"docs": index_files(folder / "docs", encoder)},
        policy=AccessPolicy(api_key=KEY),
        role_prefixes=("query: ", "passage: "),
        headers={"Authorization": f"Bearer {KEY}"},
    ) as running:
        yield running


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=1e-5)


def test_openai(server: Running, reference: EpicEncoder) -> None:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        answer = client.embeddings.create(model="tiny", input=[*TEXTS, ""])  # asks for base64
        close([row.embedding for row in answer.data], reference.encode_document([*TEXTS, ""]))
        assert answer.usage.total_tokens == sum(len(row.ids) for row in reference.prompt.documents([*TEXTS, ""]))
        answer = client.embeddings.create(model="tiny-query@docs", input="undo it", encoding_format="float")
        close(answer.data[0].embedding, reference.encode_query("undo it", bank="docs"))
        answer = client.embeddings.create(
            model="tiny", input="undo it", dimensions=8, extra_body={"input_type": "query", "bank": "docs"}
        )
        close(answer.data[0].embedding, reference.encode_query("undo it", bank="docs", truncate_dim=8))
        raw = client.embeddings.with_raw_response.create(model="tiny", input="a")
        assert raw.headers["x-epic-fingerprint"] == reference.fingerprint
        assert "tiny-query@docs" in [model.id for model in client.models.list()]
        assert client.models.retrieve("tiny-query").id == "tiny-query"
        large = client.embeddings.create(model="tiny", input=[f"text {number}" for number in range(2048)])
        assert [row.index for row in large.data] == list(range(2048))


def test_errors_of_openai(server: Running) -> None:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
            client.embeddings.create(model="tiny", input=[[1, 2, 3]])
        with pytest.raises(openai.NotFoundError, match="tiny-query"):
            client.embeddings.create(model="text-embedding-3-small", input="a")
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.embeddings.create(model="tiny", input="a")


def test_llama_index_openai_like(server: Running, reference: EpicEncoder) -> None:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    settings: dict[str, Any] = {"api_base": f"{server.url}/v1", "api_key": KEY, "max_retries": 0}
    documents = OpenAILikeEmbedding(model_name="tiny", **settings)
    # It replaces line ends by blanks before it sends a text.
    sent = [text.replace("\n", " ") for text in TEXTS]
    close(documents.get_text_embedding_batch(TEXTS), reference.encode_document(sent))
    queries = OpenAILikeEmbedding(model_name="tiny-query@docs", **settings)
    close(queries.get_query_embedding("undo it"), reference.encode_query("undo it", bank="docs"))
    by_field = OpenAILikeEmbedding(
        model_name="tiny", additional_kwargs={"extra_body": {"input_type": "query"}}, **settings
    )
    close(by_field.get_query_embedding("undo it"), reference.encode_query("undo it"))


def test_llama_index_text_embeddings_inference(server: Running, reference: EpicEncoder) -> None:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    model = TextEmbeddingsInference(
        model_name="tiny", base_url=server.url, auth_token=KEY, text_instruction="", query_instruction=""
    )
    close(model.get_text_embedding_batch(TEXTS), reference.encode_document([text.strip() for text in TEXTS]))
    close(model.get_query_embedding("undo it"), reference.encode_document("undo it"))  # it sends no role


def test_langchain(server: Running, reference: EpicEncoder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of LangChain's imports
        from langchain_openai import OpenAIEmbeddings

    settings: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": KEY, "max_retries": 0}
    model = OpenAIEmbeddings(model="tiny", check_embedding_ctx_length=False, **settings)
    close(model.embed_documents([*TEXTS, ""]), reference.encode_document([*TEXTS, ""]))
    queries = OpenAIEmbeddings(model="tiny-query@docs", check_embedding_ctx_length=False, **settings)
    close(queries.embed_query("undo it"), reference.encode_query("undo it", bank="docs"))
    by_field = OpenAIEmbeddings(
        model="tiny",
        check_embedding_ctx_length=False,
        model_kwargs={"extra_body": {"input_type": "query"}},
        **settings,
    )
    close(by_field.embed_query("undo it"), reference.encode_query("undo it"))


def test_open_webui(server: Running, reference: EpicEncoder) -> None:
    # RAG_EMBEDDING_PREFIX_FIELD_NAME=input_type, RAG_EMBEDDING_QUERY_PREFIX=query, RAG_EMBEDDING_CONTENT_PREFIX=passage
    for role, encode in (("query", reference.encode_query), ("passage", reference.encode_document)):
        answer = server.post("/v1/embeddings", {"input": TEXTS, "model": "tiny", "input_type": role}).json()
        close([row["embedding"] for row in answer["data"]], encode(TEXTS))
    body = {"model": "tiny", "query": "undo it", "documents": TEXTS, "top_n": len(TEXTS)}
    results = server.post("/v1/rerank", body).json()["results"]
    assert sorted(row["index"] for row in results) == [0, 1, 2]
    assert all(isinstance(row["relevance_score"], float) for row in results)


def test_anything_llm(server: Running, reference: EpicEncoder) -> None:
    # GENERIC_OPEN_AI_EMBEDDING_QUERY_PREFIX="query: ", GENERIC_OPEN_AI_EMBEDDING_PASSAGE_PREFIX="passage: "
    body = {"model": "tiny", "input": [f"passage: {text}" for text in TEXTS] * 160}
    answer = server.post("/v1/embeddings", body).json()
    close([row["embedding"] for row in answer["data"]], np.tile(reference.encode_document(TEXTS), (160, 1)))
    answer = server.post("/v1/embeddings", {"model": "tiny", "input": ["query: undo it"]}).json()
    close(answer["data"][0]["embedding"], reference.encode_query("undo it"))


def test_cohere_and_jina_rerankers(server: Running) -> None:
    for body in (
        {"model": "tiny", "query": "undo it", "documents": TEXTS, "top_n": 2, "return_documents": True},
        {"model": "tiny-query@docs", "query": "undo it", "documents": [{"text": text} for text in TEXTS]},
    ):
        results = server.post("/v1/rerank", body).json()["results"]
        assert [row["relevance_score"] for row in results] == sorted(
            (row["relevance_score"] for row in results), reverse=True
        )
