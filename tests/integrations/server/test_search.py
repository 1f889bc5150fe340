from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer
from tests.conftest import make_encoder
from tests.integrations.server.conftest import SECRET, Running, index_files, serving

QUERY = "undo the last commit"


@pytest.mark.parametrize(
    ("body", "settings"),
    [
        ({}, {"task": "docs"}),
        ({"top_k": 1}, {"task": "docs", "k": 1}),
        ({"mode": "dense"}, {"task": "docs", "mode": "dense"}),
        ({"mode": "keyword"}, {"mode": "keyword"}),
        ({"bank": "docs", "num_demonstrations": 2}, {"bank": "docs", "num_demonstrations": 2}),
        ({"task": "code"}, {"task": "code"}),
    ],
)
def test_hits_are_those_of_the_indexer(
    running: Running, reference: EpicEncoder, body: dict[str, Any], settings: dict[str, Any]
) -> None:
    answer = running.post("/v1/search", {"query": QUERY, **body}).json()
    with ChromaIndexer(running.docs / ".epic-rag", encoder=reference) as indexer:
        expected = indexer.query(QUERY, **{"k": 10, **settings})
    assert [hit["id"] for hit in answer["data"]] == [hit.id for hit in expected]
    for found, hit in zip(answer["data"], expected, strict=True):
        assert (found["path"], found["first_line"], found["text"]) == (hit.path, hit.first_line, hit.text)
        assert found["score"] == pytest.approx(hit.score, abs=1e-5)
        assert "root" not in found
    assert answer["index"] == "docs"


def test_filters(running: Running) -> None:
    def paths(**body: Any) -> set[str]:
        return {hit["path"] for hit in running.post("/v1/search", {"query": QUERY, **body}).json()["data"]}

    assert paths(path="guide/**") == {"guide/install.md"}
    assert paths(path=["*.md", "!guide/"]) == {"undo.md"}
    assert paths(where="kind=text") == {"notes.txt"}
    assert paths(since="7d") == {"undo.md", "guide/install.md", "notes.txt"}
    assert paths(since="2999-01-01") == set()


@pytest.mark.parametrize(
    "body",
    [
        {"query": ""},
        {"query": " \n"},
        {"query": QUERY, "top_k": 0},
        {"query": QUERY, "top_k": True},
        {"query": QUERY, "top_k": 10**30},
        {"query": QUERY, "mode": "both"},
        {"query": QUERY, "where": "nonsense"},
        {"query": QUERY, "where": "page>=x"},
        {"query": QUERY, "where": ["color=red"]},
        {"query": QUERY, "since": "yesterday"},
        {"query": QUERY, "path": [""]},
        {"query": QUERY, "k": 3},
    ],
)
def test_wrong_searches_are_refused(running: Running, body: dict[str, Any]) -> None:
    response = running.post("/v1/search", body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_unknown_names(running: Running) -> None:
    for body in ({"index": "other"}, {"bank": "other"}):
        assert running.post("/v1/search", {"query": QUERY, **body}).status_code == 404


def test_documents_are_read_by_lines(running: Running) -> None:
    text = (running.docs / "guide/install.md").read_text().split("\n")
    whole = running.client.get("/v1/documents/guide/install.md").json()
    assert (whole["lines"], whole["total_lines"]) == (text, len(text))
    part = running.client.get("/v1/documents/guide/install.md", params={"lines": "3-5", "index": "docs"}).json()
    assert (part["first_line"], part["last_line"], part["lines"]) == (3, 5, text[2:5])
    beyond = running.client.get("/v1/documents/guide/install.md?lines=100-200").json()
    assert beyond["lines"] == []
    for lines in ("a", "5-", "-5", "1-2-3", "1" * 20):
        assert running.client.get(f"/v1/documents/notes.txt?lines={lines}").status_code == 400
    assert running.client.get("/v1/documents/notes.txt?line=3").status_code == 400


@pytest.mark.parametrize(
    "path",
    [".env", ".gitignore", "..%2F..%2Fetc%2Fpasswd", "/etc/passwd", "%2Fetc%2Fpasswd", "guide", "", ".epic-rag/index.sqlite",
     "guide/../.env", "guide/%2e%2e/.env", "notes.txt%00", "notes.txt/", "%2e/notes.txt", "NOTES.TXT", "a" * 5000],
)  # fmt: skip
def test_only_indexed_files_are_read(running: Running, path: str) -> None:
    response = running.client.get(f"/v1/documents/{path}")
    assert response.status_code == 404
    assert SECRET not in response.text


def test_a_file_that_became_a_link_is_not_read(tmp_path: Path) -> None:
    encoder = make_encoder()
    index = index_files(tmp_path / "docs", encoder)
    outside = tmp_path / "outside"
    shutil.copytree(tmp_path / "docs" / "guide", outside)
    (outside / "install.md").write_text(SECRET)
    shutil.rmtree(tmp_path / "docs" / "guide")
    os.symlink(outside, tmp_path / "docs" / "guide")
    (tmp_path / "docs" / "notes.txt").unlink()
    os.symlink(tmp_path / "docs" / ".env", tmp_path / "docs" / "notes.txt")
    (tmp_path / "docs" / "undo.md").unlink()
    with serving(encoder, tmp_path, indexes={"docs": index}) as server:
        for path in ("guide/install.md", "notes.txt", "undo.md"):
            response = server.client.get(f"/v1/documents/{path}")
            assert response.status_code == 404
            assert SECRET not in response.text
            assert str(tmp_path) not in response.text


def test_indexes_are_listed(running: Running) -> None:
    (listed,) = running.client.get("/v1/indexes").json()["data"]
    assert (listed["id"], listed["files"], listed["state"]) == ("docs", 3, "complete")
    assert str(running.docs) not in str(listed)


def test_a_run_of_the_indexer_is_seen_at_once(tmp_path: Path) -> None:
    encoder = make_encoder()
    index = index_files(tmp_path / "docs", encoder)
    with serving(encoder, tmp_path, indexes={"docs": index}) as server:
        ask = {"query": "lighthouse", "mode": "keyword"}
        assert server.post("/v1/search", ask).json()["data"] == []
        (tmp_path / "docs" / "new.md").write_text("The lighthouse was built later.\n")
        with ChromaIndexer(index, encoder=make_encoder()) as indexer:
            indexer.index([])
        assert [hit["path"] for hit in server.post("/v1/search", ask).json()["data"]] == ["new.md"]
        with ChromaIndexer(index, encoder=make_encoder(seed=1)) as indexer:
            indexer.index([], rebuild=True)
        refused = server.post("/v1/search", {"query": "lighthouse"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "index_mismatch")
        assert server.post("/v1/search", ask).status_code == 200


def test_a_server_without_an_index(tmp_path: Path) -> None:
    with serving(make_encoder(), tmp_path) as server:
        assert server.post("/v1/search", {"query": QUERY}).status_code == 404
        assert server.client.get("/v1/indexes").json()["data"] == []
