"""One run of the indexer: make a collection say what the files say.

The order of writes makes every crash harmless: the run is first marked as begun; a file's new chunks are embedded and
stored before its stale ones are deleted; the mark goes at the end. Between the two the rows themselves are the truth,
and each of them says which file and which content it belongs to, so the next run sees what is whole (and keeps it),
and what is not (and reads that file again).

The model reads a text once: what has a vector already, under whatever file, is stored with that vector.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from epic_rag.errors import MissingExtraError
from epic_rag_chroma.chunking import HEADING_SEPARATOR, Chunk, chunk_document
from epic_rag_chroma.indexing.writer import IndexWriter
from epic_rag_chroma.reading.document import BrokenFileError, Document, NotTextError
from epic_rag_chroma.reading.file_types import kind_of, language_of
from epic_rag_chroma.reading.worker import IsolatedReader
from epic_rag_chroma.store.database import Record
from epic_rag_chroma.store.paths import DocumentKey, FileStamp
from epic_rag_chroma.store.state import Entry, Manifest
from epic_rag_chroma.types import IndexPlan, IndexProgress, SkippedFile
from epic_rag_chroma.walk.files import FoundFile, Scan, read_file

if TYPE_CHECKING:
    from epic_rag import EpicEncoder

__all__ = ["Content", "Moves", "Skipped", "Sync", "Unchanged", "Vanished", "gone", "look", "plan"]


# --- from looking
# What has become of a file since it was indexed: found out by looking, without writing and without a model.

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


# Chunks that are embedded together: enough to sort by length across files, few enough to hold in memory.
_BATCH_CHUNKS = 512
_SLICE_CHUNKS = 64
_GONE_AT_ONCE = 100


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
    metadata: dict[str, Any]

    @property
    def embedded_hash(self) -> str:
        """Names what the model reads."""
        return str(self.metadata["embedded_hash"])


@dataclass
class Sync:
    """The state of a run; `files`, then `forget`, then read the counts.

    Args:
        writer: What to bring up to date.
        manifest: What it holds; kept up to date.
        encoder: Embeds and counts tokens.
        encoder_lock: Held while the encoder works.
        chunk_tokens: The most tokens of a chunk.
        chunk_overlap: The most tokens that chunks share.
        progress: Told after each step.
    """

    writer: IndexWriter
    manifest: Manifest
    encoder: EpicEncoder
    encoder_lock: threading.Lock
    chunk_tokens: int
    chunk_overlap: int
    progress: Callable[[IndexProgress], None]
    added: int = 0
    changed: int = 0
    deleted: int = 0
    renamed: int = 0
    unchanged: int = 0
    chunks_embedded: int = 0
    chunks_reused: int = 0
    skipped: list[SkippedFile] = field(default_factory=list)
    kept: set[DocumentKey] = field(default_factory=set)
    _moves: Moves | None = None
    _moved: set[DocumentKey] = field(default_factory=set)
    _reader: IsolatedReader = field(default_factory=IsolatedReader)
    _buffer: list[_Row] = field(default_factory=list)
    _done: int = 0
    _total: int = 0
    _waiting: float = 0.0

    def files(self, roots: Iterable[str], scans: dict[str, Scan]) -> None:
        """Bring the rows of files up to date.

        Args:
            roots: Roots whose files are all either in `scans` or gone.
            scans: For each root (its path relative to the index folder) what was found there.
        """
        self._moves = Moves(self.manifest, roots, scans)
        self._total = sum(len(found.files) for found in scans.values())
        for root, found in scans.items():
            self.skipped += found.skipped
            with self._reader:
                for file in found.files:
                    self._tell("indexing", file.path)
                    self._file((root, file.path), file)
                    self._done += 1
        self._flush()
        self._tell("indexing", None)

    def forget(self, roots: Iterable[str], scans: dict[str, Scan]) -> None:
        """Delete the rows of files that are gone.

        Args:
            roots: As for `files`.
            scans: What was found; nothing is gone that may lie in a folder which could not be read.
        """
        leaving = list(gone(self.manifest, roots, scans, self.kept))
        for start in range(0, len(leaving), _GONE_AT_ONCE):
            self.progress(IndexProgress("deleting", start, len(leaving), leaving[start][1]))
            some = leaving[start : start + _GONE_AT_ONCE]
            self.writer.begin()
            ids = self.writer.ids_by_document([document_id(key) for key in some])
            self.writer.delete([row for rows in ids.values() for row in sorted(rows)])
            for key in some:
                del self.manifest.entries[key]
                if key not in self._moved:
                    self.deleted += 1
                    logger.info("%s: gone", key[1])

    def _file(self, key: DocumentKey, file: FoundFile) -> None:
        entry = self.manifest.entries.get(key)
        seen = look(entry, file, self._reader)
        if isinstance(seen, Skipped):
            self._skip(key, seen.reason, keep=seen.keep)
        elif isinstance(seen, Unchanged):
            if seen.stamp is not None:
                self.manifest.restamp(key, seen.stamp, seen.checked_ns)
            self.unchanged += 1
            self.kept.add(key)
        elif isinstance(seen, Content):
            with self.encoder_lock:
                chunks = chunk_document(
                    seen.document,
                    max_tokens=self.chunk_tokens,
                    overlap=self.chunk_overlap,
                    count_tokens=self.encoder.count_tokens,
                )
            self.kept.add(key)
            self._enqueue(key, entry, Entry(seen.digest, len(chunks), seen.stamp, seen.checked_ns), chunks)

    def _enqueue(self, key: DocumentKey, old: Entry | None, new: Entry, chunks: list[Chunk]) -> None:
        self.writer.begin()
        known = set() if old is None else self.writer.ids_by_document([document_id(key)])[document_id(key)]
        pending = _Pending(key, new, len(chunks), known)
        source = self._moves.source(new.digest) if old is None and self._moves is not None else None
        if source is not None:
            self._moved.add(source)
            self.renamed += 1
        elif old is None:
            self.added += 1
        else:
            self.changed += 1
        what = "renamed" if source is not None else "new" if old is None else "changed"
        logger.info("%s: %s, %d passages", key[1], what, len(chunks))
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
        # A chunk that only moved within its file keeps its row.
        self.writer.update_metadata([row.id for row in known], [row.metadata for row in known])
        self.chunks_reused += len(known)
        for row in known:
            row.owner.written.add(row.id)
        new = [row for row in rows if row.id not in row.owner.known]
        vectors = self.writer.vectors_by_hash({row.embedded_hash for row in new})
        reused = [row for row in new if row.embedded_hash in vectors]
        self._store(reused, vectors)
        self.chunks_reused += len(reused)
        to_embed = sorted((row for row in new if row.embedded_hash not in vectors), key=lambda row: row.chunk.tokens)
        for start in range(0, len(to_embed), _SLICE_CHUNKS):
            self._embed(to_embed[start : start + _SLICE_CHUNKS], vectors)
            self._waiting = waiting * (1 - min(1.0, (start + _SLICE_CHUNKS) / len(to_embed)))
            self._tell("indexing", to_embed[start].owner.key[1])
        self._waiting = 0.0
        for pending in {id(row.owner): row.owner for row in rows}.values():
            if len(pending.written) == pending.total:
                self._finish(pending)

    def _store(self, rows: list[_Row], vectors: dict[str, npt.NDArray[np.float32]]) -> None:
        """Store rows whose vectors are known."""
        for start in range(0, len(rows), _SLICE_CHUNKS):
            some = rows[start : start + _SLICE_CHUNKS]
            self.writer.write(
                [Record(row.id, row.chunk.text, row.metadata, vectors[row.embedded_hash]) for row in some]
            )
            for row in some:
                row.owner.written.add(row.id)

    def _embed(self, rows: list[_Row], known: dict[str, npt.NDArray[np.float32]]) -> None:
        """Embed rows, each text once, and store them; `known` gets their vectors."""
        texts = {row.embedded_hash: row.chunk.embedded for row in rows if row.embedded_hash not in known}
        if texts:
            started = time.monotonic()
            with self.encoder_lock:
                vectors: npt.NDArray[np.float32] = self.encoder.encode_document(list(texts.values()))
            finite: npt.NDArray[np.bool_] = np.isfinite(vectors).all(axis=1, keepdims=False).reshape(-1)
            known.update({name: vectors[at] for at, name in enumerate(texts) if finite[at]})
            logger.info("embedded %d passages in %.2f s", len(texts), time.monotonic() - started)
        for row in rows:
            if row.embedded_hash not in known and not row.owner.failed:
                row.owner.failed = True
                self.manifest.entries[row.owner.key] = Entry("", 0)
                self._skip(row.owner.key, "the model gives no finite vector for a part of it", keep=True)
        kept = [row for row in rows if row.embedded_hash in known]
        self._store(kept, known)
        embedded = len(texts.keys() & known.keys())
        self.chunks_embedded += embedded
        self.chunks_reused += len(kept) - embedded

    def _finish(self, pending: _Pending) -> None:
        self.writer.delete(sorted(pending.known - pending.written))
        self.manifest.entries[pending.key] = pending.entry

    def _skip(self, key: DocumentKey, reason: str, *, keep: bool) -> None:
        self.skipped.append(SkippedFile(key[1], reason))
        if keep:
            self.kept.add(key)

    def _tell(self, stage: str, path: str | None) -> None:
        # Files that have been read but not embedded are not done.
        waiting = self._waiting or len({id(row.owner) for row in self._buffer})
        self.progress(IndexProgress(stage, max(0, self._done - math.ceil(waiting)), self._total, path))


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
            "kind": kind_of(path),
            "lang": language_of(path),
            "embedded_hash": _hash(chunk.embedded),
        }
        # Chroma has no place for None, and what is compared with what it holds must be what it was given.
        yield _Row(pending, row_id, chunk, {name: value for name, value in metadata.items() if value is not None})
