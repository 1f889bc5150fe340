"""Reader: demonstrations as a correction of a query's vector that is learned from them in closed form.

A demonstration is three vectors: its query q_i, its passage p_i, and the query read as a document, b_i. With weights
w_i of n demonstrations (near 0 for pairs that do not fit), and the means m of q_i, r of p_i - b_i and e of p_i - q_i, a
query q moves to

    q1 = normalise(q + g_0 r - g_1 m + sum_k g_k M_k (q - m))

The shift r says what passages are and queries in a collection are not, whatever a model does to tell queries from
documents: weights of their own, prompts, an instruction. Each M_k maps a query to a weighted sum of differences:

    R_l = (C + l s I)^-1 sum_i w_i (q_i - m) (p_i - q_i - e)^T    ridge: what the difference is near this query
    V_l = (C + l s I)^-1 sum_i w_i (q_i - m) v_i^T                contrast: what sets the right passage apart

with C = sum_i w_i (q_i - m) (q_i - m)^T, s = mean |q_i - m|^2, and v_i = p_i minus the mean of the passages of all
demonstrations that the moved query q_i + .7 r finds, in a softmax with the temperature of half a standard deviation
of the cosines: one step of gradient descent on InfoNCE. In other words, a query attends to all demonstrations by a
ridge kernel. The mean alone is the task vector (`task_vector`), which is the same for every query. Taking away a part
of the queries' mean leaves less of what all of them have in common; what tells one from another then counts for more.

**Likely right passages are no negatives.** Of messages with labels, many share a demonstration's label. Another
demonstration is left out of v_i if its query is more like q_i, or its passage more like p_i, than p_i is like q_i, all
in standard deviations.

**Gains.** Prior gains depend on n alone. From 16 demonstrations on, they are adapted to the bank: each demonstration is
moved by what the others say about it (leave-one-out, in closed form for all M_k), and the gains minimise its InfoNCE
against the other demonstrations' passages, and with a smaller weight against their passages and b_i, plus
(l / n) |g - prior|^2. So a bank of few or useless pairs keeps the prior.

**Against an index.** How far queries should move depends on what they are ranked among: a shift towards passages helps
most where other questions are indexed, too. Given the passages of an index, a left-out demonstration is ranked among
those that it finds first there, instead of the others' passages and queries, from 8 demonstrations on. Messages with
labels are an exception: many of an index's passages are right for them, and one cannot tell which. They are known by
their shift r, which has less than 8% of the squared length of p_i - b_i; an index changes nothing then.

**Queries of another task.** A query whose cosine with the mean of the demonstrations' queries lies a standard deviation
below theirs, each with the mean of the others, moves less, and one at 2.5 stays where it is.

Everything is relative to spreads of the demonstrations' own cosines, so the same prior serves any encoder: the
*universal* reader, which is part of this module. A checkpoint may bring its own gains in `reader.safetensors`.
docs/tried.md has what did not help, attention over the nearest demonstrations among it.

Preparing costs one pass over the demonstrations; then a query costs one product with a (dim, dim) matrix for any n.
This module imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
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
Doubles = npt.NDArray[np.float64]

READER_FILE = "reader.safetensors"
RIDGES = (1.0, 4.0, 16.0, 64.0)
"""Penalties l of the ridge maps, relative to the spread of the queries."""
CONTRASTS = (4.0, 16.0, 64.0)
"""Penalties l of the contrastive maps."""
FEATURES = (
    "mean",
    "centre",
    *(f"ridge-{penalty:g}" for penalty in RIDGES),
    *(f"contrast-{penalty:g}" for penalty in CONTRASTS),
)
KNOTS = (1, 4, 16, 64, 256, 1024)
"""Numbers of demonstrations that have gains; between them gains are linear in log n, beyond them constant."""

_REFERENCES = 512
_NEGATIVES = 768
_LEAST_SPREAD = 0.03
_LEAST_TEST_SPREAD = 0.05
_UNSURE, _SURE = 2.0, 4.0
_SAME_TEXT = 0.9999
_NEAR_PASSAGE = 0.97
_FIT_SLOPE, _FIT_MIDDLE = 1.5, 1.0
_STEP, _STEP_PRIOR = 0.7, 2
_TEMPERATURE = 0.5
_RULE = "6"
"""Version of the rule, part of a reader's fingerprint."""
_LEAST_ADAPTED = 16
_LEFT_OUT, _OTHERS = 256, 256
_WITH_QUERIES = 0.25
_HOLD = 100.0
# Against an index, which has harder and more candidates.
_LEAST_AGAINST = 8
_TWO_KINDS = 0.08
_FOUND = 64
_LARGEST_CORPUS = 50_000
_HOLD_MEAN, _HOLD_MAPS = 10.0, 30.0
_WARMER = 1.5
_NEWTON_STEPS = 6
_FAR, _NEAR = 2.5, 1.0


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
        rows = np.linspace(0, n - 1, min(n, _REFERENCES)).astype(int)
        references = passages[rows]
        # A label that occurs twice is no other passage, and of two answers to one query neither is another query's.
        other = (passages @ references.T < _SAME_TEXT) & (queries @ queries[rows].T < _SAME_TEXT)
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
class QueryRange:
    """Cosines of the demonstrations' queries with their mean: queries far below it are of another task.

    Attributes:
        axis: (dim,) float32 unit vector of the queries' mean.
        far: Cosine with it up to which a query stays where it is.
        near: Cosine from which it moves in full.
    """

    axis: Vectors
    far: float
    near: float

    @classmethod
    def of(cls, queries: Vectors) -> QueryRange:
        """Measure (n, dim) unit rows, n at least 2."""
        total = queries.sum(axis=0, keepdims=True)
        axis = unit_rows(total)[0]
        # With a mean that holds themselves, a few different queries are nearer to it than any other one can be.
        cosines = np.einsum("nd,nd->n", queries, unit_rows(total - queries))
        middle, spread = float(cosines.mean()), max(float(cosines.std()), _LEAST_SPREAD)
        return cls(axis, middle - _FAR * spread, middle - _NEAR * spread)

    def share(self, queries: Vectors) -> Vectors:
        """Return (m, 1) shares, 0 to 1, of the correction that (m, dim) queries get."""
        cosines = np.einsum("md,d->m", queries, self.axis)
        result: Vectors = np.clip((cosines - self.far) / (self.near - self.far), 0.0, 1.0)[:, None]
        return result.astype(np.float32)


@dataclass(frozen=True)
class PreparedDemonstrations:
    """Demonstrations as read: the correction of a query q is `offset` + q `linear`, times its share by `query_range`.

    Attributes:
        offset: (dim,) float32.
        linear: (dim, dim) float32; None for demonstrations that only have a mean.
        query_range: Range of the demonstrations' queries; None for few demonstrations.
    """

    offset: Vectors
    linear: Vectors | None
    query_range: QueryRange | None = None

    def to_arrays(self) -> dict[str, Vectors]:
        """Return all numbers by name, to be stored."""
        arrays = {"offset": self.offset}
        if self.linear is not None:
            arrays["linear"] = self.linear
        if self.query_range is not None:
            arrays["axis"] = self.query_range.axis
            arrays["range"] = np.array([self.query_range.far, self.query_range.near], dtype=np.float32)
        return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Vectors]) -> PreparedDemonstrations:
        """Return what `to_arrays` has returned.

        Raises:
            KeyError: If an array is missing.
        """
        known = None
        if "axis" in arrays:
            far, near = map(float, arrays["range"])
            known = QueryRange(arrays["axis"], far, near)
        return cls(arrays["offset"], arrays.get("linear"), known)

    def apply(self, queries: Vectors) -> Vectors:
        """Move queries.

        Args:
            queries: (m, dim) unit rows.

        Returns:
            (m, dim) float32 unit rows.
        """
        correction = np.broadcast_to(self.offset, queries.shape)
        if self.linear is not None:
            # einsum avoids BLAS for a few queries: its worker threads busy-wait after a call and compete with torch's.
            correction = correction + (
                np.einsum("md,de->me", queries, self.linear) if len(queries) < 8 else queries @ self.linear
            )
        if self.query_range is not None:
            correction = correction * self.query_range.share(queries)
        return unit_rows(np.asarray(queries + correction, dtype=np.float32))


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
        return hashlib.sha256(",".join((_RULE, *FEATURES)).encode() + self.gains.tobytes()).hexdigest()[:12]

    def gains_for(self, n: int) -> Vectors:
        """Return (len(FEATURES),) gains for n demonstrations."""
        places = np.log(np.array(KNOTS, dtype=np.float64))
        found = [np.interp(np.log(n), places, row) for row in self.gains]
        return np.array(found, dtype=np.float32)

    def prepare(self, pairs: Vectors, corpus: Vectors | None = None) -> PreparedDemonstrations:
        """Read demonstrations; their order does not matter.

        Args:
            pairs: (n, 3, dim) unit vectors: query, passage, and the query read as a document; n at least 1. (n, 2, dim)
                stands for a model that reads queries as documents.
            corpus: (m, d) unit vectors of the passages that queries will be ranked among, d at most dim; of more than
                50,000 an evenly spaced choice is used. None if they are not known.

        Returns:
            The correction; zero where the pairs cannot be told from random ones.
        """
        features, evidence = prepare_features(pairs, corpus=corpus)
        gains = self.gains_for(len(pairs))
        if features.left_out is not None:
            gains = features.left_out.adapt(gains)
        gains = evidence.confidence * gains
        shift = gains[0] * features.mean - gains[1] * features.middle
        if not features.maps or evidence.confidence == 0.0:
            return PreparedDemonstrations(shift.astype(np.float32), None)
        linear = np.tensordot(gains[2:], np.stack(features.maps), axes=1).astype(np.float32)
        offset = (shift - features.middle @ linear).astype(np.float32)
        return PreparedDemonstrations(offset, linear, features.query_range)


@dataclass(frozen=True)
class LeftOut:
    """Demonstrations that are moved by the others, as products of their directions with candidates.

    Moved queries are linear in the gains, so nothing else is needed to adapt them.

    Attributes:
        own: (s, 1 + k) products of the query and its k directions with its own passage.
        scores: (s, 1 + k, c) the same with candidates: other demonstrations' passages, then their queries.
        gram: (s, 1 + k, 1 + k) products of the query and the directions.
        masked: (s, c) true where a candidate is likely right.
        passages: Number of candidates that are passages.
        weights: (s,) with mean 1.
        temperature: Temperature of InfoNCE.
        hold: (k,) weights of the distances from prior gains, before they are divided by s.
    """

    own: Vectors
    scores: Vectors
    gram: Vectors
    masked: npt.NDArray[np.bool_]
    passages: int
    weights: Vectors
    temperature: float
    hold: Doubles

    def adapt(self, prior: Vectors) -> Vectors:
        """Return (k,) gains that minimise InfoNCE plus the distance from prior gains, by damped Newton steps."""
        hold = self.hold / len(self.own)
        gains = prior.astype(np.float64)
        value, slope, curvature = self.objective(gains)
        for _ in range(_NEWTON_STEPS):
            step = np.linalg.solve(curvature + np.diag(hold), slope + hold * (gains - prior))
            for _ in range(4):
                tried = gains - step
                tried_value, tried_slope, tried_curvature = self.objective(tried)
                if tried_value + hold @ (tried - prior) ** 2 / 2 <= value + hold @ (gains - prior) ** 2 / 2:
                    gains, value, slope, curvature = tried, tried_value, tried_slope, tried_curvature
                    break
                step = step / 2
            else:
                break
        return np.asarray(gains, dtype=np.float32)

    def objective(self, gains: Doubles) -> tuple[float, Doubles, Doubles]:
        """Return InfoNCE, its gradient (k,) and the Gauss-Newton part of its Hessian (k, k)."""
        factors = np.concatenate([[1.0], gains]).astype(np.float32)
        pull = self.gram @ factors  # (s, 1 + k)
        length = np.sqrt(np.maximum(pull @ factors, 1e-6))[:, None]
        own = self.own @ factors / length[:, 0]
        cosines = np.einsum("k,skc->sc", factors, self.scores) / length
        relative = np.where(self.masked, -np.inf, (cosines - own[:, None]) / self.temperature)
        # A cosine's derivative by gain k: its direction's product, less what the direction adds to the length.
        pull /= length**2
        change_of_own = self.own / length - own[:, None] * pull
        change = self.scores / length[..., None] - pull[..., None] * cosines[:, None] - change_of_own[..., None]
        change = change[:, 1:] / self.temperature  # (s, k, c)
        share = self.weights / len(self.own)
        value, slope, curvature = 0.0, np.zeros(len(gains)), np.zeros((len(gains), len(gains)))
        parts = [(1.0, self.passages)]
        if self.passages < self.scores.shape[2]:
            parts = [(1 - _WITH_QUERIES, self.passages), (_WITH_QUERIES, self.scores.shape[2])]
        for weight, width in parts:
            part = relative[:, :width]
            highest = np.maximum(part.max(axis=1, keepdims=True), 0.0)
            found = np.exp(part - highest)
            total = found.sum(axis=1, keepdims=True) + np.exp(-highest)
            found /= total
            value += weight * float(share @ (highest + np.log(total))[:, 0])
            mean = np.einsum("sc,skc->sk", found, change[:, :, :width])  # (s, k)
            slope += weight * (share @ mean)
            heavy = change[:, :, :width] * (share[:, None] * found)[:, None]
            curvature += weight * (
                np.tensordot(heavy, change[:, :, :width], axes=((0, 2), (0, 2))) - (mean * share[:, None]).T @ mean
            )
        return value, slope, curvature


@dataclass(frozen=True)
class DemonstrationFeatures:
    """Means and maps of demonstrations, before gains.

    Attributes:
        mean: (dim,) weighted mean of passages minus queries read as documents.
        middle: (dim,) weighted mean of the queries.
        maps: (dim, dim) matrices in the order of `FEATURES[2:]`; none for one demonstration.
        left_out: What gains are adapted by; None for few demonstrations.
        query_range: Range of the queries; None for few demonstrations.
    """

    mean: Vectors
    middle: Vectors
    maps: tuple[Vectors, ...]
    left_out: LeftOut | None = None
    query_range: QueryRange | None = None


def prepare_features(
    pairs: Vectors, *, leave_out: bool = True, corpus: Vectors | None = None
) -> tuple[DemonstrationFeatures, Evidence]:
    """Compute what `DemonstrationReader` weighs by its gains; see there.

    Args:
        pairs: (n, 3, dim) or (n, 2, dim) unit vectors: query, passage, and the query read as a document.
        leave_out: Also compute what gains are adapted by.
        corpus: (m, d) unit vectors of the passages of an index; None if they are not known.
    """
    n, _, dim = pairs.shape
    # A canonical order makes sums and choices below independent of the given one.
    keys = np.concatenate([pairs[:, 0, :8], pairs[:, 1, :8]], axis=1)
    pairs = np.ascontiguousarray(pairs[np.lexsort(keys.T)], dtype=np.float32)
    queries, passages, as_documents = pairs[:, 0], pairs[:, 1], pairs[:, 2 if pairs.shape[1] > 2 else 0]
    evidence = Evidence.of(queries, passages)
    weights = evidence.weights[:, None]
    shifts, differences = passages - as_documents, passages - queries
    mean = (weights * shifts).mean(axis=0)
    middle = (weights * queries).mean(axis=0)
    if n == 1 or evidence.confidence == 0.0:
        return DemonstrationFeatures(mean, middle, ()), evidence
    root = np.sqrt(weights)
    centred = root * (queries - middle)  # (n, dim)
    scale = max(float((centred * centred).sum()) / n, 1e-6)

    # Passages of a strided sample are each query's candidates, beside its own; near-duplicates and passages of
    # demonstrations that are more alike than this one's query and passage are not wrong.
    sample = np.linspace(0, n - 1, min(n, _NEGATIVES)).astype(int)
    candidates = passages[sample]
    between = passages @ candidates.T
    fits = evidence.fits[:, None]
    right = (between > _NEAR_PASSAGE) | (_standardised(between) > fits)
    right |= _standardised(queries @ queries[sample].T) > fits
    moved = unit_rows(queries + _STEP * evidence.confidence * n / (n + _STEP_PRIOR) * mean)
    temperature = _TEMPERATURE * evidence.spread
    logits = np.where(right, -np.inf, moved @ candidates.T / temperature)
    own = np.einsum("nd,nd->n", moved, passages)[:, None] / temperature
    highest = np.maximum(logits.max(axis=1, keepdims=True), own)
    found = np.exp(logits - highest)
    found /= found.sum(axis=1, keepdims=True) + np.exp(own - highest)
    errors = passages * found.sum(axis=1, keepdims=True) - found @ candidates  # (n, dim): v_i times its error

    # One decomposition serves all penalties: of the smaller one of the kernel (n, n) and the covariance (dim, dim).
    usual = (weights * differences).mean(axis=0)
    targets = np.concatenate([root * (differences - usual), root * errors], axis=1)  # (n, 2 dim)
    dual = n < dim
    values, basis = np.linalg.eigh(centred @ centred.T if dual else centred.T @ centred)
    values = np.maximum(values, 0.0)
    left = centred.T @ basis if dual else basis  # (dim, r)
    right_side = basis.T @ targets if dual else basis.T @ (centred.T @ targets)  # (r, 2 dim)
    columns = {"ridge": slice(None, dim), "contrast": slice(dim, None)}
    kinds = [("ridge", penalty) for penalty in RIDGES] + [("contrast", penalty) for penalty in CONTRASTS]
    maps = tuple(
        np.asarray(left @ (right_side[:, columns[kind]] / (values + penalty * scale)[:, None]), dtype=np.float32)
        for kind, penalty in kinds
    )
    # A pair whose query or passage occurs again is not left out: the others would know it.
    again = (between > _NEAR_PASSAGE) | (queries @ queries[sample].T > _NEAR_PASSAGE)  # (n, sample)
    alone = np.flatnonzero(again.sum(axis=0) == 1)
    query_range = QueryRange.of(queries) if n >= _LEAST_ADAPTED else None
    known = corpus is not None and len(corpus) > 0 and _share_of_mean(shifts) > _TWO_KINDS
    if len(alone) < (_LEAST_AGAINST if known else _LEAST_ADAPTED) or not leave_out:
        return DemonstrationFeatures(mean, middle, maps, None, query_range), evidence

    # Each demonstration as the others move it. A ridge fit without one row differs from the fit with it by the row's
    # share h in its own prediction.
    picked = alone[np.linspace(0, len(alone) - 1, min(len(alone), _LEFT_OUT)).astype(int)]
    rows = sample[picked]
    weight, query, passage = weights[rows], queries[rows], passages[rows]
    directions = np.empty((len(rows), 1 + len(FEATURES), dim), dtype=np.float32)
    directions[:, 0] = query
    rest = np.maximum(n - weight, 0.1 * n)
    directions[:, 1] = (n * mean - weight * shifts[rows]) / rest
    directions[:, 2] = (weight * query - n * middle) / rest
    projected = centred[rows] @ left  # (s, r)
    whole = basis.T if dual else basis.T @ centred.T  # (r, n)
    for place, ((kind, penalty), linear) in enumerate(zip(kinds, maps, strict=True), start=3):
        shrunk = values + penalty * scale
        share = ((basis[rows] ** 2) * (values / shrunk) if dual else projected**2 / shrunk).sum(axis=1, keepdims=True)
        share = np.minimum(share + weight / n, 0.95)
        target = targets[rows][:, columns[kind]] / root[rows]
        directions[:, place] = ((query - middle) @ linear - share * target) / (1.0 - share)
        if kind == "contrast":
            # Other demonstrations have found this one's passage and move away from it; without it they would not.
            taken = (projected / shrunk) @ whole * (root * found[:, picked]).T  # (s, n)
            directions[:, place] += taken.sum(axis=1, keepdims=True) / root[rows] * passage
    directions[:, 1:] *= evidence.confidence
    relative = np.asarray(weight[:, 0] / weight.mean(), dtype=np.float32)
    if corpus is not None and known:
        # An index may hold shortened vectors.
        width = corpus.shape[1]
        directions, passage = directions[..., :width], unit_rows(passage[:, :width])
        shown, masked = _found_in_corpus(directions, corpus)
        cosines = np.einsum("sd,scd->sc", passage, shown)
        likely = (cosines - between.mean()) / max(float(between.std()), _LEAST_SPREAD) > evidence.fits[rows][:, None]
        left_out = LeftOut(
            own=np.einsum("skd,sd->sk", directions, passage),
            scores=directions @ shown.transpose(0, 2, 1),
            gram=directions @ directions.transpose(0, 2, 1),
            masked=masked | likely | (cosines > _NEAR_PASSAGE),
            passages=shown.shape[1],
            temperature=_WARMER * temperature,
            hold=np.array([_HOLD_MEAN, _HOLD, *[_HOLD_MAPS] * len(maps)]),
            weights=relative,
        )
        return DemonstrationFeatures(mean, middle, maps, left_out, query_range), evidence
    others = np.linspace(0, len(sample) - 1, min(len(sample), _OTHERS)).astype(int)
    shown = np.concatenate([passages[sample[others]], as_documents[sample[others]]])  # (c, dim)
    masked = right[rows][:, others]
    itself = rows[:, None] == sample[others]
    left_out = LeftOut(
        own=np.einsum("skd,sd->sk", directions, passage),
        scores=(directions.reshape(-1, dim) @ shown.T).reshape(len(rows), directions.shape[1], -1),
        gram=directions @ directions.transpose(0, 2, 1),
        masked=np.concatenate([masked | itself, masked | itself], axis=1),
        passages=len(others),
        temperature=temperature,
        hold=np.full(len(FEATURES), _HOLD),
        weights=relative,
    )
    return DemonstrationFeatures(mean, middle, maps, left_out, query_range), evidence


def _found_in_corpus(directions: Vectors, corpus: Vectors) -> tuple[Vectors, npt.NDArray[np.bool_]]:
    """Return the passages (s, c, d) that queries find, as they are and moved by the mean, and which stand twice."""
    if len(corpus) > _LARGEST_CORPUS:
        corpus = corpus[np.linspace(0, len(corpus) - 1, _LARGEST_CORPUS).astype(int)]
    most = min(_FOUND, len(corpus))
    rows = []
    for queries in (directions[:, 0], unit_rows(directions[:, 0] + _STEP * directions[:, 1])):
        parts = [queries[start : start + 64] @ corpus.T for start in range(0, len(queries), 64)]
        rows.append(np.concatenate([np.argpartition(part, -most, axis=1)[:, -most:] for part in parts]))
    found = np.sort(np.concatenate(rows, axis=1), axis=1)
    twice = np.zeros(found.shape, dtype=bool)
    twice[:, 1:] = found[:, 1:] == found[:, :-1]
    return np.asarray(corpus[found], dtype=np.float32), twice


def _share_of_mean(differences: Vectors) -> float:
    """Return the share of the squared length of (n, dim) rows that is their mean's; an unbiased estimate."""
    n, length = len(differences), float((differences * differences).sum(axis=1).mean())
    return float((n * (differences.mean(axis=0) ** 2).sum() - length) / max((n - 1) * length, 1e-6))


def _standardised(cosines: Vectors) -> Vectors:
    """Return cosines in standard deviations from their mean."""
    result: Vectors = (cosines - cosines.mean()) / max(float(cosines.std()), _LEAST_SPREAD)
    return result


# The gains of `epic-rag train reader --model epic-minilm --data train --exclude ...`; docs/results.md has the whole
# command. One row a feature, one column a knot.
_UNIVERSAL = (
    (0.16, 0.36, 0.55, 0.59, 0.59, 0.57),  # mean
    (0.06, 0.14, 0.14, 0.11, -0.01, -0.21),  # centre
    (0.01, 0.02, 0.11, 0.04, -0.2, -0.39),  # ridge-1
    (0.12, 0.13, 0.18, 0.18, 0.17, 0.06),  # ridge-4
    (-0.04, -0.04, -0.03, -0.04, -0.04, -0.07),  # ridge-16
    (-0.14, -0.15, -0.15, -0.16, -0.17, -0.18),  # ridge-64
    (1.4, 1.45, 1.54, 1.6, 1.57, 1.51),  # contrast-4
    (0.79, 0.82, 0.87, 0.91, 0.93, 0.92),  # contrast-16
    (0.28, 0.29, 0.3, 0.32, 0.33, 0.34),  # contrast-64
)
