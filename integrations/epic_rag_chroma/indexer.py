"""`ChromaIndexer`: from folders of files to a persistent index, and from queries to hits with lines."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epic_rag.errors import ConfigError, DataError
from epic_rag_chroma.errors import ChromaServerError, IndexNotFoundError, IndexStateError
from epic_rag_chroma.indexing.compatibility import check_model
from epic_rag_chroma.reading.document import HEADING_SEPARATOR
from epic_rag_chroma.reading.file_types import byte_limit, kind_of
from epic_rag_chroma.search.index_reader import IndexReader
from epic_rag_chroma.search.request import SearchRequest
from epic_rag_chroma.search.searcher import Searcher, replace_queries
from epic_rag_chroma.store.database import IndexDatabase
from epic_rag_chroma.store.layout import (
    check_owner,
    delete_index,
    folder_size,
    is_index,
    is_safe_relative_path,
    remove_if_empty,
)
from epic_rag_chroma.store.lock import chroma_lock, is_locked, write_lock
from epic_rag_chroma.store.migration import check_migrated, old_place
from epic_rag_chroma.store.paths import DATABASE_FILE, existing_path, relative_root, root_path
from epic_rag_chroma.store.server import (
    NO_CHROMA,
    ChromaServer,
    ServerPlace,
    collection_name,
    parse_server,
    require_known,
)
from epic_rag_chroma.store.state import stale_state
from epic_rag_chroma.types import (
    Hit,
    IndexedPassage,
    IndexPlan,
    IndexProgress,
    IndexReport,
    IndexSettings,
    IndexStatus,
    ModelInfo,
    RunState,
    StaleState,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from epic_rag import DemonstrationBank, EpicEncoder
    from epic_rag_chroma.indexing.run import IndexRunner
    from epic_rag_chroma.search.index_reader import IndexSnapshot
    from epic_rag_chroma.search.request import SearchSettings
    from epic_rag_chroma.search.searcher import Embedded, Encode, Vectors
    from epic_rag_chroma.store.database import Record
    from epic_rag_chroma.store.state import IndexState

__all__ = ["ChromaIndexer", "marking_bank"]

_WITHOUT_LINES = frozenset({"pdf", "docx", "pptx", "xlsx", "opendocument", "rtf", "epub"})


class ChromaIndexer:
    """An index of folders: `index` brings it up to date, `query` searches it. Thread-safe.

    Args:
        index_dir: The index folder; need not exist yet.
        encoder: An encoder, or a function that loads one when it is needed. None loads the model that the index was
            built with, or the default checkpoint for a new index. `status` and `clear` never load a model.
        chroma: Where runs keep a Chroma collection of the index, for programs that read Chroma: a server as
            `http(s)://host:port` (tenant and database from the environment) or a `ChromaServer`, `LOCAL` for the index
            folder, `NO_CHROMA` for nowhere. None keeps the place; a new index uses the server in EPIC_RAG_CHROMA, or
            else the index folder.
        dtype: Data type of a model that is loaded here; see `EpicEncoder.from_pretrained`.
        device: Its device or devices; see `EpicEncoder.from_pretrained`.
        batch_chunks: How many chunks are collected, sorted by length and embedded at a time; None for 512. More chunks
            need more memory.

    Raises:
        ConfigError: If `chroma` is not an address, or `batch_chunks` is less than 1.

    Example:
        >>> indexer = ChromaIndexer("docs/.epic-rag")
        >>> indexer.index(["docs"])
        >>> indexer.query("how do I undo a commit?", k=3, bank="docs")
    """

    def __init__(
        self,
        index_dir: str | os.PathLike[str],
        *,
        encoder: EpicEncoder | Callable[[], EpicEncoder] | None = None,
        chroma: str | ChromaServer | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_chunks: int | None = None,
    ) -> None:
        if batch_chunks is not None and batch_chunks < 1:
            raise ConfigError(f"batch_chunks is {batch_chunks}. It must be at least 1.")
        self._index_dir = Path(index_dir).resolve()
        self._given = encoder
        self._dtype = dtype
        self._device = device
        self._batch_chunks = batch_chunks
        self._chroma = parse_server(chroma)
        self._encoder: EpicEncoder | None = None
        self._encoder_lock = threading.Lock()
        self._reader = IndexReader(self._index_dir)
        self._searcher = Searcher(self._index_dir, self._reader)

    def __enter__(self) -> ChromaIndexer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index's files; a later query opens them again."""
        with self._reader.closed():
            pass

    def index(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        remove: Sequence[str | os.PathLike[str]] = (),
        settings: IndexSettings | None = None,
        rebuild: bool = False,
        progress: Callable[[IndexProgress], None] | None = None,
        wait: float | None = 0.0,
    ) -> IndexReport:
        """Bring the index up to date with its folders; new paths are added to them.

        Files with unchanged content are not embedded again, nor is text that already has a vector, in whatever file.
        Files that cannot be read are skipped with a reason and keep their chunks. Queries, also of this object, work
        during the run.

        Args:
            paths: Folders and files. A path inside an indexed folder stands for that folder; no path at all for the
                folders of the index.
            remove: Folders and files of earlier runs that leave the index; need not exist any more.
            settings: None for the settings of the index, or the defaults. Other `include` and `exclude` patterns are
                adopted; other chunk sizes need `rebuild`.
            rebuild: Embed everything again, beside the old index, which answers queries until the new one is complete.
            progress: Called after each step.
            wait: How many seconds to wait for another process that writes to the index; None without limit.

        Raises:
            DataError: If a path does not exist, or one to remove was never added.
            ConfigError: If the chunks are longer than the model's input.
            IndexLockedError: If another process is writing to the index.
            IndexMismatchError: If the index has another model, other chunk sizes, or chunks of another version.
            IndexStateError: If the folder contains something else, belongs to another user, has an index that cannot
                be read, or cannot be written to. Stored data stays intact.
        """
        resolved = [existing_path(path) for path in paths]
        removed = [Path(path).resolve() for path in remove]
        self.close()
        return self._runner().run(
            resolved, settings, remove=removed, rebuild=rebuild, progress=progress or _no_progress, wait=wait
        )

    def load_rows(
        self,
        rows: Iterable[Sequence[Record]],
        info: ModelInfo,
        *,
        parts: str,
        settings: IndexSettings | None = None,
        rebuild: bool = False,
        progress: Callable[[int], None] | None = None,
        wait: float | None = 0.0,
    ) -> IndexReport:
        """Make the index equal to rows that were embedded elsewhere, such as those of Parquet files. Loads no model.

        Rows that the index has already stay as they are, others are added, changed and deleted. Queries work meanwhile,
        and a run that was interrupted is continued by the next one.

        Args:
            rows: All rows, in batches. Metadata are those of an index (docs/chroma.md); `path` is a relative path.
            info: The encoder of their vectors.
            parts: Folder or address of the files that hold them; the index remembers it.
            settings: Chunk sizes that they were made with, for `status`.
            rebuild: Replace an index of another encoder, or of folders.
            progress: Called with the number of rows that were read so far.
            wait: How many seconds to wait for another process that writes to the index; None without limit.

        Returns:
            Counts of documents; `chunks_reused` is the number of rows that were added or changed.

        Raises:
            ConfigError: If a vector has another length than `info` says.
            IndexLockedError: If another process is writing to the index.
            IndexMismatchError: If the index has vectors of another encoder.
            IndexStateError: If it holds files of folders, or cannot be read or written. Stored data stays intact.
        """
        self.close()
        return self._runner().load_rows(
            rows,
            info,
            parts,
            settings or IndexSettings(),
            rebuild=rebuild,
            progress=progress or (lambda _: None),
            wait=wait,
        )

    def plan(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        remove: Sequence[str | os.PathLike[str]] = (),
        settings: IndexSettings | None = None,
    ) -> IndexPlan:
        """Return what `index` would do. Nothing is written, no model is loaded, and no lock is needed.

        Args:
            paths: See `index`.
            remove: See `index`.
            settings: See `index`.

        Raises:
            DataError: If a path does not exist, or one to remove was never added.
            IndexStateError: If the folder belongs to another user, or has an index that cannot be read.
        """
        removed = [Path(path).resolve() for path in remove]
        return self._runner().plan([existing_path(path) for path in paths], settings, remove=removed)

    def _runner(self) -> IndexRunner:
        from epic_rag_chroma.indexing.run import IndexRunner  # not needed for queries

        return IndexRunner(self._index_dir, self._chroma, self._load, self._encoder_lock, self._batch_chunks)

    def query(
        self,
        text: str,
        request: SearchRequest | None = None,
        *,
        embedded: Embedded | None = None,
        **settings: Unpack[SearchSettings],
    ) -> list[Hit]:
        """Find the chunks that answer a query.

        Args:
            text: The query.
            request: Settings of the search. Alternatively, give its fields, and those of its prompt, as keyword
                arguments: `query(text, k=3, bank="docs")`.
            embedded: Replaces the query among the vectors: other texts, such as answers imagined by a language model,
                whose vectors are averaged, or a vector (dim,). Keywords are always taken from `text`.
            **settings: See `SearchRequest` and `QueryPrompt`.

        Returns:
            Hits, best first; none for an empty index.

        Raises:
            ConfigError: If a setting or a filter is invalid, or `embedded` has another dimension than the index.
            PromptError: If the prompt's settings do not fit together.
            CheckpointError: If the reranker cannot be loaded.
            IndexNotFoundError: If there is no index.
            IndexMismatchError: If the encoder is not the one that the index was built with.
            KeywordsUnavailableError: In keyword mode, if another version of epic-rag made the keyword index.
        """
        return self.query_many([text], request, embedded=None if embedded is None else [embedded], **settings)[0]

    def query_many(
        self,
        texts: Sequence[str],
        request: SearchRequest | None = None,
        *,
        embedded: Sequence[Embedded | None] | None = None,
        **settings: Unpack[SearchSettings],
    ) -> list[list[Hit]]:
        """Find the chunks that answer each query; the model encodes all queries in one call.

        Args:
            texts: Queries.
            request: See `query`.
            embedded: One entry for each query; see `query`. None for the query itself.
            **settings: See `query`.

        Returns:
            The hits of each query.

        Raises:
            EpicError: See `query`.
        """
        request = SearchRequest.of(request, settings)
        state = self._state()
        encode = self._query_encoder(state, request, len(texts), embedded)
        return self._searcher.search(texts, request, encode, fingerprint=state.fingerprint, bank=marking_bank(request))

    def _query_encoder(
        self, state: IndexState, request: SearchRequest, count: int, embedded: Sequence[Embedded | None] | None
    ) -> Encode:
        """Return the function that encodes `count` queries, or what replaces them."""

        def encode(queries: Sequence[str]) -> Vectors:
            encoder = self._load(state)
            check_model(self._index_dir, state, encoder, [])
            with self._encoder_lock:
                return encoder.encode_query(queries, request.prompt)

        if embedded is None:
            return encode
        if len(embedded) != count:
            raise ConfigError(f"embedded has {len(embedded)} entries for {count} queries. Give one for each.")
        return replace_queries(encode, embedded, state.dimension)

    def status(self) -> IndexStatus:
        """Return a summary of the index; loads no model and does not open Chroma.

        Raises:
            IndexNotFoundError: If there is no index.
            IndexStateError: If it cannot be read.
        """
        self._check_owner()
        database = self._reader.open()
        try:
            with database.snapshot():
                state, files, chunks = database.state(), database.files(), database.count()
                is_unfinished = database.is_unfinished
        finally:
            database.close()
        if state is None:
            check_migrated(self._index_dir)
            raise self._reader.not_found()
        run_state: RunState = "complete"
        if is_unfinished:
            run_state = "running" if is_locked(self._index_dir) else "interrupted"
        return IndexStatus(
            index_dir=str(self._index_dir),
            roots=tuple(str(root_path(root, self._index_dir)) for root in state.roots),
            model=state.model,
            fingerprint=state.fingerprint,
            dimension=state.dimension,
            files=len(files),
            chunks=chunks,
            size_bytes=folder_size(self._index_dir),
            updated_at=state.updated_at,
            settings=state.settings,
            chroma=str(state.chroma) if isinstance(state.chroma, ServerPlace) or state.chroma == NO_CHROMA else None,
            last_run=state.last_run,
            state=run_state,
            kinds=dict(sorted(Counter(kind_of(path) for _, path in files).items())),
            collection="" if state.chroma == NO_CHROMA else collection_name(state.chroma),
            parts=state.parts,
        )

    def stale_files(self, *, max_files: int | None = None) -> dict[str, StaleState] | None:
        """Compare the indexed files with those on disk, by size and modification time; reads none of them.

        Args:
            max_files: Number of files up to which it is done.

        Returns:
            The state of each file that changed or is gone, by its absolute path; None if there are more files than
            `max_files`. Files that are new on disk are not found.

        Raises:
            IndexNotFoundError: If there is no index.
            IndexStateError: If it cannot be read.
        """
        if self._state().parts is not None:
            return {}  # of documents that were read elsewhere
        files = self._reader.read(lambda index: index.database.file_times(), needs_vectors=False)
        if max_files is not None and len(files) > max_files:
            return None
        folders = {root: str(root_path(root, self._index_dir)) for root in {root for root, *_ in files}}
        states = {f"{folders[root]}/{path}": (size, mtime_ns) for root, path, size, mtime_ns in files}
        return {path: state for path, known in states.items() if (state := stale_state(path, *known)) is not None}

    @property
    def encoder(self) -> EpicEncoder:
        """The encoder: the caller's, or that of the index, or the default one; loaded when it is first used.

        Raises:
            CheckpointError: If it cannot be loaded.
            IndexStateError: If there is an index that cannot be read.
        """
        try:
            state = self._state()
        except IndexNotFoundError:
            state = None
        return self._load(state)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the encoder that the index was built with; loads no model.

        Raises:
            IndexNotFoundError: If there is no index.
            IndexStateError: If it cannot be read.
        """
        return self._state().fingerprint

    def paths(self) -> list[str]:
        """Return the paths of the indexed files, relative to their roots as in `Hit.path`, sorted.

        Raises:
            IndexNotFoundError: If there is no index.
            IndexStateError: If it cannot be read.
        """
        files = self._reader.read(lambda index: index.database.file_times(), needs_vectors=False)
        return sorted({path for _, path, *_ in files})

    def passages(self) -> list[IndexedPassage]:
        """Return all chunks with their vectors, in the order in which they were added.

        Raises:
            IndexNotFoundError: If there is no index.
            IndexStateError: If it cannot be read.
        """
        records = self._reader.read(
            lambda index: [record for page in index.database.pages() for record in page], needs_vectors=False
        )
        found = []
        for record in records:
            headings = str(record.metadata.get("heading_path", ""))
            lines = [record.metadata.get(key) for key in ("first_line", "last_line")]
            first, last = (int(line) if isinstance(line, (int, float)) else None for line in lines)
            found.append(
                IndexedPassage(
                    id=record.id,
                    path=str(record.metadata.get("path", "")),
                    first_line=first,
                    last_line=last,
                    heading_path=tuple(headings.split(HEADING_SEPARATOR)) if headings else (),
                    text=record.text,
                    kind=str(record.metadata.get("kind", "")),
                    vector=record.vector,
                )
            )
        return found

    def passage_vectors(self, most: int = 20_000) -> Vectors:
        """Return vectors of the index's chunks, for `DemonstrationBank.evaluate`.

        Args:
            most: Maximum number; of a larger index, chunks at even distances.

        Returns:
            (n, dim) float32 unit rows; (0, 0) for an empty index.

        Raises:
            IndexNotFoundError: If there is no index.
            IndexStateError: If it cannot be read.
        """

        def sample(index: IndexSnapshot) -> Vectors:
            every = max(1, -(-index.database.count() // most))
            return index.database.vectors_after(-1, every=every)[1][:most]

        return self._reader.read(sample, needs_vectors=False)

    def read_lines(self, path: str) -> list[str]:
        """Return the current lines of an indexed file, which the line numbers of hits refer to.

        Only files of the index are read, none through a link that leaves its root (unless the index follows links).

        Args:
            path: The file, relative to its root, as in `Hit.path`.

        Raises:
            DataError: If the index has no such file, it has no lines (PDF, Office), or it cannot be read any more.
            IndexNotFoundError: If there is no index.
            IndexStateError: If it cannot be read.
        """
        from epic_rag_chroma.reading.document import NotTextError, split_lines  # not needed for queries
        from epic_rag_chroma.reading.encoding import decode
        from epic_rag_chroma.walk.safe_read import read_regular

        state = self._state()
        # The root of an indexed file is stored as the file, and its document's as the folder.
        folders = [relative_root(root_path(root, self._index_dir).parent, self._index_dir) for root in state.roots]
        known = self._reader.read(
            lambda index: [root for root in (*state.roots, *folders) if index.database.file((root, path)) is not None],
            needs_vectors=False,
        )
        if not known or not is_safe_relative_path(path):
            raise DataError(f"{path} is not a file of the index. Use the path of a hit.")
        if kind_of(path) in _WITHOUT_LINES:
            raise DataError(f"{path} has no lines. Open it in its own program.")
        root = root_path(known[0], self._index_dir)
        file = root / path
        try:
            if not state.settings.follow_links and not file.resolve().is_relative_to(root.resolve()):
                raise DataError(f"{path} has become a link to another folder. Run `epic-rag index` again.")
            content, _ = read_regular(file.resolve() if state.settings.follow_links else file, byte_limit(path))
            return split_lines(decode(content))
        except OSError as error:
            raise DataError(
                f"{path} cannot be read any more ({error.strerror}). Run `epic-rag index` again."
            ) from error
        except NotTextError as error:
            raise DataError(f"{path} cannot be read any more ({error}). Run `epic-rag index` again.") from error

    def clear(self) -> None:
        """Delete the files of the index, and the folder if nothing else is in it.

        Raises:
            IndexNotFoundError: If the folder is not an index.
            IndexLockedError: If another process is writing to it.
        """
        if not is_index(self._index_dir):
            raise self._reader.not_found()
        check_owner(self._index_dir)
        with self._reader.closed():
            with write_lock(self._index_dir), chroma_lock(self._index_dir):
                self._delete_from_server()
                delete_index(self._index_dir)
            remove_if_empty(self._index_dir)

    def _delete_from_server(self) -> None:
        place: ServerPlace | str | None = old_place(self._index_dir)
        try:
            database = IndexDatabase.open_reading(self._index_dir / DATABASE_FILE)
            try:
                state = database.state()
                place = place if state is None else state.chroma
            finally:
                database.close()
        except IndexStateError:
            pass  # the server is unknown
        if not isinstance(place, ServerPlace):
            return
        from epic_rag_chroma.store.collection import delete_collections

        require_known(self._index_dir, place.server, is_named=place.server == self._chroma)
        try:
            delete_collections(place)
        except ChromaServerError as error:
            raise ChromaServerError(
                f"{error} Alternatively, delete the folder {self._index_dir} and leave the server's collection behind.",
                error.status,
            ) from error

    def _state(self) -> IndexState:
        self._check_owner()
        return self._reader.state()

    def _check_owner(self) -> None:
        if self._index_dir.is_dir():
            check_owner(self._index_dir)

    def _load(self, state: IndexState | None) -> EpicEncoder:
        """Return the caller's encoder, or that of the index, or the default one."""
        if self._given is None:
            if self._encoder is None or (state is not None and self._encoder.fingerprint != state.fingerprint):
                from epic_rag import EpicEncoder

                source = None if state is None else state.source
                truncate_dim = None if state is None else state.truncate_dim
                self._encoder = EpicEncoder.from_pretrained(
                    source, truncate_dim=truncate_dim, dtype=self._dtype, device=self._device
                )
        elif self._encoder is None:
            # Any object with the encoder's methods will do; only a function that makes one is called.
            given: Any = self._given
            self._encoder = given if hasattr(given, "encode_document") else given()
        encoder: EpicEncoder = self._encoder
        return encoder


def marking_bank(request: SearchRequest) -> DemonstrationBank | None:
    """Return the bank whose examples mark passages; None if the request uses no demonstrations.

    Raises:
        BankError: If the bank is missing or malformed.
    """
    bank = request.prompt.resolve_bank()
    return None if bank is None or bank.number_used(request.prompt.num_demonstrations) == 0 else bank


def _no_progress(_: IndexProgress) -> None:
    pass
