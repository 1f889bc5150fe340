"""Training configuration: one validated dataclass, read from YAML or JSON, saved with the weights.

pydantic checks types and ranges; `TrainingConfig._check` checks what settings demand of each other. docs/training.md
explains every setting. Names of earlier releases (`_RENAMED`) are read everywhere: in files, on the command line, in
training records and checkpoints.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from epic_rag.backbone import ProjectorKind
from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.errors import ConfigError, MissingExtraError
from epic_rag.query_prompt import QueryStrategy

__all__ = [
    "LAST_COMMIT_WITH_DELETED_SETTINGS",
    "TaskConfig",
    "TrainingConfig",
    "change_setting",
    "current_names",
    "deleted_settings",
    "first_problem",
    "list_recipes",
    "load_recipe",
    "recipe_values",
    "yaml_module",
]

LAST_COMMIT_WITH_DELETED_SETTINGS = "8891972"
"""The commit that can run configurations with the settings of `_DELETED`."""

_RECIPES = Path(__file__).parent / "recipes"

# Old name -> name.
_RENAMED = {
    "size_power": "sampling_alpha",
    "plain_steps": "zero_shot_steps",
    "generic_instruction": "generic_instruction_p",
    "no_instruction": "drop_instruction_p",
    "stop_after": "stop_at_step",
    "new_projector": "reset_projector",
    "warmup": "warmup_ratio",
}
_RENAMED_OF_TASK = {"sources": "sources_per_batch"}
# No ablation showed a gain of two standard errors for any of these (docs/results.md, "Ablations").
_DELETED = ("turned_round", "several_tasks", "mismatched_demonstrations")

_Count = Annotated[int, Field(ge=1, strict=True)]
_CountOrZero = Annotated[int, Field(ge=0, strict=True)]
_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Probability = Annotated[float, Field(ge=0, le=1)]
_Flag = Annotated[bool, Field(strict=True)]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=_STRICT)
class TaskConfig:
    """One task of the mix."""

    # Multiplies the task's share.
    weight: _Positive = 1.0
    # Instead of the instruction in instructions.json.
    instruction: str | None = None
    # Encode positives like queries.
    symmetric: _Flag = False
    # Split the task's part of a step into this many sources, each with demonstrations of its source; 0 ignores them.
    sources_per_batch: _CountOrZero = 0
    # Train on at most this many rows, drawn by the seed; None takes all.
    max_rows: _Count | None = None
    # Sources that are never trained on; the held-out rows of an evaluation task are drawn from them.
    held_out_sources: tuple[str, ...] = ()
    # False leaves a row only its own hard negatives: for tasks where most of a batch would be false negatives.
    in_batch_negatives: _Flag = True


def _task_settings(value: Any) -> Any:
    """Accept a list of names, and an empty value for a task without settings."""
    if isinstance(value, (list, tuple)):
        value = dict.fromkeys(value)
    if not isinstance(value, Mapping):
        return value
    return {str(name): {} if entry is None else entry for name, entry in value.items()}


@dataclass(frozen=True, config=_STRICT)
class TrainingConfig:
    """Settings of a training run with EPIC (arXiv 2605.01372).

    Raises:
        ConfigError: If a setting has a wrong type or value, or two of them cannot work together.

    Example:
        >>> config = TrainingConfig("epic-minilm", "runs/faq", "pairs", {"faq": TaskConfig(weight=2)}, steps=60)
        >>> config.batch_size, config.tasks["faq"].weight
        (64, 2.0)
    """

    # Backbone: a folder, a shipped checkpoint or a hub name.
    model: str
    # Folder of the run: checkpoints, metrics, the final model in `final/`.
    output: str
    # Folder of `<task>.jsonl[.gz]` files and instructions.json.
    data: str
    # The mix; every key is a file in `data`.
    tasks: Annotated[dict[str, TaskConfig], BeforeValidator(_task_settings)]
    name: str = "epic"

    # Batches and demonstrations
    steps: _CountOrZero = 1000
    # Stop here, as if it were the last step of the schedule: a first stage that another run continues.
    stop_at_step: _Count | None = None
    # Pairs in a step, over all its tasks and processes.
    batch_size: _Count = 64
    tasks_per_batch: _Count = 1
    # A task is drawn in proportion to weight * rows ** alpha.
    sampling_alpha: _NotNegative = 0.5
    # Rows of a task come in groups of this many lexical neighbours: harder in-batch negatives. 0 draws single rows.
    neighbours: _CountOrZero = 0
    # First steps without demonstrations, at half the cost.
    zero_shot_steps: _CountOrZero = 0
    # Demonstrations as vectors, as texts, or no demonstrations (plain contrastive training).
    strategy: Literal["epic", "text", "none"] = "epic"
    # The strategy that the checkpoint uses by default; None keeps that of `model`.
    query_strategy: QueryStrategy | None = None
    # K: each row draws k uniformly from 0..K.
    max_demonstrations: _CountOrZero = 8
    # Other rows of the batch, or a fixed bank of the task's rows.
    demonstration_source: Literal["batch", "bank"] = "batch"
    bank_size: _Count = 32
    # One instruction before all demonstrations, or one before each.
    demonstration_instructions: Literal["shared", "each"] = "shared"
    # Probability that a task's instruction is replaced by a generic one, or dropped.
    generic_instruction_p: _Probability = 0.0
    drop_instruction_p: _Probability = 0.0
    generic_instructions: tuple[str, ...] = (
        "Given a query, retrieve the passages that answer it",
        "Given a query, retrieve what belongs to it",
        "Given a text, find the text that goes with it",
        "Retrieve the text that matches the query",
    )
    # Between slots: the words of the prompt, or nothing.
    separators: Literal["words", "none"] = "words"
    max_query_tokens: _Count = 64
    max_document_tokens: _Count = 128

    # Loss
    contrastive_weight: _NotNegative = 1.0
    temperature: _Positive = 0.03
    zero_shot_weight: _NotNegative = 1.0
    # Weight of InfoNCE from documents to queries, beside that from queries to documents.
    reverse_weight: _NotNegative = 0.0
    # Stop gradients at the slots.
    detach_demonstrations: _Flag = False
    # Most hard negatives of a row in a step, drawn again in each; None for all.
    hard_negatives: _CountOrZero | None = None
    # In-batch documents whose zero-shot score exceeds the positive's minus this are not negatives; None counts all.
    false_negative_margin: float | None = None
    # Documents with at least this cosine to the positive are not negatives; None counts all.
    near_duplicate_cosine: float | None = None
    matryoshka_dims: tuple[_Count, ...] = ()
    # Encoder whose cosines or vectors are imitated.
    teacher: str | None = None
    teacher_weight: _NotNegative = 0.0
    teacher_loss: Literal["cosines", "vectors"] = "cosines"
    # After the last step, map the vectors linearly to the teacher's covariance.
    teacher_covariance: _Flag = False
    # Keep the vectors of the start on this many other texts in each step.
    retention_texts: _CountOrZero = 0
    retention_weight: _NotNegative = 1.0
    # Train weights of queries alone: documents keep theirs, and their vectors are computed once.
    freeze_documents: _Flag = False
    # Passages that a step takes as further negatives, with freeze_documents.
    document_negatives: _CountOrZero = 0
    # After the last step, interpolate the weights linearly towards those of the start by this share.
    interpolate_with_start: _Probability = 0.0
    # Interpolate with this encoder's weights instead of the start's.
    interpolation_model: str | None = None

    # Optimizer
    learning_rate: _Positive = 3e-5
    projector_learning_rate: _NotNegative = 3e-4
    token_learning_rate: _NotNegative | None = None
    # Each layer's rate is that of the layer behind it times this; the token embeddings are before the first.
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Freeze the token embeddings and the first layers: their number, or null to train all.
    frozen_layers: _CountOrZero | None = None
    warmup_ratio: _Probability = 0.1
    # Share of the steps at the end in which the rate falls to 0; 1 decays from the end of the warm-up on.
    decay_ratio: _Probability = 1.0
    # Exponential moving average of the weights, which is the result; 0 takes the last weights.
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: _NotNegative = 0.01
    max_grad_norm: _Positive = 1.0

    # Model
    pooling: Literal["last", "mean", "cls"] | None = None
    num_layers: _Count | None = None
    gguf_file: str | None = None
    output_dimension: _Count | None = None
    projector: ProjectorKind = "linear"
    reset_projector: _Flag = False
    attention: Literal["eager", "sdpa"] | None = None
    lora_rank: _Count | None = None
    lora_alpha: _Positive = 32.0
    lora_dropout: _Probability = 0.0
    lora_targets: tuple[str, ...] = ("all-linear",)

    # Machine
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    micro_batch_tokens: _Count = 8192
    grad_cache: _Flag = False
    gradient_checkpointing: _Flag = False
    seed: Annotated[int, Field(strict=True)] = 0
    save_every: _Count = 200
    keep_checkpoints: _Count = 2
    tensorboard: _Flag = False

    # Evaluation on held-out rows
    evaluate_every: _CountOrZero = 0
    evaluation_tasks: tuple[str, ...] = ()
    evaluation_rows: _CountOrZero = 200
    evaluation_demonstrations: tuple[_CountOrZero, ...] = (0, 8)
    # Each task's own instruction, or none.
    evaluation_instructions: Literal["own", "none"] = "own"

    # Written into the checkpoint
    inference_tokens: _Count | None = None
    default_instruction: str | None = None
    # Read texts of symmetric tasks and banks as documents, without the task's instruction.
    symmetric_as_documents: _Flag = False
    description: str = ""
    license: str = ""
    base_model: str = ""

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, values: Any, handler: Any) -> Any:
        try:
            return handler(values)
        except ValidationError as error:
            raise ConfigError(first_problem(error)) from None

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        problem = self._problem()
        if problem is not None:
            raise ConfigError(problem)
        return self

    def _problem(self) -> str | None:
        """Return the first conflict between settings, with its remedy."""
        if self.device is not None and "," in self.device:
            return (
                f"device is {self.device!r}, but a process trains on one device. Leave it out and start one process a "
                "device: torchrun --nproc-per-node=N -m epic_rag_cli train ..."
            )
        if not self.tasks:
            return "tasks is empty. Name at least one file of the data folder."
        if self.batch_size < 2 * self.tasks_per_batch:
            return (
                f"batch_size is {self.batch_size} for {self.tasks_per_batch} tasks in a batch. In-batch negatives need "
                "at least 2 pairs a task."
            )
        if self.generic_instruction_p + self.drop_instruction_p > 1:
            return (
                f"generic_instruction_p is {self.generic_instruction_p} and drop_instruction_p "
                f"{self.drop_instruction_p}. Their sum must be at most 1."
            )
        if self.generic_instruction_p and not self.generic_instructions:
            return (
                f"generic_instructions is empty and generic_instruction_p is {self.generic_instruction_p}. Give at "
                "least one instruction, or set the probability to 0."
            )
        for name, task in self.tasks.items():
            rows = self.batch_size // min(self.tasks_per_batch, len(self.tasks)) // max(1, task.sources_per_batch)
            if rows < 2:
                return (
                    f"tasks.{name}.sources_per_batch is {task.sources_per_batch}, which leaves {rows} of a step's "
                    f"{self.batch_size} pairs for each. In-batch negatives need at least 2: raise batch_size or lower "
                    "sources_per_batch."
                )
            if not task.in_batch_negatives and self.hard_negatives == 0:
                return (
                    f"tasks.{name}.in_batch_negatives is false and hard_negatives is 0, which leaves rows without "
                    "negatives. Set in_batch_negatives to true, or hard_negatives to null."
                )
            if self.demonstration_source == "bank" and task.sources_per_batch:
                return (
                    f"demonstration_source is 'bank' and tasks.{name}.sources_per_batch is {task.sources_per_batch}, "
                    "but a bank is drawn from a whole file. Set sources_per_batch to 0, or demonstration_source to "
                    "batch."
                )
        if self.demonstration_source == "bank" and self.bank_size < self.max_demonstrations:
            return (
                f"bank_size is {self.bank_size} and max_demonstrations {self.max_demonstrations}. Give bank_size at "
                "least the value of max_demonstrations."
            )
        if self.lora_rank is not None and not self.lora_targets:
            return f"lora_rank is {self.lora_rank} and lora_targets is empty. Name modules, or set it to [all-linear]."
        return self._teacher_problem() or self._interpolation_problem() or self._frozen_problem()

    def _teacher_problem(self) -> str | None:
        if self.teacher is None and self.teacher_weight:
            return f"teacher_weight is {self.teacher_weight} without a teacher. Name one, or set teacher_weight to 0."
        if self.teacher is not None and not self.teacher_weight:
            return f"teacher is {self.teacher!r} and teacher_weight is 0. Give a weight, or set teacher to null."
        if self.teacher_covariance and self.teacher is None:
            return "teacher_covariance is true without a teacher. Name one, or set it to false."
        if not self.steps and not self.teacher_covariance and self.interpolation_model is None:
            return "steps is 0, which trains nothing. Give a value of at least 1."
        if not self.contrastive_weight and self.teacher is None:
            return (
                "contrastive_weight is 0 without a teacher, which leaves nothing to learn from. Name a teacher, or "
                "give a weight above 0."
            )
        return None

    def _frozen_problem(self) -> str | None:
        if not self.freeze_documents:
            if self.document_negatives:
                return (
                    f"document_negatives is {self.document_negatives} and freeze_documents is false. Set the former to "
                    "0, or the latter to true."
                )
            return None
        for name, task in self.tasks.items():
            if task.symmetric:
                return (
                    f"tasks.{name}.symmetric is true and freeze_documents is true, but documents of a symmetric task "
                    "are queries, too. Remove the task, or set freeze_documents to false."
                )
        unfit = {
            "teacher": self.teacher is not None,
            "grad_cache": self.grad_cache,
            "demonstration_source: bank": self.demonstration_source == "bank",
            "reset_projector": self.reset_projector,
            "retention_texts": self.retention_texts > 0,
            "lora_rank": self.lora_rank is not None,
            "interpolation_model": self.interpolation_model is not None,
        }
        for name, is_set in unfit.items():
            if is_set:
                return f"freeze_documents does not work with {name}. Remove one of the two."
        return None

    def _interpolation_problem(self) -> str | None:
        if self.interpolation_model is not None and not self.interpolate_with_start:
            return (
                f"interpolation_model is {self.interpolation_model!r} and interpolate_with_start is 0. Give a share, "
                "or set interpolation_model to null."
            )
        # In these runs the result has weights that the start has not, or adapters instead of weights.
        for name in ("lora_rank", "output_dimension", "reset_projector", "teacher_covariance"):
            if self.interpolate_with_start and getattr(self, name):
                return (
                    f"interpolate_with_start is {self.interpolate_with_start} and {name} is {getattr(self, name)}, "
                    "so that start and result have different weights. Set one of the two to its default."
                )
        for name in ("retention_texts", "frozen_layers", "ema_decay"):
            if self.lora_rank is not None and getattr(self, name):
                return (
                    f"lora_rank is {self.lora_rank} and {name} is {getattr(self, name)}, which is for runs that train "
                    "the model's own weights. Set one of the two to its default."
                )
        return None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **overrides: Any) -> TrainingConfig:
        """Read a YAML or JSON file.

        Args:
            path: The file; relative folders in it start at the working directory.
            **overrides: Settings that replace the file's.

        Raises:
            ConfigError: If the file is missing or malformed, or a setting cannot work.
            MissingExtraError: If it is YAML and PyYAML is not installed.
        """
        return cls.from_dict({**current_names(_read_values(Path(path))), **overrides}, origin=str(path))

    @classmethod
    def from_dict(cls, data: Mapping[Any, Any], *, origin: str = "the configuration") -> TrainingConfig:
        """Build from plain values, as read from a file or a training record; names of earlier releases are accepted.

        Raises:
            ConfigError: If a setting is missing, unknown or cannot work; the message starts with `origin`.
        """
        values = current_names(data, origin=origin)
        required = [item.name for item in fields(cls) if item.default is MISSING]
        missing = sorted(set(required) - set(values))
        if missing:
            raise ConfigError(f"{origin} does not set {', '.join(missing)}. Add it, or pass --set NAME=VALUE.")
        try:
            return TypeAdapter(cls).validate_python(values)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def current_names(values: Mapping[Any, Any], *, origin: str = "the configuration") -> dict[str, Any]:
    """Return plain values of a run with the settings of earlier releases under their current names.

    Raises:
        ConfigError: If a setting that was deleted is in use.
    """
    for name in deleted_settings(values):
        raise ConfigError(
            f"{origin} sets {name}, which was deleted. Set it to 0, or run this configuration with commit "
            f"{LAST_COMMIT_WITH_DELETED_SETTINGS} of epic-rag."
        )
    result: dict[str, Any] = {
        _RENAMED.get(name, str(name)): value
        for name, value in values.items()
        if name not in _DELETED and name != "mismatched_weight"
    }
    tasks = result.get("tasks")
    if isinstance(tasks, Mapping):
        result["tasks"] = {
            name: {_RENAMED_OF_TASK.get(key, key): value for key, value in entry.items()}
            if isinstance(entry, Mapping)
            else entry
            for name, entry in tasks.items()
        }
    return result


def deleted_settings(values: Mapping[Any, Any]) -> list[str]:
    """Return the settings of earlier releases that plain values use and that were deleted."""
    return [name for name in _DELETED if values.get(name)]


def list_recipes() -> list[str]:
    """Return the names of the configurations that ship with the package, sorted."""
    return sorted(file.stem for file in _RECIPES.glob("*.yaml"))


def load_recipe(
    name_or_path: str,
    settings: Sequence[str] = (),
    *,
    output: str | None = None,
    default_model: str = DEFAULT_CHECKPOINT,
) -> TrainingConfig:
    """Read a configuration and apply overrides.

    Args:
        name_or_path: A YAML or JSON file, or the name of a shipped recipe. A file takes precedence.
        settings: Overrides such as "steps=100" or "tasks.faq.weight=2"; values are read as YAML.
        output: Replaces the run's folder.
        default_model: The backbone where the configuration names none.

    Raises:
        ConfigError: If the file or recipe does not exist, or a setting cannot work.
        MissingExtraError: If PyYAML is needed and not installed.
    """
    values = recipe_values(name_or_path)
    model = values.get("model")
    for setting in settings:
        change_setting(values, setting)
    if model is not None and not _is_copy_of(model, values):
        # What the file says of its own model is not true of another one.
        for name in {"base_model", "license"} - {setting.partition("=")[0].strip() for setting in settings}:
            values.pop(name, None)
    values.setdefault("model", default_model)
    if output is not None:
        values["output"] = output
    return TrainingConfig.from_dict(values, origin=name_or_path)


def _is_copy_of(model: object, values: Mapping[str, Any]) -> bool:
    """Return whether the model of a run has the name of another one, as a folder with a copy of it has."""
    name = str(model).rstrip("/").rpartition("/")[2]
    given = str(values.get("model")).rstrip("/").rpartition("/")[2]
    return given == name or str(values.get("gguf_file") or "").startswith(name)


def recipe_values(name_or_path: str) -> dict[str, Any]:
    """Read the plain values of a configuration, unchecked but for deleted settings.

    Args:
        name_or_path: A YAML or JSON file, or the name of a shipped recipe. A file takes precedence.

    Raises:
        ConfigError: If the file or recipe does not exist.
        MissingExtraError: If PyYAML is needed and not installed.
    """
    file = Path(name_or_path).expanduser()
    if not file.is_file():
        known = list_recipes()
        if name_or_path not in known:
            raise ConfigError(
                f"No file or recipe {name_or_path}. Pass a YAML or JSON file, or one of the recipes {', '.join(known)}."
            )
        file = _RECIPES / f"{name_or_path}.yaml"
    return current_names(_read_values(file), origin=name_or_path)


def change_setting(values: dict[str, Any], setting: str) -> None:
    """Apply an override such as "steps=100" or "tasks.faq.weight=2" to plain values.

    Raises:
        ConfigError: If the setting does not exist, or its value is not YAML.
    """
    name, equals, text = setting.partition("=")
    path = name.strip().split(".")
    path[0] = _RENAMED.get(path[0], path[0])
    # A task's name may contain dots.
    path = [path[0], ".".join(path[1:-1]), _RENAMED_OF_TASK.get(path[-1], path[-1])] if len(path) > 2 else path
    known = [item.name for item in fields(TrainingConfig)]
    if not equals or path[0] not in known or (len(path) > 1 and (path[0] != "tasks" or len(path) != 3)):
        raise ConfigError(
            f"The setting {setting!r} is not NAME=VALUE or tasks.TASK.NAME=VALUE. Names are {', '.join(known)}."
        )
    yaml = yaml_module()
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The setting {setting!r} has a value that is not valid YAML. Quote it.") from error
    if len(path) == 1:
        values[path[0]] = value
        return
    tasks = _task_settings(values.get("tasks") or {})
    tasks[path[1]] = {**tasks.get(path[1], {}), path[2]: value}
    values["tasks"] = tasks


def yaml_module() -> types.ModuleType:
    """Import PyYAML.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("PyYAML", "train", "reading a YAML configuration") from error
    return yaml


def _read_values(file: Path) -> dict[Any, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}). Pass a training configuration.") from error
    if file.suffix == ".json":
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}:{error.lineno} is not valid JSON ({error.msg}). Correct the line.") from error
    else:
        yaml = yaml_module()
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark is not None else ""
            raise ConfigError(f"{file}{line} is not valid YAML. Correct the line.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds a {type(data).__name__}, not names and values. See docs/training.md.")
    return data


def first_problem(error: ValidationError) -> str:
    """Return pydantic's first complaint as a fact and a remedy."""
    found = error.errors()[0]
    name = ".".join(str(part) for part in found["loc"])
    if found["type"] == "unexpected_keyword_argument":
        of_task = found["loc"][0] == "tasks"
        known = ", ".join(item.name for item in fields(TaskConfig if of_task else TrainingConfig))
        return f"No setting {name}. Known settings are {known}."
    remedy = found["msg"].replace("Input should be", "It must be").replace("valid tuple", "list")
    return f"{name} is {found['input']!r}. {remedy}."
