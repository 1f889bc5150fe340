"""Locks of an index folder: one writer at a time, and nobody in Chroma's files while they are being written.

The operating system locks an open file and unlocks it when the process dies, so a stale lock file does no harm.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from epic_rag.errors import ConfigError
from epic_rag_chroma.errors import IndexLockedError

__all__ = ["CHROMA_LOCK_FILE", "HOLDER_FILE", "LOCK_FILE", "chroma_lock", "is_locked", "try_chroma_lock", "write_lock"]

LOCK_FILE = "lock"
CHROMA_LOCK_FILE = "chroma.lock"
# Beside the lock, not in it: some versions of filelock truncate the lock file.
HOLDER_FILE = "lock.holder"
_POLL_SECONDS = 0.1
# A query holds Chroma's lock while Chroma reads its graph: one second for 100,000 chunks.
_PATIENCE = 120.0


@contextmanager
def write_lock(index_dir: Path, *, wait: float | None = 0.0) -> Iterator[None]:
    """Hold the write lock of an index.

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


def is_locked(index_dir: Path) -> bool:
    """Return whether a process is writing to the index. Takes the lock for a moment if it is free."""
    try:
        with FileLock(str(index_dir / LOCK_FILE), timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a read-only folder
        return False


@contextmanager
def chroma_lock(index_dir: Path) -> Iterator[None]:
    """Keep queries from opening Chroma's files, which it overwrites in place; wait for those that are opening them.

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
        yield True
    finally:
        lock.release()
