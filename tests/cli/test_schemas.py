"""JSON output of the commands matches the JSON Schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from epic_rag_chroma import ChromaIndexer
from tests.helpers.cli_pages import SCHEMAS, load_schema, schema_tables

INDEX = ("--index-dir", "docs/.epic-rag")


def check(name: str, value: Any) -> None:
    validator = Draft202012Validator(load_schema(name), format_checker=Draft202012Validator.FORMAT_CHECKER)
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)] == []


def nested(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    parts = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values(), schema.get("items", {})]
    for part in parts:
        yield from nested(part) if part else ()


def test_schemas_are_valid_and_documented() -> None:
    there = {file.name for file in (files("epic_rag_cli") / "schemas").iterdir()}
    assert there == {f"{name}.schema.json" for name in SCHEMAS}
    for name in SCHEMAS:
        schema = load_schema(name)
        Draft202012Validator.check_schema(schema)
        assert schema["title"].startswith("epic-rag ")
        for part in nested(schema):
            # A key without a meaning would be an empty cell in the documentation.
            assert all(each.get("description") for each in part.get("properties", {}).values()), name


def test_hits_are_equal() -> None:
    hits = [load_schema(name)["$defs"]["hit"] for name in ("query", "query-lines", "query-batch")]
    assert hits[0] == hits[1] == hits[2]


def test_schemas_reject(cli: Any) -> None:
    good = json.loads(cli("bank", "show", "docs", "--json").out)
    for change in ({"num_demonstrations": "8"}, {"demonstrations": [{"query": "q"}]}, {"encoder_fingerprints": None}):
        with pytest.raises(AssertionError):
            check("bank-show", {**good, **change})
    for key in load_schema("bank-show")["required"]:
        with pytest.raises(AssertionError, match=key):
            check("bank-show", {name: value for name, value in good.items() if name != key})
    check("bank-show", {**good, "new": 1})


def test_tables() -> None:
    tables = schema_tables()
    assert tables.count("| `hits[].rank` |") == 1
    for name in SCHEMAS:
        assert f"### `{load_schema(name)['title']}`" in tables
    assert "`settings.follow_links`" in tables
    assert "`skipped[].reason`" in tables


def test_commands(cli: Any, docs: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPIC_RAG_MODEL", str(tiny_checkpoint))
    monkeypatch.setenv("EPIC_RAG_INDEX", "docs/.epic-rag")
    (docs / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    for name, line in (
        ("index-dry-run", ["index", "docs", "--dry-run", "--json"]),
        ("index", ["index", "docs", "--json"]),
        ("status", ["status", "--json"]),
        ("query", ["query", "cats", "--mode", "keyword", "--json"]),
        ("models", ["models", "--json"]),
        ("bank-list", ["bank", "list", "--json"]),
        ("bank-show", ["bank", "show", "docs", "--json"]),
        ("config", ["config", "--json"]),
        ("config", ["config", "--all", "--json"]),
    ):
        result = cli(*line)
        assert result.status == 0, result.err
        value = json.loads(result.out)
        check(name, value)
        assert not (name == "query" and not value["hits"])
    (docs / "undo.md").rename(docs / "renamed.md")
    plan = json.loads(cli("index", "--dry-run", "--json").out)
    check("index-dry-run", plan)
    assert plan["renamed"] == [{"from": "undo.md", "to": "renamed.md"}]


def test_queries(cli: Any, indexed: Path) -> None:
    Path("batch.jsonl").write_text('{"query": "cats", "id": 1.5}\n{"query": "commit", "id": "b"}\n{"query": "x"}\n')
    (indexed / "copy.txt").write_text((indexed / "notes.txt").read_text())
    assert cli("index", "docs").status == 0
    for options in ([], ["--mode", "keyword"], ["--mode", "dense", "--all"], ["--bank", "docs", "-n", "1"]):
        check("query", json.loads(cli("query", "cats sleep", *INDEX, "--json", *options).out))
        for line in cli("query", "cats sleep", *INDEX, "--jsonl", *options).out.splitlines():
            check("query-lines", json.loads(line))
        batch = ("query", "--batch", "batch.jsonl", *INDEX, *options)
        check("query-batch", json.loads(cli(*batch, "--json").out))
        for line in cli(*batch, "--jsonl").out.splitlines():
            check("query-lines", json.loads(line))


def test_rounds_of_a_watch(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ChromaIndexer.index
    calls: list[int] = []

    def twice(self: ChromaIndexer, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        (indexed / "new.md").write_text("# New\n\nSomething new.\n")
        return index(self, *arguments, **options)

    monkeypatch.setattr(ChromaIndexer, "index", twice)
    lines = cli("index", "docs", "--watch", "--json").out.splitlines()
    assert len(lines) == 1
    check("index-watch", json.loads(lines[0]))
    check("index-watch", {"round": 2, "time": "2026-01-01T00:00:00+00:00", "error": "no"})
    with pytest.raises(AssertionError):
        check("index-watch", {"round": 2, "time": "2026-01-01T00:00:00+00:00"})
