"""The trainer: same-step demonstrations, two InfoNCE terms, checkpoints that resume.

One step (EPIC, arXiv 2605.01372, section 3):

    q0 = f(queries, zero-shot)        d = f(positives and hard negatives)
    for each row: k ~ Uniform{0..K} other rows of its task in the batch; their (q0_j, d_j) fill its slots
    q1 = f(queries, slots)
    loss = InfoNCE(q1, d) + w * InfoNCE(q0, d)

Demonstration embeddings cost nothing: the batch has them already. Gradients flow through the slots unless
`detach_demonstrations` is set.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from epic_rag import __version__
from epic_rag.batching import token_batches
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import TrainingError
from epic_rag.prompt import EncoderInput, PromptBuilder, PromptTemplate, Strategy, collate
from epic_rag.training import _state
from epic_rag.training.config import TrainingConfig
from epic_rag.training.data import TrainingBatch, load_datasets, sample_batch
from epic_rag.training.heldout import evaluate_held_out
from epic_rag.training.loss import false_negatives, info_nce

__all__ = ["StepResult", "Trainer"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What one step reports.

    Attributes:
        loss: Weighted sum of both terms.
        with_demonstrations: InfoNCE(q1, d).
        zero_shot: InfoNCE(q0, d).
        pairs: Pairs in the step.
        tokens: Real tokens that went through the model, padding not counted.
    """

    loss: float
    with_demonstrations: float
    zero_shot: float
    pairs: int
    tokens: int


class Trainer:
    """Trains an encoder with EPIC.

    Args:
        config: The run.
        encoder: The backbone; None loads `config.model`.

    Raises:
        DataError: If a training file is missing or malformed.
        CheckpointError: If the backbone does not load.
    """

    def __init__(self, config: TrainingConfig, encoder: EpicEncoder | None = None) -> None:
        self.config = config
        # Files before the backbone: a misspelt name need not wait for a download.
        self.datasets, self.evaluation = load_datasets(config)
        self.encoder = encoder if encoder is not None else _load_backbone(config)
        inference = self.encoder.prompt
        self.inference_lengths = (
            config.inference_tokens or inference.max_query_tokens,
            config.inference_tokens or inference.max_document_tokens,
        )
        self.prompt = PromptBuilder(
            inference.tokenizer,
            PromptTemplate(separators=cast("Any", config.separators)),
            append_eos=inference.append_eos,
            max_query_tokens=config.max_query_tokens,
            max_document_tokens=config.max_document_tokens,
            max_positions=inference.max_positions,
            max_demonstration_tokens=config.max_document_tokens,
        )
        self.step = 0
        self.last_step = min(config.steps, config.stop_after or config.steps)
        self.pairs = 0
        self.tokens = 0
        self.seconds = 0.0
        self.folder = Path(config.output)
        self.optimizer = _optimizer(self.encoder, config)
        self.metrics: list[dict[str, Any]] = []

    def train(self, *, resume: bool = True, show_progress: bool = True) -> Path:
        """Run to the last step and write the result.

        Args:
            resume: Go on from the newest checkpoint in the run's folder, if there is one. Otherwise checkpoints and
                metrics of an earlier run in it are deleted.
            show_progress: Draw a progress bar with loss and pairs a second.

        Returns:
            The folder of the final checkpoint, weights in float16.

        Raises:
            TrainingError: If the loss is not finite, or a checkpoint is another run's.
        """
        if not (resume and _state.restore(self)):
            _state.clear(self)
        rows = sum(len(dataset.rows) for dataset in self.datasets)
        logger.info("step %d of %d, %d rows in %d tasks", self.step, self.last_step, rows, len(self.datasets))
        with tqdm(
            total=self.last_step, initial=self.step, desc="Training", unit="step", disable=not show_progress
        ) as bar:
            if self.step == 0 and self.config.evaluate_every:
                # What training is compared with: the backbone as it comes.
                self.evaluate()
            while self.step < self.last_step:
                started = time.perf_counter()
                result = self.train_step(sample_batch(self.datasets, self.config, self.step))
                elapsed = time.perf_counter() - started
                self.step += 1
                self.seconds += elapsed
                self.pairs += result.pairs
                self.tokens += result.tokens
                bar.update()
                bar.set_postfix(loss=f"{result.loss:.3f}", pairs_s=f"{result.pairs / elapsed:.1f}")
                self._log({"step": self.step, **result.__dict__, "seconds": round(elapsed, 3)})
                if not show_progress and self._due(max(1, self.last_step // 20)):
                    logger.info("step %d of %d: loss %.3f", self.step, self.last_step, result.loss)
                if self._due(self.config.evaluate_every):
                    self.evaluate()
                if self._due(self.config.save_every):
                    _state.save(self)
        return self.finish()

    def train_step(self, batch: TrainingBatch) -> StepResult:
        """One optimiser step.

        Raises:
            TrainingError: If the loss or a gradient is not finite; the weights are then those before the step.
        """
        # Dropout follows the step's number, so that a resumed run draws the same.
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)
        self.encoder.backbone.train()
        rate = _schedule(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.optimizer.zero_grad(set_to_none=True)
        loss, with_demonstrations, zero_shot, tokens = self.loss(batch)
        self._require_finite("loss", loss)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.encoder.backbone.parameters(), self.config.max_grad_norm)
        self._require_finite("gradient's norm", norm)
        self.optimizer.step()
        self.encoder.forget_fingerprint()
        return StepResult(float(loss.detach()), float(with_demonstrations), float(zero_shot), batch.pairs, tokens)

    def loss(self, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Loss of a batch.

        Returns:
            The loss; its term with demonstrations; its zero-shot term; real tokens used.
        """
        config = self.config
        queries, documents = _Rows(), _Rows()
        for task in batch.tasks:
            prefix = self.prompt.prefix(task.instruction)
            queries.extend(self.prompt.queries(prefix, [row.query for row in task.rows]))
            positives = [row.positive for row in task.rows]
            # Symmetric tasks encode both sides as queries.
            documents.extend(
                self.prompt.queries(prefix, positives) if task.symmetric else self.prompt.documents(positives)
            )
        negatives = [text for task in batch.tasks for row in task.rows for text in row.negatives]
        documents.extend(self.prompt.documents(negatives))
        q0 = self._embed(queries)  # (pairs, dim)
        d = self._embed(documents)  # (pairs + negatives, dim)
        mask = false_negatives(batch).to(q0.device)
        zero_shot = info_nce(q0, d, temperature=config.temperature, mask=mask)
        if config.strategy == "none":
            return zero_shot, torch.zeros(()), zero_shot.detach(), queries.tokens + documents.tokens
        prompted, slots = self._prompted(batch, q0, d)
        q1 = self._embed(prompted, slots)
        with_demonstrations = info_nce(q1, d, temperature=config.temperature, mask=mask)
        loss = with_demonstrations + config.zero_shot_weight * zero_shot
        tokens = queries.tokens + documents.tokens + prompted.tokens
        return loss, with_demonstrations.detach(), zero_shot.detach(), tokens

    def evaluate(self) -> dict[str, dict[str, float]]:
        """nDCG@10 on held-out rows, for every k of the configuration; logged.

        Returns:
            Task -> {"k=0": ..., "k=8": ...}.
        """
        backbone = self.encoder.backbone.eval()
        evaluated = EpicEncoder(backbone, self.prompt, settings=self.encoder.settings)
        scores = {
            dataset.name: evaluate_held_out(
                evaluated,
                dataset,
                self.config.evaluation_demonstrations,
                strategy=cast("Strategy", self.config.strategy),
            )
            for dataset in self.evaluation
        }
        self._log({"step": self.step, "evaluation": scores})
        told = (f"{name} " + ", ".join(f"{k} {value:.2f}" for k, value in row.items()) for name, row in scores.items())
        logger.info("nDCG@10 on held-out rows at step %d: %s", self.step, "; ".join(told))
        return scores

    def finish(self) -> Path:
        """Write the final checkpoint and its model card to `final/` and return the folder."""
        # Not at the top: `python -m epic_rag.training.model_card` would find itself imported already.
        from epic_rag.training.model_card import held_out_figures, write_model_card

        encoder = EpicEncoder(
            self.encoder.backbone.eval(),
            PromptBuilder(
                self.prompt.tokenizer,
                self.prompt.template,
                append_eos=self.prompt.append_eos,
                max_query_tokens=self.inference_lengths[0],
                max_document_tokens=self.inference_lengths[1],
                max_positions=self.prompt.max_positions,
            ),
            name=self.config.name,
            settings={
                "default_instruction": self.config.default_instruction,
                "max_demonstrations": self.config.max_demonstrations,
                "temperature": self.config.temperature,
                "description": self.config.description,
                "license": self.config.license,
                "base_model": self.config.base_model or _public_name(self.config.model),
                "training": self.record(),
            },
        )
        target = self.folder / "final"
        encoder.save_pretrained(target, dtype="float16")
        evaluations = [entry for entry in self.metrics if "evaluation" in entry]
        write_model_card(target, figures=held_out_figures(evaluations[-1]) if evaluations else "")
        return target

    def record(self) -> dict[str, Any]:
        """The training record: data with hashes, configuration, versions, hardware, hours, tokens."""
        config = self.config.to_dict()
        # Folders of the machine that trained are nobody's business and reproduce nothing.
        for key in ("model", "output", "data"):
            config[key] = _public_name(config[key])
        return {
            "config": config,
            "data": {
                item.name: {"rows": len(item.rows), "held_out": len(item.held_out), "sha256": item.sha256}
                for item in self.datasets
            },
            "steps": self.step,
            "pairs": self.pairs,
            "tokens": self.tokens,
            "hours": round(self.seconds / 3600, 3),
            "hardware": _state.hardware(self.encoder.device),
            "versions": {"epic-rag": __version__, **_state.versions()},
            # A later stage starts from an earlier one's weights; without its record the first half would be lost.
            "previous": self.encoder.settings.get("training"),
        }

    def _prompted(self, batch: TrainingBatch, q0: torch.Tensor, d: torch.Tensor) -> tuple[_Rows, list[torch.Tensor]]:
        """Rows with demonstrations, and each row's slot vectors (2k, dim)."""
        strategy = cast("Strategy", self.config.strategy)
        pairs = torch.stack([q0, d[: len(q0)]], dim=1)  # (pairs, 2, dim)
        pairs = pairs.detach() if self.config.detach_demonstrations else pairs
        rows, slots, offset = _Rows(), [], 0
        for task in batch.tasks:
            for row, chosen in zip(task.rows, task.demonstrations, strict=True):
                shown = [(task.rows[index].query, task.rows[index].positive) for index in chosen]
                prefix = self.prompt.prefix(
                    task.instruction, num_slots=len(chosen), demonstrations=shown, strategy=strategy
                )
                rows.extend(self.prompt.queries(prefix, [row.query]))
                indices = [offset + index for index in chosen] if strategy == "epic" else []
                slots.append(pairs[indices].flatten(0, 1))
            offset += len(task.rows)
        return rows, slots

    def _embed(self, rows: _Rows, slots: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """(rows, dim) in order, with gradients, in forward passes of like length."""
        backbone = self.encoder.backbone
        batches = token_batches([len(row.ids) for row in rows.items], max_tokens=self.config.micro_batch_tokens)
        parts = []
        with torch.autocast(backbone.device.type, dtype=torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            for batch in batches:
                padded = collate([rows.items[index] for index in batch], pad_id=self.prompt.pad_id).to(backbone.device)
                vectors = torch.cat([slots[index] for index in batch]) if slots is not None else None
                parts.append(backbone(padded, vectors))
        order = torch.tensor([index for batch in batches for index in batch], device=backbone.device)
        return torch.cat(parts)[order.argsort()]

    def _require_finite(self, what: str, value: torch.Tensor) -> None:
        if bool(torch.isfinite(value)):
            return
        good = _state.latest_checkpoint(self.folder)
        kept = f"{good} is good, but the same settings lead here again" if good else "there is no checkpoint yet"
        raise TrainingError(
            f"the {what} at step {self.step + 1} is {float(value.detach())}, and {kept}; lower learning_rate or raise "
            "temperature, and give the run another output folder or start afresh with `epic-rag train --no-resume`"
        )

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.last_step)

    def _log(self, entry: dict[str, Any]) -> None:
        self.metrics.append(entry)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _state.METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class _Rows:
    """Model inputs and how many real tokens they have."""

    def __init__(self) -> None:
        self.items: list[EncoderInput] = []

    def extend(self, rows: Sequence[EncoderInput]) -> None:
        self.items.extend(rows)

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.items)


def _public_name(value: str) -> str:
    """A hub name as it is, a folder's own name without the folders around it."""
    path = Path(value).expanduser()
    if value.count("/") == 1 and not value.startswith((".", "/", "~")) and not path.exists():
        return value
    return path.resolve().name


def _load_backbone(config: TrainingConfig) -> EpicEncoder:
    return EpicEncoder.from_pretrained(
        config.model,
        device=config.device,
        dtype="float32",
        num_layers=config.num_layers,
        gguf_file=config.gguf_file,
        projector=config.projector,
    )


def _optimizer(encoder: EpicEncoder, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW; the projector has its own rate, and norms and biases no decay."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, value in encoder.backbone.named_parameters():
        peak = config.projector_learning_rate if name.startswith("projector.") else config.learning_rate
        # The projector starts at a scaled identity: pulling it to zero would undo that.
        decay = config.weight_decay if value.ndim > 1 and not name.startswith("projector.") else 0.0
        groups.setdefault((peak, decay), []).append(value)
    return torch.optim.AdamW(
        [
            {"params": values, "lr": peak, "peak": peak, "weight_decay": decay}
            for (peak, decay), values in groups.items()
        ]
    )


def _schedule(step: int, config: TrainingConfig) -> float:
    """Linear warm-up to 1, linear decay to 0."""
    warmup = max(1, math.ceil(config.steps * config.warmup))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (config.steps - step) / max(1, config.steps - warmup))
