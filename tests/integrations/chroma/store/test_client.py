"""Chroma clients: failures of a connection, retries and restarts."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import trustme

from epic_rag_chroma import ChromaServer
from epic_rag_chroma.errors import ChromaServerError
from epic_rag_chroma.store.client import ServerClient, Timing
from epic_rag_chroma.store.collection import ChunkStore
from epic_rag_chroma.store.server import RestartedError, ServerPlace
from tests.helpers.servers import HOST, Answer, ChromaProcess, Front, free_port

TOKEN = "s3cret-token"
HEARTBEAT: Answer = (200, {}, b'{"nanosecond heartbeat": 1}')
QUICK = Timing(check_patience=0.3, check=2.0)
FAST = Timing(first_pause=0.01)


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


# Retries and restarts


def new_store(url: str, timing: Timing = FAST) -> ChunkStore:
    place = ServerPlace(ChromaServer(url), "test")
    return ChunkStore.create(place, source="tiny", model="tiny", fingerprint="abc", timing=timing)


def upsert(store: ChunkStore, count: int, text: str = "text") -> None:
    ids = [str(number) for number in range(count)]
    vectors = np.eye(count, 64, dtype=np.float32) + 0.1
    store.upsert(ids, vectors, [text] * count, [{"doc_id": "a"}] * count)


def test_transient_failures_are_retried(chroma: ChromaProcess) -> None:
    trouble: list[Answer] = []

    def sometimes(*_: object) -> Answer | None:
        return trouble.pop() if trouble else None

    with Front(sometimes, chroma.url) as front:
        store = new_store(front.url)
        for status in (502, 503, 504):
            trouble += [(status, {"Retry-After": "0"}, b"not now")] * 3
            assert store.count() == 0
        for status in (408, 429, 500):
            trouble += [(status, {"Retry-After": "0"}, b"not now")] * 3
            upsert(store, 3)
            assert store.count() == 3
        assert not trouble
        trouble += [(400, {}, b'{"message": "bad"}')]
        with pytest.raises(ChromaServerError, match="status 400: bad"):
            store.count()
        store.close()


def test_a_retry_of_a_request_that_succeeded_is_harmless(chroma: ChromaProcess) -> None:
    """Each write is done, and then answered with an error: the second try meets what the first has made."""
    lost: set[str] = set()

    def lose(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if method == "GET" or path.endswith("/get") or (path + str(body)) in lost:
            return None
        lost.add(path + str(body))
        status, _, _ = front._forward(method, path, body)
        assert status < 300
        return 500, {}, b"the answer is lost"

    with Front(lose, chroma.url) as front:
        old = new_store(front.url)
        upsert(old, 5)
        old.publish()
        old.update_metadata(["1"], [{"doc_id": "b"}])
        old.delete(["2"])
        assert {row: metadata["doc_id"] for row, metadata in old.scan()} == {"0": "a", "1": "b", "3": "a", "4": "a"}
        new = new_store(front.url)
        upsert(new, 2)
        new.publish()
        assert new.count() == 2
        with pytest.raises(ChromaServerError, match="collection is missing on"):
            old.count()
        ChunkStore.delete_all(ServerPlace(ChromaServer(front.url), "test"))
        new.close()
        old.close()


def test_a_session_that_has_written_detects_a_restart(tmp_path: Path) -> None:
    with ChromaProcess(tmp_path) as mortal:

        def restart() -> None:
            mortal.kill()
            mortal.start()

        store = new_store(mortal.url)
        restart()
        assert store.count() == 0
        upsert(store, 3)
        restart()  # nobody asked anything meanwhile: only the connection tells
        with pytest.raises(RestartedError, match="was restarted while rows were being written"):
            store.count()
        assert store.count() == 3
        mortal.kill()
        starter = threading.Timer(0.2, mortal.start)
        starter.start()
        with pytest.raises(RestartedError):
            upsert(store, 4)
        starter.join()
        assert store.count() == 4
        store.close()
        # A connection may also have been closed for idleness.
        idle = new_store(mortal.url, Timing(keepalive=0.0))
        upsert(idle, 3)
        restart()
        assert idle.count() == 3
        idle.close()


@pytest.mark.parametrize(("status", "is_noticed"), [(502, True), (503, True), (504, True), (429, False)])
def test_a_proxy_reports_that_the_server_is_away(chroma: ChromaProcess, status: int, is_noticed: bool) -> None:
    trouble: list[Answer] = []
    with Front(lambda *_: trouble.pop() if trouble else None, chroma.url) as front:
        store = new_store(front.url)
        upsert(store, 3)
        trouble.append((status, {}, b""))
        with pytest.raises(RestartedError) if is_noticed else nullcontext():
            upsert(store, 3)
        store.close()


def test_a_connection_that_ends_as_announced_is_no_restart(chroma: ChromaProcess) -> None:
    def ends(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        status, _, content = front._forward(method, path, body)
        return status, {"Connection": "close"}, content

    with Front(ends, chroma.url) as front:
        store = new_store(front.url)
        for count in (1, 2, 3):
            upsert(store, count)
            assert store.count() == count
        store.close()


def test_requests_fit_what_lies_between(chroma: ChromaProcess) -> None:
    sizes: list[int] = []

    def narrow(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        sizes.append(len(body))
        return (413, {}, b"<html>413 Request Entity Too Large</html>") if len(body) > 20_000 else None

    with Front(narrow, chroma.url) as front:
        store = new_store(front.url)
        upsert(store, 64, "x" * 1000)
        assert store.count() == 64
        assert max(sizes) > 20_000
        with pytest.raises(ChromaServerError, match="refuses a request of this size"):
            upsert(store, 2, "x" * 30_000)
        store.close()


def test_requests_are_smaller_than_what_chroma_takes(chroma: ChromaProcess) -> None:
    sizes: list[int] = []

    def weigh(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if not path.endswith("/upsert"):
            return None
        sizes.append(len(body))
        return 201, {}, b"{}"

    with Front(weigh, chroma.url) as front:
        store = new_store(front.url)
        count = 3000
        vectors = np.random.default_rng(0).standard_normal((count, 4096), dtype=np.float32)
        store.upsert([str(row) for row in range(count)], vectors, ["text"] * count, [{"doc_id": "a"}] * count)
        store.close()
        ChunkStore.delete_all(ServerPlace(ChromaServer(front.url), "test"))
    assert sum(sizes) > 40 * 2**20 > 4 * max(sizes)


def test_waiting_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tenacity.nap.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ServerClient(ChromaServer(f"http://{HOST}:{free_port()}"), timing=Timing(check_patience=60.0))
