"""A folder to index, an index of it, and three ways to run commands: in this process, each in a new one, all in one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import epic_rag_chroma
from epic_rag_cli.main import run
from tests.helpers.fake_indexer import FakeIndexer

FILES = {
    "install.md": "# Guide\n\n## Install\n\nRun the installer, then read the manual.\n\n## Remove\n\nDelete the folder.\n",
    "undo.md": "# Undo\n\nTo undo the last commit and keep its changes, reset softly to the one before it.\n",
    "notes.txt": "Cats sleep most of the day.\nThey wake up for food.\n",
    "drafts/idea.md": "# Idea\n\nA draft that nobody has read.\n",
}
PAIRS = (
    '{"query": "how do I undo it", "passage": "Reset softly to the commit before it."}\n'
    '{"query": "where is the manual", "positive": "The manual is beside the installer."}\n'
)


@dataclass(frozen=True)
class Result:
    """What a call of the command left behind."""

    status: int
    out: str
    err: str


Cli = Callable[..., Result]

# Runs command lines (JSON on standard input) as `main` does, with file descriptors 1 and 2 in files of their own.
MANY = """
import io, json, os, sys, tempfile
lines = json.load(sys.stdin)
from epic_rag_cli.main import run
from epic_rag_cli.terminal import silence_libraries
silence_libraries()
results, streams = [], [os.dup(1), os.dup(2)]
for line in lines:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        status = run(line)
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(streams[0], 1), os.dup2(streams[1], 2)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        results.append([status, *texts])
json.dump(results, sys.stdout)
"""


@pytest.fixture(autouse=True)
def _plain_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the person who runs the tests, an empty working directory, 100 columns."""
    for name in [name for name in os.environ if name.startswith("EPIC_RAG_")]:
        monkeypatch.delenv(name)
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run one command in this process."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call


@pytest.fixture
def process() -> Cli:
    """Run one command in a process of its own, through its real entry point."""

    def call(
        *arguments: object,
        command: Sequence[str] = (sys.executable, "-m", "epic_rag_cli"),
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Result:
        done = subprocess.run(
            [*command, *map(str, arguments)],
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
            **options,
        )
        return Result(done.returncode, (done.stdout or b"").decode(), done.stderr.decode())

    return call


@pytest.fixture
def one_process() -> Callable[..., list[Result]]:
    """Run several commands in one new process, so that its imports are paid once."""

    def call(*lines: Sequence[object], env: Mapping[str, str] | None = None) -> list[Result]:
        done = subprocess.run(
            [sys.executable, "-c", MANY],
            env={**os.environ, **(env or {})},
            input=json.dumps([[str(word) for word in line] for line in lines]),
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        return [Result(*values) for values in json.loads(done.stdout)]

    return call


def write_files(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def docs() -> Path:
    """A folder `docs` in the working directory."""
    return write_files(Path.cwd() / "docs")


@pytest.fixture(scope="session")
def _indexed(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    folder = write_files(tmp_path_factory.mktemp("indexed") / "docs")
    assert run(["index", str(folder), "--model", str(tiny_checkpoint)]) == 0
    return folder


@pytest.fixture
def indexed(_indexed: Path) -> Path:
    """A folder `docs` in the working directory with its index; each test has a copy of its own."""
    return Path(shutil.copytree(_indexed, Path.cwd() / "docs"))


@pytest.fixture
def pairs() -> Path:
    """A file of two pairs in the working directory."""
    file = Path.cwd() / "pairs.jsonl"
    file.write_text(PAIRS, encoding="utf-8")
    return file


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeIndexer]:
    class Fake(FakeIndexer):
        pass

    monkeypatch.setattr(epic_rag_chroma, "ChromaIndexer", Fake)
    return Fake
