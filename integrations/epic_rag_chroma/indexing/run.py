"""Run the indexer: open the index, check model and settings, synchronise files, update the Chroma mirror.

It is safe to stop at any moment: files are stored batch by batch in transactions of the database, and the mirror is
brought up to date from the database after the last file. A rebuild fills a database beside the current one, which
answers queries until the new one takes its place in one transaction.
"""

from __future__ import annotations

import errno
import logging
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from epic_rag.checkpoints import languages_of
from epic_rag.files import describe_os_error
from epic_rag_chroma.errors import (
    ChromaServerError,
    IndexDamagedError,
    IndexMismatchError,
    IndexNotFoundError,
    IndexStateError,
)
from epic_rag_chroma.indexing.compatibility import check_model, check_settings, chunk_sizes
from epic_rag_chroma.indexing.rows import load_rows
from epic_rag_chroma.indexing.sync import BATCH_CHUNKS, Sync, plan_sync
from epic_rag_chroma.reading.worker import IsolatedReader
from epic_rag_chroma.store.database import IndexDatabase, Record, delete_database
from epic_rag_chroma.store.language_detection import main_language
from epic_rag_chroma.store.layout import check_owner, index_folder
from epic_rag_chroma.store.lock import chroma_lock, write_lock
from epic_rag_chroma.store.migration import check_migrated, delete_old, is_old_index, migrate, old_place
from epic_rag_chroma.store.paths import DATABASE_FILE, REBUILD_FILE, absolute_source, merge_roots
from epic_rag_chroma.store.server import NO_CHROMA, ChromaServer, ServerPlace, new_place, require_known
from epic_rag_chroma.store.state import CHUNKER_VERSION, IndexState
from epic_rag_chroma.store.vectors import write_vectors
from epic_rag_chroma.types import IndexPlan, IndexProgress, IndexReport, IndexSettings, LanguageMismatch, ModelInfo
from epic_rag_chroma.walk.files import scan_roots

if TYPE_CHECKING:
    from epic_rag import EpicEncoder

__all__ = ["IndexRunner"]

logger = logging.getLogger(__name__)

# Parts of a report that are no numbers.
_NO_COUNTS = ("skipped", "language_mismatch")
# Chunks whose language is detected after a run; a share of one half is known to within 0.1.
_SAMPLED_CHUNKS = 100
# Errors of a folder that cannot be written to, as opposed to bugs.
_FOLDER_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
     errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE}
)  # fmt: skip


@dataclass
class _OpenIndex:
    """An index folder that is locked for a run: its database and state, None for a new one, and the mirror's place."""

    current: IndexDatabase | None
    state: IndexState | None
    old_place: ServerPlace | str | None
    place: ServerPlace | str
    stack: ExitStack

    def database_to_write(self, index_dir: Path, *, rebuild: bool) -> IndexDatabase:
        """Open the database that the run writes: the current one, made if there is none, or that of a rebuild."""
        if self.current is None:
            self.current = IndexDatabase.open(index_dir / DATABASE_FILE)
            self.stack.callback(self.current.close)
        if not rebuild:
            return self.current
        database = IndexDatabase.open(index_dir / REBUILD_FILE)
        self.stack.callback(database.close)
        return database


@dataclass(frozen=True)
class IndexRunner:
    """Runs the indexer on an index folder.

    Args:
        index_dir: The index folder, absolute.
        server: The requested place of the mirror, as `parse_server` returns it.
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
        remove: Sequence[Path] = (),
        rebuild: bool,
        progress: Callable[[IndexProgress], None],
        wait: float | None,
    ) -> IndexReport:
        """Bring the index up to date; see `ChromaIndexer.index`."""
        started = time.monotonic()
        with self._locked(rebuild=rebuild, wait=wait) as opened:
            old, place = opened.state, opened.place
            if old is not None and old.parts is not None and not rebuild:
                raise IndexStateError(
                    f"The index in {self.index_dir} is filled from the Parquet files in {old.parts}. Run `epic-rag "
                    f"index --from-parquet {shlex.quote(old.parts)}`, or index folders with another --index-dir."
                )
            encoder = self.load(old)
            if old is not None and not rebuild:
                check_model(self.index_dir, old, encoder, paths)
                check_settings(self.index_dir, old, settings, paths)
            settings = settings or (old.settings if old is not None else IndexSettings())
            chunk_tokens, chunk_overlap, chunk_window = chunk_sizes(settings, encoder)
            state = IndexState(
                model=encoder.name,
                source=absolute_source(encoder.source),
                fingerprint=encoder.fingerprint,
                dimension=encoder.dimension,
                truncate_dim=encoder.truncate_dim,
                settings=settings,
                roots=tuple(merge_roots(paths, () if old is None else old.roots, self.index_dir, remove)),
                updated_at=None if old is None else old.updated_at,
                last_run=None if old is None else old.last_run,
                chroma=opened.old_place or place,  # until the mirror is complete at another place
            )
            database = opened.database_to_write(self.index_dir, rebuild=rebuild)
            if rebuild or state != old:  # queries during the run find the roots of the chunks that it stores
                with database.transaction():
                    database.save_state(state)
                    if old is not None and old.chunker_version != state.chunker_version:
                        database.forget_digests()  # every file is read and split again; known text keeps its vector
            entries = database.files()
            sync = Sync(
                database,
                entries,
                encoder,
                self.encoder_lock,
                chunk_tokens,
                chunk_overlap,
                chunk_window,
                progress,
                self.batch_chunks or BATCH_CHUNKS,
            )
            progress(IndexProgress("scanning", 0, len(state.roots), None))
            found = scan_roots(state.roots, entries, settings, self.index_dir)
            sync.skipped += found.skipped
            sync.run({root for root, _ in entries} - found.missing, found.scans)
            report = IndexReport(
                added=sync.added,
                changed=sync.changed,
                deleted=sync.deleted,
                unchanged=sync.unchanged,
                skipped=tuple(sync.skipped),
                chunks_embedded=sync.chunks_embedded,
                chunks_total=sum(entry.chunks for entry in entries.values()),
                seconds=time.monotonic() - started,
                renamed=sync.renamed,
                chunks_reused=sync.chunks_reused,
                language_mismatch=_language_mismatch(database, encoder) if sync.chunks_embedded else None,
            )
            self._finish(opened, database, replace(state, roots=tuple(found.roots)), report)
            return report

    def load_rows(
        self,
        rows: Iterable[Sequence[Record]],
        info: ModelInfo,
        parts: str,
        settings: IndexSettings,
        *,
        rebuild: bool,
        progress: Callable[[int], None],
        wait: float | None,
    ) -> IndexReport:
        """Make the index equal to rows that were embedded elsewhere; see `ChromaIndexer.load_rows`."""
        started = time.monotonic()
        with self._locked(rebuild=rebuild, wait=wait) as opened:
            old, place = opened.state, opened.place
            if old is not None and not rebuild:
                _check_rows(self.index_dir, old, info, parts)
            state = IndexState(
                model=info.model,
                source=info.source,
                fingerprint=info.fingerprint,
                dimension=info.dimension,
                truncate_dim=info.truncate_dim,
                settings=settings,
                roots=(),
                updated_at=None if old is None else old.updated_at,
                last_run=None if old is None else old.last_run,
                chroma=opened.old_place or place,
                parts=parts,
            )
            database = opened.database_to_write(self.index_dir, rebuild=rebuild)
            with database.transaction():
                database.save_state(state)
            counts = load_rows(database, rows, info, progress)
            report = replace(counts, chunks_total=database.count(), seconds=time.monotonic() - started)
            self._finish(opened, database, state, report)
            return report

    @contextmanager
    def _locked(self, *, rebuild: bool, wait: float | None) -> Iterator[_OpenIndex]:
        """Lock the index folder and open what it has; everything is closed at the end."""
        with _folder_errors(self.index_dir), index_folder(self.index_dir), write_lock(self.index_dir, wait=wait):
            current, old, old_chroma = self._open(rebuild=rebuild)
            with ExitStack() as stack:
                if current is not None:
                    stack.callback(current.close)
                place = new_place(self.server, old_chroma)
                if isinstance(place, ServerPlace):
                    require_known(self.index_dir, place.server, is_named=self.server is not None)
                yield _OpenIndex(current, old, old_chroma, place, stack)

    def _finish(self, opened: _OpenIndex, database: IndexDatabase, state: IndexState, report: IndexReport) -> None:
        """Store the state and counts of a complete run, and bring what is made of the database up to date."""
        counts = {
            **{name: value for name, value in asdict(report).items() if name not in _NO_COUNTS},
            "skipped": len(report.skipped),
            "seconds": round(report.seconds, 3),
        }
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        state = replace(state, updated_at=now, last_run=counts)
        database.finish_run(state)
        current = opened.current
        assert current is not None
        if database is not current:
            database.close()
            current.replace_by(self.index_dir / REBUILD_FILE)
        write_vectors(current)
        self._update_mirror(current, state, opened.place)

    def _open(self, *, rebuild: bool) -> tuple[IndexDatabase | None, IndexState | None, ServerPlace | str | None]:
        """Open the database of the index, converted from an older format if necessary.

        Returns:
            The database, its state and the place of its mirror; None for a new index.
        """
        path = self.index_dir / DATABASE_FILE
        delete_database(self.index_dir / REBUILD_FILE)  # of a rebuild that was interrupted
        is_old = is_old_index(self.index_dir)
        place: ServerPlace | str | None = old_place(self.index_dir) if is_old else None
        if not is_old and not path.is_file():
            return None, None, None
        try:
            database = IndexDatabase.open(path)
            try:
                if is_old:
                    migrate(self.index_dir, database)
                state = database.state()
            except BaseException:
                database.close()
                raise
        except (IndexDamagedError, IndexMismatchError):
            if not rebuild:
                raise
            delete_database(path)  # a rebuild does not need a readable index
            delete_old(self.index_dir)
            return None, None, place
        return database, state, place if state is None else state.chroma

    def _update_mirror(self, database: IndexDatabase, state: IndexState, place: ServerPlace | str) -> None:
        """Bring the Chroma mirror up to date, and delete it at its previous place if it has moved."""
        old = state.chroma
        if place != old:
            database.begin_mirror(database.mirror().collection)
        if place == NO_CHROMA:
            database.end_mirror(None)
        else:
            from epic_rag_chroma.store.collection import sync_collection

            with chroma_lock(self.index_dir):
                sync_collection(
                    database,
                    self.index_dir if isinstance(place, str) else place,
                    model=state.model,
                    source=state.source,
                    fingerprint=state.fingerprint,
                    truncate_dim=state.truncate_dim,
                )
        if place == old:
            return
        with database.transaction():
            database.save_state(replace(state, chroma=place))
        if old == NO_CHROMA:
            return
        from epic_rag_chroma.store.collection import delete_collections

        try:
            if isinstance(old, ServerPlace):
                require_known(self.index_dir, old.server, is_named=False)
            # Both addresses may be those of the same server.
            delete_collections(
                old if isinstance(old, ServerPlace) else self.index_dir, keep=database.mirror().collection
            )
        except (ChromaServerError, IndexStateError) as error:
            logger.warning("The index's collections on %s were not deleted. %s", old, error)

    def plan(self, paths: Sequence[Path], settings: IndexSettings | None, *, remove: Sequence[Path] = ()) -> IndexPlan:
        """Return what `run` would do; see `ChromaIndexer.plan`."""
        if self.index_dir.exists():
            check_owner(self.index_dir)
            check_migrated(self.index_dir)
        old, entries = None, {}
        with suppress(IndexNotFoundError):
            if (self.index_dir / DATABASE_FILE).is_file():
                database = IndexDatabase.open_reading(self.index_dir / DATABASE_FILE)
                try:
                    with database.snapshot():
                        old, entries = database.state(), database.files()
                    if old is not None and old.chunker_version != CHUNKER_VERSION:
                        entries = {key: replace(entry, digest="") for key, entry in entries.items()}
                finally:
                    database.close()
        settings = settings or (old.settings if old is not None else IndexSettings())
        roots = merge_roots(paths, () if old is None else old.roots, self.index_dir, remove)
        found = scan_roots(roots, entries, settings, self.index_dir)
        known = {root for root, _ in entries} - found.missing
        with IsolatedReader() as reader:
            return plan_sync(entries, known, found.scans, found.skipped, reader)


def _check_rows(index_dir: Path, state: IndexState, info: ModelInfo, parts: str) -> None:
    """Check that rows embedded elsewhere belong to an index."""
    where = f"--from-parquet {shlex.quote(parts)} --index-dir {shlex.quote(str(index_dir))}"
    if state.parts is None:
        raise IndexStateError(
            f"The index in {index_dir} holds files of folders, which Parquet files would replace. Use another "
            "--index-dir."
        )
    if state.fingerprint != info.fingerprint:
        raise IndexMismatchError(
            f"The index was built with {state.model} ({state.fingerprint}), the vectors in {parts} are of {info.model} "
            f"({info.fingerprint}). Run `epic-rag index --rebuild {where}`."
        )


def _language_mismatch(database: IndexDatabase, encoder: EpicEncoder) -> LanguageMismatch | None:
    """Return the language of most of the chunks if the encoder was not trained on it."""
    known, _ = languages_of(encoder.name, encoder.folder, vars(encoder.config))
    # Other spellings than two letters stand for more than one language, or for one that has other codes besides.
    if not known or not all(len(code) == 2 for code in known):
        return None
    found = main_language(database.sample(_SAMPLED_CHUNKS))
    if found is None or found[0] in known or (found[0] == "no" and {"nb", "nn"} & set(known)):
        return None
    return LanguageMismatch(found[0], round(found[1], 2), known)


@contextmanager
def _folder_errors(index_dir: Path) -> Iterator[None]:
    """Turn exhausted memory and errors of the folder into an `IndexStateError` with a remedy."""
    try:
        yield
    except MemoryError as error:
        raise IndexStateError(
            f"Out of memory. Stored data in {index_dir} is intact. Close other programs and run `epic-rag index` again."
        ) from error
    except PermissionError as error:
        raise IndexStateError(
            f"{describe_os_error(error)}. Stored data is intact. Make it writable, then run `epic-rag index` again."
        ) from error
    except OSError as error:
        if error.errno not in _FOLDER_ERRORS:
            raise
        raise IndexStateError(
            f"{index_dir} cannot be written ({error.strerror}). Stored data is intact. Free disk space or fix "
            "permissions, then run `epic-rag index` again."
        ) from error
