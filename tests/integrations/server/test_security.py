from __future__ import annotations

import http.client
from pathlib import Path
from typing import Any

import httpx
import pytest

from epic_rag import ConfigError
from epic_rag_server import AccessPolicy
from epic_rag_server.security import host_name, is_loopback
from tests.conftest import make_encoder
from tests.integrations.server.conftest import Running, serving

KEY = "k3y-of-the-tests"
ROUTES = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/info"),
    ("GET", "/v1/models"),
    ("GET", "/v1/banks"),
    ("GET", "/v1/indexes"),
    ("GET", "/v1/documents/notes.txt"),
    ("GET", "/nothing"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/search"),
    ("POST", "/v1/banks"),
    ("DELETE", "/v1/banks/docs/examples/a"),
    ("POST", "/v1/banks/docs/examples"),
    ("POST", "/v1/banks/docs/undo"),
    ("POST", "/v1/banks/docs/evaluate"),
    ("GET", "/"),
    ("GET", "/?q=a"),
    ("GET", "/document?path=notes.txt&line=1"),
    ("GET", "/page/page.js"),
    ("OPTIONS", "/v1/embeddings"),
]


def ask(url: str, method: str, path: str, headers: list[tuple[str, str]], body: bytes = b"") -> int:
    """Send a request with exactly these headers."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in [*headers, ("Content-Length", str(len(body)))]:
        connection.putheader(name, value)
    connection.endheaders(body)
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def port_of(running: Running) -> str:
    return running.url.rpartition(":")[2]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_dns_rebinding_is_refused_on_every_route(running: Running, method: str, path: str) -> None:
    port = port_of(running)
    assert ask(running.url, method, path, [("Host", f"attacker.example:{port}")]) == 403
    local = f"localhost:{port}"
    assert ask(running.url, method, path, [("Host", local), ("Origin", "http://attacker.example")]) == 403
    # What the browser sends after the name of the attacker's page resolves to 127.0.0.1.
    rebound = f"attacker.example:{port}"
    assert ask(running.url, method, path, [("Host", rebound), ("Origin", f"http://{rebound}")]) == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "[::1]", "LOCALHOST", "localhost."])
def test_names_of_loopback_are_served(running: Running, host: str) -> None:
    for value in (host, f"{host}:{port_of(running)}"):
        assert ask(running.url, "GET", "/health", [("Host", value)]) == 200


@pytest.mark.parametrize(
    "host",
    ["", "0.0.0.0", "10.0.0.1", "localhost.attacker.example", "127.0.0.1.nip.io", "localhost@attacker", "a b", "[::1", "::1",
     "localhost:", "localhost:80x", "127.1", "2130706433", "l\u00f6calhost", "[fe80::1]", "localhost/..", "xn--localhost"],
)  # fmt: skip
def test_other_hosts_are_refused(running: Running, host: str) -> None:
    assert ask(running.url, "GET", "/health", [("Host", host)]) in (400, 403)


def test_two_hosts_or_none_are_refused(running: Running) -> None:
    hosts = [("Host", "localhost"), ("Host", "attacker.example")]
    assert ask(running.url, "GET", "/health", hosts) in (400, 403)
    assert ask(running.url, "GET", "/health", []) in (400, 403)


def test_only_the_own_origin_is_served(running: Running) -> None:
    local = f"127.0.0.1:{port_of(running)}"
    assert ask(running.url, "GET", "/health", [("Host", local), ("Origin", f"http://{local}")]) == 200
    for origin in ("null", "http://127.0.0.1:1", f"http://localhost:{port_of(running)}", f"file://{local}", "", local):
        assert ask(running.url, "GET", "/health", [("Host", local), ("Origin", origin)]) == 403


def test_no_answer_allows_other_origins(running: Running) -> None:
    answers = [
        running.client.get("/v1/models"),
        running.client.options("/v1/embeddings", headers={"Access-Control-Request-Method": "POST"}),
        running.client.get("/v1/models", headers={"Origin": "http://attacker.example"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 405, 403]
    assert [name for answer in answers for name in answer.headers if name.startswith("access-control")] == []


def test_a_key_is_required_beyond_loopback() -> None:
    for bind in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigError, match="API key"):
            AccessPolicy(bind=bind)
    for key in ("", "schlüssel", "a\nb"):
        with pytest.raises(ConfigError, match="API key"):
            AccessPolicy(api_key=key)
    assert KEY not in repr(AccessPolicy(api_key=KEY))


def test_the_key(tmp_path: Path) -> None:
    with serving(make_encoder(), tmp_path, policy=AccessPolicy(api_key=KEY)) as server:

        def status(**headers: str) -> int:
            return server.client.get("/v1/models", headers=headers).status_code

        assert status(Authorization=f"Bearer {KEY}") == 200
        assert status(Authorization=f"bearer {KEY}") == 200
        assert status(Authorization=KEY) == 200  # LlamaIndex's client of TEI
        for wrong in (f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer", "", f"Basic {KEY}", "Bearer \xe9"):
            assert (
                server.client.get("/v1/models", headers={"Authorization": wrong.encode("latin-1")}).status_code == 401
            )
        refused = server.client.get("/nothing")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/health", headers={"Host": "attacker.example"}).status_code == 403


def test_hosts_of_a_server_on_all_addresses() -> None:
    policy = AccessPolicy(bind="0.0.0.0", hosts=["Host.Docker.Internal"], api_key=KEY)
    own = {name: policy._is_own(host_name(name)) for name in (
        "host.docker.internal:8400", "192.168.1.5:8400", "[fd00::1]:8400", "localhost", "0.0.0.0:8400", "[::]:8400",
        "attacker.example:8400")}  # fmt: skip
    assert list(own.values()) == [True, True, True, True, False, False, False]


def test_a_body_above_the_limit(tmp_path: Path) -> None:
    with serving(make_encoder(), tmp_path, policy=AccessPolicy(max_body=10_000)) as server:
        for content in (b"x" * 10_001, iter([b"x" * 6000, b"x" * 6000])):  # announced, and chunked
            try:
                response = server.client.post("/v1/embeddings", content=content)
            except httpx.WriteError:  # the server may close the connection while the client still sends
                continue
            assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
        assert server.post("/v1/embeddings", {"input": "a"}).status_code == 200


def test_headers_above_the_limit(running: Running) -> None:
    response = running.client.get("/health", headers={"X-Long": "x" * 200_000})
    assert response.status_code in (400, 431)


def test_errors_name_no_path_of_the_machine(tmp_path: Path) -> None:
    encoder = make_encoder()
    with serving(encoder, tmp_path, indexes={"gone": tmp_path / "gone"}) as server:
        (tmp_path / "banks" / "broken").mkdir(parents=True)
        (tmp_path / "banks" / "broken" / "bank.json").write_text("{")
        answers = [
            server.post("/v1/search", {"query": "a"}),
            server.client.get("/v1/indexes"),
            server.client.get("/v1/documents/etc/passwd"),
            server.client.get("/v1/banks/broken"),
            server.post("/v1/embeddings", {"input": "a", "model": "tiny-query@broken"}),
            server.post("/v1/banks/broken/evaluate", {}),
            server.post("/v1/banks/broken/undo", {}),
            server.client.get("/?q=a"),
            server.client.get("/document?path=a&line=1"),
        ]
        first = server.client.get("/")  # shows the other banks
    assert [answer.status_code for answer in answers] == [503] * 9
    for answer in answers:
        assert str(tmp_path) not in answer.text
    for answer in answers[:7]:
        assert "/" not in answer.json()["error"]["message"]
    assert first.status_code == 200
    assert str(tmp_path) not in first.text


def test_the_log_has_no_texts(running: Running, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        running.post("/v1/search", {"query": "confidential words"})
        running.client.get("/v1/documents/notes.txt?lines=1")
        running.client.get("/confidential?q=words")
        running.client.get("/?q=confidential+words")
        running.client.get("/document?path=notes.txt&line=1")
    lines = [record.getMessage() for record in caplog.records if record.name == "epic_rag_server.metrics"]
    assert len(lines) == 5
    assert not [line for line in lines if "confidential" in line or "words" in line or "notes" in line]


def test_is_loopback() -> None:
    hosts = ["localhost", "127.0.0.1", "::1", "127.255.0.9", "localhost.example", "0.0.0.0", "::", "", "8.8.8.8"]
    assert [is_loopback(host) for host in hosts] == [True] * 4 + [False] * 5
