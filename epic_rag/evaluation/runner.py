"""The way of an evaluation run: models, sets and held-out files in, one report out."""

from __future__ import annotations

import datetime
import json
import logging
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, get_args

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.demonstrations import Demonstration, DemonstrationBank
from epic_rag.errors import ConfigError, DataError, MissingExtraError, PromptError
from epic_rag.evaluation.bm25 import BM25_NAME, bm25_fingerprint, require_bm25
from epic_rag.evaluation.datasets import (
    KINDS,
    SYMMETRIC_PAIRS,
    TRAIN_LABELS,
    TRAIN_PAIRS,
    ClassificationData,
    Kind,
    LocalSet,
    SetEntry,
    entry_for,
    find_local_sets,
    load_local_set,
    normalised,
    set_kind,
)
from epic_rag.evaluation.embedding import EmbeddingStore, QueryPrompt
from epic_rag.evaluation.heldout import (
    Collection,
    HeldoutResult,
    HeldoutSplit,
    InstructionSource,
    Pair,
    file_stem,
    in_collection,
    make_split,
    score_heldout,
    score_heldout_bm25,
    with_instruction,
)
from epic_rag.evaluation.report import EvaluationReport, ModelRecord, SetScore
from epic_rag.query_prompt import QueryPrompt as _QueryPrompt
from epic_rag.query_prompt import QueryStrategy

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from epic_rag.encoder import EpicEncoder

__all__ = [
    "COLLECTIONS",
    "INSTRUCTION_SOURCES",
    "Bm25Scorer",
    "EncoderScorer",
    "EvaluationRequest",
    "ModelSpec",
    "PlannedSet",
    "PromptPlan",
    "Scorer",
    "load_demonstrations",
    "load_scorer",
    "parse_banks",
    "parse_choices",
    "parse_ks",
    "parse_models",
    "plan_prompts",
    "plan_sets",
    "run_evaluation",
    "split_names",
    "training_demonstrations",
]


# --- from prompts
# The prompt of each evaluation set: its instruction, and demonstrations that are none of its test texts.


@dataclass(frozen=True)
class PromptPlan:
    """A set's instruction and its demonstrations, from which every k takes the first k.

    Args:
        instruction: The task in words.
        source: Where the demonstrations come from, as the report names it; None when there are none.
        demonstrations: In the order in which they are used up.
        symmetric: Whether their passages are encoded like queries.
    """

    instruction: str
    source: str | None = None
    demonstrations: tuple[Demonstration, ...] = ()
    symmetric: bool = False

    def prompt(self, k: int, *, plain: bool = False, strategy: QueryStrategy = "epic") -> QueryPrompt:
        """Return the prompt with the first k demonstrations.

        Args:
            k: Number of demonstrations.
            plain: Leave the instruction out too (for models that were never trained with one).
            strategy: How demonstrations are shown.

        Raises:
            PromptError: There are fewer than k demonstrations, or `plain` and k > 0 are asked together.
        """
        if plain and k:
            raise PromptError(f"a plain model has no prompt, {k} demonstrations were asked; use k = 0 for it")
        if k > len(self.demonstrations):
            raise PromptError(
                f"{k} demonstrations were asked, {self.source or 'this set'} has {len(self.demonstrations)}; "
                "lower --num-demonstrations, or name a larger source with --bank SET=SOURCE"
            )
        if plain:
            return QueryPrompt()
        return QueryPrompt(self.instruction, self.demonstrations[:k], self.symmetric, strategy)


def training_demonstrations(
    data: ClassificationData, *, labels: bool, count: int, seed: int = 0
) -> tuple[Demonstration, ...]:
    """Draw demonstrations from a classification set's training split, one label after the other.

    Args:
        data: The set. Training texts that are also test texts are left out.
        labels: Show a text with its label's name; otherwise with another text of the same label.
        count: How many at most.
        seed: Of the draw.

    Returns:
        At most `count` demonstrations, the first ones with labels as different as possible.
    """
    test = {normalised(text) for text in data.test_texts}
    by_label: dict[int, list[str]] = {}
    for text, label in data.train:
        if text.strip() and normalised(text) not in test:
            by_label.setdefault(label, []).append(text)
    rng = random.Random(seed)
    order = sorted(by_label)
    rng.shuffle(order)
    for texts in by_label.values():
        rng.shuffle(texts)
    drawn: list[Demonstration] = []
    needed = 1 if labels else 2
    while len(drawn) < count and any(len(by_label[label]) >= needed for label in order):
        for label in order:
            texts = by_label[label]
            if len(texts) >= needed and len(drawn) < count:
                query = texts.pop()
                drawn.append(Demonstration(query, data.label_names[label] if labels else texts.pop()))
    return tuple(drawn)


def load_demonstrations(source: str, local_set: LocalSet | None, *, count: int, seed: int = 0) -> PromptPlan:
    """Return the demonstrations that a source names, with the instruction that came with them or "".

    Args:
        source: A built-in bank's name, a bank folder, a JSONL file, `train` or `train-labels`.
        local_set: The set they are for; needed for `train` and `train-labels`.
        count: How many are needed at most (only drawn sources look at it).
        seed: Of a draw from a training split.

    Raises:
        DataError: `train` was asked of a set without a training split.
    """
    if source in (TRAIN_PAIRS, TRAIN_LABELS):
        if local_set is None or not isinstance(local_set.data, ClassificationData):
            name = local_set.name if local_set else "a set of the hub"
            raise DataError(
                f'demonstrations from "{source}" were asked for {name}, which has no training split here; '
                f"name a bank with --bank {name}=BANK"
            )
        drawn = training_demonstrations(local_set.data, labels=source == TRAIN_LABELS, count=count, seed=seed)
        # Texts of one class stand on the same side; a label's name is the passage that a text asks for.
        return PromptPlan("", f"{local_set.name}/{source}", drawn, symmetric=source == TRAIN_PAIRS)
    path = Path(source)
    bank = DemonstrationBank.from_jsonl(path) if path.is_file() else DemonstrationBank.load(source)
    return PromptPlan(bank.instruction or "", source, bank.demonstrations, bank.symmetric)


def plan_prompts(
    local_set: LocalSet,
    entry: SetEntry,
    *,
    max_k: int,
    instructions: Mapping[str, str] | None = None,
    banks: Mapping[str, str] | None = None,
    seed: int = 0,
) -> PromptPlan:
    """Settle a local set's instruction and demonstrations.

    Args:
        local_set: The set.
        entry: Its entry in the catalogue.
        max_k: The most demonstrations that will be asked for; with 0 no source is opened.
        instructions: Instructions by set name that take precedence over the catalogue's.
        banks: Sources by set name that take precedence over the catalogue's.
        seed: Of a draw from a training split.

    Raises:
        DataError: A demonstration is one of the set's test texts.
    """
    instruction = (instructions or {}).get(local_set.name, entry.instruction)
    source = (banks or {}).get(local_set.name, entry.demonstrations)
    if max_k == 0 or source is None:
        return PromptPlan(instruction)
    found = load_demonstrations(source, local_set, count=max_k, seed=seed)
    test = {normalised(text) for text in local_set.data.test_texts}
    for demonstration in found.demonstrations:
        for text in (demonstration.query, demonstration.passage):
            if normalised(text) in test:
                raise DataError(
                    f'"{text}" is a demonstration of {found.source} and a test text of {local_set.name}, '
                    f"its score would mean nothing; name another source: --bank {local_set.name}=SOURCE"
                )
    return replace(found, instruction=instruction)


# --- from request
# What an evaluation run is asked to do, and the small languages of its command line.

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
            _QueryPrompt(strategy=self.strategy)
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


# --- from set_plans
# Which evaluation sets a run scores, and the prompt of each; read and checked before any model is loaded.

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedSet:
    """An evaluation set that is ready to run.

    Args:
        name: The set.
        kind: What is measured.
        local: Its contents; None for a task of the hub.
        plan: Its instruction and demonstrations.
    """

    name: str
    kind: str
    local: LocalSet | None
    plan: PromptPlan


def plan_sets(request: EvaluationRequest) -> list[PlannedSet]:
    """Read the sets of a request and settle their prompts.

    Returns:
        Sets that were named, in this order; otherwise all of the folder, in the order of `find_local_sets`.

    Raises:
        DataError: There is no set, none of the wanted kinds, or a file is malformed.
        MissingExtraError: mteb is missing.
        PromptError: A set has fewer demonstrations than were asked.
        TaskError: A name is neither a local set nor a task of mteb.
    """
    available = find_local_sets(request.data) if request.data is not None else []
    names = available if request.tasks is None else list(dict.fromkeys(request.tasks))
    if request.tasks is None and request.data is not None and not available:
        raise DataError(f"{request.data} holds no evaluation set; give --data the folder that holds the sets' folders")
    if names:
        _require_mteb()
    planned = []
    for name in names:
        folder = request.data / name if request.data is not None and name in available else None
        item = _plan_hub_task(name, request) if folder is None else _plan_local_set(folder, request)
        if item is not None:
            planned.append(item)
    if names and not planned:
        raise DataError(
            f"none of {', '.join(names)} is of the kinds {', '.join(request.kinds or ())}; "
            "name others with --kinds or --tasks"
        )
    _check_demonstrations(planned, max(request.num_demonstrations))
    return planned


def _check_demonstrations(planned: Sequence[PlannedSet], max_k: int) -> None:
    for item in planned:
        if item.plan.source is None and max_k > 0:
            logger.warning(
                "%s has no demonstrations to show and is scored at k = 0 alone; --bank %s=SOURCE names some",
                item.name,
                item.name,
            )
        elif item.plan.source is not None:
            item.plan.prompt(max_k)  # says now, and not in an hour, that there are too few


def _plan_local_set(folder: Path, request: EvaluationRequest) -> PlannedSet | None:
    """A folder's plan; None for one of a kind that is not wanted, which is not read."""
    if request.kinds is not None and set_kind(folder) not in request.kinds:
        return None
    local = load_local_set(folder)
    plan = plan_prompts(
        local,
        entry_for(local.name, local.kind),
        max_k=max(request.num_demonstrations),
        instructions=request.instructions,
        banks=request.banks,
        seed=request.seed,
    )
    return PlannedSet(local.name, local.kind, local, plan)


def _plan_hub_task(name: str, request: EvaluationRequest) -> PlannedSet | None:
    from epic_rag.evaluation.mteb import hub_instruction, hub_task

    task = hub_task(name)
    kind = task.metadata.type.lower()
    if request.kinds is not None and kind not in request.kinds:
        return None
    instruction = request.instructions.get(name) or hub_instruction(task)
    plan = PromptPlan(instruction)
    max_k = max(request.num_demonstrations)
    if name in request.banks and max_k > 0:
        found = load_demonstrations(request.banks[name], None, count=max_k, seed=request.seed)
        plan = PromptPlan(instruction, found.source, found.demonstrations, found.symmetric)
    return PlannedSet(name, kind, None, plan)


def _require_mteb() -> None:
    try:
        import mteb  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("mteb", "eval", "evaluating on retrieval, STS and other sets") from error


# --- from scorers
# What is evaluated: an encoder, or BM25. Both score planned sets and held-out splits.


class Scorer(Protocol):
    """Something that a run evaluates."""

    @property
    def record(self) -> ModelRecord:
        """How the report describes it."""

    def values_of_k(self, item: PlannedSet) -> list[int]:
        """The numbers of demonstrations at which it can be scored on a set; none for a set it cannot do."""

    def score_set(self, item: PlannedSet, k: int) -> SetScore:
        """Score it on a set with k demonstrations."""

    def score_split(self, split: HeldoutSplit, foreign_pool: Sequence[Pair] | None) -> list[HeldoutResult]:
        """Score it on held-out pairs, with every instruction that was asked for."""


class EncoderScorer:
    """An encoder, its vectors remembered.

    Args:
        encoder: The model.
        spec: What was asked for.
        request: The run.
        plain: Whether its queries go bare.
    """

    def __init__(self, encoder: EpicEncoder, spec: ModelSpec, request: EvaluationRequest, plain: bool) -> None:
        self._strategy = request.strategy or encoder.strategy
        self.record = ModelRecord(
            label=spec.label,
            source=spec.source,
            fingerprint=encoder.fingerprint,
            dimension=encoder.dimension,
            plain=plain,
            max_query_tokens=encoder.max_query_tokens,
            max_document_tokens=encoder.max_document_tokens,
            device=",".join(map(str, encoder.devices)),
            dtype=str(encoder.dtype).removeprefix("torch."),
            strategy=self._strategy,
        )
        self._default_instruction = encoder.default_instruction
        self._request = request
        self._plain = plain
        self._store = EmbeddingStore(
            encoder,
            folder=request.cache_dir,
            precision=self.record.dtype,
            batch_size=request.batch_size,
            show_progress=sys.stderr.isatty(),
        )

    def values_of_k(self, item: PlannedSet) -> list[int]:
        """K = 0 alone for a plain model and for a set without demonstrations."""
        if self._plain:
            return [0]
        return [k for k in self._request.num_demonstrations if k == 0 or item.plan.source is not None]

    def score_set(self, item: PlannedSet, k: int) -> SetScore:
        """Score the model on a set with its first k demonstrations."""
        from epic_rag.evaluation.mteb import run_task

        started = time.monotonic()
        task = _new_task(item)
        prompt = item.plan.prompt(k, plain=self._plain, strategy=self._strategy)
        score, numbers = run_task(
            task, self._store, prompt, model_name=self.record.label, output=self._request.mteb_output
        )
        return SetScore(
            model=self.record.label,
            set_name=item.name,
            kind=item.kind,
            revision=str(task.metadata.revision),
            metric=task.metadata.main_score,
            k=k,
            score=score,
            instruction=prompt.instruction,
            demonstrations=item.plan.source if k else None,
            prompt=prompt.fingerprint,
            scores=numbers,
            seconds=time.monotonic() - started,
        )

    def score_split(self, split: HeldoutSplit, foreign_pool: Sequence[Pair] | None) -> list[HeldoutResult]:
        """Score the model with each instruction; a plain model has one result, because it gets none."""
        request = self._request
        sources = request.heldout_instructions[:1] if self._plain else request.heldout_instructions
        return [
            score_heldout(
                self._store,
                with_instruction(split, source, default=self._default_instruction),
                ks=request.num_demonstrations,
                draws=request.draws,
                controls=request.controls,
                foreign_pool=foreign_pool,
                plain=self._plain,
                strategy=self._strategy,
            )
            for source in sources
        ]


class Bm25Scorer:
    """BM25 at k = 0, on sets of documents: it has no vectors, so it has no score on STS and the like.

    Args:
        spec: What was asked for.
        request: The run.
    """

    def __init__(self, spec: ModelSpec, request: EvaluationRequest) -> None:
        self._request = request
        self.record = ModelRecord(
            label=spec.label,
            source=spec.source,
            fingerprint=bm25_fingerprint(),
            dimension=0,
            plain=True,
            max_query_tokens=0,
            max_document_tokens=0,
            device="cpu",
            dtype="float32",
            lexical=True,
        )

    def values_of_k(self, item: PlannedSet) -> list[int]:
        """K = 0 on retrieval and reranking sets."""
        return [0] if item.kind in ("retrieval", "reranking") else []

    def score_set(self, item: PlannedSet, k: int) -> SetScore:
        """Score BM25 on a set of documents; `k` is 0."""
        from epic_rag.evaluation.mteb import Bm25Search, run_model

        started = time.monotonic()
        task = _new_task(item)
        search = Bm25Search(name=self.record.label, revision=self.record.fingerprint)
        score, numbers = run_model(task, search, output=self._request.mteb_output)
        return SetScore(
            model=self.record.label,
            set_name=item.name,
            kind=item.kind,
            revision=str(task.metadata.revision),
            metric=task.metadata.main_score,
            k=k,
            score=score,
            instruction=None,
            demonstrations=None,
            prompt="",
            scores=numbers,
            seconds=time.monotonic() - started,
        )

    def score_split(self, split: HeldoutSplit, foreign_pool: Sequence[Pair] | None) -> list[HeldoutResult]:
        """Score BM25 on held-out pairs, once."""
        return [score_heldout_bm25(split)]


def load_scorer(spec: ModelSpec, request: EvaluationRequest) -> Scorer:
    """Load what a specification names.

    Raises:
        CheckpointError: There is no such model.
        MissingExtraError: bm25s is missing and BM25 was named.
    """
    if spec.mode == "bm25":
        return Bm25Scorer(spec, request)
    from epic_rag.encoder import EpicEncoder

    encoder = EpicEncoder.from_pretrained(
        spec.source,
        device=request.device,
        dtype=request.dtype,
        max_document_tokens=request.max_document_tokens,
    )
    plain = spec.mode == "plain" or (spec.mode == "auto" and not encoder.config.training)
    if plain and spec.mode == "auto":
        logger.info("%s has no training record: no instructions and no demonstrations for it", spec.label)
    return EncoderScorer(encoder, spec, request, plain)


def _new_task(item: PlannedSet) -> AbsTask:
    from epic_rag.evaluation.mteb import hub_task, make_task

    return make_task(item.local) if item.local is not None else hub_task(item.name)


Progress = Callable[[str], None]
OnUpdate = Callable[[EvaluationReport], None]


def run_evaluation(
    request: EvaluationRequest, *, progress: Progress | None = None, on_update: OnUpdate | None = None
) -> EvaluationReport:
    """Evaluate models on evaluation sets and held-out files.

    Everything is read and checked before the first text is encoded. A model's documents are encoded once,
    however many values of k, collections and instructions there are.

    Args:
        request: What to do.
        progress: Called with one line of text for each step.
        on_update: Called with the report after each new result, for example to write it.

    Returns:
        The report.

    Raises:
        EpicError: Data, models or settings that cannot work; a package is missing that a set or BM25 needs.
    """
    say = progress or (lambda line: None)
    started = time.monotonic()
    report = EvaluationReport(
        settings=request.record(),
        command=request.command,
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )

    def updated() -> None:
        report.seconds = time.monotonic() - started
        if on_update is not None:
            on_update(report)

    if any(spec.mode == "bm25" for spec in request.models):
        require_bm25()
    planned = plan_sets(request)
    collections = _make_splits(request)
    for spec in request.models:
        scorer = load_scorer(spec, request)
        record = scorer.record
        say(f"{record.label}: loaded, fingerprint {record.fingerprint}{', plain' if record.plain else ''}")
        report.models.append(record)
        _score_sets(scorer, planned, report, say, updated)
        for splits in collections:
            _score_splits(scorer, splits, report, say, updated)
    updated()
    return report


def _score_sets(
    scorer: Scorer, planned: list[PlannedSet], report: EvaluationReport, say: Progress, updated: Callable[[], None]
) -> None:
    for item in planned:
        for k in scorer.values_of_k(item):
            score = scorer.score_set(item, k)
            report.sets.append(score)
            say(f"{scorer.record.label}, {item.name}, k = {k}: {100 * score.score:.2f} ({score.seconds:.0f} s)")
            updated()


def _score_splits(
    scorer: Scorer, splits: list[HeldoutSplit], report: EvaluationReport, say: Progress, updated: Callable[[], None]
) -> None:
    """Score one collection's files; another task's demonstrations are those of the next file."""
    label = scorer.record.label
    for number, split in enumerate(splits):
        foreign = splits[(number + 1) % len(splits)].pool if len(splits) > 1 else None
        for result in scorer.score_split(split, foreign):
            report.heldout.append((label, result))
            best = ", ".join(f"k = {s.k} {s.condition} {100 * s.ndcg_at_10:.2f}" for s in result.scores)
            where = f"{split.collection}, instruction {result.instruction_source}"
            say(f"{label}, {split.name} ({where}): {best} ({result.seconds:.0f} s)")
            updated()


def _make_splits(request: EvaluationRequest) -> list[list[HeldoutSplit]]:
    """The held-out files' tests, in each of the collections."""
    splits = [_make_split(path, request) for path in request.heldout]
    return [in_collection(splits, collection) for collection in request.heldout_collections] if splits else []


def _make_split(path: Path, request: EvaluationRequest) -> HeldoutSplit:
    name = file_stem(path)
    return make_split(
        path,
        queries=request.heldout_queries,
        documents=request.heldout_documents,
        seed=request.seed,
        instruction=request.instructions.get(name),
        symmetric=name in SYMMETRIC_PAIRS,
    )
