"""`epic-rag index --watch`: rounds in a thread of this process, and Ctrl-C in a process of its own."""

from __future__ import annotations

import io
import json
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from epic_rag_chroma import ChromaIndexer
from epic_rag_cli.main import run

PATIENCE = 120.0


class Lines(io.StringIO):
    """A stream that puts each line into a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: queue.Queue[str] = queue.Queue()
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self.queue.put(line)
        return len(text)

    def line(self) -> str:
        return self.queue.get(timeout=PATIENCE)


class Watch:
    """`epic-rag index --watch` in a thread. `stop` interrupts the next round, since a thread gets no Ctrl-C."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
        self.out, self.err = Lines(), Lines()
        self.status: int | None = None
        self._stopping = False
        index = ChromaIndexer.index

        def round_(indexer: ChromaIndexer, *values: Any, **options: Any) -> Any:
            if self._stopping:
                raise KeyboardInterrupt
            return index(indexer, *values, **options)

        monkeypatch.setattr(ChromaIndexer, "index", round_)
        monkeypatch.setattr(sys, "stdout", self.out)
        monkeypatch.setattr(sys, "stderr", self.err)

        def watch() -> None:
            self.status = run(["index", *map(str, arguments), "--watch"])
            self.out.write("\n")
            self.err.write("\n")

        self._thread = threading.Thread(target=watch)
        self._thread.start()

    def round(self) -> dict[str, Any]:
        line = self.out.line()
        assert line, list(self.err.queue.queue)
        return dict(json.loads(line))

    def until(self, **counts: int) -> list[dict[str, Any]]:
        """Return the rounds until the sums of their counts are these: one burst of changes may be two rounds."""
        rounds: list[dict[str, Any]] = []
        while any(sum(one.get(name, 0) for one in rounds) < count for name, count in counts.items()):
            rounds.append(self.round())
        return rounds

    def started(self) -> None:
        while not self.err.line().startswith("note: Watching "):
            pass

    def stop(self, touched: Path) -> int | None:
        self._stopping = True
        end = time.monotonic() + PATIENCE
        while self._thread.is_alive() and time.monotonic() < end:
            touched.write_text(str(time.monotonic()))
            self._thread.join(0.5)
        return self.status


@pytest.fixture
def watch(docs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watch]]:
    """Start a watch; it is stopped at the end."""
    started: list[Watch] = []

    def start(*arguments: object) -> Watch:
        started.append(Watch(monkeypatch, *arguments))
        return started[-1]

    yield start
    for one in started:
        assert one.stop(Path("docs/undo.md")) in (1, 130)


def test_bursts_of_changes(docs: Path, tiny_checkpoint: Path, watch: Callable[..., Watch]) -> None:
    Path("outside").mkdir()
    (docs / ".gitignore").write_text("*.log\nbuild/\n")
    watching = watch("docs", "--model", tiny_checkpoint, "--json")
    first = watching.round()
    assert (first["round"], first["added"], first["index_dir"]) == (1, 4, str(docs / ".epic-rag"))
    watching.started()

    # New, changed, renamed and deleted files in one burst.
    (docs / "new.md").write_text("# New\n\nSomething new.\n")
    (docs / "undo.md").write_text("# Undo\n\nThis is written otherwise now.\n")
    (docs / "notes.txt").unlink()
    (docs / "drafts").rename(docs / "old")
    rounds = watching.until(added=1, changed=1, deleted=1, renamed=1)
    assert sum(one["chunks_embedded"] for one in rounds) == 2, rounds

    # Rounds without effect print nothing: ignored files, binaries, the index itself, files outside.
    (docs / "x.log").write_text("x")
    (docs / "build").mkdir()
    (docs / "build/out.md").write_text("x")
    (docs / "photo.png").write_bytes(b"\x89PNG")
    (docs / ".epic-rag/stray").write_text("x")
    Path("outside/a.md").write_text("x")
    # The change of an ignore file has one.
    time.sleep(1)
    (docs / ".gitignore").write_text("*.log\n")
    (changed,) = watching.until(added=1)
    assert (changed["added"], changed["unchanged"]) == (1, 4)
    assert changed["round"] == first["round"] + len(rounds) + 1

    # A deleted folder that is created again is watched again.
    shutil.rmtree(docs / "old")
    watching.until(deleted=1)
    (docs / "old").mkdir()
    (docs / "old/again.md").write_text("# Again\n\nHere it is again.\n")
    watching.until(added=1)

    # An error does not end the watch.
    database = docs / ".epic-rag/index.sqlite"
    kept = database.read_bytes()
    database.write_text("{")
    (docs / "newer.md").write_text("# Newer\n\nSomething newer.\n")
    assert "index.sqlite" in watching.round()["error"]
    while not watching.err.line().endswith("(Trying again after the next change.)"):
        pass
    database.write_bytes(kept)
    (docs / "newest.md").write_text("# Newest\n\nSomething newest.\n")
    watching.until(added=2)


def test_root_is_replaced(docs: Path, tiny_checkpoint: Path, watch: Callable[..., Watch]) -> None:
    watching = watch("docs", "--model", tiny_checkpoint, "--index-dir", "idx", "--json")
    watching.round()
    watching.started()
    docs.rename("away")
    Path("made").mkdir()
    Path("made/other.md").write_text("# Other\n\nOther words.\n")
    Path("made").rename("docs")
    watching.until(added=1, deleted=4)
    Path("docs/more.md").write_text("# More\n\nMore words.\n")
    watching.until(added=1)


def test_file_that_an_editor_replaces(docs: Path, tiny_checkpoint: Path, watch: Callable[..., Watch]) -> None:
    watching = watch("docs/undo.md", "--model", tiny_checkpoint, "--index-dir", "idx", "--json")
    assert watching.round()["added"] == 1
    watching.started()
    for text in ("first", "second"):
        (docs / "swap").write_text(f"# Undo\n\nA {text} text.\n")
        (docs / "swap").replace(docs / "undo.md")
        watching.until(changed=1)
    (docs / "notes.txt").write_text("Not in the index.\n")
    (docs / "undo.md").write_text("# Undo\n\nA third text.\n")
    assert watching.until(changed=1)[-1]["added"] == 0


def test_text(docs: Path, tiny_checkpoint: Path, watch: Callable[..., Watch]) -> None:
    watching = watch("docs", "--model", tiny_checkpoint)
    first = watching.out.line()
    assert first[8:].startswith("  4 added, 0 changed")
    time.strptime(first[:8], "%H:%M:%S")
    watching.started()
    (docs / "new.md").write_text("# New\n\nSomething new.\n")
    assert watching.out.line()[8:].startswith("  1 added")


def test_first_round_fails(cli: Any, indexed: Path, other_checkpoint: Path) -> None:
    result = cli("index", "docs", "--watch", "--model", other_checkpoint)
    assert result.status == 1
    assert "tiny" in result.err


def test_ctrl_c(indexed: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "epic_rag_cli", "index", "docs", "--watch"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("note: Watching "):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert err == "note: Stopped watching after 1 round: 0 added, 0 changed, 0 renamed, 0 deleted.\n"
