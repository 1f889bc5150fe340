"""The mirror on a real Chroma server that fails, restarts, or is away."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from epic_rag_chroma import ChromaServer
from epic_rag_chroma.errors import ChromaServerError
from epic_rag_chroma.store.collection import delete_collections, open_collection
from epic_rag_chroma.store.server import ServerPlace
from tests.helpers.mirrors import MemoryDatabase, assert_mirrored, sync, unit_vector
from tests.helpers.servers import HOST, Answer, ChromaProcess, Front, free_port, plain_client

COMPLETE = r"The index itself is complete and searchable; the next run updates the server\."


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(autouse=True)
def _empty_server(chroma: ChromaProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("", "_TENANT", "_DATABASE", "_TOKEN", "_HEADERS"):
        monkeypatch.delenv(f"EPIC_RAG_CHROMA{name}", raising=False)
    yield
    with plain_client(chroma.url) as client:
        for each in client.list_collections():
            client.delete_collection(each.name)


def place_on(url: str, index_id: str = "test") -> ServerPlace:
    return ServerPlace(ChromaServer(url), index_id)


def filled(count: int = 150, prefix: str = "a") -> MemoryDatabase:
    database = MemoryDatabase()
    for number in range(count):
        database.put(f"{prefix}-{number}", number=number)
    return database


def names(url: str) -> set[str]:
    with plain_client(url) as client:
        return {each.name for each in client.list_collections()}


def test_changes(chroma: ChromaProcess) -> None:
    database, place = filled(), place_on(chroma.url)
    collection = sync(database, place)
    assert_mirrored(database, place)
    for number in range(40):
        database.put(f"a-{number}", other=number)
        database.put(f"b-{number}")
        database.remove(f"a-{number + 60}")
    assert sync(database, place) == collection
    assert_mirrored(database, place)
    mirror = open_collection(place, collection)
    assert mirror is not None
    row, score = mirror.nearest(database.rows["b-3"].vector, 5)[0]
    assert (row, score) == ("b-3", pytest.approx(1.0, abs=1e-5))
    mirror.close()


def test_indexes_share_a_server(chroma: ChromaProcess) -> None:
    with plain_client(chroma.url) as client:
        client.create_collection("not-ours", metadata={"owner": "somebody"}, embedding_function=None)
        client.create_collection("an-index-in-a-folder", metadata={"owner": "epic-rag"}, embedding_function=None)
        left = {"owner": "epic-rag", "index": "one"}
        client.create_collection("epic_rag_one_of_an_attempt", metadata=left, embedding_function=None)
    others = {"not-ours", "an-index-in-a-folder"}
    one, two = place_on(chroma.url, "one"), place_on(chroma.url, "two")
    databases = filled(), filled(20, "b")
    collection = sync(databases[0], one)
    sync(databases[1], two)
    assert names(chroma.url) == others | {"epic_rag_one", "epic_rag_two"}
    assert_mirrored(databases[0], one)
    assert_mirrored(databases[1], two)
    delete_collections(two)
    delete_collections(one, keep=collection)
    assert names(chroma.url) == others | {"epic_rag_one"}
    assert open_collection(two, collection) is None
    delete_collections(one)
    assert names(chroma.url) == others


def test_nothing_to_do_needs_no_server(chroma: ChromaProcess) -> None:
    database, place = filled(), place_on(chroma.url)
    collection = sync(database, place)
    with Front(lambda *_: None, chroma.url) as front:
        assert sync(database, place_on(front.url)) == collection
        assert [path.rpartition("/")[2] for _, path in front.requests] == ["count"]
    with Front(lambda *_: (503, {}, b""), chroma.url) as front:
        assert sync(database, place_on(front.url)) == collection
        assert len(front.requests) == 1
    assert sync(database, place_on(f"http://{HOST}:{free_port()}")) == collection
    with socket.create_server((HOST, 0)) as silent:
        started = time.monotonic()
        assert sync(database, place_on(f"http://{HOST}:{silent.getsockname()[1]}")) == collection
        assert time.monotonic() - started < 30


def test_a_server_that_is_away_is_one_clear_error(chroma: ChromaProcess) -> None:
    database = filled()
    port = free_port()
    with pytest.raises(ChromaServerError, match=rf"No Chroma server answers at .*--port {port}`.* {COMPLETE}$"):
        sync(database, place_on(f"http://{HOST}:{port}"))
    assert len(database.outbox) == 150
    sync(database, place_on(chroma.url))
    assert_mirrored(database, place_on(chroma.url))


@pytest.mark.parametrize("lost", ["all", "collection", "rows"])
def test_a_server_that_lost_data_is_filled_again(tmp_path: Path, lost: str) -> None:
    with ChromaProcess(tmp_path / "server") as server:
        database, place = filled(), place_on(server.url)
        collection = sync(database, place)
        if lost == "all":
            server.kill()
            shutil.rmtree(server.folder)
            server.start()
        else:
            with plain_client(server.url) as client:
                if lost == "rows":
                    client.get_collection("epic_rag_test", embedding_function=None).delete(ids=["a-1", "a-2"])
                else:
                    client.delete_collection("epic_rag_test")
        assert sync(database, place) != collection  # although there is nothing to send
        assert_mirrored(database, place)
        assert names(server.url) == {"epic_rag_test"}


def test_a_graph_that_fails_is_made_again(chroma: ChromaProcess) -> None:
    """As after the death of a server that was writing its graph: it is there again, and cannot read what it wrote."""
    database = filled()
    broken = sync(database, place_on(chroma.url))

    def fail(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if f"{broken}/" in path and path.rpartition("/")[2] in ("upsert", "query", "get"):
            return 500, {}, b'{"error": "InternalError", "message": "Failed to apply logs to the hnsw segment writer"}'
        return None

    with Front(fail, chroma.url) as front:
        database.put("b")
        assert sync(database, place_on(front.url)) != broken
    assert_mirrored(database, place_on(chroma.url))
    assert names(chroma.url) == {"epic_rag_test"}


def test_rows_that_are_not_found_are_made_again(chroma: ChromaProcess) -> None:
    database = filled()
    collection = sync(database, place_on(chroma.url))

    def lose(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if f"{collection}/query" not in path:
            return None
        return 200, {}, b'{"ids": [["a"]], "distances": [[0.7]], "include": ["distances"]}'

    with Front(lose, chroma.url) as front:
        database.put("b")
        assert sync(database, place_on(front.url)) != collection
    assert_mirrored(database, place_on(chroma.url))


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_failed_write_makes_a_new_collection(
    chroma: ChromaProcess, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    database = filled()
    failures = 2
    collections: list[str] = []

    def fail(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        nonlocal failures
        if not path.endswith("/upsert"):
            return None
        collections.append(path.split("/")[-2])
        if len(collections) % 3 != 2 or not failures:
            return None
        failures -= 1
        return status, {}, b'{"message": "not now"}'

    with Front(fail, chroma.url) as front:
        made = sync(database, place_on(front.url))
    assert len(set(collections)) == 3
    assert collections[-1] == made
    assert caplog.text.count("the collection is made again") == 2
    assert_mirrored(database, place_on(chroma.url))
    assert names(chroma.url) == {"epic_rag_test"}


def test_a_server_that_always_fails_is_one_clear_error(chroma: ChromaProcess) -> None:
    database = filled()
    with (
        Front(lambda _, path, *__: (500, {}, b"") if path.endswith("/upsert") else None, chroma.url) as front,
        pytest.raises(ChromaServerError, match=rf"cannot answer now \(status 500\).* {COMPLETE}$"),
    ):
        sync(database, place_on(front.url))
    assert database.mirror().is_dirty
    sync(database, place_on(chroma.url))
    assert names(chroma.url) == {"epic_rag_test"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {}, b'{"message": "quota exceeded"}'), r"refuses a request \(status 400: quota exceeded\)"),
        ((401, {}, b""), "requires credentials"),
        ((200, {}, b"<html>"), "gives an unexpected answer"),
    ],
)
def test_a_refusal_is_not_repeated(chroma: ChromaProcess, answer: Answer, message: str) -> None:
    database = filled()
    with (
        Front(lambda _, path, *__: answer if path.endswith("/upsert") else None, chroma.url) as front,
        pytest.raises(ChromaServerError, match=f"{message}.* {COMPLETE}$"),
    ):
        sync(database, place_on(front.url))
    assert sum(path.endswith("/upsert") for _, path in front.requests) == 1


def test_lost_answers(chroma: ChromaProcess) -> None:
    """A collection is created, renamed and deleted, each of them once answered with an error."""
    lost: set[str] = set()

    def lose(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        changes = method in ("PUT", "DELETE") or (method == "POST" and path.endswith("/collections"))
        if not changes or method in lost:
            return None
        lost.add(method)
        status, _, _ = front._forward(method, path, body)
        assert status < 300
        return 500, {}, b"the answer is lost"

    with Front(lose, chroma.url) as front:
        database = filled()
        sync(database, place_on(front.url))
        database.begin_mirror(database.mirror().collection)
        sync(database, place_on(front.url))
        assert lost == {"POST", "PUT", "DELETE"}
    assert_mirrored(database, place_on(chroma.url))
    assert names(chroma.url) == {"epic_rag_test"}


def test_requests_fit_what_lies_between(chroma: ChromaProcess) -> None:
    sizes: list[int] = []

    def narrow(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        sizes.append(len(body))
        return (413, {}, b"<html>413 Request Entity Too Large</html>") if len(body) > 20_000 else None

    with Front(narrow, chroma.url) as front:
        database = MemoryDatabase()
        for number in range(64):
            database.put(f"a-{number}", text="x" * 1000)
        sync(database, place_on(front.url))
        assert max(sizes) > 20_000
        assert_mirrored(database, place_on(chroma.url))
        database.put("b", text="x" * 30_000)
        with pytest.raises(ChromaServerError, match="refuses a request of this size"):
            sync(database, place_on(front.url))


def test_requests_are_smaller_than_what_chroma_takes(chroma: ChromaProcess) -> None:
    sizes: list[int] = []

    def weigh(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if not path.endswith("/upsert"):
            return None
        sizes.append(len(body))
        return 400, {}, b"{}"

    database = MemoryDatabase(page=3000)
    for number in range(3000):
        database.put(f"a-{number}")
        record = database.rows[f"a-{number}"]
        database.rows[record.id] = type(record)(record.id, "x", {}, unit_vector(number, 4096))
    with Front(weigh, chroma.url) as front, pytest.raises(ChromaServerError):
        sync(database, place_on(front.url))
    assert 0 < max(sizes) < 12 * 2**20


def test_a_server_killed_while_rows_are_written(tmp_path: Path) -> None:
    """The server dies within a request, or between two, and is back after a moment."""
    chance = np.random.default_rng(2)
    with ChromaProcess(tmp_path / "server") as server:
        database, place = filled(400), place_on(server.url)
        sync(database, place)
        requests, moment = 0, -1
        reached = threading.Event()

        def count(*_: object) -> None:
            nonlocal requests
            requests += 1
            if requests == moment:
                reached.set()

        def kill(delay: float, away: float) -> None:
            reached.wait(60)
            time.sleep(delay)
            server.kill()
            time.sleep(away)
            server.start()

        for turn in range(2):
            for number in range(300):
                database.put(f"b{turn}-{number}")
            for number in range(50):
                database.put(f"a-{number + 50 * turn}", turn=turn)
            requests, moment = 0, int(chance.integers(1, 20))
            reached.clear()
            killer = threading.Thread(target=kill, args=[chance.uniform(0, 0.05), chance.uniform(0, 0.5)])
            killer.start()
            with Front(count, server.url) as front:
                # The proxy is there when the server is not: it closes the connection.
                front.server.handle_error = lambda *_: None  # type: ignore[method-assign]
                with suppress(ChromaServerError):
                    sync(database, place_on(front.url))
            reached.set()
            killer.join()
            sync(database, place)
            assert_mirrored(database, place)
            assert names(server.url) == {"epic_rag_test"}
