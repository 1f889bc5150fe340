"""Run the indexer: check index, model and settings, locate the vectors, synchronise, publish.

The order makes it safe to stop at any moment. The dirty flag is set from the first write to the end, so that a run that
finds it compares rows, collection and keyword index before it relies on any of them. A rebuild writes a new collection
beside the current one, which answers queries until `index.json` names the new one.
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from epic_rag_chroma.errors import ChromaServerError, IndexStateError
from epic_rag_chroma.indexing.compatibility import check_model, check_place, check_settings, chunk_sizes
from epic_rag_chroma.indexing.sync import BATCH_CHUNKS, Sync, plan_sync
from epic_rag_chroma.indexing.writer import IndexWriter, manifest_from_rows
from epic_rag_chroma.reading.worker import IsolatedReader
from epic_rag_chroma.store.database import RecordStore, RecordsUnavailableError
from epic_rag_chroma.store.layout import check_owner, index_folder
from epic_rag_chroma.store.lock import chroma_lock, corrupt_collections, is_dirty, write_lock
from epic_rag_chroma.store.paths import CHROMA_FOLDER, merge_roots
from epic_rag_chroma.store.server import ChromaServer, ServerPlace, new_place, require_known
from epic_rag_chroma.store.state import IndexState, Manifest
from epic_rag_chroma.types import IndexPlan, IndexProgress, IndexReport, IndexSettings
from epic_rag_chroma.walk.files import scan_roots

if TYPE_CHECKING:
    from epic_rag import EpicEncoder

__all__ = ["IndexRunner"]

logger = logging.getLogger(__name__)

# Errors of a folder that cannot be written to, as opposed to bugs.
_FOLDER_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
     errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE}
)  # fmt: skip


@dataclass(frozen=True)
class IndexRunner:
    """Runs the indexer on an index folder.

    Args:
        index_dir: The index folder, absolute.
        server: The requested Chroma server, as `parse_server` returns it.
        load: Loads the encoder for an index.
        encoder_lock: Held while the encoder is used.
        batch_chunks: Number of chunks that are collected before they are embedded; None for the default.
    """

    index_dir: Path
    server: ChromaServer | str | None
    load: Callable[[IndexState | None], EpicEncoder]
    encoder_lock: threading.Lock
    batch_chunks: int | None = None

    def run(
        self,
        paths: Sequence[Path],
        settings: IndexSettings | None,
        *,
        rebuild: bool,
        progress: Callable[[IndexProgress], None],
        wait: float | None,
    ) -> IndexReport:
        """Bring the index up to date; see `ChromaIndexer.index`."""
        started = time.monotonic()
        with (
            _folder_errors(self.index_dir),
            index_folder(self.index_dir),
            write_lock(self.index_dir, wait=wait),
            chroma_lock(self.index_dir),
        ):
            try:
                old = IndexState.load(self.index_dir, any_version=rebuild)
            except IndexStateError:
                if not rebuild:
                    raise
                old = None  # a rebuild does not need a readable index
            place = _place_for_writing(self.index_dir, old, self.server, paths, rebuild=rebuild)
            encoder = self.load(old)
            if old is not None and not rebuild:
                check_model(self.index_dir, old, encoder, paths)
                check_settings(self.index_dir, old, settings, paths)
            settings = settings or (old.settings if old is not None else IndexSettings())
            chunk_tokens, chunk_overlap = chunk_sizes(settings, encoder)
            from epic_rag_chroma.embedding_function import absolute_source

            state = IndexState(
                model=encoder.name,
                source=absolute_source(encoder.source),
                fingerprint=encoder.fingerprint,
                dimension=encoder.dimension,
                truncate_dim=encoder.truncate_dim,
                settings=settings,
                roots=tuple(merge_roots(paths, () if old is None else old.roots, self.index_dir)),
                collection=None if old is None or rebuild else old.collection,
                updated_at=None if old is None else old.updated_at,
                last_run=None if old is None else old.last_run,
                chroma=place,
            )
            if old is None and not rebuild:
                state.save(self.index_dir)  # before Chroma creates files, which are only ours beside an index.json
            corrupt = corrupt_collections(self.index_dir, None if old is None else old.collection)
            writer, manifest = IndexWriter.open(self.index_dir, state, corrupt)
            try:
                if not rebuild and writer.store.id != state.collection:
                    # The new collection has all rows of the old one, or there was none. Stored chunks are visible to
                    # queries at once, and an interrupted run is continued by the next one.
                    writer.begin()
                    state = replace(state, collection=writer.store.id)
                    state.save(self.index_dir)
                sync = Sync(
                    writer,
                    manifest,
                    encoder,
                    self.encoder_lock,
                    chunk_tokens,
                    chunk_overlap,
                    progress,
                    self.batch_chunks or BATCH_CHUNKS,
                )
                progress(IndexProgress("scanning", 0, len(state.roots), None))
                found = scan_roots(state.roots, manifest.entries, settings, self.index_dir)
                sync.skipped += found.skipped
                try:
                    sync.run({root for root, _ in manifest.entries} - found.missing, found.scans)
                    writer.settle()
                except BaseException:
                    if state.collection == writer.store.id:
                        with suppress(OSError):  # for `status`; the next run reads the rows instead
                            manifest.save(self.index_dir, complete=False)
                    raise
                state = replace(
                    state,
                    collection=writer.store.id,
                    roots=tuple(found.roots),
                    updated_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                )
                manifest.collection = writer.store.id
                report = IndexReport(
                    added=sync.added,
                    changed=sync.changed,
                    deleted=sync.deleted,
                    unchanged=sync.unchanged,
                    skipped=tuple(sync.skipped),
                    chunks_embedded=sync.chunks_embedded,
                    chunks_total=manifest.chunks,
                    seconds=time.monotonic() - started,
                    renamed=sync.renamed,
                    chunks_reused=sync.chunks_reused,
                )
                counts = {
                    **{name: value for name, value in asdict(report).items() if name != "skipped"},
                    "skipped": len(report.skipped),
                    "seconds": round(report.seconds, 3),
                }
                # From here on the new collection is the current one; the next run repeats the rest if necessary.
                replace(state, last_run=counts).save(self.index_dir)
                writer.publish()
                _delete_old_location(self.index_dir, old, state.chroma)
                manifest.save(self.index_dir, complete=True)
                writer.delete_replaced()
                writer.end()
            finally:
                writer.close()
            return report

    def plan(self, paths: Sequence[Path], settings: IndexSettings | None) -> IndexPlan:
        """Return what `run` would do; see `ChromaIndexer.plan`."""
        if self.index_dir.exists():
            check_owner(self.index_dir)
        old = IndexState.load(self.index_dir)
        manifest = (None if old is None else _read_manifest(self.index_dir, old)) or Manifest("")
        settings = settings or (old.settings if old is not None else IndexSettings())
        roots = merge_roots(paths, () if old is None else old.roots, self.index_dir)
        found = scan_roots(roots, manifest.entries, settings, self.index_dir)
        known = {root for root, _ in manifest.entries} - found.missing
        with IsolatedReader() as reader:
            return plan_sync(manifest, known, found.scans, found.skipped, reader)


def _place_for_writing(
    index_dir: Path, old: IndexState | None, server: ChromaServer | str | None, paths: Sequence[Path], *, rebuild: bool
) -> ServerPlace | None:
    """Return where a run stores vectors: a place on a server, or None for the index folder.

    If the server has a new address, the index follows it, provided that the collection is there.

    Raises:
        IndexMismatchError: If the index has its vectors elsewhere and is not rebuilt.
        ChromaServerError: If the server cannot be used; checked before the model is loaded.
    """
    from epic_rag_chroma.store.client import ServerClient
    from epic_rag_chroma.store.collection import ChunkStore

    # While nothing is stored, an address may be corrected.
    if old is not None and old.collection is not None and not rebuild:
        if isinstance(server, ChromaServer) and old.chroma is not None and server != old.chroma.server:
            moved = replace(old.chroma, server=server)
            require_known(index_dir, server, is_named=True)
            store = ChunkStore.open(moved, old.collection)
            if store is not None:
                store.close()
                logger.info("the index's collection is on %s now", moved)
                return moved
        check_place(index_dir, old, server, paths)
    place = new_place(server, None if old is None else old.chroma, is_new=old is None)
    if place is not None:
        require_known(index_dir, place.server, is_named=server is not None)
        ServerClient(place.server).close()
    return place


def _delete_old_location(index_dir: Path, old: IndexState | None, new: ServerPlace | None) -> None:
    """Delete the vectors at the previous place, after the index was moved to `new`."""
    if new is not None:
        with suppress(FileNotFoundError):
            shutil.rmtree(index_dir / CHROMA_FOLDER)
    place = None if old is None else old.chroma
    if place is None or (new is not None and new.index_id == place.index_id):
        return
    from epic_rag_chroma.store.collection import ChunkStore

    try:
        require_known(index_dir, place.server, is_named=False)
        ChunkStore.delete_all(place)
    except (ChromaServerError, IndexStateError) as error:
        logger.warning("the old collections of the index with the id %s were not deleted: %s", place.index_id, error)


def _read_manifest(index_dir: Path, state: IndexState) -> Manifest | None:
    """Return the manifest of an index without repairing anything; from the rows if the file is not reliable."""
    manifest = Manifest.load(index_dir)
    if manifest is not None and manifest.collection == state.collection and not is_dirty(index_dir):
        return manifest
    if state.collection is None:
        return None
    try:
        rows = RecordStore.open_reading(index_dir, state.collection)
    except RecordsUnavailableError:
        return manifest
    try:
        return manifest_from_rows(rows, state.collection)
    finally:
        rows.close()


@contextmanager
def _folder_errors(index_dir: Path) -> Iterator[None]:
    """Turn exhausted memory and errors of the folder into an `IndexStateError` with a remedy."""
    try:
        yield
    except MemoryError as error:
        raise IndexStateError(
            f"Out of memory. Stored data in {index_dir} is intact. Close other programs and run `epic-rag index` again."
        ) from error
    except OSError as error:
        if error.errno not in _FOLDER_ERRORS:
            raise
        raise IndexStateError(
            f"{index_dir} cannot be written ({error.strerror}). Stored data is intact. Free disk space or fix "
            "permissions, then run `epic-rag index` again."
        ) from error
