"""The examples of docs/search.md run, in order, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from epic_rag import checkpoints

PAGE = Path(__file__).parents[2] / "docs" / "search.md"


def test_the_examples_run(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # The default checkpoint works the same way; the tiny one is quick.
    monkeypatch.setattr(checkpoints, "DEFAULT_CHECKPOINT", str(tiny_checkpoint))
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) == 7
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["1", "2"]
    assert lines[2] == "src/users.py True None"
    assert lines[3] == "['src/users.py']"
    assert sorted(re.findall(r"guide/\S+md", lines[4])) == ["guide/remove.md", "guide/undo.md"]
    assert lines[5] == "['guide/remove.md', 'src/users.py']"
    assert re.fullmatch(r"guide/(old/)?undo\.md also in guide/(old/)?undo\.md:\d", lines[6])
    assert lines[7] == "2 passages on undoing"
    assert re.fullmatch(r"src/users\.py -\d+\.0 -?\d\.\d+", lines[8])
    assert len(lines) == 11
