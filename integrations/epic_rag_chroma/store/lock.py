"""Locks of an index folder, and the dirty marker of an unfinished run.

Write lock: one writer at a time; the operating system drops it when the process dies.

Chroma lock and dirty marker: Chroma overwrites the files of its graph in place and lets every process that opens a
collection finish what it finds unfinished, so two processes with one folder open destroy each other's files. Hence:

* `chroma_lock`: the indexer holds it for its whole run. A query holds it while it opens the collection, and only if it
  is free at once; otherwise it reads the rows in SQLite and leaves Chroma's files alone.
* `running.json`, the dirty marker, exists from the first write of a run to its end. While it exists, no query opens
  Chroma's files. Before each write it records size, time and inode of the graph's files. If the process dies and they
  are still the same, the files are intact; otherwise, or after a reboot, the collection is rebuilt from the rows.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from epic_rag.errors import ConfigError
from epic_rag_chroma.errors import IndexLockedError
from epic_rag_chroma.store.paths import CHROMA_FOLDER, CHROMA_LOCK_FILE, RUNNING_FILE, write_atomically
from epic_rag_chroma.types import RunState

__all__ = [
    "HOLDER_FILE",
    "LOCK_FILE",
    "DirtyMarker",
    "chroma_lock",
    "corrupt_collections",
    "is_dirty",
    "run_state",
    "try_chroma_lock",
    "write_lock",
]

LOCK_FILE = "lock"
# Beside the lock, not in it: some versions of filelock truncate the lock file when they try it.
HOLDER_FILE = "lock.holder"
_POLL_SECONDS = 0.1


@contextmanager
def write_lock(index_dir: Path, *, wait: float | None = 0.0) -> Iterator[None]:
    """Hold the right to write to an index.

    The lock is the operating system's, on an open file: a process that dies gives it up, so a stale lock file holds
    nobody back.

    Args:
        index_dir: The index folder.
        wait: For how many seconds to wait for another process; None for ever.

    Raises:
        ConfigError: If `wait` is negative.
        IndexLockedError: If another process (or another indexer of this one) holds it; says which.
    """
    if wait is not None and not wait >= 0:
        raise ConfigError(f"wait is {wait}; it must be at least 0 seconds, or None to wait for ever")
    lock = FileLock(str(index_dir / LOCK_FILE), timeout=-1 if wait is None else wait)
    try:
        lock.acquire(poll_interval=_POLL_SECONDS)
    except Timeout as error:
        waited = f" after {wait:g} s" if wait else ""
        raise IndexLockedError(
            f"{index_dir} is{' still' if wait else ''} being written{waited} by {_holder(index_dir)}; wait until it is "
            "done (or stop it), then run `epic-rag index` again, or let it wait with --wait"
        ) from error
    holder = index_dir / HOLDER_FILE
    try:
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        holder.write_text(json.dumps(facts), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _holder(index_dir: Path) -> str:
    try:
        facts = json.loads((index_dir / HOLDER_FILE).read_text(encoding="utf-8"))
        return f"process {facts['pid']} on {facts['host']} since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it has only just begun


# A query holds the lock while Chroma reads its graph: a second for a hundred thousand chunks.
_PATIENCE = 120.0
_BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def chroma_lock(index_dir: Path) -> Iterator[None]:
    """Keep queries from opening Chroma's files; waits for those that are about to have opened them.

    Raises:
        IndexLockedError: If one does not get done.
    """
    lock = FileLock(str(index_dir / CHROMA_LOCK_FILE), timeout=_PATIENCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise IndexLockedError(
            f"{index_dir} has been opened by a query for more than {_PATIENCE:.0f} s; end that process (it holds "
            f"{CHROMA_LOCK_FILE}) and run `epic-rag index` again"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def try_chroma_lock(index_dir: Path) -> Iterator[bool]:
    """Whether Chroma's files may be opened for reading; nobody writes to them while this lasts."""
    lock = FileLock(str(index_dir / CHROMA_LOCK_FILE), timeout=0)
    try:
        lock.acquire()
    except (Timeout, OSError):  # a run; or a folder that cannot be written to, where Chroma opens nothing either
        yield False
        return
    try:
        yield not is_dirty(index_dir)
    finally:
        lock.release()


def is_dirty(index_dir: Path) -> bool:
    """Whether a run has begun to write and has not ended: it goes on, or its process died."""
    return (index_dir / RUNNING_FILE).exists()


def run_state(index_dir: Path) -> RunState:
    """Whether a run goes on, has died, or neither. Writes nothing but may be seen as a query that opens the files."""
    if not is_dirty(index_dir):
        return "complete"
    lock = FileLock(str(index_dir / CHROMA_LOCK_FILE), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return "running"
    except OSError:
        return "interrupted"
    lock.release()
    return "interrupted" if is_dirty(index_dir) else "complete"


# Like no files at all: a collection on a server is not relied on when a write to it has not ended well.
_ON_SERVER: dict[str, list[int]] = {"server": []}


class DirtyMarker:
    """The mark of a run in the index folder.

    Args:
        index_dir: The index folder.
        collection: The id of the collection that is written to.
        torn: Ids of other collections whose graph cannot be relied on.
        on_server: Whether the graph's files are a Chroma server's, where they cannot be looked at.
    """

    def __init__(
        self, index_dir: Path, collection: str, torn: frozenset[str] = frozenset(), *, on_server: bool = False
    ) -> None:
        self._index_dir = index_dir
        self._collection = collection
        self._torn = sorted(torn)
        self._on_server = on_server
        self._begun = False

    @property
    def has_begun(self) -> bool:
        """Whether the collection may be unlike the manifest."""
        return self._begun

    def begin(self) -> None:
        """Say that from here on, the collection may be unlike the manifest. Safe to repeat."""
        if not self._begun:
            self._write(None, durable=True)
            self._begun = True

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around each write to the collection."""
        self.begin()
        self._write(_ON_SERVER if self._on_server else _graph_files(self._index_dir))
        try:
            yield
        except KeyboardInterrupt:
            self._write(None)  # it comes before or after Chroma's own code, never in its middle
            raise
        # Not where it failed: what Chroma has in memory then is not known, as after the death of the process.
        self._write(None)

    def end(self) -> None:
        """Say that everything is written."""
        for name in _graph_files(self._index_dir):  # Chroma leaves it to the system when they get to the disk
            _to_disk(self._index_dir / name)
        (self._index_dir / RUNNING_FILE).unlink(missing_ok=True)
        self._begun = False

    def _write(self, busy: dict[str, list[int]] | None, *, durable: bool = False) -> None:
        content = {
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "boot": _boot(),
            "collection": self._collection,
            "torn": self._torn,
            "busy": busy,
        }
        path = self._index_dir / RUNNING_FILE
        if durable:
            write_atomically(path, json.dumps(content))
            return
        # Twice for each batch, and needed after the death of the process only: not worth waiting for the disk.
        beside = path.with_suffix(".next")
        beside.write_text(json.dumps(content), encoding="utf-8")
        os.replace(beside, path)


def corrupt_collections(index_dir: Path, current: str | None) -> frozenset[str]:
    """Ids of the collections whose graph the last run may have left half written. Hold `chroma_lock`.

    Args:
        index_dir: The index folder.
        current: The collection that counts; it is torn if the mark of the last run cannot be understood.
    """
    try:
        content: Any = json.loads((index_dir / RUNNING_FILE).read_text(encoding="utf-8"))
        torn = {str(each) for each in content["torn"]}
        # What the system had not yet written out when the machine went down is lost.
        whole = content["boot"] == _boot() and content["busy"] in (None, _graph_files(index_dir))
        return frozenset(torn if whole else torn | {str(content["collection"])})
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return frozenset() if current is None else frozenset({current})


def _graph_files(index_dir: Path) -> dict[str, list[int]]:
    """What the files of all graphs look like: size, time and inode by name."""
    files = {}
    for path in index_dir.glob(f"{CHROMA_FOLDER}/*/*"):
        with suppress(OSError):
            info = path.stat()
            files[path.relative_to(index_dir).as_posix()] = [info.st_size, info.st_mtime_ns, info.st_ino]
    return files


def _to_disk(path: Path) -> None:
    with suppress(OSError), open(path, "rb") as file:
        os.fsync(file.fileno())


def _boot() -> str | None:
    """Names the time since the machine was started; None where the system does not say."""
    try:
        return _BOOT_FILE.read_text(encoding="ascii").strip()
    except OSError:
        return None
