"""Malformed requests: none is answered with a 500, and the server works as before. 2,000 with EPIC_RAG_SOAK=1."""

from __future__ import annotations

import json
import os
import random
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import make_encoder
from tests.integrations.server.conftest import Running, index_files, serving

COUNT = 2000 if os.environ.get("EPIC_RAG_SOAK") == "1" else 300
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"model": "tiny-query@docs", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 8}),
    ("/v1/embeddings", {"input": "a", "input_type": "query", "task": "docs", "instruction": "x", "num_demonstrations": 1}),
    ("/embed", {"inputs": ["a"], "truncate": True, "prompt_name": "query", "normalize": True}),
    ("/rerank", {"query": "a", "texts": ["b", "c"], "raw_scores": True, "return_text": True}),
    ("/v1/rerank", {"model": "tiny", "query": "a", "documents": ["b", {"text": "c"}], "top_n": 1}),
    ("/v2/embed", {"model": "tiny", "texts": ["a"], "input_type": "search_query", "embedding_types": ["float"]}),
    ("/v1/search", {"query": "undo", "top_k": 2, "mode": "dense", "path": ["*.md"], "where": ["kind=markdown"], "since": "7d"}),
    ("/v1/search", {"query": "undo", "index": "docs", "bank": "docs", "collapse": False}),
    ("/v1/banks", {"name": "fuzzed", "task": "docs", "examples": [{"query": "a", "passage": "b"}]}),
    ("/v1/banks/fuzzed/examples", {"examples": [{"query": "a", "passage": "b", "relevant": False}]}),
    ("/v1/banks/fuzzed/evaluate", {"index": "docs"}),
    ("/v1/banks/fuzzed/undo", {}),
]  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 10**40, -0.0, 1.5, 1e308, "", " ", "a", "\0", "\u202e", "猫" * 50, "é" * 2000,
    "../../etc/passwd", "docs", "tiny-query@../x", "' OR 1=1 --", "NEAR(a b)", '"', "*", "((((", "[a-z", "**/**/**", "!",
    "\\", "9" * 40, "1e999", "2026-13-45", "0001-01-01", "99999999w", "page>=1e400", "page=NaN", "x=y=z", [], [[]], [None], {},
    {"text": "a"}, {"a": {"b": []}}, [1, 2], [[1, 2]], ["a", 1], ["a"] * 40, [{"text": 1}], [{}],
]  # fmt: skip
FRAGMENTS = [
    b"NaN",
    b"Infinity",
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b"[" * 500,
    b'{"a":' * 300,
    b"\xff\xfe",
    b"\x00",
    b"1e9999",
]
PATHS = [
    "/", "//", "/v1", "/v1/", "/v1/embeddings/", "/v1/documents/", "/v1/documents/%00", "/v1/documents/%ff", "/v1/documents/a%0ab",
    "/v1/documents/notes.txt?lines=%00", "/v1/documents/notes.txt?index=%ff", "/v1/documents/" + "a/" * 500, "/v1/models/%2e%2e",
    "/v1/banks/%00", "/v1/banks/" + "b" * 3000, "/v1/banks/docs/examples/%ff", "/metrics?a=b", "/info", "/%", "/?q=%zz",
    "/v1/models/tiny-query@%00", "/v1/models/tiny-query@docs", "/?q=a&q=b", "/?q=%00&mode=keyword", "/?q=%ff&bank=%ff",
    "/?q=a&where=%00", "/?q=a&path=[a-z", "/?q=a&since=9w9", "/?q=%F0%9F%92%A9%0A&mode=dense", "/?q=" + "(" * 3000, "/?__class__=a",
    "/document?path=notes.txt&line=0&last=99999999&from=3&to=1", "/document?path=%ff&line=1", "/document?line=1", "/page/%00",
    "/document?path=notes.txt&line=\u0661", "/page/..%2f..%2fapp.py", "/v1/banks/docs/undo", "/v1/banks/%00/evaluate",
]  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("fuzz")
    encoder = make_encoder()
    with serving(encoder, folder, indexes={"docs": index_files(folder / "docs", encoder)}) as server:
        yield server


def malformed(draw: random.Random) -> tuple[str, str, bytes]:
    """Return method, path and body of a request that is wrong in one or several ways."""
    kind = draw.randrange(10)
    if kind == 0:
        return (
            draw.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"]),
            draw.choice(PATHS),
            b"",
        )
    path, valid = draw.choice(BODIES)
    body = json.loads(json.dumps(valid))
    if kind == 1:
        content = json.dumps(body).encode()
        cut = draw.randrange(len(content))
        return (
            "POST",
            path,
            draw.choice([content[:cut], content[:cut] + bytes([draw.randrange(256)]) + content[cut + 1 :]]),
        )
    if kind == 2:
        fragment = draw.choice(FRAGMENTS)
        name = draw.choice([*body, "query"])
        return "POST", path, json.dumps({**body, name: "@"}).encode().replace(b'"@"', fragment)
    if kind == 3:
        return "POST", path, json.dumps(draw.choice(VALUES)).encode()
    if kind == 4:
        body[draw.choice(["model ", "Input", "__class__", "user_id", "\0", "é", "a" * 500])] = draw.choice(VALUES)
    elif kind == 5 and body:
        del body[draw.choice(list(body))]
    elif kind == 6:
        path = draw.choice(BODIES)[0]
    for _ in range(draw.randint(1, 3)):
        if body:
            body[draw.choice(list(body))] = draw.choice(VALUES)
    return "POST", path, json.dumps(body).encode()


def test_malformed_requests_are_not_internal_errors(target: Running) -> None:
    draw = random.Random(17)
    expected = target.post("/v1/embeddings", {"input": "unchanged"}).json()
    statuses: Counter[int] = Counter()
    for number in range(COUNT):
        method, path, body = malformed(draw)
        response = target.client.request(method, path, content=body)
        statuses[response.status_code] += 1
        assert response.status_code < 500, (number, method, path, body[:300], response.text)
        assert str(target.docs.parent) not in response.text
        if response.status_code >= 400 and method != "HEAD":
            if response.headers["content-type"].startswith("text/html"):
                assert 'class="error"' in response.text
                continue
            error = response.json()["error"]
            assert error["message"]
            assert len(error["message"]) < 600
    assert statuses[400] > COUNT // 3
    assert statuses[200] > 0
    assert target.post("/v1/embeddings", {"input": "unchanged"}).json() == expected


def test_malformed_http_is_refused(target: Running) -> None:
    host, port = target.url.removeprefix("http://").split(":")
    draw = random.Random(3)
    start = f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}:{port}\r\n".encode()
    requests = [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(200),  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http://attacker.example/ HTTP/1.1\r\nHost: attacker.example\r\n\r\n",
        start + b"Content-Length: -5\r\n\r\n",
        start + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        start + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        start + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n\r\n",
        start + b"Transfer-Encoding: gzip\r\n\r\nabc",
        start + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
        start + b"A" * 100_000,
        *(draw.randbytes(draw.randint(1, 400)) + b"\r\n\r\n" for _ in range(COUNT // 10)),
    ]
    for content in requests:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            try:
                answer = connection.recv(2000)
            except ConnectionResetError:
                answer = b""
        assert not answer.startswith((b"HTTP/1.1 5", b"HTTP/1.1 2")), (content[:200], answer)
    assert target.client.get("/health").status_code == 200


def test_the_fuzzed_bank_is_still_a_bank(target: Running, tmp_path: Path) -> None:
    target.post("/v1/banks", {"name": "fuzzed"})
    assert httpx.get(f"{target.url}/v1/banks/fuzzed").status_code == 200
