"""An index whose vectors are on a real Chroma server: through the library, the command line and the documentation."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer, ChromaServer
from epic_rag_chroma.errors import ChromaServerError, IndexMismatchError, IndexStateError
from epic_rag_chroma.store.state import IndexState
from tests.helpers.servers import HOST, Answer, ChromaProcess, Front, free_port, plain_client

Rows = dict[str, tuple[str, dict[str, Any], list[float]]]
PAGE = Path(__file__).parents[4] / "docs" / "chroma_server.md"
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


def rows_on(url: str, index_dir: Path, **where: str) -> Rows:
    """All rows of an index on a server, through a client of Chroma's own."""
    state = IndexState.load(index_dir)
    assert state is not None
    assert state.chroma is not None
    with plain_client(url, **where) as client:
        collection = client.get_collection(f"epic_rag_{state.chroma.index_id}", embedding_function=None)
        assert str(collection.id) == state.collection
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
    kept = json.loads((docs / ".epic-rag/index.json").read_text())["chroma"]
    index_id = kept.pop("index_id")
    assert kept == {"url": chroma.url, "tenant": "default_tenant", "database": "default_database"}
    with ChromaIndexer(docs / ".epic-rag") as indexer:
        assert indexer.status().chroma == chroma.url
        assert indexer.status().chunks == 4
        assert len(indexer.query("cats", mode="keyword")) == 1
    assert collections(chroma.url)[f"epic_rag_{index_id}"]["owner"] == "epic-rag"


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


def test_another_place_is_refused_and_a_rebuild_moves_there(
    docs: Path, on_server: ChromaIndexer, chroma: ChromaProcess, tiny_encoder: EpicEncoder, rows: Callable[[Path], Rows]
) -> None:
    index_dir = docs / ".epic-rag"
    before = rows_on(chroma.url, index_dir)
    other = f"http://{HOST}:{free_port()}"
    with ChromaIndexer(index_dir, encoder=tiny_encoder, chroma=other) as elsewhere:
        for call in (lambda: elsewhere.query("cats"), elsewhere.status, elsewhere.clear):
            with pytest.raises(
                IndexMismatchError, match=re.escape(f"has its vectors on {chroma.url}, not on {other}. Omit --chroma")
            ):
                call()
        with pytest.raises(ChromaServerError, match="connection refused"):
            elsewhere.index([docs])
    with ChromaIndexer(index_dir, encoder=tiny_encoder, chroma="folder") as home:
        with pytest.raises(IndexMismatchError, match=r"--rebuild --chroma folder .*docs`"):
            home.index([docs])
        home.index([docs], rebuild=True)
        assert home.status().chroma is None
    assert not any(name.startswith("epic_rag_") for name in collections(chroma.url))
    assert_same(rows(index_dir), before)
    with ChromaIndexer(index_dir, encoder=tiny_encoder, chroma=chroma.url) as there:
        with pytest.raises(IndexMismatchError, match=f"in its folder, not on {chroma.url}"):
            there.query("cats")
        with pytest.raises(IndexMismatchError, match=f"--rebuild --chroma {chroma.url}"):
            there.index([docs])
        there.index([docs], rebuild=True)
        assert len(there.query("cats", k=10)) == 4
    assert not (index_dir / "chroma").exists()
    assert_same(rows_on(chroma.url, index_dir), before)


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
        assert len(moved.query("cats", k=10)) == 4


def test_the_address_of_an_index_that_was_never_made_can_be_corrected(
    docs: Path, chroma: ChromaProcess, tiny_encoder: EpicEncoder
) -> None:
    wrong = f"http://{HOST}:{free_port()}"
    with pytest.raises(ChromaServerError), ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder, chroma=wrong) as one:
        one.index([docs])
    assert not (docs / ".epic-rag").exists()
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder, chroma=chroma.url) as two:
        assert two.index([docs]).added == 3
        two.clear()


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
        indexer.close()
        with pytest.raises(ChromaServerError, match="refuses the credentials") as caught:
            indexer.query("cats")
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
    """Its index.json may name any server; that of a stranger gets neither token nor query."""
    with Front(lambda *_: None, chroma.url) as front:
        content = json.loads((docs / ".epic-rag/index.json").read_text())
        content["chroma"]["url"] = front.url
        (docs / ".epic-rag/index.json").write_text(json.dumps(content))
        monkeypatch.setenv("EPIC_RAG_CHROMA_TOKEN", TOKEN)
        with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
            for call in (lambda: indexer.query("cats"), lambda: indexer.index([docs]), indexer.clear):
                with pytest.raises(IndexStateError, match=f"not named on this machine.* --chroma {front.url}"):
                    call()
            assert front.requests == []
            monkeypatch.setenv("EPIC_RAG_CHROMA", front.url)
            assert len(indexer.query("cats", k=10)) == 4
            # Once named, it is known.
            monkeypatch.delenv("EPIC_RAG_CHROMA")
            assert len(indexer.query("cats", k=10)) == 4
            indexer.clear()


def test_a_server_on_another_machine_must_be_named(docs: Path, on_server: ChromaIndexer, tmp_path: Path) -> None:
    content = json.loads((docs / ".epic-rag/index.json").read_text())
    content["chroma"]["url"] = "http://chroma.invalid:8000"
    (docs / ".epic-rag/index.json").write_text(json.dumps(content))
    with ChromaIndexer(docs / ".epic-rag") as indexer, pytest.raises(IndexStateError, match="not named"):
        indexer.status()
    with ChromaIndexer(docs / ".epic-rag", chroma="http://chroma.invalid:8000") as indexer:
        assert indexer.status().chroma == "http://chroma.invalid:8000"
    with ChromaIndexer(docs / ".epic-rag") as indexer:
        indexer.status()
    known = tmp_path / "state/epic-rag/chroma_servers.json"
    assert json.loads(known.read_text()) == {"servers": ["http://chroma.invalid:8000"]}
    known.write_text("[broken")
    with ChromaIndexer(docs / ".epic-rag") as indexer, pytest.raises(IndexStateError, match="not named"):
        indexer.status()


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
    on_server.close()
    with pytest.raises(IndexStateError, match="Run `epic-rag index` with the indexed folder"):
        on_server.query("cats", mode="dense")
    assert on_server.index([docs]).chunks_embedded == 0
    assert_same(rows_on(chroma.url, docs / ".epic-rag"), before)


def test_a_graph_that_fails_is_made_again(docs: Path, on_server: ChromaIndexer, chroma: ChromaProcess) -> None:
    """As after the death of a server that was writing its graph: it is there again, and cannot read what it wrote."""
    before = rows_on(chroma.url, docs / ".epic-rag")
    broken = json.loads((docs / ".epic-rag/index.json").read_text())["collection"]

    def fail(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if f"{broken}/" in path and path.rpartition("/")[2] in ("upsert", "query", "get"):
            return 500, {}, b'{"error": "InternalError", "message": "Failed to apply logs to the hnsw segment writer"}'
        return None

    with Front(fail, chroma.url) as front, ChromaIndexer(docs / ".epic-rag", encoder=on_server._given) as indexer:
        content = json.loads((docs / ".epic-rag/index.json").read_text())
        content["chroma"]["url"] = front.url
        (docs / ".epic-rag/index.json").write_text(json.dumps(content))
        with pytest.raises(ChromaServerError, match="hnsw segment writer"):
            indexer.query("cats", mode="dense")
        assert indexer.index([docs]).chunks_embedded == 0
        assert_same(rows_on(chroma.url, docs / ".epic-rag"), before)
        # And while rows are written.
        broken = json.loads((docs / ".epic-rag/index.json").read_text())["collection"]
        (docs / "new.md").write_text("# New\n\nSomething new.\n")
        assert indexer.index([docs]).chunks_embedded == 1
        assert len(rows_on(chroma.url, docs / ".epic-rag")) == 5
        assert len(indexer.query("cats", k=10, mode="dense")) == 5
        assert len(collections(chroma.url)) == 1
