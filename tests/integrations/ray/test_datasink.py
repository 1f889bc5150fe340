"""ChromaDatasink on a local Ray: shards written by several tasks, repeated, after a kill of the server, refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from epic_rag.errors import ConfigError, DataError, FingerprintError
from epic_rag_chroma import ChromaServer, Record, Shards, WriteCounts
from epic_rag_chroma.errors import IndexMismatchError, IndexStateError
from epic_rag_ray import ChromaDatasink, Cluster, VectorInfo
from tests.helpers.servers import Answer, ChromaProcess, Front
from tests.helpers.vector_rows import assert_stored, make_rows

# Ray reads its own deprecated settings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
INFO = VectorInfo("f1", "tiny", "", 32)


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "_TENANT", "_DATABASE", "_TOKEN", "_HEADERS"):
        monkeypatch.delenv(f"EPIC_RAG_CHROMA{name}", raising=False)


def table(rows: list[Record], info: VectorInfo | None = None) -> pa.Table:
    vectors = np.stack([row.vector for row in rows])
    keys = dict.fromkeys(key for row in rows for key in row.metadata)
    made = pa.table(
        {
            "id": [row.id for row in rows],
            "text": [row.text for row in rows],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
            **{key: [row.metadata.get(key) for row in rows] for key in keys},
        }
    )
    return made if info is None else made.replace_schema_metadata(info.add_to(made.schema).metadata)


def write(rows: list[Record], sink: ChromaDatasink, *, blocks: int = 4, info: VectorInfo | None = None) -> WriteCounts:
    import ray

    parts = [rows[start::blocks] for start in range(blocks)]
    dataset = ray.data.from_arrow([table(part, info) for part in parts])
    dataset.write_datasink(sink, concurrency=2)
    return sink.counts


def stored(server: str | ChromaServer, name: str) -> dict[str, Record]:
    place = server if isinstance(server, ChromaServer) else ChromaServer(server)
    with Shards(place, name) as shards:
        shards.open()
        assert set(shards.states) == {"complete"}
        return shards.get([row_id for page in shards.ids() for row_id in page])


def cause(error: BaseException) -> str:
    """Return the messages of an error and of what caused it."""
    found = []
    while error is not None:
        found.append(str(error))
        error = error.__cause__ or getattr(error, "cause", None)  # type: ignore[assignment]
    return " | ".join(found)


def test_rows_arrive_once(ray_cluster: Cluster, chroma: ChromaProcess) -> None:
    rows = make_rows(400)
    sink = ChromaDatasink(chroma.url, "once", INFO, shards=3)
    assert write(rows, sink) == WriteCounts(written=400)
    assert_stored(stored(chroma.url, "once"), rows)
    assert write(rows, ChromaDatasink(chroma.url, "once", INFO)) == WriteCounts(unchanged=400)
    changed = [*(replace(row, text="new") for row in rows[:7]), *make_rows(5, first=400)]
    assert write(changed, ChromaDatasink(chroma.url, "once", INFO)) == WriteCounts(written=5, changed=7)
    assert_stored(stored(chroma.url, "once"), [*changed[:7], *rows[7:], *changed[7:]])


def test_headers_of_the_driver_reach_the_workers(
    ray_cluster: Cluster, chroma: ChromaProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        seen.append(headers.get("authorization"))
        return None if seen[-1] == "Bearer s3cret" else (401, {}, b"{}")

    rows = make_rows(20)
    with Front(answer, chroma.url) as front:
        monkeypatch.setenv("EPIC_RAG_CHROMA_TOKEN", "s3cret")
        sink = ChromaDatasink(front.url, "headers", INFO)
        monkeypatch.delenv("EPIC_RAG_CHROMA_TOKEN")
        assert "s3cret" not in repr(sink)
        assert write(rows, sink, blocks=2) == WriteCounts(written=20)
        assert set(seen) == {"Bearer s3cret"}
    assert_stored(stored(chroma.url, "headers"), rows)


def test_fingerprints_are_not_mixed(ray_cluster: Cluster, chroma: ChromaProcess) -> None:
    rows, other = make_rows(20), replace(INFO, fingerprint="f2", model="other")
    write(rows, ChromaDatasink(chroma.url, "mixed", INFO, shards=2))
    for sink, info, said in (
        (ChromaDatasink(chroma.url, "mixed", other), None, "has vectors of tiny (f1), not of other (f2)"),
        (
            ChromaDatasink(chroma.url, "mixed", INFO),
            other,
            "The Dataset has vectors of other (f2), the sink is for tiny",
        ),
        (ChromaDatasink(chroma.url, "mixed", INFO, shards=4), None, "has 2 shards, not 4"),
    ):
        with pytest.raises((IndexMismatchError, FingerprintError)) as caught:
            write(make_rows(20, seed=5), sink, info=info)
        assert said in str(caught.value)
    assert_stored(stored(chroma.url, "mixed"), rows)
    import ray

    dataset = ray.data.from_items([{"id": "a", "text": "b"}])
    with pytest.raises(Exception, match="no column embedding") as failed:
        dataset.write_datasink(ChromaDatasink(chroma.url, "mixed", INFO))
    assert "no column embedding" in cause(failed.value)
    assert_stored(stored_in_any_state(chroma.url, "mixed"), rows)


def stored_in_any_state(url: str, name: str) -> dict[str, Record]:
    with Shards(ChromaServer(url), name) as shards:
        shards.open()
        return shards.get([row_id for page in shards.ids() for row_id in page])


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match="'none' is not the address of a Chroma server"):
        ChromaDatasink("none", "x", INFO)
    with pytest.raises(DataError, match="those of queries"):
        ChromaDatasink("http://h:1", "x", replace(INFO, role="query"))


def test_a_failed_write_is_made_good_by_the_next_job(ray_cluster: Cluster, chroma: ChromaProcess) -> None:
    failed: list[str] = []

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if path.endswith("/upsert") and not failed:
            failed.append(path)
            return 500, {}, b"{}"
        return None

    rows = make_rows(200)
    with Front(answer, chroma.url) as front:
        with pytest.raises(Exception, match="in doubt") as caught:
            write(rows, ChromaDatasink(front.url, "failed", INFO, shards=4))
        assert "1 of 4 shards of failed are in doubt" in cause(caught.value)
    with pytest.raises(IndexStateError, match="Write all rows"):
        write(rows[:10], ChromaDatasink(chroma.url, "failed", INFO), blocks=1)
    counts = write(rows, ChromaDatasink(chroma.url, "failed", INFO, has_all_rows=True))
    assert counts.written + counts.unchanged == 200
    assert 0 < counts.written < 120
    assert_stored(stored(chroma.url, "failed"), rows)


def test_a_killed_server(ray_cluster: Cluster, tmp_path: Path) -> None:
    """Kill the server while a job writes; after it is back, jobs complete the collection."""
    rows = make_rows(3000, dim=64)
    info = replace(INFO, dimension=64)
    with ChromaProcess(tmp_path / "server") as server:
        done = threading.Event()
        kills: list[float] = []

        def kill() -> None:
            while not (tmp_path / "server").exists() or not done.wait(0.3):
                with_rows = sum(path.stat().st_size for path in (tmp_path / "server").rglob("*.sqlite3*"))
                if with_rows > 2_000_000 or done.is_set():
                    break
            if not done.is_set():
                server.kill()
                kills.append(time.monotonic())
                server.start()

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            errors: list[Any] = []
            for _ in range(6):
                try:
                    write(rows, ChromaDatasink(server.url, "killed", info, shards=3, has_all_rows=True), blocks=10)
                    break
                except Exception as error:  # Ray wraps what tasks raise
                    errors.append(cause(error))
            else:
                pytest.fail(str(errors))
        finally:
            done.set()
            killer.join()
        assert kills
        assert_stored(stored(server.url, "killed"), rows)
