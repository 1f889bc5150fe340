"""Federated search: several indexes of one model are searched as if they were one.

What is compared across indexes is comparable. Cosines are, since all vectors come from one model. BM25 scores of two
indexes are not, since a term's weight depends on how many chunks of its index have it; so each index gives its best
chunks, and they are scored again with the counts of all indexes together, as Elasticsearch's `dfs_query_then_fetch`
does. Chunk lengths are still compared with the average of their own index. Fusion, filters, near-duplicates and
reranking then work on the joint rankings, in the same `Searcher` as for a single index.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from epic_rag.errors import ConfigError
from epic_rag_chroma.errors import IndexMismatchError
from epic_rag_chroma.indexer import ChromaIndexer, marking_bank
from epic_rag_chroma.search.request import SearchRequest
from epic_rag_chroma.search.searcher import Searcher
from epic_rag_chroma.store.keyword_index import attainable_score, term_weight
from epic_rag_chroma.store.paths import relative_root, root_path
from epic_rag_chroma.store.tokenizer import ParsedQuery, parse_query
from epic_rag_chroma.types import Hit, IndexStatus, StaleState

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Unpack

    from epic_rag import EpicEncoder
    from epic_rag_chroma.search.index_reader import IndexReader, IndexSnapshot, Ranking
    from epic_rag_chroma.search.request import SearchSettings
    from epic_rag_chroma.search.searcher import Embedded
    from epic_rag_chroma.store.database import Record
    from epic_rag_chroma.store.paths import DocumentKey
    from epic_rag_chroma.store.server import ChromaServer
    from epic_rag_chroma.store.state import FileEntry, IndexState

__all__ = ["FederatedIndex"]

Answer = TypeVar("Answer")


class FederatedIndex:
    """Several indexes of one model, searched as one; the model is loaded once. Thread-safe.

    Args:
        index_dirs: The index folders; one that is given twice counts once.
        encoder: See `ChromaIndexer`.
        chroma: See `ChromaIndexer`.
        dtype: See `ChromaIndexer`.
        device: See `ChromaIndexer`.

    Raises:
        ConfigError: If there is no folder, or `chroma` is not an address.

    Example:
        >>> index = FederatedIndex(["manual/.epic-rag", "notes/.epic-rag"])
        >>> index.query("how do I undo a commit?", k=3)
    """

    def __init__(
        self,
        index_dirs: Sequence[str | os.PathLike[str]],
        *,
        encoder: EpicEncoder | Callable[[], EpicEncoder] | None = None,
        chroma: str | ChromaServer | None = None,
        dtype: str | None = None,
        device: str | None = None,
    ) -> None:
        self._folders = list(dict.fromkeys(Path(folder).resolve() for folder in index_dirs))
        if not self._folders:
            raise ConfigError("There is no index to search. Pass at least one index folder.")
        self._indexers = [
            ChromaIndexer(folder, encoder=encoder, chroma=chroma, dtype=dtype, device=device)
            for folder in self._folders
        ]
        reader = _FederatedReader(self._folders, [indexer._reader for indexer in self._indexers])
        # The searcher takes absolute roots from the federated snapshot, so its folder decides nothing.
        self._searcher = Searcher(self._folders[0], cast("IndexReader", reader))

    def __enter__(self) -> FederatedIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files of all indexes; a later query opens them again."""
        for indexer in self._indexers:
            indexer.close()

    def query(
        self,
        text: str,
        request: SearchRequest | None = None,
        *,
        embedded: Embedded | None = None,
        **settings: Unpack[SearchSettings],
    ) -> list[Hit]:
        """Find the chunks of all indexes that answer a query; see `ChromaIndexer.query`.

        Raises:
            IndexMismatchError: If the indexes were built with different models, except in keyword mode.
            EpicError: As `ChromaIndexer.query`.
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
        """Find the chunks of all indexes that answer each query; see `ChromaIndexer.query_many`.

        Raises:
            EpicError: See `query`.
        """
        request = SearchRequest.of(request, settings)
        states = [indexer._state() for indexer in self._indexers]
        for folder, state in zip(self._folders, states, strict=True):
            if request.mode != "keyword" and state.fingerprint != states[0].fingerprint:
                raise IndexMismatchError(
                    f"{self._folders[0]} was built with {states[0].model} ({states[0].fingerprint}) and {folder} with "
                    f"{state.model} ({state.fingerprint}); their cosines cannot be compared. Rebuild one of them with "
                    "the other's --model, or search with --mode keyword."
                )
        encode = self._indexers[0]._query_encoder(states[0], request, len(texts), embedded)
        bank = marking_bank(request)
        found = self._searcher.search(texts, request, encode, fingerprint=states[0].fingerprint, bank=bank)
        return [[replace(hit, id=hit.id.rpartition(":")[0]) for hit in hits] for hits in found]

    def status(self) -> list[IndexStatus]:
        """Return a summary of each index; see `ChromaIndexer.status`."""
        return [indexer.status() for indexer in self._indexers]

    def stale_files(self, *, max_files: int | None = None) -> dict[str, StaleState] | None:
        """Compare the files of all indexes with those on disk; see `ChromaIndexer.stale_files`.

        Args:
            max_files: Number of files of an index up to which it is done.
        """
        found: dict[str, StaleState] = {}
        for indexer in self._indexers:
            stale = indexer.stale_files(max_files=max_files)
            if stale is None:
                return None
            found.update(stale)
        return found


class _FederatedReader:
    """Reads several indexes for one query.

    Args:
        folders: The index folders.
        readers: Their readers.
    """

    def __init__(self, folders: Sequence[Path], readers: Sequence[IndexReader]) -> None:
        self._folders = folders
        self._readers = readers

    def read(self, query: Callable[[IndexSnapshot], Answer], *, needs_vectors: bool = True) -> Answer:
        """Call a function with one state of each index, as `IndexReader.read` does."""
        return self._read(query, needs_vectors, [])

    def _read(
        self, query: Callable[[IndexSnapshot], Answer], needs_vectors: bool, opened: list[IndexSnapshot]
    ) -> Answer:
        if len(opened) == len(self._readers):
            return query(cast("IndexSnapshot", _FederatedSnapshot(self._folders, opened)))
        reader = self._readers[len(opened)]
        return reader.read(
            lambda snapshot: self._read(query, needs_vectors, [*opened, snapshot]), needs_vectors=needs_vectors
        )


class _FederatedSnapshot:
    """One state of each index, with the methods of `IndexSnapshot` and its database.

    An id is the chunk's id in its index, a colon and the position of the index; a number is the chunk's number times
    the number of indexes, plus that position. Roots are absolute.
    """

    def __init__(self, folders: Sequence[Path], snapshots: Sequence[IndexSnapshot]) -> None:
        self.database = self
        self._folders = folders
        self._snapshots = snapshots
        self._databases = [snapshot.database for snapshot in snapshots]

    def nearest(self, vector: npt.NDArray[np.float32], k: int, allowed: Collection[int] | None = None) -> Ranking:
        """Return the k chunks of all indexes nearest to a vector (dim,)."""
        found = [
            (f"{row_id}:{place}", score)
            for place, snapshot in enumerate(self._snapshots)
            for row_id, score in snapshot.nearest(vector, k, self._part(allowed, place))
        ]
        return sorted(found, key=lambda each: (-each[1], each[0]))[:k]

    def match(self, query: ParsedQuery, k: int, allowed: Collection[int] | None = None) -> Ranking:
        """Return the k chunks of all indexes with the highest BM25 scores by the counts of all indexes."""
        languages, counts, totals = self._counts(query)
        best = [
            database.match(query, k, self._part(allowed, place), languages=languages)
            for place, database in enumerate(self._databases)
        ]
        weights = {term: term_weight(sum(totals), sum(each[term] for each in counts)) for term in counts[0]}
        found: list[tuple[str, float]] = []
        for place, (database, rows) in enumerate(zip(self._databases, best, strict=True)):
            scores = dict.fromkeys((row_id for row_id, _ in rows), 0.0)
            numbers = database.numbers_of(scores)
            for term, weight in weights.items():
                own = term_weight(totals[place], counts[place][term])
                for row_id, score in database.match_term(term, numbers):
                    scores[row_id] += score * weight / own
            found += [(f"{row_id}:{place}", score) for row_id, score in scores.items()]
        return sorted(found, key=lambda each: (-each[1], each[0]))[:k]

    def attainable(self, query: ParsedQuery) -> float:
        """Return the score of a chunk that has every word of a query, by the counts of all indexes."""
        languages, counts, totals = self._counts(query)
        joint = {term: sum(each[term] for each in counts) for term in counts[0]}
        return attainable_score(query, languages, joint, sum(totals))

    def _counts(self, query: ParsedQuery) -> tuple[frozenset[str], list[dict[str, int]], list[int]]:
        """Return the languages of all indexes, and the counts of terms and chunks of each."""
        languages = frozenset[str]().union(*(database.languages() for database in self._databases))
        terms = self._databases[0].query_terms(query, languages)
        counts = [database.term_counts(terms) for database in self._databases]
        return languages, counts, [database.count() for database in self._databases]

    def parsed(self, query: str) -> ParsedQuery:
        """Return a query as parsed with the options that one of the indexes has."""
        return parse_query(query, frozenset[str]().union(*(database.options(query) for database in self._databases)))

    def restrict(self, query: ParsedQuery) -> tuple[frozenset[int] | None, frozenset[int]]:
        """Return which chunks a query requires (None: all) and excludes."""
        required: set[int] = set()
        excluded: set[int] = set()
        for place, database in enumerate(self._databases):
            some, others = database.restrict(query)
            required.update(self._number(number, place) for number in some or ())
            excluded.update(self._number(number, place) for number in others)
        return frozenset(required) if query.phrases else None, frozenset(excluded)

    def numbers(self) -> list[int]:
        """Return the numbers of all chunks."""
        return [
            self._number(int(number), place)
            for place, database in enumerate(self._databases)
            for number in database.numbers()
        ]

    def get(self, ids: Collection[str]) -> dict[str, Record]:
        """Return chunks by id, without those that do not exist."""
        found: dict[str, Record] = {}
        for place, own in self._by_place(ids):
            for record in self._databases[place].get(own).values():
                federated = self._federated(record, place)
                found[federated.id] = federated
        return found

    def neighbours(self, row_id: str, first: int, last: int) -> list[Record]:
        """Return the chunks of a chunk's file from one position to another, in order."""
        own, _, place = row_id.rpartition(":")
        return [self._federated(each, int(place)) for each in self._databases[int(place)].neighbours(own, first, last)]

    def numbers_of(self, ids: Collection[str]) -> list[int]:
        """Return the numbers of chunks by their ids."""
        return [
            self._number(number, place)
            for place, own in self._by_place(ids)
            for number in self._databases[place].numbers_of(own)
        ]

    def scan(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield number and metadata of all chunks."""
        for place, database in enumerate(self._databases):
            for number, metadata in database.scan():
                metadata["root"] = self._absolute(str(metadata.get("root", "")), place)
                yield self._number(number, place), metadata

    def files(self) -> dict[DocumentKey, FileEntry]:
        """Return the entries of all files."""
        return {
            (self._absolute(root, place), path): entry
            for place, database in enumerate(self._databases)
            for (root, path), entry in database.files().items()
        }

    def file(self, key: DocumentKey) -> FileEntry | None:
        """Return the entry of a file."""
        root, path = key
        for folder, database in zip(self._folders, self._databases, strict=True):
            entry = database.file((relative_root(Path(root), folder), path))
            if entry is not None:
                return entry
        return None

    def version(self) -> tuple[tuple[str, int], ...]:
        """Return a value that changes whenever chunks of an index change."""
        return tuple(database.version() for database in self._databases)

    def state(self) -> IndexState | None:
        """Return the settings of the first index; those of one with another model, if there is one."""
        states = [database.state() for database in self._databases]
        first = states[0]
        others = (state for state in states if state is None or first is None or state.fingerprint != first.fingerprint)
        return next(others, first)

    def _number(self, number: int, place: int) -> int:
        return number * len(self._databases) + place

    def _part(self, allowed: Collection[int] | None, place: int) -> list[int] | None:
        """Return the numbers in one index of those that are allowed."""
        count = len(self._databases)
        return None if allowed is None else [number // count for number in allowed if number % count == place]

    def _by_place(self, ids: Collection[str]) -> Iterator[tuple[int, list[str]]]:
        parts: list[list[str]] = [[] for _ in self._databases]
        for each in ids:
            row_id, _, place = each.rpartition(":")
            parts[int(place)].append(row_id)
        yield from ((place, own) for place, own in enumerate(parts) if own)

    def _federated(self, record: Record, place: int) -> Record:
        metadata = {**record.metadata, "root": self._absolute(str(record.metadata.get("root", "")), place)}
        return replace(record, id=f"{record.id}:{place}", metadata=metadata)

    def _absolute(self, root: str, place: int) -> str:
        return str(root_path(root, self._folders[place]))
