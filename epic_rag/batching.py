"""Batches of texts of like length, capped by padded tokens.

A transformer's cost follows the padded size of a batch, rows times the longest row. Sorting by length and capping
that product wastes little on padding and keeps memory flat, whatever the mix of lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from epic_rag.devices import batch_tokens, crew_of, run
from epic_rag.errors import ConfigError
from epic_rag.prefix import CachedPrefix, PrefixCache, can_cache, embed_packed, packs
from epic_rag.prompt import EncoderInput, collate

if TYPE_CHECKING:
    from epic_rag.backbone import Backbone

__all__ = ["embed_queries", "embed_rows", "is_out_of_memory", "made_ahead", "token_batches"]

# Tokens of a pack of queries behind one prompt, and of the packs of a batch. Attention is computed for all pairs of a
# pack's tokens and most of them are masked, so packs are short; matrix products want many tokens, so there are several.
_CPU_PACK, _CPU_PACKED = 128, 1024
_GPU_PACK, _GPU_PACKED = 256, 32768


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


def made_ahead(
    make: Callable[[Sequence[str]], list[EncoderInput]], texts: Sequence[str], block: int
) -> Iterator[list[EncoderInput]]:
    """Rows of texts, a block at a time; a thread makes the next block's while the caller works on this one's.

    Args:
        make: From texts to rows; the tokenizer lets other threads run.
        texts: All texts.
        block: Texts of a block.

    Yields:
        Rows of each block in order; one empty list for no texts.
    """
    if len(texts) <= block:
        yield make(texts)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="epic-rag-tokenizer") as pool:
        waiting = pool.submit(make, texts[:block])
        for start in range(block, len(texts), block):
            rows = waiting.result()
            waiting = pool.submit(make, texts[start : start + block])
            yield rows
        yield waiting.result()


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
    others: Sequence[Backbone] = (),
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
        others: The same model on further devices, which take batches, too.

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

    def embed(model: Backbone, chosen: list[int]) -> torch.Tensor:
        batch = collate([rows[index] for index in chosen], pad_id=pad_id, padding_side=padding_side)
        vectors = torch.cat([slots[index] for index in chosen]).to(model.device) if slots is not None else None
        embedded: torch.Tensor = model(batch.to(model.device), vectors)
        return embedded

    def tokens(device: torch.device) -> int:
        return max_tokens if device.type == backbone.device.type else min(max_tokens, batch_tokens(device))

    lengths = [len(row.ids) for row in rows]
    cut = partial(token_batches, lengths, max_rows=max_rows)
    return _embedded([backbone, *others], lengths, tokens, cut, embed, show_progress)


class _Cut(Protocol):
    """Cuts all rows into batches, the longest rows first."""

    def __call__(self, *, max_tokens: int) -> list[list[int]]: ...


def _embedded(
    backbones: Sequence[Backbone],
    lengths: Sequence[int],
    tokens: Callable[[torch.device], int],
    cut: _Cut,
    embed: Callable[[Backbone, list[int]], torch.Tensor],
    show_progress: bool,
) -> npt.NDArray[np.float32]:
    """(rows, dim) float32 of all rows, by as many of the models as are worth their start."""
    crew = crew_of(backbones, sum(lengths), tokens)
    batches = cut(max_tokens=max(worker.tokens for worker in crew))
    out = np.zeros((len(lengths), backbones[0].dimension), dtype=np.float32)
    with tqdm(total=len(lengths), desc="Encoding", unit="text", disable=not show_progress) as bar:

        def store(chosen: list[int], vectors: npt.NDArray[np.float32]) -> None:
            out[chosen] = vectors
            bar.update(len(chosen))

        if len(crew) > 1:
            run(crew, batches, lengths, lambda model, chosen: _in_memory([chosen], partial(embed, model)), store)
        else:
            with torch.inference_mode():
                for chosen, vectors in _in_memory(batches, partial(embed, backbones[0])):
                    store(chosen, vectors)
    return out


def _in_memory(
    batches: list[list[int]], embed: Callable[[list[int]], torch.Tensor]
) -> Iterator[tuple[list[int], npt.NDArray[np.float32]]]:
    """Vectors of each batch; a batch of rows that does not fit memory is halved."""
    while batches:
        chosen = batches.pop(0)
        try:
            vectors = embed(chosen).cpu().numpy()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(chosen) == 1:
                raise
            middle = len(chosen) // 2
            batches[:0] = [chosen[:middle], chosen[middle:]]
            continue
        yield chosen, vectors


def embed_queries(
    backbone: Backbone,
    rows: Sequence[EncoderInput],
    slots: Sequence[torch.Tensor] | None = None,
    *,
    cache: PrefixCache | None,
    pad_id: int,
    padding_side: Literal["left", "right"] = "right",
    max_tokens: int,
    max_rows: int | None = None,
    show_progress: bool = False,
    others: Sequence[Backbone] = (),
) -> npt.NDArray[np.float32]:
    """Embed rows of which many begin alike: what they share is computed once and kept in `cache`.

    The rows share the whole prompt if one bank stands before all of them, and the instruction if each has
    demonstrations of its own. Where nothing is shared, or the model's past cannot be kept, this is `embed_rows`.

    Args:
        backbone: The model, in evaluation mode.
        rows: Model inputs.
        slots: For each row, the (2k, dim) vectors of its slots; rows with the same demonstrations share one tensor.
        cache: Where keys and values of prompts are kept; None computes every position of every row.
        pad_id: See `embed_rows`, as for the rest.
        padding_side: Where the padding goes; what is packed has none.
        max_tokens: Most padded tokens in a batch.
        max_rows: Most rows in a batch.
        show_progress: Whether to draw a progress bar.
        others: The same model on further devices, which take batches, too.

    Returns:
        (rows, dim) float32, in the order of the rows.

    Raises:
        ConfigError: See `embed_rows`.
    """
    shared = _shared_positions(rows, slots) if cache is not None and (max_rows is None or max_rows > 0) else 0
    inside = [slot for slot in rows[0].slots if slot < shared] if shared else []
    prefix = None
    if cache is not None and shared and can_cache(backbone, max(len(row.ids) for row in rows)):
        prefix = cache.get(backbone, rows[0].ids[:shared], inside, None if slots is None else slots[0][: len(inside)])
    if prefix is None:
        return embed_rows(
            backbone,
            rows,
            slots,
            pad_id=pad_id,
            padding_side=padding_side,
            max_tokens=max_tokens,
            max_rows=max_rows,
            show_progress=show_progress,
            others=others,
        )
    lengths = [len(row.ids) - shared for row in rows]
    # Like lengths together: the packs of a batch are padded to the longest.
    order = sorted(range(len(rows)), key=lambda row: (-lengths[row], row))

    prefixes = {backbone.device: prefix}

    def embed(model: Backbone, chosen: list[int]) -> torch.Tensor:
        own = None
        if slots is not None and len(rows[0].slots) > len(inside):
            own = torch.cat([slots[index][len(inside) :] for index in chosen]).to(model.device)
        if model.device not in prefixes:
            # Once a call and device, for many queries at once; the cache keeps the first device's alone.
            prefixes[model.device] = _on_device(prefix, model.device)
        width = _CPU_PACK if model.device.type == "cpu" else _GPU_PACK
        packed = [[rows[chosen[place]] for place in pack] for pack in packs([lengths[row] for row in chosen], width)]
        return embed_packed(model, prefixes[model.device], packed, own)

    def tokens(device: torch.device) -> int:
        return min(max_tokens, _CPU_PACKED if device.type == "cpu" else _GPU_PACKED)

    def cut(*, max_tokens: int) -> list[list[int]]:
        batches = packs([lengths[row] for row in order], max_tokens, max_rows)
        return [[order[place] for place in batch] for batch in batches]

    return _embedded([backbone, *others], lengths, tokens, cut, embed, show_progress)


def _on_device(prefix: CachedPrefix, device: torch.device) -> CachedPrefix:
    keys, values = (tuple(tensor.to(device) for tensor in kept) for kept in (prefix.keys, prefix.values))
    return CachedPrefix(keys, values, prefix.length)


def _shared_positions(rows: Sequence[EncoderInput], slots: Sequence[torch.Tensor] | None) -> int:
    """How many positions at their beginning all rows have in common, vectors in the slots included."""
    if not rows:
        return 0
    first = rows[0]
    shared = first.pool_start  # the prompt's length; 0 for documents
    if slots is not None and first.slots and any(each is not slots[0] for each in slots):
        shared = min(shared, first.slots[0])
    head = first.ids[:shared]
    same = all(row.ids[:shared] == head and row.slots == first.slots and len(row.ids) > shared for row in rows)
    return shared if same else 0
