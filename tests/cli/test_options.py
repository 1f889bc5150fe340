"""Options of several commands: index folders, and shell completion with names known without loading a library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from epic_rag import list_checkpoints
from epic_rag.demonstrations import built_in_banks
from epic_rag.query_prompt import QUERY_STRATEGIES
from epic_rag.tasks import list_tasks
from epic_rag_chroma import SEARCH_MODES
from epic_rag_cli.options import (
    complete_banks,
    complete_models,
    complete_modes,
    complete_strategies,
    complete_tasks,
)

HEAVY = ("chromadb", "llama_index", "torch", "transformers")
# Completes each line of words as a shell does, in one process: an import by any of them is seen at the end.
COMPLETE = f"""
import json, os, sys
from epic_rag_cli.main import main
os.environ["_EPIC_RAG_COMPLETE"] = "complete_bash"
for words in json.load(sys.stdin):
    sys.argv = ["epic-rag"]
    os.environ.update(COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1))
    try:
        main()
    except SystemExit as error:
        assert not error.code, error.code
    print("--")
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def test_through_the_entry_point() -> None:
    Path("epic-rag.toml").write_text("[")  # completion does not read it
    expected = {
        "epic-rag ind": {"index"},
        "epic-rag index --dry": {"--dry-run"},
        "epic-rag query x --task ": {task.name for task in list_tasks()},
        "epic-rag query x --bank d": {name for name in built_in_banks() if name.startswith("d")},
        "epic-rag query x --mode d": {"dense"},
        "epic-rag query x --strategy t": {"text", "task-vector"},
        "epic-rag index --dtype b": {"bfloat16"},
        "epic-rag index --model epic-": {info.name for info in list_checkpoints()},
        "epic-rag bank sh": {"show"},
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPLETE],
        input=json.dumps(list(expected)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    *offered, rest = done.stdout.split("--\n")
    assert [set(names.split()) for names in offered] == list(expected.values())
    assert rest == ""


def test_names_and_folders(tiny_checkpoint: Path) -> None:
    Path("models/mine").mkdir(parents=True)
    Path("models/mine/config.json").write_text("{}")
    Path("models/file").write_text("")
    Path("models/.hidden").mkdir()
    Path("banks/mine").mkdir(parents=True)
    Path("banks/mine/bank.json").write_text("{}")
    assert complete_models("mod") == ["models/"]
    assert complete_models("models/") == ["models/mine"]
    assert complete_models("./models/m") == ["./models/mine"]
    assert complete_models("models/.") == ["models/.hidden/"]
    assert complete_models("nowhere/") == []
    assert complete_models("/") != []
    assert complete_models("") == [*(info.name for info in list_checkpoints()), "banks/", "models/"]
    assert complete_banks("ba") == [*(name for name in built_in_banks() if name.startswith("ba")), "banks/"]
    assert complete_banks("banks/") == ["banks/mine"]
    assert complete_tasks("zzz") == []
    assert complete_modes("") == list(SEARCH_MODES)
    assert complete_strategies("") == list(QUERY_STRATEGIES)


def test_index_dir_may_be_the_indexed_folder(cli: Any, indexed: Path, tiny_checkpoint: Path) -> None:
    """Every command that takes --index-dir finds the index in a folder that was given instead."""
    given = ("--index-dir", "docs")
    answer = json.loads(cli("query", "cats", *given, "--mode", "keyword", "--json").out)
    assert (answer["index_dir"], len(answer["hits"])) == ("docs/.epic-rag", 1)
    assert json.loads(cli("status", *given, "--json").out)["index_dir"] == str(indexed / ".epic-rag")
    assert json.loads(cli("index", *given, "--json").out)["unchanged"] == 4
    assert json.loads(cli("index", "docs", *given, "--dry-run", "--json").out)["unchanged"] == 4
    assert cli("clear", *given, "--yes").err == "note: Deleted docs/.epic-rag.\n"
    assert indexed.is_dir()
    # Without an index in it, the folder itself is meant.
    for command in (["query", "x"], ["status"], ["clear", "--yes"]):
        result = cli(*command, *given)
        assert (result.status, result.err) == (
            1, f"error: No index in {indexed}. Run `epic-rag index PATH` to create one.\n",
        )  # fmt: skip
    assert cli("index", "docs", "--index-dir", "new", "--model", tiny_checkpoint).status == 0
    assert Path("new").is_dir()


def test_the_nearest_index_above_is_used(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(indexed / "drafts")
    for command in (["query", "cats", "--mode", "keyword"], ["index"]):
        assert json.loads(cli(*command, "--json").out)["index_dir"] == str(indexed / ".epic-rag")
    assert json.loads(cli("status", "--json").out)["index_dir"] == str(indexed / ".epic-rag")
    assert cli("clear", "--yes").status == 0
    assert not (indexed / ".epic-rag").exists()
