"""What the settings of a run must be, one by one and together. Every message names both facts and the remedy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from epic_rag.backbone import POOLINGS
from epic_rag.errors import ConfigError
from epic_rag.projector import PROJECTORS
from epic_rag.prompt import STRATEGIES
from epic_rag.task_vector import QUERY_STRATEGIES

if TYPE_CHECKING:
    from epic_rag.training.config import TaskConfig, TrainingConfig

__all__ = ["check_run", "check_task"]

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "strategy": STRATEGIES,
    "query_strategy": (None, *QUERY_STRATEGIES),
    "projector": PROJECTORS,
    "separators": ("words", "none"),
    "pooling": (None, *POOLINGS),
    "demonstration_source": ("batch", "bank"),
    "demonstration_instructions": ("shared", "each"),
    "teacher_loss": ("cosines", "vectors"),
    "attention": (None, "eager", "sdpa"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}
_AT_LEAST_ONE = (
    *("batch_size", "tasks_per_batch", "save_every", "keep_checkpoints", "num_layers"),
    *("stop_after", "max_query_tokens", "max_document_tokens", "inference_tokens", "micro_batch_tokens"),
    *("lora_rank", "bank_size", "output_dimension"),
)
_ABOVE_ZERO = ("temperature", "learning_rate", "max_grad_norm", "lora_alpha")
_NOT_NEGATIVE = (
    *("size_power", "max_demonstrations", "zero_shot_weight", "projector_learning_rate", "weight_decay"),
    *("evaluate_every", "evaluation_rows", "generic_instruction", "no_instruction"),
    *("steps", "hard_negatives", "teacher_weight", "mismatched_weight", "plain_steps"),
    *("contrastive_weight", "token_learning_rate"),
)
_SHARES = ("warmup", "turned_round", "several_tasks", "mismatched_demonstrations", "lora_dropout")


def check_task(task: TaskConfig) -> None:
    """Check a task's settings.

    Raises:
        ConfigError: If one cannot work.
    """
    if not (task.weight > 0 and math.isfinite(task.weight)):
        raise ConfigError(f"weight is {task.weight}; give a task a value above 0, or leave it out of tasks")
    if task.sources < 0:
        raise ConfigError(f"sources is {task.sources}; give a task 0 (its rows as one) or more")


def check_run(config: TrainingConfig) -> None:
    """Check the settings of a run.

    Raises:
        ConfigError: If one cannot work, or two of them cannot work together.
    """
    _check_ranges(config)
    for name, known in _CHOICES.items():
        if getattr(config, name) not in known:
            names = ", ".join(str(value) for value in known if value is not None)
            raise ConfigError(f"{name} is {getattr(config, name)!r}, known are {names}; choose one of them")
    if config.device is not None and "," in config.device:
        raise ConfigError(
            f"device is {config.device!r}, a process that trains has one; leave it out and start a process for "
            "each: torchrun --nproc-per-node=N -m epic_rag_cli train ..."
        )
    if not config.tasks:
        raise ConfigError("tasks is empty; name at least one file of the data folder")
    _check_batches(config)
    _check_loss(config)
    if config.demonstration_source == "bank":
        _check_bank(config)
    if config.lora_rank is not None and not config.lora_targets:
        raise ConfigError(
            f"lora_rank is {config.lora_rank} and lora_targets is empty; name modules, or leave it at [all-linear]"
        )


def _check_ranges(config: TrainingConfig) -> None:
    for names, lowest, words in (
        (_AT_LEAST_ONE, 1, "at least 1"),
        (_ABOVE_ZERO, math.ulp(0.0), "above 0"),
        (_NOT_NEGATIVE, 0, "of 0 or more"),
    ):
        for name in names:
            value = getattr(config, name)
            # Written so that nan fails, too.
            if value is not None and not lowest <= value < math.inf:
                raise ConfigError(f"{name} is {value}; give a value {words}")
    for name in _SHARES:
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; give a share, from 0 to 1")
    if any(k < 0 for k in config.evaluation_demonstrations):
        raise ConfigError(
            f"evaluation_demonstrations is {list(config.evaluation_demonstrations)}; give numbers of 0 or more"
        )


def _check_batches(config: TrainingConfig) -> None:
    if config.batch_size < 2 * config.tasks_per_batch:
        raise ConfigError(
            f"batch_size is {config.batch_size} for {config.tasks_per_batch} tasks in a batch; "
            "in-batch negatives need at least 2 pairs a task"
        )
    if not 0 <= config.generic_instruction + config.no_instruction <= 1:
        raise ConfigError(
            f"generic_instruction is {config.generic_instruction} and no_instruction {config.no_instruction}; "
            "together they are at most 1"
        )
    generic = ("generic_instruction", "turned_round", "several_tasks")
    if any(getattr(config, name) for name in generic) and not config.generic_instructions:
        told = ", ".join(f"{name} {getattr(config, name)}" for name in generic)
        raise ConfigError(f"generic_instructions is empty with {told}; give at least one, or set the three to 0")
    if config.several_tasks and config.batch_size < 4 * min(config.tasks_per_batch, len(config.tasks)):
        raise ConfigError(
            f"several_tasks is {config.several_tasks} and batch_size {config.batch_size} for {config.tasks_per_batch} "
            "tasks in a batch; a task that is asked twice needs at least 4 pairs: raise batch_size"
        )
    for name, task in config.tasks.items():
        rows = config.batch_size // min(config.tasks_per_batch, len(config.tasks)) // max(1, task.sources)
        if rows < 2:
            raise ConfigError(
                f"tasks.{name}.sources is {task.sources}, which leaves {rows} of a step's {config.batch_size} pairs "
                "for each; in-batch negatives need at least 2: raise batch_size or lower sources"
            )


def _check_loss(config: TrainingConfig) -> None:
    if any(width < 1 for width in config.matryoshka_dims):
        raise ConfigError(f"matryoshka_dims is {list(config.matryoshka_dims)}; give widths of 1 or more")
    margin = config.false_negative_margin
    if margin is not None and not math.isfinite(margin):
        raise ConfigError(f"false_negative_margin is {margin}; give a difference of cosines, such as 0.05, or null")
    if config.teacher is None and config.teacher_weight:
        raise ConfigError(
            f"teacher_weight is {config.teacher_weight} and there is no teacher; name one, or set teacher_weight to 0"
        )
    if config.teacher is not None and not config.teacher_weight:
        raise ConfigError(
            f"teacher is {config.teacher!r} and teacher_weight is 0; give a weight, or set teacher to null"
        )
    if config.teacher_covariance and config.teacher is None:
        raise ConfigError("teacher_covariance is true and there is no teacher; name one, or set it to false")
    if not config.steps and not config.teacher_covariance:
        raise ConfigError("steps is 0, which trains nothing; give a value of at least 1")
    if not config.contrastive_weight and config.teacher is None:
        raise ConfigError(
            "contrastive_weight is 0 and there is no teacher, which leaves nothing to learn from; name a teacher, or "
            "give a weight above 0"
        )
    for name, task in config.tasks.items():
        if task.in_batch_negatives:
            continue
        # In both cases the rows would have no negatives at all, and nothing to learn from.
        for setting in ("hard_negatives", "turned_round"):
            value = getattr(config, setting)
            if value == 0 if setting == "hard_negatives" else value > 0:
                raise ConfigError(
                    f"tasks.{name}.in_batch_negatives is false and {setting} is {value}, which leaves rows without "
                    f"hard negatives; set in_batch_negatives to true, or {setting} to its default"
                )


def _check_bank(config: TrainingConfig) -> None:
    if config.bank_size < config.max_demonstrations:
        raise ConfigError(
            f"bank_size is {config.bank_size} and max_demonstrations is {config.max_demonstrations}; "
            "a bank needs at least as many rows as are shown"
        )
    for setting in ("turned_round", "several_tasks", "mismatched_demonstrations"):
        if getattr(config, setting):
            raise ConfigError(
                f"demonstration_source is 'bank' and {setting} is {getattr(config, setting)}, which needs "
                f"demonstrations from the batch; set {setting} to 0, or demonstration_source to batch"
            )
    for name, task in config.tasks.items():
        if task.sources:
            raise ConfigError(
                f"demonstration_source is 'bank' and tasks.{name}.sources is {task.sources}; a bank is of a whole "
                "file: set sources to 0, or demonstration_source to batch"
            )
