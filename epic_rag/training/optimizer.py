"""AdamW, the learning rate schedule, and the compute dtype with its loss scaling."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import torch

from epic_rag.backbone import Backbone
from epic_rag.checkpoint_io import parse_dtype
from epic_rag.cpu_kernels import has_bfloat16_instructions
from epic_rag.training.config import TrainingConfig

__all__ = ["DTYPES", "allow_tf32", "build_optimizer", "build_scaler", "resolve_dtype", "warmup_and_decay"]

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

    Projector, head and token embeddings have their own learning rates; norms, biases and the projector no decay.
    """
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


def build_scaler(config: TrainingConfig, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler: float16 underflows for small gradients; for other dtypes it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")


def allow_tf32(device: torch.device) -> None:
    """Compute float32 matrix products in TF32 on a GPU: about 5 times as fast, exact to 3 digits."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def warmup_and_decay(step: int, config: TrainingConfig) -> float:
    """Return the learning rate's factor at a step: linear warm-up to 1, linear decay to 0."""
    warmup = max(1, math.ceil(config.steps * config.warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (config.steps - step) / max(1, config.steps - warmup))
