"""One arm of an ablation: trained within the budget, scored, and remembered in its folder.

    arms/NAME/arm.json      what it was trained and scored with, and what came of it
    arms/NAME/final/        its checkpoint

An arm that is done is not trained again as long as its settings and its data are the same. While it trains, the folder
holds one checkpoint to go on from; with the optimiser's state, three times the size of the model. It is deleted when
the arm is scored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag.evaluation.ablation_grid import Arm, Budget, GridEvaluation
from epic_rag.evaluation.ablation_scores import ArmScores, Part, score_arm, split_of_task
from epic_rag.evaluation.embedding import EmbeddingStore
from epic_rag.evaluation.heldout import HeldoutSplit
from epic_rag.training import Trainer, TrainingConfig, latest_checkpoint
from epic_rag.training.data import TrainingBatch, load_datasets
from epic_rag.training.sampling import sample_batch
from epic_rag.training.trainer import StepResult

__all__ = ["ArmRecord", "ArmRun", "Trained", "planned_steps"]

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_RECORD = "arm.json"
# Changes of these do not make another run: they are texts, places, or where memory goes.
_FREE = {
    *("name", "output", "device", "save_every", "keep_checkpoints", "description", "license", "base_model", "steps"),
    *("tensorboard", "grad_cache", "gradient_checkpointing"),
}
_PROBE_STEPS = 5


@dataclass(frozen=True)
class Trained:
    """What training an arm took.

    Attributes:
        steps: Optimiser steps.
        pairs: Pairs in them.
        tokens: Real tokens through the model, padding not counted.
        seconds: Wall time of the steps alone.
        loss: Of the last step.
        hardware: What it ran on.
    """

    steps: int
    pairs: int
    tokens: int
    seconds: float
    loss: float
    hardware: str


@dataclass
class ArmRecord:
    """What an arm's folder says of it.

    Attributes:
        training: Configuration, budget and hashes of the data.
        evaluation: What it was scored with.
        steps: What the budget is in steps, and the learning rate's schedule is made for.
        trained: None until it is trained.
        scores: None until it is scored.
        fingerprint: Of the checkpoint that was scored.
    """

    training: dict[str, Any]
    evaluation: dict[str, Any]
    steps: int | None = None
    trained: Trained | None = None
    scores: ArmScores | None = None
    fingerprint: str = ""


class ArmRun:
    """Trains and scores one arm, or finds that it is done.

    Args:
        arm: What to do.
        budget: How long.
        evaluation: How it is scored.
        heldout: The tests of files that no arm trains on.
    """

    def __init__(self, arm: Arm, budget: Budget, evaluation: GridEvaluation, heldout: Sequence[HeldoutSplit]) -> None:
        self.arm = arm
        self.budget = budget
        self.evaluation = evaluation
        self.heldout = heldout
        self.folder = Path(arm.config.output)
        self.record = ArmRecord(
            training={
                "config": json.loads(json.dumps(arm.config.to_dict())),
                "budget": asdict(budget),
                "data": _hashes(arm.config),
            },
            evaluation=json.loads(
                json.dumps(
                    {
                        **asdict(replace(evaluation, strategies={})),
                        "strategies": list(arm.strategies),
                        "heldout": [[split.name, split.revision, split.instruction] for split in heldout],
                    }
                )
            ),
        )
        self.changed: str | None = None
        self._restore()

    @property
    def final(self) -> Path:
        """The trained checkpoint."""
        return self.folder / "final"

    @property
    def state(self) -> str:
        """How far it is: "new", "interrupted", "trained" or "scored"."""
        if self.record.scores is not None:
            return "scored"
        if self.record.trained is not None:
            return "trained"
        return "new" if latest_checkpoint(self.folder) is None else "interrupted"

    def train(self, *, show_progress: bool = False) -> None:
        """Train within the budget; go on where an earlier run of the same arm was stopped.

        Raises:
            EpicError: Whatever the trainer raises.
        """
        resume = self.changed is None
        if self.record.steps is None:
            self.record.steps = planned_steps(self.arm.config, self.budget)
            self._write()
        config = replace(self.arm.config, steps=self.record.steps)
        minutes = self.budget.amount if self.budget.unit == "minutes" else math.inf
        trainer = _TimedTrainer(config, minutes)
        trainer.train(resume=resume, show_progress=show_progress)
        losses = [entry["loss"] for entry in trainer.metrics if "loss" in entry]
        self.record.trained = Trained(
            steps=trainer.step,
            pairs=trainer.pairs,
            tokens=trainer.tokens,
            seconds=round(trainer.seconds, 1),
            loss=losses[-1],
            hardware=trainer.record()["hardware"],
        )
        self._write()

    def score(self) -> None:
        """Score the final checkpoint, and delete what only going on with the training would need.

        Raises:
            EpicError: The checkpoint does not load, or its data cannot be read.
        """
        config = self.arm.config
        encoder = EpicEncoder.from_pretrained(self.final, device=config.device)
        # Every arm is shown the same numbers of demonstrations: that it was trained with fewer is no news here.
        encoder.settings.pop("max_demonstrations", None)
        splits: dict[Part, Sequence[HeldoutSplit]] = {"trained": self._trained_splits(), "heldout": self.heldout}
        store = EmbeddingStore(encoder, precision=str(encoder.dtype).removeprefix("torch."))
        self.record.scores = score_arm(store, splits, self.evaluation, self.arm.strategies)
        self.record.fingerprint = encoder.fingerprint
        self._write()
        while (checkpoint := latest_checkpoint(self.folder)) is not None:
            shutil.rmtree(checkpoint)

    def _trained_splits(self) -> list[HeldoutSplit]:
        _, datasets = load_datasets(self.arm.config)
        found = [
            split_of_task(dataset, queries=self.evaluation.queries, documents=self.evaluation.documents)
            for dataset in datasets
        ]
        return [split for split in found if split is not None]

    def _restore(self) -> None:
        """Take over what the folder has, as far as it was made with the same settings."""
        try:
            stored = json.loads((self.folder / _RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"arm {self.arm.name}: {self.folder / _RECORD} cannot be read ({error}); delete it"
            ) from error
        self.changed = _difference(stored["training"], self.record.training)
        if stored.get("format_version") != _FORMAT_VERSION or self.changed is not None:
            self.changed = self.changed or "the format of its record"
            return
        self.record.steps = stored["steps"]
        if stored["trained"] is not None and (self.final / "epic.json").is_file():
            self.record.trained = Trained(**stored["trained"])
            if stored["scores"] is not None and stored["evaluation"] == self.record.evaluation:
                self.record.scores = ArmScores.from_json(stored["scores"])
                self.record.fingerprint = stored["fingerprint"]

    def _write(self) -> None:
        record = self.record
        values = {
            "format_version": _FORMAT_VERSION,
            "training": record.training,
            "evaluation": record.evaluation,
            "steps": record.steps,
            "trained": None if record.trained is None else asdict(record.trained),
            "fingerprint": record.fingerprint,
            "scores": None if record.scores is None else record.scores.to_json(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{_RECORD}.tmp"
        draft.write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(draft, self.folder / _RECORD)


class _TimedTrainer(Trainer):
    """A trainer that stops when its minutes are used up."""

    def __init__(self, config: TrainingConfig, minutes: float) -> None:
        super().__init__(config)
        self._limit = 60 * minutes

    def train_step(self, batch: TrainingBatch) -> StepResult:
        """One optimiser step; the last one if the time is over with it."""
        started = time.perf_counter()
        result = super().train_step(batch)
        if self.seconds + time.perf_counter() - started >= self._limit:
            self.last_step = self.step + 1
        return result


def planned_steps(config: TrainingConfig, budget: Budget) -> int:
    """How many steps a budget is, which the learning rate's schedule has to know before the first one.

    Tokens are counted in the batches that the run will have: the last step is the one with which they reach the
    budget. For minutes, a few steps are timed on a trainer that is thrown away.
    """
    if budget.unit == "steps":
        return int(budget.amount)
    trainer = Trainer(config)
    tokens = 0
    seconds: list[float] = []
    while tokens < budget.amount if budget.unit == "tokens" else len(seconds) < _PROBE_STEPS:
        batch = sample_batch(trainer.datasets, config, trainer.step)
        if budget.unit == "tokens":
            tokens += trainer.prepare(batch)[1].tokens
        else:
            started = time.perf_counter()
            trainer.train_step(batch)
            seconds.append(time.perf_counter() - started)
        trainer.step += 1
    if budget.unit == "tokens":
        return trainer.step
    # The first step warms up: it allocates, and compiles on some devices.
    return max(1, math.ceil(60 * budget.amount / statistics.median(seconds[1:])))


def _hashes(config: TrainingConfig) -> dict[str, str]:
    """SHA-256 of every training file; a file that is missing is the trainer's to complain about."""
    found = {}
    for name in config.tasks:
        for ending in (".jsonl.gz", ".jsonl"):
            file = Path(config.data) / f"{name}{ending}"
            if file.is_file():
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
                break
    return found


def _difference(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """What makes two runs different ones: "max_demonstrations 8 -> 16"; None if nothing does."""
    theirs = dict(stored["config"])
    # A setting that the record's release did not know had what is now its default.
    for item in fields(TrainingConfig):
        if item.name not in theirs and item.name not in ("model", "output", "data", "tasks"):
            theirs[item.name] = ours["config"][item.name] if item.name in _FREE else _default(item.name)
    for name, value in ours["config"].items():
        if name not in _FREE and theirs.get(name) != value:
            return f"{name} {theirs.get(name)!r} -> {value!r}"
    for name in ("budget", "data"):
        if stored[name] != ours[name]:
            return f"{name} {stored[name]!r} -> {ours[name]!r}" if name == "budget" else "a training file"
    return None


def _default(name: str) -> Any:
    [item] = [item for item in fields(TrainingConfig) if item.name == name]
    return json.loads(json.dumps(item.default))
