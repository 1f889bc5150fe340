"""`epic-rag index --watch` in a process of its own: what makes it index again, what does not, and how it ends."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 180.0


class Watching:
    """A process that watches; its lines of JSON, and what it says on stderr."""

    def __init__(self, *arguments: object, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "epic_rag_cli", "index", *map(str, arguments), "--watch"]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._out: queue.Queue[str] = queue.Queue()
        self._err: queue.Queue[str] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self._out), (self.process.stderr, self._err))
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, lines: queue.Queue[str]) -> None:
        with stream:
            for line in stream:
                lines.put(line.rstrip("\n"))
        lines.put("")

    def line(self) -> str:
        return self._out.get(timeout=PATIENCE)

    def error_line(self) -> str:
        return self._err.get(timeout=PATIENCE)

    def round(self) -> dict[str, Any]:
        line = self.line()
        assert line, self.rest()
        return dict(json.loads(line))

    def until(self, **counts: int) -> list[dict[str, Any]]:
        """Rounds until the counts of all together are these: one burst of changes may be two rounds."""
        rounds = []
        while not rounds or any(sum(one.get(name, 0) for one in rounds) < count for name, count in counts.items()):
            rounds.append(self.round())
        return rounds

    def started(self) -> None:
        while not self.error_line().startswith("note: watching "):
            pass

    def stop(self) -> tuple[int, str]:
        """Press Ctrl-C; the status, and the last line on stderr."""
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(PATIENCE)
        return status, self.rest()[-1]

    def rest(self) -> list[str]:
        lines = []
        while line := self.error_line():
            lines.append(line)
        return lines

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)

    def nothing(self) -> bool:
        return self._out.empty()


@pytest.fixture
def started() -> Iterator[list[Watching]]:
    """Those in it are killed at the end."""
    processes: list[Watching] = []
    yield processes
    for one in processes:
        one.close()


def test_a_round_for_each_burst_of_changes(docs: Path, tiny_checkpoint: Path, started: list[Watching]) -> None:
    Path("outside").mkdir()
    (docs / ".gitignore").write_text("*.log\nbuild/\n")
    watching = Watching("docs", "--model", tiny_checkpoint, "--json")
    started.append(watching)
    first = watching.round()
    assert (first["round"], first["added"], first["index_dir"]) == (1, 4, str(docs / ".epic-rag"))
    watching.started()

    # New, changed, renamed and gone at once.
    (docs / "new.md").write_text("# New\n\nSomething new.\n")
    (docs / "undo.md").write_text("# Undo\n\nThis is written otherwise now.\n")
    (docs / "notes.txt").unlink()
    (docs / "drafts").rename(docs / "old")
    rounds = watching.until(added=1, changed=1, deleted=1, renamed=1)
    assert sum(one["chunks_embedded"] for one in rounds) == 2, rounds

    # What does not count: ignored files, binaries, editors' files, the index itself, what lies outside.
    (docs / "x.log").write_text("x")
    (docs / "build").mkdir()
    (docs / "build/out.md").write_text("x")
    (docs / "photo.png").write_bytes(b"\x89PNG")
    for name in (".undo.md.swp", "undo.md~", "4913", "#undo.md#", ".git"):
        (docs / name).write_text("x")
    (docs / "4913").unlink()
    (docs / ".epic-rag/stray").write_text("x")
    Path("outside/a.md").write_text("x")
    time.sleep(3)
    assert watching.nothing()

    # An ignore file counts.
    (docs / ".gitignore").write_text("*.log\n")
    assert watching.until(added=1)[-1]["unchanged"] >= 3

    # A folder that is removed and made again is watched again.
    shutil.rmtree(docs / "old")
    watching.until(deleted=1)
    (docs / "old").mkdir()
    (docs / "old/again.md").write_text("# Again\n\nHere it is again.\n")
    watching.until(added=1)

    status, last = watching.stop()
    assert status == 0
    assert last.startswith("note: stopped watching after ")
    assert last.endswith(" rounds: 7 added, 1 changed, 1 renamed, 2 deleted"), last


def test_errors_of_a_round_do_not_end_the_watch(docs: Path, tiny_checkpoint: Path, started: list[Watching]) -> None:
    watching = Watching("docs", "--model", tiny_checkpoint, "--json")
    started.append(watching)
    assert watching.round()["added"] == 4
    watching.started()
    state = docs / ".epic-rag/index.json"
    kept = state.read_text()
    state.write_text("{")
    (docs / "new.md").write_text("# New\n\nSomething new.\n")
    failed = watching.round()
    assert "index.json" in failed["error"]
    assert watching.error_line().startswith("error: ")
    state.write_text(kept)
    (docs / "newer.md").write_text("# Newer\n\nSomething newer.\n")
    watching.until(added=2)
    assert watching.stop()[0] == 0


def test_the_root_itself_is_made_anew(docs: Path, tiny_checkpoint: Path, started: list[Watching]) -> None:
    watching = Watching("docs", "--model", tiny_checkpoint, "--index-dir", "idx", "--json")
    started.append(watching)
    watching.round()
    watching.started()
    docs.rename("away")
    Path("made").mkdir()
    Path("made/other.md").write_text("# Other\n\nOther words.\n")
    Path("made").rename("docs")
    watching.until(added=1, deleted=4)
    Path("docs/more.md").write_text("# More\n\nMore words.\n")
    watching.until(added=1)
    assert watching.stop()[0] == 0


def test_a_single_file_that_an_editor_replaces(docs: Path, tiny_checkpoint: Path, started: list[Watching]) -> None:
    watching = Watching("docs/undo.md", "--model", tiny_checkpoint, "--index-dir", "idx", "--json")
    started.append(watching)
    assert watching.round()["added"] == 1
    watching.started()
    for text in ("first", "second"):
        (docs / "swap").write_text(f"# Undo\n\nA {text} text.\n")
        (docs / "swap").replace(docs / "undo.md")
        watching.until(changed=1)
    (docs / "notes.txt").write_text("Not of the index.\n")
    time.sleep(2)
    assert watching.nothing()
    assert watching.stop()[0] == 0


def test_text_names_time_and_counts(docs: Path, tiny_checkpoint: Path, started: list[Watching]) -> None:
    watching = Watching("docs", "--model", tiny_checkpoint)
    started.append(watching)
    first = watching.line()
    assert first[8:].startswith("  4 added, 0 changed")
    time.strptime(first[:8], "%H:%M:%S")
    watching.started()
    (docs / "new.md").write_text("# New\n\nSomething new.\n")
    assert watching.line()[8:].startswith("  1 added")
    status, last = watching.stop()
    assert (status, last) == (0, "note: stopped watching after 2 rounds: 5 added, 0 changed, 0 renamed, 0 deleted")


def test_a_first_round_that_fails_ends_it(indexed: Path, other_checkpoint: Path, started: list[Watching]) -> None:
    watching = Watching("docs", "--model", other_checkpoint)
    started.append(watching)
    assert watching.process.wait(PATIENCE) == 1
    assert watching.rest()[-1].startswith("error: The index was built with tiny")
