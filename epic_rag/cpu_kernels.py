"""Matrix products on a CPU by oneDNN, with weights laid out for it once.

torch multiplies float32 matrices by MKL, which is slow on processors that are not Intel's (on an AMD EPYC it has half
the rate of oneDNN, see benchmarks/README.md), and either lays a weight out anew for every product, which for a single
query is most of the time. torch's own compiler replaces such layers in the same way, by the same operator.

Values differ from torch's by rounding, some 1e-6. In training, on other devices, in dtypes that the
processor does not multiply, or with EPIC_RAG_PORTABLE=1, the layer is torch's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

__all__ = ["is_portable", "multiplies_bfloat16", "portable", "use_onednn"]


_MAX_BYTES = 2 * 2**30
"""Weights are kept twice, as they were and laid out; a model with more than this keeps them once."""

_portable: ContextVar[bool] = ContextVar("portable", default=False)


@contextmanager
def portable() -> Iterator[None]:
    """Use torch's own layers within (to count floating-point operations, say)."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def is_portable() -> bool:
    """Whether the caller is within `portable`."""
    return _portable.get()


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16, which make it faster than float32."""
    known: Any = torch.cpu  # older versions of torch do not say, and then the answer is no
    asked = (getattr(known, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(ask()) for ask in asked if ask is not None)


def use_onednn(model: nn.Module) -> int:
    """Let the linear layers of a model compute by oneDNN; returns how many do.

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
    """`nn.Linear` that lays its weight out at the first product without gradients."""

    _laid_out: tuple[tuple[int, int, torch.dtype], torch.Tensor] | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        weight = self.weight
        if (
            self.training
            or torch.is_grad_enabled()
            or input.device.type != "cpu"
            or weight.device.type != "cpu"
            or input.dtype != weight.dtype
            or not input.numel()
            or _portable.get()
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        # Changes with every write to the weight, by an optimiser for one.
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype)
        held = self.__dict__.get("_laid_out")
        if held is None or held[0] != key:
            if not _multiplies(weight.dtype):
                return super().forward(input)
            held = (key, torch.ops.mkldnn._reorder_linear_weight(weight.detach()))
            self.__dict__["_laid_out"] = held
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, held[1], self.bias, "none", [], "")
        return output

    # The layout has no place in a copy or a pickle: its tensor knows neither.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_laid_out"}
