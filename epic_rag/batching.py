"""Batches of texts of like length, capped by padded tokens.

A transformer's cost follows the padded size of a batch, rows times the longest row. Sorting by length and capping
that product wastes little on padding and keeps memory flat, whatever the mix of lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from epic_rag.errors import ConfigError
from epic_rag.prompt import EncoderInput, collate

if TYPE_CHECKING:
    from epic_rag.backbone import Backbone

__all__ = ["embed_rows", "is_out_of_memory", "token_batches"]


def token_batches(lengths: Sequence[int], *, max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Group rows into batches of like length.

    Args:
        lengths: Token count of each row.
        max_tokens: Upper bound of rows times longest row in a batch. A single row longer than that is a batch
            of its own.
        max_rows: Upper bound of rows in a batch; None for no bound.

    Returns:
        Lists of row indices, each index in exactly one of them. The longest rows come first, so that a batch that
        does not fit memory is met at the start and not after an hour.

    Raises:
        ValueError: If a bound is not positive.
    """
    if max_tokens < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(f"max_tokens ({max_tokens}) and max_rows ({max_rows}) must be at least 1")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    current: list[int] = []
    for row in order:
        # Rows come longest first, so the first row of a batch is its width.
        width = lengths[current[0]] if current else lengths[row]
        if current and ((len(current) + 1) * width > max_tokens or len(current) == max_rows):
            batches.append(current)
            current = []
        current.append(row)
    if current:
        batches.append(current)
    return batches


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU.

    Only these errors are a reason to try a smaller batch: any other `RuntimeError` is a fault that a smaller batch
    would hide.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch's CPU allocator raises a plain RuntimeError; its message is the only mark it has.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def embed_rows(
    backbone: Backbone,
    rows: Sequence[EncoderInput],
    slots: Sequence[torch.Tensor] | None = None,
    *,
    pad_id: int,
    padding_side: Literal["left", "right"] = "right",
    max_tokens: int,
    max_rows: int | None = None,
    show_progress: bool = False,
) -> npt.NDArray[np.float32]:
    """Embed rows in batches of like length; a batch that does not fit memory is halved.

    Args:
        backbone: The model, in evaluation mode.
        rows: Model inputs.
        slots: For each row, the (2k, dim) vectors of its slots; None if no row has any.
        pad_id: Token id of the padding.
        padding_side: Where the padding goes.
        max_tokens: Most padded tokens in a batch.
        max_rows: Most rows in a batch.
        show_progress: Whether to draw a progress bar.

    Returns:
        (rows, dim) float32, in the order of the rows.

    Raises:
        ConfigError: If `max_rows` is below 1, or the padding side does not fit the model.
    """
    if padding_side == "left" and not backbone.causal:
        raise ConfigError(
            "padding_side is 'left' and the model is bidirectional, with absolute positions; use padding_side='right'"
        )
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"batch_size is {max_rows}; pass 1 or more")
    out = np.zeros((len(rows), backbone.dimension), dtype=np.float32)
    batches = token_batches([len(row.ids) for row in rows], max_tokens=max_tokens, max_rows=max_rows)
    with tqdm(total=len(rows), desc="Encoding", unit="text", disable=not show_progress) as bar, torch.inference_mode():
        while batches:
            chosen = batches.pop(0)
            try:
                batch = collate([rows[index] for index in chosen], pad_id=pad_id, padding_side=padding_side)
                vectors = torch.cat([slots[index] for index in chosen]) if slots is not None else None
                on_device = None if vectors is None else vectors.to(backbone.device)
                out[chosen] = backbone(batch.to(backbone.device), on_device).cpu().numpy()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(chosen) == 1:
                    raise
                middle = len(chosen) // 2
                batches[:0] = [chosen[:middle], chosen[middle:]]
                continue
            bar.update(len(chosen))
    return out
