"""Linear layers on a CPU through oneDNN, with prepacked weights.

torch multiplies float32 matrices with MKL, which is slower than oneDNN on AMD processors, and both repack the weight on
every call, which for a single query is most of the time. Here it is prepacked once. With it, passages are encoded in
0.44 of the time that sentence-transformers needs on the same weights (`benchmarks/throughput.py`, table in
benchmarks/README.md). torch's compiler replaces such layers with the same operator.

Results differ from torch's by rounding, about 1e-6. In training, on other devices, in dtypes that the processor does
not multiply, and with EPIC_RAG_PORTABLE=1, the layer falls back to torch's implementation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

__all__ = ["OneDnnLinear", "disable_fast_kernels", "has_bfloat16_instructions", "use_onednn"]


_MAX_BYTES = 2 * 2**30
"""Largest model that is prepacked. Weights are then kept twice, in the original and in the packed layout."""

_disabled: ContextVar[bool] = ContextVar("fast_kernels_disabled", default=False)


@contextmanager
def disable_fast_kernels() -> Iterator[None]:
    """Use torch's own layers inside the block, for instance to count floating-point operations."""
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def has_bfloat16_instructions() -> bool:
    """Return whether this processor multiplies bfloat16 in hardware, faster than float32."""
    known: Any = torch.cpu  # older versions of torch do not say, and then the answer is no
    asked = (getattr(known, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(ask()) for ask in asked if ask is not None)


def use_onednn(model: nn.Module) -> int:
    """Replace the linear layers of a model by `OneDnnLinear` in place; return their number.

    The layers stay `nn.Linear` with the same parameters, so that saving, training and moving the model are as before.
    """
    if os.environ.get("EPIC_RAG_PORTABLE", "") not in ("", "0") or not _available():
        return 0
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    if sum(layer.weight.numel() * layer.weight.element_size() for layer in layers) > _MAX_BYTES:
        return 0
    for layer in layers:
        layer.__class__ = OneDnnLinear
    return len(layers)


def _available() -> bool:
    # MKL is there in builds for x86 alone; on ARM torch multiplies by other libraries.
    backends: Any = torch.backends  # some of its functions have no types
    return (
        bool(backends.mkldnn.is_available())
        and bool(backends.mkl.is_available())
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _multiplies(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class OneDnnLinear(nn.Linear):
    """`nn.Linear` that prepacks its weight at the first product without gradients."""

    _packed: tuple[tuple[int, int, torch.dtype], torch.Tensor] | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        weight = self.weight
        if (
            self.training
            or torch.is_grad_enabled()
            or input.device.type != "cpu"
            or weight.device.type != "cpu"
            or input.dtype != weight.dtype
            or not input.numel()
            or _disabled.get()
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        # Changes with every write to the weight, by an optimiser for one.
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype)
        held = self.__dict__.get("_packed")
        if held is None or held[0] != key:
            if not _multiplies(weight.dtype):
                return super().forward(input)
            held = (key, torch.ops.mkldnn._reorder_linear_weight(weight.detach()))
            self.__dict__["_packed"] = held
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, held[1], self.bias, "none", [], "")
        return output

    # The layout has no place in a copy or a pickle: its tensor knows neither.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}
