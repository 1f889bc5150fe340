"""The client of a query server, against servers of all kinds: absent, dead, frozen, foreign, refusing."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_rag import DemonstrationBank, QueryPrompt
from epic_rag_chroma import Hit, SearchFilters, SearchRequest, parse_filters
from epic_rag_chroma.query_server import (
    LOCAL_QUERY_PATH,
    ServedModel,
    announce_server,
    query_running_server,
    request_fields,
    search_request_of,
)
from epic_rag_chroma.store.paths import SERVER_FILE

MODEL = ServedModel(None, "auto", None)
HIT = {"rank": 1, "score": 0.1 + 0.2, "path": "a\udcff.md", "first_line": 1, "last_line": 2, "page": None}
HIT |= {"heading_path": ["A", "B"], "text": "猫", "id": "x", "duplicates": ["b.md:1"]}
ANSWER = json.dumps({"hits": [HIT], "stale": {"/a": "changed"}}).encode()


def reply(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def listening(behave: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """Accept connections, keep what each sends, and do something with it; yield the address and what was sent."""
    received: list[bytes] = []
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                data = b""
                while b"\r\n\r\n" not in data or not data.endswith(b"}"):
                    part = connection.recv(65536)
                    if not part:
                        break
                    data += part
                received.append(data)
                behave(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", received
        finally:
            stop.set()
            with socket.create_connection(server.getsockname(), timeout=5) as last:
                last.sendall(b"\r\n\r\n}")
                last.shutdown(socket.SHUT_WR)
            thread.join()


def ask(folder: Path, request: SearchRequest | None = None, model: ServedModel = MODEL) -> Any:
    return query_running_server(folder, "undo it", request or SearchRequest(), model, max_files=10)


def test_an_answer(tmp_path: Path) -> None:
    with ExitStack() as stack:
        url, received = stack.enter_context(listening(lambda connection: connection.sendall(reply(ANSWER))))
        stack.enter_context(announce_server([tmp_path], url, "f00", "t0ken", MODEL))
        if hasattr(os, "geteuid"):
            assert (tmp_path / SERVER_FILE).stat().st_mode & 0o777 == 0o600
        answer = ask(tmp_path)
        assert answer.stale == {"/a": "changed"}
        assert answer.hits == [Hit(**{**HIT, "heading_path": ("A", "B"), "duplicates": ("b.md:1",)})]
        head, _, body = received[0].partition(b"\r\n\r\n")
        assert head.startswith(f"POST {LOCAL_QUERY_PATH} HTTP/1.1\r\n".encode())
        assert b"Authorization: Bearer t0ken" in head
        sent = json.loads(body)
        assert (sent["text"], sent["fingerprint"], sent["index_dir"]) == ("undo it", "f00", str(tmp_path.resolve()))
        assert search_request_of(sent["request"]) == SearchRequest()
    assert not (tmp_path / SERVER_FILE).exists()
    assert ask(tmp_path) is None


@pytest.mark.parametrize(
    "answer",
    [
        reply(b"{}"),
        reply(b"[]"),
        reply(b"not JSON"),
        reply(b'{"hits": [{"rank": 1}], "stale": null}'),
        reply(b'{"hits": 3, "stale": null}'),
        reply(b"\xff\xfe"),
        reply(ANSWER, "403 Forbidden"),
        reply(ANSWER, "302 Found"),
        reply(ANSWER)[:-20],
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"",
    ],
)
def test_a_foreign_or_refusing_server_is_not_believed(tmp_path: Path, answer: bytes) -> None:
    with (
        listening(lambda connection: connection.sendall(answer)) as (url, received),
        announce_server([tmp_path], url, "f00", "t0ken", MODEL),
    ):
        assert ask(tmp_path) is None
        assert len(received) == 1


def test_a_frozen_server_is_left_within_seconds(tmp_path: Path) -> None:
    ended = threading.Event()
    with (
        listening(lambda connection: ended.wait(30) and None) as (url, _),
        announce_server([tmp_path], url, "f00", "t0ken", MODEL),
    ):
        started = time.monotonic()
        assert ask(tmp_path) is None
        assert time.monotonic() - started < 15  # of the server's 30
        ended.set()


def test_a_port_that_nobody_listens_on(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with announce_server([tmp_path], url, "f00", "t0ken", MODEL):
        assert ask(tmp_path) is None


def test_the_file_of_a_dead_server_is_removed_and_its_port_not_used(tmp_path: Path) -> None:
    with listening(lambda connection: connection.sendall(reply(ANSWER))) as (url, received):
        with announce_server([tmp_path], url, "f00", "t0ken", MODEL):
            left = (tmp_path / SERVER_FILE).read_text()
        (tmp_path / SERVER_FILE).write_text(left)  # as after a kill
        (tmp_path / SERVER_FILE).chmod(0o600)
        assert ask(tmp_path) is None
        assert received == []
    assert not (tmp_path / SERVER_FILE).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"host": "another machine"},
        {"version": "0.0.1"},
        {"url": "https://127.0.0.1:1"},
        {"url": None},
        {"token": 3},
        {"model": "other"},
        {"dtype": "bfloat16"},
        {"device": "cuda"},
    ],
)
def test_servers_of_other_models_machines_and_versions(tmp_path: Path, change: dict[str, Any]) -> None:
    with listening(lambda connection: connection.sendall(reply(ANSWER))) as (url, received):
        with announce_server([tmp_path], url, "f00", "t0ken", MODEL):
            facts = json.loads((tmp_path / SERVER_FILE).read_text())
            (tmp_path / SERVER_FILE).write_text(json.dumps({**facts, **change}))
            assert ask(tmp_path) is None
        assert received == []


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"3", b'{"host": {}}'])
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SERVER_FILE).write_bytes(content)
    (tmp_path / SERVER_FILE).chmod(0o600)
    assert ask(tmp_path) is None


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_file_that_others_can_read_is_not_trusted(tmp_path: Path) -> None:
    with listening(lambda connection: connection.sendall(reply(ANSWER))) as (url, received):
        with announce_server([tmp_path], url, "f00", "t0ken", MODEL):
            (tmp_path / SERVER_FILE).chmod(0o644)
            assert ask(tmp_path) is None
        assert received == []


def test_the_second_server_of_an_index_leaves_the_file_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with announce_server([tmp_path], "http://127.0.0.1:1", "a", "first", MODEL):
        with announce_server([tmp_path, tmp_path / "other"], "http://127.0.0.1:2", "a", "second", MODEL):
            assert json.loads((tmp_path / SERVER_FILE).read_text())["token"] == "first"
            assert json.loads((tmp_path / "other" / SERVER_FILE).read_text())["token"] == "second"
        assert (tmp_path / SERVER_FILE).exists()


def test_what_cannot_be_sent_is_searched_alone(tmp_path: Path) -> None:
    bank = DemonstrationBank([("a", "b")])
    for request in (
        SearchRequest(reranker=lambda query, texts: [0.0 for _ in texts]),
        SearchRequest(prompt=QueryPrompt(bank=bank)),
    ):
        assert request_fields(request) is None
        with announce_server([tmp_path], "http://127.0.0.1:1", "a", "t", MODEL):
            assert ask(tmp_path, request) is None


TEXT = st.text(min_size=1, max_size=10)
PROMPTS = st.builds(
    QueryPrompt,
    task=st.none() | TEXT,
    instruction=st.none() | TEXT,
    strategy=st.sampled_from([None, "reader", "task-vector", "epic", "text"]),
    selection=st.sampled_from(["first", "random", "nearest"]),
)
FILTERS = st.none() | st.builds(
    SearchFilters,
    where=st.lists(TEXT, max_size=3).map(tuple),
    paths=st.lists(TEXT, max_size=3).map(tuple),
    since=st.none() | st.datetimes().map(lambda moment: moment.replace(tzinfo=timezone.utc)),
)
REQUESTS = st.builds(
    SearchRequest,
    prompt=PROMPTS,
    k=st.integers(1, 10**6),
    mode=st.sampled_from(["dense", "hybrid", "keyword"]),
    filters=FILTERS,
    collapse=st.booleans(),
)


@given(REQUESTS)
def test_a_request_is_the_same_after_the_way(request: SearchRequest) -> None:
    assert search_request_of(json.loads(json.dumps(request_fields(request)))) == request


def test_names_that_are_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("docs", "mine", "reranker"):
        Path(name).mkdir()
    sent = {
        name: request_fields(SearchRequest(prompt=QueryPrompt(bank=name, num_demonstrations=1), reranker="reranker"))
        for name in ("docs", "./docs", "mine", Path("mine"), ("docs", "mine"))
    }
    monkeypatch.chdir("/")
    banks = {str(name): search_request_of(fields).prompt.bank for name, fields in sent.items() if fields is not None}
    # A built-in bank's name takes precedence over a folder.
    assert banks == {
        "docs": "docs",
        "./docs": str(tmp_path / "docs"),
        "mine": str(tmp_path / "mine"),
        "('docs', 'mine')": ("docs", str(tmp_path / "mine")),
    }
    assert all(search_request_of(fields).reranker == str(tmp_path / "reranker") for fields in sent.values() if fields)
    model = ServedModel("mine", "auto", None)
    monkeypatch.chdir(tmp_path)
    assert model.fields()["model"] == str(tmp_path / "mine")


def test_an_age_is_a_moment_when_it_is_sent() -> None:
    filters = parse_filters([], [], "2h")
    fields = request_fields(SearchRequest(filters=filters))
    assert fields is not None
    assert isinstance(filters.since, datetime)
    assert search_request_of(fields).filters == filters
