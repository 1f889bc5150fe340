"""Synchronise an index with its files: change detection, chunking, embedding, storing.

`detect_changes` compares the files of a walk with the index: first by their stat results, then by the hash of their
bytes. `plan_sync` lists the changes that a run would make, without a model and without writing. `Sync` does it.

A batch is stored in one transaction. A file that is complete with it loses its stale chunks and gets its entry in the
same transaction; a file of several batches has an entry without a digest meanwhile, so that a run after a crash reads
it again.

A text is embedded once: if any file has a chunk with the same embedded text, its vector is reused.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from epic_rag.errors import MissingExtraError
from epic_rag_chroma.chunking import Chunk, chunk_document
from epic_rag_chroma.indexing.documents import DIGEST_LENGTH, chunk_records, document_id
from epic_rag_chroma.reading.document import BrokenFileError, Document, NotTextError
from epic_rag_chroma.reading.worker import IsolatedReader
from epic_rag_chroma.store.database import IndexDatabase, Record
from epic_rag_chroma.store.paths import DocumentKey, FileStamp
from epic_rag_chroma.store.state import FileEntry
from epic_rag_chroma.types import IndexPlan, IndexProgress, SkippedFile
from epic_rag_chroma.walk.files import FoundFile, Scan, read_file

if TYPE_CHECKING:
    from epic_rag import EpicEncoder

__all__ = ["BATCH_CHUNKS", "Sync", "detect_changes", "plan_sync"]

logger = logging.getLogger(__name__)

# Chunks that are collected before they are embedded: enough to sort by length across files, few enough for the memory.
BATCH_CHUNKS = 512
# Chunks that are embedded and stored at a time.
_WRITE_CHUNKS = 64
_DELETED_AT_ONCE = 100
# Entry of a file of which only some chunks are stored.
_INCOMPLETE = FileEntry("", 0)


@dataclass(frozen=True)
class Unchanged:
    """A file with the same content; `stamp` is set if it had to be read to find out."""

    stamp: FileStamp | None = None
    checked_ns: int = 0


@dataclass(frozen=True)
class Vanished:
    """A file that was deleted after the walk."""


@dataclass(frozen=True)
class Skipped:
    """A file that is not indexed; `keep` keeps the chunks that it has."""

    reason: str
    keep: bool


@dataclass(frozen=True)
class Changed:
    """A file with new content."""

    digest: str
    stamp: FileStamp
    checked_ns: int
    document: Document


@dataclass(frozen=True)
class FileChange:
    """The result of change detection for a file.

    Args:
        key: The file.
        entry: Its entry in the index; None for a new file.
        change: The difference.
        renamed_from: The deleted file whose content a new file has, if there is one.
    """

    key: DocumentKey
    entry: FileEntry | None
    change: Unchanged | Vanished | Skipped | Changed
    renamed_from: DocumentKey | None = None

    @property
    def is_kept(self) -> bool:
        """True if the file stays in the index."""
        return self.change.keep if isinstance(self.change, Skipped) else not isinstance(self.change, Vanished)


def detect_changes(
    entries: Mapping[DocumentKey, FileEntry],
    roots: Iterable[str],
    scans: dict[str, Scan],
    reader: IsolatedReader,
    before: Callable[[str], None] = lambda path: None,
) -> Iterator[FileChange]:
    """Compare the files of a walk with those of the index, and read those that changed.

    Args:
        entries: The indexed files.
        roots: The roots that were walked or deleted; files of other roots are kept.
        scans: The result of the walk by root. Files that may lie below an unreadable folder are kept.
        reader: Reads new content.
        before: Called with the path of each file before it is read.
    """
    deleted: defaultdict[str, list[DocumentKey]] = defaultdict(list)
    found = {(root, file.path) for root, scanned in scans.items() for file in scanned.files}
    for key in sorted(_deleted_files(entries, roots, scans, found), reverse=True):
        entry = entries[key]
        if entry.digest and entry.chunks:  # all empty files have the same content
            deleted[entry.digest].append(key)
    for root, scanned in scans.items():
        for file in scanned.files:
            before(file.path)
            file_entry = entries.get((root, file.path))
            change = _detect_change(file_entry, file, reader)
            source = None
            if file_entry is None and isinstance(change, Changed) and deleted.get(change.digest):
                source = deleted[change.digest].pop()  # each explains one new file
            yield FileChange((root, file.path), file_entry, change, source)


def _detect_change(
    entry: FileEntry | None, file: FoundFile, reader: IsolatedReader
) -> Unchanged | Vanished | Skipped | Changed:
    try:
        stamp = FileStamp.of(file.location.lstat())
        if entry is not None and entry.stat_unchanged(stamp):
            return Unchanged()
        checked_ns = time.time_ns()
        data, stamp = read_file(file)
    except FileNotFoundError:
        return Vanished()
    except OSError as error:
        return Skipped(f"cannot be read: {error.strerror}", keep=True)
    except NotTextError as error:
        return Skipped(str(error), keep=False)
    digest = hashlib.sha256(data).hexdigest()[:DIGEST_LENGTH]
    if entry is not None and entry.digest == digest:
        return Unchanged(stamp, checked_ns)
    try:
        document = reader.read(file.path, data, named=file.named)
    except NotTextError as error:
        return Skipped(str(error), keep=False)
    except (BrokenFileError, MissingExtraError) as error:
        return Skipped(str(error), keep=True)
    except Exception as error:  # a parser's bug with one file must not stop the run
        logger.warning("cannot parse %s", file.location, exc_info=True)
        return Skipped(f"cannot be parsed: {type(error).__name__}: {error}", keep=True)
    return Changed(digest, stamp, checked_ns, document)


def _deleted_files(
    entries: Mapping[DocumentKey, FileEntry],
    roots: Iterable[str],
    scans: dict[str, Scan],
    kept: Iterable[DocumentKey],
) -> Iterator[DocumentKey]:
    """Yield the indexed files that were deleted: all but those `kept`; see `detect_changes` for the other arguments."""
    known_roots, found = set(roots), set(kept)
    for root, path in entries:
        if root not in known_roots or (root, path) in found:
            continue
        unreadable = scans[root].unreadable if root in scans else []
        if not any(not folder or path == folder or path.startswith(folder.rstrip("/") + "/") for folder in unreadable):
            yield root, path


def plan_sync(
    entries: Mapping[DocumentKey, FileEntry],
    roots: Iterable[str],
    scans: dict[str, Scan],
    skipped: Iterable[SkippedFile],
    reader: IsolatedReader,
) -> IndexPlan:
    """Return the changes that a run would make; the arguments are those of `detect_changes`, and the missing roots."""
    known_roots = list(roots)
    added: list[str] = []
    changed: list[str] = []
    renamed: list[tuple[str, str]] = []
    all_skipped = [*skipped, *(file for scanned in scans.values() for file in scanned.skipped)]
    kept: set[DocumentKey] = set()
    sources: set[DocumentKey] = set()
    unchanged = 0
    for file in detect_changes(entries, known_roots, scans, reader):
        path = file.key[1]
        if isinstance(file.change, Skipped):
            all_skipped.append(SkippedFile(path, file.change.reason))
        elif isinstance(file.change, Unchanged):
            unchanged += 1
        elif file.renamed_from is not None:
            sources.add(file.renamed_from)
            renamed.append((file.renamed_from[1], path))
        elif isinstance(file.change, Changed):
            (added if file.entry is None else changed).append(path)
        if file.is_kept:
            kept.add(file.key)
    deleted = sorted(
        path for root, path in _deleted_files(entries, known_roots, scans, kept) if (root, path) not in sources
    )
    return IndexPlan(tuple(added), tuple(changed), tuple(deleted), tuple(renamed), unchanged, tuple(all_skipped))


@dataclass
class _PendingFile:
    """A file whose chunks are being stored; `stored` are the ids that it had before, `written` those of this run."""

    key: DocumentKey
    entry: FileEntry
    stored: set[str]
    written: set[str] = field(default_factory=set)
    failed: bool = False


@dataclass(frozen=True)
class _PendingChunk:
    """A chunk to be stored."""

    file: _PendingFile
    id: str
    chunk: Chunk
    metadata: dict[str, Any]
    embedded_hash: str


@dataclass
class Sync:
    """One synchronisation of an index with its files: call `run`, then read the counts.

    Args:
        database: The index.
        entries: The indexed files; updated by the run.
        encoder: Embeds chunks and counts tokens.
        encoder_lock: Held while the encoder is used.
        chunk_tokens: Maximum tokens of a chunk.
        chunk_overlap: Maximum tokens that chunks share.
        chunk_window: Maximum tokens of a chunk of whole lines.
        progress: Called after each step.
        batch_chunks: Number of chunks that are collected before they are embedded.
    """

    database: IndexDatabase
    entries: dict[DocumentKey, FileEntry]
    encoder: EpicEncoder
    encoder_lock: threading.Lock
    chunk_tokens: int
    chunk_overlap: int
    chunk_window: int
    progress: Callable[[IndexProgress], None]
    batch_chunks: int = BATCH_CHUNKS
    added: int = 0
    changed: int = 0
    deleted: int = 0
    renamed: int = 0
    unchanged: int = 0
    chunks_embedded: int = 0
    chunks_reused: int = 0
    skipped: list[SkippedFile] = field(default_factory=list)
    _kept: set[DocumentKey] = field(default_factory=set)
    _sources: set[DocumentKey] = field(default_factory=set)
    _restamped: dict[DocumentKey, FileEntry] = field(default_factory=dict)
    _buffer: list[_PendingChunk] = field(default_factory=list)
    _done: int = 0
    _total: int = 0

    def run(self, roots: Iterable[str], scans: dict[str, Scan]) -> None:
        """Store the chunks of new and changed files, then delete those of deleted files; see `detect_changes`."""
        known_roots = list(roots)
        self._total = sum(len(scanned.files) for scanned in scans.values())
        self.skipped += [file for scanned in scans.values() for file in scanned.skipped]
        with IsolatedReader() as reader:
            for file in detect_changes(self.entries, known_roots, scans, reader, self._report):
                if file.is_kept:
                    self._kept.add(file.key)
                if isinstance(file.change, Skipped):
                    self.skipped.append(SkippedFile(file.key[1], file.change.reason))
                elif isinstance(file.change, Unchanged):
                    self.unchanged += 1
                    if file.change.stamp is not None and file.entry is not None:
                        self._restamped[file.key] = replace(
                            file.entry, stamp=file.change.stamp, checked_ns=file.change.checked_ns
                        )
                elif isinstance(file.change, Changed):
                    self._add_file(file, file.change)
                self._done += 1
        self._flush()
        self._report(None)
        self._delete_files(list(_deleted_files(self.entries, known_roots, scans, self._kept)))
        if self._restamped:
            with self.database.transaction():
                for key, entry in self._restamped.items():
                    self._put_file(key, entry)

    def _add_file(self, file: FileChange, change: Changed) -> None:
        """Split a file into chunks and put them into the buffer."""
        with self.encoder_lock:
            chunks = chunk_document(
                change.document,
                max_tokens=self.chunk_tokens,
                overlap=self.chunk_overlap,
                window=self.chunk_window,
                count_tokens=self.encoder.count_tokens,
            )
        document = document_id(file.key)
        stored = set() if file.entry is None else self.database.ids_by_document([document])[document]
        entry = FileEntry(change.digest, len(chunks), change.stamp, change.checked_ns)
        pending = _PendingFile(file.key, entry, stored)
        if file.renamed_from is not None:
            self._sources.add(file.renamed_from)
            self.renamed += 1
            change_name = "renamed"
        elif file.entry is None:
            self.added += 1
            change_name = "new"
        else:
            self.changed += 1
            change_name = "changed"
        logger.info("%s: %s, %d chunks", file.key[1], change_name, len(chunks))
        if not chunks:
            with self.database.transaction():
                self._complete(pending)
        for chunk in _pending_chunks(pending, chunks, change.document.metadata):
            self._buffer.append(chunk)
            if len(self._buffer) >= self.batch_chunks:
                self._flush()

    def _flush(self) -> None:
        """Store the buffered chunks, those that need no model first."""
        chunks, self._buffer = self._buffer, []
        if not chunks:
            return
        waiting = len({id(chunk.file) for chunk in chunks})
        new = [chunk for chunk in chunks if chunk.id not in chunk.file.stored]
        vectors = self.database.vectors_by_hash({chunk.embedded_hash for chunk in new})
        known = [chunk for chunk in chunks if chunk.id in chunk.file.stored or chunk.embedded_hash in vectors]
        for start in range(0, len(known), self.batch_chunks):
            self._store(known[start : start + self.batch_chunks], vectors)
        self.chunks_reused += len(known)
        to_embed = [chunk for chunk in new if chunk.embedded_hash not in vectors]
        to_embed.sort(key=lambda chunk: chunk.chunk.tokens)
        step = min(_WRITE_CHUNKS, self.batch_chunks)
        for start in range(0, len(to_embed), step):
            self._embed(to_embed[start : start + step], vectors)
            share_left = 1 - min(1.0, (start + step) / len(to_embed))
            self._report(to_embed[start].file.key[1], waiting=waiting * share_left)

    def _embed(self, chunks: list[_PendingChunk], vectors: dict[str, npt.NDArray[np.float32]]) -> None:
        """Embed chunks, each text once, and store them; add their vectors to `vectors`."""
        texts = {chunk.embedded_hash: chunk.chunk.embedded for chunk in chunks if chunk.embedded_hash not in vectors}
        if texts:
            started = time.monotonic()
            with self.encoder_lock:
                embedded: npt.NDArray[np.float32] = self.encoder.encode_document(list(texts.values()))
            finite: npt.NDArray[np.bool_] = np.isfinite(embedded).all(axis=1, keepdims=False).reshape(-1)
            vectors.update({name: embedded[number] for number, name in enumerate(texts) if finite[number]})
            logger.info("embedded %d chunks in %.2f s", len(texts), time.monotonic() - started)
        for chunk in chunks:
            if chunk.embedded_hash not in vectors and not chunk.file.failed:
                chunk.file.failed = True
                self.skipped.append(
                    SkippedFile(chunk.file.key[1], "the model returns no finite vector for a part of it")
                )
        finite_chunks = [chunk for chunk in chunks if chunk.embedded_hash in vectors]
        self._store(finite_chunks, vectors)
        embedded_count = len(texts.keys() & vectors.keys())
        self.chunks_embedded += embedded_count
        self.chunks_reused += len(finite_chunks) - embedded_count

    def _store(self, chunks: list[_PendingChunk], vectors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Store chunks and the entries of their files in one transaction."""
        # A chunk with the same text in the same file keeps its row; only its metadata may change.
        stored = [chunk for chunk in chunks if chunk.id in chunk.file.stored]
        new = [chunk for chunk in chunks if chunk.id not in chunk.file.stored]
        with self.database.transaction():
            self.database.update_metadata([chunk.id for chunk in stored], [chunk.metadata for chunk in stored])
            self.database.put(
                [Record(chunk.id, chunk.chunk.text, chunk.metadata, vectors[chunk.embedded_hash]) for chunk in new]
            )
            for chunk in chunks:
                chunk.file.written.add(chunk.id)
            for file in {id(chunk.file): chunk.file for chunk in chunks}.values():
                if len(file.written) == file.entry.chunks:
                    self._complete(file)
                elif self.entries.get(file.key) != _INCOMPLETE:
                    self._put_file(file.key, _INCOMPLETE)

    def _complete(self, file: _PendingFile) -> None:
        """Delete the stale chunks of a file, and store its entry."""
        self.database.delete(file.stored - file.written)
        self._put_file(file.key, file.entry)

    def _put_file(self, key: DocumentKey, entry: FileEntry) -> None:
        self.database.put_file(key, entry)
        self.entries[key] = entry

    def _delete_files(self, keys: list[DocumentKey]) -> None:
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            self.progress(IndexProgress("deleting", start, len(keys), keys[start][1]))
            some = keys[start : start + _DELETED_AT_ONCE]
            with self.database.transaction():
                ids = self.database.ids_by_document([document_id(key) for key in some])
                self.database.delete({chunk for chunks in ids.values() for chunk in chunks})
                self.database.delete_files(some)
            for key in some:
                del self.entries[key]
                if key not in self._sources:
                    self.deleted += 1
                    logger.info("%s: deleted", key[1])

    def _report(self, path: str | None, *, waiting: float | None = None) -> None:
        """Report progress; files that were read and whose chunks are `waiting` to be embedded are not done."""
        if waiting is None:
            waiting = len({id(chunk.file) for chunk in self._buffer})
        self.progress(IndexProgress("indexing", max(0, self._done - math.ceil(waiting)), self._total, path))


def _pending_chunks(
    file: _PendingFile, chunks: list[Chunk], front_matter: dict[str, str | list[str]]
) -> Iterator[_PendingChunk]:
    """Yield the chunks of a file with ids and metadata."""
    for record in chunk_records(file.key, file.entry.digest, chunks, front_matter):
        yield _PendingChunk(file, record.id, record.chunk, record.metadata, record.embedded_hash)
