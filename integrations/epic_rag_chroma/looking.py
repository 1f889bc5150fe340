"""What has become of a file since it was indexed: found out by looking, without writing and without a model."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from epic_rag.errors import MissingExtraError
from epic_rag_chroma.document import Document
from epic_rag_chroma.files import FileStamp, FoundFile, Scan, read_file
from epic_rag_chroma.isolation import IsolatedReader
from epic_rag_chroma.manifest import DocumentKey, Entry, Manifest
from epic_rag_chroma.readers import BrokenFileError, NotTextError
from epic_rag_chroma.types import IndexPlan, SkippedFile

__all__ = ["Content", "Moves", "Skipped", "Unchanged", "Vanished", "gone", "look", "plan"]

logger = logging.getLogger(__name__)

_DIGEST = 32


@dataclass(frozen=True)
class Unchanged:
    """A file that is what it was; `stamp` is set if it had to be read to know."""

    stamp: FileStamp | None = None
    checked_ns: int = 0


@dataclass(frozen=True)
class Vanished:
    """A file that was deleted after the walk."""


@dataclass(frozen=True)
class Skipped:
    """A file that is not indexed; with `keep`, what was indexed of it stays."""

    reason: str
    keep: bool


@dataclass(frozen=True)
class Content:
    """A file with new content."""

    digest: str
    stamp: FileStamp
    checked_ns: int
    document: Document


def look(entry: Entry | None, file: FoundFile, reader: IsolatedReader) -> Unchanged | Vanished | Skipped | Content:
    """See what has become of a file.

    Args:
        entry: What the index has of it.
        file: The file.
        reader: Reads new content.
    """
    try:
        stamp = FileStamp.of(file.location.lstat())
        if entry is not None and entry.surely_unchanged(stamp):
            return Unchanged()
        checked_ns = time.time_ns()
        data, stamp = read_file(file)
    except FileNotFoundError:
        return Vanished()
    except OSError as error:
        return Skipped(f"cannot be read: {error.strerror}", keep=True)
    except NotTextError as error:
        return Skipped(str(error), keep=False)
    digest = hashlib.sha256(data).hexdigest()[:_DIGEST]
    if entry is not None and entry.digest == digest:
        return Unchanged(stamp, checked_ns)
    try:
        document = reader.read(file.path, data)
    except NotTextError as error:
        return Skipped(str(error), keep=False)
    except (BrokenFileError, MissingExtraError) as error:
        return Skipped(str(error), keep=True)
    except Exception as error:  # a parser's fault with one file must not cost the others
        logger.warning("cannot parse %s", file.location, exc_info=True)
        return Skipped(f"cannot be parsed: {type(error).__name__}: {error}", keep=True)
    return Content(digest, stamp, checked_ns, document)


def gone(
    manifest: Manifest, roots: Iterable[str], scans: dict[str, Scan], kept: Iterable[DocumentKey]
) -> Iterator[DocumentKey]:
    """The files that leave the index.

    Args:
        manifest: What the index has.
        roots: Roots whose files are all either in `scans` or gone.
        scans: What was found; nothing is gone that may lie in a folder which could not be read.
        kept: Files that stay.
    """
    gone_roots = set(roots)
    stay = set(kept)
    hidden = {root: found.unreadable for root, found in scans.items()}
    for root, path in manifest.entries:
        if root in gone_roots and (root, path) not in stay and not _is_below(path, hidden.get(root, [])):
            yield root, path


def _is_below(path: str, folders: list[str]) -> bool:
    return any(not folder or path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


class Moves:
    """Tells a file that was renamed or moved from one that is new: another with its content is gone.

    Args:
        manifest: What the index has.
        roots: As for `gone`.
        scans: As for `gone`.
    """

    def __init__(self, manifest: Manifest, roots: Iterable[str], scans: dict[str, Scan]) -> None:
        self._left: defaultdict[str, list[DocumentKey]] = defaultdict(list)
        found = {(root, file.path) for root, scanned in scans.items() for file in scanned.files}
        for key in gone(manifest, roots, scans, found):
            entry = manifest.entries[key]
            if entry.digest and entry.chunks:  # empty files are all alike
                self._left[entry.digest].append(key)
        for keys in self._left.values():
            keys.sort(reverse=True)

    def source(self, digest: str) -> DocumentKey | None:
        """The file that a new one with this content was; each answers for one."""
        left = self._left.get(digest)
        return left.pop() if left else None


def plan(
    manifest: Manifest,
    roots: Iterable[str],
    scans: dict[str, Scan],
    skipped: Iterable[SkippedFile],
    reader: IsolatedReader,
) -> IndexPlan:
    """What a run would do.

    Args:
        manifest: What the index has.
        roots: As for `gone`.
        scans: As for `gone`.
        skipped: What the walk skipped.
        reader: Reads new content.
    """
    known_roots = list(roots)
    moves = Moves(manifest, known_roots, scans)
    added: list[str] = []
    changed: list[str] = []
    renamed: list[tuple[str, str]] = []
    skips = [*skipped, *(skip for found in scans.values() for skip in found.skipped)]
    kept: set[DocumentKey] = set()
    moved: set[DocumentKey] = set()
    unchanged = 0
    for root, found in scans.items():
        for file in found.files:
            key = (root, file.path)
            entry = manifest.entries.get(key)
            seen = look(entry, file, reader)
            if isinstance(seen, Skipped):
                skips.append(SkippedFile(file.path, seen.reason))
                if seen.keep:
                    kept.add(key)
            elif isinstance(seen, Unchanged):
                unchanged += 1
                kept.add(key)
            elif isinstance(seen, Content):
                kept.add(key)
                source = moves.source(seen.digest) if entry is None else None
                if source is not None:
                    moved.add(source)
                    renamed.append((source[1], file.path))
                elif entry is None:
                    added.append(file.path)
                else:
                    changed.append(file.path)
    deleted = sorted(path for root, path in gone(manifest, known_roots, scans, kept) if (root, path) not in moved)
    return IndexPlan(tuple(added), tuple(changed), tuple(deleted), tuple(renamed), unchanged, tuple(skips))
