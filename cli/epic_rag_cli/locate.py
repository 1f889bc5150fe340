"""Which index folder a command means."""

from __future__ import annotations

import os
from pathlib import Path

from epic_rag.errors import IndexNotFoundError
from epic_rag_cli.defaults import INDEX_FOLDER

__all__ = ["display_path", "find_index", "index_dir_for"]


def find_index(given: Path | None) -> Path:
    """Return the index folder that a reading command works on.

    Args:
        given: What `--index-dir` or `EPIC_RAG_INDEX` says; None looks for `.epic-rag` in the working
            directory and its parents, as git does for its own folder.

    Raises:
        IndexNotFoundError: None is given and none is found.
    """
    if given is not None:
        return given
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / INDEX_FOLDER).is_dir():
            return folder / INDEX_FOLDER
    raise IndexNotFoundError(
        f"no index: neither {here} nor a folder above it holds {INDEX_FOLDER}, and --index-dir is not given; "
        "run `epic-rag index .` to index this folder"
    )


def index_dir_for(given: Path | None, first: Path) -> Path:
    """Return the index folder that `index` writes: the given one, or `.epic-rag` beside the first path."""
    if given is not None:
        return given
    return (first if first.is_dir() else first.parent) / INDEX_FOLDER


def display_path(path: str | os.PathLike[str]) -> str:
    """Return `path` as a person in the working directory would write it."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith("..") else relative
