"""The two small files beside the rows: `index.json` says what the index is, `manifest.json` which files it holds.

Both are replaced whole and only after they are safely on disk, so that a crash leaves the old one or the new one.
`index.json` is the truth about which collection counts. `manifest.json` is a cache of what the rows themselves say:
when it is missing, broken, not marked complete or about another collection, it is made again from them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from epic_rag.errors import EpicError
from epic_rag_chroma.errors import IndexMismatchError, IndexStateError
from epic_rag_chroma.store.paths import INDEX_FILE, MANIFEST_FILE, DocumentKey, FileStamp, write_atomically
from epic_rag_chroma.store.server import Place, ServerPlace
from epic_rag_chroma.types import IndexSettings

__all__ = ["FORMAT", "Entry", "IndexState", "Manifest"]


FORMAT = "epic-rag-index"
FORMAT_VERSION = 2
# Raised whenever the same file would be cut or embedded differently: an index of another version is rebuilt.
CHUNKER_VERSION = 2
_RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class IndexState:
    """What `index.json` says.

    `collection` is the id of the Chroma collection that counts; None before there is one. `chroma` is where that is, if
    it is on a server; None for the index folder.
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
        """Where the collection is."""
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
            any_version: Take an older version for what it is: to make the index anew.

        Raises:
            IndexMismatchError: If it is of an older version.
            IndexStateError: If it cannot be understood.
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
                    f"{FORMAT_VERSION}; run `epic-rag index --rebuild` with the indexed folder to make it anew"
                )
            if int(content["format_version"]) > FORMAT_VERSION:
                raise IndexStateError(
                    f"{path} has format {content['format_version']}, this version of epic-rag reads {FORMAT_VERSION}; "
                    "run `pip install --upgrade epic-rag`, or `epic-rag index --rebuild` to make the index anew"
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
    return IndexStateError(
        f"{path} cannot be read ({why}); run `epic-rag index --rebuild` with the indexed folder to make it anew"
    )


@dataclass(frozen=True)
class Entry:
    """What is known of an indexed file.

    Args:
        digest: Hash of its bytes; "" when its chunks may be incomplete, which makes the next run read it again.
        chunks: Number of its chunks.
        stamp: What the file system said when it was read; None if unknown.
        checked_ns: When that was.
    """

    digest: str
    chunks: int
    stamp: FileStamp | None = None
    checked_ns: int = 0

    def stat_unchanged(self, stamp: FileStamp) -> bool:
        """Whether the stamp alone proves that the file is what it was.

        A file that was written within the file system's clock tick of the reading can change without its stamp
        changing, so a stamp counts only if it was old when it was taken.
        """
        return (
            self.digest != ""
            and self.stamp == stamp
            and self.checked_ns - max(stamp.mtime_ns, stamp.ctime_ns) > _RACY_NS
        )


@dataclass
class Manifest:
    """What `manifest.json` says: the files of one collection. `complete` is false after a run that did not end."""

    collection: str
    entries: dict[DocumentKey, Entry] = field(default_factory=dict)
    complete: bool = False

    @property
    def chunks(self) -> int:
        """Number of chunks of all files."""
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
        """Read `manifest.json`; None if there is none that can be understood, since the rows have it all."""
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
        """Note that a file was read again and is what it was."""
        self.entries[key] = replace(self.entries[key], stamp=stamp, checked_ns=checked_ns)


def _stamp_row(stamp: FileStamp | None) -> tuple[int, ...]:
    return () if stamp is None else (stamp.size, stamp.mtime_ns, stamp.ctime_ns, stamp.inode)
