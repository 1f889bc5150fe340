"""Permissions: files get the user's umask, and an error about a permission names the file, its mode and its owner."""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.users import NOBODY, as_another_user, make_readable, require_reachable_packages

PAIRS = [{"query": f"term {number}", "positive": f"definition of the term {number}"} for number in range(24)]
# Private by purpose: the queries that somebody typed.
PRIVATE = {"query_history", "last_query.json", "epic-rag"}
# Chroma's SQLite never lets a group write.
OTHERS = {"chroma.sqlite3"}


@pytest.fixture(params=[0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_file_has_the_permissions_of_the_umask(
    cli: Any, umask: int, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a command writes, by whatever library, is as readable as a file that an editor writes."""
    monkeypatch.setenv("EPIC_RAG_MODEL", str(tiny_checkpoint))
    for folder in ("docs", "data"):
        Path(folder).mkdir()
    Path("docs/a.md").write_text("# Title\n\nSome text.\n")
    Path("data/terms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    Path("queries.jsonl").write_text('{"query": "title"}\n')
    train = ["train", "own-data", "--set", "data=data", "--set", "tasks=[terms]", "--set", "steps=2"]
    train += ["--set", "batch_size=4", "--set", "save_every=1"]
    commands = [
        ["index", "docs"],
        ["index", "docs", "--exclude", "nothing"],
        ["index", "docs", "--rebuild"],
        ["query", "--batch", "queries.jsonl", "--index-dir", "docs/.epic-rag"],
        ["bank", "build", "data/terms.jsonl", "--out", "bank", "--instruction", "Find it"],
        ["query", "title", "--index-dir", "docs/.epic-rag", "--bank", "bank"],
        ["models", "export", str(tiny_checkpoint), "exported"],
        ["models", "export", str(tiny_checkpoint), "small", "--dtype", "int8"],
        ["mine", "data/terms.jsonl", "--out", "mined/terms.jsonl.gz", "--no-margin"],
        ["eval", "--heldout", "data/terms.jsonl", "-n", "0,2", "--output", "scores/all.json", "--cache-dir", "cache"],
        [*train, "-o", "run"],
    ]
    if importlib.util.find_spec("peft") is not None:
        commands.append([*train, "-o", "lora", "--set", "lora_rank=2"])
    for command in commands:
        result = cli(*command)
        assert result.status == 0, (command, result.err)
    made = [path for folder in (Path.cwd(), Path.cwd().parent / "state") for path in folder.rglob("*")]
    made = [path for path in made if path.name not in PRIVATE | OTHERS]
    wrong = {
        os.path.relpath(path): oct(mode)
        for path in made
        if (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert len(made) > 60
    assert {path.suffix for path in made} >= {".safetensors", ".sqlite", ".json", ".jsonl", ".gz", ".npy", ".md"}
    assert wrong == {}


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="other systems have no owners and modes")
@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("bank/bank.json", ["query", "x", "--index-dir", "docs", "--bank", "bank", "--model", "model"]),
        ("bank/bank.json", ["bank", "show", "bank"]),
        ("model/epic.json", ["query", "x", "--index-dir", "docs", "--model", "model"]),
        ("model/config.json", ["query", "x", "--index-dir", "docs", "--model", "model"]),
        ("model/tokenizer.json", ["query", "x", "--index-dir", "docs", "--model", "model"]),
        ("model/model.safetensors", ["query", "x", "--index-dir", "docs", "--model", "model"]),
        ("pairs.jsonl", ["bank", "build", "pairs.jsonl", "--out", "b", "--instruction", "x", "--model", "model"]),
        ("pairs.jsonl", ["eval", "--heldout", "pairs.jsonl", "--model", "model"]),
        ("pairs.jsonl", ["query", "--batch", "pairs.jsonl", "--index-dir", "docs"]),
        ("docs/.epic-rag/index.sqlite", ["query", "cats", "--mode", "keyword", "--index-dir", "docs"]),
        ("docs/.epic-rag/index.sqlite", ["query", "cats", "--index-dir", "docs", "--model", "model"]),
        ("docs/.epic-rag/index.sqlite", ["status", "--index-dir", "docs"]),
        ("docs/.epic-rag/index.sqlite", ["index", "docs", "--dry-run"]),
        ("epic-rag.toml", ["status", "--index-dir", "docs"]),
    ],
)  # fmt: skip
def test_a_missing_permission_is_named(
    cli: Any, indexed: Path, pairs: Path, tiny_checkpoint: Path, file: str, command: list[str]
) -> None:
    """The message has the file, its mode, its owner and the user; it never advises to make the data again."""
    require_reachable_packages()
    shutil.copytree(tiny_checkpoint, "model")
    Path("epic-rag.toml").write_text("")
    assert cli("bank", "build", pairs, "--out", "bank", "--instruction", "Find it", "--model", "model").status == 0
    make_readable(Path.cwd())
    Path(file).chmod(0o600)
    with as_another_user():
        result = cli(*command)
    assert (result.status, result.out) == (1, "")
    if os.geteuid() == 0:
        owner, user = (pwd.getpwuid(number).pw_name for number in (0, NOBODY))
        place = Path(file).absolute()
        assert f"{file}: Permission denied ({place} has mode 600 and belongs to {owner}, you are {user})" in result.err
    assert not re.search("rebuild|build|Copy|Correct|valid", result.err)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize(
    ("folder", "mode", "place"),
    [
        ("docs/.epic-rag", 0o755, "docs/.epic-rag"),  # that another user may read
        ("docs", 0o755, "docs"),  # without an index
    ],
)
def test_an_index_that_may_not_be_written(
    cli: Any, indexed: Path, tiny_checkpoint: Path, folder: str, mode: int, place: str
) -> None:
    shutil.copytree(tiny_checkpoint, "model")
    if folder == "docs":
        shutil.rmtree("docs/.epic-rag")
    make_readable(Path.cwd())
    Path(folder).chmod(mode)
    (indexed / "new.md").write_text("# New\n")
    with as_another_user():
        result = cli("index", "docs", "--model", "model")
    assert (result.status, result.out) == (1, "")
    assert "Permission denied (" in result.err
    assert f"{Path(place).absolute()}" in result.err
    assert re.search(r" has mode \d+ and belongs to root, you are nobody\)", result.err)
    assert "rebuild" not in result.err
