"""A Chroma server that fails for a moment, or is started again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from epic_rag_chroma import ChromaServer
from epic_rag_chroma.errors import ChromaServerError
from epic_rag_chroma.store.client import ServerClient, Timing
from epic_rag_chroma.store.collection import ChunkStore
from epic_rag_chroma.store.server import RestartedError, ServerPlace
from tests.helpers.servers import HOST, Answer, ChromaProcess, Front, free_port


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path_factory.mktemp("server")) as started:
        yield started


QUICK = Timing(first_pause=0.01)


def new_store(url: str, timing: Timing = QUICK) -> ChunkStore:
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
