"""Batches of texts of like length, capped by padded tokens.

A transformer's cost follows the padded size of a batch, rows times the longest row. Sorting by length and capping
that product wastes little on padding and keeps memory flat, whatever the mix of lengths.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm.auto import tqdm

from epic_rag.errors import ConfigError, reason_of
from epic_rag.prefix_cache import CachedPrefix, PrefixCache, can_cache, embed_packed, packs
from epic_rag.prompt import EncoderInput, collate

if TYPE_CHECKING:
    from epic_rag.backbone import Backbone

__all__ = [
    "DeviceNames",
    "Replicas",
    "Worker",
    "batch_tokens",
    "crew_of",
    "embed_queries",
    "embed_rows",
    "is_out_of_memory",
    "made_ahead",
    "parse_devices",
    "run",
    "token_batches",
]


# --- from devices
# One encoder on several devices: a copy of the weights on each, a thread for each, batches shared among them.
#
#     rows, longest first ──► [ batch | batch | batch | ... ] ──► a free worker takes the next ──► rows in their order
#
# A worker that is free takes the next batch, so a device that is slower takes fewer. Towards the end the batches become
# smaller, so that no device waits long for another.
#
# Only the CPU may be named more than once. Its replicas share the weights, and torch's threads: each has its part of
# them, which costs less waiting than one batch that is spread over all. A CPU that is named once has replicas, too.

DeviceNames: TypeAlias = "str | torch.device | Sequence[str | torch.device]"
Found: TypeAlias = "tuple[list[int], npt.NDArray[np.float32]]"

# Padded tokens in a batch. A CPU is fastest while a batch's activations fit its cache; a GPU wants to be filled.
_CPU_TOKENS, _GPU_TOKENS = 4096, 65536
# The smallest part that a batch is cut to near the end.
_CPU_PART, _GPU_PART = 256, 4096
# Tokens for which a worker is worth its start; a few texts are for one device alone.
_WORTH = 4096
# Workers of one CPU; what is Python in a forward pass is done by one at a time.
_MOST_WORKERS = 8
_threads = threading.local()
_threads_lock = threading.Lock()


def batch_tokens(device: torch.device) -> int:
    """Padded tokens in a batch that suit a kind of device."""
    return _CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS


def parse_devices(device: DeviceNames | None) -> tuple[torch.device, ...]:
    """The devices that are named; None is the best there is.

    Args:
        device: A name, names with commas between them, or a list of names.

    Raises:
        ConfigError: If there is none, one is not there, or one that is not the CPU is named twice.
    """
    if device is None:
        if torch.cuda.is_available():
            return (torch.device("cuda"),)
        return (torch.device("mps" if torch.backends.mps.is_available() else "cpu"),)
    if isinstance(device, str):
        named: list[str | torch.device] = [name.strip() for name in device.split(",")]
    else:
        named = [device] if isinstance(device, torch.device) else list(device)
    if not named:
        raise ConfigError("device is an empty list, an encoder runs on 1 device or more; pass 'cpu'")
    found = [_parse_device(name) for name in named]
    for place, (_, actual) in enumerate(found):
        twice = [other for _, other in found[:place] if other == actual]
        if twice and actual.type != "cpu":
            raise ConfigError(
                f"device names {actual} twice ({', '.join(map(str, named))}), one replica fills it; name it once"
            )
    return tuple(parsed for parsed, _ in found)


def _parse_device(name: str | torch.device) -> tuple[torch.device, torch.device]:
    """A device as it is named, and with its number."""
    try:
        parsed = torch.device(name)
        actual = torch.empty(0, device=parsed).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = reason_of(error)
        given = str(name) if isinstance(name, torch.device) else name
        raise ConfigError(f"device is {given!r}, this machine does not have it ({reason}); pass 'cpu'") from error
    return parsed, actual


class Replicas:
    """The copies of an encoder's model on further devices, made when they are needed.

    An encoder on the CPU alone has copies there, too, which share its weights. A copy is made anew when the model's
    weights, dtype, mode or attention have changed since.

    Args:
        others: The devices beside the encoder's own.
        workers: How many share a CPU that is the only device; None for the number that suits it.
    """

    def __init__(self, others: Sequence[torch.device] = (), workers: int | None = None) -> None:
        self.others = tuple(others)
        self.workers = workers
        self._made: tuple[tuple[object, ...], list[Backbone]] = ((), [])

    # A copy of an encoder makes its own: these are those of the original.
    def __getstate__(self) -> dict[str, Any]:
        return {"others": self.others, "workers": self.workers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Replicas.__init__(self, **state)

    def clear(self) -> None:
        """Drop the copies, because weights have changed."""
        self._made = ((), [])

    def _further(self, device: torch.device) -> int:
        return 0 if device.type != "cpu" else (_suitable_workers() if self.workers is None else self.workers) - 1

    def worth(self, backbone: Backbone, tokens: int) -> list[Backbone]:
        """The copies of a model; none for so few tokens that one worker is as quick."""
        return self.of(backbone) if tokens >= 2 * _WORTH else []

    def of(self, backbone: Backbone) -> list[Backbone]:
        """The copies of a model, one for each of the other devices."""
        places = self.others or (backbone.device,) * self._further(backbone.device)
        if not places:
            return []
        key = (*_state(backbone), places)
        made_for, made = self._made
        if made_for != key:
            made = [_copy_to(backbone, device) for device in places]
            self._made = (key, made)
        return made


def _state(backbone: Backbone) -> tuple[object, ...]:
    """What a copy depends on: writes to the weights change it, and so does moving them."""
    model = backbone.transformer
    attention = model.config.get_text_config()._attn_implementation
    weights = ((value.data_ptr(), 0 if value.is_inference() else value._version) for value in backbone.parameters())
    return (backbone, model, backbone.training, attention, *weights)


def _suitable_workers() -> int:
    """How many workers share a CPU: a batch that is spread over cores waits for the last of them at every product.

    Their number divides that of torch's threads: all are alike, and none waits for a slower one at the end.
    """
    threads = torch.get_num_threads()
    return max(count for count in range(1, _MOST_WORKERS + 1) if threads % count == 0)


def _is_at(backbone: Backbone, device: torch.device) -> bool:
    return torch.empty(0, device=device).device == backbone.device


def _copy_to(backbone: Backbone, device: torch.device) -> Backbone:
    """The model on a device, which never lies on another one in between; on its own device the weights are shared.

    On the same device layers are shared as well, with what they keep beside their weights, but not the modules around
    them: some models change a buffer of theirs in a forward pass (positions that depend on the longest row).
    """
    shared = _is_at(backbone, device)
    known: dict[int, object] = {}
    # Tensors of inference mode could not be moved or written to later.
    with torch.inference_mode(False), torch.no_grad():
        for weight in backbone.parameters():
            known[id(weight)] = weight if shared else nn.Parameter(weight.detach().to(device), requires_grad=False)
        for buffer in backbone.buffers():
            known[id(buffer)] = buffer if shared else buffer.to(device)
        for module in backbone.modules() if shared else ():
            is_layer = isinstance(module, nn.Linear) or any(True for _ in module.parameters())
            if is_layer and not any(True for _ in module.children()):
                known[id(module)] = module
        return copy.deepcopy(backbone, known)


@dataclass(frozen=True)
class Worker:
    """A model's part in a piece of work.

    Attributes:
        backbone: The model, or a copy of it.
        tokens: Most padded tokens in a batch of its.
        threads: How many of torch's threads it has; 0 for as many as there are.
    """

    backbone: Backbone
    tokens: int
    threads: int = 0

    @property
    def part(self) -> int:
        """Tokens of the smallest part that a batch is cut to."""
        return _CPU_PART if self.backbone.device.type == "cpu" else _GPU_PART


def crew_of(backbones: Sequence[Backbone], total: int, tokens: Callable[[torch.device], int]) -> list[Worker]:
    """The models that are worth using: one a few thousand tokens, the first in any case.

    Args:
        backbones: The encoder's own model and its copies.
        total: Tokens of all rows.
        tokens: Most tokens in a batch on a device; models on one CPU share them.
    """
    chosen = backbones[: max(1, total // _WORTH)]
    places = [place for place, backbone in enumerate(chosen) if backbone.device.type == "cpu"]
    crew = [Worker(backbone, tokens(backbone.device)) for backbone in chosen]
    if len(places) < 2:
        return crew
    threads, rest = divmod(torch.get_num_threads(), len(places))
    for number, place in enumerate(places):
        most = max(1, crew[place].tokens // len(places))
        crew[place] = Worker(chosen[place], most, max(1, threads + (number < rest)))
    return crew


def run(
    crew: Sequence[Worker],
    batches: Sequence[list[int]],
    lengths: Sequence[int],
    embed: Callable[[Backbone, list[int]], Iterator[Found]],
    store: Callable[[list[int], npt.NDArray[np.float32]], None],
) -> None:
    """Let every worker embed batches in a thread of its own until none is left.

    The first error of a worker is raised here as it is. On an error or an interrupt the workers stop after the batch
    that they are at, and this returns when they have.

    Args:
        crew: The workers.
        batches: Rows of each batch, the longest row first.
        lengths: Tokens of each row.
        embed: From rows to vectors, in one piece or several.
        store: Takes each piece; called in the caller's thread.
    """
    waiting = _Waiting(batches, lengths, len(crew))
    done: SimpleQueue[Found | Future[None]] = SimpleQueue()
    kinds = {worker.backbone.device.type for worker in crew}
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]

    def work(worker: Worker) -> None:
        with _like_the_caller(worker, casts), torch.inference_mode():
            while chosen := waiting.take(worker):
                for found in embed(worker.backbone, chosen):
                    done.put(found)

    with ThreadPoolExecutor(len(crew), "epic-rag-device", initializer=_settle_threads) as pool:
        try:
            for worker in crew:
                # A context can be entered by one thread only, so each has its own copy of the caller's.
                pool.submit(copy_context().run, work, worker).add_done_callback(done.put)
            working = len(crew)
            while working:
                found = done.get()
                if isinstance(found, Future):
                    found.result()
                    working -= 1
                else:
                    store(*found)
        finally:
            waiting.stop()


@contextmanager
def _like_the_caller(worker: Worker, casts: Sequence[tuple[str, torch.dtype]]) -> Iterator[None]:
    """What torch keeps for each thread: the current device, automatic casts, and the number of threads below it."""
    if worker.threads:
        _use_threads(worker.threads)
    with ExitStack() as stack:
        if worker.backbone.device.type == "cuda":
            stack.enter_context(torch.cuda.device(worker.backbone.device))
        for kind, dtype in casts:
            stack.enter_context(torch.autocast(kind, dtype))
        yield


def _settle_threads() -> None:
    """Note how many of torch's threads a new thread has; asking settles it, or it would override ours later."""
    with _threads_lock:
        _threads.available = torch.get_num_threads()


def _use_threads(count: int) -> None:
    """Let this thread, and no other, compute with so many of torch's threads."""
    with _threads_lock:
        torch.set_num_threads(count)
        # That is OpenMP's number for this thread alone, but also torch's for every thread to come: it is put back, by
        # a thread whose own number does not matter.
        other = threading.Thread(target=torch.set_num_threads, args=(_threads.available,))
        other.start()
        other.join()


class _Waiting:
    """The batches that nobody has taken yet."""

    def __init__(self, batches: Sequence[list[int]], lengths: Sequence[int], workers: int) -> None:
        self._batches = deque(batches)
        self._lengths = lengths
        self._workers = workers
        self._left = sum(lengths)
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Give nothing more."""
        with self._lock:
            self._batches.clear()

    def take(self, worker: Worker) -> list[int]:
        """The next batch, or as much of it as a worker should take now; empty if there is none."""
        with self._lock:
            if not self._batches:
                return []
            batch = self._batches.popleft()
            # At most half of an equal share of what is left: all end at about the same time.
            most = min(worker.tokens, max(worker.part, self._left // (2 * self._workers)))
            rows = max(1, most // max(1, self._lengths[batch[0]]))
            # In equal parts, or the last one would be a small rest.
            rows = -(-len(batch) // -(-len(batch) // rows))
            if rows < len(batch):
                self._batches.appendleft(batch[rows:])
                batch = batch[:rows]
            self._left -= sum(self._lengths[row] for row in batch)
            return batch


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
