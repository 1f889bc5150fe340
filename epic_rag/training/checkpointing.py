"""Checkpoints of a run, to resume from, and the training record of its result.

A checkpoint is a folder `checkpoint-<step>` with the trained weights, the optimizer's moments and the loss scale in
safetensors and JSON. It is written to a temporary folder and renamed, so a process that dies while it writes leaves the
one before. Batches, demonstrations and dropout are functions of the step's number and need no state. With LoRA only
the trained weights are kept.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from epic_rag import __version__
from epic_rag.errors import TrainingError, reason_of
from epic_rag.files import save_tensors, write_atomically
from epic_rag.training.config import TaskConfig, TrainingConfig, current_names
from epic_rag.training.data import PairDataset
from epic_rag.training.optimizer import WeightAverage

__all__ = [
    "METRICS_FILE",
    "clear",
    "latest_checkpoint",
    "public_name",
    "read_metrics",
    "require_same_run",
    "restore",
    "run_facts",
    "save",
    "trained_state",
    "training_record",
    "write_metrics",
]

METRICS_FILE = "metrics.jsonl"
_PREFIX = "checkpoint-"
# Settings that may change between two stretches of a run: they change no step.
_FREE = {
    "output",
    "device",
    "save_every",
    "keep_checkpoints",
    "tensorboard",
    "grad_cache",
    "gradient_checkpointing",
    "description",
    "license",
    "base_model",
    "name",
    "stop_at_step",
    "interpolate_with_start",
    "interpolation_model",
}


def run_facts(config: TrainingConfig, datasets: Sequence[PairDataset]) -> dict[str, Any]:
    """Return the facts that identify a run: its configuration and the hashes of its files."""
    return {"config": config.to_dict(), "data": {item.name: item.sha256 for item in datasets}}


def save(
    folder: Path,
    facts: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None = None,
    *,
    keep: int,
) -> Path:
    """Write `checkpoint-<step>` and delete all but the newest few.

    Args:
        folder: Folder of the run.
        facts: Counters (`step` among them) and `run_facts`, for `trainer.json`.
        model: Its trained weights are saved.
        optimizer: Its moments are saved.
        scaler: The loss scale.
        average: The moving average of the weights.
        keep: Number of checkpoints to keep.
    """
    final = folder / f"{_PREFIX}{facts['step']}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    names = {id(value): name for name, value in model.named_parameters()}
    tensors = {f"model.{key}": value for key, value in trained_state(model).items()}
    if average is not None:
        tensors.update({f"average.{key}": value for key, value in average.values.items()})
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer.{names[id(parameter)]}.{key}"] = torch.as_tensor(value)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    save_tensors(tensors, temporary / "state.safetensors")
    text = json.dumps({**facts, "scaler": scaler.state_dict()}, indent=1)
    (temporary / "trainer.json").write_text(text, encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def restore(
    checkpoint: Path,
    facts: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None = None,
) -> dict[str, Any]:
    """Load a checkpoint into a model, an optimizer and a loss scaler.

    Args:
        checkpoint: Folder of the checkpoint.
        facts: `run_facts` of this run.
        model: As it was built for the run.
        optimizer: Over the same parameters.
        scaler: The loss scaler.
        average: The moving average of the weights.

    Returns:
        The facts that were saved with it.

    Raises:
        TrainingError: If it does not load, or belongs to a run with other settings.
    """
    try:
        saved: dict[str, Any] = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
        require_same_run(checkpoint, saved, facts)
        tensors = load_file(checkpoint / "state.safetensors")
        weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
        expected = trained_state(model).keys()
        if weights.keys() != expected:
            raise KeyError(f"{min(weights.keys() ^ expected)} is in only one of checkpoint and model")
        # With LoRA the frozen weights are not in the checkpoint.
        model.load_state_dict(weights, strict=False)
        scaler.load_state_dict(saved.get("scaler") or {})
        if average is not None:
            average.steps = saved["step"]
            for name, value in average.values.items():
                value.copy_(tensors[f"average.{name}"])
        saved["step"], saved["tokens"], saved["seconds"]
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"{checkpoint} does not load ({reason_of(error)}). Delete the folder and run the same command again: it "
            "resumes from the checkpoint before."
        ) from error
    names = {id(value): name for name, value in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"optimizer.{names[id(parameter)]}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                # AdamW keeps its moments on the weights' device, and its step counter there only if it is fused.
                device = parameter.device if group.get("fused") else torch.device("cpu")
                optimizer.state[parameter] = {
                    key: value.to(device if key == "step" else parameter.device) for key, value in state.items()
                }
    return saved


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights and buffers of a model, or only the trained weights if some are frozen (LoRA)."""
    state: dict[str, torch.Tensor] = model.state_dict()
    parameters = dict(model.named_parameters())
    trained = {name for name, value in parameters.items() if value.requires_grad}
    return state if len(trained) == len(parameters) else {name: state[name] for name in state if name in trained}


def require_same_run(checkpoint: Path, saved: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to this run.

    Args:
        checkpoint: Folder of the checkpoint, for the message.
        saved: The checkpoint's facts.
        facts: `run_facts` of this run.

    Raises:
        TrainingError: If a setting or a file differs.
    """
    ours: dict[str, Any] = json.loads(json.dumps(facts["config"]))
    # A setting that the checkpoint's release did not know had its present default.
    theirs = {**_defaults(TrainingConfig), **current_names(saved["config"], origin=str(checkpoint))}
    theirs["tasks"] = {name: {**_defaults(TaskConfig), **entry} for name, entry in theirs["tasks"].items()}
    remedy = "Give the run another output folder, or start it again with `epic-rag train --no-resume`."
    for key in sorted(ours):
        if key not in _FREE and ours[key] != theirs.get(key):
            raise TrainingError(
                f"{checkpoint} was trained with {key} {theirs.get(key)!r}, and this run has {ours[key]!r}. {remedy}"
            )
    for name, digest in facts["data"].items():
        before = saved.get("data", {}).get(name, digest)
        if before != digest:
            raise TrainingError(
                f"{checkpoint} was trained on a file {name} with SHA-256 {before[:12]}..., and this run's has "
                f"{digest[:12]}.... {remedy}"
            )


def _defaults(config: type[TrainingConfig] | type[TaskConfig]) -> dict[str, Any]:
    known = {item.name: item.default for item in fields(config) if item.default is not MISSING}
    defaults: dict[str, Any] = json.loads(json.dumps(known))
    return defaults


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in a run's folder; None if there is none."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    found = [item for item in folder.glob(f"{_PREFIX}*") if (item / "trainer.json").is_file()]
    found = [item for item in found if item.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=lambda item: int(item.name.removeprefix(_PREFIX)))


def clear(folder: Path) -> None:
    """Delete checkpoints, metrics and TensorBoard events of an earlier run.

    The new run's first checkpoints would otherwise be the oldest of the folder, and be deleted for it.
    """
    for item in (*_checkpoints(folder), *folder.glob(f".{_PREFIX}*.tmp")):
        shutil.rmtree(item)
    for events in folder.glob("tensorboard/events.out.tfevents.*"):
        events.unlink()
    (folder / METRICS_FILE).unlink(missing_ok=True)


def read_metrics(file: Path, until: int) -> list[dict[str, Any]]:
    """Read the metrics up to a step; later entries, and a line cut off by a crash, are left out."""
    if not file.is_file():
        return []
    kept: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= until:
            kept.append(entry)
    return kept


def write_metrics(file: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Replace a metrics file."""
    write_atomically(file, "".join(json.dumps(entry) + "\n" for entry in entries))


def training_record(
    config: TrainingConfig,
    datasets: Sequence[PairDataset],
    counts: Mapping[str, float],
    *,
    device: torch.device,
    processes: int,
    previous: Mapping[str, Any] | None,
    teacher: Mapping[str, str] | None = None,
    trained_parameters: int | None = None,
) -> dict[str, Any]:
    """Return the training record that a checkpoint's `epic.json` holds.

    Args:
        config: The run.
        datasets: Its training files.
        counts: `step`, `pairs`, `tokens` and `seconds`.
        device: Device of the run.
        processes: Number of processes.
        previous: Record of the start, an earlier stage.
        teacher: Name and fingerprint.
        trained_parameters: With LoRA, the number of trained parameters.
    """
    values = config.to_dict()
    # Folders of the machine reproduce nothing, and may be private.
    for key in ("model", "output", "data", "teacher", "interpolation_model"):
        values[key] = None if values[key] is None else public_name(values[key])
    times = f"{processes} x " if processes > 1 else ""
    if device.type == "cuda":
        hardware = f"{times}{torch.cuda.get_device_name(device)} (GPU)"
    else:
        hardware = f"{times}{platform.machine()} CPU, {torch.get_num_threads()} threads"
    packages = ["torch", "transformers", *(["peft"] if config.lora_rank is not None else [])]
    versions = {name: metadata.version(name) for name in packages}
    record: dict[str, Any] = {
        "config": values,
        "data": {
            item.name: {"rows": len(item.rows), "held_out": len(item.held_out), "sha256": item.sha256}
            for item in datasets
        },
        "steps": counts["step"],
        "pairs": counts["pairs"],
        "tokens": counts["tokens"],
        "hours": round(counts["seconds"] / 3600, 3),
        "hardware": hardware,
        "processes": processes,
        "versions": {"epic-rag": __version__, "python": platform.python_version(), **versions},
        "previous": previous,
    }
    if trained_parameters is not None:
        record["trained_parameters"] = trained_parameters
    if teacher is not None:
        record["teacher"] = dict(teacher)
    return record


def public_name(value: str) -> str:
    """Return a hub name unchanged, and a folder's name without the folders around it."""
    path = Path(value).expanduser()
    if value.count("/") == 1 and not value.startswith((".", "/", "~")) and not path.exists():
        return value
    return path.resolve().name
