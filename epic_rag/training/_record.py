"""The training record: what made a checkpoint, in its `epic.json`."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epic_rag import __version__

if TYPE_CHECKING:
    from epic_rag.training.trainer import Trainer

__all__ = ["hardware", "public_name", "training_record", "versions"]


def training_record(trainer: Trainer) -> dict[str, Any]:
    """Data with hashes, configuration, versions, hardware, hours, tokens."""
    config = trainer.config.to_dict()
    # Folders of the machine that trained are nobody's business and reproduce nothing.
    for key in ("model", "output", "data", "teacher"):
        config[key] = None if config[key] is None else public_name(config[key])
    record: dict[str, Any] = {
        "config": config,
        "data": {
            item.name: {"rows": len(item.rows), "held_out": len(item.held_out), "sha256": item.sha256}
            for item in trainer.datasets
        },
        "steps": trainer.step,
        "pairs": trainer.pairs,
        "tokens": trainer.tokens,
        "hours": round(trainer.seconds / 3600, 3),
        "hardware": hardware(trainer.encoder.device, trainer.world.size),
        "processes": trainer.world.size,
        "versions": {"epic-rag": __version__, **versions(lora=trainer.adapter is not None)},
        # A later stage starts from an earlier one's weights; without its record the first half would be lost.
        "previous": trainer.encoder.settings.get("training"),
    }
    if trainer.adapter is not None:
        weights = [value for value in trainer.encoder.backbone.parameters() if value.requires_grad]
        record["trained_parameters"] = sum(value.numel() for value in weights)
    if trainer.teacher is not None:
        teacher = trainer.teacher.encoder
        record["teacher"] = {"name": teacher.name, "fingerprint": teacher.fingerprint}
    return record


def hardware(device: torch.device, processes: int = 1) -> str:
    """What the run was on, in words."""
    times = f"{processes} x " if processes > 1 else ""
    if device.type == "cuda":
        return f"{times}{torch.cuda.get_device_name(device)} (GPU)"
    return f"{times}{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions(*, lora: bool = False) -> dict[str, str]:
    """Versions of what decides the numbers."""
    packages = ["torch", "transformers"]
    if lora:
        packages.append("peft")
    # What `accelerate launch` sets; `torchrun` does not.
    if any(name.startswith("ACCELERATE_") for name in os.environ):
        packages.append("accelerate")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def public_name(value: str) -> str:
    """A hub name as it is, a folder's own name without the folders around it."""
    path = Path(value).expanduser()
    if value.count("/") == 1 and not value.startswith((".", "/", "~")) and not path.exists():
        return value
    return path.resolve().name
