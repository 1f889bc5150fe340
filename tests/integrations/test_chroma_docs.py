"""The examples of docs/chroma.md run, in order, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from epic_rag import checkpoints

PAGE = Path(__file__).parents[2] / "docs" / "chroma.md"


def test_the_examples_run(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # The default checkpoint works the same way; the tiny one is quick.
    monkeypatch.setattr(checkpoints, "DEFAULT_CHECKPOINT", str(tiny_checkpoint))
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) == 8
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("1 files, 2 chunks\n1 ")
    assert "broken.pdf - a broken PDF" in printed
    assert "the vectors were made by a checkpoint with fingerprint 0123456789ab" in printed
