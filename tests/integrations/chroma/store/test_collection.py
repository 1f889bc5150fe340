"""The traps of Chroma 1.5, each shown on a real collection and shown to be avoided by `ChunkStore`."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import numpy.typing as npt
import pytest
from chromadb.config import Settings

from epic_rag_chroma.errors import IndexStateError
from epic_rag_chroma.store.collection import COLLECTION, ChunkStore

Vectors = npt.NDArray[np.float32]


def random_vectors(n: int, dim: int, seed: int = 0) -> Vectors:
    made = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def write(store: ChunkStore, ids: list[str], vectors: Vectors, **metadata: Any) -> None:
    rows = [{"doc_id": row.split("-")[0], **metadata} for row in ids]
    store.upsert(ids, vectors, [f"text of {row}" for row in ids], rows)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    made = ChunkStore.create(tmp_path, source="tiny", model="tiny", fingerprint="abc")
    yield made
    made.close()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    with chromadb.PersistentClient(str(tmp_path / "plain")) as made:  # type: ignore[attr-defined]
        yield made


def test_add_ignores_what_exists_and_upsert_does_not(client: Any, store: ChunkStore) -> None:
    plain = client.create_collection("plain", embedding_function=None)
    for text in ("old", "new"):
        plain.add(ids=["a"], embeddings=[[1.0, 0.0]], documents=[text])
    assert plain.get()["documents"] == ["old"]  # the trap
    vectors = random_vectors(2, 8)
    write(store, ["a"], vectors[:1])
    store.upsert(["a"], vectors[1:], ["new"], [{"doc_id": "a"}])
    ((found, score),) = store.nearest(vectors[1], 5)
    assert (store.get([found])["a"].text, store.count()) == ("new", 1)
    assert score == pytest.approx(1.0, abs=1e-5)


def test_batches_are_those_that_the_client_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ChunkStore.create(tmp_path, source="tiny", model="tiny", fingerprint="abc")
    limit = store._client.get_max_batch_size()
    vectors = random_vectors(limit + 1, 2)
    ids = [f"{n}" for n in range(limit + 1)]
    collection = store._collection
    with pytest.raises(Exception, match=r"(?i)batch size"):  # the trap
        collection.upsert(ids=ids, embeddings=vectors)
    store = ChunkStore(store._client, collection, tmp_path, max_batch=7)
    sizes: list[int] = []
    upsert = type(collection).upsert
    monkeypatch.setattr(
        type(collection), "upsert", lambda self, **given: (sizes.append(len(given["ids"])), upsert(self, **given))[1]
    )
    write(store, ids[:20], vectors[:20])
    assert (sizes, store.count()) == ([7, 7, 6], 20)
    store.delete(ids[:20])
    assert store.count() == 0
    store.close()


def test_the_space_is_cosine_and_scores_are_cosines(client: Any, store: ChunkStore) -> None:
    assert client.create_collection("plain", embedding_function=None).configuration_json["hnsw"]["space"] == "l2"
    assert store._collection.configuration_json["hnsw"]["space"] == "cosine"
    vectors = random_vectors(30, 8)
    write(store, [str(n) for n in range(30)], vectors)
    query = random_vectors(1, 8, seed=1)[0]
    for found, score in store.nearest(query, 30):
        assert score == pytest.approx(float(vectors[int(found)] @ query), abs=1e-5)


def test_another_configuration_is_kept_silently_by_chroma_and_refused_by_us(tmp_path: Path) -> None:
    store = ChunkStore.create(tmp_path, source="tiny", model="tiny", fingerprint="abc")
    store.close()
    with chromadb.PersistentClient(str(tmp_path / "chroma")) as client:  # type: ignore[attr-defined]
        made = client.get_or_create_collection(
            "mine", configuration={"hnsw": {"space": "l2"}}, metadata={"owner": "epic-rag"}, embedding_function=None
        )
        again = client.get_or_create_collection(
            "mine", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
        )
        assert again.configuration_json["hnsw"]["space"] == "l2"  # the trap
    with pytest.raises(IndexStateError, match=r"has space l2, an index needs cosine\. Run `epic-rag index --rebuild`"):
        ChunkStore.open(tmp_path, str(made.id))


def test_the_fingerprint_is_kept_with_the_collection(tmp_path: Path) -> None:
    made = ChunkStore.create(tmp_path, source="tiny", model="tiny", fingerprint="abc")
    made.publish()
    made.close()
    opened = ChunkStore.open(tmp_path, made.id)
    assert opened is not None
    assert opened.fingerprint == "abc"
    opened.close()
    with chromadb.PersistentClient(str(tmp_path / "chroma")) as client:  # type: ignore[attr-defined]
        collection = client.get_collection(COLLECTION)
        assert collection.metadata == {"owner": "epic-rag", "model": "tiny", "fingerprint": "abc"}


def test_nothing_to_write_is_no_error(client: Any, store: ChunkStore) -> None:
    plain = client.create_collection("plain", embedding_function=None)
    with pytest.raises(ValueError, match=r"(?i)non-empty"):  # the trap
        plain.upsert(ids=[], embeddings=[])
    nothing = np.empty((0, 8), dtype=np.float32)
    store.upsert([], nothing, [], [])
    store.update_metadata([], [])
    store.delete([])
    assert list(store.scan()) == []
    assert store.nearest(random_vectors(1, 8)[0], 5) == []
    assert store.get([]) == {}


def test_metadata_without_a_value_is_left_out(client: Any, store: ChunkStore) -> None:
    plain = client.create_collection("plain", embedding_function=None)
    with pytest.raises(ValueError, match=r"(?i)non-empty"):  # the trap
        plain.upsert(ids=["a"], embeddings=[[1.0, 0.0]], metadatas=[{}])
    vectors = random_vectors(2, 8)
    store.upsert(["a", "b"], vectors, ["x", "y"], [{"page": None, "n": math.nan, "path": "p"}, {}])
    assert dict(store.scan())["a"] == {"path": "p"}
    assert store.count() == 2


def test_metadata_changes_leave_vector_and_text(store: ChunkStore) -> None:
    vectors = random_vectors(3, 8)
    write(store, ["a-1", "a-2", "b-1"], vectors, first_line=1)
    store.update_metadata(["a-2"], [{"doc_id": "a", "first_line": 5}])
    assert dict(store.nearest(vectors[1], 3))["a-2"] == pytest.approx(1.0, abs=1e-5)
    found = store.get(["a-2", "gone"])
    assert list(found) == ["a-2"]
    assert (found["a-2"].text, found["a-2"].metadata["first_line"]) == ("text of a-2", 5)
    assert found["a-2"].vector == pytest.approx(vectors[1], abs=1e-6)
    assert [row for row, _ in store.nearest(vectors[1], 3, allowed={"b-1"})] == ["b-1"]


def test_the_search_finds_what_brute_force_finds(client: Any, store: ChunkStore) -> None:
    n, dim, k = 3000, 128, 10
    vectors, queries = random_vectors(n, dim), random_vectors(50, dim, seed=1)
    truth = np.argsort(-(queries @ vectors.T), axis=1)[:, :k]
    ids = [str(number) for number in range(n)]
    write(store, ids, vectors)
    mine = [[row for row, _ in store.nearest(query, k)] for query in queries]
    plain = client.create_collection("plain", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None)
    plain.upsert(ids=ids, embeddings=vectors)
    defaults = plain.query(query_embeddings=queries, n_results=k, include=[])["ids"]

    def recall(found: list[list[str]]) -> float:
        hits = [len(set(row) & set(map(str, true))) for row, true in zip(found, truth, strict=True)]
        return float(np.mean(hits)) / k

    assert recall(mine) >= 0.98
    assert recall(mine) >= recall(defaults)


def test_rows_stay_reachable_through_edits(store: ChunkStore) -> None:
    chance = np.random.default_rng(0)
    vectors = random_vectors(900, 32)
    alive = {f"{n}": vectors[n] for n in range(400)}
    write(store, list(alive), np.stack(list(alive.values())))
    for start in range(400, 900, 100):
        old = [str(row) for row in chance.choice(sorted(alive), 100, replace=False)]
        new = {f"{n}": vectors[n] for n in range(start, start + 100)}
        write(store, list(new), np.stack(list(new.values())))
        store.delete(old)
        alive = {row: vector for row, vector in {**alive, **new}.items() if row not in set(old)}
    assert store.count() == len(alive)
    lost = [row for row, vector in alive.items() if store.nearest(vector, 1)[0][0] != row]
    assert lost == []


def test_telemetry_is_off_and_a_client_with_defaults_can_open_the_same_folder(
    tmp_path: Path, store: ChunkStore
) -> None:
    assert store._client.get_settings().anonymized_telemetry is False
    write(store, ["a"], random_vectors(1, 8))
    store.publish()
    # Chroma refuses a second client with other settings for the same path
    with chromadb.PersistentClient(  # type: ignore[attr-defined]
        str(tmp_path / "chroma"), settings=Settings(anonymized_telemetry=True)
    ) as client:
        assert client.get_collection(COLLECTION, embedding_function=None).get()["ids"] == ["a"]


def test_opening_makes_nothing(tmp_path: Path, store: ChunkStore) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert ChunkStore.open(empty, str(uuid.uuid4())) is None
    assert list(empty.iterdir()) == []
    assert ChunkStore.open(tmp_path, str(uuid.uuid4())) is None
    assert ChunkStore.open(tmp_path, None) is None


def test_a_broken_database_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "chroma").mkdir()
    (tmp_path / "chroma/chroma.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(IndexStateError, match=r"Chroma cannot read .*`epic-rag clear --yes`"):
        ChunkStore.open(tmp_path, str(uuid.uuid4()))


def test_publishing_swaps_and_leaves_foreign_collections(tmp_path: Path) -> None:
    old = ChunkStore.create(tmp_path, source="tiny", model="tiny", fingerprint="old")
    old.publish()
    old._client.create_collection("mine", embedding_function=None)
    new = ChunkStore.create(tmp_path, source="tiny", model="tiny", fingerprint="new")
    assert {each.name for each in old._client.list_collections()} == {"mine", COLLECTION, new._collection.name}
    for _ in range(2):  # safe to repeat
        new.publish()
        assert {each.name for each in new._client.list_collections()} == {"mine", COLLECTION}
    old.close()
    new.close()
    opened = ChunkStore.open(tmp_path, new.id)
    assert opened is not None
    assert opened.fingerprint == "new"
    opened.close()


def test_scan_pages_through_everything(store: ChunkStore) -> None:
    paged = ChunkStore(store._client, store._collection, store._place, page=10)
    for n in (20, 25):
        write(store, [f"{number}" for number in range(n)], random_vectors(n, 8))
        assert {row for row, _ in paged.scan()} == {f"{number}" for number in range(n)}
