"""The optimiser, its schedule, what a run computes in, and the loss scale of float16."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from epic_rag.backbone import Backbone
from epic_rag.checkpoint_io import parse_dtype
from epic_rag.cpu_kernels import has_bfloat16_instructions
from epic_rag.training.config import TrainingConfig

__all__ = ["DTYPES", "build_optimizer", "build_scaler", "settle_dtype", "use_tensor_cores", "warmup_and_decay"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)


def settle_dtype(config: TrainingConfig, device: torch.device) -> TrainingConfig:
    """The run as it is computed on a device: "auto" becomes a dtype, which the training record then names.

    Products of bfloat16 are emulated on a CPU without instructions for them, many times slower than float32.
    """
    if config.dtype == "auto":
        fastest = parse_dtype("auto", device)
        return replace(config, dtype=next(name for name, dtype in DTYPES.items() if dtype == fastest))
    if config.dtype == "bfloat16" and device.type == "cpu" and not has_bfloat16_instructions():
        logger.warning(
            "dtype is bfloat16, this processor has no instructions for it, and steps take many times as long; "
            "--set dtype=auto takes float32 here"
        )
    return config


def build_optimizer(backbone: Backbone, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the weights that are trained.

    Projector, head and token embeddings have rates of their own; norms and biases have no decay.
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
        # The projector starts at a scaled identity: pulling it to zero would undo that.
        decay = config.weight_decay if value.ndim > 1 and not name.startswith("projector.") else 0.0
        groups.setdefault((peak, decay), []).append(value)
    return torch.optim.AdamW(
        [
            {"params": values, "lr": peak, "peak": peak, "weight_decay": decay}
            for (peak, decay), values in groups.items()
        ],
        # One kernel for all weights; on a CPU the plain loop is the one whose results are known.
        fused=True if backbone.device.type == "cuda" else None,
    )


def build_scaler(config: TrainingConfig, device: torch.device) -> torch.amp.GradScaler:
    """The loss scale: float16 has no room for small gradients; for other dtypes it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")


def use_tensor_cores(device: torch.device) -> None:
    """Let a GPU compute float32 matrix products in TF32: about 5 times as fast, and exact to 3 digits."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def warmup_and_decay(step: int, config: TrainingConfig) -> float:
    """Linear warm-up to 1, linear decay to 0."""
    warmup = max(1, math.ceil(config.steps * config.warmup))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (config.steps - step) / max(1, config.steps - warmup))
