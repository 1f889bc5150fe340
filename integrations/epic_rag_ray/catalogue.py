"""Comparison of what a corpus holds with the vectors that exist: duplicates, new, changed and deleted rows.

Works on columns of fixed size, about 60 bytes a row: the driver of a corpus of ten million passages needs 600 MB. Ids
and hashes are 128 bits. Rows are grouped and found by the first 64; the other 64 are then compared, so two that
collide in the first half are embedded once more and never taken for one another.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from epic_rag_ray.chunks import BANDS, shingles

if TYPE_CHECKING:
    from epic_rag_ray.parts import VectorParts
    from epic_rag_ray.storage import Storage

__all__ = ["NEAR", "Delta", "Duplicates", "Rows", "compare", "find_duplicates", "hex_ids", "live_rows", "stored_rows"]

Numbers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
NEAR = 0.9
"""Share of common shingles (Jaccard) of near-duplicates."""
_PAIRS_AT_ONCE = 10_000


@dataclass
class Rows:
    """Rows of Parquet files.

    Attributes:
        files: Names of the files.
        file: Number of each row's file.
        row: Number of the row in it.
        id: (n, 2) halves of the ids.
        text: (n, 2) halves of the hashes of the embedded texts.
        hash: Hashes of the metadata.
        tokens: Tokens of the embedded texts; 0 where unknown.
    """

    files: list[str]
    file: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    id: Keys
    text: Keys
    hash: Keys
    tokens: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.file)


@dataclass(frozen=True)
class Duplicates:
    """Rows whose text another row has: `kept[n]` is kept for `row[n]`, exactly the same or a near-duplicate."""

    row: Numbers
    kept: Numbers
    is_near: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Delta:
    """The difference between a corpus and its vectors.

    Args:
        write: Rows of the corpus that need a row with a vector: new ones, and those with other metadata.
        source: For each of them the stored row with the vector of the same text; -1 if it has to be embedded.
        gone: Stored rows that are deleted or replaced.
        deleted: Number of them that are not replaced.
    """

    write: Numbers
    source: Numbers
    gone: Numbers
    deleted: int


def live_rows(storage: Storage, live: dict[str, npt.NDArray[np.int32]]) -> Rows:
    """Return the passages of the current versions of the documents.

    Args:
        storage: The folder.
        live: For each file of `chunks/`, the numbers of its sources that are current.
    """
    return _load(
        sorted(live),
        lambda name: storage.read_table(name, ["id", "embedded_hash", "row_hash", "tokens", "source"]),
        lambda name, table: np.isin(table["source"].to_numpy(), live[name]),
    )


def stored_rows(parts: VectorParts | None) -> Rows:
    """Return the live rows that have vectors; none without parts."""
    if parts is None:
        return _load([], lambda name: pa.table({}), lambda name, table: np.zeros(0, bool))
    return _load(
        parts.files(),
        lambda name: parts.storage.read_table(name, ["id", "embedded_hash", "row_hash"]),
        lambda name, table: parts.live_mask(name, table["id"]),
    )


def _load(
    names: Sequence[str],
    read: Callable[[str], pa.Table],
    select: Callable[[str, pa.Table], npt.NDArray[np.bool_]],
) -> Rows:
    columns: dict[str, list[npt.NDArray[Any]]] = {field.name: [] for field in fields(Rows)[1:]}
    for number, name in enumerate(names):
        table = read(name)
        rows = np.flatnonzero(select(name, table)).astype(np.int32)
        columns["file"].append(np.full(len(rows), number, np.int32))
        columns["row"].append(rows)
        columns["id"].append(_halves(table["id"])[rows])
        columns["text"].append(_halves(table["embedded_hash"])[rows])
        columns["hash"].append(table["row_hash"].to_numpy()[rows])
        has_tokens = "tokens" in table.column_names
        columns["tokens"].append(table["tokens"].to_numpy()[rows] if has_tokens else np.zeros(len(rows), np.int32))
    empty = {"file": np.zeros(0, np.int32), "row": np.zeros(0, np.int32), "id": np.zeros((0, 2), np.uint64)}
    empty |= {"text": empty["id"], "hash": np.zeros(0, np.uint64), "tokens": empty["row"]}
    joined = {name: np.concatenate([empty[name], *arrays]) for name, arrays in columns.items()}
    return Rows(list(names), **joined)


def find_duplicates(storage: Storage, rows: Rows, stored: Rows, *, near: bool) -> Duplicates:
    """Find the rows whose text another row has.

    Of several rows the one that has a vector is kept, else the first.

    Args:
        storage: The folder.
        rows: The corpus.
        stored: The rows that have vectors.
        near: Whether to find near-duplicates too.
    """
    count = len(rows)
    order = np.arange(count) + np.where(_find(rows.id, stored.id) >= 0, 0, count)
    first = _first_of(rows.text, order)
    exact = np.flatnonzero(first != np.arange(count))
    if not near:
        return Duplicates(exact, first[exact], np.zeros(len(exact), bool))
    is_kept = np.ones(count, bool)
    is_kept[exact] = False
    pairs = _verified(storage, rows, _candidates(storage, rows, is_kept, order))
    found: dict[int, int] = {}
    for row, kept in sorted(pairs, key=lambda pair: int(order[pair[0]])):
        if row not in found and kept not in found:
            found[row] = kept
    near_rows = np.array(list(found), np.int64)
    near_kept = np.array(list(found.values()), np.int64)
    # A duplicate of a near-duplicate is one of what is kept for that.
    kept_for = np.arange(count)
    kept_for[near_rows] = near_kept
    return Duplicates(
        np.concatenate([exact, near_rows]),
        np.concatenate([kept_for[first[exact]], near_kept]),
        np.concatenate([np.zeros(len(exact), bool), np.ones(len(near_rows), bool)]),
    )


def _candidates(storage: Storage, rows: Rows, is_kept: npt.NDArray[np.bool_], order: Numbers) -> Numbers:
    """Return pairs (row, earlier row) of kept rows with a key in common, (n, 2)."""
    pairs = [np.zeros((0, 2), np.int64)]
    bounds = np.searchsorted(rows.file, np.arange(len(rows.files) + 1))
    for band in range(BANDS):
        name = f"band_{band}"
        keys = np.zeros(len(rows), np.uint64)
        is_known = is_kept.copy()
        for number, file in enumerate(rows.files):
            inside = slice(bounds[number], bounds[number + 1])
            column = storage.read_table(file, [name])[name]
            is_known[inside] &= column.is_valid().to_numpy()[rows.row[inside]]
            keys[inside] = pc.fill_null(column, 0).to_numpy()[rows.row[inside]]
        known = np.flatnonzero(is_known)
        first = _first_of(np.stack([keys[known], keys[known]], axis=1), order[known])
        others = np.flatnonzero(first != np.arange(len(known)))
        pairs.append(np.stack([known[others], known[first[others]]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def _verified(storage: Storage, rows: Rows, pairs: Numbers) -> Iterator[tuple[int, int]]:
    """Yield the pairs whose texts share enough shingles."""
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        some = pairs[start : start + _PAIRS_AT_ONCE]
        needed = np.unique(some)
        texts: dict[int, str] = {}
        for number in np.unique(rows.file[needed]):
            inside = needed[rows.file[needed] == number]
            table = storage.read_rows(rows.files[number], rows.row[inside], ["text", "embedded"])
            embedded = pc.coalesce(table["embedded"], table["text"]).to_pylist()
            texts.update(zip(inside.tolist(), embedded, strict=True))
        for row, kept in some.tolist():
            one, other = shingles(texts[row]), shingles(texts[kept])
            if one and len(one & other) >= NEAR * len(one | other):
                yield row, kept


def compare(rows: Rows, kept: Numbers, stored: Rows) -> Delta:
    """Compare the corpus with the rows that have vectors.

    Args:
        rows: The corpus.
        kept: Its rows without duplicates, in order.
        stored: The rows that have vectors.
    """
    found = _find(rows.id[kept], stored.id)
    is_new = found < 0
    is_changed = ~is_new & (rows.hash[kept] != stored.hash[np.maximum(found, 0)] if len(stored) else False)
    write = kept[is_new | is_changed]
    is_gone = np.ones(len(stored), bool)
    is_gone[found[~is_new]] = False
    deleted = int(is_gone.sum())
    is_gone[found[is_changed]] = True
    return Delta(write, _find(rows.text[write], stored.text), np.flatnonzero(is_gone), deleted)


def hex_ids(ids: Keys) -> pa.Array:
    """Return ids (n, 2) as strings of 32 hexadecimal digits."""
    digits = binascii.hexlify(ids.astype(">u8").tobytes())
    return pa.array(np.frombuffer(digits, "S32").astype("U32").tolist(), pa.string())


def _halves(column: pa.ChunkedArray) -> Keys:
    """Return strings of 32 hexadecimal digits as (n, 2) numbers."""
    digits = "".join(column.to_pylist())
    return np.frombuffer(bytes.fromhex(digits), ">u8").reshape(-1, 2).astype(np.uint64)


def _find(keys: Keys, known: Keys) -> Numbers:
    """Return for each of `keys` (n, 2) its place among the `known` ones (m, 2); -1 if it is not there."""
    if not len(known):
        return np.full(len(keys), -1, np.int64)
    order = np.argsort(known[:, 0], kind="stable")
    places = np.minimum(np.searchsorted(known[order, 0], keys[:, 0]), len(known) - 1)
    found = order[places]
    return np.where((known[found] == keys).all(axis=1), found, -1).astype(np.int64)


def _first_of(keys: Keys, order: Numbers) -> Numbers:
    """Return for each row the row with the same key (n, 2) that is first by `order`; perhaps the row itself."""
    count = len(keys)
    if not count:
        return np.zeros(0, np.int64)
    by_key = np.lexsort((order, keys[:, 1], keys[:, 0]))
    begins = np.ones(count, bool)
    begins[1:] = (keys[by_key[1:]] != keys[by_key[:-1]]).any(axis=1)
    starts = np.maximum.accumulate(np.where(begins, np.arange(count), 0))
    first = np.empty(count, np.int64)
    first[by_key] = by_key[starts]
    return first
