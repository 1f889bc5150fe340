"""`index.json`, the settings and the current collection of an index, and `manifest.json`, its files.

Both are replaced atomically. `index.json` defines which collection is current. `manifest.json` is a cache of what the
rows contain: if it is missing, broken, incomplete or of another collection, it is rebuilt from them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from epic_rag.errors import EpicError
from epic_rag.files import write_atomically
from epic_rag_chroma.errors import IndexMismatchError, IndexStateError
from epic_rag_chroma.store.paths import INDEX_FILE, MANIFEST_FILE, DocumentKey, FileStamp
from epic_rag_chroma.store.server import Place, ServerPlace
from epic_rag_chroma.types import IndexSettings

__all__ = ["FORMAT", "Entry", "IndexState", "Manifest"]


FORMAT = "epic-rag-index"
FORMAT_VERSION = 2
# Increased whenever a file would be chunked or embedded differently; an index of another version has to be rebuilt.
CHUNKER_VERSION = 2
_RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class IndexState:
    """Content of `index.json`.

    `collection` is the id of the current Chroma collection; None before there is one. `chroma` is its place on a
    server; None for the index folder.
    """

    model: str
    source: str
    fingerprint: str
    dimension: int
    settings: IndexSettings
    roots: tuple[str, ...]
    truncate_dim: int | None = None
    collection: str | None = None
    updated_at: str | None = None
    chunker_version: int = CHUNKER_VERSION
    chroma: ServerPlace | None = None
    last_run: dict[str, float] | None = None

    def place(self, index_dir: Path) -> Place:
        """Return the place of the collection."""
        return index_dir if self.chroma is None else self.chroma

    def save(self, index_dir: Path) -> None:
        """Write `index.json`."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        content["chroma"] = None if self.chroma is None else self.chroma.to_json()
        write_atomically(index_dir / INDEX_FILE, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, index_dir: Path, *, any_version: bool = False) -> IndexState | None:
        """Read `index.json`; None if there is none.

        Args:
            index_dir: The index folder.
            any_version: Also accept older versions, for a rebuild.

        Raises:
            IndexMismatchError: If it is of an older version.
            IndexStateError: If it cannot be parsed.
        """
        path = index_dir / INDEX_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise _broken(path, str(error)) from error
        try:
            content: Any = json.loads(text)
            if int(content["format_version"]) < FORMAT_VERSION and content["format"] == FORMAT and not any_version:
                raise IndexMismatchError(
                    f"{index_dir} has format {content['format_version']}, this version of epic-rag reads "
                    f"{FORMAT_VERSION}. Run `epic-rag index --rebuild` with the indexed folder."
                )
            if int(content["format_version"]) > FORMAT_VERSION:
                raise IndexStateError(
                    f"{path} has format {content['format_version']}, this version of epic-rag reads {FORMAT_VERSION}. "
                    "Run `pip install --upgrade epic-rag`, or rebuild with `epic-rag index --rebuild`."
                )
            if content["format"] != FORMAT:
                raise ValueError(f"format is {content['format']!r}")
            settings = dict(content["settings"])
            for name in ("include", "exclude"):
                settings[name] = tuple(map(str, settings[name]))
            return cls(
                model=str(content["model"]),
                source=str(content["source"]),
                fingerprint=str(content["fingerprint"]),
                dimension=int(content["dimension"]),
                settings=IndexSettings(**settings),
                roots=tuple(map(str, content["roots"])),
                truncate_dim=None if content["truncate_dim"] is None else int(content["truncate_dim"]),
                collection=None if content["collection"] is None else str(content["collection"]),
                updated_at=content["updated_at"],
                chunker_version=int(content["chunker_version"]),
                last_run=_numbers(content.get("last_run")),
                chroma=None if content.get("chroma") is None else ServerPlace.from_json(content["chroma"]),
            )
        except IndexStateError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, EpicError) as error:
            raise _broken(path, f"{type(error).__name__}: {error}") from error


def _numbers(content: dict[str, Any] | None) -> dict[str, float] | None:
    return None if content is None else {str(name): float(value) for name, value in content.items()}


def _broken(path: Path, why: str) -> IndexStateError:
    why = " ".join(why.split())[:120]
    return IndexStateError(f"{path} cannot be read ({why}). Run `epic-rag index --rebuild` with the indexed folder.")


@dataclass(frozen=True)
class Entry:
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
        """Return whether the stamp alone proves that the file is unchanged.

        A file can change without its stamp within one clock tick of the file system, so only stamps that were old when
        they were taken count.
        """
        return (
            self.digest != ""
            and self.stamp == stamp
            and self.checked_ns - max(stamp.mtime_ns, stamp.ctime_ns) > _RACY_NS
        )


@dataclass
class Manifest:
    """Content of `manifest.json`: the files of a collection. `complete` is false after an interrupted run."""

    collection: str
    entries: dict[DocumentKey, Entry] = field(default_factory=dict)
    complete: bool = False

    @property
    def chunks(self) -> int:
        """The number of chunks of all files."""
        return sum(entry.chunks for entry in self.entries.values())

    def save(self, index_dir: Path, *, complete: bool) -> None:
        """Write `manifest.json`."""
        self.complete = complete
        files = [
            [root, path, entry.digest, entry.chunks, entry.checked_ns, *_stamp_row(entry.stamp)]
            for (root, path), entry in sorted(self.entries.items())
        ]
        content = {"version": FORMAT_VERSION, "collection": self.collection, "complete": complete, "files": files}
        write_atomically(index_dir / MANIFEST_FILE, json.dumps(content, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, index_dir: Path) -> Manifest | None:
        """Read `manifest.json`; None if it is missing or broken, since it can be rebuilt from the rows."""
        try:
            content = json.loads((index_dir / MANIFEST_FILE).read_text(encoding="utf-8"))
            if content["version"] != FORMAT_VERSION:
                return None
            entries = {}
            for root, path, digest, chunks, checked_ns, *stamp in content["files"]:
                known = FileStamp(*map(int, stamp)) if stamp else None
                entries[(str(root), str(path))] = Entry(str(digest), int(chunks), known, int(checked_ns))
            return cls(str(content["collection"]), entries, bool(content["complete"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def restamp(self, key: DocumentKey, stamp: FileStamp, checked_ns: int) -> None:
        """Record that a file was read again and is unchanged."""
        self.entries[key] = replace(self.entries[key], stamp=stamp, checked_ns=checked_ns)


def _stamp_row(stamp: FileStamp | None) -> tuple[int, ...]:
    return () if stamp is None else (stamp.size, stamp.mtime_ns, stamp.ctime_ns, stamp.inode)
