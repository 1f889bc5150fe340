"""The writing half of the indexer: one run from folders to an index that says what they say, and what it would do.

The order of things makes it safe to end anywhere. Rows are written first, in transactions; Chroma's collection and the
words follow. `running.json` lies in the folder from the first write to the end; a run that finds one compares all three
places before it trusts any, and makes a collection anew, from the rows, whose graph may be torn.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from epic_rag.errors import IndexStateError
from epic_rag_chroma import looking, roots
from epic_rag_chroma.checks import check_model, check_settings, effective_sizes
from epic_rag_chroma.folder import check_owner, index_folder
from epic_rag_chroma.isolation import IsolatedReader
from epic_rag_chroma.lock import write_lock
from epic_rag_chroma.manifest import IndexState, Manifest
from epic_rag_chroma.opening import open_for_writing
from epic_rag_chroma.placement import leave, place_for_writing
from epic_rag_chroma.records import RecordStore, RecordsUnavailableError
from epic_rag_chroma.running import chroma_lock, is_running, torn_collections
from epic_rag_chroma.server import ChromaServer
from epic_rag_chroma.sync import Sync
from epic_rag_chroma.types import IndexPlan, IndexProgress, IndexReport, IndexSettings
from epic_rag_chroma.writer import recover

if TYPE_CHECKING:
    from epic_rag import EpicEncoder

__all__ = ["Indexing"]

logger = logging.getLogger(__name__)

# What a folder answers when it cannot be written to, as against a fault in the program.
_FOLDER_TROUBLE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
     errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE}
)  # fmt: skip


@dataclass(frozen=True)
class Indexing:
    """What runs of an indexer have in common.

    Args:
        index_dir: The index folder, absolute.
        asked: Which Chroma server is asked for; see `server.asked_server`.
        load: Gives the encoder for an index.
        encoder_lock: Held while the encoder works.
    """

    index_dir: Path
    asked: ChromaServer | str | None
    load: Callable[[IndexState | None], EpicEncoder]
    encoder_lock: threading.Lock

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
            _clear_errors(self.index_dir),
            index_folder(self.index_dir),
            write_lock(self.index_dir, wait=wait),
            chroma_lock(self.index_dir),
        ):
            return self._run(paths, settings, rebuild, progress, started)

    def plan(self, paths: Sequence[Path], settings: IndexSettings | None) -> IndexPlan:
        """Say what `run` would do; see `ChromaIndexer.plan`."""
        if self.index_dir.exists():
            check_owner(self.index_dir)
        old = IndexState.load(self.index_dir)
        manifest = None if old is None else _manifest_of(self.index_dir, old)
        if manifest is None:
            manifest = Manifest("")
        settings = settings or (old.settings if old is not None else IndexSettings())
        every = roots.merge(paths, () if old is None else old.roots, self.index_dir)
        found = roots.scan_roots(every, manifest.entries, settings, self.index_dir)
        known = {root for root, _ in manifest.entries} - found.absent
        with IsolatedReader() as reader:
            return looking.plan(manifest, known, found.scans, found.skipped, reader)

    def _run(
        self,
        paths: Sequence[Path],
        settings: IndexSettings | None,
        rebuild: bool,
        progress: Callable[[IndexProgress], None],
        started: float,
    ) -> IndexReport:
        old = self._old_state(rebuild)
        chroma = place_for_writing(self.index_dir, old, self.asked, paths, rebuild=rebuild)
        encoder = self.load(old)
        if old is not None and not rebuild:
            check_model(self.index_dir, old, encoder, paths)
            check_settings(self.index_dir, old, settings, paths)
        settings = settings or (old.settings if old is not None else IndexSettings())
        sizes = effective_sizes(settings, encoder)
        from epic_rag_chroma.embedding_function import plain_source

        state = IndexState(
            model=encoder.name,
            source=plain_source(encoder.source),
            fingerprint=encoder.fingerprint,
            dimension=encoder.dimension,
            truncate_dim=encoder.truncate_dim,
            settings=settings,
            roots=tuple(roots.merge(paths, () if old is None else old.roots, self.index_dir)),
            collection=None if old is None or rebuild else old.collection,
            updated_at=None if old is None else old.updated_at,
            last_run=None if old is None else old.last_run,
            chroma=chroma,
        )
        if old is None and not rebuild:
            state.save(self.index_dir)  # before Chroma makes its files, which are ours only beside an index.json
        torn = torn_collections(self.index_dir, None if old is None else old.collection)
        writer, manifest = open_for_writing(self.index_dir, state, torn)
        try:
            if not rebuild and writer.store.id != state.collection:
                # Nothing is lost by it: the new collection has all rows of the old one, or there was none. What is
                # stored from here on can be found at once, and a run that is interrupted is gone on with.
                writer.begin()
                state = replace(state, collection=writer.store.id)
                state.save(self.index_dir)
            run = Sync(writer, manifest, encoder, self.encoder_lock, *sizes, progress)
            state = self._synchronise(run, state)
            manifest.collection = writer.store.id
            report = IndexReport(
                added=run.added,
                changed=run.changed,
                deleted=run.deleted,
                unchanged=run.unchanged,
                skipped=tuple(run.skipped),
                chunks_embedded=run.chunks_embedded,
                chunks_total=manifest.chunks,
                seconds=time.monotonic() - started,
                renamed=run.renamed,
                chunks_reused=run.chunks_reused,
            )
            # From here the new collection counts; what follows is made up for by the next run if it must be.
            replace(state, last_run=_counts(report)).save(self.index_dir)
            writer.publish()
            leave(self.index_dir, old, state.chroma)
            manifest.save(self.index_dir, complete=True)
            writer.forget_others()
            writer.end()
        finally:
            writer.close()
        return report

    def _old_state(self, rebuild: bool) -> IndexState | None:
        try:
            return IndexState.load(self.index_dir, any_version=rebuild)
        except IndexStateError:
            if not rebuild:
                raise
            return None

    def _synchronise(self, run: Sync, state: IndexState) -> IndexState:
        """Let a run do its work; the state after it."""
        run.progress(IndexProgress("scanning", 0, len(state.roots), None))
        found = roots.scan_roots(state.roots, run.manifest.entries, state.settings, self.index_dir)
        run.skipped += found.skipped
        known = {root for root, _ in run.manifest.entries} - found.absent
        try:
            run.files(known, found.scans)
            run.forget(known, found.scans)
            run.writer.settle()
        except BaseException:
            if state.collection == run.writer.store.id:
                with suppress(OSError):  # for `status`; the next run asks the rows
                    run.manifest.save(self.index_dir, complete=False)
            raise
        return replace(
            state,
            collection=run.writer.store.id,
            roots=tuple(found.roots),
            updated_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


def _manifest_of(index_dir: Path, state: IndexState) -> Manifest | None:
    """What the index holds, as well as it can be known without writing."""
    manifest = Manifest.load(index_dir)
    if manifest is not None and manifest.collection == state.collection and not is_running(index_dir):
        return manifest
    if state.collection is None:
        return None
    try:
        records = RecordStore.open_reading(index_dir, state.collection)
    except RecordsUnavailableError:
        return manifest
    try:
        return recover(records, state.collection)
    finally:
        records.close()


def _counts(report: IndexReport) -> dict[str, float]:
    return {
        "added": report.added,
        "changed": report.changed,
        "renamed": report.renamed,
        "deleted": report.deleted,
        "unchanged": report.unchanged,
        "skipped": len(report.skipped),
        "chunks_embedded": report.chunks_embedded,
        "chunks_reused": report.chunks_reused,
        "chunks_total": report.chunks_total,
        "seconds": round(report.seconds, 3),
    }


@contextmanager
def _clear_errors(index_dir: Path) -> Iterator[None]:
    """Turn what the machine lacks into errors that say what to do."""
    try:
        yield
    except MemoryError as error:
        raise IndexStateError(
            f"the memory is full; what was stored in {index_dir} stays: close other programs and run "
            "`epic-rag index` again"
        ) from error
    except OSError as error:
        if error.errno not in _FOLDER_TROUBLE:
            raise
        raise IndexStateError(
            f"{index_dir} cannot be written ({error.strerror}); what is stored stays: see to free space and "
            "permissions, and run `epic-rag index` again"
        ) from error
