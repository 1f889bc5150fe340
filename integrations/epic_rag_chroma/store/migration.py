"""Migration of indexes of format 2: `index.json`, `manifest.json`, and rows and keywords in a database each.

The rows are copied, so nothing is embedded again; the Chroma collection is filled afresh from them.
"""

from __future__ import annotations

import json
import logging
import shlex
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from epic_rag.errors import EpicError
from epic_rag_chroma.errors import IndexMismatchError, IndexStateError
from epic_rag_chroma.store.database import IndexDatabase, Record, is_readable
from epic_rag_chroma.store.paths import OLD_INDEX_FILE, OLD_INDEX_MARK, DocumentKey, FileStamp
from epic_rag_chroma.store.server import LOCAL, ServerPlace
from epic_rag_chroma.store.state import FileEntry, IndexState

__all__ = ["OLD_PATTERNS", "check_migrated", "is_old_index", "migrate", "old_place"]

logger = logging.getLogger(__name__)

# Rows and words were in files named after the collection's UUID.
_UUID = "-".join("?" * length for length in (8, 4, 4, 4, 12))
OLD_PATTERNS = (
    f"records-{_UUID}.sqlite",
    f"records-{_UUID}.sqlite-*",
    f"keywords-{_UUID}.sqlite",
    f"keywords-{_UUID}.sqlite-*",
    ".*.json-*",
    "running.json",
    "running.next",
    "manifest.json",
)
_PAGE = 1000


_MARK_WITHIN = 400


def is_old_index(index_dir: Path) -> bool:
    """Return whether a folder has an index of format 2 or older; also one whose `index.json` is damaged or lost."""
    try:
        with open(index_dir / OLD_INDEX_FILE, "rb") as file:
            if OLD_INDEX_MARK in file.read(_MARK_WITHIN):
                return True
    except FileNotFoundError:
        pass
    except OSError:
        return False
    return any(index_dir.glob(OLD_PATTERNS[0]))


def check_migrated(index_dir: Path) -> None:
    """Refuse to read an index of format 2.

    Raises:
        IndexMismatchError: If the folder has one.
    """
    if is_old_index(index_dir):
        raise IndexMismatchError(
            f"The index in {index_dir} has the format of an older version. Run `epic-rag index --index-dir "
            f"{shlex.quote(str(index_dir))}` to convert it; stored text is not embedded again."
        )


def migrate(index_dir: Path, database: IndexDatabase) -> None:
    """Copy an index of format 2 into an empty database in one transaction, and delete its files.

    If the database has a state, the copy was complete and only the files are deleted.

    Raises:
        IndexMismatchError: If it has another format, or its rows are lost.
        IndexStateError: If a file may not be read, or the database cannot be written.
    """
    path = index_dir / OLD_INDEX_FILE
    if database.state() is not None:
        delete_old(index_dir)
        return
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["format_version"]) != ("epic-rag-index", 2):
            raise ValueError(f"format {content['format_version']}")
        collection = content["collection"]
        place = content.get("chroma")
        for name in ("format", "format_version", "collection"):
            del content[name]
        state = IndexState.from_json(json.dumps({**content, "chroma": LOCAL if place is None else place}))
        entries = _files(index_dir, collection)
        chunks: Counter[DocumentKey] = Counter()
        with database.transaction():
            for records in _records(index_dir, collection):
                database.put(records)
                chunks.update((str(each.metadata["root"]), str(each.metadata["path"])) for each in records)
            for key in {**entries, **chunks}:
                entry = entries.get(key)
                # A file of unknown state, or one that has lost rows, is read again.
                database.put_file(key, entry if entry and entry.chunks == chunks[key] else FileEntry("", chunks[key]))
            database.save_state(state)
        database.begin_mirror(None)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IndexMismatchError(
            f"The index in {index_dir} has the format of an older version and cannot be converted ({error}). "
            "Run `epic-rag index --rebuild` with the indexed folder."
        ) from error
    logger.info("converted the index in %s: %d chunks", index_dir, database.count())
    delete_old(index_dir)


def delete_old(index_dir: Path) -> None:
    """Delete the files of format 2, except the Chroma folder."""
    for pattern in (*OLD_PATTERNS, OLD_INDEX_FILE):
        for path in index_dir.glob(pattern):
            path.unlink(missing_ok=True)


def old_place(index_dir: Path) -> ServerPlace | None:
    """Return the place on a server of an index of format 2; None if it has none or cannot be read."""
    try:
        return ServerPlace.from_json(json.loads((index_dir / OLD_INDEX_FILE).read_text(encoding="utf-8"))["chroma"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, EpicError):
        return None


def _files(index_dir: Path, collection: str | None) -> dict[DocumentKey, FileEntry]:
    """Return the files of the manifest; none if it is missing or damaged, or does not describe the rows."""
    try:
        content = json.loads((index_dir / "manifest.json").read_text(encoding="utf-8"))
        if content["version"] != 2 or content["collection"] != collection or not content["complete"]:
            return {}
        if (index_dir / "running.json").exists():
            return {}
        return {
            (str(root), str(path)): FileEntry(
                str(digest), int(chunks), FileStamp(*map(int, stamp)) if stamp else None, int(checked_ns)
            )
            for root, path, digest, chunks, checked_ns, *stamp in content["files"]
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _records(index_dir: Path, collection: str | None) -> Iterator[list[Record]]:
    if collection is None:
        return
    path = index_dir / f"records-{collection}.sqlite"
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if not is_readable(path):
        raise IndexStateError(f"{path} may not be read (permission denied). Change its permissions.")
    try:
        with closing(sqlite3.connect(path)) as connection:
            rows = connection.execute("SELECT id, text, metadata, vector FROM records ORDER BY id")
            while page := rows.fetchmany(_PAGE):
                yield [
                    Record(row_id, text, json.loads(metadata), np.frombuffer(vector, dtype="<f4"))
                    for row_id, text, metadata, vector in page
                ]
    except sqlite3.Error as error:
        raise ValueError(f"{path}: {error}") from error
