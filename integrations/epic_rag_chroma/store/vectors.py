"""Exact vector search: all vectors of an index in memory, mapped from a file where it is up to date.

`vectors.bin` is a copy of the database's vectors in one block, which a process maps instead of reading 100,000 rows. It
may be missing or old: a chunk's number is never used again and its vector never changes, so numbers that are gone from
the database are masked and vectors of later numbers are read from it. The writer replaces the file at the end of a run
when too much of it is old, and stores its token in the database. A file with another token is not used: it is newer
than the reader's snapshot, or the database was restored from a backup.

Layout: magic (8 bytes), token (32), version of the database, count and dim (u64 each), numbers (count,) int64 in
ascending order, vectors (count, dim) float32; little-endian.
"""

from __future__ import annotations

import os
import struct
import tempfile
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from epic_rag.files import default_mode
from epic_rag_chroma.errors import IndexDamagedError
from epic_rag_chroma.store.database import IndexDatabase
from epic_rag_chroma.store.paths import VECTORS_FILE

__all__ = ["OLD_ROWS", "VectorSearch", "write_vectors"]

_HEADER = struct.Struct("<8s32sQQQ")
_MAGIC = b"EPICVEC1"
OLD_ROWS = 1000
"""The file is kept while no more of its rows are old. Reading 1,000 rows takes 2 ms."""
_OLD_SHARE = 0.05
_NO_MATRIX = np.zeros((0, 0), dtype=np.float32)

Vector = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Block:
    """Numbers (n,) and vectors (n, dim) of a database at a version."""

    token: str
    version: int
    numbers: Numbers
    matrix: Vector


def _load(path: Path, token: str | None) -> _Block | None:
    """Map the file; None if there is none with that token or it is damaged."""
    if token is None:
        return None
    try:
        with open(path, "rb") as file:
            magic, found, version, count, dim = _HEADER.unpack(file.read(_HEADER.size))
            size = os.fstat(file.fileno()).st_size
            if (
                (magic, found) != (_MAGIC, token.encode())
                or size != _HEADER.size + count * 8 + count * dim * 4
                or not count
            ):
                return None
            numbers = np.memmap(file, "<i8", "r", _HEADER.size, (count,))
            if not (np.diff(numbers) > 0).all():
                return None
            matrix = np.memmap(file, "<f4", "r", _HEADER.size + 8 * count, (count, dim))
    except (OSError, ValueError, struct.error):
        return None
    return _Block(token, version, np.asarray(numbers), np.asarray(matrix))


def write_vectors(database: IndexDatabase, *, old_rows: int = OLD_ROWS) -> None:
    """Replace the file beside a database if too much of it is old.

    Args:
        database: The database, open for writing.
        old_rows: The file is kept if at most that many of its rows, or a twentieth of them, are old.

    Raises:
        OSError: If it cannot be written.
        IndexStateError: If the database cannot be written.
    """
    path = database.path.with_name(VECTORS_FILE)
    _, version = database.version()
    block = _load(path, database.vectors_token())
    if block is not None:
        if block.version == version:
            return
        alive = database.numbers()
        kept = int(np.isin(block.numbers, alive, assume_unique=True).sum())
        old = len(block.numbers) + len(alive) - 2 * kept
        if old <= max(old_rows, _OLD_SHARE * len(alive)):
            return
        block = None
    numbers, matrix = database.vectors_after(-1)
    token = uuid.uuid4().hex
    handle, name = tempfile.mkstemp(prefix=f".{VECTORS_FILE}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            header = _HEADER.pack(_MAGIC, token.encode(), version, len(numbers), matrix.shape[1])
            file.write(header)
            file.write(numbers.astype("<i8", copy=False).data)
            file.write(np.ascontiguousarray(matrix, dtype="<f4").data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, default_mode())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    database.save_vectors_token(token)


class VectorSearch:
    """Exact search over the vectors of a database, refreshed when it has changed. Not thread-safe.

    Args:
        database: The open database; call within a snapshot.
    """

    def __init__(self, database: IndexDatabase) -> None:
        self._database = database
        self._block: _Block | None = None
        self._alive: npt.NDArray[np.bool_] | None = None
        self._later: tuple[Numbers, Vector] = (np.zeros(0, dtype=np.int64), _NO_MATRIX)
        self._last = -1  # the last number of the block
        self._version: tuple[str, int] | None = None

    def nearest(self, vector: Vector, k: int, allowed: Collection[int] | None = None) -> list[tuple[str, float]]:
        """Return the k chunks nearest to a vector.

        Args:
            vector: Unit vector (dim,) float32.
            k: Maximum number of chunks.
            allowed: Numbers of the chunks to search among; None for all.

        Returns:
            (id, cosine), best first; equal cosines in the order of their ids.

        Raises:
            IndexDamagedError: If the stored vectors have another dimension.
        """
        self._refresh(len(vector))
        numbers, scores = self._scores(vector)
        if allowed is not None:
            scores = np.where(np.isin(numbers, np.fromiter(allowed, dtype=np.int64)), scores, -np.inf)
        if k < 1 or not len(scores):
            return []
        # The k-th best score: every chunk with it is a candidate, so that ties are broken by id.
        limit = np.partition(scores, len(scores) - k)[len(scores) - k] if k < len(scores) else -np.inf
        best = np.flatnonzero((scores >= limit) & np.isfinite(scores))
        ids = self._database.ids(numbers[best].tolist())
        found = [(ids[int(numbers[row])], float(scores[row])) for row in best]
        return sorted(found, key=lambda each: (-each[1], each[0]))[:k]

    def _scores(self, vector: Vector) -> tuple[Numbers, Vector]:
        """Return numbers (n,) and cosines (n,)."""
        numbers, matrix = self._later
        scores = _cosines(matrix, vector) if len(numbers) else np.zeros(0, dtype=np.float32)
        if self._block is None:
            return numbers, scores
        mapped = _cosines(self._block.matrix, vector)
        if self._alive is not None:
            mapped[~self._alive] = -np.inf
        return np.concatenate([self._block.numbers, numbers]), np.concatenate([mapped, scores])

    def _refresh(self, dim: int) -> None:
        version = self._database.version()
        if version == self._version:
            return
        block, token = self._block, self._database.vectors_token()
        if block is None or block.token != token:
            block = _load(self._database.path.with_name(VECTORS_FILE), token)
        if block is not None and block.matrix.shape[1] != dim:
            block = None
        last = -1 if block is None else int(block.numbers[-1])
        numbers, matrix = self._later
        known = max(last, int(numbers[-1]) if len(numbers) else -1)
        if self._version is None or self._version[0] != version[0] or last < self._last:
            numbers, matrix, known = numbers[:0], _NO_MATRIX, last
        later_numbers, later = self._database.vectors_after(known)
        self._alive = None
        if block is None or block.version != version[1]:
            alive = self._database.numbers()
            self._alive = None if block is None else np.isin(block.numbers, alive, assume_unique=True)
            kept = np.isin(numbers, alive, assume_unique=True) & (numbers > last)
            numbers, matrix = numbers[kept], matrix[kept]
        else:  # the file has everything
            numbers, matrix = numbers[:0], _NO_MATRIX
        if len(later_numbers):
            if later.shape[1] != dim:
                raise IndexDamagedError(
                    f"{self._database.path} has vectors with {later.shape[1]} numbers, the model's have {dim}. "
                    "Run `epic-rag index --rebuild` with the indexed folder."
                )
            numbers = np.concatenate([numbers, later_numbers])
            matrix = np.concatenate([matrix.reshape(-1, dim), later])
        self._block, self._last, self._later, self._version = block, last, (numbers, matrix), version


def _cosines(matrix: Vector, vector: Vector) -> Vector:
    """Return cosines (n,) of unit vectors (n, dim) and (dim,).

    With one thread `vecdot` is about as fast as BLAS with all of them (benchmarks/vector_search.py), so searches do not
    wait for each other. Rounded, since equal rows may differ in the last bit of their products.
    """
    cosines: Vector = np.asarray(np.vecdot(matrix, vector), dtype=np.float32)
    return np.round(cosines, 6, out=cosines)
