"""Settings of an index and its entries for files and for the Chroma mirror, as the database stores them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from epic_rag.errors import EpicError
from epic_rag_chroma.store.paths import FileStamp
from epic_rag_chroma.store.server import LOCAL, ServerPlace
from epic_rag_chroma.types import IndexSettings, StaleState

__all__ = ["CHUNKER_VERSION", "FileEntry", "IndexState", "MirrorState", "stale_state"]

# Increased whenever a file would be chunked or embedded differently; the next run then reads every file again.
CHUNKER_VERSION = 4
# A file can change without its stat data within one clock tick of the file system (2 s on FAT).
_RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class IndexState:
    """Settings of an index.

    Args:
        model: The model's display name.
        source: Its name or folder, from which it is loaded.
        fingerprint: The fingerprint of what made the vectors.
        dimension: Length of a vector.
        settings: Files and chunk sizes.
        roots: The indexed folders and files, relative to the index folder.
        truncate_dim: The dimension that vectors are truncated to; None for all of them.
        updated_at: End of the last complete run, ISO 8601; None before there was one.
        chunker_version: Version of the rules that split files into chunks.
        chroma: Place of the Chroma mirror: `LOCAL` for the index folder, `NO_CHROMA` for none, or a place on a server.
        last_run: Counts of the last complete run.
        parts: Folder or address of the Parquet files that the index is filled from; None for an index of folders.
    """

    model: str
    source: str
    fingerprint: str
    dimension: int
    settings: IndexSettings
    roots: tuple[str, ...]
    truncate_dim: int | None = None
    updated_at: str | None = None
    chunker_version: int = CHUNKER_VERSION
    chroma: ServerPlace | str = LOCAL
    last_run: dict[str, float] | None = None
    parts: str | None = None

    def to_json(self) -> str:
        """Return the state as JSON."""
        chroma = self.chroma if isinstance(self.chroma, str) else self.chroma.to_json()
        values = {**asdict(self), "chroma": chroma}
        if self.parts is None:
            del values["parts"]  # releases without it read every other index
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> IndexState:
        """Parse the result of `to_json`.

        Raises:
            ValueError: If it is something else.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            settings = {**content["settings"]}
            for name in ("include", "exclude"):
                settings[name] = tuple(map(str, settings[name]))
            chroma = content["chroma"]
            return cls(
                **{
                    **content,
                    "settings": IndexSettings(**settings),
                    "roots": tuple(map(str, content["roots"])),
                    "chroma": chroma if isinstance(chroma, str) else ServerPlace.from_json(chroma),
                }
            )
        except (KeyError, TypeError, AttributeError, RecursionError, EpicError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class FileEntry:
    """An indexed file.

    Args:
        digest: Hash of its bytes; "" if its chunks may be incomplete, so that the next run reads it again.
        chunks: Number of its chunks.
        stamp: Its stat data when it was read; None if unknown.
        checked_ns: The time of that.
    """

    digest: str
    chunks: int
    stamp: FileStamp | None = None
    checked_ns: int = 0

    def stat_unchanged(self, stamp: FileStamp) -> bool:
        """Return whether the stamp alone proves that the file is unchanged: it was old when it was taken."""
        return (
            self.digest != ""
            and self.stamp == stamp
            and self.checked_ns - max(stamp.mtime_ns, stamp.ctime_ns) > _RACY_NS
        )


@dataclass(frozen=True)
class MirrorState:
    """State of the Chroma mirror.

    Args:
        collection: Id of its collection; None before there was one.
        is_dirty: True from the first write to the collection until all of them have succeeded.
        is_behind: True if chunks have changed since.
    """

    collection: str | None = None
    is_dirty: bool = False
    is_behind: bool = False

    @property
    def is_complete(self) -> bool:
        """True if the collection has exactly the chunks of the index."""
        return self.collection is not None and not self.is_dirty and not self.is_behind


def stale_state(path: str, size: int | None, mtime_ns: int | None) -> StaleState | None:
    """Compare a file with its size and modification time when it was indexed.

    Inodes and change times do not count: those of a copied folder differ.

    Args:
        path: The file's absolute path.
        size: Its size in bytes; None if unknown.
        mtime_ns: Its modification time; None if unknown.

    Returns:
        The difference; None if there is none, or nothing to compare with.
    """
    try:
        info = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "deleted"
    except OSError:  # it may not be seen
        return None
    return None if size is None or (info.st_size == size and info.st_mtime_ns == mtime_ns) else "changed"
