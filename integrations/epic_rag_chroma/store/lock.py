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
from epic_rag.files import write_atomically
from epic_rag_chroma.errors import IndexLockedError
from epic_rag_chroma.store.paths import CHROMA_FOLDER, CHROMA_LOCK_FILE, RUNNING_FILE
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
# Beside the lock, not in it: some versions of filelock truncate the lock file.
HOLDER_FILE = "lock.holder"
_POLL_SECONDS = 0.1


@contextmanager
def write_lock(index_dir: Path, *, wait: float | None = 0.0) -> Iterator[None]:
    """Hold the write lock of an index.

    The operating system locks an open file and unlocks it when the process dies, so a stale lock file does no harm.

    Args:
        index_dir: The index folder.
        wait: How many seconds to wait for another process; None without limit.

    Raises:
        ConfigError: If `wait` is negative.
        IndexLockedError: If another process, or another indexer of this process, holds the lock.
    """
    if wait is not None and not wait >= 0:
        raise ConfigError(f"wait is {wait}. Use 0 seconds or more, or None for no limit.")
    lock = FileLock(str(index_dir / LOCK_FILE), timeout=-1 if wait is None else wait)
    try:
        lock.acquire(poll_interval=_POLL_SECONDS)
    except Timeout as error:
        waited = f" after {wait:g} s" if wait else ""
        raise IndexLockedError(
            f"{index_dir} is{' still' if wait else ''} being written{waited} by {_holder(index_dir)}. "
            "Wait until it is done, or run `epic-rag index --wait`."
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
        return "another process"  # which has only just started


# A query holds the lock while Chroma reads its graph: one second for 100,000 chunks.
_PATIENCE = 120.0
_BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def chroma_lock(index_dir: Path) -> Iterator[None]:
    """Keep queries from opening Chroma's files; wait for those that are opening them.

    Raises:
        IndexLockedError: If a query holds the lock for too long.
    """
    lock = FileLock(str(index_dir / CHROMA_LOCK_FILE), timeout=_PATIENCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise IndexLockedError(
            f"A query has held {CHROMA_LOCK_FILE} in {index_dir} for more than {_PATIENCE:.0f} s. "
            "End that process and run `epic-rag index` again."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def try_chroma_lock(index_dir: Path) -> Iterator[bool]:
    """Yield whether Chroma's files may be opened for reading; nobody writes to them in the meantime."""
    lock = FileLock(str(index_dir / CHROMA_LOCK_FILE), timeout=0)
    try:
        lock.acquire()
    except (Timeout, OSError):  # a run, or a read-only folder, where Chroma cannot open anything either
        yield False
        return
    try:
        yield not is_dirty(index_dir)
    finally:
        lock.release()


def is_dirty(index_dir: Path) -> bool:
    """Return whether a run has started to write and has not finished: it is still running, or its process died."""
    return (index_dir / RUNNING_FILE).exists()


def run_state(index_dir: Path) -> RunState:
    """Return whether a run is running, was interrupted, or neither. Takes the Chroma lock for a moment."""
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


# Equal to no state of the files: a collection on a server is not trusted if a write to it has failed.
_ON_SERVER: dict[str, list[int]] = {"server": []}


class DirtyMarker:
    """The dirty marker of a run in the index folder.

    Args:
        index_dir: The index folder.
        collection: The id of the collection that is written to.
        corrupt: Ids of other collections whose graph may be corrupt.
        on_server: Whether the graph's files are on a Chroma server, where they cannot be checked.
    """

    def __init__(
        self, index_dir: Path, collection: str, corrupt: frozenset[str] = frozenset(), *, on_server: bool = False
    ) -> None:
        self._index_dir = index_dir
        self._collection = collection
        self._corrupt = sorted(corrupt)
        self._on_server = on_server
        self._begun = False

    @property
    def has_begun(self) -> bool:
        """True if the collection may differ from the manifest."""
        return self._begun

    def begin(self) -> None:
        """Create the marker: from now on the collection may differ from the manifest. Idempotent."""
        if not self._begun:
            self._write(None, durable=True)
            self._begun = True

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wrap each write to the collection."""
        self.begin()
        self._write(_ON_SERVER if self._on_server else _graph_files(self._index_dir))
        try:
            yield
        except KeyboardInterrupt:
            self._write(None)  # raised before or after Chroma's native code, never within
            raise
        # Not after a failure: Chroma's state in memory is then unknown, as after the death of the process.
        self._write(None)

    def end(self) -> None:
        """Delete the marker: everything is written."""
        for name in _graph_files(self._index_dir):  # Chroma does not call fsync
            _fsync(self._index_dir / name)
        (self._index_dir / RUNNING_FILE).unlink(missing_ok=True)
        self._begun = False

    def _write(self, busy: dict[str, list[int]] | None, *, durable: bool = False) -> None:
        content = {
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "boot": _boot(),
            "collection": self._collection,
            "torn": self._corrupt,
            "busy": busy,
        }
        path = self._index_dir / RUNNING_FILE
        if durable:
            write_atomically(path, json.dumps(content))
            return
        # Twice for each batch, and only needed if the process dies: not worth an fsync.
        beside = path.with_suffix(".next")
        beside.write_text(json.dumps(content), encoding="utf-8")
        os.replace(beside, path)


def corrupt_collections(index_dir: Path, current: str | None) -> frozenset[str]:
    """Return ids of collections whose graph the last run may have left half written. Requires `chroma_lock`.

    Args:
        index_dir: The index folder.
        current: The current collection; it is corrupt if the marker of the last run cannot be parsed.
    """
    try:
        content: Any = json.loads((index_dir / RUNNING_FILE).read_text(encoding="utf-8"))
        corrupt = {str(each) for each in content["torn"]}
        # After a crash of the machine, unwritten pages are lost.
        intact = content["boot"] == _boot() and content["busy"] in (None, _graph_files(index_dir))
        return frozenset(corrupt if intact else corrupt | {str(content["collection"])})
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return frozenset() if current is None else frozenset({current})


def _graph_files(index_dir: Path) -> dict[str, list[int]]:
    """Return size, time and inode of all graph files by name."""
    files = {}
    for path in index_dir.glob(f"{CHROMA_FOLDER}/*/*"):
        with suppress(OSError):
            info = path.stat()
            files[path.relative_to(index_dir).as_posix()] = [info.st_size, info.st_mtime_ns, info.st_ino]
    return files


def _fsync(path: Path) -> None:
    with suppress(OSError), open(path, "rb") as file:
        os.fsync(file.fileno())


def _boot() -> str | None:
    """Return an id of the current boot of the machine; None if the system has none."""
    try:
        return _BOOT_FILE.read_text(encoding="ascii").strip()
    except OSError:
        return None
