"""Demonstrations chosen for each query by the first layers alone.

Which of a bank's queries resemble a query shows long before the last layer. So `nearest-early` asks a third of the
layers where `nearest` asks all of them. The bank's own queries say how the two hang together: from their vectors at
both depths, ridge regression learns to tell the last layer's vector by the early one. That is done at a bank's first
use.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from epic_rag.backbone import Backbone, cut_layers
from epic_rag.batching import embed_queries
from epic_rag.demonstrations import DemonstrationBank
from epic_rag.prefix_cache import PrefixCache
from epic_rag.prompt import EncoderInput

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder

__all__ = ["EARLY_SHARE", "EarlyChoice", "first_layers"]

EARLY_SHARE = 3
"""One layer of so many is asked, from the first on."""
_KEPT = 16
# Of the regression: the penalty as a share of the early vectors' mean variance.
_RIDGE = 0.3


def first_layers(backbone: Backbone, count: int) -> Backbone:
    """A backbone of the first layers of another: it shares their weights, and costs no memory.

    Args:
        backbone: The whole model, in evaluation mode.
        count: How many layers to keep.

    Raises:
        ConfigError: If there are fewer layers.
    """
    model = backbone.transformer
    # What is in the table is not copied: every weight, and the layers as they are.
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    total = int(model.config.get_text_config().num_hidden_layers)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            shared |= {id(layer): layer for layer in module}
    shallow: PreTrainedModel = copy.deepcopy(model, shared)
    cut_layers(shallow, count)
    return Backbone(shallow, pooling=backbone.pooling)


class Likeness:
    """Predicts the cosines of a query with a bank's queries from its early vector.

    With E the early vectors of the bank's n queries less their mean, and F their vectors with mean m, ridge regression
    predicts m + (e - mean) Eᵀ(EEᵀ + λ)⁻¹(F - m) for an early vector e. Its products with F order the bank.

    Args:
        early: (n, dim) early vectors of the bank's queries.
        vectors: (n, dim) unit vectors of the same.
    """

    def __init__(self, early: npt.NDArray[np.float32], vectors: npt.NDArray[np.float32]) -> None:
        self._mean = early.mean(axis=0, dtype=np.float64)
        centred = early - self._mean
        alike = centred @ centred.T  # (n, n)
        penalty = _RIDGE * np.trace(alike) / early.shape[1] + 1e-12
        mean = vectors.mean(axis=0, dtype=np.float64)
        known = np.linalg.solve(alike + penalty * np.eye(len(early)), (vectors - mean) @ vectors.T)  # (n, n)
        # By torch when it counts: the threads of numpy's products go on spinning for a while, in the way of torch's.
        self._weights = torch.from_numpy(centred.T @ known)  # (dim, n)
        self._base = torch.from_numpy(vectors @ mean)  # (n,)

    def __call__(self, early: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """(queries, dim) early vectors to (queries, n) products, each query's in the order of its cosines."""
        products = torch.addmm(self._base, torch.from_numpy(early - self._mean), self._weights)
        result: npt.NDArray[np.float64] = products.numpy()
        return result


class EarlyChoice:
    """Chooses demonstrations by the vectors of an encoder's first layers."""

    def __init__(self) -> None:
        self._shallow: Backbone | None = None
        self._made_for: tuple[object, ...] = ()
        self._likenesses: OrderedDict[tuple[str, str], Likeness] = OrderedDict()
        self._cache = PrefixCache()

    # A copy of an encoder makes its own: this one's layers are those of the original.
    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        EarlyChoice.__init__(self)

    def clear(self) -> None:
        """Forget everything, because weights have changed."""
        EarlyChoice.__init__(self)

    def banks(
        self,
        encoder: EpicEncoder,
        bank: DemonstrationBank,
        k: int,
        rows: Sequence[EncoderInput],
        *,
        instruction: str | None,
        batch_size: int | None,
    ) -> list[DemonstrationBank]:
        """The k demonstrations of a bank whose queries are nearest to each query, nearest last.

        Args:
            encoder: The encoder that this belongs to.
            bank: To choose from, with this encoder's vectors.
            k: How many.
            rows: The queries, zero-shot.
            instruction: What the bank's own queries are encoded with.
            batch_size: Most rows in a batch.
        """
        key = (encoder.fingerprint, bank.fingerprint)
        if key not in self._likenesses:
            prefix = encoder.prompt.prefix(instruction)
            queries = encoder.prompt.queries(prefix, [item.query for item in bank.demonstrations])
            early = self._embed(encoder, queries, batch_size)
            self._likenesses[key] = Likeness(early, bank.require(encoder.fingerprint)[:, 0])
            while len(self._likenesses) > _KEPT:
                self._likenesses.popitem(last=False)
        self._likenesses.move_to_end(key)
        cosines = self._likenesses[key](self._embed(encoder, rows, batch_size))  # (rows, bank)
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        return [bank.take([int(row) for row in best[::-1]]) for best in nearest]

    def _embed(
        self, encoder: EpicEncoder, rows: Sequence[EncoderInput], batch_size: int | None
    ) -> npt.NDArray[np.float32]:
        return embed_queries(
            self._first(encoder.backbone),
            rows,
            cache=None if encoder.prefix_cache is None else self._cache,
            pad_id=encoder.prompt.pad_id,
            padding_side=encoder.padding_side,
            max_tokens=encoder.max_batch_tokens,
            max_rows=batch_size,
        )

    def _first(self, backbone: Backbone) -> Backbone:
        model = backbone.transformer
        made_for = (model, backbone.device, model.dtype, model.config.get_text_config()._attn_implementation)
        if self._shallow is None or made_for != self._made_for:
            layers = int(model.config.get_text_config().num_hidden_layers)
            with torch.inference_mode(False):  # or copies of buffers could not be moved later
                self._shallow = first_layers(backbone, max(1, layers // EARLY_SHARE))
            self._made_for = made_for
            self._cache.clear()
        return self._shallow
