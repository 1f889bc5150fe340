"""One encoder on several devices: a copy of the weights on each, a thread for each, batches shared among them.

    rows, longest first ──► [ batch | batch | batch | ... ] ──► a free worker takes the next ──► rows in their order

A worker that is free takes the next batch, so a device that is slower takes fewer. Towards the end the batches become
smaller, so that no device waits long for another.

Only the CPU may be named more than once. Its replicas share the weights, and torch's threads: each has its part of
them, which costs less waiting than one batch that is spread over all. A CPU that is named once has replicas, too.
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
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from epic_rag.errors import ConfigError, reason_of

if TYPE_CHECKING:
    from epic_rag.backbone import Backbone

__all__ = ["DeviceNames", "Replicas", "Worker", "batch_tokens", "crew_of", "parse_devices", "run"]

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
