"""docs/training.md explains every setting with its default."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from epic_rag.training import TaskConfig, TrainingConfig

PAGE = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| .+ \|$", re.MULTILINE)


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
