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

from epic_rag.errors import IndexLockedError

__all__ = ["HOLDER_FILE", "LOCK_FILE", "write_lock"]

LOCK_FILE = "lock"
# Beside the lock, not in it: some versions of filelock truncate the lock file when they try it.
HOLDER_FILE = "lock.holder"


@contextmanager
def write_lock(index_dir: Path) -> Iterator[None]:
    """Hold the right to write to an index.

    The lock is the operating system's, on an open file: a process that dies gives it up, so a stale lock file holds
    nobody back.

    Raises:
        IndexLockedError: If another process (or another indexer of this one) holds it; says which.
    """
    lock = FileLock(str(index_dir / LOCK_FILE), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise IndexLockedError(
            f"{index_dir} is being written by {_holder(index_dir)}; wait until it is done (or stop it), "
            "then run `epic-rag index` again"
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
