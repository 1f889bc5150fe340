"""`epic-rag index --from-parquet`: an index folder and a server from Parquet files, and options that do not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from epic_rag_ray import PipelineSettings, run_pipeline
from tests.cli.test_schemas import check
from tests.helpers.indexes import FILES, write_tree
from tests.helpers.servers import ChromaProcess


@pytest.fixture
def chroma(tmp_path: Path) -> Iterator[ChromaProcess]:
    with ChromaProcess(tmp_path / "server") as started:
        yield started


def test_the_command_line(
    cli: Any, tmp_path: Path, chroma: ChromaProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_tree(tmp_path / "docs", dict(FILES))
    run_pipeline([folder], tmp_path / "parts", PipelineSettings(model=str(tiny_checkpoint), duplicates="keep"))
    result = cli("index", "--from-parquet", "parts", "--index-dir", "here", "--json")
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert (report["added"], report["chunks_embedded"], report["index_dir"]) == (3, 0, "here")
    result = cli("index", "--from-parquet", "parts", "--index-dir", "here")
    assert "0 documents added, 0 changed, 0 deleted, 3 unchanged; 0 chunks stored of" in result.out
    result = cli("query", "cats sleep", "--index-dir", "here", "--mode", "keyword", "--json")
    assert json.loads(result.out)["hits"][0]["path"] == "notes.txt"
    assert "changed or" not in result.err  # documents that were read elsewhere are not compared with files here
    result = cli("query", "cats sleep", "--index-dir", "here", "--json")
    assert result.status == 0, result.err
    assert f"parquet  {tmp_path / 'parts'}" in cli("status", "--index-dir", "here").out.replace("   ", "  ")
    assert cli("index", "--index-dir", "here").status == 1

    line = ("index", "--from-parquet", "parts", "--chroma", chroma.url, "--collection", "cli", "--shards", "3")
    result = cli(*line, "--json")
    assert result.status == 0, result.err
    counts = json.loads(result.out)
    check("index-collection", counts)
    assert counts == {
        "chroma": chroma.url, "collection": "cli", "rows": report["chunks_total"], "written": report["chunks_total"],
        "changed": 0, "unchanged": 0, "deleted": 0,
    }  # fmt: skip
    assert "0 written, 0 changed," in cli(*line).out
    assert not (tmp_path / ".epic-rag").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--from-parquet", "parts"], "--from-parquet needs --index-dir DIR, or --chroma URL with --collection NAME"),
        (["--from-parquet", "parts", "--collection", "x"], "--collection needs --chroma URL"),
        (["--from-parquet", "parts", "--collection", "x", "--chroma", "http://h:1", "--rebuild"], "nor --rebuild"),
        (["--from-parquet", "parts", "docs"], "--from-parquet takes no paths"),
        (["--from-parquet", "parts", "--model", "m", "--index-dir", "x"], "no options for reading or embedding"),
        (["--collection", "x"], "--collection and --shards belong to --from-parquet"),
    ],
)
def test_options_that_do_not_fit(cli: Any, tmp_path: Path, options: list[str], said: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("index", *options)
    assert result.status == 2
    assert said in " ".join(result.err.split())


def test_missing_parts_make_no_index(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("index", "--from-parquet", "nowhere", "--index-dir", "new")
    assert result.status == 1
    assert "has no vectors of a complete run. Run `epic-rag index --to`" in " ".join(result.err.split())
    assert not Path("new").exists()
