"""Forward passes of a step: rows in chunks of like length, slots filled from a table of vectors, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from epic_rag.backbone import Backbone
from epic_rag.batching import token_batches
from epic_rag.prompt import Batch, EncoderInput, collate

__all__ = ["Forward", "SlotTable"]


@dataclass(frozen=True)
class SlotTable:
    """What goes into the slots of some rows.

    Attributes:
        vectors: (vectors, dim) all that may be shown: the batch's queries and then its documents.
        shown: For each row, the positions in `vectors` that fill its slots, in order (query, passage, query, ...).
    """

    vectors: torch.Tensor
    shown: Sequence[Sequence[int]]

    def take(self, rows: Sequence[int]) -> torch.Tensor:
        """(slots, dim) the vectors of some rows' slots, row by row."""
        wanted = torch.tensor([position for row in rows for position in self.shown[row]], dtype=torch.long)
        return self.vectors.index_select(0, wanted.to(self.vectors.device))


class Forward:
    """Embeds rows in training.

    Args:
        backbone: The model.
        pad_id: Token id of the padding.
        max_tokens: Most padded tokens in one forward pass.
        dtype: What matrix products are computed in; float32 for no autocast.
    """

    def __init__(self, backbone: Backbone, *, pad_id: int, max_tokens: int, dtype: torch.dtype = torch.float32) -> None:
        self.backbone = backbone
        self.pad_id = pad_id
        self.max_tokens = max_tokens
        self.dtype = dtype

    def __call__(self, rows: Sequence[EncoderInput], slots: SlotTable | None = None) -> torch.Tensor:
        """(rows, dim) float32 unit vectors in order, with the graphs of all chunks."""
        chunks = self.chunks(rows, range(len(rows)))
        return self.in_order([self.chunk(rows, chunk, slots) for chunk in chunks], chunks, len(rows))

    def chunks(self, rows: Sequence[EncoderInput], share: Sequence[int]) -> list[list[int]]:
        """Positions of some of the rows, in chunks of at most `max_tokens` padded tokens."""
        batches = token_batches([len(rows[index].ids) for index in share], max_tokens=self.max_tokens)
        return [[share[index] for index in batch] for batch in batches]

    def chunk(self, rows: Sequence[EncoderInput], chunk: Sequence[int], slots: SlotTable | None = None) -> torch.Tensor:
        """(chunk, dim) float32 unit vectors of some rows, in one forward pass."""
        device = self.backbone.device
        batch = _moved(collate([rows[index] for index in chunk], pad_id=self.pad_id), device)
        with torch.autocast(device.type, dtype=self.autocast_dtype, enabled=self.dtype != torch.float32):
            vectors: torch.Tensor = self.backbone(batch, None if slots is None else slots.take(chunk))
        return vectors

    def pooled(self, rows: Sequence[EncoderInput]) -> torch.Tensor:
        """(rows, width) float32 states behind the pooling, in order: what a head is given."""
        chunks = self.chunks(rows, range(len(rows)))
        parts = []
        for chunk in chunks:
            batch = _moved(collate([rows[index] for index in chunk], pad_id=self.pad_id), self.backbone.device)
            with torch.autocast(batch.ids.device.type, dtype=self.autocast_dtype, enabled=self.dtype != torch.float32):
                parts.append(self.backbone.pooled(batch))
        order = torch.tensor([index for chunk in chunks for index in chunk])
        return torch.cat(parts)[order.argsort().to(parts[0].device)]

    @property
    def autocast_dtype(self) -> torch.dtype:
        """A dtype that autocast takes, whether it is on or not."""
        return torch.bfloat16 if self.dtype == torch.float32 else self.dtype

    def in_order(self, parts: Sequence[torch.Tensor], chunks: Sequence[Sequence[int]], count: int) -> torch.Tensor:
        """(count, dim) the chunks' vectors at their rows' positions; every row must be in a chunk."""
        if not parts:
            return torch.zeros((count, self.backbone.dimension), device=self.backbone.device)
        order = torch.tensor([index for chunk in chunks for index in chunk])
        return torch.cat(list(parts))[order.argsort().to(parts[0].device)]


def _moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on the model's device; a GPU copies from pinned memory while the CPU goes on."""
    if device.type != "cuda":
        return batch.to(device)
    tensors = (getattr(batch, name) for name in batch.__dataclass_fields__)
    return Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors))
