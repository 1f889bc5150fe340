"""One writer at a time: a lock that the operating system drops when its process dies."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from epic_rag.errors import ConfigError, IndexLockedError

__all__ = ["HOLDER_FILE", "LOCK_FILE", "write_lock"]

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
