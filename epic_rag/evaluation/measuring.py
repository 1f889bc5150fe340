"""Instruments: floating-point operations, seconds and bytes of a call, and the machine it runs on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from epic_rag.cpu_kernels import disable_fast_kernels

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder

__all__ = ["Spread", "analytic_flops", "count_flops", "machine", "memory_method", "peak_bytes", "spread_of", "timed"]


@dataclass(frozen=True)
class Spread:
    """Repeated measurements.

    Attributes:
        median: Of all of them.
        low: Lower quartile.
        high: Upper quartile.
        runs: How many.
    """

    median: float
    low: float
    high: float
    runs: int

    def text(self, number: str, scale: float = 1.0) -> str:
        """Median and quartiles, "1.5 (1.2-1.9)", each formatted as `number` says."""
        low, median, high = (format(scale * value, number) for value in (self.low, self.median, self.high))
        return f"{median} ({low}\N{EN DASH}{high})"


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of a call, by `torch.utils.flop_counter`; a multiply-add is two.

    Matrix products and attention are counted, element-wise operations are not. Attention counts in full, as if nothing
    were masked.
    """
    # The counter does not know oneDNN's products.
    with disable_fast_kernels(), FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        call()
    return int(counter.get_total_flops())


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    flops: Any = sdpa_flop_count  # which has no types
    return int(flops(query, key, value))


def _attention_backward_flops(
    gradient: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any
) -> int:
    flops: Any = sdpa_backward_flop_count
    return int(flops(gradient, query, key, value))


# torch's counter knows the attention kernels of GPUs alone; without these a CPU's attention would count nothing.
_CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def analytic_flops(encoder: EpicEncoder, positions: int, *, slots: int = 0) -> int:
    """FLOPs of encoding one row by formula, as a check on what is counted.

    2 m n for each position and each m x n matrix of the transformer, 4 L n^2 d for the attention of n positions in L
    layers of width d, the projector's matrices for each slot, and a head's for the row (cf. Kaplan et al. 2020, section
    2.1). Exact for dense models without a pooler; in a mixture of experts it counts all experts.

    Args:
        encoder: The model.
        positions: Positions of the row.
        slots: How many of them are slots.
    """
    backbone = encoder.backbone
    config = backbone.transformer.config.get_text_config()
    heads = int(config.num_attention_heads)
    width = heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 4 * int(config.num_hidden_layers) * positions**2 * width
    head = 0 if backbone.head is None else _matrices(backbone.head)
    return _matrices(backbone.transformer) * positions + attention + _matrices(backbone.projector) * slots + head


def _matrices(module: torch.nn.Module) -> int:
    # A pooler sees one position, and nothing reads what it makes of it.
    parts = (part for name, part in module.named_modules() if not name.startswith("pooler."))
    return sum(2 * part.in_features * part.out_features for part in parts if isinstance(part, torch.nn.Linear))


def spread_of(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least two values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def timed(device: torch.device, call: Callable[[], object]) -> float:
    """Wall time of a call in seconds; a GPU finishes its work before and within it."""
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device, call: Callable[[], object]) -> int:
    """Most bytes allocated at once during a call, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return int(torch.cuda.max_memory_allocated(device) - before)
    profiler: Any = torch.profiler  # which has no types
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    # The allocator's own record: every allocation as its bytes, every release as minus them.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def memory_method(device: torch.device) -> str:
    """What `peak_bytes` does, in words."""
    if device.type == "cuda":
        return "rise of torch.cuda.max_memory_allocated"
    return "allocations minus releases recorded by torch.profiler, at their highest"


def machine(device: torch.device) -> dict[str, Any]:
    """What it was measured on."""
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "processor": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def _processor() -> str:
    """The processor's name where the system tells it, otherwise its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
