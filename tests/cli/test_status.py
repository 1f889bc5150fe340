"""`epic-rag status` and `epic-rag clear`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from epic_rag_chroma.store.database import IndexDatabase


def test_status(cli: Any, indexed: Path) -> None:
    state = json.loads(cli("status", "--index-dir", "docs/.epic-rag", "--json").out)
    assert (state["files"], state["dimension"]) == (4, 32)
    assert state["chunks"] >= 4
    assert state["settings"]["chunk_tokens"] == 200
    lines = cli("status", "--index-dir", "docs/.epic-rag").out.splitlines()
    table = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert table["files"] == "4"
    assert table["model"].endswith(f"({state['fingerprint']}, 32 dimensions)")
    assert table["chunks"] == f"{state['chunks']} of at most 200 tokens"


def test_clear_deletes_the_index_and_nothing_else(cli: Any, indexed: Path) -> None:
    before = sorted(path for path in indexed.rglob("*") if ".epic-rag" not in path.parts)
    result = cli("clear", "--index-dir", "docs/.epic-rag", "--yes")
    assert (result.status, result.out, result.err) == (0, "", "note: Deleted docs/.epic-rag.\n")
    assert sorted(indexed.rglob("*")) == before


def test_clear_asks_on_a_terminal(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []

    def confirm(question: str, **options: Any) -> bool:
        asked.append(question)
        assert options == {"abort": True, "err": True}
        return True

    monkeypatch.setattr("typer.confirm", confirm)
    assert cli("clear", "--index-dir", "docs/.epic-rag").status == 0
    assert re.fullmatch(r"Delete docs/\.epic-rag \(\d+ chunks of 4 files\)\?", asked[0])
    assert not (indexed / ".epic-rag").exists()


def test_kinds_and_last_run(cli: Any, indexed: Path) -> None:
    lines = cli("status", "--index-dir", "docs/.epic-rag").out.splitlines()
    table = {line[:8].strip(): line[10:] for line in lines}
    assert table["kinds"] == "3 markdown, 1 text"
    assert table["last run"].startswith("4 added; ")
    assert "state" not in table
    state = json.loads(cli("status", "--index-dir", "docs/.epic-rag", "--json").out)
    assert state["kinds"] == {"markdown": 3, "text": 1}
    assert state["last_run"]["added"] == 4
    assert state["state"] == "complete"
    database = IndexDatabase.open(indexed / ".epic-rag/index.sqlite")
    with database.transaction():
        pass  # as a run that ends here
    database.close()
    assert (
        cli("status", "--index-dir", "docs/.epic-rag")
        .out.splitlines()[-1]
        .startswith("state     the last run was interrupted; ")
    )
