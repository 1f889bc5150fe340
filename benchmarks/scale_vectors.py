"""Vectors with the statistics of real ones, and scans of them in several number formats; for `scale.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BLOCK", "NEAREST", "Generator", "Quantised", "effective_dimension", "neighbour_cosines"]

Array = np.ndarray[Any, Any]

# Chunks of a document, which have part of their deviation from the cluster in common.
PER_DOCUMENT = 8
BLOCK = 65_536
NEAREST = 10


def unit(rows: Array) -> Array:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Generator:
    """Draws vectors: clusters of real weights and spreads, documents in them, chunks in these.

    A chunk is centre + spread * (sqrt(shared) * its document's deviation + sqrt(1 - shared) * its own), normalised.
    Deviations are normal with the covariance of the real vectors within clusters.

    Attributes:
        centres: (clusters, dim).
        weights: (clusters,) share of the vectors.
        spreads: (clusters,) of deviations, relative to the mean.
        root: (dim, dim) square root of the covariance within clusters.
        shared: Share of the variance that the chunks of a document have in common.
        mixing: Share of its passage in a query; the rest is that of an unrelated passage.
    """

    centres: Array
    weights: Array
    spreads: Array
    root: Array
    shared: float
    mixing: float

    @classmethod
    def fit(cls, vectors: Array, pairs: tuple[Array, Array], clusters: int) -> Generator:
        """Fit to unit vectors (n, dim), and queries to unit vectors of (queries, their passages)."""
        from sklearn.cluster import MiniBatchKMeans

        means = MiniBatchKMeans(clusters, random_state=0, n_init=1, batch_size=4096).fit(vectors)
        labels = means.labels_
        deviations = vectors - means.cluster_centers_[labels]
        squares = (deviations**2).sum(axis=1)
        counts = np.bincount(labels, minlength=clusters)
        spreads = np.sqrt(np.bincount(labels, squares, clusters) / np.maximum(counts, 1) / squares.mean())
        values, axes = np.linalg.eigh(np.cov(deviations.T))
        root = (axes * np.sqrt(np.maximum(values, 0))).T
        first = cls(
            means.cluster_centers_.astype(np.float32), counts / counts.sum(), spreads, root.astype(np.float32), 0.0, 1.0
        )
        wanted = neighbour_cosines(vectors)[0]

        def nearest(shared: float) -> float:
            made = cls(**{**first.__dict__, "shared": shared})
            return neighbour_cosines(made.draw(len(vectors), 0))[0]

        fitted = cls(**{**first.__dict__, "shared": bisect(nearest, wanted)})
        queries, passages = pairs
        between = float((queries * passages).sum(axis=1).mean())
        apart = float((vectors[::2][: len(vectors) // 2] * vectors[1::2][: len(vectors) // 2]).sum(axis=1).mean())

        def cosine(mixing: float) -> float:
            length = math.sqrt(mixing**2 + (1 - mixing) ** 2 + 2 * mixing * (1 - mixing) * apart)
            return (mixing + (1 - mixing) * apart) / length

        return cls(**{**fitted.__dict__, "mixing": bisect(cosine, between)})

    def draw(self, count: int, seed: int) -> Array:
        """Draw unit vectors (count, dim)."""
        found = np.empty((count, self.centres.shape[1]), dtype=np.float32)
        for start in range(0, count, BLOCK):
            rows = min(BLOCK, count - start)
            source = np.random.default_rng((seed, start))
            documents = -(-rows // PER_DOCUMENT)
            cluster = source.choice(len(self.weights), documents, p=self.weights)
            dim = self.centres.shape[1]
            common = source.standard_normal((documents, dim), dtype=np.float32)
            own = source.standard_normal((documents, PER_DOCUMENT, dim), dtype=np.float32)
            mixed = math.sqrt(self.shared) * common[:, None] + math.sqrt(1 - self.shared) * own
            deviation = (mixed.reshape(-1, dim) @ self.root).reshape(documents, PER_DOCUMENT, dim)
            chunks = self.centres[cluster][:, None] + self.spreads[cluster, None, None] * deviation
            found[start : start + rows] = unit(chunks.reshape(-1, dim)[:rows])
        return found

    def queries(self, vectors: Array, count: int) -> Array:
        """Draw queries (count, dim) for some of the vectors."""
        source = np.random.default_rng(7)
        passages = vectors[source.choice(len(vectors), count, replace=len(vectors) < count)]
        return unit(self.mixing * passages + (1 - self.mixing) * self.draw(count, 10_007))


def bisect(rising: Callable[[float], float], wanted: float, steps: int = 9) -> float:
    """Return where a rising function on [0, 1] has a value."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2


def neighbour_cosines(vectors: Array, ranks: Sequence[int] = (1, 10, 100)) -> list[float]:
    """Return the mean cosine to the neighbours of some ranks, over a sample of rows."""
    sample = vectors[:: max(1, len(vectors) // 500)]
    cosines = -np.sort(-(sample @ vectors.T), axis=1)  # the first is the row itself
    return [float(cosines[:, min(rank, cosines.shape[1] - 1)].mean()) for rank in ranks]


def effective_dimension(vectors: Array) -> float:
    """Return the participation ratio of the covariance: the dimension of a round cloud of the same kind."""
    values = np.linalg.eigvalsh(np.cov(vectors.T))
    return float(values.sum() ** 2 / (values**2).sum())


class Quantised:
    """Vectors (n, dim) in float32, float16, int8 (a scale a dimension) and one bit a dimension.

    A scan ranks all rows by one format; rescoring ranks the best of them again by float16, which may be on disk.
    """

    def __init__(self, vectors: Array) -> None:
        self.float32 = vectors
        self.float16 = vectors.astype(np.float16)
        self.scale = np.maximum(np.abs(vectors).max(axis=0), 1e-9) / 127
        self.int8 = np.empty(vectors.shape, dtype=np.int8)
        self.mean = vectors.mean(axis=0)
        bits = -(-vectors.shape[1] // 64) * 8
        self.binary = np.zeros((len(vectors), bits), dtype=np.uint8)
        for start in range(0, len(vectors), BLOCK):
            part = slice(start, start + BLOCK)
            self.int8[part] = np.rint(vectors[part] / self.scale)
            packed = np.packbits(vectors[part] > self.mean, axis=1)
            self.binary[part, : packed.shape[1]] = packed
        self.words = self.binary.view(np.uint64)

    def nbytes(self, kind: str) -> int:
        return int(getattr(self, kind).nbytes)

    def scores(self, kind: str, query: Array) -> Array:
        """Return scores (n,) of all rows; greater is nearer."""
        if kind == "float32":
            return np.asarray(np.vecdot(self.float32, query))
        if kind == "binary":
            code = np.zeros(self.binary.shape[1], dtype=np.uint8)
            packed = np.packbits(query > self.mean)
            code[: len(packed)] = packed
            return -np.bitwise_count(self.words ^ code.view(np.uint64)).sum(axis=1, dtype=np.int32)
        rows = self.float16 if kind == "float16" else self.int8
        weights = query if kind == "float16" else (query * self.scale).astype(np.float32)
        found = np.empty(len(rows), dtype=np.float32)
        for start in range(0, len(rows), 4096):  # a block of floats stays in the processor's cache
            found[start : start + 4096] = rows[start : start + 4096].astype(np.float32) @ weights
        return found

    def nearest(self, kind: str, query: Array, rescored: int) -> Array:
        """Return the rows of the ten best by one format, or of the ten best of the `rescored` best by float16."""
        scores = self.scores(kind, query)
        wanted = min(max(rescored, NEAREST), len(scores))
        best = np.argpartition(-scores, wanted - 1)[:wanted]
        again = self.float16[best].astype(np.float32) @ query if rescored else scores[best]
        return best[np.argsort(-again)[:NEAREST]]

    def recall(self, kind: str, queries: Array, rescored: int) -> float:
        """Return the share of the true ten nearest that a search finds."""
        shared = [
            len(set(self.nearest("float32", query, 0)) & set(self.nearest(kind, query, rescored))) for query in queries
        ]
        return float(np.mean(shared)) / min(NEAREST, len(self.float32))
