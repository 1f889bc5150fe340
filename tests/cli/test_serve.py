"""`epic-rag serve` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from epic_rag import DemonstrationBank
from tests.conftest import make_encoder


@contextmanager
def served(*options: object, env: dict[str, str] | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the command on a free port; yield its address and the process."""
    command: Sequence[str] = [sys.executable, "-m", "epic_rag_cli", "serve", "--port", "0", *map(str, options)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.fullmatch(r"note: (.+) is served at (http://\S+?)( and searches .+)?\. Ctrl-C ends it\.\n", line)
        assert found, line + process.stderr.read()
        yield found[2], process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_an_index_is_served_until_it_is_stopped(indexed: Path, tmp_path: Path) -> None:
    with served("--index-dir", indexed, env={"XDG_DATA_HOME": str(tmp_path / "data")}) as (url, process):
        with httpx.Client(base_url=url, timeout=60) as client:
            hits = client.post("/v1/search", json={"query": "undo the last commit", "top_k": 1}).json()
            assert hits["index"] == "docs"
            assert hits["data"][0]["path"]
            assert client.post("/v1/banks", json={"name": "mine"}).status_code == 201
        assert (tmp_path / "data/epic-rag/banks/mine/bank.json").is_file()
        assert (indexed / ".epic-rag/server.json").exists()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert process.communicate() == ("", "")
    assert not (indexed / ".epic-rag/server.json").exists()


def test_the_key_is_read_from_a_variable(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_checkpoint, "--host", "0.0.0.0", "--api-key-env", "SERVER_KEY", "--bank-dir", tmp_path)
    with served(*options, env={"SERVER_KEY": "k3y"}) as (url, process):
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.post(f"{url}/v1/embeddings", json={"input": "a"}).status_code == 401
        answer = httpx.post(f"{url}/v1/embeddings", json={"input": "a"}, headers={"Authorization": "Bearer k3y"})
        assert answer.status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_two_indexes_have_names(indexed: Path, tmp_path: Path, cli: Any, tiny_checkpoint: Path) -> None:
    (tmp_path / "b" / "docs").mkdir(parents=True)
    (tmp_path / "b" / "docs" / "other.md").write_text("Lighthouses.\n")
    assert cli("index", tmp_path / "b" / "docs", "--model", tiny_checkpoint).status == 0
    with served("--index-dir", indexed, "--index-dir", tmp_path / "b" / "docs") as (url, _):
        assert [index["id"] for index in httpx.get(f"{url}/v1/indexes").json()["data"]] == ["docs", "docs~2"]
        body = {"query": "lighthouses", "mode": "keyword", "index": "docs~2"}
        assert httpx.post(f"{url}/v1/search", json=body).json()["data"][0]["path"] == "other.md"


QUERIES: list[list[str]] = [
    [],
    ["--mode", "dense", "-k", "2", "--all"],
    ["--mode", "keyword"],
    ["--path", "*.md", "--where", "kind=markdown", "--since", "2020-01-01"],
    ["--bank", "docs", "-n", "3"],
    ["--bank", "mine", "--jsonl"],
    ["--task", "qa", "--strategy", "reader"],
]


@pytest.mark.parametrize("causal", [True, False])
def test_a_running_server_answers_queries(
    causal: bool, docs: Path, tmp_path: Path, cli: Any, one_process: Any, other_checkpoint: Path
) -> None:
    """With a model that needs torch, and with one that numpy runs."""
    checkpoint, index = tmp_path / "checkpoint", docs / ".epic-rag"
    encoder = make_encoder(causal=causal)
    encoder.config.strategy = "reader"
    encoder.save_pretrained(checkpoint)
    DemonstrationBank([("take it back", "Reset softly.")], task="docs").save("mine")
    assert cli("index", docs, "--model", checkpoint, "--chroma", "none").status == 0
    lines = [
        ["query", "undo", "it", "--index-dir", str(docs), "--json", *options]
        for options in QUERIES[:: 2 if causal else 1]
    ]
    lines = [[word for word in line if word != "--json" or "--jsonl" not in line] for line in lines]
    alone = one_process(*lines)
    assert all(result.status == 0 and result.out for result in alone)
    with served("--index-dir", docs) as (url, server):
        checkpoint.rename(tmp_path / "moved")  # nobody else can load it now
        answered = one_process(*lines)
        assert [result.out for result in answered] == [result.out for result in alone]
        assert [result.err for result in answered] == [result.err for result in alone]
        refused = cli(*lines[0], "--no-server")
        other = cli(*lines[0], "--dtype", "float32")
        text = cli("query", "undo", "--index-dir", docs)
        assert (refused.status, refused.out) == (1, "")
        assert (other.status, other.out) == (1, "")  # not the server's number format
        assert "undo.md:" in text.out
        assert httpx.post(f"{url}/local/query", json={}).status_code == 403
        assert cli("index", docs, "--rebuild", "--model", other_checkpoint, "--chroma", "none").status == 0
        rebuilt = cli(*lines[0])  # the server has another model
        assert (rebuilt.status, rebuilt.out) == (0, cli(*lines[0], "--no-server").out)
        server.kill()
        server.wait()
    assert (index / "server.json").exists()
    assert cli(*lines[0]).out == rebuilt.out
    assert not (index / "server.json").exists()
    assert cli("clear", "--index-dir", docs, "--yes").status == 0
    assert not index.exists()


def test_errors_have_a_remedy(cli: Any, indexed: Path, other_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--api-key-env" in cli("serve", "--host", "0.0.0.0", "--model", other_checkpoint).err
    assert "NOT_SET is not set" in cli("serve", "--api-key-env", "NOT_SET").err
    assert cli("serve", "--role-prefixes", "query: ").status == 2
    mismatch = cli("serve", "--index-dir", indexed, "--model", other_checkpoint)
    assert (mismatch.status, "was built with" in mismatch.err) == (1, True)
    missing = cli("serve", "--index-dir", indexed / "nowhere")
    assert (missing.status, "No index" in missing.err) == (1, True)


def test_a_used_port(cli: Any, tiny_checkpoint: Path) -> None:
    with served("--model", tiny_checkpoint) as (url, _):
        port = url.rpartition(":")[2]
        refused = cli("serve", "--model", tiny_checkpoint, "--port", port)
    assert (refused.status, refused.out) == (1, "")
    assert re.fullmatch(rf"error: Port {port} of 127\.0\.0\.1 cannot be used .*--port\.\n", refused.err)


def test_the_extra_is_named_when_it_is_missing(process: Any, tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError(name=__name__)\n")
    result = process(
        "serve", "--model", tiny_checkpoint, env={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    )
    assert (result.status, result.out) == (1, "")
    assert result.err == (
        "error: The server needs starlette, which is not installed. Run `pip install 'epic-rag[serve]'`.\n"
    )
