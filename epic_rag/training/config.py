"""What a training run is made of: one dataclass, read from YAML or JSON, saved with the weights."""

from __future__ import annotations

import json
import math
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from epic_rag.backbone import POOLINGS, PROJECTORS
from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.errors import ConfigError, MissingExtraError
from epic_rag.prompt import STRATEGIES
from epic_rag.query_prompt import QUERY_STRATEGIES

__all__ = [
    "TaskConfig",
    "TrainingConfig",
    "change_setting",
    "check_run",
    "check_task",
    "coerced",
    "list_recipes",
    "load_recipe",
    "read_values",
    "recipe_values",
    "yaml_module",
]


# --- from _values
# Plain values of a configuration: read from YAML or JSON, given the types that the fields have.


def read_values(file: Path) -> dict[str, Any]:
    """Read a YAML or JSON file of settings, which are not checked.

    Raises:
        ConfigError: If the file is missing or malformed.
        MissingExtraError: If it is YAML and PyYAML is not installed.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); pass a training configuration") from error
    if file.suffix == ".json":
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}:{error.lineno} is not valid JSON ({error.msg}); mend the line") from error
    else:
        data = _parse_yaml(text, file)
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds a {type(data).__name__}, expected names and values; see docs/training.md")
    return data


def yaml_module() -> types.ModuleType:
    """PyYAML.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("PyYAML", "train", "reading a YAML configuration") from error
    return yaml


def coerced(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    """Values of the types that a dataclass's fields have.

    Raises:
        TypeError: If there is no such field, or its type is another; names the field.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(str(name) for name in data if name not in hints)
    if unknown:
        raise TypeError(f"there is no {', '.join(unknown)}; known are {', '.join(hints)}")
    return {name: _value(name, value, hints[name]) for name, value in data.items()}


def _parse_yaml(text: str, file: Path) -> Any:
    yaml = yaml_module()
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{file}{line} is not valid YAML; mend the line") from error


_WORDS = {int: "a whole number", str: "a text", bool: "true or false"}


def _value(name: str, value: Any, hint: Any) -> Any:
    """YAML reads 3e-5 as a string and a list for a tuple; everything else must have its type already."""
    inner = typing.get_args(hint)
    if type(None) in inner:
        return None if value is None else _value(name, value, inner[0])
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} is {value!r}, expected a list")
        return tuple(_value(name, item, inner[0]) for item in value)
    if hint is float and type(value) in (int, float, str):
        try:
            return float(value)
        except ValueError:
            raise TypeError(f"{name} is {value!r}, expected a number") from None
    if hint in (int, str, bool) and type(value) is not hint:
        raise TypeError(f"{name} is {value!r}, expected {_WORDS[hint]}")
    return value


# --- from _checks
# What the settings of a run must be, one by one and together. Every message names both facts and the remedy.

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


# --- from recipe
# Configurations by name or file, and settings from a command line.

_RECIPES = Path(__file__).parent / "recipes"


def list_recipes() -> list[str]:
    """Names of the configurations that ship with the package, sorted."""
    return sorted(file.stem for file in _RECIPES.glob("*.yaml"))


def load_recipe(
    name_or_path: str,
    settings: Sequence[str] = (),
    *,
    output: str | None = None,
    default_model: str = DEFAULT_CHECKPOINT,
) -> TrainingConfig:
    """Read a configuration.

    Args:
        name_or_path: A YAML or JSON file, or the name of a shipped recipe. A file wins.
        settings: Overrides such as "steps=100" or "tasks.faq.weight=2"; values are read as YAML.
        output: Replaces the run's folder.
        default_model: The backbone where the configuration names none.

    Raises:
        ConfigError: If there is no such file or recipe, or a setting cannot work.
        MissingExtraError: If PyYAML is needed and not installed.
    """
    values = recipe_values(name_or_path)
    for setting in settings:
        change_setting(values, setting)
    values.setdefault("model", default_model)
    if output is not None:
        values["output"] = output
    return TrainingConfig.from_dict(values, origin=name_or_path)


def recipe_values(name_or_path: str) -> dict[str, Any]:
    """Read the plain values of a configuration, which are not checked.

    Args:
        name_or_path: A YAML or JSON file, or the name of a shipped recipe. A file wins.

    Raises:
        ConfigError: If there is no such file or recipe.
        MissingExtraError: If PyYAML is needed and not installed.
    """
    file = Path(name_or_path).expanduser()
    if not file.is_file():
        known = list_recipes()
        if name_or_path not in known:
            raise ConfigError(
                f"no file {name_or_path}, and the recipes are {', '.join(known)}; "
                "pass a YAML or JSON file, or one of them"
            )
        file = _RECIPES / f"{name_or_path}.yaml"
    return read_values(file)


def change_setting(values: dict[str, Any], setting: str) -> None:
    """Put a setting such as "steps=100" or "tasks.faq.weight=2" into plain values.

    Raises:
        ConfigError: If there is no such setting, or its value is no YAML.
    """
    name, equals, text = setting.partition("=")
    path = name.strip().split(".")
    # A name of a task may have dots of its own.
    path = [path[0], ".".join(path[1:-1]), path[-1]] if len(path) > 2 else path
    known = [item.name for item in fields(TrainingConfig)]
    if not equals or path[0] not in known or (len(path) > 1 and (path[0] != "tasks" or len(path) != 3)):
        raise ConfigError(
            f"the setting {setting!r} is not NAME=VALUE or tasks.TASK.NAME=VALUE; names are {', '.join(known)}"
        )
    yaml = yaml_module()
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the setting {setting!r} has a value that is not valid YAML; put it in quotes") from error
    if len(path) == 1:
        values[path[0]] = value
        return
    tasks = values.get("tasks") or {}
    tasks = dict.fromkeys(tasks) if isinstance(tasks, list) else dict(tasks)
    tasks[path[1]] = {**(tasks.get(path[1]) or {}), path[2]: value}
    values["tasks"] = tasks
