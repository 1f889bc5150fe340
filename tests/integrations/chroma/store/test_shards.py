"""Shards on a real Chroma server: written, changed, searched as one; servers that are killed, refuse, or are others'."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from epic_rag.errors import ConfigError
from epic_rag_chroma import ChromaServer, Record, ShardInDoubtError, Shards, WriteCounts, shard_of
from epic_rag_chroma.errors import ChromaServerError, IndexMismatchError, IndexNotFoundError, IndexStateError
from epic_rag_chroma.store import shards as module
from tests.helpers.servers import HOST, Answer, ChromaProcess, Front, free_port, plain_client
from tests.helpers.vector_rows import INFO, assert_nearest, assert_stored, exact, make_rows, unit


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "_TENANT", "_DATABASE", "_TOKEN", "_HEADERS"):
        monkeypatch.delenv(f"EPIC_RAG_CHROMA{name}", raising=False)
    monkeypatch.setattr(module, "_MARKED_SECONDS", 0.5)


def fill(url: str, name: str, rows: list[Record], shards: int | None, *, has_all_rows: bool = True) -> WriteCounts:
    with Shards(ChromaServer(url), name) as opened:
        opened.begin(INFO, shards, has_all_rows=has_all_rows)
        counts = opened.write(rows)
        opened.end()
    return counts


def stored(url: str, name: str, rows: list[Record]) -> dict[str, Record]:
    with Shards(ChromaServer(url), name) as opened:
        opened.open()
        ids = [row_id for page in opened.ids() for row_id in page]
        assert len(ids) == len(set(ids)) == opened.count()
        return opened.get(ids)


def test_the_shard_of_an_id_never_changes() -> None:
    assert [shard_of(f"id-{number}", 8) for number in range(10)] == [0, 2, 0, 0, 2, 5, 0, 5, 1, 5]
    counts = np.bincount([shard_of(f"id-{number}", 8) for number in range(8000)], minlength=8)
    assert counts.min() > 900
    code = "from epic_rag_chroma import shard_of; print(shard_of('\\udcff', 1000), shard_of('id-1', 8))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(shard_of("\udcff", 1000)), str(shard_of("id-1", 8))]


@pytest.mark.parametrize("shards", [1, 3])
def test_the_merged_ranking_is_that_of_one_exact_search(chroma: ChromaProcess, shards: int) -> None:
    rows = make_rows(300)
    assert fill(chroma.url, f"merged-{shards}", rows, shards) == WriteCounts(written=300)
    draw = np.random.default_rng(1)
    with Shards(ChromaServer(chroma.url), f"merged-{shards}") as opened:
        assert opened.open() == INFO
        assert (len(opened), opened.count(), set(opened.states)) == (shards, 300, {"complete"})
        for k in (1, 10, 299, 500, 1500):
            vector = unit(draw.standard_normal(32))
            assert_nearest(opened.nearest(vector, k), exact(rows, vector, k))
        code = [row for row in rows if row.metadata["kind"] == "code"]
        vector = unit(draw.standard_normal(32))
        assert_nearest(opened.nearest(vector, 20, {"kind": "code"}), exact(code, vector, 20))
        assert_stored(opened.get([row.id for row in code] + ["nobody"]), code)
        assert {row.id for row in opened.where({"doc_id": "doc-3"})} == {
            r.id for r in rows if r.metadata["doc_id"] == "doc-3"
        }


def test_equal_rows_come_in_the_order_of_their_ids(chroma: ChromaProcess) -> None:
    vector = unit(np.ones(32))
    rows = [Record(f"same-{number:02}", "", {"path": "a"}, vector) for number in range(40)]
    fill(chroma.url, "ties", rows, 4)
    with Shards(ChromaServer(chroma.url), "ties") as opened:
        opened.open()
        assert [row for row, _ in opened.nearest(vector, 40)] == [row.id for row in rows]


def test_only_what_differs_is_written(chroma: ChromaProcess) -> None:
    rows = make_rows(60)
    fill(chroma.url, "changes", rows, 2)
    assert fill(chroma.url, "changes", rows, None) == WriteCounts(unchanged=60)
    changed = [
        *(replace(row, metadata={"path": "moved.md"}) for row in rows[:5]),
        *(replace(row, text="other") for row in rows[5:8]),
        *(replace(row, vector=make_rows(1, seed=9, first=number)[0].vector) for number, row in enumerate(rows[8:10])),
        *rows[10:],
        *make_rows(4, first=60),
    ]
    assert fill(chroma.url, "changes", changed, 2) == WriteCounts(written=4, changed=10, unchanged=50)
    assert_stored(stored(chroma.url, "changes", changed), changed)
    with Shards(ChromaServer(chroma.url), "changes") as opened:
        opened.open()
        assert opened.delete([row.id for row in rows[:3]] + ["nobody"]) == 3
        assert opened.delete([row.id for row in rows[:3]]) == 0
    assert_stored(stored(chroma.url, "changes", changed[3:]), changed[3:])


def test_other_encoders_and_other_numbers_of_shards_are_refused(chroma: ChromaProcess) -> None:
    rows = make_rows(5)
    fill(chroma.url, "guarded", rows, 2)
    with Shards(ChromaServer(chroma.url), "guarded") as opened:
        with pytest.raises(IndexMismatchError, match=r"has vectors of tiny \(f1\), not of other \(f2\)\. Use another"):
            opened.begin(replace(INFO, fingerprint="f2", model="other"), 2, has_all_rows=True)
        with pytest.raises(IndexMismatchError, match=r"has 2 shards, not 3\. Use another"):
            opened.begin(INFO, 3, has_all_rows=True)
        with pytest.raises(IndexMismatchError, match=r"has 2 shards, not 1"):
            opened.begin(INFO, 1, has_all_rows=True)
        with pytest.raises(ConfigError, match=r"0 shards are not possible\. Use 1 to 1000\."):
            opened.begin(INFO, 0, has_all_rows=True)
        opened.begin(INFO, None, has_all_rows=True)
        with pytest.raises(ConfigError, match=r"Row id-0 has a vector of shape \(16,\), not \(32,\)"):
            opened.write(make_rows(1, dim=16))
        opened.end()
    assert_stored(stored(chroma.url, "guarded", rows), rows)


def test_collections_of_others_are_left_alone(chroma: ChromaProcess) -> None:
    with plain_client(chroma.url) as client:
        client.create_collection("theirs", metadata={"owner": "somebody"}, embedding_function=None)
        client.create_collection("half.0", embedding_function=None)
    with Shards(ChromaServer(chroma.url), "theirs") as opened:
        with pytest.raises(IndexStateError, match=r"has a collection theirs that is not a shard of epic-rag"):
            opened.begin(INFO, None, has_all_rows=True)
        with pytest.raises(IndexStateError, match=r"theirs that is not a shard"):
            opened.open()
    with (
        Shards(ChromaServer(chroma.url), "half") as opened,
        pytest.raises(IndexStateError, match=r"half\.0 that is not"),
    ):
        opened.begin(INFO, 4, has_all_rows=True)
    with (
        Shards(ChromaServer(chroma.url), "nobodys") as opened,
        pytest.raises(IndexNotFoundError, match=r"has no collection nobodys of epic-rag\. Run `epic-rag index"),
    ):
        opened.open()
    fill(chroma.url, "torn", make_rows(9), 3)
    with plain_client(chroma.url) as client:
        client.delete_collection("torn.1")
        client.delete_collection("torn.0")
    with (
        Shards(ChromaServer(chroma.url), "torn") as opened,
        pytest.raises(IndexNotFoundError, match=r"has no collection torn"),
    ):
        opened.open()
    # The number of shards is that of the shard that is left.
    assert fill(chroma.url, "torn", make_rows(9), None).written == sum(shard_of(f"id-{n}", 3) != 2 for n in range(9))
    with plain_client(chroma.url) as client:
        client.delete_collection("torn.1")
    with (
        Shards(ChromaServer(chroma.url), "torn") as opened,
        pytest.raises(IndexStateError, match=r"1 of the 3 shards of torn are missing on .*torn\.1 for instance"),
    ):
        opened.open()
    assert fill(chroma.url, "torn", make_rows(9), 3).written == sum(shard_of(f"id-{n}", 3) == 1 for n in range(9))


def test_plain_chroma_reads_a_single_shard_by_its_name(chroma: ChromaProcess) -> None:
    fill(chroma.url, "plain", make_rows(4), None)
    with plain_client(chroma.url) as client:
        collection = client.get_collection("plain", embedding_function=None)
        assert sorted(collection.get()["ids"]) == ["id-0", "id-1", "id-2", "id-3"]
        assert collection.metadata["fingerprint"] == "f1"
        assert collection.configuration_json["hnsw"]["space"] == "cosine"


def failing(chroma: ChromaProcess, status: int, times: int) -> tuple[Front, list[str]]:
    """A front that answers the next upserts with a status, after the server has done them."""
    failed: list[str] = []

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if path.endswith("/upsert") and len(failed) < times:
            failed.append(path)
            return status, {}, b"{}"
        return None

    return Front(answer, chroma.url), failed


@pytest.mark.parametrize("status", [500, 503])
def test_a_shard_whose_write_failed_is_made_again(chroma: ChromaProcess, status: int) -> None:
    rows, name = make_rows(200), f"doubt-{status}"
    front, failed = failing(chroma, status, 1)
    with front, Shards(ChromaServer(front.url), name) as opened:
        opened.begin(INFO, 4, has_all_rows=True)
        counts = opened.write(rows[:100])
        assert len(failed) == 1
        assert counts.written + counts.left_out == 100
        assert counts.left_out > 0
        # Another writer sees the mark before it sends rows of that shard.
        with Shards(ChromaServer(chroma.url), name) as other:
            other.join(INFO)
            assert other.write(rows[:100]) == WriteCounts(unchanged=counts.written, left_out=counts.left_out)
            assert other.write(rows[100:]).left_out > 0
        with pytest.raises(ShardInDoubtError, match=rf"1 of 4 shards of {name} are in doubt, .* Run it again"):
            opened.end()
        assert sorted(opened.states) == ["complete", "complete", "complete", "in doubt"]
    with (
        Shards(ChromaServer(chroma.url), name) as opened,
        pytest.raises(IndexStateError, match=r"in doubt, since the server failed .* Write all rows"),
    ):
        opened.begin(INFO, None, has_all_rows=False)
    again = fill(chroma.url, name, rows, None)
    assert again.written + again.unchanged == 200
    assert 0 < again.written < 120  # one shard of four
    assert_stored(stored(chroma.url, name, rows), rows)


def test_a_refusal_leaves_no_doubt(chroma: ChromaProcess) -> None:
    front, _ = failing(chroma, 422, 1)
    with front, Shards(ChromaServer(front.url), "refused") as opened:
        opened.begin(INFO, 1, has_all_rows=True)
        with pytest.raises(ChromaServerError, match="422"):
            opened.write(make_rows(3))
        assert opened.write(make_rows(3)) == WriteCounts(written=3)
        opened.end()
        assert opened.states == ["complete"]


def test_a_busy_server_gets_the_rows_again(chroma: ChromaProcess) -> None:
    front, failed = failing(chroma, 429, 2)
    with front:
        assert fill(front.url, "busy", make_rows(3), 1) == WriteCounts(written=3)
    assert len(failed) == 2


def test_requests_that_are_too_large_are_halved(chroma: ChromaProcess) -> None:
    sizes: list[int] = []

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if path.endswith("/upsert"):
            sizes.append(len(body))
            return (413, {}, b"{}") if len(body) > 12_000 else None
        return None

    rows = make_rows(200)
    with Front(answer, chroma.url) as front:
        assert fill(front.url, "large", rows, 1) == WriteCounts(written=200)
    assert max(sizes) > 12_000 > min(sizes)
    assert_stored(stored(chroma.url, "large", rows), rows)


def test_rows_of_a_run_that_died_are_kept_if_they_are_found(chroma: ChromaProcess) -> None:
    rows = make_rows(40)
    with Shards(ChromaServer(chroma.url), "died") as opened:
        opened.begin(INFO, 2, has_all_rows=True)
        opened.write(rows[:20])
    with Shards(ChromaServer(chroma.url), "died") as opened:
        opened.open()
        assert opened.states == ["writing", "writing"]
    assert fill(chroma.url, "died", rows, None, has_all_rows=False) == WriteCounts(written=20, unchanged=20)
    assert_stored(stored(chroma.url, "died", rows), rows)


def test_headers_tenant_and_database(chroma: ChromaProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    import chromadb

    admin = chromadb.AdminClient(
        chromadb.Settings(
            chroma_api_impl="chromadb.api.fastapi.FastAPI",
            chroma_server_host=HOST,
            chroma_server_http_port=chroma.port,
            anonymized_telemetry=False,
        )
    )
    admin.create_tenant("acme")
    admin.create_database("wiki", "acme")
    admin._server._session.close()  # type: ignore[attr-defined]
    seen: set[str | None] = set()

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        seen.add(headers.get("x-team"))
        return None if headers.get("x-team") == "secret-7" else (401, {}, b'{"message": "no"}')

    rows = make_rows(5)
    with Front(answer, chroma.url) as front:
        server = ChromaServer(front.url, "acme", "wiki")
        with Shards(server, "there", headers={"X-Team": "secret-7"}) as opened:
            opened.begin(INFO, 2, has_all_rows=True)
            opened.write(rows)
            opened.end()
        with pytest.raises(ChromaServerError) as caught:
            Shards(server, "there", headers={"X-Team": "secret-8"})
        assert "secret-8" not in str(caught.value)
        assert "401" in str(caught.value)
    assert seen == {"secret-7", "secret-8"}
    with plain_client(chroma.url, tenant="acme", database="wiki") as client:
        assert sorted(each.name for each in client.list_collections()) == ["there.0", "there.1"]
    with plain_client(chroma.url) as client:
        assert not [each for each in client.list_collections() if each.name.startswith("there")]


def test_a_server_that_is_away(chroma: ChromaProcess) -> None:
    with pytest.raises(ChromaServerError, match="No Chroma server answers"):
        Shards(ChromaServer(f"http://{HOST}:{free_port()}"), "x", patience=0.2)


def test_a_killed_server(tmp_path: Path) -> None:
    """Kill the server several times while rows are written; afterwards everything is there once."""
    rows = make_rows(2400, dim=128)
    info = replace(INFO, dimension=128)
    with ChromaProcess(tmp_path / "server") as server:
        done = threading.Event()
        kills = 0

        def kill_often() -> None:
            nonlocal kills
            for pause in (0.5, 0.9, 0.4):
                if done.wait(pause):
                    return
                server.kill()
                kills += 1
                time.sleep(0.1)
                server.start()

        killer = threading.Thread(target=kill_often)
        killer.start()
        try:
            for _ in range(12):
                with (
                    suppress(ShardInDoubtError),
                    Shards(ChromaServer(server.url), "killed", patience=30.0) as opened,
                ):
                    opened.begin(info, 3, has_all_rows=True)
                    for start in range(0, len(rows), 200):
                        opened.write(rows[start : start + 200])
                    opened.end()
                    break
            else:
                pytest.fail("the shards stay in doubt")
        finally:
            done.set()
            killer.join()
        assert kills > 0
        assert_stored(stored(server.url, "killed", rows), rows)
        with Shards(ChromaServer(server.url), "killed") as opened:
            opened.open()
            found = [opened.nearest(row.vector, 1)[0][0] for row in rows[::40]]
            assert found == [row.id for row in rows[::40]]
