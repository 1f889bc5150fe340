"""docs/architecture.md: its names exist and are called in its order, and its tree is the one of the repository."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from epic_rag_cli.main import run
from tests.conftest import make_encoder
from tests.helpers.pages import ROOT
from tests.test_structure import modules

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAME = re.compile(r"`((?:epic_rag|epic_rag_chroma|epic_rag_cli|llama_index)\.[\w.]+)`")


def resolve(name: str) -> Any:
    """Return the object of a dotted name: the longest module of it, then its attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"no module in {name}")


def steps(heading: str) -> list[str]:
    """Return the name that each step of a numbered list begins with."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(rf"^\d+\. {NAME.pattern}", section, re.MULTILINE)
    assert len(found) == len(re.findall(r"^\d+\. ", section, re.MULTILINE))
    return found


def run_profiled(command: list[str]) -> tuple[int, dict[CodeType, int]]:
    """Run a command; return its status and each code object called in any thread, with its place in that order."""
    order: dict[CodeType, int] = {}

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            order.setdefault(frame.f_code, len(order))

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        return run(command), order
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def test_names_exist() -> None:
    for name in NAME.findall(PAGE):
        resolve(name)


def test_the_ways_of_a_document_and_of_a_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = make_encoder(causal=False)
    encoder.config.strategy = "task-vector"
    encoder.save_pretrained("model")
    Path("docs").mkdir()
    Path("docs/undo.md").write_text(
        "# Undo\n\nTo undo the last commit, reset softly.\n\n## Remove\n\nDelete the folder.\n"
    )
    commands = {
        "The way of a document": ["index", "docs", "--model", "model"],
        "The way of a query": ["query", "undo", "--bank", "docs", "-n", "4", "--index-dir", "docs/.epic-rag"],
    }
    for heading, command in commands.items():
        status, order = run_profiled(command)
        assert status == 0
        names = steps(heading)
        positions = [order.get(inspect.unwrap(resolve(name)).__code__, -1) for name in names]
        assert dict(zip(names, positions, strict=True)) == dict(zip(names, sorted(positions), strict=True))
        assert -1 not in positions


def test_the_tree_has_every_module() -> None:
    (tree,) = re.findall(r"^```text\n(.*?)^```$", PAGE.split("## The tree\n")[1], re.MULTILINE | re.DOTALL)
    listed, folders = [], {0: ""}
    for line in tree.splitlines():
        depth = len(line) - len(line.lstrip())
        name = line.split()[0]
        if name.endswith("/"):
            folders[depth + 2] = folders[depth] + name
        else:
            listed.append(folders[depth] + name)
        assert len(line.split()) > 1 or name.endswith("/"), f"{name} is not described"
    expected = {str(path.relative_to(ROOT)) for path in modules().values() if not path.name.startswith("__")}
    assert set(listed) ^ expected == set()
    assert len(listed) == len(expected)
