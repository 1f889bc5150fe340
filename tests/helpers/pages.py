"""Run the examples of a Markdown page: Python in one namespace, commands in this process where possible."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from epic_rag_cli.main import run

ROOT = Path(__file__).resolve().parents[2]

SHELL = ("sh", "bash", "console")
DATA = ("json", "jsonl", "yaml", "toml")
NOT_RUN = ("chroma", "make", "pip", "source", "torchrun")
"""Programs that are not run: they install, start servers or take hours."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$|^((?: {4}\S[^\n]*\n)+)", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"`([\w./-]+\.\w+)`:\s*\Z")
_HEREDOC = re.compile(r"<<'?(\w+)'?")


@dataclass(frozen=True)
class Block:
    """A block of code: its language, its text, the line where it begins, and the file that the page calls it."""

    language: str
    text: str
    line: int
    file: str | None


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page: the fenced ones, and indented ones that begin with a command of epic-rag."""
    found = []
    for match in _FENCE.finditer(page):
        language, text, indented = match.groups()
        if indented is not None:
            if not indented.startswith("    epic-rag "):
                continue
            language, text = "sh", re.sub(r"^ {4}", "", indented, flags=re.MULTILINE)
        name = _FILE.search(page[: match.start()])
        line = page.count("\n", 0, match.start()) + (1 if indented else 2)
        found.append(Block(language, text, line, name[1] if name else None))
    return found


def statements(text: str) -> Iterator[str]:
    """Yield the command lines of a shell block, with continued lines joined and here-documents whole."""
    lines = iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        statement = line.removeprefix("$ ")
        if not statement.strip() or statement.startswith("#"):
            continue
        end = _HEREDOC.search(statement)
        while end and not statement.endswith(f"\n{end[1]}"):
            statement += "\n" + next(lines)
        yield statement


@dataclass
class PageRun:
    """The folder, the environment and the results of a page while its examples run.

    Args:
        folder: The working directory.
        monkeypatch: Undoes the changes of directory and environment.
        capture: pytest's capture of standard output.
        environment: Further variables of programs that a shell starts.
        skipped: Beginnings of command lines that are not run.
        before_command: Called with each command line before it runs.
    """

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]
    environment: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    before_command: Callable[[str], None] = lambda line: None
    names: dict[str, Any] = field(default_factory=dict)
    printed: dict[str, list[str]] = field(default_factory=lambda: {"python": [], "shell": []})
    commands: list[str] = field(default_factory=list)

    def run(self, page: str, name: str) -> None:
        """Run every block of a page, and fail with the page's name and line."""
        self.capture.readouterr()
        for block in blocks(page):
            place = f"{name}:{block.line}"
            if block.language == "python":
                code = compile("\n" * (block.line - 1) + block.text, str(ROOT / name), "exec")
                exec(code, self.names)
                self.printed["python"].append(self.capture.readouterr().out)
            elif block.language in SHELL:
                for statement in statements(block.text):
                    self._statement(statement, place)
            elif block.language in DATA and block.file is not None:
                file = self.folder / block.file
                assert not file.exists(), f"{place}: {block.file} is shown twice"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.text, encoding="utf-8")

    def output(self, kind: str) -> str:
        """Return all that the page's "python" or "shell" examples printed."""
        return "".join(self.printed[kind])

    def _statement(self, statement: str, place: str) -> None:
        words = shlex.split(statement, comments=True)
        if words[0] in NOT_RUN or statement.startswith(self.skipped):
            return
        self.before_command(statement)
        if words[0] == "cd":
            self.monkeypatch.chdir(words[1])
        elif words[0] == "export":
            self.monkeypatch.setenv(*words[1].split("=", 1))
        elif words[0] == "epic-rag" and not _needs_shell(statement):
            status = run(words[1:])
            shown = self.capture.readouterr()
            assert status == 0, f"{place}: {statement}\n{shown.err}"
            self.printed["shell"].append(shown.out)
            self.commands.append(statement)
        else:
            status = subprocess.run(["bash", "-euo", "pipefail", "-c", statement], env=self._shell()).returncode
            shown = self.capture.readouterr()
            assert (status, shown.err) == (0, ""), f"{place}: {statement}\n{shown.err}"
            self.printed["shell"].append(shown.out)

    def _shell(self) -> dict[str, str]:
        """Return an environment in which `epic-rag` and `python` are those of this process."""
        programs = self.folder / ".programs"
        if not programs.exists():
            programs.mkdir()
            for name, command in (("epic-rag", f"{sys.executable} -m epic_rag_cli"), ("python", sys.executable)):
                (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
                (programs / name).chmod(0o755)
        return {**os.environ, **self.environment, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}


def _needs_shell(statement: str) -> bool:
    tokens = shlex.shlex(statement, posix=True, punctuation_chars=True)
    tokens.whitespace_split = True
    return any(set(token) <= set("|&;<>()") for token in tokens)
