"""The result of a run: a checkpoint folder with its model card."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import MISSING, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from epic_rag import __version__
from epic_rag.checkpoints import EncoderConfig
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import TrainingError, reason_of
from epic_rag.prompt import PromptBuilder
from epic_rag.query_prompt import QueryStrategy
from epic_rag.training.config import TaskConfig, TrainingConfig

if TYPE_CHECKING:
    from epic_rag.training.trainer import Trainer

__all__ = [
    "clear",
    "hardware",
    "latest_checkpoint",
    "public_name",
    "restore",
    "save",
    "training_record",
    "versions",
    "write_final",
]


# --- from _record
# The training record: what made a checkpoint, in its `epic.json`.


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
        "previous": trainer.encoder.config.training,
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


# --- from _state
# Checkpoints of a run: everything that going on needs, in safetensors and JSON.
#
# A checkpoint is written to a temporary folder and renamed, so that a process that dies while it writes leaves the one
# before. Batches, demonstrations and dropout are functions of the step's number (see `data.sample_batch`), so the state
# is the weights, the optimiser's moments, the loss scale and the step. With LoRA only what is trained is kept: the rest
# is the base model's.

METRICS_FILE = "metrics.jsonl"
_PREFIX = "checkpoint-"
# What may change between two stretches of one run without making it another run.
_FREE = {
    "output",
    "device",
    "save_every",
    "keep_checkpoints",
    "tensorboard",
    # Where memory goes; the sums are the same.
    "grad_cache",
    "gradient_checkpointing",
    "description",
    "license",
    "base_model",
    "name",
    "stop_after",
}


def save(trainer: Trainer) -> Path:
    """Write `checkpoint-<step>` and delete all but the newest few."""
    final = trainer.folder / f"{_PREFIX}{trainer.step}"
    temporary = trainer.folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    names = _parameter_names(trainer)
    tensors = {f"model.{key}": value.detach().cpu() for key, value in _trained_state(trainer).items()}
    for parameter, state in trainer.optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer.{names[id(parameter)]}.{key}"] = torch.as_tensor(value).detach().cpu()
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, temporary / "state.safetensors")
    facts = {
        "step": trainer.step,
        "tokens": trainer.tokens,
        "pairs": trainer.pairs,
        "seconds": trainer.seconds,
        "data": _hashes(trainer),
        "config": trainer.config.to_dict(),
        "scaler": trainer.scaler.state_dict(),
    }
    (temporary / "trainer.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in _checkpoints(trainer.folder)[: -trainer.config.keep_checkpoints]:
        shutil.rmtree(old)
    return final


def restore(trainer: Trainer) -> bool:
    """Go on from the newest checkpoint.

    Returns:
        Whether there was one.

    Raises:
        TrainingError: If it belongs to a run with other settings.
    """
    # Rank 0 says which: another process may look when it has just been written, or deleted.
    newest = trainer.world.told(latest_checkpoint(trainer.folder))
    if newest is None:
        return False
    try:
        facts = json.loads((newest / "trainer.json").read_text(encoding="utf-8"))
        _refuse_other_run(trainer, newest, facts)
        tensors = load_file(newest / "state.safetensors")
        weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
        expected = _trained_state(trainer).keys()
        if weights.keys() != expected:
            raise KeyError(f"{min(weights.keys() ^ expected)} is in only one of checkpoint and model")
        # What is frozen is not in the checkpoint.
        trainer.encoder.backbone.load_state_dict(weights, strict=False)
        trainer.scaler.load_state_dict(facts.get("scaler") or {})
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = reason_of(error)
        raise TrainingError(
            f"{newest} does not load ({reason}); delete the folder and run the same command, which goes on from the "
            "checkpoint before it"
        ) from error
    names = _parameter_names(trainer)
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"optimizer.{names[id(parameter)]}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                # AdamW keeps its moments beside the weights, and its step counter there too only if it is fused.
                beside = parameter.device if group.get("fused") else torch.device("cpu")
                trainer.optimizer.state[parameter] = {
                    key: value.to(beside if key == "step" else parameter.device) for key, value in state.items()
                }
    trainer.step = int(facts["step"])
    trainer.tokens = int(facts["tokens"])
    # A checkpoint without a count is older than the count.
    trainer.pairs = int(facts.get("pairs", trainer.step * trainer.config.batch_size))
    trainer.seconds = float(facts["seconds"])
    trainer.metrics = _metrics_until(trainer.folder / METRICS_FILE, trainer.step, rewrite=trainer.world.is_main)
    trainer.encoder.invalidate_caches()
    return True


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder; None if there is none."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def clear(trainer: Trainer) -> None:
    """Delete checkpoints and metrics of an earlier run in the trainer's folder.

    The new run's first checkpoints would otherwise be the oldest ones of the folder, and be deleted for it.
    """
    for item in (*_checkpoints(trainer.folder), *trainer.folder.glob(f".{_PREFIX}*.tmp")):
        shutil.rmtree(item)
    for events in trainer.folder.glob("tensorboard/events.out.tfevents.*"):
        events.unlink()
    if (trainer.folder / METRICS_FILE).is_file():
        _write_metrics(trainer.folder / METRICS_FILE, trainer.metrics)


def _parameter_names(trainer: Trainer) -> dict[int, str]:
    return {id(value): name for name, value in trainer.encoder.backbone.named_parameters()}


def _trained_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and buffers of the model; with LoRA the weights that are trained alone."""
    backbone = trainer.encoder.backbone
    state: dict[str, torch.Tensor] = backbone.state_dict()
    if trainer.adapter is None:
        return state
    trained = {name for name, value in backbone.named_parameters() if value.requires_grad}
    return {name: value for name, value in state.items() if name in trained}


def _checkpoints(folder: Path) -> list[Path]:
    found = [item for item in folder.glob(f"{_PREFIX}*") if (item / "trainer.json").is_file()]
    found = [item for item in found if item.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=lambda item: int(item.name.removeprefix(_PREFIX)))


def _hashes(trainer: Trainer) -> dict[str, str]:
    return {item.name: item.sha256 for item in trainer.datasets}


def _refuse_other_run(trainer: Trainer, checkpoint: Path, facts: dict[str, Any]) -> None:
    ours: dict[str, Any] = json.loads(json.dumps(trainer.config.to_dict()))
    # A setting that the checkpoint's release did not know had what is now its default.
    theirs = {**_defaults(TrainingConfig), **facts["config"]}
    theirs["tasks"] = {name: {**_defaults(TaskConfig), **entry} for name, entry in theirs["tasks"].items()}
    remedy = "give the run another output folder, or start afresh with `epic-rag train --no-resume`"
    for key in sorted(ours):
        if key not in _FREE and ours[key] != theirs.get(key):
            raise TrainingError(
                f"{checkpoint} was trained with {key} {theirs.get(key)!r}, this run has {ours[key]!r}; {remedy}"
            )
    for name, digest in _hashes(trainer).items():
        before = facts.get("data", {}).get(name, digest)
        if before != digest:
            raise TrainingError(
                f"{checkpoint} was trained on a file {name} with SHA-256 {before[:12]}..., this run's has "
                f"{digest[:12]}...; {remedy}"
            )


def _defaults(config: type[TrainingConfig] | type[TaskConfig]) -> dict[str, Any]:
    known = {item.name: item.default for item in fields(config) if item.default is not MISSING}
    defaults: dict[str, Any] = json.loads(json.dumps(known))
    return defaults


def _metrics_until(file: Path, step: int, *, rewrite: bool) -> list[dict[str, Any]]:
    """Entries up to a step; later ones, and a line that was being written when the process died, leave the file."""
    kept: list[dict[str, Any]] = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["step"] <= step:
                kept.append(entry)
        if rewrite:
            _write_metrics(file, kept)
    return kept


def _write_metrics(file: Path, entries: list[dict[str, Any]]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    os.replace(temporary, file)


def write_final(trainer: Trainer, target: Path) -> None:
    """Write the checkpoint, float16; with LoRA merged, and the adapters beside it for PEFT.

    Args:
        trainer: At its last step, or wherever it stopped.
        target: The folder; made if it is missing.
    """
    # Not at the top: `python -m epic_rag.training.model_card` would find itself imported already.
    from epic_rag.training.model_card import held_out_figures, write_model_card

    config, prompt = trainer.config, trainer.prompt
    base = config.base_model or public_name(config.model)
    adapter = trainer.adapter
    strategy = config.query_strategy or trainer.encoder.config.strategy
    encoder = EpicEncoder(
        trainer.encoder.backbone.eval() if adapter is None else adapter.merged(),
        PromptBuilder(
            prompt.tokenizer,
            prompt.template,
            append_eos=prompt.append_eos,
            max_query_tokens=trainer.inference_lengths[0],
            max_document_tokens=trainer.inference_lengths[1],
            max_positions=prompt.max_positions,
        ),
        name=config.name,
        config=EncoderConfig(
            default_instruction=config.default_instruction,
            max_demonstrations=config.max_demonstrations,
            strategy=cast("QueryStrategy | None", strategy),
            temperature=config.temperature,
            # Widths that vectors may be truncated to; no other was trained for.
            matryoshka_dims=sorted(set(config.matryoshka_dims)) or None,
            description=config.description,
            license=config.license,
            base_model=base,
            training=trainer.record(),
        ),
    )
    encoder.save_pretrained(target, dtype="float16")
    if adapter is not None:
        adapter.save(target / "adapter", base)
    evaluations = [entry for entry in trainer.metrics if "evaluation" in entry]
    write_model_card(target, figures=held_out_figures(evaluations[-1]) if evaluations else "")
