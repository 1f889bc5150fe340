"""Linear layers that multiply int8 by int8, for processors with instructions for it (VNNI).

A row of a weight has one scale, as in a checkpoint of int8 rows; a row of what comes in, which is one token, gets its
own at every product. Integers are multiplied and summed exactly, by oneDNN:

    output[row, column] = given_scale[row] * weight_scale[column] * sum(given[row] * weight[column]) + bias[column]

With scales of rows, and not one for all of a batch, a token is rounded alike in whatever batch it is, and a large value
in one token does not round away all others. Everything but the linear layers of the transformer stays float32.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import nn

from epic_rag.cpu_kernels import is_portable
from epic_rag.errors import CheckpointError, ConfigError
from epic_rag.int8_weights import quantise_rows

__all__ = ["Int8Linear", "check_int8", "dtype_of", "multiplies_int8", "use_int8"]

# oneDNN has its fast products for unsigned values, so 128 is zero.
_ZERO = 128
_SMALLEST = 1e-30
# Rows that are done together: what lies between the roundings stays in the cache.
_BLOCK = 1024
_FLOAT = "float32 works everywhere: leave dtype out"


@functools.cache
def multiplies_int8() -> bool:
    """Whether this processor and this build of torch multiply int8 exactly.

    Asked by products of the largest values: without instructions made for it, sums of two products have 16 bits and
    overflow. torch's own answer knows of AVX512 alone, and there are processors with VNNI and without AVX512.
    """
    backends: Any = torch.backends  # some of its functions have no types
    if not (backends.mkldnn.is_available() and backends.mkl.is_available()):
        return False
    if not (hasattr(torch.ops.onednn, "qlinear_prepack") and hasattr(torch.ops.onednn, "qlinear_pointwise")):
        return False
    with torch.inference_mode(False), torch.no_grad():
        weight = torch.full((64, 64), 127, dtype=torch.int8)
        given = torch.full((16, 64), 255, dtype=torch.uint8)
        product = _multiply(given, _lay_out(weight), torch.ones(64))
        return bool((product == 64 * 127 * (255 - _ZERO)).all())


def check_int8(*devices: torch.device) -> None:
    """Refuse int8 where it cannot compute.

    Raises:
        ConfigError: If a device is not the CPU, or the processor or the environment has no products of int8.
    """
    for device in devices:
        if device.type != "cpu":
            raise ConfigError(
                f"dtype is 'int8', which computes on the CPU, and device is '{device}'; pass device='cpu' or "
                "dtype='bfloat16'"
            )
    if os.environ.get("EPIC_RAG_PORTABLE", "") not in ("", "0"):
        raise ConfigError(
            "dtype is 'int8', which computes by oneDNN, and EPIC_RAG_PORTABLE is set, which forbids it; unset it or "
            "pass dtype='float32'"
        )
    if not multiplies_int8():
        raise ConfigError(
            f"dtype is 'int8', and this processor or build of torch has no exact products of int8 (VNNI); {_FLOAT}"
        )


def use_int8(model: nn.Module) -> int:
    """Put int8 layers in place of a model's linear layers, one by one; returns how many.

    The model can only encode from then on: its parameters have no gradients.

    Raises:
        ConfigError: If it has no linear layers (GPT-2 has others).
        CheckpointError: If weights are not finite.
    """
    made: dict[int, Int8Linear] = {}  # a layer that is in two places stays one
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and type(child).forward is nn.Linear.forward:
                if id(child) not in made:
                    made[id(child)] = Int8Linear(child)
                setattr(parent, name, made[id(child)])
    if not made:
        raise ConfigError(f"dtype is 'int8', and {type(model).__name__} has 0 linear layers to put it in; {_FLOAT}")
    model.requires_grad_(False)
    return len(made)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a transformer's weights; int8 if its linear layers are."""
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        return torch.int8
    # A whole model has weights of one dtype.
    return next(weight.dtype for weight in model.parameters() if weight.is_floating_point())


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, for encoding on a CPU.

    Its state is that of the `nn.Linear` with the rounded weights: what is saved from it is a float weight, and loading
    takes one. Rounding it again gives the same int8 rows.

    Args:
        layer: Whose weights to round; unchanged.

    Raises:
        CheckpointError: If they are not finite.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)
        values, self.scale = _rounded(layer.weight)  # a plain tensor: no change of dtype may round it
        self.weight = nn.Parameter(values, requires_grad=False)
        self.training = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), in the dtype that came in.

        Raises:
            ConfigError: If the layer is not on the CPU.
        """
        if input.device.type != "cpu" or self.weight.device.type != "cpu":
            check_int8(input.device, self.weight.device)
        shape = (*input.shape[:-1], self.out_features)
        if not input.numel():
            return input.new_empty(shape)
        with torch.no_grad():
            if is_portable():
                return self.emulated(input)
            rows, laid_out = input.reshape(-1, self.in_features), self._packed()
            output = input.new_empty(len(rows), self.out_features)
            bias = 0.0 if self.bias is None else self.bias
            for start in range(0, len(rows), _BLOCK):
                given, scale = _quantise(rows[start : start + _BLOCK])
                product = _multiply(given, laid_out, self.scale).mul_(scale)
                torch.add(product, bias, out=output[start : start + _BLOCK])
            return output.view(shape)

    def emulated(self, input: torch.Tensor) -> torch.Tensor:
        """The same by torch's own float32 product of the rounded numbers: slow, and another order of sums."""
        given, scale = _quantise(input)
        rows = given.to(torch.float32).sub_(_ZERO).mul_(scale)
        bias = None if self.bias is None else self.bias.float()
        output = nn.functional.linear(rows, self.dequantised(), bias)
        return output.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def dequantised(self) -> torch.Tensor:
        """(out, in) float32 weights; exact."""
        return self.weight.detach().to(torch.float32).mul_(self.scale.to(self.weight.device).unsqueeze(1))

    def train(self, mode: bool = True) -> Int8Linear:
        """Refuse training: rounding has no gradients.

        Raises:
            ConfigError: If it is asked for.
        """
        if mode:
            raise ConfigError("training is asked for, and dtype 'int8' has no gradients; load the model as float32")
        return self

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _packed(self) -> torch.Tensor:
        # Changes with every write to the weight; a race of two threads lays it out twice, to the same end.
        key = (self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version)
        held: tuple[tuple[int, int], torch.Tensor] | None = self.__dict__.get("_laid_out")
        if held is None or held[0] != key:
            held = (key, _lay_out(self.weight.detach()))
            self.__dict__["_laid_out"] = held
        return held[1]

    # The layout has no place in a copy or a pickle: its tensor knows neither.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_laid_out"}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.dequantised()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        name = prefix + "weight"
        found = state_dict.get(name)
        if found is not None and found.is_floating_point() and found.shape == self.weight.shape:
            values, self.scale = _rounded(found)
            self.__dict__.pop("_laid_out", None)
            state_dict = {**state_dict, name: values}
        super()._load_from_state_dict(state_dict, prefix, *others)


def _rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not bool(weight.isfinite().all()):
        raise CheckpointError(
            f"a weight of shape {tuple(weight.shape)} has values that are not finite, int8 has none; {_FLOAT}"
        )
    return quantise_rows(weight)


def _quantise(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., in) -> (rows, in) uint8 around 128, and (rows, 1) float32 scales."""
    rows = input.detach().reshape(-1, input.shape[-1])
    largest = torch.maximum(rows.amax(dim=1, keepdim=True), rows.amin(dim=1, keepdim=True).neg_()).float()
    scale = largest.mul_(1 / 127).clamp_min_(_SMALLEST)
    # To the nearest: the half more is what conversion, which only cuts, takes off again.
    return torch.mul(rows, scale.reciprocal()).add_(_ZERO + 0.5).to(torch.uint8), scale


def _lay_out(weight: torch.Tensor) -> torch.Tensor:
    laid_out: torch.Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return laid_out


def _multiply(given: torch.Tensor, laid_out: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(rows, in) uint8 and a weight -> (rows, out) float32, still without the rows' own scales."""
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        given, 1.0, _ZERO, laid_out, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product
