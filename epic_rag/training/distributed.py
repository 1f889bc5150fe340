"""Data-parallel training in several processes, as `torchrun` starts them.

Every process holds all weights and encodes its shard of a step's rows. Vectors are all-reduced, so that demonstrations
and negatives come from the whole batch, and gradients are summed. `batch_size` is that of all processes together: the
result does not depend on their number. Rank 0 alone writes files.

Only the environment variables of the launcher are read (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
Without them there is one process, and every function here does nothing.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed as dist

from epic_rag.errors import ConfigError

__all__ = ["World", "init_distributed"]

T = TypeVar("T")

# The other processes wait while rank 0 writes a large checkpoint.
_TIMEOUT = timedelta(hours=1)
# Gradients are reduced in buckets of this many numbers: few calls, little extra memory.
_BUCKET = 1 << 24


@dataclass(frozen=True)
class World:
    """The processes of a run, with collective operations that do nothing in a single process.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the process that writes files and messages."""
        return self.rank == 0

    def shard(self, lengths: Sequence[int]) -> list[int]:
        """Return this process's rows: every `size`-th in the order of length, so that all have equal work."""
        if self.size == 1:
            return list(range(len(lengths)))
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        return order[self.rank :: self.size]

    def all_reduce(self, vectors: torch.Tensor) -> torch.Tensor:
        """Sum a tensor without gradients over all processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(vectors)
        return vectors

    def all_reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes.

        A weight that no process used keeps None, so that the optimizer skips it as in a single process.
        """
        if self.size == 1:
            return
        weights = [value for value in parameters if value.requires_grad]
        device = weights[0].device
        used = torch.tensor([value.grad is not None for value in weights], dtype=torch.int32, device=device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        bucket: list[torch.Tensor] = []
        for value, flag in zip(weights, used.tolist(), strict=True):
            if not flag:
                continue
            if value.grad is None:
                value.grad = torch.zeros_like(value)
            if bucket and (
                value.grad.dtype != bucket[0].dtype or sum(item.numel() for item in bucket) + value.numel() > _BUCKET
            ):
                _all_reduce_bucket(bucket)
                bucket = []
            bucket.append(value.grad)
        if bucket:
            _all_reduce_bucket(bucket)

    def broadcast_parameters(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy rank 0's values into every process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Return every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return [item for item in values if item is not None]

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        if self.size > 1:
            dist.barrier()


def init_distributed(device: str | None) -> tuple[World, str | None]:
    """Join the process group of the launcher, if there is one.

    Args:
        device: The configuration's device; None or "cuda" gives each process the GPU of its LOCAL_RANK.

    Returns:
        The processes, and the device of this one (None for the best available).

    Raises:
        ConfigError: If a machine has more processes than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(), device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device == "cuda" or (device is None and torch.cuda.is_available())
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"This is process {local + 1} on a machine with {torch.cuda.device_count()} GPUs. Start at most one "
                "process a GPU (--nproc-per-node), or set device to cpu."
            )
        # Before the group exists: NCCL takes the current device, and all processes would share the first one.
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
        atexit.register(_destroy_process_group)
    # Without a GPU the processes of a machine share its CPU; an MPS device cannot be shared.
    return World(dist.get_rank(), dist.get_world_size()), f"cuda:{local}" if on_gpu else device or "cpu"


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _all_reduce_bucket(gradients: Sequence[torch.Tensor]) -> None:
    if len(gradients) == 1:
        dist.all_reduce(gradients[0])
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
