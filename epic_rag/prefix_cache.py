"""Key/value cache of a prompt: the positions before the queries' own tokens are computed once and shared.

In a causal model the states of a position depend on the positions before it only, so those of the instruction and the
demonstrations are the same for every query behind them. Their keys and values are kept in one row, and every query of
every batch attends to that row:

    keys, values    [ prompt | query 1 | query 2 | query 3 ... ]     a pack
    query 2 sees      yes      no        up to itself  no

The queries of a batch lie one behind the other in packs, and a mask keeps them apart. So the prompt is not copied per
query, and queries of different lengths need hardly any padding. Batches of queries behind one prompt take a half to a
third of the time (`benchmarks/prompt_cache.py`, table in benchmarks/README.md).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from epic_rag.backbone import Backbone
    from epic_rag.prompt import EncoderInput

__all__ = ["CachedPrefix", "PrefixCache", "can_cache", "embed_packed", "pack_rows"]


# These take a mask of any shape; flash attention does not, and mixes the packed queries.
_MASKED_ATTENTION = ("sdpa", "eager")
# Layers whose past is keys and values; a state-space or linear-attention layer keeps something else.
_KEY_VALUE_LAYERS = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class CachedPrefix:
    """Keys and values of a prompt; immutable.

    Attributes:
        keys: For each layer (1, heads, length, head width), in the model's dtype.
        values: The same.
        length: Number of positions.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    length: int

    @property
    def nbytes(self) -> int:
        """Memory of keys and values in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def to(self, device: torch.device) -> CachedPrefix:
        """Return the prefix on a device."""
        if self.keys[0].device == device:
            return self
        return CachedPrefix(
            tuple(key.to(device) for key in self.keys), tuple(value.to(device) for value in self.values), self.length
        )

    def as_past(self, rows: int) -> DynamicCache:
        """Return a cache of `rows` rows that a forward pass may append to; this object stays unchanged."""
        return DynamicCache(
            [
                (key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1))
                for key, value in zip(self.keys, self.values, strict=True)
            ]
        )


def can_cache(backbone: Backbone, positions: int) -> bool:
    """Return whether a model's prompt can be cached as keys and values without changing any vector.

    Args:
        backbone: The model.
        positions: Prompt and longest query together; a sliding window must not be narrower.
    """
    model = backbone.transformer
    config = model.config.get_text_config()
    if not backbone.causal or not backbone.takes_positions or backbone.cache_argument is None:
        return False
    if getattr(config, "_attn_implementation", None) not in _MASKED_ATTENTION:
        return False
    if not _KEY_VALUE_LAYERS.issuperset(getattr(config, "layer_types", None) or ()):
        return False
    window = getattr(config, "sliding_window", None)
    return window is None or positions <= int(window)


class PrefixCache:
    """Least-recently-used cache of one model's prompts, keyed by ids, slot vectors, weights, device and dtype.

    Thread-safe: entries are immutable, and the table is guarded by a lock.

    Args:
        max_entries: Most prompts that are kept.
        max_bytes: Most memory of all of them; a prompt that alone needs more is computed and not kept.
    """

    def __init__(self, max_entries: int = 16, max_bytes: int = 256 * 2**20) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self._entries: OrderedDict[tuple[object, ...], CachedPrefix] = OrderedDict()
        self._parameters: tuple[torch.nn.Parameter, ...] | None = None  # of the one model that it serves
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    # An encoder can be copied and pickled; a lock cannot, and neither copy nor child needs what is kept here.
    def __getstate__(self) -> dict[str, int]:
        return {"max_entries": self.max_entries, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, int]) -> None:
        PrefixCache.__init__(self, **state)

    @property
    def nbytes(self) -> int:
        """Memory of all entries in bytes."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def clear(self) -> None:
        """Drop all entries."""
        with self._lock:
            self._entries.clear()
            self._parameters = None

    def get(
        self, backbone: Backbone, ids: Sequence[int], slots: Sequence[int] = (), vectors: torch.Tensor | None = None
    ) -> CachedPrefix | None:
        """Return keys and values of a prompt, from the cache or computed now.

        Args:
            backbone: The model, in evaluation mode.
            ids: Token ids of the prompt.
            slots: Positions of its slots.
            vectors: (slots, dim) float32 vectors that fill them.

        Returns:
            None if the model's past is not made of keys and values of every position.
        """
        weights = backbone.transformer
        if self._parameters is None:
            self._parameters = tuple(backbone.parameters())
        key = (
            tuple(ids),
            tuple(slots),
            b"" if vectors is None or not slots else vectors.cpu().numpy().tobytes(),
            str(backbone.device),
            weights.dtype,
            # Counts writes to the weights, so that a training step leaves no stale prompt behind.
            sum(0 if value.is_inference() else value._version for value in self._parameters),
        )
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                return found
        made = _compute(backbone, ids, slots, vectors)
        if made is not None and made.nbytes <= self.max_bytes:
            with self._lock:
                self._entries[key] = made
                while (
                    len(self._entries) > self.max_entries
                    or sum(entry.nbytes for entry in self._entries.values()) > self.max_bytes
                ):
                    self._entries.popitem(last=False)
        return made


def _forward(backbone: Backbone, past: DynamicCache, **inputs: torch.Tensor) -> torch.Tensor:
    """Run the transformer behind `past`, appending to it; return (rows, tokens, dim) states of the last layer."""
    options: dict[str, Any] = {**inputs, str(backbone.cache_argument): past, "use_cache": True}
    states: torch.Tensor = backbone.transformer(**options).last_hidden_state
    return states


@torch.inference_mode()
def _compute(
    backbone: Backbone, ids: Sequence[int], slots: Sequence[int], vectors: torch.Tensor | None
) -> CachedPrefix | None:
    device = backbone.device
    embeddings = backbone.embed_inputs(
        torch.tensor([list(ids)], device=device),
        torch.zeros(len(slots), dtype=torch.long, device=device),
        torch.tensor(list(slots), dtype=torch.long, device=device),
        None if vectors is None else vectors.to(device),
    )
    past = DynamicCache()
    positions = torch.arange(len(ids), device=device)[None]
    _forward(backbone, past, inputs_embeds=embeddings, position_ids=positions)
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in past.layers]
    kept = [(key, value) for key, value in pairs if key is not None and value is not None]
    layers = int(backbone.transformer.config.get_text_config().num_hidden_layers)
    if len(kept) != layers or any(key.shape[-2] != len(ids) for key, _ in kept):
        return None
    return CachedPrefix(tuple(key for key, _ in kept), tuple(value for _, value in kept), len(ids))


def pack_rows(lengths: Sequence[int], max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Group rows into packs, in order.

    Args:
        lengths: Tokens of each row.
        max_tokens: Most tokens of a pack, whose mask grows with their square; a longer row is a pack of its own.
        max_rows: Most rows of a pack; None for no bound.
    """
    found: list[list[int]] = []
    total = max_tokens + 1
    for row, length in enumerate(lengths):
        if total + length > max_tokens or len(found[-1]) == max_rows:
            found.append([])
            total = 0
        found[-1].append(row)
        total += length
    return found


def embed_packed(
    backbone: Backbone,
    prefix: CachedPrefix,
    packed: Sequence[Sequence[EncoderInput]],
    vectors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embed rows that begin with a prompt whose keys and values are known.

    Args:
        backbone: The model, in evaluation mode.
        prefix: Keys and values of the first `prefix.length` positions of every row.
        packed: Packs of whole rows, each longer than the prompt.
        vectors: (slots, dim) vectors of the slots behind the prompt, row by row; None if there are none.

    Returns:
        (rows, dim) float32 unit vectors, pack after pack.
    """
    device, start = backbone.device, prefix.length
    width = max(sum(len(row.ids) - start for row in pack) for pack in packed)
    count = sum(map(len, packed))
    ids = torch.zeros((len(packed), width), dtype=torch.long)
    row_of = torch.full((len(packed), width), count)  # which row a token belongs to; `count` for padding
    within = torch.zeros((len(packed), width), dtype=torch.long)  # its position behind the prompt
    pooled = torch.zeros((len(packed), width), dtype=torch.float32)
    slot_packs: list[int] = []
    slot_columns: list[int] = []
    number = 0
    for index, pack in enumerate(packed):
        first = 0
        for row in pack:
            stop = first + len(row.ids) - start
            ids[index, first:stop] = torch.tensor(row.ids[start:])
            row_of[index, first:stop] = number
            within[index, first:stop] = torch.arange(stop - first)
            pooled[index, (first + row.pool_start - start if backbone.pooling == "mean" else stop - 1) : stop] = 1.0
            behind = [first + slot - start for slot in row.slots if slot >= start]
            slot_packs += [index] * len(behind)
            slot_columns += behind
            first, number = stop, number + 1
    ids, row_of, within, pooled = (tensor.to(device) for tensor in (ids, row_of, within, pooled))
    embeddings = backbone.embed_inputs(
        ids, torch.tensor(slot_packs, device=device), torch.tensor(slot_columns, device=device), vectors
    )
    column = torch.arange(width, device=device)
    # (packs, tokens, tokens): a token sees its own row up to itself, and the whole prompt.
    visible = (row_of[:, :, None] == row_of[:, None, :]) & (column[:, None] >= column[None, :])
    visible = torch.cat([visible.new_ones(len(packed), width, start), visible], dim=2)
    # Additive float mask: boolean masks are not supported by every attention implementation.
    mask = torch.zeros(visible.shape, dtype=embeddings.dtype, device=device)
    mask.masked_fill_(~visible, torch.finfo(embeddings.dtype).min)
    hidden = _forward(
        backbone,
        prefix.as_past(len(packed)),
        inputs_embeds=embeddings,
        attention_mask=mask[:, None],
        position_ids=start + within,
    )  # (packs, tokens, dim)
    weights = pooled.flatten()[:, None]
    rows = row_of.flatten()
    sums = weights.new_zeros(count + 1, hidden.shape[2]).index_add_(0, rows, hidden.float().flatten(0, 1) * weights)
    counts = weights.new_zeros(count + 1, 1).index_add_(0, rows, weights)
    return backbone.project_and_normalize((sums / counts.clamp(min=1.0))[:count])
