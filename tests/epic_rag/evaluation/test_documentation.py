"""docs/evaluation.md: its code runs, and so do its commands, on small things in the places of the named ones."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from epic_rag_cli.main import run

PAGE = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"^    (epic-rag eval (?:.*\\\n)*.*)$", re.MULTILINE)
COMMANDS = [" ".join(command.replace("\\\n", " ").split("  # ")[0].split()) for command in COMMAND.findall(PAGE)]


def test_the_commands_are_there() -> None:
    assert len(COMMANDS) >= 5
    assert any("--heldout-collection own,pooled,pooled-with-queries" in command for command in COMMANDS)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "path/to/" not in command])
def test_commands_run(
    command: str,
    sets: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    jsonl: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EPIC_RAG_MODEL", raising=False)
    # The page speaks of folders by these names; the sets are those of one kind of each.
    for name in ("Cranfield", "TrecQA"):
        shutil.move(sets / {"Cranfield": "library", "TrecQA": "candidates"}[name], sets / name)
    for name in ("untrained", "all-MiniLM-L6-v2"):
        shutil.copytree(tiny_checkpoint, tmp_path / name)
    for stem in ("foldoc", "nl2bash"):
        rows = [{"query": f"{stem} {number}", "positive": f"what {stem} {number} is"} for number in range(40)]
        jsonl(tmp_path / "pairs" / f"{stem}.jsonl.gz", rows)
    (tmp_path / "pairs" / "instructions.json").write_text('{"foldoc": "Find it", "nl2bash": "Find the command"}')
    # The tiny checkpoint in the place of the shipped one, which would take minutes.
    arguments = [word.replace("epic-minilm", "untrained") for word in shlex.split(command)[1:]]
    if arguments.count("untrained") + arguments.count("untrained:prompted") > 1:
        arguments.remove("untrained")
        arguments.insert(arguments.index("--model", arguments.index("--model") + 1) + 1, "again=untrained")
    if "--model" not in arguments:
        arguments += ["--model", "untrained:prompted"]
    assert run(arguments) == 0
    assert "| ---" in capsys.readouterr().out


def test_the_code_runs(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = [
        block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) if "an-LLM" in block
    ]
    Path("path/to").mkdir(parents=True)
    shutil.copytree(tiny_checkpoint, "path/to/an-LLM")
    exec(code, {})
    assert (tmp_path / "untrained" / "epic.json").is_file()


def test_options_are_explained() -> None:
    for option in ("--heldout-collection", "--heldout-instruction", "--kinds", "--controls", "--draws", "--bank"):
        assert option in PAGE
