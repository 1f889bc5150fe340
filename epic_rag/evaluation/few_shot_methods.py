"""Methods of the few-shot evaluation: the encoder's strategies, and baselines that need demonstrations alone.

Most methods move queries, whatever they are ranked in (`moved_queries`). Some depend on the collection
(`scores_in_collection`): the reader that is prepared against it, a prior on documents, centred vectors, and a memory of
known pairs.

The adapter of LlamaIndex (`EmbeddingAdapterFinetuneEngine` of llama-index-finetuning 0.4) is its training loop on
stored vectors: that package is deprecated and needs the clients of three cloud services, so it is no dependency. A
linear map of the query that begins as the identity, InfoNCE over batches of 10 in the given order, cosines times 20,
AdamW with a learning rate of 2e-5 and a linear schedule with a tenth for warm-up, gradients clipped to 1, one epoch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from epic_rag.metrics import unit_rows
from epic_rag.reader import DemonstrationReader
from epic_rag.task_vector import apply_task_vector

__all__ = ["METHODS", "Centred", "moved_queries", "scores_in_collection"]

Vectors = npt.NDArray[np.float32]

METHODS = (
    "reader",
    "reader-against",
    "universal",
    "task-vector",
    "ridge",
    "memory",
    "prior",
    "centring",
    "llama-index",
    "llama-index-tuned",
)
"""Names of the methods; those after "universal" are baselines. "reader-against" is prepared against the collection, as
`epic-rag bank build --against` does it."""
_MEMORY_WEIGHT = 0.2
_MEMORY_NEIGHBOURS = 10
_RIDGE = 16.0
_STRENGTH, _STRENGTH_PRIOR = 0.7, 2
_ADAPTER_SCALE = 20.0
_TUNED_RATES = (3e-4, 1e-3)
_TUNED_EPOCHS = 10
_TUNED_BATCH = 32
_LEAST_TO_TUNE = 10


def moved_queries(
    method: str, readers: Mapping[str, DemonstrationReader], queries: Vectors, pairs: Vectors
) -> Vectors | None:
    """Move queries by demonstrations.

    Args:
        method: A name of `METHODS`.
        readers: Readers by the names of their methods.
        queries: (m, dim) unit rows.
        pairs: (n, 3, dim) unit vectors of demonstrations: query, passage, and the query read as a document.

    Returns:
        (m, dim) float32 unit rows; None for a method that depends on the collection.
    """
    n = len(pairs)
    if method in readers:
        return readers[method].prepare(pairs).apply(queries)
    if method == "task-vector":
        return apply_task_vector(queries, [pairs] * len(queries))
    if method == "ridge":
        # The map from queries to passages that stays near the identity, by least squares, beside the mean difference.
        differences, middle = pairs[:, 1] - pairs[:, 0], pairs[:, 0].mean(axis=0)
        usual, shift = differences.mean(axis=0), (pairs[:, 1] - pairs[:, 2]).mean(axis=0)
        centred = pairs[:, 0] - middle
        gram = centred.T @ centred + np.float32(_RIDGE) * np.eye(pairs.shape[2], dtype=np.float32)
        linear = np.linalg.solve(gram, centred.T @ (differences - usual))
        return unit_rows(queries + _STRENGTH * n / (n + _STRENGTH_PRIOR) * shift + (queries - middle) @ linear)
    if method == "llama-index":
        return unit_rows(queries @ _train_adapter(pairs, rate=2e-5, epochs=1, batch=10, shuffled=False).T)
    if method == "llama-index-tuned":
        return unit_rows(queries @ _tuned_adapter(pairs).T)
    return None


class Centred:
    """Documents of a collection, their mean, and the documents without it.

    Args:
        documents: (m, dim) unit rows.
    """

    def __init__(self, documents: Vectors) -> None:
        self.documents = documents
        self.mean: Vectors = documents.mean(axis=0)
        self._centred: Vectors | None = None

    @property
    def centred(self) -> Vectors:
        """(m, dim) unit rows without the mean; computed once."""
        if self._centred is None:
            self._centred = unit_rows(self.documents - self.mean)
        return self._centred


def scores_in_collection(
    method: str, queries: Vectors, pairs: Vectors, rows: npt.NDArray[np.intp], collection: Centred
) -> Vectors:
    """Score documents by a method that depends on the collection.

    Args:
        method: "memory", "prior" or "centring".
        queries: (m, dim) unit rows.
        pairs: (n, 3, dim) unit vectors of demonstrations: query, passage, and the query read as a document.
        rows: (n,) rows of the demonstrations' passages among the documents; -1 where it is none of them.
        collection: The documents.

    Returns:
        (m, documents) float32.
    """
    documents, n = collection.documents, len(pairs)
    weight = n / (n + _STRENGTH_PRIOR)
    if method == "prior":
        # The passages' mean, seen from that of the collection: the same for every query.
        shift = _STRENGTH * weight * (pairs[:, 1].mean(axis=0) - collection.mean)
        return np.asarray((queries + shift) @ documents.T, dtype=np.float32)
    if method == "centring":
        return np.asarray(unit_rows(queries - weight * pairs[:, 0].mean(axis=0)) @ collection.centred.T)
    scores: Vectors = queries @ documents.T
    near = np.maximum(queries @ pairs[:, 0].T, 0.0)
    # The nearest known queries vote for their passages.
    kept = np.argsort(-near, axis=1)[:, :_MEMORY_NEIGHBOURS]
    for query, chosen in enumerate(kept):
        inside = chosen[rows[chosen] >= 0]
        np.add.at(scores[query], rows[inside], _MEMORY_WEIGHT * near[query, inside])
    return scores


def _train_adapter(pairs: Vectors, *, rate: float, epochs: int, batch: int, shuffled: bool) -> Vectors:
    """Train a linear adapter as LlamaIndex does; return (dim, dim), to be multiplied with a query from the left."""
    return _adapters(pairs, rate=rate, epochs=epochs, batch=batch, shuffled=shuffled)[-1]


def _adapters(pairs: Vectors, *, rate: float, epochs: int, batch: int, shuffled: bool) -> list[Vectors]:
    """Return the adapter after each epoch."""
    import torch

    queries, passages = (torch.from_numpy(np.ascontiguousarray(pairs[:, side])) for side in (0, 1))
    n, dim = queries.shape
    weight = torch.nn.Parameter(torch.eye(dim))
    optimizer = torch.optim.AdamW([weight], lr=rate)
    per_epoch = -(-n // batch)
    total, warmup = per_epoch * epochs, int(per_epoch * epochs * 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: step / max(1, warmup) if step < warmup else max(0.0, (total - step) / max(1, total - warmup)),
    )
    chance = torch.Generator().manual_seed(0)
    found = []
    for _ in range(epochs):
        order = torch.randperm(n, generator=chance) if shuffled else torch.arange(n)
        for start in range(0, n, batch):
            chosen = order[start : start + batch]
            moved = torch.nn.functional.normalize(queries[chosen] @ weight.T, dim=1)
            scores = _ADAPTER_SCALE * moved @ passages[chosen].T
            loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(chosen)))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
            optimizer.step()
            schedule.step()
        found.append(weight.detach().numpy().copy())
    return found


def _tuned_adapter(pairs: Vectors) -> Vectors:
    """Train the adapter with the rate and the epochs that are best on a fifth of the pairs; the identity if none is."""
    n, _, dim = pairs.shape
    identity = np.eye(dim, dtype=np.float32)
    if n < _LEAST_TO_TUNE:
        return identity
    held = n // 5
    queries, passages = pairs[:held, 0], pairs[:, 1]

    def quality(adapter: Vectors) -> float:
        scores = unit_rows(queries @ adapter.T) @ passages.T
        ranks = (scores > np.diagonal(scores)[:, None]).sum(axis=1) + 1
        return float((1.0 / ranks).mean())

    best = (quality(identity), 0.0, 0)
    for rate in _TUNED_RATES:
        found = _adapters(pairs[held:], rate=rate, epochs=_TUNED_EPOCHS, batch=_TUNED_BATCH, shuffled=True)
        for epochs, adapter in enumerate(found, start=1):
            reached = quality(adapter)
            if reached > best[0]:  # the identity stays where nothing is better
                best = (reached, rate, epochs)
    _, rate, epochs = best
    if not epochs:
        return identity
    return _adapters(pairs, rate=rate, epochs=_TUNED_EPOCHS, batch=_TUNED_BATCH, shuffled=True)[epochs - 1]
