"""What an evaluation run is asked to do, and the small languages of its command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, get_args

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.errors import ConfigError
from epic_rag.evaluation.bm25 import BM25_NAME
from epic_rag.evaluation.heldout import Collection, InstructionSource
from epic_rag.evaluation.local_sets import KINDS, Kind
from epic_rag.task_vector import QueryStrategy, known_strategy

__all__ = [
    "COLLECTIONS",
    "INSTRUCTION_SOURCES",
    "EvaluationRequest",
    "ModelSpec",
    "parse_banks",
    "parse_choices",
    "parse_ks",
    "parse_models",
    "split_names",
]

Mode = Literal["auto", "plain", "prompted", "bm25"]
COLLECTIONS: tuple[Collection, ...] = get_args(Collection)
"""What held-out queries can be ranked in."""
INSTRUCTION_SOURCES: tuple[InstructionSource, ...] = get_args(InstructionSource)
"""Whose instruction held-out queries can get."""

_Choice = TypeVar("_Choice", bound=str)


@dataclass(frozen=True)
class ModelSpec:
    """A model to evaluate.

    Args:
        source: What `EpicEncoder.from_pretrained` takes.
        label: What tables call it.
        mode: "plain" encodes queries bare, at k = 0 alone: for models that were never trained with an
            instruction. "prompted" uses instructions. "auto" is plain for a model without a training record.
            "bm25" is no model but BM25, on sets of documents and held-out files alone.
    """

    source: str
    label: str
    mode: Mode = "auto"


@dataclass(frozen=True)
class EvaluationRequest:
    """One evaluation run.

    Args:
        models: At least one.
        data: Folder of evaluation sets; needed for local sets.
        tasks: Names of local sets, or of mteb's own tasks (downloaded from the hub). None takes all local
            sets.
        kinds: Kinds of sets that are evaluated; None for all.
        num_demonstrations: Values of k.
        strategy: How demonstrations are shown; None for each checkpoint's own way.
        instructions: Instructions by name of a set or held-out file, over the built-in ones.
        banks: Sources of demonstrations by set name, over the built-in ones.
        heldout: Files of training pairs that the models have not seen.
        heldout_queries: Test queries from each.
        heldout_documents: Documents from each.
        heldout_collections: What their queries are ranked in, each in turn.
        heldout_instructions: Whose instruction they get, each in turn.
        draws: Draws of demonstrations for each k > 0 on held-out files.
        controls: Also show shuffled and foreign demonstrations there.
        seed: Of all splits and draws.
        mteb_output: Folder for mteb's own result files; results found in it are not computed again.
        cache_dir: Folder for embeddings, reused by later runs.
        device: As in `EpicEncoder.from_pretrained`.
        dtype: As in `EpicEncoder.from_pretrained`.
        batch_size: As in `EpicEncoder.encode_query`.
        max_document_tokens: As in `EpicEncoder.from_pretrained`.
        command: The command line, for the record.

    Raises:
        ConfigError: A value cannot work.
        PromptError: There is no such strategy.
    """

    models: tuple[ModelSpec, ...]
    data: Path | None = None
    tasks: tuple[str, ...] | None = None
    kinds: tuple[Kind, ...] | None = None
    num_demonstrations: tuple[int, ...] = (0, 8)
    strategy: QueryStrategy | None = None
    instructions: Mapping[str, str] = field(default_factory=dict)
    banks: Mapping[str, str] = field(default_factory=dict)
    heldout: tuple[Path, ...] = ()
    heldout_queries: int = 1000
    heldout_documents: int = 5000
    heldout_collections: tuple[Collection, ...] = ("own",)
    heldout_instructions: tuple[InstructionSource, ...] = ("own",)
    draws: int = 3
    controls: bool = False
    seed: int = 0
    mteb_output: Path | None = None
    cache_dir: Path | None = None
    device: str | None = None
    dtype: str | None = None
    batch_size: int | None = None
    max_document_tokens: int | None = None
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("no model was named, an evaluation needs one; add --model MODEL")
        if not self.num_demonstrations or min(self.num_demonstrations) < 0:
            raise ConfigError(
                f"the numbers of demonstrations are {list(self.num_demonstrations)}; "
                "write e.g. --num-demonstrations 0,8"
            )
        if self.strategy is not None:
            known_strategy(self.strategy)
        parse_choices(self.heldout_collections, COLLECTIONS, "--heldout-collection")
        parse_choices(self.heldout_instructions, INSTRUCTION_SOURCES, "--heldout-instruction")
        if self.kinds is not None:
            parse_choices(self.kinds, KINDS, "--kinds")
        if self.draws < 1:
            raise ConfigError(f"{self.draws} draws of demonstrations were asked; use --draws 1 or more")
        if self.data is None and not self.tasks and not self.heldout:
            raise ConfigError("there is nothing to evaluate on; add --data FOLDER, --tasks NAME,... or --heldout FILE")

    def record(self) -> dict[str, object]:
        """The request as JSON values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("models", "command")}
        result: dict[str, object] = json.loads(json.dumps(values, default=str))
        return result


def parse_models(specs: Sequence[str]) -> tuple[ModelSpec, ...]:
    """Read `[LABEL=]MODEL[:plain|:prompted]` specifications; without any, the default checkpoint.

    The model `bm25` is BM25 (a folder of this name is `./bm25`). A label that is not given is the last part of
    the path, or all of it where two models would be called the same.

    Raises:
        ConfigError: A specification is empty, or two models have the same label.
    """
    read: list[tuple[str | None, str, Mode]] = []
    for spec in specs or (DEFAULT_CHECKPOINT,):
        label, equals, source = spec.partition("=")
        if not equals or "/" in label or Path(spec).exists():  # "=" may be a part of a path
            label, source = "", spec
        mode: Mode = "auto"
        if source.endswith(":plain"):
            mode, source = "plain", source.removesuffix(":plain")
        elif source.endswith(":prompted"):
            mode, source = "prompted", source.removesuffix(":prompted")
        elif source == BM25_NAME:
            mode = "bm25"
        if not source.strip():
            raise ConfigError(f'"{spec}" names no model; write [LABEL=]MODEL[:plain|:prompted]')
        read.append((label or None, source, mode))
    short = [label or Path(source).name or source for label, source, _ in read]
    labels = [
        name if label or short.count(name) == 1 else source
        for name, (label, source, _) in zip(short, read, strict=True)
    ]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"two models are called {twice}; give them labels: --model LABEL=MODEL")
    return tuple(ModelSpec(source, label, mode) for label, (_, source, mode) in zip(labels, read, strict=True))


def parse_ks(text: str) -> tuple[int, ...]:
    """Read a list of numbers of demonstrations such as "0,8"; sorted, each once.

    Raises:
        ConfigError: It is no such list.
    """
    try:
        values = sorted({int(part) for part in split_names(text)})
    except ValueError:
        values = []
    if not values or values[0] < 0:
        raise ConfigError(f'"{text}" is no list of numbers of demonstrations; write e.g. 0,8')
    return tuple(values)


def parse_banks(assignments: Sequence[str]) -> dict[str, str]:
    """Read `SET=SOURCE` assignments.

    Raises:
        ConfigError: One lacks a side.
    """
    banks = {}
    for assignment in assignments:
        name, _, source = assignment.partition("=")
        if not name or not source:
            raise ConfigError(f'"{assignment}" is no SET=SOURCE; write e.g. --bank Cranfield=papers')
        banks[name] = source
    return banks


def parse_choices(texts: Sequence[str], allowed: Sequence[_Choice], option: str) -> tuple[_Choice, ...]:
    """Read an option that names one or more of a few values, repeated or as comma-separated lists; each once.

    Args:
        texts: What was given, once or more.
        allowed: The values there are.
        option: The option's name, for the message.

    Raises:
        ConfigError: Nothing was named, or a value that there is not.
    """
    named = dict.fromkeys(name for text in texts for name in split_names(text))
    unknown = [name for name in named if name not in allowed]
    if unknown or not named:
        given = f'"{unknown[0]}"' if unknown else "nothing"
        raise ConfigError(f"{option} names {given}; use one or more of {', '.join(allowed)}")
    return tuple(value for name in named for value in allowed if value == name)


def split_names(text: str) -> tuple[str, ...]:
    """Split a comma-separated list; blanks around names mean nothing."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
