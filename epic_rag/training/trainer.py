"""The trainer: demonstrations from the same step, two InfoNCE terms, checkpoints that resume.

One step of EPIC (arXiv 2605.01372):

    q0 = f(queries, zero-shot)        d = f(positives and hard negatives)
    for each row: k ~ Uniform{0..K} other rows of its task in the batch; their (q0_j, d_j) fill its slots
    q1 = f(queries, slots)
    loss = InfoNCE(q1, d) + w * InfoNCE(q0, d)

Demonstration embeddings are free: the batch has them already. Gradients flow through the slots unless
`detach_demonstrations` is set. The methods of `Trainer` follow this order, each on one module:

    data, sampling    files -> the pairs of a step and their demonstrations
    inputs            pairs -> token ids, slots, masks; token ids -> vectors
    losses            vectors -> loss
    gradcache         backpropagation in bounded memory or in several processes
    optimizer         learning rates, schedule, loss scaling
    checkpointing     save, resume, the training record
    neighbours, frozen_documents, retention, distillation, lora, distributed, validation, model_card
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

from epic_rag.backbone import Backbone
from epic_rag.batching import parse_devices
from epic_rag.checkpoints import EncoderConfig, languages_of
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError, MissingExtraError, TrainingError
from epic_rag.prompt import PromptBuilder, PromptTemplate
from epic_rag.training import checkpointing
from epic_rag.training.checkpointing import METRICS_FILE, public_name, training_record
from epic_rag.training.config import TrainingConfig
from epic_rag.training.data import TrainingBatch, draw_bank_demonstrations, load_datasets, split_off_banks
from epic_rag.training.distillation import (
    Teacher,
    add_head,
    fit_head,
    fitting_batches,
    match_covariance,
    paired_states,
    require_equal_widths,
)
from epic_rag.training.distributed import init_distributed
from epic_rag.training.frozen_documents import FrozenDocuments
from epic_rag.training.gradcache import cached_backward
from epic_rag.training.inputs import (
    Forward,
    SlotTable,
    StepInputs,
    build_inputs,
    draw_hard_negatives,
    with_frozen_documents,
)
from epic_rag.training.lora import Adapter, require_peft
from epic_rag.training.losses import Objective, Terms
from epic_rag.training.neighbours import group_rows
from epic_rag.training.optimizer import (
    DTYPES,
    WeightAverage,
    allow_tf32,
    build_optimizer,
    build_scaler,
    freeze_layers,
    resolve_dtype,
    separate_queries,
    warmup_and_decay,
)
from epic_rag.training.retention import Retention
from epic_rag.training.sampling import sample_batch
from epic_rag.training.validation import evaluate_held_out

__all__ = ["StepResult", "Trainer"]

logger = logging.getLogger(__name__)

# Float16 gradients that overflow at a loss scale below this are infinite at any.
_SMALLEST_SCALE = 1.0
# Texts that a head, and the covariance map, are fitted to.
_HEAD_TEXTS = 8192
_COVARIANCE_TEXTS = 16384


@dataclass(frozen=True)
class StepResult:
    """Figures of one step, as in `metrics.jsonl`.

    Attributes:
        loss: Weighted sum of the terms.
        with_demonstrations: InfoNCE(q1, d).
        zero_shot: InfoNCE(q0, d).
        pairs: Pairs in the step.
        tokens: Tokens of the pairs that went through the model, without padding.
        gradient_norm: Of all weights, before clipping; None if it overflowed.
        teacher: Distillation term; None without a teacher.
        retention: Distance to the start's vectors on other texts; None without such texts.
        loss_scale: That of float16; None for other dtypes.
    """

    loss: float
    with_demonstrations: float
    zero_shot: float
    pairs: int
    tokens: int
    gradient_norm: float | None = None
    teacher: float | None = None
    retention: float | None = None
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
        if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise MissingExtraError("tensorboard", "train", "the setting tensorboard")
        if config.neighbours and importlib.util.find_spec("sklearn") is None:
            raise MissingExtraError("scikit-learn", "train", "the setting neighbours")
        # Before the backbone, whose download may take long.
        self.datasets, self.evaluation = load_datasets(config)
        self.banks = split_off_banks(self.datasets, config) if config.demonstration_source == "bank" else None
        if config.neighbours:
            group_rows(self.datasets, config.neighbours, config.seed)

        self.world, device = init_distributed(config.device)
        config = resolve_dtype(config, parse_devices(device)[0] if encoder is None else encoder.device)
        self.encoder = encoder if encoder is not None else _load_backbone(config, device)
        if self.encoder.config.symmetric_as_documents:
            config = replace(config, symmetric_as_documents=True)
        self.config = config
        backbone = self.encoder.backbone
        allow_tf32(backbone.device)
        self.adapter = Adapter(backbone, config) if config.lora_rank is not None else None
        if config.gradient_checkpointing:
            _enable_gradient_checkpointing(backbone)
        self.teacher = Teacher(config, backbone.device) if config.teacher is not None else None
        if self.teacher is not None:
            require_equal_widths(config, backbone.dimension, self.teacher.encoder.backbone.dimension)

        inference = self.encoder.prompt
        self.inference_lengths = (
            config.inference_tokens or inference.max_query_tokens,
            config.inference_tokens or inference.max_document_tokens,
        )
        self.prompt = PromptBuilder(
            inference.tokenizer,
            PromptTemplate(separators=config.separators, demonstration_instructions=config.demonstration_instructions),
            append_eos=inference.append_eos,
            max_query_tokens=config.max_query_tokens,
            max_document_tokens=config.max_document_tokens,
            max_positions=inference.max_positions,
            max_demonstration_tokens=config.max_document_tokens,
        )
        self.forward = Forward(
            backbone, pad_id=self.prompt.pad_id, max_tokens=config.micro_batch_tokens, dtype=DTYPES[config.dtype]
        )
        self.retention: Retention | None = None
        if config.retention_texts:
            self.retention = Retention(backbone, self.forward, self.prompt, self.datasets, config)
        if config.freeze_documents:
            separate_queries(backbone, config.frozen_layers)
        elif config.frozen_layers is not None:
            freeze_layers(backbone, config.frozen_layers)
        # With the names of the result, and before a checkpoint is restored.
        self.start = _weights_to_interpolate(backbone, config) if config.interpolate_with_start else None
        self.documents: FrozenDocuments | None = None
        if config.freeze_documents:
            if self.world.size > 1:
                raise ConfigError("freeze_documents is true, which needs a single process. Start it without torchrun.")
            folder = Path(config.output) / "documents"
            self.documents = FrozenDocuments(self.datasets, config, folder, encoder, device)
        self.objective = Objective(config, backbone.dimension)
        self.optimizer = build_optimizer(backbone, config)
        self.scaler = build_scaler(config, backbone.device)
        self._broadcast_weights()
        self.average = WeightAverage(backbone, config.ema_decay) if config.ema_decay else None

        self.folder = Path(config.output)
        self.step = 0
        self.last_step = min(config.steps, config.stop_at_step or config.steps)
        self.pairs = 0
        self.tokens = 0
        self.seconds = 0.0
        self.metrics: list[dict[str, Any]] = []
        self._board: Any = None

    def train(self, *, resume: bool = True, show_progress: bool = True) -> Path:
        """Run to the last step and write the result.

        Args:
            resume: True to continue from the newest checkpoint in the run's folder, if there is one. Otherwise the
                checkpoints and metrics of an earlier run in it are deleted.
            show_progress: True to draw a progress bar with loss and pairs a second.

        Returns:
            The folder of the final checkpoint, weights in float16.

        Raises:
            TrainingError: If the loss is not finite, or a checkpoint is another run's.
        """
        if not (resume and self._restore()):
            if self.world.is_main:
                checkpointing.clear(self.folder)
            self._fit_head()
        self.world.barrier()
        show_progress = show_progress and self.world.is_main
        if self.documents is not None:
            self.documents.embed(show_progress=show_progress)
        rows = sum(len(dataset.rows) for dataset in self.datasets)
        self._report("step %d of %d, %d rows in %d tasks", self.step, self.last_step, rows, len(self.datasets))
        with tqdm(
            total=self.last_step, initial=self.step, desc="Training", unit="step", disable=not show_progress
        ) as bar:
            if self.step == 0 and self.config.evaluate_every:
                # The baseline: the backbone before any step.
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
                figures = {name: value for name, value in asdict(result).items() if value is not None}
                self._log({"step": self.step, **figures, "seconds": round(elapsed, 3)})
                if not show_progress and self._due(max(1, self.last_step // 20)):
                    self._report("step %d of %d: loss %.3f", self.step, self.last_step, result.loss)
                if self._due(self.config.evaluate_every):
                    self.evaluate()
                if self._due(self.config.save_every) and self.world.is_main:
                    self._save()
        if self.average is not None:
            self.average.swap(self.encoder.backbone)
            self.average = None
        if self._change_result() and self.config.evaluate_every:
            self.evaluate()
        return self.finish()

    def train_step(self, batch: TrainingBatch) -> StepResult:
        """Run one optimizer step.

        With several processes all of them call it with the same batch.

        Raises:
            TrainingError: If the loss or a gradient is not finite; the weights are then those before the step.
        """
        # Dropout follows the step's number, so that a resumed run draws the same; each process draws its own.
        torch.manual_seed(self.config.seed * 1_000_003 + self.step + self.world.rank * 1_000_000_007)
        backbone = self.encoder.backbone.train()
        factor = warmup_and_decay(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad(set_to_none=True)

        batch, inputs = self.prepare(batch)
        terms = self.backward(batch, inputs)

        self.scaler.unscale_(self.optimizer)
        trained = [value for value in backbone.parameters() if value.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm)
        # One transfer from the GPU a step.
        tensors = {name: value for name, value in vars(terms).items() if value is not None}
        *values, size = torch.stack([*(value.detach().float() for value in tensors.values()), norm.float()]).tolist()
        numbers = dict(zip(tensors, values, strict=True))
        self._require_finite("loss", numbers["loss"])
        scaled = self.scaler.is_enabled()
        # A float16 gradient may overflow: the scaler then skips this step and lowers the scale.
        if not math.isfinite(size) and not (scaled and self.scaler.get_scale() >= _SMALLEST_SCALE):
            self._require_finite("gradient's norm", size)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(backbone)
        self.encoder.invalidate_caches()
        return StepResult(
            **numbers,
            pairs=batch.pairs,
            tokens=inputs.tokens,
            gradient_norm=size if math.isfinite(size) else None,
            loss_scale=self.scaler.get_scale() if scaled else None,
        )

    def prepare(self, batch: TrainingBatch) -> tuple[TrainingBatch, StepInputs]:
        """Draw the batch's hard negatives for this step and tokenize it."""
        config = self.config
        if config.hard_negatives is not None:
            batch = draw_hard_negatives(batch, config.hard_negatives, config.seed, self.step)
        if self.step < config.zero_shot_steps:
            return batch, self._frozen(batch, build_inputs(batch, self.prompt, replace(config, strategy="none")))
        bank = None if self.banks is None else draw_bank_demonstrations(self.banks, batch, config, self.step)
        return batch, self._frozen(batch, build_inputs(batch, self.prompt, config, bank))

    def _frozen(self, batch: TrainingBatch, inputs: StepInputs) -> StepInputs:
        if self.documents is None:
            return inputs
        documents = self.documents.of_step(batch, self.step)
        return with_frozen_documents(inputs, documents.vectors.to(self.encoder.device), documents.mask)

    def loss(self, batch: TrainingBatch, inputs: StepInputs) -> Terms:
        """Compute a prepared batch's loss with the graph of all its rows: a step of one process without GradCache."""
        teacher = None if self.teacher is None else self.teacher(batch, self.world)
        q0 = self.forward(inputs.queries)
        d = self.forward(inputs.documents) if inputs.document_vectors is None else inputs.document_vectors
        q1 = None
        if inputs.prompted:
            vectors = torch.cat([q0, d])
            vectors = vectors.detach() if self.config.detach_demonstrations else vectors
            q1 = self.forward(inputs.prompted, SlotTable(vectors, inputs.shown))
        return self.objective(inputs, q0, d, q1, teacher)

    def backward(self, batch: TrainingBatch, inputs: StepInputs) -> Terms:
        """Add the gradients of a prepared batch's loss, times the loss scale, to the weights."""
        if self.retention is None:
            return self._backward_pairs(batch, inputs)
        kept = self.config.retention_weight * self.retention(self.step)
        # Every process computes it, and the processes' gradients are summed.
        torch.autograd.backward(self.scaler.scale(kept / self.world.size))
        terms = self._backward_pairs(batch, inputs)
        return replace(terms, loss=terms.loss.detach() + kept.detach(), retention=kept.detach())

    def _backward_pairs(self, batch: TrainingBatch, inputs: StepInputs) -> Terms:
        if not self.config.grad_cache and self.world.size == 1:
            terms = self.loss(batch, inputs)
            torch.autograd.backward(self.scaler.scale(terms.loss))
            return terms
        teacher = None if self.teacher is None else self.teacher(batch, self.world)
        computed: list[Terms] = []

        def objective(q0: torch.Tensor, d: torch.Tensor, q1: torch.Tensor | None) -> torch.Tensor:
            computed.append(self.objective(inputs, q0, d, q1, teacher))
            return self.scaler.scale(computed[0].loss)

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
        return computed[0]

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Measure nDCG@10 on held-out rows for every k of the configuration, and log it.

        Several processes share the tasks, so all of them must call it.

        Returns:
            Task -> {"k=0": ..., "k=8": ...}.
        """
        backbone = self.encoder.backbone.eval()
        if self.average is not None:
            self.average.swap(backbone)
        encoder = EpicEncoder(backbone, self.prompt, config=self.encoder.config)
        mine = {
            dataset.name: evaluate_held_out(
                encoder,
                dataset,
                self.config.evaluation_demonstrations,
                strategy=self.config.strategy,
                demonstrations=None if self.banks is None else self.banks.get(dataset.name),
                instructed=self.config.evaluation_instructions == "own",
            )
            for dataset in self.evaluation[self.world.rank :: self.world.size]
        }
        if self.average is not None:
            self.average.swap(backbone)
        found = {name: row for part in self.world.all_gather_object(mine) for name, row in part.items()}
        scores = {dataset.name: found[dataset.name] for dataset in self.evaluation}
        self._log({"step": self.step, "evaluation": scores})
        text = (f"{name} " + ", ".join(f"{k} {value:.2f}" for k, value in row.items()) for name, row in scores.items())
        self._report("nDCG@10 on held-out rows at step %d: %s", self.step, "; ".join(text))
        return scores

    def finish(self) -> Path:
        """Write the final checkpoint, in float16, and its model card to `final/`, and return the folder.

        With LoRA the adapters are merged into it, and `final/adapter/` has them for PEFT.
        """
        target = self.folder / "final"
        if self.world.is_main:
            self._write_final(target)
            if self._board is not None:
                self._board.close()
        self.world.barrier()
        return target

    def record(self) -> dict[str, Any]:
        """Return the training record: data with hashes, configuration, versions, hardware, hours, tokens."""
        backbone, teacher = self.encoder.backbone, None
        if self.teacher is not None:
            teacher = {"name": self.teacher.encoder.name, "fingerprint": self.teacher.encoder.fingerprint}
        trained = sum(value.numel() for value in backbone.parameters() if value.requires_grad)
        return training_record(
            self.config,
            self.datasets,
            self._counts(),
            device=self.encoder.device,
            processes=self.world.size,
            previous=self.encoder.config.training,
            teacher=teacher,
            trained_parameters=None if self.adapter is None else trained,
        )

    def _counts(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "pairs": self.pairs, "seconds": self.seconds}

    def _save(self) -> None:
        facts = {**self._counts(), **checkpointing.run_facts(self.config, self.datasets)}
        keep = self.config.keep_checkpoints
        checkpointing.save(
            self.folder, facts, self.encoder.backbone, self.optimizer, self.scaler, self.average, keep=keep
        )

    def _restore(self) -> bool:
        # Rank 0 decides: another process may look while a checkpoint is written or deleted.
        newest = self.world.broadcast_object(checkpointing.latest_checkpoint(self.folder))
        if newest is None:
            return False
        facts = checkpointing.run_facts(self.config, self.datasets)
        saved = checkpointing.restore(newest, facts, self.encoder.backbone, self.optimizer, self.scaler, self.average)
        self.step, self.tokens, self.seconds = int(saved["step"]), int(saved["tokens"]), float(saved["seconds"])
        # Checkpoints of early releases have no count of pairs.
        self.pairs = int(saved.get("pairs", self.step * self.config.batch_size))
        file = self.folder / METRICS_FILE
        self.metrics = checkpointing.read_metrics(file, self.step)
        if self.world.is_main and file.is_file():
            checkpointing.write_metrics(file, self.metrics)
        self.encoder.invalidate_caches()
        return True

    def _fit_head(self) -> None:
        """Fit a new head to the teacher's vectors, if the run imitates vectors."""
        backbone, config = self.encoder.backbone.eval(), self.config
        if config.output_dimension is None or self.teacher is None or config.teacher_loss != "vectors":
            return
        assert backbone.head is not None
        fit_head(backbone.head, *self._paired_states(self.teacher, _HEAD_TEXTS))
        self.encoder.invalidate_caches()
        self._broadcast_weights()

    def _change_result(self) -> bool:
        """Apply what a run does to its weights after the last step; return True if anything."""
        backbone = self.encoder.backbone.eval()
        if self.config.teacher_covariance and self.teacher is not None:
            match_covariance(backbone, *self._paired_states(self.teacher, _COVARIANCE_TEXTS))
        elif self.start is not None:
            # Linear interpolation keeps most of the start's abilities (Wortsman et al. 2022, "Robust fine-tuning of
            # zero-shot models").
            with torch.no_grad():
                for name, value in backbone.named_parameters():
                    if name in self.start:
                        value.lerp_(self.start[name].to(value.device), self.config.interpolate_with_start)
        else:
            return False
        self.encoder.invalidate_caches()
        self._broadcast_weights()
        return True

    def _paired_states(self, teacher: Teacher, texts: int) -> tuple[torch.Tensor, torch.Tensor]:
        return paired_states(fitting_batches(self.datasets, self.config, texts), self.prompt, self.forward, teacher)

    def _write_final(self, target: Path) -> None:
        # Not at the top: `python -m epic_rag.training.model_card` would find the module imported already.
        from epic_rag.training.model_card import held_out_figures, stated_license, write_model_card

        config, prompt = self.config, self.prompt
        base = config.base_model or public_name(config.model)
        languages, _ = languages_of(self.encoder.name, self.encoder.folder, vars(self.encoder.config))
        encoder = EpicEncoder(
            self.encoder.backbone.eval() if self.adapter is None else self.adapter.merged(),
            PromptBuilder(
                prompt.tokenizer,
                prompt.template,
                append_eos=prompt.append_eos,
                max_query_tokens=self.inference_lengths[0],
                max_document_tokens=self.inference_lengths[1],
                max_positions=prompt.max_positions,
            ),
            name=config.name,
            config=EncoderConfig(
                default_instruction=config.default_instruction,
                max_demonstrations=config.max_demonstrations,
                strategy=config.query_strategy or self.encoder.config.strategy,
                temperature=config.temperature,
                # Widths that vectors may be truncated to; no other was trained for.
                matryoshka_dims=sorted(set(config.matryoshka_dims)) or None,
                description=config.description,
                license=config.license or stated_license(config.model),
                base_model=base,
                languages=list(languages) or None,
                symmetric_as_documents=config.symmetric_as_documents or None,
                training=self.record(),
            ),
        )
        encoder.save_pretrained(target, dtype="float16")
        if self.adapter is not None:
            self.adapter.save(target / "adapter", base)
        evaluations = [entry for entry in self.metrics if "evaluation" in entry]
        write_model_card(target, figures=held_out_figures(evaluations[-1]) if evaluations else "")

    def _broadcast_weights(self) -> None:
        self.world.broadcast_parameters(value for value in self.encoder.backbone.parameters() if value.requires_grad)

    def _require_finite(self, name: str, value: float) -> None:
        if math.isfinite(value):
            return
        newest = checkpointing.latest_checkpoint(self.folder)
        kept = f"{newest} is good, but the same settings lead here again" if newest else "There is no checkpoint yet"
        raise TrainingError(
            f"The {name} at step {self.step + 1} is {value}. {kept}: lower learning_rate or raise temperature, and "
            "give the run another output folder or start it again with `epic-rag train --no-resume`."
        )

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.last_step)

    def _report(self, text: str, *values: object) -> None:
        if self.world.is_main:
            logger.info(text, *values)

    def _log(self, entry: dict[str, Any]) -> None:
        self.metrics.append(entry)
        if not self.world.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self.config.tensorboard:
            self._write_to_board(entry)

    def _write_to_board(self, entry: Mapping[str, Any]) -> None:
        """Write an entry to TensorBoard: figures of a step under `training/`, of an evaluation under `ndcg@10/`."""
        step = int(entry["step"])
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            # Later entries of an earlier stretch are not shown.
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
        for task, scores in entry.get("evaluation", {}).items():
            for k, value in scores.items():
                self._board.add_scalar(f"ndcg@10/{task}/{k}", value, step)
        for name, value in entry.items():
            if name not in ("step", "evaluation"):
                self._board.add_scalar(f"training/{name}", value, step)


def _load_backbone(config: TrainingConfig, device: str | None) -> EpicEncoder:
    """Load `config.model`: trained weights in float32, weights that LoRA freezes in the compute dtype."""
    encoder = EpicEncoder.from_pretrained(
        config.model,
        device=device,
        dtype="float32" if config.lora_rank is None else config.dtype,
        num_layers=config.num_layers,
        gguf_file=config.gguf_file,
        pooling=config.pooling,
        projector=None if config.reset_projector else config.projector,
        backend="native",
    )
    if config.attention is not None:
        cast("Any", encoder.backbone.transformer).set_attn_implementation(config.attention)
    if config.output_dimension is not None:
        add_head(encoder.backbone, config.output_dimension)
    if config.reset_projector:
        encoder.backbone.reset_projector(config.projector)
    encoder.invalidate_caches()
    return encoder


def _weights_to_interpolate(backbone: Backbone, config: TrainingConfig) -> dict[str, torch.Tensor]:
    """Copy the start's weights, or those of `interpolation_model` but for its projector, which may be untrained."""
    if config.interpolation_model is None:
        return {name: value.detach().to("cpu", copy=True) for name, value in backbone.named_parameters()}
    other = EpicEncoder.from_pretrained(config.interpolation_model, device="cpu", dtype="float32").backbone
    weights = {name: value.detach() for name, value in other.named_parameters() if not name.startswith("projector.")}
    ours = {name: value.shape for name, value in backbone.named_parameters() if not name.startswith("projector.")}
    if ours != {name: value.shape for name, value in weights.items()}:
        raise ConfigError(
            f"interpolation_model is {config.interpolation_model}, whose weights have other names or shapes than those "
            f"of {config.model}. Name a checkpoint that was trained from the same start."
        )
    return weights


def _enable_gradient_checkpointing(backbone: Backbone) -> None:
    transformer = backbone.transformer
    if not transformer.supports_gradient_checkpointing:
        raise ConfigError(
            f"gradient_checkpointing is true and {type(transformer).__name__} does not support it. "
            "Set it to false, and grad_cache to true for less memory."
        )
    model: Any = transformer
    # transformers 5 renamed the method.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # The reentrant implementation needs inputs with gradients, which embeddings behind frozen weights have not.
    enable({"use_reentrant": False})
