"""What a training run is made of: one dataclass, read from YAML or JSON, saved with the weights."""

from __future__ import annotations

import os
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from epic_rag.errors import ConfigError
from epic_rag.training._checks import check_run, check_task
from epic_rag.training._values import coerced, read_values

__all__ = ["TaskConfig", "TrainingConfig"]


@dataclass(frozen=True)
class TaskConfig:
    """One task of the mix.

    Attributes:
        weight: Multiplies the task's share; above 0.
        instruction: Overrides the instruction of `instructions.json`.
        symmetric: Whether positives are encoded like queries.
        sources: Draw the task's part of a step from this many sources (the rows' "source"), each with demonstrations
            of its own; 0 draws rows from the whole file.
        in_batch_negatives: Whether other rows' documents are negatives of a row; if not, only its own hard negatives
            are. For tasks where most of a batch would be false negatives (few labels, near-duplicates).
    """

    weight: float = 1.0
    instruction: str | None = None
    symmetric: bool = False
    sources: int = 0
    in_batch_negatives: bool = True

    def __post_init__(self) -> None:
        check_task(self)


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training run. The method is EPIC's (arXiv 2605.01372, section 3).

    Attributes:
        model: Backbone: a folder, a shipped checkpoint or a hub name.
        output: Folder of the run: checkpoints, metrics, the final model in `final/`.
        data: Folder of `<task>.jsonl[.gz]` files and `instructions.json`.
        tasks: The mix; every key is a file in `data`.
        name: Name of the resulting checkpoint.
        steps: Optimiser steps.
        batch_size: Pairs in a step, over all its tasks.
        tasks_per_batch: Tasks that share a step. With 1, negatives are of the same task (the paper's setting); with
            more, each query's negatives are its own task's and the other tasks' documents, so that what is wanted
            has to be read from the prompt.
        size_power: A task's share is its size to this power, times its weight.
        plain_steps: The first steps, which are trained without demonstrations and so cost half.
        strategy: "epic" (slots), "text" (demonstrations as text) or "none" (plain contrastive training).
        query_strategy: How the result shows demonstrations to a query for which nothing is said: "epic", "text", "none"
            or "task-vector"; None for the start's own, and "epic" if it has none.
        max_demonstrations: K: rows draw k uniformly from 0..K.
        zero_shot_weight: w, the weight of the zero-shot term.
        detach_demonstrations: Cut gradients through the slots.
        demonstration_source: "batch": other rows of the batch; "bank": a fixed pool of the task's rows, not trained on.
        bank_size: Rows in a task's pool, for demonstration_source "bank".
        demonstration_instructions: "shared": one instruction before all demonstrations; "each": one before each.
        projector: "scale", "linear" or "mlp".
        new_projector: Start with an untrained projector, whatever the model has.
        separators: "words" or "none" between slots.
        generic_instruction: Share of a step's tasks whose instruction is replaced by a generic one.
        no_instruction: Share of a step's tasks that get no instruction at all.
        turned_round: Share of a step's tasks whose pairs are turned round (passage as query, query as passage), under
            a generic instruction or none. Symmetric and label-like tasks are left as they are.
        several_tasks: Share of a step's tasks that are asked twice, with the same queries: for their passages, and for
            the queries themselves in other words, under one generic instruction or none. Symmetric and label-like
            tasks are left as they are.
        mismatched_demonstrations: Share of the rows whose demonstrations are wrong on purpose (shuffled, or another
            task's); they are trained to be read as if there were none.
        stop_after: Stop after this many steps of the schedule, as if it were the last; None for never. For a first
            stage whose learning rate another stage goes on from.
        temperature: Of the softmax in InfoNCE.
        matryoshka_dims: Widths at which InfoNCE is computed besides the full one; the loss is the mean over all.
        hard_negatives: Most hard negatives of a row in a step, drawn anew each step; None for all.
        false_negative_margin: Other rows' documents whose zero-shot score is above the positive's minus this are not
            counted as negatives; None counts all.
        teacher: Encoder that is imitated; None for none.
        teacher_weight: Weight of that term.
        teacher_loss: What is imitated: "cosines" between the batch's texts, or their "vectors" themselves, for which
            the widths must agree.
        teacher_covariance: After the last step, map the vectors linearly so that their covariance is the teacher's; the
            widths must agree. With it, `steps` may be 0.
        contrastive_weight: Weight of both InfoNCE terms; 0 for a stage that only imitates.
        mismatched_weight: Weight of the consistency term of rows whose demonstrations are deliberately wrong.
        learning_rate: Peak of the linear warm-up, linear decay schedule.
        projector_learning_rate: The projector's and a head's own peak; a projector starts from the identity and has
            further to go.
        token_learning_rate: The token embeddings' own peak; None for `learning_rate`. A token's vector is only changed
            by the texts that it is in.
        warmup: Share of the steps.
        weight_decay: Of AdamW.
        max_grad_norm: Gradient clipping.
        max_query_tokens: Training length of queries.
        max_document_tokens: Training length of documents.
        inference_tokens: Length limit that is written into the checkpoint; None keeps the backbone's.
        micro_batch_tokens: Most padded tokens in one forward pass.
        grad_cache: Keep only one forward pass's activations at a time, at the cost of a second forward pass.
        gradient_checkpointing: Keep only each layer's input for the backward pass, at the same cost.
        pooling: "last", "mean" or "cls"; None keeps the backbone's, or what fits its attention.
        attention: How attention is computed: "eager" (worth a try for short texts on a CPU), "sdpa", or None for the
            model's default.
        output_dimension: Width of the vectors, made by a new linear head behind the pooling; None leaves the model as
            it is. Where a teacher's vectors are imitated, the head starts as their least-squares fit.
        num_layers: Keep the first N layers of the backbone.
        gguf_file: GGUF file in the backbone's folder.
        lora_rank: Train low-rank adapters of this rank instead of the transformer's weights; None trains all weights.
        lora_alpha: The adapters' output is multiplied by alpha / rank.
        lora_dropout: Dropout on the adapters' input.
        lora_targets: Names of the linear modules that get an adapter, or "all-linear".
        dtype: "float32", or "bfloat16" or "float16" for autocast; with float16 the loss is scaled. "auto" is bfloat16,
            or float32 on a CPU that has no instructions for it.
        device: None takes a GPU if there is one.
        seed: Of data order, demonstrations and dropout.
        evaluate_every: Steps between evaluations on held-out rows, the first before any step; 0 for never.
        evaluation_rows: Held-out rows of each evaluated task.
        evaluation_tasks: Tasks that are evaluated; files that are not in `tasks` are tasks never trained on.
        evaluation_demonstrations: Values of k that are evaluated.
        save_every: Steps between checkpoints.
        keep_checkpoints: How many are kept.
        tensorboard: Write metrics for TensorBoard, too, in `tensorboard/`.
        default_instruction: Written into the checkpoint for queries that come without one; also the instruction of
            tasks that have none.
        description: One sentence for `epic-rag models` and the model card.
        license: Licence of the resulting weights, for the model card.
        base_model: What the backbone is called in the model card.
    """

    model: str
    output: str
    data: str
    tasks: dict[str, TaskConfig]
    name: str = "epic"
    steps: int = 1000
    batch_size: int = 64
    tasks_per_batch: int = 1
    size_power: float = 0.5
    plain_steps: int = 0
    strategy: str = "epic"
    query_strategy: str | None = None
    max_demonstrations: int = 8
    zero_shot_weight: float = 1.0
    detach_demonstrations: bool = False
    demonstration_source: str = "batch"
    bank_size: int = 32
    demonstration_instructions: str = "shared"
    projector: str = "linear"
    new_projector: bool = False
    separators: str = "words"
    generic_instruction: float = 0.0
    no_instruction: float = 0.0
    turned_round: float = 0.0
    several_tasks: float = 0.0
    mismatched_demonstrations: float = 0.0
    stop_after: int | None = None
    temperature: float = 0.03
    matryoshka_dims: tuple[int, ...] = ()
    hard_negatives: int | None = None
    false_negative_margin: float | None = None
    teacher: str | None = None
    teacher_weight: float = 0.0
    teacher_loss: str = "cosines"
    teacher_covariance: bool = False
    contrastive_weight: float = 1.0
    mismatched_weight: float = 1.0
    learning_rate: float = 3e-5
    projector_learning_rate: float = 3e-4
    token_learning_rate: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_query_tokens: int = 64
    max_document_tokens: int = 128
    inference_tokens: int | None = None
    micro_batch_tokens: int = 8192
    grad_cache: bool = False
    gradient_checkpointing: bool = False
    pooling: str | None = None
    attention: str | None = None
    output_dimension: int | None = None
    num_layers: int | None = None
    gguf_file: str | None = None
    lora_rank: int | None = None
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ("all-linear",)
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    evaluate_every: int = 0
    evaluation_rows: int = 200
    evaluation_tasks: tuple[str, ...] = ()
    evaluation_demonstrations: tuple[int, ...] = (0, 8)
    save_every: int = 200
    keep_checkpoints: int = 2
    tensorboard: bool = False
    default_instruction: str | None = None
    description: str = ""
    license: str = ""
    base_model: str = ""
    generic_instructions: tuple[str, ...] = field(
        default=(
            "Given a query, retrieve the passages that answer it",
            "Given a query, retrieve what belongs to it",
            "Given a text, find the text that goes with it",
            "Retrieve the text that matches the query",
        )
    )

    def __post_init__(self) -> None:
        check_run(self)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **overrides: Any) -> TrainingConfig:
        """Read a YAML or JSON file.

        Args:
            path: The file; relative folders in it count from the working directory.
            **overrides: Fields that replace the file's.

        Raises:
            ConfigError: If the file is missing, malformed, or names a field that does not exist.
            MissingExtraError: If it is YAML and PyYAML is not installed.
        """
        return cls.from_dict({**read_values(Path(path)), **overrides}, origin=str(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, origin: str = "the configuration") -> TrainingConfig:
        """Build from plain values, as read from a file or from a training record."""
        required = {item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING}
        missing = sorted(required - set(data))
        if missing:
            raise ConfigError(
                f"{origin} does not set {', '.join(missing)}; add it to the file, or pass --set NAME=VALUE"
            )
        try:
            values = {name: value for name, value in data.items() if name != "tasks"}
            return cls(**coerced(cls, values), tasks=_tasks(data["tasks"]))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{origin} does not make a training run: {error}; see docs/training.md") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _tasks(value: Any) -> dict[str, TaskConfig]:
    """{name: {field: value}}, or a list of names."""
    if isinstance(value, list):
        value = dict.fromkeys(value)
    if not isinstance(value, dict):
        raise TypeError(f"tasks is {value!r}, expected names of files with their settings")
    tasks: dict[str, TaskConfig] = {}
    for name, entry in value.items():
        if not isinstance(entry, (dict, TaskConfig, type(None))):
            raise TypeError(f"tasks.{name} is {entry!r}, expected settings such as {{weight: 2}}")
        try:
            tasks[str(name)] = (
                entry if isinstance(entry, TaskConfig) else TaskConfig(**coerced(TaskConfig, entry or {}))
            )
        except (TypeError, ConfigError) as error:
            raise TypeError(f"tasks.{name}: {error}") from error
    return tasks
