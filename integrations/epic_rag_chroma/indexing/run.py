"""The writing half of the indexer: one run from folders to an index that says what they say, and what it would do.

The order of things makes it safe to end anywhere. Rows are written first, in transactions; Chroma's collection and the
words follow. `running.json` lies in the folder from the first write to the end; a run that finds one compares all three
places before it trusts any, and makes a collection anew, from the rows, whose graph may be torn.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.errors import ConfigError
from epic_rag_chroma.errors import ChromaServerError, IndexMismatchError, IndexStateError
from epic_rag_chroma.indexing import sync as looking
from epic_rag_chroma.indexing.sync import Sync
from epic_rag_chroma.indexing.writer import IndexWriter, chroma_errors, recover
from epic_rag_chroma.reading.worker import IsolatedReader
from epic_rag_chroma.store.database import RecordStore, RecordsUnavailableError
from epic_rag_chroma.store.hnsw_files import hnsw_files_fit
from epic_rag_chroma.store.keyword_index import KeywordIndex
from epic_rag_chroma.store.layout import BROKEN_FOLDER, check_owner, index_folder
from epic_rag_chroma.store.lock import DirtyMarker, chroma_lock, corrupt_collections, is_dirty, write_lock
from epic_rag_chroma.store.paths import CHROMA_FOLDER, merge_roots, root_path
from epic_rag_chroma.store.server import IN_FOLDER, ChromaServer, ServerPlace, may_be_corrupt, new_place, require_known
from epic_rag_chroma.store.state import CHUNKER_VERSION, IndexState, Manifest
from epic_rag_chroma.types import IndexPlan, IndexProgress, IndexReport, IndexSettings
from epic_rag_chroma.walk.files import scan_roots

if TYPE_CHECKING:
    from epic_rag import EpicEncoder
    from epic_rag_chroma.store.collection import ChunkStore
    from epic_rag_chroma.store.state import IndexState

__all__ = [
    "Indexing",
    "check_model",
    "check_place",
    "check_settings",
    "effective_sizes",
    "leave",
    "open_for_writing",
    "place_for_writing",
]


# --- from checks
# Whether an index, a model and settings go together; every message says both sides and what to run.

# Where an index lies when nobody says where.
INDEX_FOLDER = ".epic-rag"

# [CLS] and [SEP], or EOS: what a model puts around a document.
_SPECIAL_TOKENS = 2


def check_model(index_dir: Path, state: IndexState, encoder: EpicEncoder, paths: Sequence[Path]) -> None:
    """Refuse vectors of another model.

    Raises:
        IndexMismatchError: If the fingerprints differ.
    """
    if state.fingerprint != encoder.fingerprint:
        # Without it, the command would rebuild with the default model.
        model = "" if encoder.source == DEFAULT_CHECKPOINT else f" --model {shlex.quote(encoder.source)}"
        raise IndexMismatchError(
            f"index was built with {state.model} ({state.fingerprint}), you asked for {encoder.name} "
            f"({encoder.fingerprint}); run `epic-rag index --rebuild {_shown(index_dir, state, paths)}{model}`"
        )


def check_settings(index_dir: Path, state: IndexState, settings: IndexSettings | None, paths: Sequence[Path]) -> None:
    """Refuse other chunks than the index has.

    Raises:
        IndexMismatchError: If sizes or version differ.
    """
    again = f"run `epic-rag index --rebuild {_shown(index_dir, state, paths)}`"
    if state.chunker_version != CHUNKER_VERSION:
        raise IndexMismatchError(
            f"index was built with version {state.chunker_version} of the chunks, this is version "
            f"{CHUNKER_VERSION}; {again}"
        )
    if settings is None:
        return
    had = (state.settings.chunk_tokens, state.settings.chunk_overlap)
    asked = (settings.chunk_tokens, settings.chunk_overlap)
    if had != asked:
        raise IndexMismatchError(
            f"index was built with chunks of {had[0]} tokens, {had[1]} shared, you asked for {asked[0]}, "
            f"{asked[1]} shared; {again}"
        )


def check_place(
    index_dir: Path, state: IndexState, asked: ChromaServer | str | None, paths: Sequence[Path] = ()
) -> None:
    """Refuse to look for the vectors where they are not, or where the user would not; `asked` is `parse_server`'s.

    Raises:
        IndexMismatchError: If the index has them elsewhere.
        IndexStateError: If only the index folder has ever named its server.
    """
    if asked is None or asked == (IN_FOLDER if state.chroma is None else state.chroma.server):
        if state.chroma is not None:
            require_known(index_dir, state.chroma.server, is_named=asked is not None)
        return
    kept = "in its folder" if state.chroma is None else f"on {state.chroma}"
    wanted = f"on {asked}" if isinstance(asked, ChromaServer) else "in its folder"
    option = asked.url if isinstance(asked, ChromaServer) else IN_FOLDER
    raise IndexMismatchError(
        f"the index in {index_dir} has its vectors {kept}, you asked for an index {wanted}; leave out --chroma to use "
        f"it where it is, or run `epic-rag index --rebuild --chroma {shlex.quote(option)} "
        f"{_shown(index_dir, state, paths)}`"
    )


def _shown(index_dir: Path, state: IndexState, paths: Sequence[Path]) -> str:
    """Paths, and the index folder where it is not the first path's own, as a person here would write them."""
    wanted = list(paths) or [Path(root_path(root, index_dir)) for root in state.roots]
    if not wanted:
        return f"PATH --index-dir {shlex.quote(_near(index_dir))}"
    words = [shlex.quote(_near(path)) for path in wanted]
    first = wanted[0] if wanted[0].is_dir() else wanted[0].parent
    if (first / INDEX_FOLDER).resolve() != index_dir.resolve():
        words.append(f"--index-dir {shlex.quote(_near(index_dir))}")
    return " ".join(words)


def _near(path: Path) -> str:
    try:
        near = os.path.relpath(path)
    except ValueError:  # another drive
        return str(path)
    return str(path) if near.startswith("..") else near if near == "." else os.path.join(".", near)


def effective_sizes(settings: IndexSettings, encoder: EpicEncoder) -> tuple[int, int]:
    """Chunk size and overlap for a model: the default size shrinks to what it reads, a chosen one must fit.

    Raises:
        ConfigError: If it does not.
    """
    limit = encoder.max_document_tokens - _SPECIAL_TOKENS
    tokens = settings.chunk_tokens
    if tokens > limit:
        if tokens != IndexSettings().chunk_tokens:
            raise ConfigError(
                f"chunks of {tokens} tokens are more than the {limit} that {encoder.name} reads of a document; "
                f"run `epic-rag index --chunk-tokens {limit}`"
            )
        tokens = max(1, limit)
    return tokens, min(settings.chunk_overlap, tokens // 2)


# --- from placement
# Moving an index: from its folder to a server, from one server to another, and back.

logger = logging.getLogger(__name__)


def place_for_writing(
    index_dir: Path,
    old: IndexState | None,
    asked: ChromaServer | str | None,
    paths: Sequence[Path],
    *,
    rebuild: bool,
) -> ServerPlace | None:
    """Where a run of the indexer stores vectors: a place on a server, or None for the index folder.

    A server that has moved, or is reached by another name now, is followed: what tells is that the other address has
    the index's collection.

    Args:
        index_dir: The index folder.
        old: The index, if there is one.
        asked: What `parse_server` says.
        paths: What is to be indexed, for the message.
        rebuild: Whether the index is made anew, which is the time to move it.

    Raises:
        IndexMismatchError: If the index is elsewhere and is not made anew.
        ChromaServerError: If the server cannot be used; better known now than after a model has been loaded.
    """
    # Where nothing has been stored, an address may be corrected.
    if old is not None and old.collection is not None and not rebuild:
        if isinstance(asked, ChromaServer) and old.chroma is not None and asked != old.chroma.server:
            moved = replace(old.chroma, server=asked)
            require_known(index_dir, asked, is_named=True)
            if _has(moved, old.collection):
                logger.info("the index's collection is on %s now", moved)
                return moved
        check_place(index_dir, old, asked, paths)
    place = new_place(asked, None if old is None else old.chroma, is_new=old is None)
    if place is not None:
        require_known(index_dir, place.server, is_named=asked is not None)
        from epic_rag_chroma.store.client import ServerClient

        ServerClient(place.server).close()
    return place


def leave(index_dir: Path, old: IndexState | None, new: ServerPlace | None) -> None:
    """Delete what an index has where it no longer is.

    Args:
        index_dir: The index folder.
        old: The index before the run.
        new: Where it is now.
    """
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
        logger.warning("the old collections of the index with the id %s stay: %s", place.index_id, error)


def _has(place: ServerPlace, collection: str | None) -> bool:
    from epic_rag_chroma.store.collection import ChunkStore

    store = ChunkStore.open(place, collection)
    if store is None:
        return False
    store.close()
    return True


# --- from opening
# Opening an index for writing: its collection, rows and words, mended or made again where they must be.

# How often a run makes a server's collection again before it says that the server is of no use.
_REMAKES = 5


def open_for_writing(index_dir: Path, state: IndexState, torn: frozenset[str]) -> tuple[IndexWriter, Manifest]:
    """What to write to and what it holds; made anew, or mended, where they must be."""
    store = _open_collection(index_dir, state, torn)
    if store is None:
        return _make_collection(index_dir, state, torn)
    writer = _writer(index_dir, state, store, RecordStore.open, torn)
    try:
        manifest = Manifest.load(index_dir)
        with chroma_errors(index_dir):
            rows, stored = writer.records.count(), store.count()
        if (
            is_dirty(index_dir)
            or manifest is None
            or not manifest.complete
            or manifest.collection != store.id
            or not manifest.chunks == rows == stored == writer.keywords.count()
        ):
            if rows == 0 and stored > 0:
                writer.fill_records()
            manifest = recover(writer.records, store.id)
            writer.reconcile()
    except BaseException:
        writer.close()
        raise
    return writer, manifest


def _writer(
    index_dir: Path,
    state: IndexState,
    store: ChunkStore,
    open_records: Callable[[Path, str], RecordStore],
    torn: frozenset[str],
) -> IndexWriter:
    records: RecordStore | None = None
    try:
        records = open_records(index_dir, store.id)
        keywords = KeywordIndex.open(index_dir, store.id)
    except BaseException:
        if records is not None:
            records.close()
        store.close()
        raise
    if state.chroma is None:
        return IndexWriter(index_dir, store, records, keywords, DirtyMarker(index_dir, store.id, torn))
    running = DirtyMarker(index_dir, store.id, torn, on_server=True)
    return IndexWriter(index_dir, store, records, keywords, running, partial(_remade, index_dir, state, torn))


def _remade(
    index_dir: Path, state: IndexState, torn: frozenset[str], collection: str, error: ChromaServerError
) -> IndexWriter:
    """Make another collection on a server from the rows of one whose graph is in doubt.

    Args:
        index_dir: The index folder.
        state: The index.
        torn: The ids of those that have been in doubt before.
        collection: Its id.
        error: What raised the doubt; raised again if there is no end to it.
    """
    if len(torn) >= _REMAKES:
        raise error
    logger.warning("%s; its collection is made again from the index's own rows", str(error).partition(";")[0])
    writer, _ = _make_collection(index_dir, replace(state, collection=collection), torn)
    now = IndexState.load(index_dir, any_version=True)
    if now is not None and now.collection == collection:
        replace(now, collection=writer.store.id).save(index_dir)
    return writer


def _open_collection(index_dir: Path, state: IndexState, torn: frozenset[str]) -> ChunkStore | None:
    """The collection that counts; None if there is none, or none that can be used."""
    if state.collection is None:
        return None
    if state.collection in torn or (state.chroma is None and not hnsw_files_fit(index_dir, state.collection)):
        logger.warning("Chroma's files were left half written; they are made again from the index's own rows")
        return None
    from epic_rag_chroma.store.client import WRITER_PATIENCE
    from epic_rag_chroma.store.collection import ChunkStore

    place = state.place(index_dir)
    try:
        store = ChunkStore.open(place, state.collection, patience=WRITER_PATIENCE)
        if store is None:
            if state.chroma is None:
                _set_aside(index_dir)
            return None
        try:
            if store.fingerprint == state.fingerprint:
                store.count()  # makes Chroma read its files
                if state.chroma is not None:
                    store.probe()
                return store
        except BaseException:
            store.close()
            raise
        store.close()
    except ChromaServerError as error:
        if not may_be_corrupt(error):
            raise
        logger.warning("%s; its collection is made again from the index's own rows", str(error).partition(";")[0])
    except Exception as error:  # Chroma raises whatever its bindings do
        logger.warning("%s; its collection is made again from the rows", error)
        if state.chroma is None:
            _set_aside(index_dir)
    return None


def _make_collection(index_dir: Path, state: IndexState, torn: frozenset[str]) -> tuple[IndexWriter, Manifest]:
    """A new collection with the rows of the one before, if that had any under the same model."""
    from epic_rag_chroma.store.collection import ChunkStore

    with chroma_errors(index_dir):
        store = ChunkStore.create(
            state.place(index_dir),
            source=state.source,
            model=state.model,
            fingerprint=state.fingerprint,
            truncate_dim=state.truncate_dim,
        )
    before = None
    if state.collection is not None:
        torn |= {state.collection}
        with suppress(RecordsUnavailableError):
            before = RecordStore.open_reading(index_dir, state.collection)
    if before is None:
        writer = _writer(index_dir, state, store, RecordStore.open, torn)
        return writer, Manifest(store.id)
    try:
        writer = _writer(index_dir, state, store, before.copy_to, torn)
    finally:
        before.close()
    try:
        writer.fill_collection()
        return writer, recover(writer.records, store.id)
    except BaseException:
        writer.close()
        raise


def _set_aside(index_dir: Path) -> None:
    """Move Chroma's files out of the way if they are no database; if they are one, they may hold other collections."""
    database = index_dir / CHROMA_FOLDER / "chroma.sqlite3"
    if not database.exists() or (database.is_file() and _is_database(database)):
        return
    broken = index_dir / BROKEN_FOLDER
    shutil.rmtree(broken, ignore_errors=True)
    os.replace(index_dir / CHROMA_FOLDER, broken)
    logger.warning("%s is no database; it was moved to %s", database, broken)


def _is_database(path: Path) -> bool:
    try:
        connection = sqlite3.connect(path)
        try:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
        finally:
            connection.close()
    except sqlite3.OperationalError:
        return True  # locked, or not to be opened now: nothing that a new one would mend
    except sqlite3.DatabaseError:
        return False


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
        asked: Which Chroma server is asked for; see `server.parse_server`.
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
        every = merge_roots(paths, () if old is None else old.roots, self.index_dir)
        found = scan_roots(every, manifest.entries, settings, self.index_dir)
        known = {root for root, _ in manifest.entries} - found.missing
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
            roots=tuple(merge_roots(paths, () if old is None else old.roots, self.index_dir)),
            collection=None if old is None or rebuild else old.collection,
            updated_at=None if old is None else old.updated_at,
            last_run=None if old is None else old.last_run,
            chroma=chroma,
        )
        if old is None and not rebuild:
            state.save(self.index_dir)  # before Chroma makes its files, which are ours only beside an index.json
        torn = corrupt_collections(self.index_dir, None if old is None else old.collection)
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
        found = scan_roots(state.roots, run.manifest.entries, state.settings, self.index_dir)
        run.skipped += found.skipped
        known = {root for root, _ in run.manifest.entries} - found.missing
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
    if manifest is not None and manifest.collection == state.collection and not is_dirty(index_dir):
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
