"""An index with its mirror on a real Chroma server."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer, ChromaServer
from epic_rag_chroma.errors import ChromaServerError, IndexStateError
from epic_rag_chroma.store.database import IndexDatabase
from epic_rag_chroma.store.paths import DATABASE_FILE
from epic_rag_chroma.store.server import ServerPlace
from tests.helpers.servers import HOST, Answer, ChromaProcess, Front, free_port, plain_client

Rows = dict[str, tuple[str, dict[str, Any], list[float]]]
TOKEN = "s3cret-token"


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(autouse=True)
def _plain_environment(chroma: ChromaProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable of the person who runs the tests, and an empty server."""
    for name in [name for name in os.environ if name.startswith("EPIC_RAG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield
    with plain_client(chroma.url) as client:
        for each in client.list_collections():
            client.delete_collection(each.name)


@pytest.fixture
def on_server(docs: Path, tiny_encoder: EpicEncoder, chroma: ChromaProcess) -> Iterator[ChromaIndexer]:
    """An index of docs on the server, and none there afterwards."""
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder, chroma=chroma.url) as made:
        made.index([docs])
        yield made


def collections(url: str, **where: str) -> dict[str, dict[str, Any]]:
    """All collections of a database: their names and metadata."""
    with plain_client(url, **where) as client:
        return {each.name: dict(each.metadata or {}) for each in client.list_collections()}


def mirror_of(index_dir: Path) -> tuple[ServerPlace | str, str | None]:
    """Return the place of an index's mirror and the id of its collection."""
    with closing(IndexDatabase.open_reading(index_dir / DATABASE_FILE)) as database:
        state, mirror = database.state(), database.mirror()
    assert state is not None
    assert mirror.is_complete
    return state.chroma, mirror.collection


def name_server(index_dir: Path, url: str) -> None:
    """Let an index name another server, as a folder from elsewhere may."""
    with closing(IndexDatabase.open(index_dir / DATABASE_FILE)) as database:
        state = database.state()
        assert state is not None
        assert isinstance(state.chroma, ServerPlace)
        with database.transaction():
            database.save_state(replace(state, chroma=replace(state.chroma, server=ChromaServer(url))))


def rows_on(url: str, index_dir: Path, **where: str) -> Rows:
    """All rows of an index on a server, through a client of Chroma's own."""
    place, collection_id = mirror_of(index_dir)
    assert isinstance(place, ServerPlace)
    with plain_client(url, **where) as client:
        collection = client.get_collection(f"epic_rag_{place.index_id}", embedding_function=None)
        assert str(collection.id) == collection_id
        assert collection.configuration_json["hnsw"]["space"] == "cosine"
        rows = collection.get(include=["documents", "metadatas", "embeddings"])
    return {
        row: (text, dict(metadata), list(map(float, vector)))
        for row, text, metadata, vector in zip(
            rows["ids"], rows["documents"], rows["metadatas"], rows["embeddings"], strict=True
        )
    }


def assert_same(found: Rows, expected: Rows) -> None:
    assert {row: value[:2] for row, value in found.items()} == {row: value[:2] for row, value in expected.items()}
    for row, value in found.items():
        np.testing.assert_allclose(value[2], expected[row][2], atol=1e-6)


def test_a_server_has_what_a_folder_has(
    docs: Path,
    on_server: ChromaIndexer,
    chroma: ChromaProcess,
    tiny_encoder: EpicEncoder,
    rows: Callable[[Path], Rows],
    tmp_path: Path,
) -> None:
    ignore = shutil.ignore_patterns(".epic-rag")
    for turn in range(2):
        copy = Path(shutil.copytree(docs, tmp_path / f"copy{turn}/docs", ignore=ignore))
        with ChromaIndexer(copy / ".epic-rag", encoder=tiny_encoder) as in_folder:
            in_folder.index([copy])
            for mode in ("dense", "hybrid", "keyword"):
                expected = in_folder.query("delete the folder", k=10, mode=mode)
                found = on_server.query("delete the folder", k=10, mode=mode)
                assert [(hit.id, hit.text) for hit in found] == [(hit.id, hit.text) for hit in expected]
                assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-5)
        assert_same(rows_on(chroma.url, docs / ".epic-rag"), rows(copy / ".epic-rag"))
        assert not (docs / ".epic-rag/chroma").exists()
        # Edited, the second time.
        (docs / "guide.md").write_text("# Guide\n\n## Remove\n\nDelete the folder and what is in it.\n")
        if turn == 0:
            (docs / "notes.txt").rename(docs / "cats.txt")
        (docs / "new.md").write_text("# New\n\nDelete nothing.\n")
        if turn == 0:
            report = on_server.index([docs])
            assert (report.added, report.changed, report.renamed) == (1, 1, 1)
    assert on_server.index([docs]).chunks_embedded == 0


def test_an_index_remembers_its_server(docs: Path, on_server: ChromaIndexer, chroma: ChromaProcess) -> None:
    place, _ = mirror_of(docs / ".epic-rag")
    assert isinstance(place, ServerPlace)
    assert place.server == ChromaServer(chroma.url)
    with ChromaIndexer(docs / ".epic-rag") as indexer:
        assert indexer.status().chroma == chroma.url
        assert indexer.status().collection == f"epic_rag_{place.index_id}"
        assert indexer.status().chunks == 4
        assert len(indexer.query("cats", mode="keyword")) == 1
    assert collections(chroma.url)[f"epic_rag_{place.index_id}"]["owner"] == "epic-rag"


def test_only_what_is_ours_is_deleted(
    docs: Path, on_server: ChromaIndexer, chroma: ChromaProcess, tiny_encoder: EpicEncoder, tmp_path: Path
) -> None:
    with plain_client(chroma.url) as client:
        client.create_collection("not-ours", metadata={"owner": "somebody"}, embedding_function=None)
        client.create_collection("an-index-in-a-folder", metadata={"owner": "epic-rag"}, embedding_function=None)
    others = {"not-ours", "an-index-in-a-folder"}
    own = set(collections(chroma.url)) - others
    copy = Path(shutil.copytree(docs, tmp_path / "copy", ignore=shutil.ignore_patterns(".epic-rag")))
    with ChromaIndexer(copy / ".epic-rag", encoder=tiny_encoder, chroma=chroma.url) as second:
        second.index([copy])
        assert len(set(collections(chroma.url)) - own - others) == 1
        second.index([copy], rebuild=True)
        assert len(set(collections(chroma.url)) - own - others) == 1
        assert len(second.query("cats", k=10)) == 4
        assert len(on_server.query("cats", k=10)) == 4
        second.clear()
        assert not (copy / ".epic-rag").exists()
    assert set(collections(chroma.url)) == own | others
    on_server.clear()
    assert others <= set(collections(chroma.url))


def test_another_place_moves_the_mirror(
    docs: Path, on_server: ChromaIndexer, chroma: ChromaProcess, tiny_encoder: EpicEncoder, rows: Callable[[Path], Rows]
) -> None:
    index_dir = docs / ".epic-rag"
    before = rows_on(chroma.url, index_dir)
    with ChromaIndexer(index_dir, encoder=tiny_encoder, chroma="folder") as home:
        assert home.index([docs]).chunks_embedded == 0
        assert home.status().chroma is None
    assert not any(name.startswith("epic_rag_") for name in collections(chroma.url))
    assert_same(rows(index_dir), before)
    with ChromaIndexer(index_dir, encoder=tiny_encoder, chroma=chroma.url) as there:
        assert there.index([docs]).chunks_embedded == 0
        assert len(there.query("cats", k=10)) == 4
    assert not (index_dir / "chroma").exists()
    assert_same(rows_on(chroma.url, index_dir), before)


def test_a_mirror_stays_if_it_cannot_move(
    docs: Path, on_server: ChromaIndexer, chroma: ChromaProcess, tiny_encoder: EpicEncoder
) -> None:
    index_dir = docs / ".epic-rag"
    before = rows_on(chroma.url, index_dir)
    (docs / "new.md").write_text("Something new.\n")
    with ChromaIndexer(index_dir, encoder=tiny_encoder, chroma=f"http://{HOST}:{free_port()}") as wrong:
        with pytest.raises(ChromaServerError, match=r"connection refused.*The index itself is complete"):
            wrong.index([docs])
        assert wrong.status().chroma == chroma.url
        assert len(wrong.query("cats", k=10)) == 5
    report = on_server.index([docs])
    assert (report.unchanged, report.chunks_embedded) == (4, 0)
    assert set(before) < set(rows_on(chroma.url, index_dir))
    assert len(collections(chroma.url)) == 1


def test_a_server_with_a_new_address_is_followed(
    docs: Path, on_server: ChromaIndexer, chroma: ChromaProcess, tiny_encoder: EpicEncoder
) -> None:
    with (
        Front(lambda *_: None, chroma.url) as front,
        ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder, chroma=front.url) as moved,
    ):
        report = moved.index([docs])
        assert (report.unchanged, report.chunks_embedded) == (3, 0)
        assert moved.status().chroma == front.url
        assert len(rows_on(chroma.url, docs / ".epic-rag")) == 4  # although the old place was deleted
        assert len(collections(chroma.url)) == 1


def test_the_address_of_a_new_index_can_be_corrected(
    docs: Path, chroma: ChromaProcess, tiny_encoder: EpicEncoder
) -> None:
    wrong = f"http://{HOST}:{free_port()}"
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder, chroma=wrong) as one:
        with pytest.raises(ChromaServerError, match="The index itself is complete"):
            one.index([docs])
        assert len(one.query("cats", k=10)) == 4
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder, chroma=chroma.url) as two:
        assert two.index([docs]).chunks_embedded == 0
        assert len(rows_on(chroma.url, docs / ".epic-rag")) == 4
        two.clear()
    assert collections(chroma.url) == {}


def test_tenant_and_database(
    docs: Path, chroma: ChromaProcess, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPIC_RAG_CHROMA", chroma.url)
    monkeypatch.setenv("EPIC_RAG_CHROMA_TENANT", "readers")
    monkeypatch.setenv("EPIC_RAG_CHROMA_DATABASE", "manuals")
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        with pytest.raises(ChromaServerError, match="no database manuals of a tenant readers"):
            indexer.index([docs])
        with Front(lambda *_: None, chroma.url) as front:
            front.send("POST", "/api/v2/tenants", {"name": "readers"})
            front.send("POST", "/api/v2/tenants/readers/databases", {"name": "manuals"})
        indexer.index([docs])
        assert indexer.status().chroma == f"{chroma.url} (tenant readers, database manuals)"
        assert len(rows_on(chroma.url, docs / ".epic-rag", tenant="readers", database="manuals")) == 4
        # The environment is for new indexes; this one knows where it is.
        monkeypatch.setenv("EPIC_RAG_CHROMA", "http://elsewhere:1")
        monkeypatch.setenv("EPIC_RAG_CHROMA_TENANT", "others")
        assert len(indexer.query("cats", k=10)) == 4
    server = ChromaServer(chroma.url, "readers", "manuals")
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder, chroma=server) as indexer:
        indexer.clear()
    assert collections(chroma.url, tenant="readers", database="manuals") == {}


def test_the_token_is_sent_and_kept_nowhere(
    docs: Path, chroma: ChromaProcess, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guard(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        return None if headers.get("authorization") == f"Bearer {TOKEN}" else (401, {}, b"{}")

    monkeypatch.setenv("EPIC_RAG_CHROMA_TOKEN", TOKEN)
    with (
        Front(guard, chroma.url) as front,
        ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder, chroma=front.url) as indexer,
    ):
        indexer.index([docs])
        assert len(indexer.query("cats", k=10)) == 4
        for path in (docs / ".epic-rag").rglob("*"):
            assert path.is_dir() or TOKEN.encode() not in path.read_bytes()
        assert TOKEN not in json.dumps(collections(chroma.url))
        monkeypatch.setenv("EPIC_RAG_CHROMA_TOKEN", f"old-{TOKEN}")
        (docs / "new.md").write_text("Something new.\n")
        with pytest.raises(ChromaServerError, match="refuses the credentials") as caught:
            indexer.index([docs])
        assert TOKEN not in str(caught.value)
        monkeypatch.setenv("EPIC_RAG_CHROMA_TOKEN", TOKEN)
        indexer.clear()


def test_a_folder_from_elsewhere_sends_nothing_anywhere(
    docs: Path,
    on_server: ChromaIndexer,
    chroma: ChromaProcess,
    tiny_encoder: EpicEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its database may name any server; that of a stranger gets neither token nor texts."""
    with Front(lambda *_: None, chroma.url) as front:
        name_server(docs / ".epic-rag", front.url)
        monkeypatch.setenv("EPIC_RAG_CHROMA_TOKEN", TOKEN)
        with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
            assert len(indexer.query("cats", k=10)) == 4
            for call in (lambda: indexer.index([docs]), indexer.clear):
                with pytest.raises(IndexStateError, match=f"not named on this machine.* --chroma {front.url}"):
                    call()
            assert front.requests == []
            monkeypatch.setenv("EPIC_RAG_CHROMA", front.url)
            indexer.index([docs])
            assert front.requests != []
            # Once named, it is known.
            monkeypatch.delenv("EPIC_RAG_CHROMA")
            indexer.clear()


def test_a_server_on_another_machine_must_be_named(
    docs: Path, on_server: ChromaIndexer, tiny_encoder: EpicEncoder, tmp_path: Path
) -> None:
    name_server(docs / ".epic-rag", "http://chroma.invalid:8000")
    (docs / "new.md").write_text("Something new.\n")
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        with pytest.raises(IndexStateError, match="not named"):
            indexer.index([docs])
        with (
            ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder, chroma="http://chroma.invalid:8000") as named,
            pytest.raises(ChromaServerError, match="host name"),
        ):
            named.index([docs])
        with pytest.raises(ChromaServerError, match="host name"):
            indexer.index([docs])
        known = tmp_path / "state/epic-rag/chroma_servers.json"
        assert json.loads(known.read_text()) == {"servers": ["http://chroma.invalid:8000"]}
        known.write_text("[broken")
        with pytest.raises(IndexStateError, match="not named"):
            indexer.index([docs])


def test_a_live_reader_sees_what_another_wrote(docs: Path, on_server: ChromaIndexer, tiny_encoder: EpicEncoder) -> None:
    assert "new.md" not in {hit.path for hit in on_server.query("new", k=10)}
    (docs / "new.md").write_text("Something new.\n")
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as writer:
        writer.index([docs])
    assert "new.md" in {hit.path for hit in on_server.query("new", k=10)}


def test_what_somebody_deleted_on_the_server_comes_back(
    docs: Path, on_server: ChromaIndexer, chroma: ChromaProcess
) -> None:
    before = rows_on(chroma.url, docs / ".epic-rag")
    with plain_client(chroma.url) as client:
        (name,) = [each.name for each in client.list_collections()]
        client.get_collection(name, embedding_function=None).delete(ids=sorted(before)[:2])
    assert on_server.index([docs]).chunks_embedded == 0
    assert_same(rows_on(chroma.url, docs / ".epic-rag"), before)
    with plain_client(chroma.url) as client:
        client.delete_collection(name)
    assert len(on_server.query("cats", k=10)) == 4
    assert on_server.index([docs]).chunks_embedded == 0
    assert_same(rows_on(chroma.url, docs / ".epic-rag"), before)
