"""Addresses and credentials of Chroma servers."""

from __future__ import annotations

import json

import pytest

from epic_rag.errors import ConfigError
from epic_rag_chroma import ChromaServer
from epic_rag_chroma.store.server import LOCAL, NO_CHROMA, ServerPlace, new_place, parse_server, request_headers

TOKEN = "s3cret-token"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove variables of the user who runs the tests."""
    for name in ("", "_TENANT", "_DATABASE", "_TOKEN", "_HEADERS"):
        monkeypatch.delenv(f"EPIC_RAG_CHROMA{name}", raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("HTTP://LocalHost:8000/", "http://localhost:8000"),
        ("https://chroma.example", "https://chroma.example:443"),
        ("http://chroma.example", "http://chroma.example:80"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("https://example.org/chroma/", "https://example.org:443/chroma"),
        ("http://localhost:8000/api/v2", "http://localhost:8000"),
    ],
)
def test_addresses_have_one_form(given: str, url: str) -> None:
    assert ChromaServer(given).url == url


@pytest.mark.parametrize(
    "given",
    [
        "",
        "localhost:8000",
        "localhost",
        "ftp://localhost:8000",
        "http://",
        "http://host:port",
        "http://host:99999",
        "http://ho st:80",
        "http://host:80?x=1",
        "http://host:80#x",
        "http://name:hunter2@host:80",
        "http://name:hunter2@host:port",
        "ftp://name:hunter2@host",
        "http://host\x1b[31m:80",
    ],
)
def test_other_addresses_are_refused_without_their_passwords(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ChromaServer(given)
    assert "hunter2" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["", "a/b", "a\nb"])
def test_tenant_and_database_are_names(name: str) -> None:
    with pytest.raises(ConfigError, match="tenant"):
        ChromaServer("http://localhost:1", name)
    with pytest.raises(ConfigError, match="database"):
        ChromaServer("http://localhost:1", database=name)


def test_the_environment_names_tenant_and_database_and_the_server_of_new_indexes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EPIC_RAG_CHROMA", "http://there:1")
    monkeypatch.setenv("EPIC_RAG_CHROMA_TENANT", "t")
    monkeypatch.setenv("EPIC_RAG_CHROMA_DATABASE", "d")
    there = ChromaServer("http://there:1", "t", "d")
    assert str(there) == "http://there:1 (tenant t, database d)"
    assert parse_server("http://other:1") == ChromaServer("http://other:1", "t", "d")
    assert parse_server(None) is None
    made = new_place(None, None)
    assert isinstance(made, ServerPlace)
    assert made.server == there
    # What exists stays where it is, unless the caller says otherwise.
    known = ServerPlace(ChromaServer("http://known:1"), "id")
    assert new_place(None, known) == known
    for place in (LOCAL, NO_CHROMA):
        assert parse_server(place) == place
        assert new_place(None, place) == place
        for current in (None, known, LOCAL, NO_CHROMA):
            assert new_place(place, current) == place
    assert new_place(there, known) == ServerPlace(there, "id")
    moved = new_place(there, LOCAL)
    assert isinstance(moved, ServerPlace)
    assert moved.index_id != made.index_id
    assert ServerPlace.from_json(json.loads(json.dumps(moved.to_json()))) == moved
    monkeypatch.delenv("EPIC_RAG_CHROMA")
    assert new_place(None, None) == LOCAL


def test_a_token_goes_into_both_headers_and_others_win(monkeypatch: pytest.MonkeyPatch) -> None:
    assert request_headers() == {}
    monkeypatch.setenv("EPIC_RAG_CHROMA_TOKEN", f" {TOKEN}\n")
    assert request_headers() == {"X-Chroma-Token": TOKEN, "Authorization": f"Bearer {TOKEN}"}
    monkeypatch.setenv("EPIC_RAG_CHROMA_HEADERS", '{"authorization": "Basic eDp5", "X-Client": "1 2"}')
    assert request_headers() == {"X-Chroma-Token": TOKEN, "authorization": "Basic eDp5", "X-Client": "1 2"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKEN", "hunter2\nX-Evil: 1"),
        ("TOKEN", "hunter2\N{EN DASH}"),
        ("HEADERS", "X-Key: hunter2"),
        ("HEADERS", '["hunter2"]'),
        ("HEADERS", '{"X-Key": 1, "Y": "hunter2"}'),
        ("HEADERS", '{"X Key": "hunter2"}'),
        ("HEADERS", '{"X-Key": "hunter2\\r\\nY: 1"}'),
    ],
)
def test_credentials_that_cannot_be_sent_are_not_shown(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"EPIC_RAG_CHROMA_{name}", value)
    with pytest.raises(ConfigError, match=f"EPIC_RAG_CHROMA_{name}") as caught:
        request_headers()
    assert "hunter2" not in str(caught.value)
