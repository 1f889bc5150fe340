"""Addresses and credentials of Chroma servers, and every way in which a connection can fail."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from epic_rag.errors import ConfigError
from epic_rag_chroma import ChromaServer
from epic_rag_chroma.errors import ChromaServerError
from epic_rag_chroma.store.client import ServerClient, Timing
from epic_rag_chroma.store.server import ServerPlace, new_place, parse_server, request_headers
from tests.helpers.servers import HOST, Answer, ChromaProcess, Front, free_port

TOKEN = "s3cret-token"
HEARTBEAT: Answer = (200, {}, b'{"nanosecond heartbeat": 1}')


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path_factory.mktemp("server")) as started:
        yield started


QUICK = Timing(check_patience=0.3, check=2.0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
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
    made = new_place(None, None, is_new=True)
    assert made is not None
    assert made.server == there
    # What exists stays where it is, unless the caller says otherwise.
    known = ServerPlace(ChromaServer("http://known:1"), "id")
    assert new_place(None, known, is_new=False) == known
    assert new_place(None, None, is_new=False) is None
    assert new_place("folder", None, is_new=True) is None
    assert new_place(known.server, known, is_new=False) == known
    moved = new_place(there, known, is_new=False)
    assert moved is not None
    assert moved.index_id != known.index_id
    assert ServerPlace.from_json(json.loads(json.dumps(moved.to_json()))) == moved


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


def refusal(url: str, timing: Timing = QUICK, **options: str) -> ChromaServerError:
    """The error of a connection: one line that names the address."""
    with pytest.raises(ChromaServerError) as caught:
        ServerClient(ChromaServer(url, **options), timing=timing).close()
    message = str(caught.value)
    assert url in message
    assert message.endswith(".")
    assert message.isprintable()
    assert TOKEN not in message
    return caught.value


def test_nobody_there() -> None:
    port = free_port()
    error = refusal(f"http://{HOST}:{port}")
    assert "connection refused" in str(error)
    assert f"`chroma run --path FOLDER --port {port}`" in str(error)
    assert error.status is None


def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unknown(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "host name in" in str(refusal("http://chroma.invalid:8000"))
    assert len(asked) == 1


def test_a_silent_server() -> None:
    with socket.create_server((HOST, 0)) as silent:
        url = f"http://{HOST}:{silent.getsockname()[1]}"
        assert "does not answer in time" in str(refusal(url, Timing(check=0.2, check_patience=0.3)))


def test_a_server_that_hangs_up() -> None:
    def hang_up(listening: socket.socket) -> None:
        while True:
            try:
                listening.accept()[0].close()
            except OSError:
                return

    with socket.create_server((HOST, 0)) as rude:
        thread = threading.Thread(target=hang_up, args=[rude])
        thread.start()
        assert "was lost" in str(refusal(f"http://{HOST}:{rude.getsockname()[1]}"))
        rude.shutdown(socket.SHUT_RDWR)
        thread.join()


def always(status: int, body: bytes = b"", **headers: str) -> Callable[..., Answer]:
    return lambda *_: (status, headers, body)


def old_server(_: str, path: str, *__: object) -> Answer:
    return HEARTBEAT if path == "/api/v1/heartbeat" else (404, {}, b"{}")


def early_server(_: str, path: str, *__: object) -> Answer:
    return (200, {}, b'"0.6.3"') if path.endswith("/version") else HEARTBEAT


@pytest.mark.parametrize(
    ("answer", "expected", "requests"),
    [
        (always(200, b"<html>It works!</html>"), "is not a Chroma server", 2),
        (always(200, b"{}"), "is not a Chroma server", 2),
        (always(404), "is not a Chroma server", 2),
        (old_server, "API v1", 2),
        (early_server, "version 0.6.3", 2),
        (always(301, Location="https://elsewhere/"), "redirects to https://elsewhere/", 1),
        (always(401), "requires credentials (status 401)", 1),
        (always(403), "Set EPIC_RAG_CHROMA_TOKEN", 1),
        (always(500, b'{"error": "InternalError", "message": "database \\u001b[31mis\\nlocked"}'), "[31mis locked)", 5),
        (always(503, b"<html>busy</html>"), "status 503: Service Unavailable", None),
    ],
)
def test_a_server_that_answers_otherwise(answer: Callable[..., Answer], expected: str, requests: int | None) -> None:
    timing = Timing(first_pause=0.01, check_patience=5.0 if requests == 5 else 0.3)
    with Front(answer) as front:
        assert expected in str(refusal(front.url, timing))
        # Permanent errors are not retried.
        assert len(front.requests) == requests if requests is not None else len(front.requests) > 1


@pytest.mark.parametrize("options", [{"database": "no such"}, {"tenant": "no such"}])
def test_an_unknown_database(chroma: ChromaProcess, options: dict[str, str]) -> None:
    assert "no such" in str(refusal(chroma.url, **options))


def test_credentials(chroma: ChromaProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def guard(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if headers.get("authorization") == f"Bearer {TOKEN}" and headers.get("x-chroma-token") == TOKEN:
            return None
        given = headers.get("authorization", "none")
        return 401, {}, json.dumps({"message": f"bad credentials: {given}"}).encode()

    with Front(guard, chroma.url) as front:
        assert "requires credentials" in str(refusal(front.url))
        monkeypatch.setenv("EPIC_RAG_CHROMA_TOKEN", "wrong-" + TOKEN)
        assert "refuses the credentials in EPIC_RAG_CHROMA_TOKEN" in str(refusal(front.url))
        monkeypatch.setenv("EPIC_RAG_CHROMA_TOKEN", TOKEN)
        ServerClient(ChromaServer(front.url)).close()


def test_what_a_server_repeats_of_the_credentials_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def echo(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        return 503, {}, f"cannot serve {headers['authorization']}".encode()

    monkeypatch.setenv("EPIC_RAG_CHROMA_TOKEN", TOKEN)
    with Front(echo) as front:
        assert "cannot serve ***" in str(refusal(front.url))


def test_tls(chroma: ChromaProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    bundle = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(bundle)
    with Front(always(200)) as plain:
        assert "http://" in str(refusal(plain.url.replace("http://", "https://")))
    front = Front(lambda *_: None, chroma.url)
    front.server.socket = context.wrap_socket(front.server.socket, server_side=True)
    front.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hangs up is what is tested
    with front:
        port = front.server.server_address[1]
        assert "SSL_CERT_FILE" in str(refusal(f"https://localhost:{port}"))
        monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
        assert "SSL_CERT_FILE" in str(refusal(f"https://{HOST}:{port}"))  # the certificate is another name's
        ServerClient(ChromaServer(f"https://localhost:{port}")).close()


def test_no_proxy_is_asked_about_this_machine(chroma: ChromaProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{HOST}:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    ServerClient(ChromaServer(chroma.url)).close()
