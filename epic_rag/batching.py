"""Batches of texts of similar length, shared among workers.

    rows, longest first ──► [ batch | batch | batch | ... ] ──► the next idle worker ──► vectors in the rows' order

A transformer's cost follows the padded size of a batch: rows times the longest row. Sorting by length and capping that
product wastes little on padding and keeps memory flat. Queries that share a prompt are packed behind its keys and
values (`prefix_cache`) where the model allows it.

A worker is a model on a device with a thread of its own. Further devices hold copies of the weights; several workers
on one CPU share them, and each has a part of torch's threads: a small matrix product that is spread over all cores
waits for the slowest of them. Several workers take 0.81 of the time of one worker with all cores
(`benchmarks/devices.py`, table in benchmarks/README.md). Towards the end batches become smaller, so that the workers
finish at about the same time.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm.auto import tqdm

from epic_rag.errors import ConfigError, reason_of
from epic_rag.prefix_cache import CachedPrefix, PrefixCache, can_cache, embed_packed, pack_rows
from epic_rag.prompt import EncoderInput, collate

if TYPE_CHECKING:
    from epic_rag.backbone import Backbone

__all__ = [
    "BatchOptions",
    "BatchQueue",
    "DeviceNames",
    "Replicas",
    "Worker",
    "batch_tokens",
    "embed",
    "is_out_of_memory",
    "parse_devices",
    "plan_workers",
    "token_batches",
]

DeviceNames: TypeAlias = "str | torch.device | Sequence[str | torch.device]"

# Padded tokens in a batch. A CPU is fastest while a batch's activations fit its cache; a GPU wants to be filled.
_CPU_TOKENS, _GPU_TOKENS = 4096, 65536
# Tokens of a pack of queries behind one prompt, and of the packs of a batch. Attention is computed for all pairs of a
# pack's tokens and most of them are masked, so packs are short; matrix products want many tokens, so there are several.
_CPU_PACK, _CPU_PACKED = 128, 1024
_GPU_PACK, _GPU_PACKED = 256, 32768
# The smallest part that a batch is split into near the end.
_CPU_PART, _GPU_PART = 256, 4096
# Tokens for which starting another worker pays.
TOKENS_PER_WORKER = 4096
# Workers on one CPU. The Python part of a forward pass runs in one thread at a time.
_MOST_WORKERS = 8
_torch_threads = threading.local()
_torch_threads_lock = threading.Lock()


def batch_tokens(device: torch.device) -> int:
    """Return the number of padded tokens in a batch that suits a kind of device."""
    return _CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS


def token_batches(lengths: Sequence[int], *, max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Group rows into batches of similar length.

    Args:
        lengths: Token count of each row.
        max_tokens: Upper bound of rows times longest row in a batch. A single row longer than that is a batch by
            itself.
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


@dataclass(frozen=True)
class BatchOptions:
    """Settings of `embed`.

    Attributes:
        pad_id: Token id of the padding.
        max_tokens: Most padded tokens in a batch.
        cache: Keys and values of prompts; None computes every position of every row.
        padding_side: Where the padding goes.
        max_rows: Most rows in a batch; None lets token counts decide.
        show_progress: Whether to draw a progress bar.
        replicas: The same model on further devices, which take batches, too.
    """

    pad_id: int
    max_tokens: int
    cache: PrefixCache | None = None
    padding_side: Literal["left", "right"] = "right"
    max_rows: int | None = None
    show_progress: bool = False
    replicas: Replicas | None = None


def embed(
    backbone: Backbone,
    rows: Sequence[EncoderInput],
    slots: Sequence[torch.Tensor] | None,
    options: BatchOptions,
) -> npt.NDArray[np.float32]:
    """Embed rows in batches of similar length; a batch that does not fit memory is halved.

    Positions that all rows share at their start (the whole prompt if one bank stands before all of them, the
    instruction if each has its own demonstrations) are computed once and kept in the cache, for causal models.

    Args:
        backbone: The model, in evaluation mode.
        rows: Model inputs.
        slots: For each row, the (2k, dim) vectors of its slots; rows with the same demonstrations share one tensor.
        options: How to batch.

    Returns:
        (rows, dim) float32, in the order of the rows.

    Raises:
        ConfigError: If `max_rows` is below 1, or the padding side does not fit the model.
    """
    cache, padding_side, max_rows = options.cache, options.padding_side, options.max_rows
    if padding_side == "left" and not backbone.causal:
        raise ConfigError(
            "padding_side is 'left', but the model is bidirectional with absolute positions. Use padding_side='right'."
        )
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"batch_size is {max_rows}. Pass 1 or more.")
    # Prompts are cached for the transformer of documents alone.
    is_cached = cache is not None and backbone.causal and not backbone.has_query_weights
    prefix = None if cache is None or not is_cached else _shared_prefix(cache, backbone, rows, slots)
    cached = 0 if prefix is None else prefix.length
    lengths = [len(row.ids) - cached for row in rows]
    total = sum(len(row.ids) for row in rows)
    copies = [] if options.replicas is None else options.replicas.replicas_for(backbone, total)
    workers = plan_workers([backbone, *copies], sum(lengths), options.max_tokens, packed=prefix is not None)
    most = max(worker.tokens for worker in workers)
    if prefix is None:
        batches = token_batches(lengths, max_tokens=most, max_rows=max_rows)
    else:
        # Similar lengths together: the packs of a batch are padded to the longest.
        order = sorted(range(len(rows)), key=lambda row: (-lengths[row], row))
        batches = [
            [order[place] for place in batch] for batch in pack_rows([lengths[row] for row in order], most, max_rows)
        ]
    queue = BatchQueue(batches, lengths, len(workers))
    out = np.zeros((len(rows), backbone.dimension), dtype=np.float32)
    lock = threading.Lock()
    with tqdm(total=len(rows), desc="Encoding", unit="text", disable=not options.show_progress) as bar:

        def work(worker: Worker) -> None:
            model, device = worker.backbone, worker.backbone.device
            own_prefix = None if prefix is None else prefix.to(device)
            while chosen := queue.take(worker):
                try:
                    if own_prefix is None:
                        batch = collate([rows[row] for row in chosen], pad_id=options.pad_id, padding_side=padding_side)
                        vectors = None if slots is None else torch.cat([slots[row] for row in chosen]).to(device)
                        embedded = model(batch.to(device), vectors)
                    else:
                        width = _CPU_PACK if device.type == "cpu" else _GPU_PACK
                        packs = pack_rows([lengths[row] for row in chosen], width)
                        behind = None
                        if slots is not None and rows[0].slots and rows[0].slots[-1] >= cached:
                            inside = sum(slot < cached for slot in rows[0].slots)
                            behind = torch.cat([slots[row][inside:] for row in chosen]).to(device)
                        packed = [[rows[chosen[place]] for place in pack] for pack in packs]
                        embedded = embed_packed(model, own_prefix, packed, behind)
                    vectors_of_batch = embedded.cpu().numpy()
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or len(chosen) == 1:
                        raise
                    queue.put_halves(chosen)
                    continue
                with lock:
                    out[chosen] = vectors_of_batch
                    bar.update(len(chosen))

        if len(workers) > 1:
            _run_in_threads(work, workers, queue)
        else:
            with torch.inference_mode():
                work(workers[0])
    return out


def _shared_prefix(
    cache: PrefixCache, backbone: Backbone, rows: Sequence[EncoderInput], slots: Sequence[torch.Tensor] | None
) -> CachedPrefix | None:
    """Return keys and values of the positions that all rows share, slot vectors included; None if there are none."""
    if not rows:
        return None
    first = rows[0]
    shared = first.pool_start  # the prompt's length; 0 for documents
    if slots is not None and first.slots and any(each is not slots[0] for each in slots):
        shared = min(shared, first.slots[0])
    head = first.ids[:shared]
    if not shared or not all(
        row.ids[:shared] == head and row.slots == first.slots and len(row.ids) > shared for row in rows
    ):
        return None
    if not can_cache(backbone, max(len(row.ids) for row in rows)):
        return None
    inside = [slot for slot in first.slots if slot < shared]
    return cache.get(backbone, head, inside, None if slots is None else slots[0][: len(inside)])


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on a GPU or on the CPU.

    Only these errors are a reason to try a smaller batch: any other `RuntimeError` is a fault that a smaller batch
    would hide.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch's CPU allocator raises a plain RuntimeError; its message is the only mark it has.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


@dataclass(frozen=True)
class Worker:
    """A model and its share of the machine.

    Attributes:
        backbone: The model, or a copy of it.
        tokens: Most padded tokens in one of its batches.
        threads: Number of torch's threads for it; 0 for all.
    """

    backbone: Backbone
    tokens: int
    threads: int = 0


def plan_workers(backbones: Sequence[Backbone], total: int, max_tokens: int, *, packed: bool = False) -> list[Worker]:
    """Return the workers that pay: one for each few thousand tokens, the first in any case.

    Args:
        backbones: The encoder's own model and its copies.
        total: Tokens of all rows.
        max_tokens: Most padded tokens in a batch of the first model; workers on one CPU share them.
        packed: Whether rows are packed behind a cached prompt.
    """
    first = backbones[0].device.type

    def limit(device: torch.device) -> int:
        if packed:
            return min(max_tokens, _CPU_PACKED if device.type == "cpu" else _GPU_PACKED)
        return max_tokens if device.type == first else min(max_tokens, batch_tokens(device))

    chosen = backbones[: max(1, total // TOKENS_PER_WORKER)]
    workers = [Worker(backbone, limit(backbone.device)) for backbone in chosen]
    on_cpu = [place for place, backbone in enumerate(chosen) if backbone.device.type == "cpu"]
    if len(on_cpu) > 1:
        threads, rest = divmod(torch.get_num_threads(), len(on_cpu))
        for number, place in enumerate(on_cpu):
            tokens = max(1, workers[place].tokens // len(on_cpu))
            workers[place] = Worker(chosen[place], tokens, max(1, threads + (number < rest)))
    return workers


class BatchQueue:
    """Batches that no worker has taken yet; thread-safe.

    Args:
        batches: Rows of each batch, the longest row first.
        lengths: Tokens of each row.
        workers: Number of workers.
    """

    def __init__(self, batches: Sequence[list[int]], lengths: Sequence[int], workers: int) -> None:
        self._batches = deque(batches)
        self._lengths = lengths
        self._workers = workers
        self._left = sum(lengths)
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Drop all batches."""
        with self._lock:
            self._batches.clear()

    def put_halves(self, batch: list[int]) -> None:
        """Put back a batch that did not fit memory, in two halves."""
        middle = len(batch) // 2
        with self._lock:
            self._batches.extendleft((batch[middle:], batch[:middle]))
            self._left += sum(self._lengths[row] for row in batch)

    def take(self, worker: Worker) -> list[int]:
        """Return the next batch, or as much of it as the worker should take now; empty if there is none."""
        with self._lock:
            if not self._batches:
                return []
            batch = self._batches.popleft()
            if self._workers > 1:
                # At most half of an equal share of what is left, so that all workers end at about the same time.
                part = _CPU_PART if worker.backbone.device.type == "cpu" else _GPU_PART
                most = min(worker.tokens, max(part, self._left // (2 * self._workers)))
                rows = max(1, most // max(1, self._lengths[batch[0]]))
                # In equal parts, or the last one would be a small rest.
                rows = -(-len(batch) // -(-len(batch) // rows))
                if rows < len(batch):
                    self._batches.appendleft(batch[rows:])
                    batch = batch[:rows]
            self._left -= sum(self._lengths[row] for row in batch)
            return batch


def _run_in_threads(work: Callable[[Worker], None], workers: Sequence[Worker], queue: BatchQueue) -> None:
    """Run `work` for each worker in a thread until the queue is empty.

    The first error of a worker is raised here as it is. After an error or an interrupt the other workers finish the
    batch that they are at, and then this returns.
    """
    kinds = {worker.backbone.device.type for worker in workers}
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]

    def run(worker: Worker) -> None:
        try:
            with _thread_settings(worker, casts), torch.inference_mode():
                work(worker)
        except BaseException:
            queue.stop()
            raise

    with ThreadPoolExecutor(len(workers), "epic-rag-device", initializer=_read_torch_threads) as pool:
        try:
            # A context can be entered by one thread only, so each gets a copy of the caller's.
            futures = [pool.submit(copy_context().run, run, worker) for worker in workers]
            while wait(futures, timeout=0.1).not_done:
                pass  # returning to the interpreter lets an interrupt through on every platform
        finally:
            queue.stop()
        for future in futures:
            future.result()


@contextmanager
def _thread_settings(worker: Worker, casts: Sequence[tuple[str, torch.dtype]]) -> Iterator[None]:
    """Set what torch keeps for each thread: the current device, automatic casts, and the number of threads below it."""
    if worker.threads:
        _limit_torch_threads(worker.threads)
    with ExitStack() as stack:
        if worker.backbone.device.type == "cuda":
            stack.enter_context(torch.cuda.device(worker.backbone.device))
        for kind, dtype in casts:
            stack.enter_context(torch.autocast(kind, dtype))
        yield


def _read_torch_threads() -> None:
    """Call `torch.get_num_threads` once in a new thread.

    The first call initialises OpenMP's default and would overwrite a value that is set before it.
    """
    with _torch_threads_lock:
        _torch_threads.available = torch.get_num_threads()


def _limit_torch_threads(count: int) -> None:
    """Limit the number of torch's threads for products that are started from this thread alone."""
    with _torch_threads_lock:
        torch.set_num_threads(count)
        # This sets OpenMP's number for this thread, and also torch's default for every thread to come. The default is
        # restored by a thread whose own number does not matter.
        other = threading.Thread(target=torch.set_num_threads, args=(_torch_threads.available,))
        other.start()
        other.join()


def parse_devices(device: DeviceNames | None) -> tuple[torch.device, ...]:
    """Parse device names; None is the best device there is.

    Args:
        device: A name, names with commas between them, or a list of names. Only the CPU may be named more than once:
            its replicas share the weights.

    Raises:
        ConfigError: If there is none, one is not available, or one that is not the CPU is named twice.
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
        raise ConfigError("device is an empty list. Pass at least one, for instance 'cpu'.")
    parsed: list[torch.device] = []
    numbered: list[torch.device] = []
    for name in named:
        try:
            parsed.append(torch.device(name))
            actual = torch.empty(0, device=parsed[-1]).device
        except (RuntimeError, AssertionError, TypeError) as error:
            given = str(name) if isinstance(name, torch.device) else name
            raise ConfigError(
                f"Device {given!r} is not available on this machine ({reason_of(error)}). Pass 'cpu'."
            ) from error
        if actual in numbered and actual.type != "cpu":
            raise ConfigError(f"Device {actual} is named twice ({', '.join(map(str, named))}). Name it once.")
        numbered.append(actual)
    return tuple(parsed)


class Replicas:
    """Copies of an encoder's model on further devices, made when they are needed.

    An encoder on the CPU alone has copies there, too, which share its weights. A copy is renewed when the model's
    weights, dtype, mode or attention have changed.

    Args:
        others: The devices beside the encoder's own.
        workers: Number of workers on a CPU that is the only device; None for the number that suits it.
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

    def replicas_for(self, backbone: Backbone, tokens: int) -> list[Backbone]:
        """Return the copies of a model; none for so few tokens that one worker is as fast."""
        return self.copies_of(backbone) if tokens >= 2 * TOKENS_PER_WORKER else []

    def copies_of(self, backbone: Backbone) -> list[Backbone]:
        """Return the copies of a model, one for each of the other devices."""
        devices = self.others
        if not devices and backbone.device.type == "cpu":
            workers = _workers_on_cpu() if self.workers is None else self.workers
            devices = (backbone.device,) * (workers - 1)
        if not devices:
            return []
        # Writes to the weights change the key, and so does moving them.
        model = backbone.transformer
        attention = model.config.get_text_config()._attn_implementation
        weights = ((value.data_ptr(), 0 if value.is_inference() else value._version) for value in backbone.parameters())
        key = (backbone, model, backbone.training, attention, *weights, devices)
        made_for, made = self._made
        if made_for != key:
            made = [_copy_to(backbone, device) for device in devices]
            self._made = (key, made)
        return made


def _workers_on_cpu() -> int:
    """Return how many workers share a CPU.

    Their number divides that of torch's threads, so that all are alike and none waits for a slower one at the end.
    """
    threads = torch.get_num_threads()
    return max(count for count in range(1, _MOST_WORKERS + 1) if threads % count == 0)


def _is_at(backbone: Backbone, device: torch.device) -> bool:
    return torch.empty(0, device=device).device == backbone.device


def _copy_to(backbone: Backbone, device: torch.device) -> Backbone:
    """Copy the model to a device, without a detour through another one; on its own device the weights are shared.

    On the same device layers are shared as well, with what they keep beside their weights, but not the modules around
    them: some models change a buffer in a forward pass (positions that depend on the longest row).
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
