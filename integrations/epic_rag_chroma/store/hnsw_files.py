"""Files of Chroma's HNSW graphs: a consistency check before Chroma reads them, and deletion of orphaned ones.

Chroma overwrites these files in place and does not notice a full disk. Version 1.5 passes them to a C++ loader that
trusts them: it reads beyond the end of a truncated file, and a wrong length makes the next write leap ahead in the
file, which then grows by gigabytes (chroma-core/chroma#7510). Comparing lengths costs next to nothing.
"""

from __future__ import annotations

import shutil
import sqlite3
import struct
import uuid
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from epic_rag_chroma.store.paths import CHROMA_FOLDER

__all__ = ["delete_orphaned_graphs", "hnsw_files_fit"]

_HEADER = struct.Struct("=I6QiI3QdQ")
_FILE_VERSION = 1
_LENGTH = struct.Struct("=I")


def hnsw_files_fit(index_dir: Path, collection: str) -> bool:
    """Return whether the lengths of a collection's graph files are consistent; True if they cannot be checked."""
    try:
        with closing(_database(index_dir)) as database:
            select = "SELECT id FROM segments WHERE scope = 'VECTOR' AND collection = ?"
            segments = [str(row[0]) for row in database.execute(select, (collection,))]
            return all(
                _folder_fits(index_dir / CHROMA_FOLDER / segment, _written(database, segment)) for segment in segments
            )
    except sqlite3.Error:
        return True  # Chroma will report the error


def delete_orphaned_graphs(index_dir: Path) -> None:
    """Delete graph files of deleted collections, which Chroma 1.5 leaves behind."""
    folder = index_dir / CHROMA_FOLDER
    try:
        with closing(_database(index_dir)) as database:
            known = {str(row[0]) for row in database.execute("SELECT id FROM segments")}
    except sqlite3.Error:
        return  # there is no database, or Chroma will report the error
    for path in folder.iterdir():
        if path.name not in known and _is_graph(path):
            shutil.rmtree(path, ignore_errors=True)  # on Windows a reader may have it open; the next run tries again


def _is_graph(path: Path) -> bool:
    try:
        return str(uuid.UUID(path.name)) == path.name and path.is_dir() and not path.is_symlink()
    except ValueError:
        return False


def _database(index_dir: Path) -> sqlite3.Connection:
    uri = f"{(index_dir / CHROMA_FOLDER / 'chroma.sqlite3').absolute().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True)


def _written(database: sqlite3.Connection, segment: str) -> bool:
    """Return whether Chroma's database records that a graph was written."""
    return database.execute("SELECT 1 FROM max_seq_id WHERE segment_id = ?", (segment,)).fetchone() is not None


def _folder_fits(folder: Path, is_written: bool) -> bool:
    try:
        if not folder.is_dir():
            return not is_written
        if not (folder / "index_metadata.pickle").is_file():
            return not is_written
        header = (folder / "header.bin").read_bytes()
        fields = _HEADER.unpack(header[: _HEADER.size])
        version, _, capacity, elements, stride, label_at, data_at, top_level, _, degree, *_ = fields
        if version != _FILE_VERSION:
            return True  # an unknown layout
        return (
            len(header) == _HEADER.size
            and capacity >= elements
            and data_at < label_at < stride
            and (folder / "data_level0.bin").stat().st_size >= elements * stride
            and (folder / "length.bin").stat().st_size >= elements * 4
            and _links_fit(folder / "link_lists.bin", elements, capacity, _Levels(degree, top_level))
        )
    except (OSError, struct.error):
        return False


class _Levels(NamedTuple):
    """Neighbours of a chunk on each level above the lowest, and the highest level."""

    degree: int
    top: int

    def is_valid(self, links: int) -> bool:
        """Return whether a chunk's neighbour lists can take that many bytes: 4 a neighbour, and 4 for the count."""
        return links % (4 * self.degree + 4) == 0 and 0 <= links <= self.longest

    @property
    def longest(self) -> int:
        return (4 * self.degree + 4) * max(self.top, 0)


def _links_fit(path: Path, elements: int, capacity: int, levels: _Levels) -> bool:
    # Checked before reading: a file that has grown may not fit into memory.
    if path.stat().st_size > capacity * (_LENGTH.size + levels.longest):
        return False
    links, at = path.read_bytes(), 0
    for _ in range(elements):
        if at + _LENGTH.size > len(links):
            return False
        (length,) = _LENGTH.unpack_from(links, at)
        if not levels.is_valid(length):
            return False
        at += _LENGTH.size + length
    return at <= len(links)
