"""The mirror in a folder: always equal to the rows, whatever happened to it; and the pitfalls of Chroma 1.5."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import numpy.typing as npt
import pytest
from chromadb.config import Settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epic_rag_chroma.errors import IndexStateError
from epic_rag_chroma.store import client as clients
from epic_rag_chroma.store.collection import Mirror, delete_collections, open_collection
from epic_rag_chroma.store.database import Record
from epic_rag_chroma.store.server import COLLECTION
from tests.helpers.mirrors import DIMENSION, MemoryDatabase, assert_mirrored, mirrored_rows, sync, unit_vector

OWNED = {"owner": "epic-rag", "model": "tiny", "fingerprint": "abc"}


def filled(count: int = 150) -> MemoryDatabase:
    database = MemoryDatabase()
    for number in range(count):
        database.put(f"a-{number}", number=number)
    return database


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    """A plain client of the folder `tmp_path`/chroma."""
    with chromadb.PersistentClient(str(tmp_path / "chroma")) as made:  # type: ignore[attr-defined]
        yield made


def opened(place: Path, collection: str) -> Mirror:
    mirror = open_collection(place, collection)
    assert mirror is not None
    return mirror


def graphs(place: Path) -> list[Path]:
    return [path for path in (place / "chroma").iterdir() if path.is_dir()]


# -- a mirror -----------------------------------------------------------------------------------------------------------


def test_fill(tmp_path: Path) -> None:
    database = filled()
    sync(database, tmp_path)
    assert_mirrored(database, tmp_path)
    with chromadb.PersistentClient(str(tmp_path / "chroma")) as client:  # type: ignore[attr-defined]
        (collection,) = client.list_collections()
        assert (collection.name, collection.metadata) == (COLLECTION, OWNED)
        assert collection.configuration_json["hnsw"]["space"] == "cosine"
        function = collection.configuration_json["embedding_function"]
        assert (function["name"], function["config"]["fingerprint"]) == ("epic-rag", "abc")


def test_empty_database(tmp_path: Path) -> None:
    database = MemoryDatabase()
    collection = sync(database, tmp_path)
    assert mirrored_rows(tmp_path) == {}
    assert opened(tmp_path, collection).nearest(unit_vector(1), 5) == []
    database.put("a")
    assert sync(database, tmp_path) == collection
    database.remove("a")
    assert sync(database, tmp_path) == collection
    assert mirrored_rows(tmp_path) == {}


def test_changes(tmp_path: Path) -> None:
    database = filled()
    collection = sync(database, tmp_path)
    for number in range(40):
        database.put(f"a-{number}", other=number)  # a key more and a key less
        database.put(f"b-{number}")
        database.remove(f"a-{number + 60}")
    database.outbox.add("never-there")
    assert sync(database, tmp_path) == collection
    assert_mirrored(database, tmp_path)


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from(["put", "remove"]), st.integers(0, 30)), max_size=60), max_size=4))
def test_random_changes(tmp_path: Path, turns: list[list[tuple[str, int]]]) -> None:
    place = tmp_path / uuid.uuid4().hex
    place.mkdir()
    database = MemoryDatabase()
    for turn in turns:
        for action, number in turn:
            row = f"a-{number}"
            if action == "put":
                database.put(row, **{f"key{len(turn) % 3}": len(turn)})
            elif row in database.rows:
                database.remove(row)
        sync(database, place)
        assert_mirrored(database, place)


def test_nothing_to_do_opens_nothing(tmp_path: Path) -> None:
    database = filled(3)
    collection = sync(database, tmp_path)
    mirrored_rows(tmp_path)  # a reader changes nothing
    code = (
        "import sys; from pathlib import Path; from tests.helpers import mirrors; from tests.helpers.mirrors import *\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] in ('chromadb', 'httpx')]:\n"
        "    sys.modules[name] = None\n"
        "database = MemoryDatabase(); [database.put(f'a-{number}', number=number) for number in range(3)]\n"
        "database.end_mirror(sys.argv[2]); sync(database, Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), collection], check=True)


def test_another_model_has_another_collection(tmp_path: Path) -> None:
    database = filled()
    first = sync(database, tmp_path)
    database.put("b")
    second = sync(database, tmp_path, fingerprint="def")
    assert first != second
    assert_mirrored(database, tmp_path)
    assert len(graphs(tmp_path)) == 1  # Chroma leaves the deleted collection's graph


def test_others_rows_and_collections(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = filled()
    collection = sync(database, tmp_path)
    with chromadb.PersistentClient(str(tmp_path / "chroma")) as client:  # type: ignore[attr-defined]
        other = client.create_collection("somebodys", embedding_function=None)
        other.add(ids=[str(number) for number in range(1100)], embeddings=[[float(n), 1.0] for n in range(1100)])
        ours = client.get_collection(COLLECTION, embedding_function=None)
        vectors = [unit_vector(number).tolist() for number in range(120)]
        ours.add(ids=[f"note-{number}" for number in range(120)], embeddings=vectors)  # enough to write the graph
    kept = {f"note-{number}" for number in range(120)}
    (tmp_path / "chroma/notes").mkdir()
    database.put("b")
    database.remove("a-7")
    assert sync(database, tmp_path) == collection
    assert "the collection has 120 rows that epic-rag did not write; they are left alone" in caplog.text
    assert kept < set(mirrored := _ids(tmp_path))
    assert set(mirrored) - kept == set(database.rows)
    # A new collection is made without them; somebody's collection stays.
    database.put("c")
    assert sync(database, tmp_path, fingerprint="def") != collection
    assert set(_ids(tmp_path)) == set(database.rows)
    with chromadb.PersistentClient(str(tmp_path / "chroma")) as client:  # type: ignore[attr-defined]
        assert {each.name for each in client.list_collections()} == {"somebodys", COLLECTION}
        assert client.get_collection("somebodys", embedding_function=None).count() == 1100
    assert (tmp_path / "chroma/notes").is_dir()
    assert len(graphs(tmp_path)) == 3


def _ids(place: Path) -> list[str]:
    with chromadb.PersistentClient(str(place / "chroma")) as client:  # type: ignore[attr-defined]
        return list(client.get_collection(COLLECTION, embedding_function=None).get(include=[])["ids"])


# -- a mirror in doubt --------------------------------------------------------------------------------------------------


def cut(name: str, size: int) -> Any:
    return lambda graph: (graph / name).write_bytes((graph / name).read_bytes()[:size])


def long_links(graph: Path) -> None:
    """Give the first row neighbours on more levels than the graph has: Chroma 1.5 crashes."""
    (degree,) = struct.unpack_from("=Q", (graph / "header.bin").read_bytes(), 60)
    links = graph / "link_lists.bin"
    content, length = links.read_bytes(), (4 * degree + 4) * 16
    links.write_bytes(struct.pack("=I", length) + content[4:] + bytes(length))


def without_database(graph: Path) -> None:
    (graph.parent / "chroma.sqlite3").unlink()
    (graph.parent / "chroma.sqlite3").mkdir()


DAMAGE = {
    "no folder": lambda graph: shutil.rmtree(graph.parent),
    "no graph": shutil.rmtree,
    "cut vectors": cut("data_level0.bin", 1000),
    "cut header": cut("header.bin", 50),
    "cut lengths": cut("length.bin", 100),
    "long links": long_links,
    "links of a terabyte": lambda graph: os.truncate(graph / "link_lists.bin", 2**40),
    "another database": lambda graph: (graph.parent / "chroma.sqlite3").write_bytes(b"no database" * 1000),
    "a folder for the database": without_database,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_made_again(tmp_path: Path, damage: str) -> None:
    database = filled(230)
    collection = sync(database, tmp_path)
    (graph,) = graphs(tmp_path)
    DAMAGE[damage](graph)
    assert open_collection(tmp_path, collection) is None  # readers scan the rows
    assert sync(database, tmp_path)  # although there is nothing to send
    assert_mirrored(database, tmp_path)
    assert len(graphs(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["cut header", "long links"])  # both crash the process that loads them
def test_a_dirty_collection_is_not_loaded(tmp_path: Path, damage: str) -> None:
    database = filled(230)
    collection = sync(database, tmp_path)
    database.begin_mirror(collection)
    (graph,) = graphs(tmp_path)
    DAMAGE[damage](graph)
    assert sync(database, tmp_path) != collection
    assert_mirrored(database, tmp_path)
    assert not graph.exists()


def test_lost_rows(tmp_path: Path) -> None:
    database = filled()
    collection = sync(database, tmp_path)
    with chromadb.PersistentClient(str(tmp_path / "chroma")) as client:  # type: ignore[attr-defined]
        client.get_collection(COLLECTION, embedding_function=None).delete(ids=["a-1"])
    database.put("b")
    assert sync(database, tmp_path) != collection
    assert_mirrored(database, tmp_path)


def test_failed_attempts_leave_nothing(tmp_path: Path, client: Any) -> None:
    for number in range(3):
        client.create_collection(f"{COLLECTION}_{number}", metadata=OWNED, embedding_function=None)
    client.create_collection(f"{COLLECTION}_other", embedding_function=None)
    database = filled()
    sync(database, tmp_path)
    assert {each.name for each in client.list_collections()} == {COLLECTION, f"{COLLECTION}_other"}


class PanicException(BaseException):
    """Stand-in for the exception of Chroma's bindings for a Rust panic, which only Rust can create."""


@pytest.mark.parametrize("error", [PanicException("no thread to be had"), RuntimeError("disk is\nfull")])
def test_a_failure_of_chroma_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    database = filled()
    sync(database, tmp_path)
    database.put("b")

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(chromadb, "PersistentClient", fail)
        why = " ".join(str(error).split())
        with pytest.raises(
            IndexStateError, match=rf"cannot use .*\({why}\)\. Stored data is intact\..*`epic-rag index`"
        ):
            sync(database, tmp_path)
    sync(database, tmp_path)
    assert_mirrored(database, tmp_path)


KILLED = """
import sys
from pathlib import Path
from tests.helpers.mirrors import MemoryDatabase, sync
from tests.integrations.chroma.store.test_collection import turn
folder, step = Path(sys.argv[1]), int(sys.argv[2])
database = MemoryDatabase(folder / "state")
turn(database, step)
sync(database, folder)
"""


def turn(database: MemoryDatabase, step: int) -> None:
    """Make the rows of a step; the changes since the step before are in the outbox."""
    for number in range(600 + 100 * step):
        database.put(f"a-{number}", number=number)
    database.outbox.clear()
    for number in range(500 + 100 * step, 600 + 100 * step):
        database.outbox.add(f"a-{number}")
    for number in range(step):
        database.remove(f"a-{number}")


def test_the_process_is_killed_while_it_writes(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    kills = 0
    for step in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path, str(step)])
        while not MemoryDatabase(tmp_path / "state").mirror().is_dirty and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        database = MemoryDatabase(tmp_path / "state")
        turn(database, step)
        sync(database, tmp_path)
        assert_mirrored(database, tmp_path)
        assert len(graphs(tmp_path)) == 1
    assert kills > 0


# -- reading ------------------------------------------------------------------------------------------------------------


def random_vectors(n: int, dim: int, seed: int = 0) -> npt.NDArray[np.float32]:
    made = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def database_of(vectors: npt.NDArray[np.float32]) -> MemoryDatabase:
    database = MemoryDatabase(page=500)
    for number, vector in enumerate(vectors):
        database.rows[f"{number:05}"] = Record(f"{number:05}", "text", {"doc_id": "a"}, vector)
    return database


def test_nearest_is_that_of_brute_force(tmp_path: Path, client: Any) -> None:
    n, dim, k = 3000, 128, 10
    vectors, queries = random_vectors(n, dim), random_vectors(50, dim, seed=1)
    scores = queries @ vectors.T
    truth = np.argsort(-scores, axis=1)[:, :k]
    mirror = opened(tmp_path, sync(database_of(vectors), tmp_path))
    mine = [mirror.nearest(query, k) for query in queries]
    for found, exact in zip(mine, scores, strict=True):
        for row, score in found:
            assert score == pytest.approx(float(exact[int(row)]), abs=1e-5)
        assert found == sorted(found, key=lambda hit: (-hit[1], hit[0]))
    assert mirror.nearest(queries[0], 0) == []
    assert len(mirror.nearest(queries[0], 2 * n)) == n
    mirror.close()
    plain = client.create_collection("plain", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None)
    plain.upsert(ids=[f"{number:05}" for number in range(n)], embeddings=vectors)
    defaults = plain.query(query_embeddings=queries, n_results=k, include=[])["ids"]

    def recall(found: list[list[str]]) -> float:
        hits = [len({*map(int, row)} & {*map(int, true)}) for row, true in zip(found, truth, strict=True)]
        return float(np.mean(hits)) / k

    assert recall([[row for row, _ in each] for each in mine]) >= 0.98
    assert recall([[row for row, _ in each] for each in mine]) >= recall(defaults)


def test_equal_cosines_are_in_the_order_of_their_ids(tmp_path: Path) -> None:
    vectors = np.repeat(random_vectors(1, DIMENSION), 9, axis=0)
    mirror = opened(tmp_path, sync(database_of(vectors), tmp_path))
    assert [row for row, _ in mirror.nearest(vectors[0], 9)] == [f"{number:05}" for number in range(9)]
    mirror.close()


def test_an_open_mirror_has_read_its_files(tmp_path: Path) -> None:
    database = filled(230)
    mirror = opened(tmp_path, sync(database, tmp_path))
    shutil.rmtree(graphs(tmp_path)[0])
    vector = database.rows["a-7"].vector
    assert mirror.nearest(vector, 1) == [("a-7", pytest.approx(1.0, abs=1e-5))]
    mirror.close()


def test_rows_stay_reachable_through_edits(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    database = filled(400)
    collection = sync(database, tmp_path)
    for start in range(400, 900, 100):
        for row in chance.choice(sorted(database.rows), 100, replace=False):
            database.remove(str(row))
        for number in range(start, start + 100):
            database.put(f"a-{number}")
        assert sync(database, tmp_path) == collection
    assert_mirrored(database, tmp_path)


def test_a_missing_collection_is_none_and_makes_nothing(tmp_path: Path) -> None:
    assert open_collection(tmp_path, str(uuid.uuid4())) is None
    assert list(tmp_path.iterdir()) == []
    sync(filled(), tmp_path)
    assert open_collection(tmp_path, str(uuid.uuid4())) is None
    delete_collections(tmp_path)
    delete_collections(tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- the pitfalls ---------------------------------------------------------------------------------------------------------


def test_add_ignores_what_exists(client: Any) -> None:
    plain = client.create_collection("plain", embedding_function=None)
    for text in ("old", "new"):
        plain.add(ids=["a"], embeddings=[[1.0, 0.0]], documents=[text])
    assert plain.get()["documents"] == ["old"]


def test_another_configuration_is_ignored_silently(client: Any) -> None:
    for space in ("l2", "cosine"):
        plain = client.get_or_create_collection(
            "plain", configuration={"hnsw": {"space": space}}, embedding_function=None
        )
    assert plain.configuration_json["hnsw"]["space"] == "l2"


def test_upsert_and_update_merge_metadata(client: Any) -> None:
    plain = client.create_collection("plain", embedding_function=None)
    plain.upsert(ids=["a"], embeddings=[[1.0, 0.0]], metadatas=[{"x": 1, "y": 1}])
    plain.upsert(ids=["a"], embeddings=[[1.0, 0.0]], metadatas=[{"x": 2}])
    assert plain.get()["metadatas"] == [{"x": 2, "y": 1}]
    plain.update(ids=["a"], metadatas=[{"x": 3, "y": None}])
    assert plain.get()["metadatas"] == [{"x": 3}]


def test_values_that_chroma_does_not_store_are_left_out(tmp_path: Path, client: Any) -> None:
    plain = client.create_collection("plain", embedding_function=None)
    with pytest.raises(ValueError, match=r"(?i)non-empty"):
        plain.upsert(ids=["a"], embeddings=[[1.0, 0.0]], metadatas=[{}])
    database = MemoryDatabase()
    for row, metadata in {"a": {"page": None, "n": float("nan"), "path": "p"}, "b": {}}.items():
        database.rows[row] = Record(row, "text", metadata, unit_vector(1))
    sync(database, tmp_path)
    rows = mirrored_rows(tmp_path)
    assert (rows["a"][1], rows["b"][1]) == ({"path": "p"}, {"owner": "epic-rag"})


def test_batches_are_those_that_the_client_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    upsert = chromadb.Collection.upsert

    def counted(self: Any, **given: Any) -> None:
        sizes.append(len(given["ids"]))
        upsert(self, **given)

    monkeypatch.setattr(chromadb.Collection, "upsert", counted)
    folder_client = clients.folder_client

    def limited(index_dir: Path) -> Any:
        made = folder_client(index_dir)
        monkeypatch.setattr(made, "get_max_batch_size", lambda: 7)
        return made

    monkeypatch.setattr(clients, "folder_client", limited)
    database = filled(20)
    sync(database, tmp_path)
    assert sizes == [7, 7, 6]
    for number in range(20):
        database.remove(f"a-{number}")
    sync(database, tmp_path)
    assert mirrored_rows(tmp_path) == {}


def test_telemetry_is_off_and_a_client_with_defaults_can_open_the_folder(tmp_path: Path) -> None:
    mirror = opened(tmp_path, sync(filled(), tmp_path))
    ours = clients.folder_client(tmp_path)
    assert ours.get_settings().anonymized_telemetry is False
    # Chroma refuses a second client with other settings for the same path.
    with chromadb.PersistentClient(  # type: ignore[attr-defined]
        str(tmp_path / "chroma"), settings=Settings(anonymized_telemetry=True)
    ) as client:
        assert client.get_collection(COLLECTION, embedding_function=None).count() == 150
    mirror.close()
