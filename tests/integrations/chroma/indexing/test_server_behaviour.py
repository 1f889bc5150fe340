"""Commands with a Chroma server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer
from epic_rag_chroma.errors import ChromaServerError
from epic_rag_cli.main import run
from tests.helpers.servers import ChromaProcess, plain_client


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path_factory.mktemp("server")) as started:
        yield started


def collections(url: str, **where: str) -> dict[str, dict[str, Any]]:
    """All collections of a database: their names and metadata."""
    with plain_client(url, **where) as client:
        return {each.name: dict(each.metadata or {}) for each in client.list_collections()}


def test_commands(
    docs: Path,
    chroma: ChromaProcess,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def process(*arguments: object) -> Any:
        command = [sys.executable, "-m", "epic_rag_cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def failed(*arguments: str) -> str:
        assert run(arguments) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    monkeypatch.chdir(docs)
    assert run(["index", ".", "--chroma", chroma.url, "--model", str(tiny_checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["added"] == 3
    assert len(process("query", "cats", "--json", "-k", "2")["hits"]) == 2
    assert run(["status", "--json", "--chroma", chroma.url]) == 0
    assert json.loads(capsys.readouterr().out)["chroma"] == chroma.url
    assert run(["status"]) == 0
    assert chroma.url in capsys.readouterr().out
    assert failed("query", "cats", "--chroma", "localhost:8000") == (
        "error: 'localhost:8000' is not the address of a Chroma server. Use the form http://localhost:8000 or "
        "https://host:port.\n"
    )
    assert run(["clear", "--yes"]) == 0
    assert collections(chroma.url) == {}
    assert not (docs / ".epic-rag").exists()


def test_stopped_server(
    docs: Path, tmp_path: Path, tiny_encoder: EpicEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        ChromaProcess(tmp_path / "mortal") as mortal,
        ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder, chroma=mortal.url) as indexer,
    ):
        indexer.index([docs])
        mortal.kill()
        assert run(["clear", "--yes", "--index-dir", str(docs / ".epic-rag")]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"No Chroma server answers at {mortal.url}" in error
        assert f"delete the folder {docs / '.epic-rag'}" in error
        assert run(["status", "--index-dir", str(docs / ".epic-rag")]) == 0
        assert len(indexer.query("cats", k=10)) == 4
        assert indexer.index([docs]).unchanged == 3
        (docs / "new.md").write_text("Something new.\n")
        complete = "The index itself is complete and searchable; the next run updates the server."
        with pytest.raises(ChromaServerError, match=f"chroma run --path FOLDER --port {mortal.port}`.*{complete}$"):
            indexer.index([docs])
        assert len(indexer.query("cats", k=10)) == 5
        mortal.start()
        assert indexer.index([docs]).unchanged == 4
        with plain_client(mortal.url) as client:
            assert client.get_collection(next(iter(collections(mortal.url))), embedding_function=None).count() == 5
