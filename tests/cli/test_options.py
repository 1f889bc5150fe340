"""Shell completion: names that are known without loading a library."""

from __future__ import annotations

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
COUNT_IMPORTS = f"""
import atexit, sys
atexit.register(lambda: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr))
sys.argv = ["epic-rag"]
from epic_rag_cli.main import main
main()
"""


def complete(process: Any, words: str) -> tuple[list[str], str]:
    """What bash is offered for the last word, and what the process had imported in the end."""
    typed = words.split(" ")
    env = {"_EPIC_RAG_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(typed) - 1)}
    result = process("-c", COUNT_IMPORTS, command=[sys.executable], env=env)
    assert result.status == 0, result.err
    return result.out.split(), result.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("epic-rag ind", {"index"}),
        ("epic-rag index --dry", {"--dry-run"}),
        ("epic-rag query x --task ", {task.name for task in list_tasks()}),
        ("epic-rag query x --bank d", {name for name in built_in_banks() if name.startswith("d")}),
        ("epic-rag query x --mode k", {"keyword"}),
        ("epic-rag query x --strategy t", {"text", "task-vector"}),
        ("epic-rag index --dtype b", {"bfloat16"}),
        ("epic-rag index --model epic-", {info.name for info in list_checkpoints()}),
        ("epic-rag bank sh", {"show"}),
    ],
)
def test_through_the_entry_point(process: Any, words: str, expected: set[str]) -> None:
    offered, imported = complete(process, words)
    assert set(offered) == expected
    assert imported == "[]\n"


def test_broken_configuration(process: Any) -> None:
    Path("epic-rag.toml").write_text("[")
    assert complete(process, "epic-rag query x --mode d") == (["dense"], "[]\n")


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
