"""The trainer: same-step demonstrations, two InfoNCE terms, checkpoints that resume.

One step (EPIC, arXiv 2605.01372, section 3):

    q0 = f(queries, zero-shot)        d = f(positives and hard negatives)
    for each row: k ~ Uniform{0..K} other rows of its task in the batch; their (q0_j, d_j) fill its slots
    q1 = f(queries, slots)
    loss = InfoNCE(q1, d) + w * InfoNCE(q0, d)

Demonstration embeddings cost nothing: the batch has them already. Gradients flow through the slots unless
`detach_demonstrations` is set. The parts are in modules of their own:

    data, bank          the pairs of a step and what they are shown
    _inputs             pairs -> token ids, slots, masks
    _forward            token ids -> vectors
    objective, loss     vectors -> loss
    gradcache           the way back when memory or one process is not enough
    distributed         several processes
    adapters            LoRA
    optimizer, _state   steps, and what going on needs
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from epic_rag.backbone import Backbone, ProjectorKind
from epic_rag.batching import parse_devices
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError, MissingExtraError, TrainingError
from epic_rag.prompt import PromptBuilder, PromptTemplate, Strategy
from epic_rag.training import checkpointing as _state
from epic_rag.training.checkpointing import training_record, write_final
from epic_rag.training.config import TrainingConfig
from epic_rag.training.data import TrainingBatch, drawn_demonstrations, load_datasets, take_banks
from epic_rag.training.distillation import Teacher, fit_head, match_covariance, new_head, require_width
from epic_rag.training.distributed import join
from epic_rag.training.gradcache import cached_backward
from epic_rag.training.inputs import Forward, SlotTable, StepInputs, build_inputs, draw_negatives
from epic_rag.training.lora import Adapter, require_peft
from epic_rag.training.losses import Objective, Terms, require_negatives
from epic_rag.training.optimizer import (
    DTYPES,
    build_optimizer,
    build_scaler,
    settle_dtype,
    use_tensor_cores,
    warmup_and_decay,
)
from epic_rag.training.sampling import sample_batch
from epic_rag.training.validation import evaluate_held_out

__all__ = ["Board", "StepResult", "Trainer", "checkpoint_activations", "load_backbone", "require_tensorboard"]


# --- from _board
# Metrics for TensorBoard.


def require_tensorboard() -> None:
    """Raise unless TensorBoard is installed.

    Raises:
        MissingExtraError: It is not.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "train", "the setting tensorboard")


class Board:
    """Writes what `metrics.jsonl` has.

    Args:
        folder: For TensorBoard's files; made if it is missing.
        step: The step that the run goes on from; what an earlier stretch wrote after it is not shown.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add a line of `metrics.jsonl`: numbers of a step under `training/`, of an evaluation under `ndcg@10/`."""
        step = int(entry["step"])
        for task, scores in entry.get("evaluation", {}).items():
            for k, value in scores.items():
                self._scalar(f"ndcg@10/{task}/{k}", value, step)
        for name, value in entry.items():
            if name not in ("step", "evaluation"):
                self._scalar(f"training/{name}", value, step)

    def close(self) -> None:
        """Write what is not on disk yet."""
        self._writer.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)


# --- from _model
# The backbone of a run, ready to be trained.


def load_backbone(config: TrainingConfig, device: str | None) -> EpicEncoder:
    """Load `config.model`.

    What is trained is float32; weights that LoRA freezes are in the dtype that is computed in.

    Args:
        config: The run.
        device: This process's device; None for the best there is.

    Raises:
        CheckpointError: If it does not load.
    """
    encoder = EpicEncoder.from_pretrained(
        config.model,
        device=device,
        dtype="float32" if config.lora_rank is None else config.dtype,
        num_layers=config.num_layers,
        gguf_file=config.gguf_file,
        pooling=config.pooling,
        projector=None if config.new_projector else config.projector,
    )
    if config.attention is not None:
        cast("Any", encoder.backbone.transformer).set_attn_implementation(config.attention)
    if config.output_dimension is not None:
        new_head(encoder.backbone, config.output_dimension)
        encoder.invalidate_caches()
    if config.new_projector:
        encoder.backbone.reset_projector(cast("ProjectorKind", config.projector))
        encoder.invalidate_caches()
    return encoder


def checkpoint_activations(backbone: Backbone) -> None:
    """Keep each layer's input alone for the backward pass, which computes the rest again.

    Raises:
        ConfigError: If the model's code cannot.
    """
    transformer = backbone.transformer
    if not transformer.supports_gradient_checkpointing:
        raise ConfigError(
            f"gradient_checkpointing is true and {type(transformer).__name__} does not support it; "
            "set it to false, and grad_cache to true for less memory"
        )
    # The other implementation wants an input with gradients, which token embeddings behind frozen weights have not.
    model: Any = transformer
    # transformers 5 has given the method another name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


logger = logging.getLogger(__name__)

# float16 gradients that overflow at a loss scale below this are infinite at any.
_SMALLEST_SCALE = 1.0


@dataclass(frozen=True)
class StepResult:
    """What one step reports.

    Attributes:
        loss: Weighted sum of the terms.
        with_demonstrations: InfoNCE(q1, d).
        zero_shot: InfoNCE(q0, d).
        pairs: Pairs in the step.
        tokens: Real tokens that went through the model, padding not counted.
        gradient_norm: Of all weights, before it is clipped; None if it overflowed.
        teacher: Distillation term; None without a teacher.
        mismatched: Consistency term; None if no row had wrong demonstrations.
        loss_scale: That of float16; None for other dtypes.
    """

    loss: float
    with_demonstrations: float
    zero_shot: float
    pairs: int
    tokens: int
    gradient_norm: float | None = None
    teacher: float | None = None
    mismatched: float | None = None
    loss_scale: float | None = None


class Trainer:
    """Trains an encoder with EPIC.

    Args:
        config: The run.
        encoder: The backbone; None loads `config.model`. With LoRA its weights are frozen in place.

    Raises:
        DataError: If a training file is missing or malformed.
        CheckpointError: If the backbone or the teacher does not load.
        ConfigError: If a setting does not fit the model.
        MissingExtraError: If a setting needs a package that is not installed.
    """

    def __init__(self, config: TrainingConfig, encoder: EpicEncoder | None = None) -> None:
        if config.lora_rank is not None:
            require_peft()
        if config.tensorboard:
            require_tensorboard()
        # Files before the backbone: a misspelt name need not wait for a download.
        self.datasets, self.evaluation = load_datasets(config)
        require_negatives(self.datasets, config)
        self.banks = take_banks(self.datasets, config) if config.demonstration_source == "bank" else None
        self.world, device = join(config.device)
        config = settle_dtype(config, parse_devices(device)[0] if encoder is None else encoder.device)
        self.config = config
        self.encoder = encoder if encoder is not None else load_backbone(config, device)
        backbone = self.encoder.backbone
        use_tensor_cores(backbone.device)
        self.adapter = Adapter(backbone, config) if config.lora_rank is not None else None
        if config.gradient_checkpointing:
            checkpoint_activations(backbone)
        self.teacher = Teacher(config, backbone.device) if config.teacher is not None else None
        require_width(self)
        inference = self.encoder.prompt
        self.inference_lengths = (
            config.inference_tokens or inference.max_query_tokens,
            config.inference_tokens or inference.max_document_tokens,
        )
        self.prompt = PromptBuilder(
            inference.tokenizer,
            PromptTemplate(
                separators=cast("Any", config.separators),
                demonstration_instructions=cast("Any", config.demonstration_instructions),
            ),
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
        self.forward = Forward(
            backbone, pad_id=self.prompt.pad_id, max_tokens=config.micro_batch_tokens, dtype=DTYPES[config.dtype]
        )
        self.objective = Objective(config, backbone.dimension)
        self.optimizer = build_optimizer(backbone, config)
        self.scaler = build_scaler(config, backbone.device)
        self._same_start()
        self.metrics: list[dict[str, Any]] = []
        self._board: Board | None = None

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
            if self.world.is_main:
                _state.clear(self)
            fit_head(self)
            self._same_start()
        self.world.wait()
        show_progress = show_progress and self.world.is_main
        rows = sum(len(dataset.rows) for dataset in self.datasets)
        self._tell("step %d of %d, %d rows in %d tasks", self.step, self.last_step, rows, len(self.datasets))
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
                told = {name: value for name, value in asdict(result).items() if value is not None}
                self._log({"step": self.step, **told, "seconds": round(elapsed, 3)})
                if not show_progress and self._due(max(1, self.last_step // 20)):
                    self._tell("step %d of %d: loss %.3f", self.step, self.last_step, result.loss)
                if self._due(self.config.evaluate_every):
                    self.evaluate()
                if self._due(self.config.save_every) and self.world.is_main:
                    _state.save(self)
        if self.config.teacher_covariance:
            match_covariance(self)
            self._same_start()
            if self.config.evaluate_every:
                self.evaluate()
        return self.finish()

    def train_step(self, batch: TrainingBatch) -> StepResult:
        """One optimiser step.

        With several processes all of them call it with the same batch.

        Raises:
            TrainingError: If the loss or a gradient is not finite; the weights are then those before the step.
        """
        # Dropout follows the step's number, so that a resumed run draws the same; each process draws its own.
        torch.manual_seed(self.config.seed * 1_000_003 + self.step + self.world.rank * 1_000_000_007)
        backbone = self.encoder.backbone.train()
        rate = warmup_and_decay(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.optimizer.zero_grad(set_to_none=True)
        inputs, terms = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        trained = [value for value in backbone.parameters() if value.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm)
        # One transfer from the GPU a step.
        names = ["loss", "with_demonstrations", "zero_shot", "teacher", "mismatched"]
        told = {name: value for name in names if (value := getattr(terms, name)) is not None}
        *values, size = torch.stack([*(value.detach().float() for value in told.values()), norm.float()]).tolist()
        numbers = dict(zip(told, values, strict=True))
        self._require_finite("loss", numbers["loss"])
        scaled = self.scaler.is_enabled()
        # With float16 a gradient may overflow: the scaler then leaves this step out and lowers the scale.
        if not math.isfinite(size) and not (scaled and self.scaler.get_scale() >= _SMALLEST_SCALE):
            self._require_finite("gradient's norm", size)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.encoder.invalidate_caches()
        return StepResult(
            **numbers,
            pairs=batch.pairs,
            tokens=inputs.tokens,
            gradient_norm=size if math.isfinite(size) else None,
            loss_scale=self.scaler.get_scale() if scaled else None,
        )

    def loss(self, batch: TrainingBatch) -> Terms:
        """The loss of a batch, with the graph of all its rows: what a step in one process without `grad_cache` does."""
        batch, inputs = self.prepare(batch)
        return self._loss(batch, inputs)

    def prepare(self, batch: TrainingBatch) -> tuple[TrainingBatch, StepInputs]:
        """The batch with the hard negatives that this step takes, and the model's input for it."""
        config = self.config
        if config.hard_negatives is not None:
            batch = draw_negatives(batch, config.hard_negatives, config.seed, self.step)
        if self.step < config.plain_steps:
            return batch, build_inputs(batch, self.prompt, replace(config, strategy="none"))
        bank = None if self.banks is None else drawn_demonstrations(self.banks, batch, config, self.step)
        return batch, build_inputs(batch, self.prompt, config, bank)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """nDCG@10 on held-out rows, for every k of the configuration; logged.

        Several processes share the tasks, so all of them must call it.

        Returns:
            Task -> {"k=0": ..., "k=8": ...}.
        """
        backbone = self.encoder.backbone.eval()
        world = self.world
        evaluated = EpicEncoder(backbone, self.prompt, config=self.encoder.config)
        own = {
            dataset.name: evaluate_held_out(
                evaluated,
                dataset,
                self.config.evaluation_demonstrations,
                strategy=cast("Strategy", self.config.strategy),
                demonstrations=None if self.banks is None else self.banks.get(dataset.name),
            )
            for dataset in self.evaluation[world.rank :: world.size]
        }
        found = {name: row for part in world.collected(own) for name, row in part.items()}
        scores = {dataset.name: found[dataset.name] for dataset in self.evaluation}
        self._log({"step": self.step, "evaluation": scores})
        told = (f"{name} " + ", ".join(f"{k} {value:.2f}" for k, value in row.items()) for name, row in scores.items())
        self._tell("nDCG@10 on held-out rows at step %d: %s", self.step, "; ".join(told))
        return scores

    def finish(self) -> Path:
        """Write the final checkpoint and its model card to `final/` and return the folder.

        With LoRA the adapters are merged into it, and `final/adapter/` has them for PEFT.
        """
        target = self.folder / "final"
        if self.world.is_main:
            write_final(self, target)
            if self._board is not None:
                self._board.close()
        self.world.wait()
        return target

    def record(self) -> dict[str, Any]:
        """The training record: data with hashes, configuration, versions, hardware, hours, tokens."""
        return training_record(self)

    def _loss(self, batch: TrainingBatch, inputs: StepInputs) -> Terms:
        taught = None if self.teacher is None else self.teacher(batch, self.world)
        q0, d = self.forward(inputs.queries), self.forward(inputs.documents)
        q1 = None
        if inputs.prompted:
            vectors = torch.cat([q0, d])
            vectors = vectors.detach() if self.config.detach_demonstrations else vectors
            q1 = self.forward(inputs.prompted, SlotTable(vectors, inputs.shown))
        return self.objective(inputs, q0, d, q1, taught)

    def _backward(self, batch: TrainingBatch) -> tuple[StepInputs, Terms]:
        """Gradients of a batch's loss, times the loss scale, in the weights."""
        batch, inputs = self.prepare(batch)
        if not self.config.grad_cache and self.world.size == 1:
            terms = self._loss(batch, inputs)
            torch.autograd.backward(self.scaler.scale(terms.loss))
            return inputs, terms
        taught = None if self.teacher is None else self.teacher(batch, self.world)
        seen: list[Terms] = []

        def objective(q0: torch.Tensor, d: torch.Tensor, q1: torch.Tensor | None) -> torch.Tensor:
            seen.append(self.objective(inputs, q0, d, q1, taught))
            return self.scaler.scale(seen[0].loss)

        cached_backward(
            self.forward,
            inputs.queries,
            inputs.documents,
            inputs.prompted,
            inputs.shown,
            objective,
            detach=self.config.detach_demonstrations,
            recompute=self.config.grad_cache,
            world=self.world,
        )
        return inputs, seen[0]

    def _same_start(self) -> None:
        self.world.same_start(value for value in self.encoder.backbone.parameters() if value.requires_grad)

    def _require_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        good = _state.latest_checkpoint(self.folder)
        kept = f"{good} is good, but the same settings lead here again" if good else "there is no checkpoint yet"
        raise TrainingError(
            f"the {what} at step {self.step + 1} is {value}, and {kept}; lower learning_rate or raise "
            "temperature, and give the run another output folder or start afresh with `epic-rag train --no-resume`"
        )

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.last_step)

    def _tell(self, text: str, *values: object) -> None:
        if self.world.is_main:
            logger.info(text, *values)

    def _log(self, entry: dict[str, Any]) -> None:
        self.metrics.append(entry)
        if not self.world.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _state.METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self.config.tensorboard:
            self._board = self._board or Board(self.folder / "tensorboard", entry["step"])
            self._board.add(entry)
