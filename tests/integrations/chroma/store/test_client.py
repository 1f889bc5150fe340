"""Chroma clients: failures of a connection, and retries."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme

from epic_rag_chroma import ChromaServer
from epic_rag_chroma.errors import ChromaServerError
from epic_rag_chroma.store import client as clients
from epic_rag_chroma.store.client import ServerClient, is_transient
from tests.helpers.servers import HOST, Answer, ChromaProcess, Front, free_port

TOKEN = "s3cret-token"
HEARTBEAT: Answer = (200, {}, b'{"nanosecond heartbeat": 1}')
QUICK = {"check_patience": 0.3, "check_seconds": 2.0}


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove variables of the user who runs the tests."""
    for name in ("", "_TENANT", "_DATABASE", "_TOKEN", "_HEADERS"):
        monkeypatch.delenv(f"EPIC_RAG_CHROMA{name}", raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)


def refusal(url: str, timing: dict[str, float] = QUICK, **options: str) -> ChromaServerError:
    """The error of a connection: one line that names the address."""
    with pytest.raises(ChromaServerError) as caught:
        ServerClient(ChromaServer(url, **options), **timing).close()
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
        assert "does not answer in time" in str(refusal(url, {"check_seconds": 0.2, "check_patience": 0.3}))


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
    timing = {"first_pause": 0.01, "check_patience": 5.0 if requests == 5 else 0.3}
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


# -- retries ------------------------------------------------------------------------------------------------------------


def new_client(url: str) -> ServerClient:
    return ServerClient(ChromaServer(url), patience=5.0, first_pause=0.01)


def new_collection(client: ServerClient) -> Any:
    name = f"epic_rag_{uuid.uuid4().hex}"
    return client.create_collection(name, metadata={"a": 1}, configuration={}, embedding_function=None)


def upsert(collection: Any, count: int) -> None:
    ids = [str(number) for number in range(count)]
    collection.upsert(ids=ids, embeddings=np.eye(count, 64) + 0.1, metadatas=[{"a": 1}] * count)


def test_transient_failures_are_retried(chroma: ChromaProcess) -> None:
    trouble: list[Answer] = []
    with (
        Front(lambda *_: trouble.pop() if trouble else None, chroma.url) as front,
        closing(new_client(front.url)) as it,
    ):
        collection = new_collection(it)
        for status in (408, 425, 429, 500, 502, 503, 504):
            trouble += [(status, {}, b"not now")] * 3
            assert collection.count() == 0
        assert not trouble
        trouble += [(400, {}, b'{"message": "bad"}')]
        with pytest.raises(ChromaServerError, match="status 400: bad"):
            collection.count()


def test_rows_are_sent_again_only_if_the_server_has_not_begun(chroma: ChromaProcess) -> None:
    trouble: list[Answer] = []
    with (
        Front(lambda *_: trouble.pop() if trouble else None, chroma.url) as front,
        closing(new_client(front.url)) as it,
    ):
        collection = new_collection(it)
        for status in (408, 425, 429):
            trouble += [(status, {}, b"not now")] * 3
            upsert(collection, 3)
        for status in (500, 502, 503, 504):
            for write in (lambda: upsert(collection, 3), lambda: collection.delete(ids=["1"])):
                trouble += [(status, {}, b"not now")]
                with pytest.raises(ChromaServerError, match=f"status {status}") as caught:
                    write()
                assert is_transient(caught.value)
                assert not trouble
        assert collection.count() == 3


def test_a_lost_connection(tmp_path: Path) -> None:
    with ChromaProcess(tmp_path) as mortal, closing(new_client(mortal.url)) as client:
        collection = new_collection(client)
        upsert(collection, 3)
        mortal.kill()
        with pytest.raises(ChromaServerError, match="connection refused") as caught:
            upsert(collection, 4)
        assert is_transient(caught.value)
        starter = threading.Timer(0.2, mortal.start)
        starter.start()
        assert collection.count() == 3
        starter.join()


def test_a_retry_of_a_request_that_succeeded_is_harmless(chroma: ChromaProcess) -> None:
    """Each request is done, and then answered with an error: the second try meets what the first has made."""
    lost: set[str] = set()

    def lose(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if method == "GET" or (path + str(body)) in lost:
            return None
        lost.add(path + str(body))
        status, _, _ = front._forward(method, path, body)
        assert status < 300
        return 500, {}, b"the answer is lost"

    with Front(lose, chroma.url) as front, closing(new_client(front.url)) as client:
        with pytest.raises(ChromaServerError) as caught:  # another collection is made, see test_collection.py
            new_collection(client)
        assert caught.value.status == 409
        (made,) = [each for each in client.list_collections() if each.metadata == {"a": 1}][-1:]
        made.modify(name=f"renamed_{made.name}")
        client.delete_collection(f"renamed_{made.name}")
        client.delete_collection(made.name)


def test_many_collections(chroma: ChromaProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_PAGE", 5)
    with closing(new_client(chroma.url)) as client:
        names = {new_collection(client).name for _ in range(10)}
        assert names <= {each.name for each in client.list_collections()}
        for name in names:
            client.delete_collection(name)


def test_waiting_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tenacity.nap.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ServerClient(ChromaServer(f"http://{HOST}:{free_port()}"), check_patience=60.0)
