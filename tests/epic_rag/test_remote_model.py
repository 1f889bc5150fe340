"""`epic_rag.remote_model` against servers on loopback: epic-rag's own, and one with programmed faults."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.demonstrations import Demonstration
from epic_rag.errors import ConfigError, RemoteModelError
from epic_rag.reader import DemonstrationReader
from epic_rag.remote_model import RemoteModel, RemoteName
from epic_rag_chroma import NO_CHROMA, ChromaIndexer
from tests.conftest import make_encoder
from tests.helpers.remote_service import RemoteService, remote_service
from tests.integrations.server.conftest import serving

TEXTS = ["How do I restore a backup?", "a text", "", "a text", "Stop the server and copy the files back. " * 30]


@pytest.fixture
def service() -> Iterator[RemoteService]:
    with remote_service() as made:
        yield made


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OLLAMA_HOST", "OLLAMA_API_KEY", "HF_TOKEN", "TEI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def normalised(rows: list[list[float]]) -> Any:
    values = np.asarray(rows, np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize(
    "shape", ["openai:tiny-passage@{}/v1", "tei:{}", "cohere:tiny@{}", "openai:tiny@{}/v1?roles=suffix"]
)
def test_vectors_of_a_real_server_are_those_of_its_encoder(shape: str, tmp_path: Path) -> None:
    local = make_encoder(causal=False)
    local.name = "tiny"
    with serving(local, tmp_path) as running:
        remote = EpicEncoder.from_pretrained(shape.format(running.url))
        np.testing.assert_allclose(
            remote.encode_document(TEXTS), local.encode_document([t or " " for t in TEXTS]), atol=1e-5
        )
        assert remote.dimension == local.dimension
        if "cohere" in shape or "suffix" in shape:
            np.testing.assert_allclose(remote.encode_query("a text"), local.encode_query("a text"), atol=1e-5)


def test_index_query_and_bank_through_a_remote_model(service: RemoteService, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for number in range(5):
        (docs / f"{number}.md").write_text(f"# Topic {number}\n\nText number {number}.\n")
    encoder = EpicEncoder.from_pretrained(f"ollama:tiny@{service.url}")
    bank = DemonstrationBank([Demonstration("question", "Text number 3")])
    with ChromaIndexer(tmp_path / "index", encoder=encoder, chroma=NO_CHROMA) as indexer:
        assert indexer.index([docs]).chunks_embedded == 5
        plain = indexer.query("topic", mode="dense", k=5)
        moved = indexer.query("topic", mode="dense", k=5, bank=bank)
        assert {hit.path for hit in plain} == {hit.path for hit in moved}
        assert [hit.cosine for hit in plain] != [hit.cosine for hit in moved]
    sent = len(service.requests)
    # The name in the index is enough to open the model again, and nothing is embedded twice.
    with ChromaIndexer(tmp_path / "index", chroma=NO_CHROMA) as again:
        report = again.index([docs])
        assert (report.chunks_embedded, report.unchanged) == (0, 5)
        assert [hit.path for hit in again.query("topic", mode="dense", k=5)] == [hit.path for hit in plain]
    texts = [text for _, body in service.requests[sent:] for text in body["input"]]
    assert not any("Text number" in text for text in texts)


def test_equal_texts_are_sent_once_and_an_empty_one_as_a_space(service: RemoteService) -> None:
    encoder = EpicEncoder.from_pretrained(f"openai:tiny@{service.url}/v1")
    service.requests.clear()
    vectors = encoder.encode_document(["b", "a", "b", ""])
    assert sorted(text for _, body in service.requests for text in body["input"]) == [" ", "a", "b"]
    np.testing.assert_allclose(vectors, normalised([service.vector(text) for text in ["b", "a", "b", " "]]), atol=1e-6)
    assert encoder.encode_document([]).shape == (0, 16)


def test_base64_answers_are_decoded(service: RemoteService) -> None:
    service.as_base64 = True
    encoder = EpicEncoder.from_pretrained(f"openai:tiny@{service.url}/v1")
    np.testing.assert_allclose(encoder.encode_query("a"), normalised([service.vector("a")])[0], atol=1e-6)


def test_prompts_roles_and_dimensions(service: RemoteService) -> None:
    nomic = EpicEncoder.from_pretrained(f"ollama:nomic-embed-text:v1.5@{service.url}")
    nomic.encode_query("a")
    nomic.encode_document("a")
    assert [body["input"] for _, body in service.requests[-2:]] == [["search_query: a"], ["search_document: a"]]
    own = EpicEncoder.from_pretrained(f"openai:e5-small@{service.url}/v1?query_prompt=find: &document_prompt=")
    own.encode_query("a")
    own.encode_document("a")
    assert [body["input"] for _, body in service.requests[-2:]] == [["find: a"], ["a"]]
    nim = EpicEncoder.from_pretrained(f"openai:nv-embedqa@{service.url}/v1?roles=input_type&dimensions=16")
    nim.encode_query("a")
    nim.encode_document("a")
    fields = [(body["input_type"], body["dimensions"]) for _, body in service.requests[-2:]]
    assert fields == [("query", 16), ("passage", 16)]
    instruct = EpicEncoder.from_pretrained(f"openai:Qwen/Qwen3-Embedding-0.6B@{service.url}/v1")
    instruct.encode_query("a", instruction="Find code")
    assert service.requests[-1][1]["input"] == ["Instruct: Find code\nQuery:a"]


def test_fingerprint_is_independent_of_the_url_and_notices_another_model(service: RemoteService) -> None:
    first = EpicEncoder.from_pretrained(f"openai:tiny@{service.url}/v1").fingerprint
    other_url = service.url.replace("127.0.0.1", "localhost")
    assert EpicEncoder.from_pretrained(f"openai:tiny@{other_url}/v1").fingerprint == first
    assert EpicEncoder.from_pretrained(f"openai:other@{service.url}/v1").fingerprint != first
    service.shift = 0.5
    assert EpicEncoder.from_pretrained(f"openai:tiny@{service.url}/v1").fingerprint != first


def test_key_comes_from_the_environment_and_is_in_nothing_that_is_stored(
    service: RemoteService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234")
    encoder = EpicEncoder.from_pretrained(f"openai:tiny@{service.url}/v1")
    assert service.keys[-1] == "Bearer sk-secret-1234"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("Text.\n")
    with ChromaIndexer(tmp_path / "index", encoder=encoder, chroma=NO_CHROMA) as indexer:
        indexer.index([tmp_path / "docs"])
    assert not any(b"sk-secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert "sk-secret" not in str(encoder.describe()) + encoder.source


def test_transient_failures_are_tried_again_as_the_service_asks(service: RemoteService) -> None:
    encoder = EpicEncoder.from_pretrained(f"openai:tiny@{service.url}/v1")
    service.answers = [(503, {}, b"busy"), (429, {"retry-after": "1"}, b"slow down")]
    sent, started = len(service.requests), time.monotonic()
    encoder.encode_query("a")
    assert len(service.requests) - sent == 3
    assert time.monotonic() - started >= 1.0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {}, b"no"), "refused the key .401.. Set OPENAI_API_KEY"),
        ((404, {}, b"no"), "has no model tiny"),
        ((400, {}, b'{"error": "too long"}'), "refused .400: .*too long"),
        ((429, {"retry-after": "3600"}, b""), "allows the next request in 3600 s"),
        ((200, {}, b"<html>"), "returned no JSON"),
        ((200, {}, b'{"data": []}'), "returned 0 vectors"),
        ((200, {}, b'{"hello": 1}'), "returned no vectors"),
        ((200, {}, b'{"data": [{"index": 0, "embedding": [0, 0]}]}'), "width"),
        ((200, {}, json.dumps({"data": [{"index": 0, "embedding": [0.0] * 16}]}).encode()), "zero or not finite"),
    ],
)
def test_errors_are_a_fact_and_a_remedy(service: RemoteService, answer: Any, message: str) -> None:
    encoder = EpicEncoder.from_pretrained(f"openai:tiny@{service.url}/v1")
    service.answers = [answer]
    with pytest.raises(RemoteModelError, match=message):
        encoder.encode_query("a")


def test_a_service_that_is_not_there() -> None:
    with pytest.raises(RemoteModelError, match="does not answer"):
        RemoteModel("ollama:tiny@http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tei:", "has no address"),
        ("tei:localhost", "has no address"),
        ("openai:@http://host", "names no model"),
        ("openai:m@http://user:pw@host/v1", "holds a password"),
        ("openai:m@http://host?colour=red", "Unknown option colour"),
        ("openai:m@http://host?roles=both", "roles is 'both'"),
        ("openai:m@http://host?dimensions=none", "dimensions is 'none'"),
        ("openai:m@http://host?reader=nowhere", "nowhere', which has no reader.safetensors"),
    ],
)
def test_names_that_cannot_be_read(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RemoteName.parse(name)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RemoteName.parse("openai:text-embedding-3-small").url == "https://api.openai.com/v1"
    assert RemoteName.parse("ollama:bge-m3:latest").model == "bge-m3:latest"
    assert RemoteName.parse("ollama:bge-m3").url == "http://127.0.0.1:11434"
    monkeypatch.setenv("OLLAMA_HOST", "gpu:11434")
    assert RemoteName.parse("ollama:bge-m3").url == "http://gpu:11434"
    assert RemoteName.parse("openai:a/b@http://host:8000/v1/").url == "http://host:8000/v1"


def test_settings_that_only_a_checkpoint_takes_are_refused(service: RemoteService) -> None:
    with pytest.raises(ConfigError, match="num_layers"):
        EpicEncoder.from_pretrained(f"ollama:tiny@{service.url}", num_layers=2)


def test_a_reader_of_its_own_is_named_behind_the_url(
    service: RemoteService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my reader").mkdir()
    gains = DemonstrationReader.universal().gains * 2
    DemonstrationReader(gains).save("my reader")
    plain = EpicEncoder.from_pretrained(f"ollama:tiny@{service.url}")
    trained = EpicEncoder.from_pretrained(f"ollama:tiny@{service.url}?reader=my%20reader&max_tokens=64")
    assert (plain.reader.kind, trained.reader.kind) == ("universal", "trained")
    assert trained.external.max_query_tokens == 64  # type: ignore[union-attr]
    assert trained.fingerprint == plain.fingerprint
    assert trained.query_fingerprint != plain.query_fingerprint
    monkeypatch.chdir("/")  # the source of an index
    assert EpicEncoder.from_pretrained(trained.source).query_fingerprint == trained.query_fingerprint
