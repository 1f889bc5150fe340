"""docs/encoder.md explains every argument."""

from __future__ import annotations

import inspect
import re

import pytest

from epic_rag import EpicEncoder
from epic_rag.query_prompt import PromptSettings
from tests.helpers.pages import ROOT

PAGE = (ROOT / "docs" / "encoder.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("heading", "arguments"),
    [
        ("argument", list(inspect.signature(EpicEncoder.from_pretrained).parameters)[1:]),
        ("field of `QueryPrompt`", list(PromptSettings.__annotations__)),
    ],
)
def test_a_table_has_every_argument(heading: str, arguments: list[str]) -> None:
    (table,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n((?:^\|.*\|\n)+)", PAGE, re.MULTILINE)
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == arguments
