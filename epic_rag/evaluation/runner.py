"""An evaluation run: request, plan, scores, report.

`EvaluationRequest` holds the settings, `plan_sets` reads the evaluation sets and their prompts, `load_model` loads a
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
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.demonstrations import Demonstration, DemonstrationBank
from epic_rag.errors import ConfigError, DataError, MissingExtraError, PromptError
from epic_rag.evaluation.bm25 import BM25_NAME, bm25_fingerprint, require_bm25
from epic_rag.evaluation.datasets import (
    KINDS,
    TRAIN_LABELS,
    TRAIN_PAIRS,
    ClassificationData,
    Kind,
    LocalSet,
    SetEntry,
    entry_for,
    evaluated_texts,
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
from epic_rag.query_prompt import QueryPrompt, QueryStrategy

if TYPE_CHECKING:
    from epic_rag.evaluation.few_shot_report import FewShotReport
    from epic_rag.reader import DemonstrationReader

__all__ = [
    "COLLECTIONS",
    "INSTRUCTION_SOURCES",
    "EvaluationRequest",
    "LoadedModel",
    "ModelSpec",
    "PlannedSet",
    "PromptPlan",
    "load_model",
    "parse_banks",
    "parse_choices",
    "parse_ks",
    "parse_models",
    "plan_prompts",
    "plan_sets",
    "run_evaluation",
    "run_few_shot",
    "split_names",
    "training_demonstrations",
]


logger = logging.getLogger(__name__)

Mode = Literal["auto", "plain", "prompted", "bm25"]
COLLECTIONS: tuple[Collection, ...] = get_args(Collection)
"""Kinds of collections that held-out queries are ranked in."""
INSTRUCTION_SOURCES: tuple[InstructionSource, ...] = get_args(InstructionSource)
"""Origins of the instruction of held-out queries."""

# Kinds of sets whose texts are compared with each other.
_ONE_KIND = ("sts", "classification", "clustering")

_Choice = TypeVar("_Choice", bound=str)


@dataclass(frozen=True)
class ModelSpec:
    """Model to evaluate.

    Args:
        source: A name for `EpicEncoder.from_pretrained`.
        label: The model's name in tables.
        mode: "plain" encodes queries bare, at k = 0 only: for models that were never trained with an
            instruction. "prompted" uses instructions. "auto" is plain for a model without a training record,
            and leaves out instructions of symmetric sets for a checkpoint that reads none there.
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
        QueryPrompt(strategy=self.strategy)  # raises if it is unknown
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
        bare: Whether the model reads the set's texts, which are of one kind, as documents.
    """

    instruction: str
    source: str | None = None
    demonstrations: tuple[Demonstration, ...] = ()
    symmetric: bool = False
    bare: bool = False

    def prompt(self, k: int, *, strategy: QueryStrategy = "epic") -> QueryPrompt:
        """Return the prompt with the first k demonstrations.

        Raises:
            PromptError: There are fewer than k demonstrations.
        """
        if k > len(self.demonstrations):
            raise PromptError(
                f"{self.source or 'This set'} has {len(self.demonstrations)} demonstrations, and k is {k}. "
                "Lower --num-demonstrations, or name a larger source with --bank SET=SOURCE."
            )
        prompt = make_prompt(self.instruction, self.demonstrations[:k], symmetric=self.symmetric, strategy=strategy)
        return replace(prompt, task="sts", instruction=None) if self.bare else prompt


def training_demonstrations(
    data: ClassificationData, *, labels: bool, count: int, seed: int = 0
) -> tuple[Demonstration, ...]:
    """Draw at most `count` demonstrations from a classification set's training split, one label after the other.

    A text is paired with its label's name or with another text of the same label. Training texts that are also test
    texts are left out.
    """
    test = {normalize_text(text) for text in evaluated_texts(data)}
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


def plan_prompts(
    local_set: LocalSet | None, instruction: str, source: str | None, *, max_k: int, seed: int = 0
) -> PromptPlan:
    """Read a set's demonstrations.

    Args:
        local_set: The set, which `train` and `train-labels` need; None for a task of the hub.
        instruction: The task in words.
        source: A built-in bank's name, a bank folder, a JSONL file, `train` or `train-labels`; None for none.
        max_k: Largest number of demonstrations needed; with 0 no source is opened.
        seed: Seed of a draw from a training split.

    Raises:
        DataError: The source is `train` and the set has no training split, or a demonstration is one of the set's test
            texts.
    """
    if max_k == 0 or source is None:
        return PromptPlan(instruction)
    if source in (TRAIN_PAIRS, TRAIN_LABELS):
        if local_set is None or not isinstance(local_set.data, ClassificationData):
            name = local_set.name if local_set else "A set of the hub"
            raise DataError(f"{name} has no training split for --bank SET={source}. Name a bank instead.")
        drawn = training_demonstrations(local_set.data, labels=source == TRAIN_LABELS, count=max_k, seed=seed)
        # Two texts of a class are of one kind; a label's name is the passage of a text.
        plan = PromptPlan(instruction, f"{local_set.name}/{source}", drawn, symmetric=source == TRAIN_PAIRS)
    else:
        path = Path(source)
        bank = DemonstrationBank.from_jsonl(path) if path.is_file() else DemonstrationBank.load(source)
        plan = PromptPlan(instruction, source, bank.demonstrations, bank.symmetric)
    test = {normalize_text(text) for text in evaluated_texts(local_set.data)} if local_set else set()
    for text in (text for item in plan.demonstrations for text in (item.query, item.passage)):
        if normalize_text(text) in test and local_set is not None:
            raise DataError(
                f'"{text}" is a demonstration of {plan.source} and a test text of {local_set.name}. '
                f"Use another source: --bank {local_set.name}=SOURCE."
            )
    return plan


@dataclass(frozen=True)
class PlannedSet:
    """Evaluation set that is ready to run: its contents (None for a task of the hub) and its prompts."""

    name: str
    kind: str
    local: LocalSet | None
    plan: PromptPlan


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
        if name in available:
            folder = (request.data or Path()) / name
            kind = str(set_kind(folder))
        else:
            from epic_rag.evaluation.mteb import hub_instruction, hub_task

            task = hub_task(name)
            kind = task.metadata.type.lower()
        if request.kinds is not None and kind not in request.kinds:
            continue
        local = load_local_set(folder) if name in available else None
        if local is not None:
            name, entry = local.name, entry_for(local.name, local.kind)
        else:
            entry = SetEntry(hub_instruction(task), None)
        plan = plan_prompts(
            local,
            request.instructions.get(name, entry.instruction),
            request.banks.get(name, entry.demonstrations),
            max_k=max_k,
            seed=request.seed,
        )
        item = PlannedSet(name, kind, local, plan)
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


@dataclass(frozen=True)
class LoadedModel:
    """Model of a run: an encoder with a cache of its vectors, or BM25, which has no vectors.

    Args:
        record: Description for the report.
        store: The encoder and its vectors; None for BM25.
        default_instruction: The checkpoint's.
        symmetric_as_documents: Whether it reads texts that are compared with each other as documents.
        reader: The checkpoint's reader of demonstrations; None for BM25.
    """

    record: ModelRecord
    store: EmbeddingStore | None = None
    default_instruction: str | None = None
    symmetric_as_documents: bool = False
    reader: DemonstrationReader | None = None

    def values_of_k(self, item: PlannedSet, request: EvaluationRequest) -> list[int]:
        """Return the numbers of demonstrations to score a set with; none for a set that the model cannot do."""
        if self.store is None:
            return [0] if item.kind in ("retrieval", "reranking") else []
        if self.record.plain:
            return [0]
        return [k for k in request.num_demonstrations if k == 0 or item.plan.source is not None]

    def score_set(self, item: PlannedSet, k: int, *, output: Path | None) -> SetScore:
        """Score the model on a set with its first k demonstrations; mteb's result files are in `output`."""
        from epic_rag.evaluation.mteb import EpicMtebEncoder, MtebModel, bm25_model, hub_task, make_task, run_task

        started = time.monotonic()
        task = make_task(item.local) if item.local is not None else hub_task(item.name)
        fingerprint = ""
        if self.store is None:
            model: MtebModel = bm25_model()
        else:
            prompt = self._plan(item).prompt(k, strategy=self.record.strategy)
            fingerprint = prompt_fingerprint(prompt)
            model = EpicMtebEncoder(self.store, prompt, name=self.record.label)
        score, numbers = run_task(task, model, output=output)
        return SetScore(
            model=self.record.label,
            set_name=item.name,
            kind=item.kind,
            revision=str(task.metadata.revision),
            metric=task.metadata.main_score,
            k=k,
            score=score,
            instruction=self._plan(item).instruction or None,
            demonstrations=item.plan.source if k else None,
            prompt=fingerprint,
            scores=numbers,
            seconds=time.monotonic() - started,
        )

    def _plan(self, item: PlannedSet) -> PromptPlan:
        """Return a set's plan as the model takes it."""
        if item.kind in _ONE_KIND and self.symmetric_as_documents:
            return replace(item.plan, instruction="", symmetric=True, bare=True)
        return replace(item.plan, instruction="") if self.record.plain else item.plan

    def score_split(
        self, split: HeldoutSplit, foreign_pool: Sequence[Pair] | None, request: EvaluationRequest
    ) -> list[HeldoutResult]:
        """Score the model on held-out pairs with each instruction; once where it gets none."""
        if self.store is None:
            return [score_heldout_bm25(split)]
        plain = self.record.plain
        return [
            score_heldout(
                self.store,
                with_instruction(split, source, default=self.default_instruction),
                ks=request.num_demonstrations,
                draws=request.draws,
                controls=request.controls,
                foreign_pool=foreign_pool,
                plain=plain,
                strategy=self.record.strategy,
            )
            for source in (request.heldout_instructions[:1] if plain else request.heldout_instructions)
        ]


def load_model(spec: ModelSpec, request: EvaluationRequest) -> LoadedModel:
    """Load a model.

    Raises:
        CheckpointError: There is no such model.
        MissingExtraError: The model is BM25 and bm25s is missing.
    """
    if spec.mode == "bm25":
        fingerprint = bm25_fingerprint()
        return LoadedModel(
            ModelRecord(spec.label, spec.source, fingerprint, 0, True, 0, 0, "cpu", "float32", lexical=True)
        )
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
    record = ModelRecord(
        label=spec.label,
        source=spec.source,
        fingerprint=encoder.fingerprint,
        dimension=encoder.dimension,
        plain=plain,
        max_query_tokens=encoder.max_query_tokens,
        max_document_tokens=encoder.max_document_tokens,
        device=",".join(map(str, encoder.devices)),
        dtype=str(encoder.dtype).removeprefix("torch."),
        strategy=request.strategy or encoder.strategy,
    )
    store = EmbeddingStore(
        encoder,
        folder=request.cache_dir,
        precision=record.dtype,
        batch_size=request.batch_size,
        show_progress=sys.stderr.isatty(),
    )
    return LoadedModel(
        record,
        store,
        encoder.default_instruction,
        spec.mode != "prompted" and bool(encoder.config.symmetric_as_documents),
        encoder.reader,
    )


def run_few_shot(
    request: EvaluationRequest,
    *,
    methods: Sequence[str] | None = None,
    wordings: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> FewShotReport:
    """Score ways of using demonstrations, by their number; see `few_shot`.

    Args:
        request: The settings, of one model; k = 0 is left out, and collections and the instruction's origin are those
            of held-out files.
        methods: Names of `few_shot_methods.METHODS`; None for all.
        wordings: Also score other wordings of the instruction.
        progress: Called with one line of text for each step.

    Raises:
        EpicError: Data, models or settings that cannot work, or bm25s is not installed.
    """
    from epic_rag.evaluation.few_shot import evaluate_few_shot, load_few_shot_tasks
    from epic_rag.evaluation.few_shot_methods import METHODS
    from epic_rag.evaluation.few_shot_report import CONTROLS, FewShotRequest

    require_bm25()
    if len(request.models) > 1:
        raise ConfigError(f"--few-shot takes one model, not {len(request.models)}. Run it once for each.")
    settings = FewShotRequest(
        sizes=tuple(k for k in request.num_demonstrations if k),
        draws=request.draws,
        collections=request.heldout_collections,
        methods=METHODS if methods is None else tuple(methods),
        controls=CONTROLS if request.controls else (),
        seed=request.seed,
        wordings=wordings,
    )
    model = load_model(request.models[0], request)
    if model.store is None:
        raise ConfigError("BM25 takes no demonstrations. Pass an encoder to --model.")
    tasks = load_few_shot_tasks(
        [str(path) for path in request.heldout],
        request.data,
        request.tasks,
        queries=request.heldout_queries,
        documents=request.heldout_documents,
        sizes=settings.sizes,
        instruction="none" if model.record.plain else request.heldout_instructions[0],
        default_instruction=model.default_instruction,
        seed=request.seed,
    )
    return evaluate_few_shot(model.store, tasks, settings, reader=model.reader, progress=progress)


def run_evaluation(
    request: EvaluationRequest,
    *,
    progress: Callable[[str], None] = lambda line: None,
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
        )
        for path in request.heldout
    ]
    collections = [in_collection(splits, collection) for collection in request.heldout_collections] if splits else []
    for spec in request.models:
        model = load_model(spec, request)
        record = model.record
        progress(f"{record.label}: loaded, fingerprint {record.fingerprint}{', plain' if record.plain else ''}")
        report.models.append(record)
        for item in planned:
            for k in model.values_of_k(item, request):
                score = model.score_set(item, k, output=request.mteb_output)
                report.sets.append(score)
                progress(f"{record.label}, {item.name}, k = {k}: {100 * score.score:.2f} ({score.seconds:.0f} s)")
                update()
        for members in collections:
            for number, split in enumerate(members):
                # Another task's demonstrations are those of the next file.
                foreign = members[(number + 1) % len(members)].pool if len(members) > 1 else None
                for result in model.score_split(split, foreign, request):
                    report.heldout.append((record.label, result))
                    scores = ", ".join(f"k = {s.k} {s.condition} {100 * s.ndcg_at_10:.2f}" for s in result.scores)
                    where = f"{split.collection}, instruction {result.instruction_source}"
                    progress(f"{record.label}, {split.name} ({where}): {scores} ({result.seconds:.0f} s)")
                    update()
    update()
    return report
