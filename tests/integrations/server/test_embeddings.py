from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from epic_rag import DemonstrationBank, EpicEncoder
from tests.conftest import make_encoder
from tests.integrations.server.conftest import Running, serving

TEXTS = ["install the package", "", "  ", "a" * 5000, "naïve 猫\n\ttabs\0"]


def vectors(response: httpx.Response) -> np.ndarray[Any, Any]:
    assert response.status_code == 200, response.text
    return np.array([row["embedding"] for row in response.json()["data"]], np.float32)


def test_passages_are_the_encoders_documents(running: Running, reference: EpicEncoder) -> None:
    response = running.post("/v1/embeddings", {"model": "tiny", "input": TEXTS})
    np.testing.assert_allclose(vectors(response), reference.encode_document(TEXTS), atol=1e-5)
    assert [row["index"] for row in response.json()["data"]] == list(range(len(TEXTS)))
    assert response.headers["x-epic-fingerprint"] == reference.fingerprint
    assert "server" not in response.headers


def test_usage_counts_the_tokens_that_the_model_reads(running: Running, reference: EpicEncoder) -> None:
    rows = reference.prompt.documents(TEXTS)
    usage = running.post("/v1/embeddings", {"input": TEXTS}).json()["usage"]
    assert usage == {"prompt_tokens": sum(len(row.ids) for row in rows), "total_tokens": usage["prompt_tokens"]}
    assert max(len(row.ids) for row in rows) == 128


def test_base64_is_little_endian_float32(running: Running, reference: EpicEncoder) -> None:
    response = running.post("/v1/embeddings", {"input": "read the manual", "encoding_format": "base64"})
    decoded = np.frombuffer(base64.b64decode(response.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, reference.encode_document("read the manual"), atol=1e-5)


def test_dimensions_truncate_and_normalise(running: Running, reference: EpicEncoder) -> None:
    found = vectors(running.post("/v1/embeddings", {"input": TEXTS[:1], "dimensions": 8}))
    np.testing.assert_allclose(found, reference.encode_document(TEXTS[:1], truncate_dim=8), atol=1e-5)
    refused = running.post("/v1/embeddings", {"input": "a", "dimensions": 33})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")


@pytest.mark.parametrize(
    ("body", "settings"),
    [
        ({"model": "tiny-query"}, {}),
        ({"input_type": "query"}, {}),
        ({"model": "tiny", "input_type": "search_query"}, {}),
        ({"model": "tiny-query@docs"}, {"bank": "docs"}),
        ({"input_type": "query", "bank": "docs"}, {"bank": "docs"}),
        ({"model": "tiny-query", "bank": "qa", "num_demonstrations": 2}, {"bank": "qa", "num_demonstrations": 2}),
        ({"model": "tiny-query", "task": "code"}, {"task": "code"}),
        ({"model": "tiny-query", "instruction": "Find it"}, {"instruction": "Find it"}),
    ],
)
def test_queries_have_instruction_and_demonstrations(
    running: Running, reference: EpicEncoder, body: dict[str, Any], settings: dict[str, Any]
) -> None:
    texts = ["how do I undo it", "where is the manual"]
    found = vectors(running.post("/v1/embeddings", {**body, "input": texts}))
    np.testing.assert_allclose(found, reference.encode_query(texts, **settings), atol=1e-5)


@pytest.mark.parametrize("body", [{"model": "tiny-passage"}, {"input_type": "document"}, {"input_type": "passage"}])
def test_other_names_of_passages(running: Running, reference: EpicEncoder, body: dict[str, Any]) -> None:
    found = vectors(running.post("/v1/embeddings", {**body, "input": "a manual"}))
    np.testing.assert_allclose(found[0], reference.encode_document("a manual"), atol=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"input": [1, 2, 3]}, 400, "check_embedding_ctx_length=False"),
        ({"input": [[1, 2], [3]]}, 400, "check_embedding_ctx_length=False"),
        ({"input": []}, 400, "not empty"),
        ({"input": ["a"] * 2049}, 400, "2048"),
        ({"input": "a", "model": "gpt-4"}, 404, "tiny-query"),
        ({"input": "a", "model": "tiny-query@nothing"}, 404, "docs"),
        ({"input": "a", "model": "tiny-passage@docs"}, 404, "tiny-query@BANK"),
        ({"input": "a", "model": "tiny-query@docs", "bank": "qa"}, 400, "Two banks"),
        ({"input": "a", "model": "tiny-query", "input_type": "passage"}, 400, "input_type"),
        ({"input": "a", "bank": "docs"}, 400, "applies to queries"),
        ({"input": "a", "input_type": "query", "bank": "../docs"}, 404, "no bank"),
        ({"input": "a", "input_type": "query", "bank": "docs", "num_demonstrations": 99}, 400, "the bank has"),
        ({"input": "a", "input_type": "query", "task": "cooking"}, 400, "cooking"),
        ({"input": "a", "input_type": "image"}, 400, "input_type"),
        ({"input": "a", "encoding": "base64"}, 400, "Unknown field encoding"),
        ({"input": "a", "dimensions": "8"}, 400, "dimensions"),
        ({"model": "tiny"}, 400, "input"),
    ],
)
def test_refusals_name_the_remedy(running: Running, body: dict[str, Any], status: int, words: str) -> None:
    response = running.post("/v1/embeddings", body)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert words in response.json()["error"]["message"]


def test_models_are_listed_with_their_roles(running: Running) -> None:
    listed = {row["id"]: row for row in running.client.get("/v1/models").json()["data"]}
    assert {"tiny", "tiny-query", "tiny-passage", "tiny-query@docs"} <= set(listed)
    assert "passages" in listed["tiny"]["description"]
    assert running.client.get("/v1/models/tiny-query@docs").json() == listed["tiny-query@docs"]
    assert running.client.get("/v1/models/other").status_code == 404


def test_tei_shapes(running: Running, reference: EpicEncoder) -> None:
    found = running.post("/embed", {"inputs": TEXTS, "truncate": True}).json()
    np.testing.assert_allclose(found, reference.encode_document(TEXTS), atol=1e-5)
    found = running.post("/embed", {"inputs": "undo it", "prompt_name": "query@docs"}).json()
    np.testing.assert_allclose(found[0], reference.encode_query("undo it", bank="docs"), atol=1e-5)
    assert running.post("/embed", {"inputs": "a", "prompt_name": "other"}).status_code == 400
    info = running.client.get("/info").json()
    assert (info["model_id"], info["max_input_length"], info["max_client_batch_size"]) == ("tiny", 128, 2048)
    ranked = running.post("/rerank", {"query": "undo", "texts": ["manual", "undo it"], "return_text": True}).json()
    assert {row["text"] for row in ranked} == {"manual", "undo it"}
    assert ranked[0]["score"] >= ranked[1]["score"]


def test_cohere_shapes(running: Running, reference: EpicEncoder) -> None:
    body = {"model": "tiny", "texts": TEXTS, "input_type": "search_query", "embedding_types": ["float", "base64"]}
    answer = running.post("/v2/embed", body).json()
    expected = reference.encode_query(TEXTS)
    np.testing.assert_allclose(answer["embeddings"]["float"], expected, atol=1e-5)
    first = np.frombuffer(base64.b64decode(answer["embeddings"]["base64"][0]), "<f4")
    np.testing.assert_allclose(first, expected[0], atol=1e-5)
    assert answer["meta"]["billed_units"]["input_tokens"] > len(TEXTS)


def test_rerank_orders_by_cosine_behind_a_bank(running: Running, reference: EpicEncoder) -> None:
    documents = ["read the manual", "cats sleep", "undo the last commit"]
    body = {"query": "how do I undo", "documents": [*documents[:2], {"text": documents[2]}], "top_n": 2}
    answer = running.post("/v1/rerank", {**body, "model": "tiny-query@docs", "return_documents": True}).json()
    cosines = reference.encode_document(documents) @ reference.encode_query("how do I undo", bank="docs")
    order = np.argsort(-cosines)[:2]
    assert [row["index"] for row in answer["results"]] == order.tolist()
    np.testing.assert_allclose([row["relevance_score"] for row in answer["results"]], cosines[order], atol=1e-5)
    assert answer["results"][0]["document"]["text"] == documents[order[0]]


def test_prefixes_of_roles_are_stripped_on_request(tmp_path: Any, reference: EpicEncoder) -> None:
    with serving(make_encoder(), tmp_path, role_prefixes=("query: ", "passage: ")) as server:
        query = vectors(server.post("/v1/embeddings", {"input": ["query: undo it"]}))
        passage = vectors(server.post("/v1/embeddings", {"input": ["passage: undo it", "passage: cats"]}))
        mixed = vectors(server.post("/v1/embeddings", {"input": ["passage: undo it", "cats"]}))
    np.testing.assert_allclose(query[0], reference.encode_query("undo it"), atol=1e-5)
    np.testing.assert_allclose(passage, reference.encode_document(["undo it", "cats"]), atol=1e-5)
    np.testing.assert_allclose(mixed, reference.encode_document(["passage: undo it", "cats"]), atol=1e-5)


def test_a_changed_bank_changes_the_next_query(running: Running, reference: EpicEncoder) -> None:
    pairs = [{"query": "how do I undo it", "passage": "Reset softly."}, {"query": "cats", "passage": "They sleep."}]
    assert running.post("/v1/banks", {"name": "changing", "examples": pairs[:1]}).status_code == 201
    ask = {"model": "tiny-query@changing", "input": "undo"}
    before = vectors(running.post("/v1/embeddings", ask))
    added = running.post("/v1/banks/changing/examples", {"examples": pairs[1:]}).json()
    after = vectors(running.post("/v1/embeddings", ask))
    both = DemonstrationBank([(pair["query"], pair["passage"]) for pair in pairs])
    np.testing.assert_allclose(after[0], reference.encode_query("undo", bank=both), atol=1e-5)
    assert np.abs(after - before).max() > 1e-3
    running.client.delete(f"/v1/banks/changing/examples/{added['examples'][0]}")
    np.testing.assert_array_equal(vectors(running.post("/v1/embeddings", ask)), before)
