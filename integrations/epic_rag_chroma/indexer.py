"""`ChromaIndexer`: folders of files in, a persistent Chroma collection out, hits with lines for queries."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epic_rag.errors import ConfigError, IndexNotFoundError, IndexStateError
from epic_rag_chroma import roots
from epic_rag_chroma.checks import check_model, check_settings, effective_sizes
from epic_rag_chroma.chunking import HEADING_SEPARATOR
from epic_rag_chroma.folder import delete_index, folder_size, index_folder, remove_empty, versions
from epic_rag_chroma.lock import write_lock
from epic_rag_chroma.manifest import INDEX_FILE, IndexState, Manifest
from epic_rag_chroma.sync import Sync, recover
from epic_rag_chroma.types import Hit, IndexProgress, IndexReport, IndexSettings, IndexStatus

if TYPE_CHECKING:
    from epic_rag import DemonstrationBank, EpicEncoder
    from epic_rag_chroma.store import ChunkStore, Found

__all__ = ["ChromaIndexer"]

_SWAP_ATTEMPTS = 3


class ChromaIndexer:
    """An index of folders: it is brought up to date by `index` and asked by `query`.

    Args:
        index_dir: The index folder; need not exist yet.
        encoder: An encoder, or a function that loads one when it is needed; None loads the model that the index was
            built with, or the default checkpoint for a new index. `status` and `clear` never load a model.

    Example:
        >>> indexer = ChromaIndexer("docs/.epic-rag")
        >>> indexer.index(["docs"])
        >>> indexer.query("how do I undo a commit?", k=3, task="docs")
    """

    def __init__(
        self,
        index_dir: str | os.PathLike[str],
        *,
        encoder: EpicEncoder | Callable[[], EpicEncoder] | None = None,
    ) -> None:
        self._index_dir = Path(index_dir).resolve()
        self._given = encoder
        self._encoder: EpicEncoder | None = None
        self._encoder_lock = threading.Lock()
        self._lock = threading.Lock()
        self._store: ChunkStore | None = None
        self._seen: tuple[object, ...] = ()

    def __enter__(self) -> ChromaIndexer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of Chroma's files; a later query opens them again."""
        with self._lock:
            self._close_store()

    def index(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        settings: IndexSettings | None = None,
        rebuild: bool = False,
        progress: Callable[[IndexProgress], None] | None = None,
    ) -> IndexReport:
        """Bring the index up to date with its folders, to which these are added if they are new.

        Files whose content has not changed are not embedded again. Files that cannot be read are skipped with a
        reason, and keep the chunks that they have.

        Args:
            paths: Folders and files. A path inside a folder that is indexed already means that folder; none at all
                means the folders of the index.
            settings: None for the index's own, or the defaults. Other `include` and `exclude` than the index has are
                taken over; other chunk sizes need `rebuild`.
            rebuild: Embed everything again, beside the old index, which answers until the new one is complete.
            progress: Called after each step.

        Raises:
            DataError: If a path does not exist.
            ConfigError: If the chunks are longer than what the model reads.
            IndexLockedError: If another process is writing to the index.
            IndexMismatchError: If the index has another model, other chunk sizes, or chunks of another version.
            IndexStateError: If the folder holds something else, or an index that cannot be read.
        """
        started = time.monotonic()
        resolved = [roots.existing(path) for path in paths]
        with self._lock:
            self._close_store()
            with index_folder(self._index_dir), write_lock(self._index_dir):
                return self._index(resolved, settings, rebuild, progress or _silent, started)

    def query(
        self,
        text: str,
        *,
        k: int = 5,
        task: str | None = None,
        bank: DemonstrationBank | str | os.PathLike[str] | None = None,
        instruction: str | None = None,
        num_demonstrations: int | None = None,
    ) -> list[Hit]:
        """Find the chunks nearest to a query.

        Args:
            text: The query.
            k: The most hits.
            task: See `EpicEncoder.encode_query`, as for the next three.
            bank: A bank, its folder or its name.
            instruction: Overrides the task's or the bank's.
            num_demonstrations: How many demonstrations to show.

        Returns:
            Hits, best first; none for an empty index.

        Raises:
            ConfigError: If `k` is less than 1.
            IndexNotFoundError: If there is no index.
            IndexMismatchError: If the encoder is not the one that the index was built with.
        """
        if k < 1:
            raise ConfigError(f"k is {k}; it must be at least 1")
        state = self._state()
        encoder = self._load(state)
        check_model(self._index_dir, state, encoder, [])
        with self._encoder_lock:
            vector = encoder.encode_query(
                text, task=task, bank=bank, instruction=instruction, num_demonstrations=num_demonstrations
            )
        with self._lock:
            found = self._search(lambda store: store.query(vector, k))
        return [self._hit(rank, row) for rank, row in enumerate(found, start=1)]

    def status(self) -> IndexStatus:
        """Say what the index holds; loads no model and does not open Chroma.

        Raises:
            IndexNotFoundError: If there is no index.
            IndexStateError: If it cannot be read.
        """
        state = self._state()
        manifest = Manifest.load(self._index_dir)
        if manifest is None or manifest.collection != state.collection:
            manifest = Manifest(state.collection or "")
        return IndexStatus(
            index_dir=str(self._index_dir),
            roots=tuple(str(roots.where(root, self._index_dir)) for root in state.roots),
            model=state.model,
            fingerprint=state.fingerprint,
            dimension=state.dimension,
            files=len(manifest.entries),
            chunks=manifest.chunks,
            size_bytes=folder_size(self._index_dir),
            updated_at=state.updated_at,
            settings=state.settings,
        )

    def clear(self) -> None:
        """Delete the index, and the folder if nothing else is in it. Only what an index consists of is deleted.

        Raises:
            IndexNotFoundError: If the folder is no index.
            IndexLockedError: If another process is writing to it.
        """
        if not (self._index_dir / INDEX_FILE).is_file():
            raise self._no_index()
        with self._lock:
            self._close_store()
            with write_lock(self._index_dir):
                delete_index(self._index_dir)
            remove_empty(self._index_dir)

    def _index(
        self,
        paths: list[Path],
        settings: IndexSettings | None,
        rebuild: bool,
        progress: Callable[[IndexProgress], None],
        started: float,
    ) -> IndexReport:
        try:
            old = IndexState.load(self._index_dir)
        except IndexStateError:
            if not rebuild:
                raise
            old = None
        encoder = self._load(old)
        if old is not None and not rebuild:
            check_model(self._index_dir, old, encoder, paths)
            check_settings(self._index_dir, old, settings, paths)
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
            roots=tuple(roots.merge(paths, () if old is None else old.roots, self._index_dir)),
            collection=None if old is None or rebuild else old.collection,
            updated_at=None if old is None else old.updated_at,
        )
        if old is None and not rebuild:
            state.save(self._index_dir)  # before Chroma makes its files, which are ours only beside an index.json
        store, manifest = self._open_for_writing(state)
        try:
            if not rebuild and store.id != state.collection:
                # Without an old index there is nothing to keep: what is stored can be found at once, and a run that
                # is interrupted is gone on with.
                state = replace(state, collection=store.id)
                state.save(self._index_dir)
            run = Sync(self._index_dir, store, manifest, encoder, self._encoder_lock, *sizes, progress)
            state = self._synchronise(run, state)
            # From here the new collection counts; what follows is made up for by the next run if it must be.
            state.save(self._index_dir)
            store.publish()
            manifest.save(self._index_dir, complete=True)
        finally:
            store.close()
        return IndexReport(
            added=run.added,
            changed=run.changed,
            deleted=run.deleted,
            unchanged=run.unchanged,
            skipped=tuple(run.skipped),
            chunks_embedded=run.chunks_embedded,
            chunks_total=manifest.chunks,
            seconds=time.monotonic() - started,
        )

    def _synchronise(self, run: Sync, state: IndexState) -> IndexState:
        """Let a run do its work; the state after it."""
        run.progress(IndexProgress("scanning", 0, len(state.roots), None))
        found = roots.scan_roots(state.roots, run.manifest.entries, state.settings, self._index_dir)
        run.skipped += found.skipped
        try:
            run.files(found.scans)
            run.forget({root for root, _ in run.manifest.entries} - found.absent, found.scans)
        except BaseException:
            if state.collection == run.store.id:
                with suppress(OSError):  # for `status`; the next run asks Chroma
                    run.manifest.save(self._index_dir, complete=False)
            raise
        return replace(
            state,
            collection=run.store.id,
            roots=tuple(found.roots),
            updated_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def _open_for_writing(self, state: IndexState) -> tuple[ChunkStore, Manifest]:
        """The collection to write to and what it holds; both made anew, or mended, where they must be."""
        from epic_rag_chroma.store import ChunkStore

        store = ChunkStore.open(self._index_dir, state.collection)
        if store is not None and store.fingerprint != state.fingerprint:
            store.close()
            store = None
        if store is None:
            store = ChunkStore.create(
                self._index_dir,
                source=state.source,
                model=state.model,
                fingerprint=state.fingerprint,
                truncate_dim=state.truncate_dim,
            )
            return store, Manifest(store.id)
        try:
            manifest = Manifest.load(self._index_dir)
            if (
                manifest is None
                or not manifest.complete
                or manifest.collection != store.id
                or manifest.chunks != store.count()
            ):
                manifest = recover(store)
        except BaseException:
            store.close()
            raise
        return store, manifest

    def _search(self, ask: Callable[[ChunkStore], list[Found]]) -> list[Found]:
        """Ask the collection that counts now; a rebuild in another process may swap it at any moment."""
        from epic_rag_chroma.store import ChunkStore

        for attempt in range(_SWAP_ATTEMPTS):
            seen = versions(self._index_dir)
            # A live client does not see what another process has written since.
            if self._store is None or seen != self._seen:
                self._close_store()
                state = self._state()
                if state.collection is None:
                    return []
                self._store = ChunkStore.open(self._index_dir, state.collection)
                self._seen = seen
                if self._store is None:
                    if versions(self._index_dir) != seen:
                        continue
                    raise IndexStateError(
                        f"{self._index_dir} has lost its collection; run `epic-rag index` with the indexed folder to "
                        "make it again"
                    )
            try:
                return ask(self._store)
            except Exception:
                self._close_store()
                if attempt + 1 == _SWAP_ATTEMPTS or versions(self._index_dir) == seen:
                    raise
        raise IndexStateError(f"{self._index_dir} is being rebuilt; run the query again")

    def _hit(self, rank: int, row: Found) -> Hit:
        metadata = row.metadata
        headings = str(metadata.get("heading_path", ""))
        return Hit(
            rank=rank,
            score=max(-1.0, min(1.0, row.score)),
            path=str(metadata.get("path", "")),
            first_line=_number(metadata.get("first_line")),
            last_line=_number(metadata.get("last_line")),
            page=_number(metadata.get("page")),
            heading_path=tuple(headings.split(HEADING_SEPARATOR)) if headings else (),
            text=row.text,
            id=row.id,
            root=str(roots.where(str(metadata.get("root", "")), self._index_dir)),
        )

    def _state(self) -> IndexState:
        state = IndexState.load(self._index_dir)
        if state is None:
            raise self._no_index()
        return state

    def _no_index(self) -> IndexNotFoundError:
        return IndexNotFoundError(f"no index in {self._index_dir}; run `epic-rag index PATH` to make one")

    def _load(self, state: IndexState | None) -> EpicEncoder:
        """The encoder: the caller's, or the one that the index was built with, or the default."""
        if self._given is None:
            if self._encoder is None or (state is not None and self._encoder.fingerprint != state.fingerprint):
                from epic_rag import EpicEncoder

                source = None if state is None else state.source
                truncate_dim = None if state is None else state.truncate_dim
                self._encoder = EpicEncoder.from_pretrained(source, truncate_dim=truncate_dim)
        elif self._encoder is None:
            # Anything with the encoder's methods will do; only a function that makes one is called.
            given: Any = self._given
            self._encoder = given if hasattr(given, "encode_document") else given()
        encoder: EpicEncoder = self._encoder
        return encoder

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None


def _silent(_: IndexProgress) -> None:
    pass


def _number(value: object) -> int | None:
    return int(value) if isinstance(value, (int, float)) else None
