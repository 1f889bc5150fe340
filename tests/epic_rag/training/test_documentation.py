"""docs/training.md: its files, commands and code run in order, and it explains every setting."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from epic_rag import checkpoints
from epic_rag.training import TaskConfig, TrainingConfig

PAGE = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| .+ \|$", re.MULTILINE)


def test_everything_on_the_page_runs(
    cli: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # The tiny checkpoint in the place of the shipped one, which would take minutes.
    shutil.copytree(tiny_checkpoint, tmp_path / "shipped" / checkpoints.DEFAULT_CHECKPOINT)
    monkeypatch.setattr(checkpoints, "_SHIPPED", tmp_path / "shipped")
    Path("manual").mkdir()
    Path("manual/display.md").write_text("# Display\n\nIf nothing is displayed, hold the power button.\n")
    ran = {"files": 0, "commands": 0, "code": 0}
    printed = ""
    for block in FENCE.finditer(PAGE):
        language, text = block.groups()
        if language == "console":
            for line in text.splitlines():
                program, *arguments = shlex.split(line.removeprefix("$ "))
                assert program == "epic-rag"
                result = cli(*arguments)
                assert result.status == 0, f"{line}\n{result.err}"
                assert result.out
                ran["commands"] += 1
        elif language == "python":
            exec(text, {})
            # The next command would throw away what was printed here.
            printed += capsys.readouterr().out
            ran["code"] += 1
        else:
            file = Path(re.findall(r"as `([^`]+)`:", PAGE[: block.start()])[-1])
            assert not file.exists()
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
            ran["files"] += 1
    assert ran == {"files": 4, "commands": 7, "code": 3}
    assert "runs/mine-3/final {'step': 5" in printed
    assert "MiningReport(rows=4, documents=4, " in printed
    assert sorted(path.name for path in Path("runs").iterdir()) == ["faq", "mine", "mine-2", "mine-3"]
    assert Path("runs/faq/merged/epic.json").is_file()


@pytest.mark.parametrize("config", [TrainingConfig, TaskConfig])
def test_every_setting_is_explained_with_its_default(config: type) -> None:
    rows = dict(ROW.findall(PAGE))
    for item in dataclasses.fields(config):
        assert item.name in rows, f"docs/training.md does not explain {item.name}"
        told = rows[item.name]
        if item.default is dataclasses.MISSING:
            assert told == "required"
        elif item.default == "":
            assert told == "empty"
        elif item.name == "generic_instructions":
            assert told == "see `config.py`"
        else:
            wanted = list(item.default) if isinstance(item.default, tuple) else item.default
            assert yaml.safe_load(told.strip("`")) == wanted, item.name
    known = {item.name for each in (TrainingConfig, TaskConfig) for item in dataclasses.fields(each)}
    row_keys = {"query", "positive", "negatives", "group", "source"}
    explained = set(rows) - row_keys
    assert explained <= known, f"docs/training.md explains what does not exist: {explained - known}"
