"""Another user, without the rights of root."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import epic_rag

NOBODY = 65534


@contextmanager
def as_another_user() -> Iterator[None]:
    """Give up the rights of root for the block. Modules must have been imported before."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def require_reachable_packages() -> None:
    """Skip a test whose other user reads files of the packages, in a checkout that only root can enter."""
    closed = [folder for folder in Path(epic_rag.__file__).parents if not folder.stat().st_mode & stat.S_IXOTH]
    if os.geteuid() == 0 and closed:
        pytest.skip(f"other users cannot enter {closed[-1]}, which holds the packages")


def make_readable(folder: Path) -> None:
    """Let every user read a folder of pytest's and what is in it."""
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o755)
        if parent.name.startswith("pytest-of"):
            break
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
