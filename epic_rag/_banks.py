"""Banks with the vectors of an encoder that is not the one they were saved with."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from epic_rag.demonstrations import DemonstrationBank

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder

__all__ = ["BuiltBanks", "embedded_pairs"]

_KEPT = 16


class BuiltBanks:
    """The banks that were embedded last, by the encoder's and the bank's fingerprint."""

    def __init__(self) -> None:
        self._banks: OrderedDict[str, DemonstrationBank] = OrderedDict()

    def __len__(self) -> int:
        return len(self._banks)

    def clear(self) -> None:
        """Forget all."""
        self._banks.clear()

    def get(self, encoder: EpicEncoder, bank: DemonstrationBank) -> DemonstrationBank:
        """The bank with this encoder's vectors; the caller's bank is left as it is."""
        if bank.embeddings is not None and bank.encoder_fingerprint == encoder.fingerprint:
            return bank
        key = f"{encoder.fingerprint}-{bank.fingerprint}"
        if key not in self._banks:
            # A copy of the whole bank; it says so in the log if it replaces another checkpoint's vectors.
            self._banks[key] = bank.select(len(bank)).build(encoder)
            while len(self._banks) > _KEPT:
                self._banks.popitem(last=False)
        self._banks.move_to_end(key)
        return self._banks[key]


def embedded_pairs(encoder: EpicEncoder, bank: DemonstrationBank, instruction: str) -> npt.NDArray[np.float32]:
    """See `EpicEncoder.embed_demonstrations`."""
    width = encoder.backbone.dimension
    queries = [item.query for item in bank.demonstrations]
    passages = [item.passage for item in bank.demonstrations]
    left = encoder.encode_query(queries, instruction=instruction, truncate_dim=width)
    if bank.symmetric:
        right = encoder.encode_query(passages, instruction=instruction, truncate_dim=width)
    else:
        right = encoder.encode_document(passages, truncate_dim=width)
    return np.stack([left, right], axis=1)
