"""An evaluation run: request, plan, scores, report.

`EvaluationRequest` holds the settings, `plan_sets` reads the evaluation sets and their prompts, `load_scorer` loads a
model (or BM25), and `run_evaluation` scores every model on every set and held-out file. Data and settings are checked
before the first model is loaded.
"""

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
    normalize_text,
    set_kind,
)
from epic_rag.evaluation.embedding_store import EmbeddingStore, make_prompt, prompt_fingerprint
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
from epic_rag.query_prompt import QUERY_STRATEGIES, QueryPrompt, QueryStrategy

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from epic_rag.encoder import EpicEncoder
    from epic_rag.evaluation.mteb import MtebModel

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


logger = logging.getLogger(__name__)

Mode = Literal["auto", "plain", "prompted", "bm25"]
COLLECTIONS: tuple[Collection, ...] = get_args(Collection)
"""Kinds of collections that held-out queries are ranked in."""
INSTRUCTION_SOURCES: tuple[InstructionSource, ...] = get_args(InstructionSource)
"""Origins of the instruction of held-out queries."""

_Choice = TypeVar("_Choice", bound=str)


@dataclass(frozen=True)
class ModelSpec:
    """Model to evaluate.

    Args:
        source: A name for `EpicEncoder.from_pretrained`.
        label: The model's name in tables.
        mode: "plain" encodes queries bare, at k = 0 only: for models that were never trained with an
            instruction. "prompted" uses instructions. "auto" is plain for a model without a training record.
            "bm25" is BM25, on sets of documents and held-out files only.
    """

    source: str
    label: str
    mode: Mode = "auto"


@dataclass(frozen=True)
class EvaluationRequest:
    """Settings of an evaluation run.

    Args:
        models: At least one.
        data: Folder of evaluation sets; needed for local sets.
        tasks: Names of local sets, or of mteb's own tasks (downloaded from the hub). None takes all local
            sets.
        kinds: Kinds of sets that are evaluated; None for all.
        num_demonstrations: Values of k.
        strategy: How demonstrations are used; None takes each checkpoint's default.
        instructions: Instructions by name of a set or held-out file, which take precedence over the built-in ones.
        banks: Sources of demonstrations by set name, which take precedence over the built-in ones.
        heldout: Files of training pairs that the models have not seen.
        heldout_queries: Test queries from each.
        heldout_documents: Documents from each.
        heldout_collections: Collections that their queries are ranked in, each in turn.
        heldout_instructions: Origins of their instruction, each in turn.
        draws: Draws of demonstrations for each k > 0 on held-out files.
        controls: Also score shuffled and foreign demonstrations there.
        seed: Seed of all splits and draws.
        mteb_output: Folder for mteb's result files; results found in it are reused.
        cache_dir: Folder for embeddings, reused by later runs.
        device: As in `EpicEncoder.from_pretrained`.
        dtype: As in `EpicEncoder.from_pretrained`.
        batch_size: As in `EpicEncoder.encode_query`.
        max_document_tokens: As in `EpicEncoder.from_pretrained`.
        command: The command line, for the record.

    Raises:
        ConfigError: A value cannot work.
        PromptError: The strategy is unknown.
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
            raise ConfigError("No model to evaluate. Add --model MODEL.")
        if not self.num_demonstrations or min(self.num_demonstrations) < 0:
            raise ConfigError(
                f"The numbers of demonstrations are {list(self.num_demonstrations)}. Use --num-demonstrations 0,8."
            )
        if self.strategy is not None and self.strategy not in QUERY_STRATEGIES:
            raise PromptError(f"Unknown strategy {self.strategy!r}. Choose one of {', '.join(QUERY_STRATEGIES)}.")
        parse_choices(self.heldout_collections, COLLECTIONS, "--heldout-collection")
        parse_choices(self.heldout_instructions, INSTRUCTION_SOURCES, "--heldout-instruction")
        if self.kinds is not None:
            parse_choices(self.kinds, KINDS, "--kinds")
        if self.draws < 1:
            raise ConfigError(f"draws is {self.draws}. Use 1 or more.")
        if self.data is None and not self.tasks and not self.heldout:
            raise ConfigError("Nothing to evaluate on. Add --data FOLDER, --tasks NAME,... or --heldout FILE.")

    def record(self) -> dict[str, object]:
        """Return the settings as JSON values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("models", "command")}
        result: dict[str, object] = json.loads(json.dumps(values, default=str))
        return result


def parse_models(specs: Sequence[str]) -> tuple[ModelSpec, ...]:
    """Read `[LABEL=]MODEL[:plain|:prompted]` specifications; without any, the default checkpoint.

    The model `bm25` is BM25 (a folder of this name is `./bm25`). The default label is the last part of the path, or all
    of it where two models would have the same label.

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
            raise ConfigError(f'"{spec}" names no model. Write [LABEL=]MODEL[:plain|:prompted].')
        read.append((label or None, source, mode))
    short = [label or Path(source).name or source for label, source, _ in read]
    labels = [
        name if label or short.count(name) == 1 else source
        for name, (label, source, _) in zip(short, read, strict=True)
    ]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"Two models are called {twice}. Give them labels: --model LABEL=MODEL.")
    return tuple(ModelSpec(source, label, mode) for label, (_, source, mode) in zip(labels, read, strict=True))


def parse_ks(text: str) -> tuple[int, ...]:
    """Read a list of numbers of demonstrations such as "0,8"; sorted, each once.

    Raises:
        ConfigError: The text is something else.
    """
    try:
        values = sorted({int(part) for part in split_names(text)})
    except ValueError:
        values = []
    if not values or values[0] < 0:
        raise ConfigError(f'"{text}" is not a list of numbers of demonstrations. Write for example 0,8.')
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
            raise ConfigError(f'"{assignment}" is not SET=SOURCE. Write for example --bank Cranfield=papers.')
        banks[name] = source
    return banks


def parse_choices(texts: Sequence[str], allowed: Sequence[_Choice], option: str) -> tuple[_Choice, ...]:
    """Read an option of one or more known values, repeated or as comma-separated lists; drop repetitions.

    Args:
        texts: The option's values as they were given.
        allowed: The known values.
        option: The option's name, for the message.

    Raises:
        ConfigError: No value, or an unknown one.
    """
    named = dict.fromkeys(name for text in texts for name in split_names(text))
    unknown = [name for name in named if name not in allowed]
    if unknown or not named:
        given = f'"{unknown[0]}"' if unknown else "nothing"
        raise ConfigError(f"{option} names {given}. Use one or more of {', '.join(allowed)}.")
    return tuple(value for name in named for value in allowed if value == name)


def split_names(text: str) -> tuple[str, ...]:
    """Split a comma-separated list; blanks around names are ignored."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


@dataclass(frozen=True)
class PromptPlan:
    """A set's instruction and its demonstrations, of which every k takes the first k.

    Args:
        instruction: The task in words.
        source: Origin of the demonstrations, as the report names it; None when there are none.
        demonstrations: In the order in which they are used.
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
            plain: Without an instruction (for models that were never trained with one).
            strategy: How demonstrations are used.

        Raises:
            PromptError: There are fewer than k demonstrations, or k > 0 for a plain model.
        """
        if plain and k:
            raise PromptError(f"A plain model takes no demonstrations, and k is {k}. Use k = 0.")
        if k > len(self.demonstrations):
            raise PromptError(
                f"{self.source or 'This set'} has {len(self.demonstrations)} demonstrations, and k is {k}. "
                "Lower --num-demonstrations, or name a larger source with --bank SET=SOURCE."
            )
        if plain:
            return make_prompt(None)
        return make_prompt(self.instruction, self.demonstrations[:k], symmetric=self.symmetric, strategy=strategy)


def training_demonstrations(
    data: ClassificationData, *, labels: bool, count: int, seed: int = 0
) -> tuple[Demonstration, ...]:
    """Draw demonstrations from a classification set's training split, one label after the other.

    Args:
        data: The set. Training texts that are also test texts are left out.
        labels: Pair a text with its label's name; otherwise with another text of the same label.
        count: Largest number.
        seed: Seed of the draw.

    Returns:
        At most `count` demonstrations, the first ones with labels as different as possible.
    """
    test = {normalize_text(text) for text in data.test_texts}
    by_label: dict[int, list[str]] = {}
    for text, label in data.train:
        if text.strip() and normalize_text(text) not in test:
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
    """Return a source's demonstrations, with the instruction that came with them or "".

    Args:
        source: A built-in bank's name, a bank folder, a JSONL file, `train` or `train-labels`.
        local_set: The set; needed for `train` and `train-labels`.
        count: Largest number needed; only the training split is limited by it.
        seed: Seed of a draw from a training split.

    Raises:
        DataError: The source is `train` and the set has no training split.
    """
    if source in (TRAIN_PAIRS, TRAIN_LABELS):
        if local_set is None or not isinstance(local_set.data, ClassificationData):
            name = local_set.name if local_set else "A set of the hub"
            raise DataError(f"{name} has no training split for --bank SET={source}. Name a bank instead.")
        drawn = training_demonstrations(local_set.data, labels=source == TRAIN_LABELS, count=count, seed=seed)
        # Two texts of a class are of one kind; a label's name is the passage of a text.
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
    """Choose a local set's instruction and demonstrations.

    Args:
        local_set: The set.
        entry: Its entry in the catalogue.
        max_k: Largest number of demonstrations needed; with 0 no source is opened.
        instructions: Instructions by set name that take precedence over the catalogue's.
        banks: Sources by set name that take precedence over the catalogue's.
        seed: Seed of a draw from a training split.

    Raises:
        DataError: A demonstration is one of the set's test texts.
    """
    instruction = (instructions or {}).get(local_set.name, entry.instruction)
    source = (banks or {}).get(local_set.name, entry.demonstrations)
    if max_k == 0 or source is None:
        return PromptPlan(instruction)
    found = load_demonstrations(source, local_set, count=max_k, seed=seed)
    test = {normalize_text(text) for text in local_set.data.test_texts}
    for demonstration in found.demonstrations:
        for text in (demonstration.query, demonstration.passage):
            if normalize_text(text) in test:
                raise DataError(
                    f'"{text}" is a demonstration of {found.source} and a test text of {local_set.name}. '
                    f"Use another source: --bank {local_set.name}=SOURCE."
                )
    return replace(found, instruction=instruction)


@dataclass(frozen=True)
class PlannedSet:
    """Evaluation set that is ready to run.

    Args:
        name: The set.
        kind: Its kind.
        local: Its contents; None for a task of the hub.
        plan: Its instruction and demonstrations.
    """

    name: str
    kind: str
    local: LocalSet | None
    plan: PromptPlan

    def task(self) -> AbsTask:
        """Return a new mteb task."""
        from epic_rag.evaluation.mteb import hub_task, make_task

        return make_task(self.local) if self.local is not None else hub_task(self.name)


def plan_sets(request: EvaluationRequest) -> list[PlannedSet]:
    """Read the sets of a request and choose their prompts.

    Returns:
        Named sets in the order of their names on the command line; otherwise all of the folder, in the order of
        `find_local_sets`.

    Raises:
        DataError: There is no set, none of the wanted kinds, or a file is malformed.
        MissingExtraError: mteb is missing.
        PromptError: A set has fewer demonstrations than needed.
        TaskError: A name is neither a local set nor a task of mteb.
    """
    available = find_local_sets(request.data) if request.data is not None else []
    names = available if request.tasks is None else list(dict.fromkeys(request.tasks))
    if request.tasks is None and request.data is not None and not available:
        raise DataError(f"No evaluation set in {request.data}. Give --data the folder that holds the sets' folders.")
    if names:
        try:
            import mteb  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("mteb", "eval", "evaluating on retrieval, STS and other sets") from error
    max_k = max(request.num_demonstrations)
    planned = []
    for name in names:
        local = request.data is not None and name in available
        item = _plan_local_set(name, request, max_k) if local else _plan_hub_task(name, request, max_k)
        if item is None:
            continue
        planned.append(item)
        if item.plan.source is not None:
            item.plan.prompt(max_k)  # fails here, before a model is loaded, if there are too few demonstrations
        elif max_k > 0:
            logger.warning(
                "%s has no demonstrations and is scored at k = 0 only. Name some with --bank %s=SOURCE.", name, name
            )
    if names and not planned:
        raise DataError(
            f"None of {', '.join(names)} is of the kinds {', '.join(request.kinds or ())}. "
            "Name others with --kinds or --tasks."
        )
    return planned


def _plan_local_set(name: str, request: EvaluationRequest, max_k: int) -> PlannedSet | None:
    """Plan a folder; return None, without reading it, if its kind is not wanted."""
    folder = (request.data or Path()) / name
    if request.kinds is not None and set_kind(folder) not in request.kinds:
        return None
    local = load_local_set(folder)
    plan = plan_prompts(
        local,
        entry_for(local.name, local.kind),
        max_k=max_k,
        instructions=request.instructions,
        banks=request.banks,
        seed=request.seed,
    )
    return PlannedSet(local.name, local.kind, local, plan)


def _plan_hub_task(name: str, request: EvaluationRequest, max_k: int) -> PlannedSet | None:
    from epic_rag.evaluation.mteb import hub_instruction, hub_task

    task = hub_task(name)
    kind = task.metadata.type.lower()
    if request.kinds is not None and kind not in request.kinds:
        return None
    plan = PromptPlan("")
    if name in request.banks and max_k > 0:
        plan = load_demonstrations(request.banks[name], None, count=max_k, seed=request.seed)
    instruction = request.instructions.get(name) or hub_instruction(task)
    return PlannedSet(name, kind, None, replace(plan, instruction=instruction))


class Scorer(Protocol):
    """A model of an evaluation run: an encoder, or BM25."""

    @property
    def record(self) -> ModelRecord:
        """Description for the report."""

    def values_of_k(self, item: PlannedSet) -> list[int]:
        """Return the numbers of demonstrations to score a set with; none for a set that it cannot do."""

    def score_set(self, item: PlannedSet, k: int) -> SetScore:
        """Score it on a set with k demonstrations."""

    def score_split(self, split: HeldoutSplit, foreign_pool: Sequence[Pair] | None) -> list[HeldoutResult]:
        """Score it on held-out pairs, with every instruction of the request."""


class EncoderScorer:
    """Encoder with a cache of its vectors.

    Args:
        encoder: The model.
        spec: Its specification.
        request: The run.
        plain: Whether its queries are encoded bare.
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
        """Return k = 0 only for a plain model and for a set without demonstrations."""
        if self._plain:
            return [0]
        return [k for k in self._request.num_demonstrations if k == 0 or item.plan.source is not None]

    def score_set(self, item: PlannedSet, k: int) -> SetScore:
        """Score the model on a set with its first k demonstrations."""
        from epic_rag.evaluation.mteb import EpicMtebEncoder

        prompt = item.plan.prompt(k, plain=self._plain, strategy=self._strategy)
        model = EpicMtebEncoder(self._store, prompt, name=self.record.label)
        return _run_set(
            item,
            model,
            self.record,
            self._request,
            k=k,
            instruction=None if self._plain else item.plan.instruction,
            demonstrations=item.plan.source if k else None,
            prompt=prompt_fingerprint(prompt),
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
    """BM25 at k = 0, on sets of documents: without vectors it has no score on STS and the like.

    Args:
        spec: Its specification.
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
        """Return k = 0 for retrieval and reranking sets."""
        return [0] if item.kind in ("retrieval", "reranking") else []

    def score_set(self, item: PlannedSet, k: int) -> SetScore:
        """Score BM25 on a set of documents; `k` is 0."""
        from epic_rag.evaluation.mteb import bm25_model

        return _run_set(item, bm25_model(), self.record, self._request, k=k)

    def score_split(self, split: HeldoutSplit, foreign_pool: Sequence[Pair] | None) -> list[HeldoutResult]:
        """Score BM25 on held-out pairs, once."""
        return [score_heldout_bm25(split)]


def _run_set(
    item: PlannedSet,
    model: MtebModel,
    record: ModelRecord,
    request: EvaluationRequest,
    *,
    k: int,
    instruction: str | None = None,
    demonstrations: str | None = None,
    prompt: str = "",
) -> SetScore:
    from epic_rag.evaluation.mteb import run_task

    started = time.monotonic()
    task = item.task()
    score, numbers = run_task(task, model, output=request.mteb_output)
    return SetScore(
        model=record.label,
        set_name=item.name,
        kind=item.kind,
        revision=str(task.metadata.revision),
        metric=task.metadata.main_score,
        k=k,
        score=score,
        instruction=instruction,
        demonstrations=demonstrations,
        prompt=prompt,
        scores=numbers,
        seconds=time.monotonic() - started,
    )


def load_scorer(spec: ModelSpec, request: EvaluationRequest) -> Scorer:
    """Load a model.

    Raises:
        CheckpointError: There is no such model.
        MissingExtraError: The model is BM25 and bm25s is missing.
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
        logger.info("%s has no training record. It gets no instructions and no demonstrations.", spec.label)
    return EncoderScorer(encoder, spec, request, plain)


def run_evaluation(
    request: EvaluationRequest,
    *,
    progress: Callable[[str], None] | None = None,
    on_update: Callable[[EvaluationReport], None] | None = None,
) -> EvaluationReport:
    """Evaluate models on evaluation sets and held-out files.

    Everything is read and checked before the first text is encoded. A model's documents are encoded once,
    however many values of k, collections and instructions there are.

    Args:
        request: The settings.
        progress: Called with one line of text for each step.
        on_update: Called with the report after each new result, for example to write it.

    Returns:
        The report.

    Raises:
        EpicError: Data, models or settings that cannot work; a package is missing that a set or BM25 needs.
    """
    started = time.monotonic()
    progress = progress or (lambda line: None)
    report = EvaluationReport(
        settings=request.record(),
        command=request.command,
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )

    def update() -> None:
        report.seconds = time.monotonic() - started
        if on_update is not None:
            on_update(report)

    if any(spec.mode == "bm25" for spec in request.models):
        require_bm25()
    planned = plan_sets(request)
    splits = [
        make_split(
            path,
            queries=request.heldout_queries,
            documents=request.heldout_documents,
            seed=request.seed,
            instruction=request.instructions.get(file_stem(path)),
            symmetric=file_stem(path) in SYMMETRIC_PAIRS,
        )
        for path in request.heldout
    ]
    collections = [in_collection(splits, collection) for collection in request.heldout_collections] if splits else []
    for spec in request.models:
        scorer = load_scorer(spec, request)
        record = scorer.record
        progress(f"{record.label}: loaded, fingerprint {record.fingerprint}{', plain' if record.plain else ''}")
        report.models.append(record)
        for item in planned:
            for k in scorer.values_of_k(item):
                score = scorer.score_set(item, k)
                report.sets.append(score)
                progress(f"{record.label}, {item.name}, k = {k}: {100 * score.score:.2f} ({score.seconds:.0f} s)")
                update()
        for members in collections:
            for number, split in enumerate(members):
                # Another task's demonstrations are those of the next file.
                foreign = members[(number + 1) % len(members)].pool if len(members) > 1 else None
                for result in scorer.score_split(split, foreign):
                    report.heldout.append((record.label, result))
                    scores = ", ".join(f"k = {s.k} {s.condition} {100 * s.ndcg_at_10:.2f}" for s in result.scores)
                    where = f"{split.collection}, instruction {result.instruction_source}"
                    progress(f"{record.label}, {split.name} ({where}): {scores} ({result.seconds:.0f} s)")
                    update()
    update()
    return report
