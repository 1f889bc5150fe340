"""Reader: demonstrations as a correction of a query's vector that is learned from them in closed form.

With query vectors q_i, passage vectors p_i and weights w_i of n demonstrations (w_i near 0 for pairs that do not fit),
differences r_i = p_i - q_i, their mean r and the queries' mean m, a query q moves to

    q1 = normalise(q + g_0 r + sum_k g_k M_k (q - m))

Each M_k maps a query to a weighted sum of the demonstrations' differences; only n, not the query, decides the gains g.

    R_l = (C + l s I)^-1 sum_i w_i (q_i - m) (r_i - r)^T     ridge: what the difference is near this query
    V_l = (C + l s I)^-1 sum_i w_i (q_i - m) v_i^T           contrast: what sets right passages apart from found ones

with C = sum_i w_i (q_i - m) (q_i - m)^T, s = mean |q_i - m|^2, and v_i = p_i minus the mean of the passages of all
demonstrations that the moved query q_i + .7 r finds, in a softmax with the temperature of half a standard deviation
of the cosines: one step of gradient descent on InfoNCE. In other words, a query attends to all demonstrations by a
ridge kernel. The mean alone is the task vector (`task_vector`), which is the same for every query.

Everything is relative to spreads of the demonstrations' own cosines, so the same gains serve any encoder: the
*universal* reader, which is part of this module. A checkpoint may bring its own gains in `reader.safetensors`.
docs/tried.md has what did not help, attention over the nearest demonstrations among it.

Preparing costs one pass over the demonstrations; then a query costs one product with a (dim, dim) matrix for any n.
This module imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from epic_rag.errors import CheckpointError, reason_of
from epic_rag.files import write_atomically
from epic_rag.metrics import unit_rows

__all__ = ["FEATURES", "KNOTS", "READER_FILE", "DemonstrationReader", "Evidence", "PreparedDemonstrations"]

Vectors = npt.NDArray[np.float32]

READER_FILE = "reader.safetensors"
RIDGES = (1.0, 4.0, 16.0, 64.0)
"""Penalties l of the ridge maps, relative to the spread of the queries."""
CONTRASTS = (4.0, 16.0, 64.0)
"""Penalties l of the contrastive maps."""
FEATURES = ("mean", *(f"ridge-{penalty:g}" for penalty in RIDGES), *(f"contrast-{penalty:g}" for penalty in CONTRASTS))
KNOTS = (1, 4, 16, 64, 256, 1024)
"""Numbers of demonstrations that have gains; between them gains are linear in log n, beyond them constant."""

_REFERENCES = 512
_NEGATIVES = 768
_LEAST_SPREAD = 0.03
_LEAST_TEST_SPREAD = 0.05
_UNSURE, _SURE = 2.0, 4.0
_SAME_PASSAGE = 0.9999
_NEAR_PASSAGE = 0.97
_FIT_SLOPE, _FIT_MIDDLE = 1.5, 1.0
_STEP, _STEP_PRIOR = 0.7, 2
_TEMPERATURE = 0.5


@dataclass(frozen=True)
class Evidence:
    """Fit of demonstrations: do passages belong to their own queries.

    Attributes:
        fits: (n,) float32: cosine of each query with its own passage, in standard deviations above the mean of its
            cosines with the others' passages.
        weights: (n,) float32 with mean 1: near 0 for pairs whose passage fits no better than another's.
        confidence: 0 where the pairs cannot be told from random ones, 1 where they surely can.
        spread: Standard deviation of the cosines of queries with other demonstrations' passages.
    """

    fits: Vectors
    weights: Vectors
    confidence: float
    spread: float

    @classmethod
    def of(cls, queries: Vectors, passages: Vectors) -> Evidence:
        """Compare each pair with the pairs of other demonstrations; queries and passages are (n, dim) unit rows."""
        n = len(queries)
        # Evenly spaced references bound the cost at n = 10,000.
        references = passages[np.linspace(0, n - 1, min(n, _REFERENCES)).astype(int)]
        other = passages @ references.T < _SAME_PASSAGE  # a label that occurs twice is no other passage
        if not other.any():
            return cls(np.full(n, _SURE, np.float32), np.ones(n, np.float32), 1.0, 2 * _LEAST_TEST_SPREAD)
        cosines = np.where(other, queries @ references.T, 0.0)
        number = other.sum(axis=1)
        overall = float(cosines.sum() / number.sum())
        chance = np.where(number > 0, cosines.sum(axis=1) / np.maximum(number, 1), overall)
        spread = max(float(np.sqrt((np.where(other, cosines - overall, 0.0) ** 2).sum() / number.sum())), _LEAST_SPREAD)
        own = np.einsum("nd,nd->n", queries, passages)
        fits = ((own - chance) / spread).astype(np.float32)
        z = float(own.mean() - chance.mean()) / max(spread, _LEAST_TEST_SPREAD) * n**0.5
        weights = 1.0 / (1.0 + np.exp(-_FIT_SLOPE * (fits - _FIT_MIDDLE))) + 1e-3
        confidence = float(np.clip((z - _UNSURE) / (_SURE - _UNSURE), 0.0, 1.0))
        return cls(fits, (weights / weights.mean()).astype(np.float32), confidence, spread)


@dataclass(frozen=True)
class PreparedDemonstrations:
    """Demonstrations as read: the correction of a query q is `offset` + q `linear`.

    Attributes:
        offset: (dim,) float32.
        linear: (dim, dim) float32; None for demonstrations that only have a mean.
    """

    offset: Vectors
    linear: Vectors | None

    def apply(self, queries: Vectors) -> Vectors:
        """Move queries.

        Args:
            queries: (m, dim) unit rows.

        Returns:
            (m, dim) float32 unit rows.
        """
        moved = queries + self.offset
        if self.linear is not None:
            # einsum avoids BLAS for a few queries: its worker threads busy-wait after a call and compete with torch's.
            moved = moved + (
                np.einsum("md,de->me", queries, self.linear) if len(queries) < 8 else queries @ self.linear
            )
        return unit_rows(np.asarray(moved, dtype=np.float32))


class DemonstrationReader:
    """Rule that moves queries by demonstrations; the module's docstring has the formula.

    Args:
        gains: (len(FEATURES), len(KNOTS)) float32.
        kind: "universal", or "trained" for gains of one encoder.

    Raises:
        ValueError: If the shape is another one, or a gain is not finite.
    """

    def __init__(self, gains: npt.ArrayLike, kind: Literal["universal", "trained"] = "trained") -> None:
        self.gains = np.asarray(gains, dtype=np.float32)
        self.kind = kind
        if self.gains.shape != (len(FEATURES), len(KNOTS)) or not np.isfinite(self.gains).all():
            raise ValueError(
                f"gains have shape {self.gains.shape}, {(len(FEATURES), len(KNOTS))} finite ones are needed"
            )

    @classmethod
    def universal(cls) -> DemonstrationReader:
        """Return the reader that serves any encoder."""
        return cls(_UNIVERSAL, "universal")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> DemonstrationReader:
        """Read a checkpoint folder's reader; the universal one where it has none.

        Raises:
            CheckpointError: If its file is damaged or made for another release.
        """
        file = Path(folder) / READER_FILE
        if not file.is_file():
            return cls.universal()
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return cls(load_file(file)["gains"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({reason_of(error)}). Delete it, or run `epic-rag train reader` again."
            ) from error

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `reader.safetensors` into a checkpoint folder and return its path."""
        from safetensors.numpy import save

        file = Path(folder) / READER_FILE
        write_atomically(file, save({"gains": self.gains}, metadata={"features": ",".join(FEATURES)}))
        return file

    @property
    def fingerprint(self) -> str:
        """Short hash of the gains: part of what decides a query's vector with demonstrations, never a document's."""
        return hashlib.sha256(",".join(FEATURES).encode() + self.gains.tobytes()).hexdigest()[:12]

    def gains_for(self, n: int) -> Vectors:
        """Return (len(FEATURES),) gains for n demonstrations."""
        places = np.log(np.array(KNOTS, dtype=np.float64))
        found = [np.interp(np.log(n), places, row) for row in self.gains]
        return np.array(found, dtype=np.float32)

    def prepare(self, pairs: Vectors) -> PreparedDemonstrations:
        """Read demonstrations; their order does not matter.

        Args:
            pairs: (n, 2, dim) unit vectors: query, passage; n at least 1.

        Returns:
            The correction; zero where the pairs cannot be told from random ones.
        """
        features, evidence = prepare_features(pairs)
        gains = evidence.confidence * self.gains_for(len(pairs))
        shift = gains[0] * features.mean
        if not features.maps or evidence.confidence == 0.0:
            return PreparedDemonstrations(shift.astype(np.float32), None)
        linear = np.tensordot(gains[1:], np.stack(features.maps), axes=1).astype(np.float32)
        return PreparedDemonstrations((shift - features.middle @ linear).astype(np.float32), linear)


@dataclass(frozen=True)
class DemonstrationFeatures:
    """Means and maps of demonstrations, before gains.

    Attributes:
        mean: (dim,) weighted mean of passages minus queries.
        middle: (dim,) weighted mean of the queries.
        maps: (dim, dim) matrices in the order of `FEATURES[1:]`; none for one demonstration.
    """

    mean: Vectors
    middle: Vectors
    maps: tuple[Vectors, ...]


def prepare_features(pairs: Vectors) -> tuple[DemonstrationFeatures, Evidence]:
    """Compute what `DemonstrationReader` weighs by its gains; see there."""
    n, _, dim = pairs.shape
    # A canonical order makes sums and choices below independent of the given one.
    keys = np.concatenate([pairs[:, 0, :8], pairs[:, 1, :8]], axis=1)
    pairs = np.ascontiguousarray(pairs[np.lexsort(keys.T)], dtype=np.float32)
    queries, passages = pairs[:, 0], pairs[:, 1]
    evidence = Evidence.of(queries, passages)
    weights = evidence.weights[:, None]
    differences = passages - queries
    mean = (weights * differences).mean(axis=0)
    middle = (weights * queries).mean(axis=0)
    if n == 1 or evidence.confidence == 0.0:
        return DemonstrationFeatures(mean, middle, ()), evidence
    root = np.sqrt(weights)
    centred = root * (queries - middle)  # (n, dim)
    scale = max(float((centred * centred).sum()) / n, 1e-6)

    # Passages of a strided sample are each query's candidates, beside its own; near-duplicates are not wrong.
    candidates = passages[np.linspace(0, n - 1, min(n, _NEGATIVES)).astype(int)]
    moved = unit_rows(queries + _STEP * evidence.confidence * n / (n + _STEP_PRIOR) * mean)
    temperature = _TEMPERATURE * evidence.spread
    logits = np.where(passages @ candidates.T > _NEAR_PASSAGE, -np.inf, moved @ candidates.T / temperature)
    own = np.einsum("nd,nd->n", moved, passages)[:, None] / temperature
    highest = np.maximum(logits.max(axis=1, keepdims=True), own)
    found = np.exp(logits - highest)
    found /= found.sum(axis=1, keepdims=True) + np.exp(own - highest)
    errors = passages * found.sum(axis=1, keepdims=True) - found @ candidates  # (n, dim): v_i times its error

    # One decomposition serves all penalties: of the smaller one of the kernel (n, n) and the covariance (dim, dim).
    targets = np.concatenate([root * (differences - mean), root * errors], axis=1)  # (n, 2 dim)
    dual = n < dim
    values, basis = np.linalg.eigh(centred @ centred.T if dual else centred.T @ centred)
    left = centred.T @ basis if dual else basis  # (dim, r)
    right = basis.T @ targets if dual else basis.T @ (centred.T @ targets)  # (r, 2 dim)

    def fitted(penalty: float, columns: slice) -> Vectors:
        shrunk = right[:, columns] / (np.maximum(values, 0.0) + penalty * scale)[:, None]
        return np.asarray(left @ shrunk, dtype=np.float32)

    ridges = [fitted(penalty, slice(None, dim)) for penalty in RIDGES]
    contrastive = [fitted(penalty, slice(dim, None)) for penalty in CONTRASTS]
    return DemonstrationFeatures(mean, middle, tuple(ridges + contrastive)), evidence


# Fitted by `epic_rag.training.reader_training`; one row a feature, one column a knot.
_UNIVERSAL = (
    (0.07, 0.2, 0.41, 0.47, 0.44, 0.61),  # mean
    (0.0, 0.03, -0.19, -0.43, -0.69, -1.07),  # ridge-1
    (0.83, 0.88, 0.84, 0.8, 0.66, 0.43),  # ridge-4
    (0.86, 0.89, 0.91, 0.94, 0.91, 0.82),  # ridge-16
    (0.27, 0.27, 0.28, 0.3, 0.28, 0.26),  # ridge-64
    (1.54, 1.58, 1.63, 1.69, 1.86, 1.81),  # contrast-4
    (-0.19, -0.2, -0.22, -0.25, -0.28, -0.32),  # contrast-16
    (-0.31, -0.32, -0.34, -0.37, -0.42, -0.44),  # contrast-64
)
