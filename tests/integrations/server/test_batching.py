"""The queue, with an encoder that can be held at a batch."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag import EpicEncoder, PromptError, QueryPrompt
from epic_rag_server.batching import EncodingQueue, QueueClosedError, QueueFullError
from tests.conftest import make_encoder
from tests.integrations.server.conftest import Running, serving

WAIT = 30

Sender: TypeAlias = Callable[[Running, str], socket.socket]


class Held:
    """A tiny encoder that waits before each batch while it is held, and records the batches."""

    def __init__(self) -> None:
        self._encoder = make_encoder()
        self.free = threading.Event()
        self.free.set()
        self.started = threading.Semaphore(0)
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode_document(self, texts: Sequence[str]) -> Any:
        self.threads.add(threading.get_ident())
        self.batches.append(list(texts))
        self.started.release()
        assert self.free.wait(WAIT)
        if "fail" in texts:
            raise PromptError("It does not fit.")
        return self._encoder.encode_document(texts)

    def encode_query(self, texts: Sequence[str], prompt: QueryPrompt) -> Any:
        self.batches.append(list(texts))
        self.started.release()
        assert self.free.wait(WAIT)
        return self._encoder.encode_query(texts, prompt)


@pytest.fixture
def held() -> Held:
    return Held()


def run(encoder: Any, work: Callable[[EncodingQueue], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    queue = EncodingQueue(encoder, **options)
    try:
        return asyncio.run(asyncio.wait_for(work(queue), WAIT))
    finally:
        if isinstance(encoder, Held):
            encoder.free.set()
        queue.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def queued(queue: EncodingQueue, texts: list[str], prompt: QueryPrompt | None = None) -> asyncio.Task[Any]:
    """Start a request and wait until its texts are in the queue."""
    before = queue._order
    task = asyncio.create_task(queue.encode(texts, prompt))
    await until(lambda: queue._order >= before + len(texts) or task.done())
    return task


def test_waiting_requests_share_a_batch(held: Held) -> None:
    async def work(queue: EncodingQueue) -> None:
        held.free.clear()
        tasks = [await queued(queue, ["first"])]
        await asyncio.to_thread(held.started.acquire)
        tasks += [await queued(queue, [f"text {number}"]) for number in range(5)]
        held.free.set()
        await asyncio.gather(*tasks)

    run(held, work)
    assert [sorted(batch) for batch in held.batches] == [["first"], [f"text {number}" for number in range(5)]]
    assert len(held.threads) == 1


def test_a_batch_has_texts_of_similar_length_up_to_its_tokens(held: Held) -> None:
    texts = ["word " * count for count in (1, 30, 2, 28, 3, 29)]

    async def work(queue: EncodingQueue) -> None:
        held.free.clear()
        first = await queued(queue, ["first"])
        await asyncio.to_thread(held.started.acquire)
        tasks = [await queued(queue, [text]) for text in texts]
        held.free.set()
        await asyncio.gather(first, *tasks)

    run(held, work, batch_tokens=100)
    lengths = [[len(row.ids) for row in held.prompt.documents(batch)] for batch in held.batches[1:]]
    assert len(lengths) > 1
    assert all(sum(batch) <= 100 or len(batch) == 1 for batch in lengths)
    assert sorted(len(text) for batch in held.batches[1:] for text in batch) == sorted(map(len, texts))
    assert all(max(batch) - min(batch) < 50 for batch in lengths)
    assert max(map(max, lengths)) - min(map(min, lengths)) > 80


def test_a_query_waits_for_one_batch_and_not_for_the_queue(held: Held) -> None:
    long = [f"{'word ' * 20}{number}" for number in range(40)]

    async def work(queue: EncodingQueue) -> None:
        held.free.clear()
        large = [await queued(queue, long), await queued(queue, long)]
        await asyncio.to_thread(held.started.acquire)
        query = await queued(queue, ["a query"], QueryPrompt())
        held.free.set()
        await query
        assert not large[1].done()
        await asyncio.gather(*large)

    run(held, work, batch_tokens=200)
    assert ["a query"] in held.batches[1:3]
    assert len(held.batches) > 8


def test_large_requests_are_not_starved_by_small_ones(held: Held) -> None:
    async def work(queue: EncodingQueue) -> None:
        held.free.clear()
        first = await queued(queue, ["first"])
        await asyncio.to_thread(held.started.acquire)
        large = await queued(queue, ["word " * 20] * 4)
        small = [await queued(queue, [f"small {number}"], QueryPrompt(instruction=str(number))) for number in range(20)]
        held.free.set()
        await asyncio.gather(first, large, *small)

    run(held, work, batch_tokens=200)
    assert "word " * 20 in held.batches[1] + held.batches[2]


def test_cancelled_requests_leave_the_queue(held: Held) -> None:
    async def work(queue: EncodingQueue) -> None:
        held.free.clear()
        first = await queued(queue, ["first"])
        await asyncio.to_thread(held.started.acquire)
        cancelled = await queued(queue, ["cancelled"] * 3)
        kept = await queued(queue, ["kept"])
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert queue.texts == 2
        held.free.set()
        await asyncio.gather(first, kept)
        assert queue.texts == 0

    run(held, work)
    assert held.batches == [["first"], ["kept"]]


def test_a_full_queue_refuses_and_names_a_time(held: Held) -> None:
    async def work(queue: EncodingQueue) -> None:
        held.free.clear()
        first = await queued(queue, ["a"] * 20)  # a single request is always accepted
        with pytest.raises(QueueFullError) as refused:
            await queue.encode(["b"])
        assert 1 <= refused.value.retry_after <= 60
        held.free.set()
        await first
        await queue.encode(["c"])

    run(held, work, max_texts=10)


def test_an_error_reaches_its_requests_and_no_others(held: Held) -> None:
    async def work(queue: EncodingQueue) -> None:
        with pytest.raises(PromptError, match="fit"):
            await queue.encode(["fail"])
        vectors, tokens = await queue.encode(["works"])
        assert (vectors.shape, tokens) == ((1, 32), len(held.prompt.documents(["works"])[0].ids))

    run(held, work)


def test_close_answers_what_waits(held: Held) -> None:
    async def work(queue: EncodingQueue) -> None:
        held.free.clear()
        tasks = [await queued(queue, ["first"]), await queued(queue, ["second"])]
        closing = asyncio.create_task(asyncio.to_thread(queue.close))
        await until(lambda: not queue.is_alive)
        with pytest.raises(QueueClosedError):
            await queue.encode(["late"])
        held.free.set()
        await asyncio.gather(closing, *tasks)

    run(held, work)


def test_call_runs_in_the_models_thread(held: Held) -> None:
    async def work(queue: EncodingQueue) -> None:
        await queue.encode(["a text"])
        assert {await queue.call(lambda encoder: threading.get_ident())} == held.threads
        with pytest.raises(ZeroDivisionError):
            await queue.call(lambda encoder: 1 // 0)

    run(held, work)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[EncodingQueue, EpicEncoder]]:
    queue = EncodingQueue(make_encoder(), batch_tokens=60)
    yield queue, make_encoder()
    queue.close()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.text(max_size=60), min_size=1, max_size=8), min_size=1, max_size=8), st.data())
def test_every_request_gets_its_own_vectors(
    shared: tuple[EncodingQueue, EpicEncoder], requests: list[list[str]], data: st.DataObject
) -> None:
    queue, reference = shared
    prompts = [data.draw(st.sampled_from([None, QueryPrompt(), QueryPrompt(task="docs")])) for _ in requests]

    async def work() -> list[tuple[Any, int]]:
        return await asyncio.gather(*(queue.encode(*request) for request in zip(requests, prompts, strict=True)))

    for (vectors, _), texts, prompt in zip(asyncio.run(work()), requests, prompts, strict=True):
        expected = reference.encode_document(texts) if prompt is None else reference.encode_query(texts, prompt)
        np.testing.assert_allclose(vectors, expected, atol=2e-5)


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy(held: Held, tmp_path: Path) -> Iterator[tuple[Running, Held]]:
    with serving(held, tmp_path, max_texts=4) as server:  # type: ignore[arg-type]
        try:
            yield server, held
        finally:
            held.free.set()


@pytest.fixture
def send() -> Iterator[Sender]:
    """A function that sends a request without reading its answer."""
    with ExitStack() as connections:

        def send(server: Running, text: str) -> socket.socket:
            host, port = server.url.removeprefix("http://").split(":")
            body = f'{{"input": ["{text}"]}}'
            connection = socket.create_connection((host, int(port)), timeout=WAIT)
            connections.enter_context(connection)
            head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall((head + body).encode())
            return connection

        yield send


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_requests_of_clients_that_left_are_not_encoded(busy: tuple[Running, Held], send: Sender) -> None:
    server, held = busy
    held.free.clear()
    first = send(server, "first")
    wait_for(lambda: ["first"] in held.batches)
    left = send(server, "left")
    wait_for(lambda: server.service.queue.texts == 2)
    left.close()
    wait_for(lambda: server.service.queue.texts == 1)
    held.free.set()
    assert b"200 OK" in first.recv(1000)
    assert held.batches[-1] == ["first"]
    assert 'status="499"' in server.client.get("/metrics").text


def test_a_full_queue_answers_429(busy: tuple[Running, Held], send: Sender) -> None:
    server, held = busy
    held.free.clear()
    waiting = [send(server, f"waits {number}") for number in range(4)]
    wait_for(lambda: server.service.queue.texts == 4)
    response = server.post("/v1/embeddings", {"input": "one more"})
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(response.headers["retry-after"]) >= 1
    assert server.client.get("/health").status_code == 200
    held.free.set()
    for connection in waiting:
        assert b"200 OK" in connection.recv(1000)


def test_a_stopping_server_answers_what_it_accepted(held: Held, tmp_path: Path, send: Sender) -> None:
    with serving(held, tmp_path) as server:  # type: ignore[arg-type]
        held.free.clear()
        waiting = [send(server, f"waits {number}") for number in range(3)]
        wait_for(lambda: server.service.queue.texts == 3)
        threading.Timer(0.3, held.free.set).start()
    for connection in waiting:
        assert b"200 OK" in connection.recv(1000)
    with pytest.raises(OSError, match="refused"):
        send(server, "too late")


def test_metrics_count_requests_and_tokens(tmp_path: Path) -> None:
    with serving(make_encoder(), tmp_path) as server:
        usage = server.post("/v1/embeddings", {"input": ["some text", "more"]}).json()["usage"]
        server.post("/v1/embeddings", {"input": []})
        server.client.get("/v1/banks/nothing")
        lines = server.client.get("/metrics").text.splitlines()
    warm_up = len(make_encoder().prompt.documents(["warm up"])[0].ids)
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['epic_rag_requests_total{route="/v1/embeddings",status="200"}'] == "1.0"
    assert values['epic_rag_requests_total{route="/v1/embeddings",status="400"}'] == "1.0"
    assert values['epic_rag_requests_total{route="/v1/banks/{bank}",status="404"}'] == "1.0"
    assert float(values["epic_rag_tokens_total"]) == usage["total_tokens"] + warm_up
    assert float(values["epic_rag_batch_tokens_count"]) == 2
    assert float(values["epic_rag_queue_seconds_count"]) == 2
