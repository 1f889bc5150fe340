"""Instruments: floating-point operations, seconds and bytes of a call, the machine, and plots without a display."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from epic_rag.cpu_kernels import disable_fast_kernels
from epic_rag.errors import MissingExtraError

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder


@dataclass(frozen=True)
class Spread:
    """Repeated measurements: median, quartiles and number of runs."""

    median: float
    low: float
    high: float
    runs: int

    def text(self, number: str, scale: float = 1.0) -> str:
        """Return median and quartiles, "1.5 (1.2-1.9)", each in the number format given."""
        low, median, high = (format(scale * value, number) for value in (self.low, self.median, self.high))
        return f"{median} ({low}\N{EN DASH}{high})"


def spread_of(values: Sequence[float]) -> Spread:
    """Return median and quartiles of at least two values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def count_flops(call: Callable[[], object]) -> int:
    """Count the floating-point operations of a call with `torch.utils.flop_counter`; a multiply-add is two.

    Matrix products and attention are counted, element-wise operations are not. Attention counts in full, masked
    positions too. The fast CPU kernels are off during the call, because the counter does not know them.
    """
    with disable_fast_kernels(), FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        call()
    return int(counter.get_total_flops())


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    flops: Any = sdpa_flop_count  # untyped in torch
    return int(flops(query, key, value))


def _attention_backward_flops(
    gradient: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any
) -> int:
    flops: Any = sdpa_backward_flop_count
    return int(flops(gradient, query, key, value))


# torch's counter only knows the attention kernels of GPUs.
_CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def analytic_flops(encoder: EpicEncoder, positions: int, *, slots: int = 0) -> int:
    """Return the FLOPs of encoding one row by formula, to check `count_flops`.

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
    # A pooler reads one position, and its output is not used.
    parts = (part for name, part in module.named_modules() if not name.startswith("pooler."))
    return sum(2 * part.in_features * part.out_features for part in parts if isinstance(part, torch.nn.Linear))


def timed(device: torch.device, call: Callable[[], object]) -> float:
    """Return the wall time of a call in seconds; a GPU is synchronized before and after it."""
    _synchronize(device)
    started = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device, call: Callable[[], object]) -> int:
    """Return the most bytes allocated at once during a call, beyond those allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return int(torch.cuda.max_memory_allocated(device) - before)
    profiler: Any = torch.profiler  # untyped in torch
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    # The allocator's record: every allocation as its bytes, every release as minus them.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def memory_method(device: torch.device) -> str:
    """Describe the method of `peak_bytes`."""
    if device.type == "cuda":
        return "rise of torch.cuda.max_memory_allocated"
    return "allocations minus releases recorded by torch.profiler, at their highest"


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine: device, processor, cores, threads, system."""
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "processor": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def _processor() -> str:
    """Return the processor's name if the system knows it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def require_matplotlib() -> None:
    """Check that plots can be drawn, before anything is measured.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", "dev", "drawing plots") from error
