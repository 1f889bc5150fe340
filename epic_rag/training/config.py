"""What a training run is made of: one dataclass, read from YAML or JSON, saved with the weights."""

from __future__ import annotations

import json
import math
import os
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from epic_rag.backbone import PROJECTORS
from epic_rag.errors import ConfigError, MissingExtraError
from epic_rag.prompt import STRATEGIES

__all__ = ["TaskConfig", "TrainingConfig", "read_values", "yaml_module"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "strategy": STRATEGIES,
    "projector": PROJECTORS,
    "separators": ("words", "none"),
    "dtype": ("float32", "bfloat16"),
}
_AT_LEAST_ONE = (
    *("steps", "batch_size", "tasks_per_batch", "save_every", "keep_checkpoints", "num_layers"),
    *("stop_after", "max_query_tokens", "max_document_tokens", "inference_tokens", "micro_batch_tokens"),
)
_ABOVE_ZERO = ("temperature", "learning_rate", "max_grad_norm")
_NOT_NEGATIVE = (
    *("size_power", "max_demonstrations", "zero_shot_weight", "projector_learning_rate", "weight_decay"),
    *("evaluate_every", "evaluation_rows", "generic_instruction", "no_instruction"),
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
    """

    weight: float = 1.0
    instruction: str | None = None
    symmetric: bool = False
    sources: int = 0

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ConfigError(f"weight is {self.weight}; give a task a value above 0, or leave it out of tasks")
        if self.sources < 0:
            raise ConfigError(f"sources is {self.sources}; give a task 0 (its rows as one) or more")


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
        strategy: "epic" (slots), "text" (demonstrations as text) or "none" (plain contrastive training).
        max_demonstrations: K: rows draw k uniformly from 0..K.
        zero_shot_weight: w, the weight of the zero-shot term.
        detach_demonstrations: Cut gradients through the slots.
        projector: "scale", "linear" or "mlp".
        separators: "words" or "none" between slots.
        generic_instruction: Share of a step's tasks whose instruction is replaced by a generic one.
        no_instruction: Share of a step's tasks that get no instruction at all.
        turned_round: Share of a step's tasks whose pairs are turned round (passage as query, query as passage), under
            a generic instruction or none. Symmetric and label-like tasks are left as they are.
        stop_after: Stop after this many steps of the schedule, as if it were the last; None for never. For a first
            stage whose learning rate another stage goes on from.
        temperature: Of the softmax in InfoNCE.
        learning_rate: Peak of the linear warm-up, linear decay schedule.
        projector_learning_rate: The projector's own peak; it starts from the identity and has further to go.
        warmup: Share of the steps.
        weight_decay: Of AdamW.
        max_grad_norm: Gradient clipping.
        max_query_tokens: Training length of queries.
        max_document_tokens: Training length of documents.
        inference_tokens: Length limit that is written into the checkpoint; None keeps the backbone's.
        micro_batch_tokens: Most padded tokens in one forward pass.
        num_layers: Keep the first N layers of the backbone.
        gguf_file: GGUF file in the backbone's folder.
        dtype: "float32", or "bfloat16" for autocast.
        device: None takes a GPU if there is one.
        seed: Of data order, demonstrations and dropout.
        evaluate_every: Steps between evaluations on held-out rows, the first before any step; 0 for never.
        evaluation_rows: Held-out rows of each evaluated task.
        evaluation_tasks: Tasks that are evaluated; files that are not in `tasks` are tasks never trained on.
        evaluation_demonstrations: Values of k that are evaluated.
        save_every: Steps between checkpoints.
        keep_checkpoints: How many are kept.
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
    strategy: str = "epic"
    max_demonstrations: int = 8
    zero_shot_weight: float = 1.0
    detach_demonstrations: bool = False
    projector: str = "linear"
    separators: str = "words"
    generic_instruction: float = 0.0
    no_instruction: float = 0.0
    turned_round: float = 0.0
    stop_after: int | None = None
    temperature: float = 0.03
    learning_rate: float = 3e-5
    projector_learning_rate: float = 3e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_query_tokens: int = 64
    max_document_tokens: int = 128
    inference_tokens: int | None = None
    micro_batch_tokens: int = 8192
    num_layers: int | None = None
    gguf_file: str | None = None
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    evaluate_every: int = 0
    evaluation_rows: int = 200
    evaluation_tasks: tuple[str, ...] = ()
    evaluation_demonstrations: tuple[int, ...] = (0, 8)
    save_every: int = 200
    keep_checkpoints: int = 2
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
        self._check_ranges()
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, known are {', '.join(known)}; choose one of them"
                )
        if not self.tasks:
            raise ConfigError("tasks is empty; name at least one file of the data folder")
        if self.batch_size < 2 * self.tasks_per_batch:
            raise ConfigError(
                f"batch_size is {self.batch_size} for {self.tasks_per_batch} tasks in a batch; "
                "in-batch negatives need at least 2 pairs a task"
            )
        if not 0 <= self.generic_instruction + self.no_instruction <= 1:
            raise ConfigError(
                f"generic_instruction is {self.generic_instruction} and no_instruction {self.no_instruction}; "
                "together they are at most 1"
            )
        if (self.generic_instruction or self.turned_round) and not self.generic_instructions:
            raise ConfigError(
                f"generic_instruction is {self.generic_instruction}, turned_round {self.turned_round}, and "
                "generic_instructions is empty; give at least one, or set both to 0"
            )
        for name, task in self.tasks.items():
            rows = self.batch_size // min(self.tasks_per_batch, len(self.tasks)) // max(1, task.sources)
            if rows < 2:
                raise ConfigError(
                    f"tasks.{name}.sources is {task.sources}, which leaves {rows} of a step's {self.batch_size} pairs "
                    "for each; in-batch negatives need at least 2: raise batch_size or lower sources"
                )

    def _check_ranges(self) -> None:
        for names, lowest, words in (
            (_AT_LEAST_ONE, 1, "at least 1"),
            (_ABOVE_ZERO, math.ulp(0.0), "above 0"),
            (_NOT_NEGATIVE, 0, "of 0 or more"),
        ):
            for name in names:
                value = getattr(self, name)
                # Written so that nan fails, too.
                if value is not None and not lowest <= value < math.inf:
                    raise ConfigError(f"{name} is {value}; give a value {words}")
        for name in ("warmup", "turned_round"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a share, from 0 to 1")
        if any(k < 0 for k in self.evaluation_demonstrations):
            raise ConfigError(
                f"evaluation_demonstrations is {list(self.evaluation_demonstrations)}; give numbers of 0 or more"
            )

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
            return cls(**_coerced(cls, values), tasks=_tasks(data["tasks"]))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{origin} does not make a training run: {error}; see docs/training.md") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


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


def _parse_yaml(text: str, file: Path) -> Any:
    yaml = yaml_module()
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{file}{line} is not valid YAML; mend the line") from error


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
                entry if isinstance(entry, TaskConfig) else TaskConfig(**_coerced(TaskConfig, entry or {}))
            )
        except (TypeError, ConfigError) as error:
            raise TypeError(f"tasks.{name}: {error}") from error
    return tasks


def _coerced(cls: type[TaskConfig] | type[TrainingConfig], data: dict[str, Any]) -> dict[str, Any]:
    """Values of the types that the fields have; a TypeError names the field."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(str(name) for name in data if name not in hints)
    if unknown:
        raise TypeError(f"there is no {', '.join(unknown)}; known are {', '.join(hints)}")
    return {name: _value(name, value, hints[name]) for name, value in data.items()}


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


_WORDS = {int: "a whole number", str: "a text", bool: "true or false"}
