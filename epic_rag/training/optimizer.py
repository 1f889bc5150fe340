"""AdamW, rates of layers, the schedule, the average of weights, and the compute dtype with its loss scaling."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from epic_rag.backbone import Backbone
from epic_rag.checkpoint_io import parse_dtype
from epic_rag.cpu_kernels import has_bfloat16_instructions
from epic_rag.errors import ConfigError
from epic_rag.training.config import TrainingConfig

__all__ = [
    "DTYPES",
    "WeightAverage",
    "allow_tf32",
    "build_optimizer",
    "build_scaler",
    "freeze_layers",
    "resolve_dtype",
    "separate_queries",
    "warmup_and_decay",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)


def resolve_dtype(config: TrainingConfig, device: torch.device) -> TrainingConfig:
    """Replace the dtype "auto" by that of the device, so that the training record names it.

    A CPU without bfloat16 instructions emulates them, many times slower than float32.
    """
    if config.dtype == "auto":
        fastest = parse_dtype("auto", device)
        name: Any = next(name for name, dtype in DTYPES.items() if dtype == fastest)
        return replace(config, dtype=name)
    if config.dtype == "bfloat16" and device.type == "cpu" and not has_bfloat16_instructions():
        logger.warning(
            "dtype is bfloat16, which this processor has no instructions for, so steps take many times as long. "
            "Pass --set dtype=auto for float32."
        )
    return config


def build_optimizer(backbone: Backbone, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW over the weights that are trained.

    Projector, head and token embeddings have their own learning rates, layers those of `layer_decay`; norms, biases and
    the projector no decay.
    """
    depths = _depths(backbone)
    last = max(depths.values())
    tokens = {id(value) for value in backbone.transformer.get_input_embeddings().parameters()}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, value in backbone.named_parameters():
        if not value.requires_grad:
            continue
        peak = config.learning_rate
        if name.startswith(("projector.", "head.")):
            peak = config.projector_learning_rate
        elif id(value) in tokens and config.token_learning_rate is not None:
            peak = config.token_learning_rate
        else:
            peak *= config.layer_decay ** (last - depths[name])
        # The projector starts at a scaled identity, which decay would pull to zero.
        decay = config.weight_decay if value.ndim > 1 and not name.startswith("projector.") else 0.0
        groups.setdefault((peak, decay), []).append(value)
    return torch.optim.AdamW(
        [
            {"params": values, "lr": peak, "peak": peak, "weight_decay": decay}
            for (peak, decay), values in groups.items()
        ],
        # One kernel for all weights on a GPU.
        fused=True if backbone.device.type == "cuda" else None,
    )


def freeze_layers(backbone: Backbone, count: int) -> None:
    """Freeze the token embeddings and the first layers: texts of a few tasks teach them little of words in general.

    Raises:
        ConfigError: If there are not more layers than that.
    """
    depths = _depths(backbone)
    _require_layers(depths, count)
    for name, value in backbone.named_parameters():
        if depths[name] <= count:
            value.requires_grad_(False)


def separate_queries(backbone: Backbone, shared_layers: int | None) -> None:
    """Add weights of queries to a model that has none, and freeze all others but the projector.

    Args:
        backbone: The model.
        shared_layers: Number of first layers that queries share with documents, as they share the token embeddings;
            None shares nothing.

    Raises:
        ConfigError: If there are not more layers than that.
    """
    if not backbone.has_query_weights:
        depths = _depths(backbone)
        _require_layers(depths, shared_layers)
        least = -1 if shared_layers is None else shared_layers
        prefix = "transformer."
        backbone.separate_queries(
            {name.removeprefix(prefix) for name, depth in depths.items() if name.startswith(prefix) and depth > least}
        )
    own = {id(value) for value in backbone.query_weights().values()}
    for name, value in backbone.named_parameters():
        value.requires_grad_(id(value) in own or name.startswith("projector."))


def _require_layers(depths: Mapping[str, int], count: int | None) -> None:
    layers = max(depths.values())
    if count is not None and count >= layers:
        raise ConfigError(f"frozen_layers is {count}, and the model has {layers} layers. Give a smaller number.")


def _depths(backbone: Backbone) -> dict[str, int]:
    """Return each parameter's depth: 0 for embeddings, 1 for the first layer; behind the layers that of the last."""
    total = int(backbone.transformer.config.get_text_config().num_hidden_layers)
    depths = {}
    for name, _ in backbone.named_parameters():
        layer = re.search(r"\.(?:layers?|h)\.(\d+)\.", name)
        before = re.search(r"embed|\.wte\.|\.wpe\.", name) is not None
        depths[name] = int(layer[1]) + 1 if layer else 0 if before else total
    return depths


class WeightAverage:
    """Exponential moving average of the trained weights, over at most 1 / (1 - decay) steps.

    Attributes:
        values: The average, by name of the parameter.
    """

    def __init__(self, backbone: Backbone, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.values = {name: value.detach().clone() for name, value in _trained(backbone)}

    @torch.no_grad()
    def update(self, backbone: Backbone) -> None:
        """Add the weights after a step; early steps count more, so that the start does not stay in the average."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))
        for name, value in _trained(backbone):
            self.values[name].lerp_(value, 1 - decay)

    @torch.no_grad()
    def swap(self, backbone: Backbone) -> None:
        """Exchange the average and the weights of the model."""
        for name, value in _trained(backbone):
            current = value.detach().clone()
            value.copy_(self.values[name])
            self.values[name] = current


def _trained(backbone: Backbone) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, value) for name, value in backbone.named_parameters() if value.requires_grad]


def build_scaler(config: TrainingConfig, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler: float16 underflows for small gradients; for other dtypes it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")


def allow_tf32(device: torch.device) -> None:
    """Compute float32 matrix products in TF32 on a GPU: about 5 times as fast, exact to 3 digits."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def warmup_and_decay(step: int, config: TrainingConfig) -> float:
    """Return the learning rate's factor at a step: linear warm-up to 1, then 1, linear decay to 0."""
    warmup = max(1, math.ceil(config.steps * config.warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    decay = min(config.steps - warmup, math.ceil(config.steps * config.decay_ratio))
    return min(1.0, max(0.0, (config.steps - step) / max(1, decay)))
