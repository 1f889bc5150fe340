"""After a crash at any moment, the next run ends in the same index as a clean run; so do random edits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chromadb.api.models.Collection import Collection
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer
from epic_rag_chroma.errors import IndexLockedError
from epic_rag_chroma.indexing import run as indexing
from epic_rag_chroma.store.database import IndexDatabase
from tests.helpers.indexes import TEXTS, Rows, assert_same, run, start, texts_found, write

ReadRows = Callable[[Path], Rows]

NAMES = ["a.md", "b.txt", "sub/a.md", "sub/deep/c.rst"]


class KilledError(BaseException):
    """Stand-in for the end of the process."""


def clean(folder: Path, encoder: EpicEncoder, rows: ReadRows) -> Rows:
    """Return the rows of a clean index of a copy of the folder."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(folder, Path(place, "copy"), ignore=shutil.ignore_patterns(".epic-rag")))
        run(copy, encoder)
        return rows(copy / ".epic-rag")


STEP = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(NAMES), st.sampled_from(TEXTS)),
    st.tuples(st.just("delete"), st.sampled_from(NAMES)),
    st.tuples(st.just("rename"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
    st.tuples(st.just("index")),
    st.tuples(st.just("index")),
    st.tuples(st.just("forget vectors")),
    st.tuples(st.just("rebuild")),
)


def do(folder: Path, encoder: EpicEncoder, step: tuple[str, ...]) -> None:
    match step:
        case ("write", name, text):
            write(folder, name, text)
        case ("delete", name):
            (folder / name).unlink(missing_ok=True)
        case ("rename", old, new) if (folder / old).exists():
            (folder / new).parent.mkdir(parents=True, exist_ok=True)
            (folder / old).replace(folder / new)
        case ("index",):
            run(folder, encoder)
        case ("rebuild",):
            run(folder, encoder, rebuild=True)
        case ("forget vectors",):
            (folder / ".epic-rag/vectors.bin").unlink(missing_ok=True)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.lists(STEP, min_size=3, max_size=14))
def test_random_edits(
    tiny_encoder: EpicEncoder, tmp_path_factory: pytest.TempPathFactory, rows: ReadRows, steps: list[tuple[str, ...]]
) -> None:
    folder = tmp_path_factory.mktemp("docs")
    for step in steps:
        do(folder, tiny_encoder, step)
    run(folder, tiny_encoder)
    assert_same(rows(folder / ".epic-rag"), clean(folder, tiny_encoder, rows))


def edited(folder: Path) -> None:
    """Add, change, move and delete files."""
    write(folder, "added.md", TEXTS[4])
    write(folder, "a.md", TEXTS[4])
    write(folder, "grown.md", TEXTS[5] + TEXTS[6])
    (folder / "gone.md").unlink()
    (folder / "moved.md").rename(folder / "sub/moved.md")


def edited_again(folder: Path) -> None:
    """Revert a part of it, as may happen between a crash and the next run."""
    (folder / "added.md").unlink()
    write(folder, "a.md", TEXTS[3])
    write(folder, "grown.md", TEXTS[2])
    write(folder, "gone.md", TEXTS[1])


# Every write of a run, before and after it happens.
WRITES = [
    *((IndexDatabase, name) for name in ("put", "update_metadata", "delete", "put_file", "delete_files", "save_state")),
    *((IndexDatabase, name) for name in ("finish_run", "replace_by", "begin_mirror", "end_mirror")),
    (indexing, "write_vectors"),
    *((Collection, name) for name in ("upsert", "update", "delete", "modify")),
]


def killed_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> Callable[[], int]:
    """Make the run end at its n-th moment; return a function that counts the moments."""
    seen = 0

    def tick() -> None:
        nonlocal seen
        seen += 1
        if seen >= moment:  # a dead process does nothing afterwards either
            raise KilledError

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            tick()
            result = function(*arguments, **options)
            tick()
            return result

        return wrapped

    for owner, name in WRITES:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))
    return lambda: seen


@pytest.mark.parametrize("kind", ["first", "update", "rebuild"])
def test_crash_at_every_write(
    tmp_path: Path, tiny_encoder: EpicEncoder, rows: ReadRows, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = start(tmp_path / "base")
    if kind != "first":
        run(base, tiny_encoder)
    before = texts_found(base, tiny_encoder) if kind != "first" else set()
    final = Path(shutil.copytree(base, tmp_path / "final"))
    edited(final)
    expected = {False: clean(final, tiny_encoder, rows)}
    after = {(metadata["path"], text) for text, metadata, _ in expected[False].values()}
    edited_again(final)
    expected[True] = clean(final, tiny_encoder, rows)
    # Every ninth moment, each kind of run beginning with another one; a run has about eighty.
    moment = 3 * ["first", "update", "rebuild"].index(kind) - 8
    while True:
        moment += 9
        folder = Path(shutil.copytree(base, tmp_path / f"run{moment}"))
        edited(folder)
        with monkeypatch.context() as patch:
            seen = killed_at(patch, moment)
            try:
                run(folder, tiny_encoder, rebuild=kind == "rebuild", batch_chunks=3)
            except KilledError:
                pass
            else:
                assert seen() < moment
                break
        if kind != "first":
            # What was there before and is still there afterwards was never out of sight.
            assert before & after <= texts_found(folder, tiny_encoder)
        more = moment % 2 == 0
        if more:
            edited_again(folder)
        run(folder, tiny_encoder)
        assert_same(rows(folder / ".epic-rag"), expected[more])
        with ChromaIndexer(folder / ".epic-rag", encoder=tiny_encoder) as indexer:
            assert indexer.status().state == "complete"
        shutil.rmtree(folder)
    assert moment > 10


def test_reverted_edit_after_a_crash(
    tmp_path: Path, tiny_encoder: EpicEncoder, rows: ReadRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The run dies after it has stored the new text, and before the mirror has it.
    folder = tmp_path / "docs"
    write(folder, "a.md", "one\n")
    run(folder, tiny_encoder)
    expected = rows(folder / ".epic-rag")
    write(folder, "a.md", "two\n")

    def die(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(IndexDatabase, "finish_run", die)
        with pytest.raises(KilledError):
            run(folder, tiny_encoder)
    assert texts_found(folder, tiny_encoder) == {("a.md", "two")}
    with ChromaIndexer(folder / ".epic-rag", encoder=tiny_encoder) as indexer:
        assert indexer.status().state == "interrupted"
    write(folder, "a.md", "one\n")
    run(folder, tiny_encoder)
    assert_same(rows(folder / ".epic-rag"), expected)


def test_stored_chunks_are_not_embedded_again(
    tmp_path: Path, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "docs"
    for number in range(20):
        write(folder, f"{number:02}.txt", f"file {number}\n")
    encode, calls = EpicEncoder.encode_document, 0

    def fail(self: EpicEncoder, texts: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return encode(self, texts, **options)

    with monkeypatch.context() as patch:
        patch.setattr(EpicEncoder, "encode_document", fail)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tiny_encoder, batch_chunks=4)
    with ChromaIndexer(folder / ".epic-rag", encoder=tiny_encoder) as indexer:
        assert indexer.status().chunks == 12
        assert len(indexer.query("x", k=50, mode="dense", collapse=False)) == 12
    report = run(folder, tiny_encoder)
    assert (report.added, report.unchanged, report.chunks_embedded, report.chunks_total) == (8, 12, 8, 20)


WRITER = """
import pathlib, sys, time
from epic_rag_chroma.store.lock import write_lock
with write_lock(pathlib.Path(sys.argv[1])):
    print("locked", flush=True); time.sleep(60)
"""


def test_lock_of_another_process(tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    folder = start(tmp_path / "docs")
    run(folder, tiny_encoder)
    index = folder / ".epic-rag"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(index)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "locked\n"
        with ChromaIndexer(index, encoder=tiny_encoder) as indexer:
            for call in (lambda: indexer.index([folder]), indexer.clear):
                with pytest.raises(IndexLockedError, match=rf"process {writer.pid} on .*\. Wait until it is done"):
                    call()
            assert indexer.query("x", mode="dense")  # reading needs no lock
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert (index / "lock.holder").exists()  # stale, and nobody minds
    assert run(folder, tiny_encoder).unchanged == 5


def test_lock_within_a_process(tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    folder = start(tmp_path / "docs")
    first, second = (ChromaIndexer(folder / ".epic-rag", encoder=tiny_encoder) for _ in range(2))

    def meanwhile(_: Any) -> None:
        with pytest.raises(IndexLockedError, match=f"process {os.getpid()}"):
            second.index([folder])

    assert first.index([folder], progress=meanwhile).added == 5


INDEX = """
import sys
from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer
encoder = EpicEncoder.from_pretrained(sys.argv[2])
for mode in sys.argv[3:]:
    sys.stdin.readline()
    with ChromaIndexer(sys.argv[1] + "/.epic-rag", encoder=encoder, batch_chunks=5) as indexer:
        indexer.index([sys.argv[1]], rebuild=mode == "rebuild")
    print("done", flush=True)
"""


def test_reader_sees_writes_of_another_process(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = start(tmp_path / "docs")
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    run(folder, encoder)
    modes = ["update", "rebuild", "update"]
    writer = subprocess.Popen(
        [sys.executable, "-c", INDEX, str(folder), str(tiny_checkpoint), *modes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with writer, ChromaIndexer(folder / ".epic-rag", encoder=encoder) as reader:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for number, gone in enumerate(["a.md", "gone.md", "moved.md"]):
            paths = {hit.path for hit in reader.query("x", k=1000, mode="dense", collapse=False)}
            assert gone in paths
            assert f"new{number}.md" not in paths
            write(folder, f"new{number}.md", f"brand new text {number}\n")
            (folder / gone).unlink()
            writer.stdin.write("\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "done\n"
            paths = {hit.path for hit in reader.query("x", k=1000, mode="dense", collapse=False)}
            assert f"new{number}.md" in paths
            assert gone not in paths


def test_killed_process(tmp_path: Path, tiny_checkpoint: Path, rows: ReadRows) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    folder = tmp_path / "docs"
    for number in range(30):
        write(folder, f"{number}.md", f"# T{number}\n\n" + f"text {number}\n\n## S\n\nmore\n" * 3)
    chance = random.Random(7)
    with subprocess.Popen(
        [sys.executable, "-c", INDEX, str(folder), str(tiny_checkpoint), "update"], stdin=subprocess.DEVNULL
    ) as process:
        database = folder / ".epic-rag/chroma/chroma.sqlite3"
        while process.poll() is None and not database.exists():
            time.sleep(0.02)
        try:
            process.wait(timeout=0.2 + chance.random())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    run(folder, encoder)
    assert_same(rows(folder / ".epic-rag"), clean(folder, encoder, rows))
