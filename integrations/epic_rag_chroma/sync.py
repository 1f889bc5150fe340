"""One run of the indexer: make a collection say what the files say.

The order of writes makes every crash harmless: the manifest is first marked incomplete; a file's new chunks are
embedded and stored before its stale ones are deleted; the manifest is marked complete at the end. Between the two
marks Chroma's own rows are the truth, and each of them says which file and which content it belongs to, so the next
run sees what is whole (and keeps it), and what is not (and reads that file again).
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from epic_rag.errors import MissingExtraError
from epic_rag_chroma.chunking import HEADING_SEPARATOR, Chunk, chunk_document
from epic_rag_chroma.files import FileStamp, FoundFile, Scan
from epic_rag_chroma.manifest import DocumentKey, Entry, Manifest
from epic_rag_chroma.readers import BrokenFileError, NotTextError, byte_limit, read_document
from epic_rag_chroma.types import IndexProgress, SkippedFile

if TYPE_CHECKING:
    from epic_rag import EpicEncoder
    from epic_rag_chroma.store import ChunkStore, Metadata

__all__ = ["Sync", "recover"]

logger = logging.getLogger(__name__)

# Chunks that are embedded together: enough to sort by length across files, few enough to hold in memory.
_BATCH_CHUNKS = 512
_SLICE_CHUNKS = 64
_GONE_AT_ONCE = 100
_DIGEST = 32


@dataclass
class _Pending:
    """A file whose chunks are on their way."""

    key: DocumentKey
    entry: Entry
    total: int
    known: set[str]
    written: set[str] = field(default_factory=set)
    failed: bool = False


@dataclass(frozen=True)
class _Row:
    """A chunk on its way."""

    owner: _Pending
    id: str
    chunk: Chunk
    metadata: Metadata


@dataclass
class Sync:
    """The state of a run; `files`, then `forget`, then read the counts.

    Args:
        index_dir: The index folder.
        store: The collection to bring up to date.
        manifest: What it holds; kept up to date.
        encoder: Embeds and counts tokens.
        encoder_lock: Held while the encoder works.
        chunk_tokens: The most tokens of a chunk.
        chunk_overlap: The most tokens that chunks share.
        progress: Told after each step.
    """

    index_dir: Path
    store: ChunkStore
    manifest: Manifest
    encoder: EpicEncoder
    encoder_lock: threading.Lock
    chunk_tokens: int
    chunk_overlap: int
    progress: Callable[[IndexProgress], None]
    added: int = 0
    changed: int = 0
    deleted: int = 0
    unchanged: int = 0
    chunks_embedded: int = 0
    skipped: list[SkippedFile] = field(default_factory=list)
    kept: set[DocumentKey] = field(default_factory=set)
    _buffer: list[_Row] = field(default_factory=list)
    _done: int = 0
    _total: int = 0
    _waiting: float = 0.0

    def files(self, scans: dict[str, Scan]) -> None:
        """Bring the rows of files up to date.

        Args:
            scans: For each root (its path relative to the index folder) what was found there.
        """
        self._total = sum(len(found.files) for found in scans.values())
        for root, found in scans.items():
            self.skipped += found.skipped
            for file in found.files:
                self._tell("indexing", file.path)
                self._file((root, file.path), file)
                self._done += 1
        self._flush()
        self._tell("indexing", None)

    def forget(self, roots: Iterable[str], scans: dict[str, Scan]) -> None:
        """Delete the rows of files that are gone.

        Args:
            roots: Roots whose files are all either in `scans` or gone.
            scans: What was found; nothing is gone that may lie in a folder which could not be read.
        """
        gone_roots = set(roots)
        hidden = {root: found.unreadable for root, found in scans.items()}
        gone = [
            (root, path)
            for root, path in self.manifest.entries
            if root in gone_roots and (root, path) not in self.kept and not _is_below(path, hidden.get(root, []))
        ]
        for start in range(0, len(gone), _GONE_AT_ONCE):
            self.progress(IndexProgress("deleting", start, len(gone), gone[start][1]))
            some = gone[start : start + _GONE_AT_ONCE]
            self._begin_writing()
            ids = self.store.ids_by_document([document_id(key) for key in some])
            self.store.delete([row for rows in ids.values() for row in sorted(rows)])
            for key in some:
                del self.manifest.entries[key]
                self.deleted += 1

    def _file(self, key: DocumentKey, file: FoundFile) -> None:
        entry = self.manifest.entries.get(key)
        try:
            stamp = FileStamp.of(file.location.stat())
            if entry is not None and entry.surely_unchanged(stamp):
                self.unchanged += 1
                self.kept.add(key)
                return
            checked_ns = time.time_ns()
            if stamp.size > byte_limit(file.path):
                raise NotTextError(f"larger than {byte_limit(file.path) // 2**20} MiB")
            data = file.location.read_bytes()
        except FileNotFoundError:
            return  # deleted since the walk
        except OSError as error:
            self._skip(key, f"cannot be read: {error.strerror}", keep=True)
            return
        except NotTextError as error:
            self._skip(key, str(error), keep=False)
            return
        digest = hashlib.sha256(data).hexdigest()[:_DIGEST]
        if entry is not None and entry.digest == digest:
            self.manifest.restamp(key, stamp, checked_ns)
            self.unchanged += 1
            self.kept.add(key)
            return
        try:
            document = read_document(file.path, data)
        except NotTextError as error:
            self._skip(key, str(error), keep=False)
            return
        except (BrokenFileError, MissingExtraError) as error:
            self._skip(key, str(error), keep=True)
            return
        except Exception as error:  # a parser's fault with one file must not cost the others
            logger.warning("cannot parse %s", file.location, exc_info=True)
            self._skip(key, f"cannot be parsed: {type(error).__name__}: {error}", keep=True)
            return
        del data
        with self.encoder_lock:
            chunks = chunk_document(
                document,
                max_tokens=self.chunk_tokens,
                overlap=self.chunk_overlap,
                count_tokens=self.encoder.count_tokens,
            )
        self.kept.add(key)
        self._enqueue(key, entry, Entry(digest, len(chunks), stamp, checked_ns), chunks)

    def _enqueue(self, key: DocumentKey, old: Entry | None, new: Entry, chunks: list[Chunk]) -> None:
        self._begin_writing()
        known = set() if old is None else self.store.ids_by_document([document_id(key)])[document_id(key)]
        pending = _Pending(key, new, len(chunks), known)
        if old is None:
            self.added += 1
        else:
            self.changed += 1
        if not chunks:
            self._finish(pending)
        for row in _rows(pending, chunks):
            self._buffer.append(row)
            if len(self._buffer) >= _BATCH_CHUNKS:
                self._flush()

    def _flush(self) -> None:
        """Store what is in the buffer; then, for each file that is complete, delete what is stale."""
        rows, self._buffer = self._buffer, []
        if not rows:
            return
        waiting = len({id(row.owner) for row in rows})
        known = [row for row in rows if row.id in row.owner.known]
        # A chunk that only moved has its vector already.
        self.store.update_metadata([row.id for row in known], [row.metadata for row in known])
        for row in known:
            row.owner.written.add(row.id)
        new = sorted((row for row in rows if row.id not in row.owner.known), key=lambda row: row.chunk.tokens)
        for start in range(0, len(new), _SLICE_CHUNKS):
            self._embed(new[start : start + _SLICE_CHUNKS])
            self._waiting = waiting * (1 - min(1.0, (start + _SLICE_CHUNKS) / len(new)))
            self._tell("indexing", new[start].owner.key[1])
        self._waiting = 0.0
        for pending in {id(row.owner): row.owner for row in rows}.values():
            if len(pending.written) == pending.total:
                self._finish(pending)

    def _embed(self, rows: list[_Row]) -> None:
        with self.encoder_lock:
            vectors: npt.NDArray[np.float32] = self.encoder.encode_document([row.chunk.embedded for row in rows])
        good: npt.NDArray[np.bool_] = np.isfinite(vectors).all(axis=1, keepdims=False).reshape(-1)
        for row, fine in zip(rows, good, strict=True):
            if not fine and not row.owner.failed:
                row.owner.failed = True
                self.manifest.entries[row.owner.key] = Entry("", 0)
                self._skip(row.owner.key, "the model gives no finite vector for a part of it", keep=True)
        kept = [row for row, fine in zip(rows, good, strict=True) if fine]
        self.store.upsert(
            [row.id for row in kept],
            vectors[good],
            [row.chunk.text for row in kept],
            [row.metadata for row in kept],
        )
        self.chunks_embedded += len(kept)
        for row in kept:
            row.owner.written.add(row.id)

    def _finish(self, pending: _Pending) -> None:
        self.store.delete(sorted(pending.known - pending.written))
        self.manifest.entries[pending.key] = pending.entry

    def _begin_writing(self) -> None:
        if self.manifest.complete:
            self.manifest.save(self.index_dir, complete=False)

    def _skip(self, key: DocumentKey, reason: str, *, keep: bool) -> None:
        self.skipped.append(SkippedFile(key[1], reason))
        if keep:
            self.kept.add(key)

    def _tell(self, stage: str, path: str | None) -> None:
        # Files that have been read but not embedded are not done.
        waiting = self._waiting or len({id(row.owner) for row in self._buffer})
        self.progress(IndexProgress(stage, max(0, self._done - math.ceil(waiting)), self._total, path))


def _is_below(path: str, folders: list[str]) -> bool:
    return any(not folder or path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def document_id(key: DocumentKey) -> str:
    """The id of a file in its index."""
    return _hash(*key)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_DIGEST]


def _rows(pending: _Pending, chunks: list[Chunk]) -> Iterator[_Row]:
    """Rows of a file. An id follows from the file, what is embedded and the text, so an unchanged chunk keeps its."""
    root, path = pending.key
    document = document_id(pending.key)
    seen: Counter[tuple[str, str]] = Counter()
    for chunk in chunks:
        same = (chunk.embedded, chunk.text)
        row_id = _hash(document, *same, str(seen[same]))
        seen[same] += 1
        metadata: dict[str, Any] = {
            "path": path,
            "root": root,
            "doc_id": document,
            "content_hash": pending.entry.digest,
            "chunks": len(chunks),
            "heading_path": HEADING_SEPARATOR.join(chunk.heading_path),
            "first_line": chunk.first_line,
            "last_line": chunk.last_line,
            "page": chunk.page,
        }
        yield _Row(pending, row_id, chunk, metadata)


def recover(store: ChunkStore) -> Manifest:
    """Make a manifest from the rows of a collection.

    A file whose rows all belong to one content and are all there counts as that content. Any other gets an empty
    digest: it is read again, or its rows go if it is gone.
    """
    versions: dict[DocumentKey, Counter[tuple[str, int]]] = {}
    for _, metadata in store.scan():
        key = (str(metadata.get("root", "")), str(metadata.get("path", "")))
        version = (str(metadata.get("content_hash", "")), int(metadata.get("chunks", 0)))
        versions.setdefault(key, Counter())[version] += 1
    manifest = Manifest(store.id)
    for key, counted in versions.items():
        (digest, total), rows = next(iter(counted.items()))
        whole = len(counted) == 1 and rows == total
        manifest.entries[key] = Entry(digest if whole else "", counted.total() if not whole else total)
    logger.info("made the manifest again from %d files in the collection", len(manifest.entries))
    return manifest
