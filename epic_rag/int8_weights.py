"""int8 storage of weights: a quarter of the size of float32.

A row of a matrix (an output channel, or a token of the vocabulary) becomes integers from -127 to 127 and one scale:

    weight[row] ≈ scale[row] * values[row]

On disk, in safetensors, `NAME` is int8 and `NAME.scale` is float32, one number per row; vectors and scalars are stored
unchanged. The files are named `model-int8-00001-of-0000N.safetensors`, which no other library mistakes for weights that
it can read. Weights are float32 again when they are loaded. Shipped checkpoints are stored so, because a package may
have 100 MB; what it costs in quality is measured by `benchmarks/results.py --only quantisation` (docs/results.md).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from epic_rag.checkpoints import INT8_ROWS
from epic_rag.errors import CheckpointError
from epic_rag.files import save_tensors

__all__ = [
    "dequantise",
    "load_int8_model",
    "quantise",
    "quantise_rows",
    "remove_weights",
    "write_int8_model",
]

# No file of a shipped checkpoint may be over 50 MB; this leaves room for the header.
SHARD_BYTES = 45_000_000
_SHARD = "model-int8-{:05d}-of-{:05d}.safetensors"
_SCALE = ".scale"
# Scales to try for a row, as parts of the one that clips nothing. Clipping a row's largest weight can lower the error
# of all the others; on the weights of MiniLM no row gains from clipping more than this.
_CLIPS = tuple(1 - step / 100 for step in range(11))


def quantise_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to int8, with the scale of least squared error among a few.

    Args:
        weight: (rows, ...) floating-point values.

    Returns:
        int8 values of the same shape, and (rows,) float32 scales. A scale has 16 significant bits, so that its
        products with the values are exact in float32, and quantising those products gives the same values again.
    """
    rows = weight.detach().to("cpu", torch.float32).flatten(1)  # (rows, width)
    largest = rows.abs().amax(dim=1)  # (rows,)
    best = torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    for clip in _CLIPS:
        scale = _rounded(largest * clip / 127)
        error = (rows - _integers(rows, scale) * scale.unsqueeze(1)).square().sum(dim=1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
        if not bool(least.any()):
            break  # rows that were rounded before
    return _integers(rows, best).to(torch.int8).reshape(weight.shape), best


def quantise(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert named tensors for storage: matrices to int8 rows with scales, everything else unchanged.

    Raises:
        CheckpointError: If a matrix has values that are not finite.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not _has_rows(tensor):
            stored[name] = tensor.detach().cpu().clone().contiguous()
            continue
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"The weight {name} has values that are not finite. Save the checkpoint as float32.")
        stored[name], stored[name + _SCALE] = quantise_rows(tensor)
    return stored


def dequantise(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Restore the tensors that `quantise` was given, rounded; matrices are float32."""
    tensors = {}
    for name in _names(stored):
        tensor, scale = stored[name], stored.get(name + _SCALE)
        if scale is not None:
            # In place: there is one float32 copy of a matrix, never two.
            tensor = tensor.to(torch.float32).mul_(scale.reshape(-1, *[1] * (tensor.dim() - 1)))
        tensors[name] = tensor
    return tensors


def write_int8_model(tensors: Mapping[str, torch.Tensor], folder: Path) -> set[Path]:
    """Write a transformer's weights as int8 rows.

    Args:
        tensors: Its state.
        folder: Takes the files. One is at most 45 MB large, unless a single matrix is larger.

    Returns:
        The files.

    Raises:
        CheckpointError: If a matrix has values that are not finite.
    """
    shards = list(_shards(tensors))
    written = set()
    for number, names in enumerate(shards, start=1):
        file = folder / _SHARD.format(number, len(shards))
        save_tensors(quantise({name: tensors[name] for name in names}), file, metadata={"format": INT8_ROWS})
        written.add(file)
    return written


def load_int8_model(
    folder: Path, config: PretrainedConfig, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a transformer whose weights `write_int8_model` has written.

    Files are memory-mapped and matrices dequantised one by one; the float32 results become the model's parameters.

    Args:
        folder: A checkpoint folder.
        config: Its configuration.
        trust_remote_code: Allow code from the folder to run.

    Returns:
        The model in float32, and transformers' report of what was missing.

    Raises:
        CheckpointError: If not every file is there.
    """
    # An empty model says which class the configuration stands for, then that class takes weights from memory.
    auto: Any = AutoModel
    with torch.device("meta"):
        empty = auto.from_config(config, trust_remote_code=trust_remote_code)
    model, report = type(empty).from_pretrained(
        None, config=config, state_dict=_read(folder), dtype=torch.float32, output_loading_info=True
    )
    return model, report


def remove_weights(folder: Path, *, keep: Collection[Path]) -> None:
    """Delete weights of an earlier save from a folder, in either format."""
    for file in folder.glob("model*.safetensors*"):
        if file not in keep:
            file.unlink()


def _read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in _find_shards(folder):
        with safe_open(file, framework="pt") as stored:
            keys = set(stored.keys())
            for name in _names(keys):
                parts = {name, name + _SCALE} & keys
                tensors.update(dequantise({part: stored.get_tensor(part) for part in parts}))
    return tensors


def _names(keys: Collection[str]) -> list[str]:
    """Return the names of a file's tensors, without those of scales."""
    return [key for key in keys if not (key.endswith(_SCALE) and key.removesuffix(_SCALE) in keys)]


def _find_shards(folder: Path) -> list[Path]:
    """Return the files of a folder's weights, in order."""
    found = sorted(folder.glob("model-int8-*.safetensors"))
    numbers = [re.fullmatch(r"model-int8-(\d{5})-of-(\d{5})\.safetensors", file.name) for file in found]
    total = max((int(number[2]) for number in numbers if number), default=1)
    expected = [folder / _SHARD.format(number, total) for number in range(1, total + 1)]
    missing = [file.name for file in expected if file not in found]
    if missing:
        raise CheckpointError(
            f"{folder} has {total - len(missing)} of {total} weight files; {missing[0]} is missing. "
            "Copy the checkpoint again."
        )
    return expected


def _shards(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Group names of tensors into files by their size after quantisation."""
    names: list[str] = []
    total = 0
    for name, tensor in tensors.items():
        size = tensor.numel() + 4 * len(tensor) if _has_rows(tensor) else tensor.numel() * tensor.element_size()
        if names and total + size > SHARD_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        yield names


def _has_rows(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 1 and tensor.numel() > 0


def _integers(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Divide (rows, width) values by (rows,) scales; return whole numbers, still in float32."""
    # A row of zeros has the scale zero, and any divisor gives its zeros.
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(1)
    return (rows / divisor).round_().clamp_(-127, 127)


def _rounded(scale: torch.Tensor) -> torch.Tensor:
    """Round float32 numbers to 16 significant bits: a product with 7 more bits still has fewer than 24."""
    bits = scale.contiguous().view(torch.int32)
    return ((bits + 0x80) & ~0xFF).view(torch.float32)
