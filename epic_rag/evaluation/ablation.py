"""`epic-rag ablate`: many short trainings at equal budget, one table.

    grid = load_grid("grid.yaml", output=Path("runs/ablation"))
    report = run_ablation(grid)

Each arm trains through `epic_rag.training.Trainer`, is scored on files that no arm trains on and on rows of trained
tasks that training left out, and is compared with the reference arm query by query.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError, DataError, EpicError, PromptError, TrainingError
from epic_rag.evaluation.datasets import SYMMETRIC_PAIRS, normalised
from epic_rag.evaluation.embedding import EmbeddingStore
from epic_rag.evaluation.heldout import (
    Comparison,
    Condition,
    HeldoutSplit,
    Pair,
    assemble_split,
    file_stem,
    make_split,
    query_rows,
    score_heldout,
    with_components,
)
from epic_rag.evaluation.plots import plot_ablation, require_matplotlib
from epic_rag.evaluation.report import difference, markdown_table, percent, pool_comparisons, versions
from epic_rag.metrics import mean_and_error
from epic_rag.prompt import STRATEGIES, Strategy
from epic_rag.training import Trainer, latest_checkpoint
from epic_rag.training.config import TrainingConfig, change_setting, recipe_values, yaml_module
from epic_rag.training.data import TrainingBatch, load_datasets
from epic_rag.training.sampling import sample_batch
from epic_rag.training.trainer import StepResult

if TYPE_CHECKING:
    from epic_rag.training.data import PairDataset

__all__ = [
    "PARTS",
    "AblationGrid",
    "AblationReport",
    "Arm",
    "ArmRecord",
    "ArmRun",
    "ArmScores",
    "Budget",
    "GridEvaluation",
    "Line",
    "Part",
    "QueryScores",
    "Score",
    "Trained",
    "failed_arms",
    "list_grids",
    "load_grid",
    "pairs_file",
    "planned_steps",
    "run_ablation",
    "score_arm",
    "split_of_task",
]


# --- from ablation_arms
# One arm of an ablation: trained within the budget, scored, and remembered in its folder.
#
#     arms/NAME/arm.json      what it was trained and scored with, and what came of it
#     arms/NAME/final/        its checkpoint
#
# An arm that is done is not trained again as long as its settings and its data are the same. While it trains, the
# holds one checkpoint to go on from; with the optimiser's state, three times the size of the model. It is deleted when
# the arm is scored.

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_RECORD = "arm.json"
# Changes of these do not make another run: they are texts, places, or where memory goes.
_FREE = {
    *("name", "output", "device", "save_every", "keep_checkpoints", "description", "license", "base_model", "steps"),
    *("tensorboard", "grad_cache", "gradient_checkpointing"),
}
_PROBE_STEPS = 5


@dataclass(frozen=True)
class Trained:
    """What training an arm took.

    Attributes:
        steps: Optimiser steps.
        pairs: Pairs in them.
        tokens: Real tokens through the model, padding not counted.
        seconds: Wall time of the steps alone.
        loss: Of the last step.
        hardware: What it ran on.
    """

    steps: int
    pairs: int
    tokens: int
    seconds: float
    loss: float
    hardware: str


@dataclass
class ArmRecord:
    """What an arm's folder says of it.

    Attributes:
        training: Configuration, budget and hashes of the data.
        evaluation: What it was scored with.
        steps: What the budget is in steps, and the learning rate's schedule is made for.
        trained: None until it is trained.
        scores: None until it is scored.
        fingerprint: Of the checkpoint that was scored.
    """

    training: dict[str, Any]
    evaluation: dict[str, Any]
    steps: int | None = None
    trained: Trained | None = None
    scores: ArmScores | None = None
    fingerprint: str = ""


class ArmRun:
    """Trains and scores one arm, or finds that it is done.

    Args:
        arm: What to do.
        budget: How long.
        evaluation: How it is scored.
        heldout: The tests of files that no arm trains on.
    """

    def __init__(self, arm: Arm, budget: Budget, evaluation: GridEvaluation, heldout: Sequence[HeldoutSplit]) -> None:
        self.arm = arm
        self.budget = budget
        self.evaluation = evaluation
        self.heldout = heldout
        self.folder = Path(arm.config.output)
        self.record = ArmRecord(
            training={
                "config": json.loads(json.dumps(arm.config.to_dict())),
                "budget": asdict(budget),
                "data": _hashes(arm.config),
            },
            evaluation=json.loads(
                json.dumps(
                    {
                        **asdict(replace(evaluation, strategies={})),
                        "strategies": list(arm.strategies),
                        "heldout": [[split.name, split.revision, split.instruction] for split in heldout],
                    }
                )
            ),
        )
        self.changed: str | None = None
        self._restore()

    @property
    def final(self) -> Path:
        """The trained checkpoint."""
        return self.folder / "final"

    @property
    def state(self) -> str:
        """How far it is: "new", "interrupted", "trained" or "scored"."""
        if self.record.scores is not None:
            return "scored"
        if self.record.trained is not None:
            return "trained"
        return "new" if latest_checkpoint(self.folder) is None else "interrupted"

    def train(self, *, show_progress: bool = False) -> None:
        """Train within the budget; go on where an earlier run of the same arm was stopped.

        Raises:
            EpicError: Whatever the trainer raises.
        """
        resume = self.changed is None
        if self.record.steps is None:
            self.record.steps = planned_steps(self.arm.config, self.budget)
            self._write()
        config = replace(self.arm.config, steps=self.record.steps)
        minutes = self.budget.amount if self.budget.unit == "minutes" else math.inf
        trainer = _TimedTrainer(config, minutes)
        trainer.train(resume=resume, show_progress=show_progress)
        losses = [entry["loss"] for entry in trainer.metrics if "loss" in entry]
        self.record.trained = Trained(
            steps=trainer.step,
            pairs=trainer.pairs,
            tokens=trainer.tokens,
            seconds=round(trainer.seconds, 1),
            loss=losses[-1],
            hardware=trainer.record()["hardware"],
        )
        self._write()

    def score(self) -> None:
        """Score the final checkpoint, and delete what only going on with the training would need.

        Raises:
            EpicError: The checkpoint does not load, or its data cannot be read.
        """
        config = self.arm.config
        encoder = EpicEncoder.from_pretrained(self.final, device=config.device)
        # Every arm is shown the same numbers of demonstrations: that it was trained with fewer is no news here.
        encoder.config.max_demonstrations = None
        splits: dict[Part, Sequence[HeldoutSplit]] = {"trained": self._trained_splits(), "heldout": self.heldout}
        store = EmbeddingStore(encoder, precision=str(encoder.dtype).removeprefix("torch."))
        self.record.scores = score_arm(store, splits, self.evaluation, self.arm.strategies)
        self.record.fingerprint = encoder.fingerprint
        self._write()
        while (checkpoint := latest_checkpoint(self.folder)) is not None:
            shutil.rmtree(checkpoint)

    def _trained_splits(self) -> list[HeldoutSplit]:
        _, datasets = load_datasets(self.arm.config)
        found = [
            split_of_task(dataset, queries=self.evaluation.queries, documents=self.evaluation.documents)
            for dataset in datasets
        ]
        return [split for split in found if split is not None]

    def _restore(self) -> None:
        """Take over what the folder has, as far as it was made with the same settings."""
        try:
            stored = json.loads((self.folder / _RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"arm {self.arm.name}: {self.folder / _RECORD} cannot be read ({error}); delete it"
            ) from error
        self.changed = _difference(stored["training"], self.record.training)
        if stored.get("format_version") != _FORMAT_VERSION or self.changed is not None:
            self.changed = self.changed or "the format of its record"
            return
        self.record.steps = stored["steps"]
        if stored["trained"] is not None and (self.final / "epic.json").is_file():
            self.record.trained = Trained(**stored["trained"])
            if stored["scores"] is not None and stored["evaluation"] == self.record.evaluation:
                self.record.scores = ArmScores.from_json(stored["scores"])
                self.record.fingerprint = stored["fingerprint"]

    def _write(self) -> None:
        record = self.record
        values = {
            "format_version": _FORMAT_VERSION,
            "training": record.training,
            "evaluation": record.evaluation,
            "steps": record.steps,
            "trained": None if record.trained is None else asdict(record.trained),
            "fingerprint": record.fingerprint,
            "scores": None if record.scores is None else record.scores.to_json(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{_RECORD}.tmp"
        draft.write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(draft, self.folder / _RECORD)


class _TimedTrainer(Trainer):
    """A trainer that stops when its minutes are used up."""

    def __init__(self, config: TrainingConfig, minutes: float) -> None:
        super().__init__(config)
        self._limit = 60 * minutes

    def train_step(self, batch: TrainingBatch) -> StepResult:
        """One optimiser step; the last one if the time is over with it."""
        started = time.perf_counter()
        result = super().train_step(batch)
        if self.seconds + time.perf_counter() - started >= self._limit:
            self.last_step = self.step + 1
        return result


def planned_steps(config: TrainingConfig, budget: Budget) -> int:
    """How many steps a budget is, which the learning rate's schedule has to know before the first one.

    Tokens are counted in the batches that the run will have: the last step is the one with which they reach the
    budget. For minutes, a few steps are timed on a trainer that is thrown away.
    """
    if budget.unit == "steps":
        return int(budget.amount)
    trainer = Trainer(config)
    tokens = 0
    seconds: list[float] = []
    while tokens < budget.amount if budget.unit == "tokens" else len(seconds) < _PROBE_STEPS:
        batch = sample_batch(trainer.datasets, config, trainer.step)
        if budget.unit == "tokens":
            tokens += trainer.prepare(batch)[1].tokens
        else:
            started = time.perf_counter()
            trainer.train_step(batch)
            seconds.append(time.perf_counter() - started)
        trainer.step += 1
    if budget.unit == "tokens":
        return trainer.step
    # The first step warms up: it allocates, and compiles on some devices.
    return max(1, math.ceil(60 * budget.amount / statistics.median(seconds[1:])))


def _hashes(config: TrainingConfig) -> dict[str, str]:
    """SHA-256 of every training file; a file that is missing is the trainer's to complain about."""
    found = {}
    for name in config.tasks:
        for ending in (".jsonl.gz", ".jsonl"):
            file = Path(config.data) / f"{name}{ending}"
            if file.is_file():
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
                break
    return found


def _difference(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """What makes two runs different ones: "max_demonstrations 8 -> 16"; None if nothing does."""
    theirs = dict(stored["config"])
    # A setting that the record's release did not know had what is now its default.
    for item in fields(TrainingConfig):
        if item.name not in theirs and item.name not in ("model", "output", "data", "tasks"):
            theirs[item.name] = ours["config"][item.name] if item.name in _FREE else _default(item.name)
    for name, value in ours["config"].items():
        if name not in _FREE and theirs.get(name) != value:
            return f"{name} {theirs.get(name)!r} -> {value!r}"
    for name in ("budget", "data"):
        if stored[name] != ours[name]:
            return f"{name} {stored[name]!r} -> {ours[name]!r}" if name == "budget" else "a training file"
    return None


def _default(name: str) -> Any:
    [item] = [item for item in fields(TrainingConfig) if item.name == name]
    return json.loads(json.dumps(item.default))


# --- from ablation_scores
# Scores of one arm of an ablation: on files never trained on, and on rows of trained tasks that training left out.
#
# Both are scored by `score_heldout`, with the same controls. A trained task's demonstrations are rows that were trained
# on; its test queries, their passages and whatever shares a group with them were not.

Part = Literal["trained", "heldout"]


@dataclass(frozen=True)
class Score:
    """One line of an arm's scores, or a mean over tasks.

    Attributes:
        shown: How demonstrations were shown.
        part: "trained" (rows left out of training) or "heldout" (files never trained on).
        task: Name of the task or file; "mean" for a mean.
        condition: What was shown.
        k: How many demonstrations.
        ndcg_at_10: Mean over draws and queries, 0 to 1.
        standard_error: Of the mean, over queries.
        queries: Number of test queries.
        versus_zero: This minus k = 0, paired by query.
        versus_shuffled: Own demonstrations minus shuffled ones.
        versus_foreign: Own demonstrations minus another task's.
        versus_reference: This arm minus the reference arm, paired by query.
    """

    shown: Strategy
    part: Part
    task: str
    condition: Condition
    k: int
    ndcg_at_10: float
    standard_error: float
    queries: int
    versus_zero: Comparison | None = None
    versus_shuffled: Comparison | None = None
    versus_foreign: Comparison | None = None
    versus_reference: Comparison | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Score:
        """Read what `dataclasses.asdict` made of one."""
        comparisons = {name: value for name, value in values.items() if name.startswith("versus_")}
        return cls(
            **{
                **values,
                **{name: None if value is None else Comparison(**value) for name, value in comparisons.items()},
            }
        )


@dataclass(frozen=True)
class QueryScores:
    """nDCG@10 of single queries, for comparing two arms query by query.

    Attributes:
        queries: A hash of the test queries and their corpus: scores can be paired where it is equal.
        values: "own-8" and the like -> one mean over draws for each query.
    """

    queries: str
    values: dict[str, list[float]]


@dataclass
class ArmScores:
    """Everything that scoring an arm finds.

    Attributes:
        scores: Every task, condition and k.
        skipped: What could not be scored, and why: one line each.
        by_query: (shown, part, task) -> scores of single queries.
    """

    scores: list[Score] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    by_query: dict[tuple[str, str, str], QueryScores] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "scores": [asdict(score) for score in self.scores],
            "skipped": self.skipped,
            "by_query": [[*key, asdict(scores)] for key, scores in self.by_query.items()],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ArmScores:
        """Read what `to_json` made."""
        return cls(
            [Score.from_json(score) for score in values["scores"]],
            list(values["skipped"]),
            {(shown, part, task): QueryScores(**scores) for shown, part, task, scores in values["by_query"]},
        )

    def compared_with(self, reference: ArmScores, shown: Strategy) -> ArmScores:
        """The same scores with `versus_reference`.

        Args:
            reference: The other arm's scores.
            shown: Which of its strategies is the reference.
        """
        scores = [replace(score, versus_reference=self._versus(score, reference, shown)) for score in self.scores]
        return ArmScores(scores, self.skipped, self.by_query)

    def _versus(self, score: Score, reference: ArmScores, shown: Strategy) -> Comparison | None:
        ours = self.by_query.get((score.shown, score.part, score.task))
        theirs = reference.by_query.get((shown, score.part, score.task))
        key = _key(score.condition, score.k)
        # Another file, or other rows of it, cannot be paired.
        if ours is None or theirs is None or ours.queries != theirs.queries or key not in theirs.values:
            return None
        return Comparison(*mean_and_error(np.array(ours.values[key]) - np.array(theirs.values[key])))


def split_of_task(dataset: PairDataset, *, queries: int, documents: int) -> HeldoutSplit | None:
    """A retrieval test made of the rows that training left out.

    The pool of demonstrations is made of trained rows that share nothing with a test query. In a task with few targets
    (labels), where every label is in the pool, they share no query with one.

    Args:
        dataset: With held-out rows.
        queries: Most test queries.
        documents: Documents wanted in the corpus.

    Returns:
        The test; None if no held-out row can be asked.
    """
    pairs = with_components([(row.query, row.positive, row.group) for row in [*dataset.held_out, *dataset.rows]])
    held, trained = pairs[: len(dataset.held_out)], pairs[len(dataset.held_out) :]
    test = query_rows(held, queries)
    if not test:
        return None
    rest = list(trained)
    random.Random(f"ablation-{dataset.name}").shuffle(rest)
    if dataset.label_like:
        asked = {normalised(pair.query) for pair in test}
        pool = [pair for pair in rest if normalised(pair.query) not in asked]
    else:
        tested = {pair.component for pair in held}
        pool = [pair for pair in rest if pair.component not in tested]
    return assemble_split(
        dataset.name,
        test=test,
        rest=[*held, *rest],
        pool=pool,
        documents=documents,
        instruction=dataset.instruction or "",
        revision=dataset.sha256[:16],
        symmetric=dataset.symmetric,
    )


def score_arm(
    store: EmbeddingStore,
    splits: Mapping[Part, Sequence[HeldoutSplit]],
    evaluation: GridEvaluation,
    strategies: Sequence[Strategy],
) -> ArmScores:
    """Score an arm.

    Args:
        store: Embeddings of its final checkpoint.
        splits: The tests.
        evaluation: What is shown, and how often.
        strategies: How it is shown.
    """
    found = ArmScores()
    everything = [split for part in splits.values() for split in part]
    for shown in strategies:
        for part, tests in splits.items():
            # Foreign demonstrations are another task's of the same part, where there is one.
            ring = list(tests) if len(tests) > 1 else everything
            for split in tests:
                other = ring[(ring.index(split) + 1) % len(ring)]
                _score_split(found, store, split, other.pool if other is not split else None, part, shown, evaluation)
    return found


def _score_split(
    found: ArmScores,
    store: EmbeddingStore,
    split: HeldoutSplit,
    foreign: Sequence[Pair] | None,
    part: Part,
    shown: Strategy,
    evaluation: GridEvaluation,
) -> None:
    by_query: dict[str, npt.NDArray[np.float64]] = {}

    def observe(condition: Condition, k: int, scores: npt.NDArray[np.float64]) -> None:
        by_query[_key(condition, k)] = scores.mean(axis=0)

    for k in evaluation.num_demonstrations:
        what = f"{split.name} at k = {k}, shown as {shown}"
        if k > len(split.pool):
            found.skipped.append(f"{what}: {len(split.pool)} rows are free for demonstrations")
            continue
        try:
            result = score_heldout(
                store,
                split,
                ks=[k],
                draws=evaluation.draws,
                controls=evaluation.controls,
                foreign_pool=foreign if foreign is not None and len(foreign) >= k else None,
                strategy=shown,
                observe=observe,
            )
        except PromptError as error:
            # A fact about the strategy: texts take more positions than the model has.
            found.skipped.append(f"{what}: {error}")
            continue
        for score in result.scores:
            # k = 0 comes with every other k, for their differences.
            if score.k == k:
                mean, standard_error = mean_and_error(by_query[_key(score.condition, k)])
                found.scores.append(
                    Score(
                        *(shown, part, split.name, score.condition, k, mean, standard_error, len(split.queries)),
                        versus_zero=score.versus_zero,
                        versus_shuffled=score.versus_shuffled,
                        versus_foreign=score.versus_foreign,
                    )
                )
    ours = [score for score in found.scores if (score.shown, score.part, score.task) == (shown, part, split.name)]
    keys = [_key(score.condition, score.k) for score in ours]
    found.by_query[shown, part, split.name] = QueryScores(
        _test_hash(split), {key: [round(float(value), 6) for value in by_query[key]] for key in keys}
    )


def _key(condition: Condition, k: int) -> str:
    return f"{condition}-{k}"


def _test_hash(split: HeldoutSplit) -> str:
    return hashlib.sha256(json.dumps([split.queries, split.documents]).encode()).hexdigest()[:16]


# --- from ablation_grid
# What an ablation is made of: a YAML file of arms that differ in a few training settings and share everything else.

_GRIDS = Path(__file__).parent / "grids"
_KEYS = ("recipe", "base", "budget", "reference", "evaluation", "arms")
_UNITS = ("steps", "tokens", "minutes")
# Of an arm's entry; everything else in it is a training setting.
_ARM_KEYS = ("axis", "without")
# What makes arms comparable is no arm's own business.
_SHARED = {
    "steps": "budget",
    "stop_after": "budget",
    "data": "base",
    "evaluation_tasks": "base",
    "evaluation_rows": "base",
    "evaluate_every": "evaluation",
    "evaluation_demonstrations": "evaluation",
    "output": "--output",
    "name": "the arm's key",
    "keep_checkpoints": "nothing: an arm keeps its last checkpoint alone",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

Unit = Literal["steps", "tokens", "minutes"]


@dataclass(frozen=True)
class Budget:
    """How long each arm trains.

    Attributes:
        unit: "steps"; "tokens" (real tokens through the model, padding not counted); or "minutes" of training steps.
        amount: How many; a whole number of steps or tokens.
    """

    unit: Unit = "steps"
    amount: float = 200

    def __str__(self) -> str:
        return f"{self.amount:,g} {self.unit}" if self.unit == "minutes" else f"{int(self.amount):,} {self.unit}"


@dataclass(frozen=True)
class GridEvaluation:
    """How every arm is scored.

    Attributes:
        heldout: Files that no arm trains on: names in the data folder, or paths.
        num_demonstrations: Values of k; 0 is always scored.
        controls: Also show shuffled demonstrations and another task's.
        queries: Most test queries from each file or task.
        documents: Documents wanted in each corpus.
        draws: Draws of demonstrations for each k.
        seed: Of the splits.
        strategies: Arm -> how demonstrations are shown to it. By default an arm is shown what it was trained with,
            and one that was trained with none is shown vectors and, separately, texts.
    """

    heldout: tuple[str, ...] = ()
    num_demonstrations: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    controls: bool = True
    queries: int = 200
    documents: int = 1000
    draws: int = 1
    seed: int = 0
    strategies: Mapping[str, tuple[Strategy, ...]] = field(default_factory=dict)

    @property
    def table_k(self) -> int:
        """The k of the table and of the comparison with the reference: 8, or the largest where 8 is not scored."""
        return 8 if 8 in self.num_demonstrations else max(self.num_demonstrations)


@dataclass(frozen=True)
class Arm:
    """One training run of the grid.

    Attributes:
        name: Its key in the file, and its folder.
        axis: What it varies, for the table's grouping.
        config: The run. Its `steps` are the budget's where that counts steps.
        strategies: How demonstrations are shown when it is scored.
        changes: Its settings that are not the base's, for the record.
    """

    name: str
    axis: str
    config: TrainingConfig
    strategies: tuple[Strategy, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AblationGrid:
    """A grid, read and checked.

    Attributes:
        source: The file, or the name of a shipped grid.
        folder: Where runs and results go.
        arms: In the order of the file.
        reference: The arm that the others are compared with; None for no comparison.
        budget: The same for all arms.
        evaluation: The same for all arms.
    """

    source: str
    folder: Path
    arms: tuple[Arm, ...]
    reference: str | None
    budget: Budget
    evaluation: GridEvaluation


def list_grids() -> list[str]:
    """Names of the grids that ship with the package, sorted."""
    return sorted(file.stem for file in _GRIDS.glob("*.yaml"))


def load_grid(
    name_or_path: str,
    settings: Sequence[str] = (),
    *,
    output: Path | None = None,
    default_model: str = DEFAULT_CHECKPOINT,
) -> AblationGrid:
    """Read a grid.

    Args:
        name_or_path: A YAML or JSON file, or the name of a shipped grid. A file wins.
        settings: Changes of the base such as "model=..." or "tasks.faq.weight=2", of "budget.steps=50",
            "evaluation.queries=100" or "arms.NAME.projector=mlp". An arm's own settings win over the base's.
        output: Folder of the ablation; None takes runs/NAME.
        default_model: The backbone where recipe and base name none.

    Raises:
        ConfigError: If there is no such grid, or a setting cannot work; the message names the arm.
        MissingExtraError: If PyYAML is needed and not installed.
    """
    file = Path(name_or_path).expanduser()
    if not file.is_file():
        if name_or_path not in list_grids():
            raise ConfigError(
                f"no file {name_or_path}, and the shipped grids are {', '.join(list_grids())}; "
                "pass a YAML or JSON file, or one of them"
            )
        file = _GRIDS / f"{name_or_path}.yaml"
    values = recipe_values(str(file))
    unknown = sorted(str(key) for key in values if key not in _KEYS)
    if unknown:
        raise ConfigError(f"{name_or_path} has {', '.join(unknown)}; known are {', '.join(_KEYS)}")
    sections = {name: _section(values, name, name_or_path) for name in ("base", "budget", "evaluation", "arms")}
    base = _recipe(values.get("recipe", {}), name_or_path)
    base = _merged(base, sections["base"])
    for setting in settings:
        section, dot, rest = setting.partition(".")
        if dot and section in ("budget", "evaluation", "arms"):
            _set_in_section(sections[section], section, rest)
        else:
            change_setting(base, setting)
    base.setdefault("model", default_model)
    folder = output if output is not None else Path("runs") / file.stem
    budget = _budget(sections["budget"])
    evaluation = _evaluation(sections["evaluation"])
    if not sections["arms"]:
        raise ConfigError(f"{name_or_path} has no arms; write arms: {{NAME: {{SETTING: VALUE}}}}")
    arms = tuple(_arm(str(name), entry, base, folder, budget, evaluation) for name, entry in sections["arms"].items())
    names = [arm.name for arm in arms]
    reference = values.get("reference")
    for name, what in [(reference, "reference"), *((name, "evaluation.strategies") for name in evaluation.strategies)]:
        if name is not None and name not in names:
            raise ConfigError(f"{what} names {name}, the arms are {', '.join(names)}; name one of them")
    grid = AblationGrid(name_or_path, folder, arms, reference, budget, evaluation)
    _check_scored(grid)
    return grid


def pairs_file(name: str, data: str) -> Path:
    """The file of a name in `evaluation.heldout`: a path as it is, or <name>.jsonl[.gz] in the data folder.

    Raises:
        DataError: If there is neither.
    """
    candidates = [Path(name).expanduser(), *(Path(data) / f"{name}{ending}" for ending in (".jsonl.gz", ".jsonl"))]
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(
        f"evaluation.heldout names {name}, which is no file and no {name}.jsonl or {name}.jsonl.gz in {data}; "
        "correct it, or set data"
    )


def _section(values: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{source} has {name}: {section!r}, expected names and values; see docs/evaluation.md")
    return dict(section)


def _recipe(recipe: Any, source: str) -> dict[str, Any]:
    if isinstance(recipe, str):
        return recipe_values(recipe)
    if isinstance(recipe, dict):
        return dict(recipe)
    raise ConfigError(f"{source} has recipe: {recipe!r}, expected a recipe's name, a file, or settings")


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """Settings over settings; tasks are merged name by name and setting by setting."""
    merged = {**base, **changes}
    tasks = _tasks(base.get("tasks"))
    for name, entry in _tasks(changes.get("tasks")).items():
        tasks[name] = {**(tasks.get(name) or {}), **(entry or {})}
    merged["tasks"] = {name: entry for name, entry in tasks.items() if name not in without}
    return merged


def _tasks(value: Any) -> dict[str, Any]:
    if isinstance(value, (list, tuple)):
        return {str(name): {} for name in value}
    if value is None or isinstance(value, dict):
        return dict(value or {})
    raise ConfigError(f"tasks is {value!r}, expected names of files with their settings")


def _set_in_section(section: dict[str, Any], name: str, setting: str) -> None:
    """Put "queries=100" into `evaluation`, "steps=50" into `budget`, or "ARM.projector=mlp" into `arms`."""
    path, equals, text = setting.partition("=")
    # A name of an arm may have dots of its own.
    arm, _, key = path.strip().rpartition(".")
    if not equals or not key or (name == "arms" and arm not in section):
        example = f"arms.ARM.NAME=VALUE; the arms are {', '.join(section)}" if name == "arms" else f"{name}.NAME=VALUE"
        raise ConfigError(f"the setting '{name}.{setting}' is not {example}")
    yaml = yaml_module()
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the setting '{name}.{setting}' has a value that is not valid YAML; quote it") from error
    if name == "arms":
        section[arm] = {**(section[arm] or {}), key: value}
        return
    if name == "budget":
        section.clear()  # one unit: --set budget.tokens=... replaces the file's steps
    section[path.strip()] = value


def _budget(section: Mapping[str, Any]) -> Budget:
    if not section:
        return Budget()
    if len(section) != 1 or next(iter(section)) not in _UNITS:
        raise ConfigError(f"budget is {dict(section)}; give one of {', '.join(_UNITS)}, for instance {{steps: 200}}")
    [(unit, amount)] = section.items()
    whole = unit != "minutes"
    if type(amount) not in ((int,) if whole else (int, float)) or not 0 < amount < math.inf:
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"budget.{unit} is {amount!r}; give {kind} above 0")
    return Budget(cast("Unit", unit), amount)


def _evaluation(section: Mapping[str, Any]) -> GridEvaluation:
    known = GridEvaluation.__dataclass_fields__
    unknown = sorted(str(key) for key in section if key not in known)
    if unknown:
        raise ConfigError(f"evaluation has {', '.join(unknown)}; known are {', '.join(known)}")
    values = dict(section)
    for name in ("heldout", "num_demonstrations"):
        if name in values:
            wanted: type = str if name == "heldout" else int
            if not isinstance(values[name], list) or any(type(item) is not wanted for item in values[name]):
                raise ConfigError(f"evaluation.{name} is {values[name]!r}; give a list")
            values[name] = tuple(values[name])
    for name in ("queries", "documents", "draws"):
        if name in values and (type(values[name]) is not int or values[name] < 1):
            raise ConfigError(f"evaluation.{name} is {values[name]!r}; give a whole number of 1 or more")
    for name, words in (("controls", "true or false"), ("seed", "a whole number")):
        if name in values and type(values[name]) is not (bool if name == "controls" else int):
            raise ConfigError(f"evaluation.{name} is {values[name]!r}; give {words}")
    shown = values.get("strategies") or {}
    if not isinstance(shown, dict) or any(
        not isinstance(names, list) or not names or any(name not in STRATEGIES for name in names)
        for names in shown.values()
    ):
        raise ConfigError(
            f"evaluation.strategies is {shown!r}; write {{ARM: [epic, text]}}, known are {', '.join(STRATEGIES)}"
        )
    values["strategies"] = {str(arm): tuple(names) for arm, names in shown.items()}
    evaluation = GridEvaluation(**values)
    if any(k < 0 for k in evaluation.num_demonstrations):
        raise ConfigError(
            f"evaluation.num_demonstrations is {list(evaluation.num_demonstrations)}; give numbers of 0 or more"
        )
    return replace(evaluation, num_demonstrations=tuple(sorted({0, *evaluation.num_demonstrations})))


def _arm(
    name: str, entry: Any, base: Mapping[str, Any], folder: Path, budget: Budget, evaluation: GridEvaluation
) -> Arm:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"an arm is called {name!r}; use letters, digits and . _ + -, because it names a folder")
    if not isinstance(entry, (dict, type(None))):
        raise ConfigError(f"arm {name} is {entry!r}; write {name}: {{SETTING: VALUE}}")
    changes = {str(key): value for key, value in (entry or {}).items() if key not in _ARM_KEYS}
    for key in changes:
        if key in _SHARED:
            raise ConfigError(f"arm {name} sets {key}, which is the same for all arms; it comes from {_SHARED[key]}")
    without = (entry or {}).get("without") or []
    if not isinstance(without, list):
        raise ConfigError(f"arm {name} has without: {without!r}; give a list of tasks")
    tasks = _tasks(base.get("tasks"))
    scored = [task for task in base.get("evaluation_tasks") or () if task in tasks]
    for task in without:
        if task not in tasks or task in scored:
            fact = "scores as a trained task" if task in scored else "does not train"
            raise ConfigError(f"arm {name} leaves out {task}, which the base {fact}; take it out of one of the two")
    values = _merged(base, changes, without)
    values |= {
        "name": name,
        "output": str(folder / "arms" / name),
        "stop_after": None,
        # Arms are scored when they are done, and all in the same way.
        "evaluate_every": 0,
        "evaluation_tasks": scored,
        "keep_checkpoints": 1,
    }
    if budget.unit == "steps":
        values["steps"] = int(budget.amount)
    try:
        config = TrainingConfig.from_dict(values, origin=f"arm {name}")
    except ConfigError as error:
        raise ConfigError(str(error) if f"arm {name} " in str(error) else f"arm {name}: {error}") from error
    default: tuple[Strategy, ...] = (
        ("epic", "text") if config.strategy == "none" else (cast("Strategy", config.strategy),)
    )
    record = json.loads(json.dumps({**changes, **({"without": without} if without else {})}))
    return Arm(name, str((entry or {}).get("axis") or ""), config, evaluation.strategies.get(name, default), record)


def _check_scored(grid: AblationGrid) -> None:
    first = grid.arms[0].config
    if not grid.evaluation.heldout and not (first.evaluation_tasks and first.evaluation_rows):
        raise ConfigError(
            f"{grid.source} scores nothing: evaluation.heldout is empty, and no task of base.evaluation_tasks is "
            "trained; name files in one of them"
        )
    for arm in grid.arms:
        both = sorted(set(grid.evaluation.heldout) & set(arm.config.tasks))
        if both:
            raise ConfigError(
                f"arm {arm.name} trains on {', '.join(both)}, which evaluation.heldout scores as never trained on; "
                "take it out of one of the two"
            )


# --- from ablation_report
# Results of an ablation: JSON with everything, one Markdown table.

FORMAT_VERSION = 1
PARTS: dict[Part, str] = {"trained": "trained tasks", "heldout": "held-out tasks"}
"""The two kinds of tasks, and what tables call them."""


@dataclass(frozen=True)
class Line:
    """One arm as one strategy shows demonstrations to it: a line of the table and of the plots.

    Attributes:
        arm: The arm.
        shown: The strategy.
        label: The arm's name, and the strategy where the arm is scored with several.
    """

    arm: Arm
    shown: Strategy
    label: str


@dataclass
class AblationReport:
    """What an ablation has found so far.

    Attributes:
        grid: What was asked.
        records: Arm -> what it is; arms that are not done are missing.
        failures: Arm -> why it could not be trained or scored.
        command: The command line.
        started: ISO time.
        seconds: Wall time of this call.
    """

    grid: AblationGrid
    records: dict[str, ArmRecord] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    started: str = ""
    seconds: float = 0.0

    def lines(self) -> list[Line]:
        """The lines of what is scored: axes as they come in the grid, the reference's own first."""
        scored = [arm for arm in self.grid.arms if arm.name in self.records]
        axes = list(dict.fromkeys(arm.axis for arm in self.grid.arms))
        ordered = sorted(scored, key=lambda arm: (arm.name != self.grid.reference, axes.index(arm.axis)))
        return [
            Line(arm, shown, arm.name if len(arm.strategies) == 1 else f"{arm.name}, shown as {shown}")
            for arm in ordered
            for shown in arm.strategies
        ]

    def scores(self, arm: str) -> ArmScores:
        """An arm's scores, compared with the reference arm's where that is scored, too."""
        scores = self.records[arm].scores or ArmScores()
        name = self.grid.reference
        if name is None or name not in self.records:
            return scores
        [reference] = [other for other in self.grid.arms if other.name == name]
        return scores.compared_with(self.records[name].scores or ArmScores(), reference.strategies[0])

    def mean(self, line: Line, part: Part, condition: Condition, k: int) -> Score | None:
        """Mean over the tasks of a part; None unless every task of the part has this line.

        Standard errors are those of independent samples: different tasks have different queries.
        """
        return _mean(self.scores(line.arm.name).scores, line.shown, part, condition, k)

    def tasks(self, part: Part) -> list[str]:
        """Names of the tasks of a part."""
        found = (score for record in self.records.values() if record.scores for score in record.scores.scores)
        return list(dict.fromkeys(score.task for score in found if score.part == part))

    def to_markdown(self) -> str:
        """The table, scores times 100; below it what was not scored."""
        k = self.grid.evaluation.table_k
        parts = [part for part in PARTS if self.tasks(part)]
        own = [f"k = {k}", f"k = {k} minus k = 0"] if k else []
        controls = ["own minus shuffled", "own minus foreign"] if k and self.grid.evaluation.controls else []
        versus = [f"minus {self.grid.reference}"] if self.grid.reference is not None else []
        header = ["axis", "arm", "trained tokens", "seconds"]
        header += [f"{PARTS[part]}: {title}" for part in parts for title in ["k = 0", *own, *controls, *versus]]
        rows = []
        for line in self.lines():
            trained = self.records[line.arm.name].trained
            row = [line.arm.axis, line.label]
            row += [f"{trained.tokens:,}", f"{trained.seconds:,.0f}"] if trained is not None else ["", ""]
            for part in parts:
                zero = self.mean(line, part, "none", 0)
                best = self.mean(line, part, "own", k) if k else zero
                row.append(percent(zero.ndcg_at_10 if zero else None))
                if own:
                    row += [percent(best.ndcg_at_10 if best else None), _cell(best, "versus_zero")]
                if controls:
                    row += [_cell(best, "versus_shuffled"), _cell(best, "versus_foreign")]
                if versus:
                    row.append(_cell(best, "versus_reference"))
            rows.append(row)
        notes = [f"- {arm} failed: {reason}" for arm, reason in self.failures.items()]
        notes += [
            f"- {arm}: not scored: {reason}"
            for arm, record in self.records.items()
            for reason in (record.scores.skipped if record.scores else ())
        ]
        table = markdown_table(header, rows, text_columns=2)
        return "\n".join([self._caption(parts), "", table, *(["", *notes] if notes else [])])

    def _caption(self, parts: Sequence[Part]) -> str:
        tasks = "; ".join(f"{PARTS[part]}: {', '.join(self.tasks(part))}" for part in parts)
        return f"nDCG@10 times 100, ± one standard error over queries. Each arm: {self.grid.budget}. {tasks}."

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values; scores are fractions."""
        grid = self.grid
        return {
            "format_version": FORMAT_VERSION,
            "command": list(self.command),
            "started": self.started,
            "seconds": round(self.seconds, 1),
            "versions": versions(),
            "grid": grid.source,
            "budget": asdict(grid.budget),
            "evaluation": json.loads(json.dumps(asdict(grid.evaluation))),
            "reference": grid.reference,
            "failures": self.failures,
            "arms": [self._arm_json(arm) for arm in grid.arms if arm.name in self.records],
        }

    def _arm_json(self, arm: Arm) -> dict[str, Any]:
        record = self.records[arm.name]
        scores = self.scores(arm.name)
        keys = dict.fromkeys((score.shown, score.part, score.condition, score.k) for score in scores.scores)
        means = [_mean(scores.scores, *key) for key in keys]
        return {
            "name": arm.name,
            "axis": arm.axis,
            "changes": dict(arm.changes),
            "config": json.loads(json.dumps(arm.config.to_dict())),
            "fingerprint": record.fingerprint,
            "trained": None if record.trained is None else asdict(record.trained),
            "means": [asdict(mean) for mean in means if mean is not None],
            "scores": [asdict(score) for score in scores.scores],
            "skipped": scores.skipped,
        }

    def write(self, folder: Path) -> None:
        """Write `ablation.json` and `ablation.md`, so that a reader never sees half of one."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "ablation.json": json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n",
            "ablation.md": self.to_markdown() + "\n",
        }
        for name, text in texts.items():
            draft = folder / f"{name}.{os.getpid()}.tmp"
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, folder / name)


def _mean(scores: Sequence[Score], shown: Strategy, part: Part, condition: Condition, k: int) -> Score | None:
    of_part = [score for score in scores if (score.shown, score.part) == (shown, part)]
    found = [score for score in of_part if (score.condition, score.k) == (condition, k)]
    # A mean over fewer tasks could not be compared with the others.
    if not found or len(found) < len({score.task for score in of_part}):
        return None

    def pooled(name: str) -> Comparison | None:
        return pool_comparisons([getattr(score, name) for score in found])

    return Score(
        *(shown, part, "mean", condition, k),
        ndcg_at_10=sum(score.ndcg_at_10 for score in found) / len(found),
        standard_error=sum(score.standard_error**2 for score in found) ** 0.5 / len(found),
        queries=sum(score.queries for score in found),
        versus_zero=pooled("versus_zero"),
        versus_shuffled=pooled("versus_shuffled"),
        versus_foreign=pooled("versus_foreign"),
        versus_reference=pooled("versus_reference"),
    )


def _cell(score: Score | None, name: str) -> str:
    """One of a score's differences; a dash for what was not scored."""
    return (difference(getattr(score, name)) if score is not None else "") or percent(None)


Progress = Callable[[str], None]


def run_ablation(
    grid: AblationGrid,
    *,
    only: Sequence[str] = (),
    progress: Progress | None = None,
    show_progress: bool = False,
    command: tuple[str, ...] = (),
) -> AblationReport:
    """Train and score the arms of a grid; write tables, JSON and plots into its folder.

    Arms that are done are not trained again, and an interrupted one goes on. An arm that cannot be trained is
    reported as failed, and the others are trained all the same.

    Args:
        grid: What to do.
        only: Names of arms to train and score; the report also has the others that are done. Empty for all.
        progress: Called with one line of text for each step.
        show_progress: Whether the trainer draws progress bars.
        command: The command line, for the record.

    Returns:
        The report. After each arm it is in the grid's folder as `ablation.json` and `ablation.md`, in the end with
        plots in `plots/`.

    Raises:
        ConfigError: `only` names no arm.
        DataError: A held-out file is missing or malformed.
        MissingExtraError: matplotlib is not installed.
    """
    say = progress or (lambda line: None)
    _check_names(grid, only)
    require_matplotlib()  # now, and not after hours of training
    started = time.monotonic()
    report = AblationReport(grid, command=command)
    report.started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    heldout = _heldout_splits(grid)
    runs = [ArmRun(arm, grid.budget, grid.evaluation, heldout) for arm in grid.arms]
    report.records = {run.arm.name: run.record for run in runs if run.state == "scored"}
    wanted = [run for run in runs if not only or run.arm.name in only]
    for number, run in enumerate(wanted, start=1):
        title = f"arm {run.arm.name} ({number} of {len(wanted)})"
        try:
            _train_and_score(run, title, say, show_progress)
        except EpicError as error:
            report.failures[run.arm.name] = str(error)
            say(f"{title}: failed: {error}")
        else:
            report.records[run.arm.name] = run.record
        report.seconds = time.monotonic() - started
        report.write(grid.folder)
    if report.records:
        plot_ablation(report, grid.folder / "plots")
    return report


def failed_arms(report: AblationReport) -> TrainingError | None:
    """The error that a command ends with when arms have failed; None if none has."""
    if not report.failures:
        return None
    first, reason = next(iter(report.failures.items()))
    return TrainingError(
        f"{len(report.failures)} of {len(report.grid.arms)} arms failed, {first} for one: {reason}; the others are in "
        f"{report.grid.folder}: correct the grid and run the same command, which trains what is missing"
    )


def _train_and_score(run: ArmRun, title: str, say: Progress, show_progress: bool) -> None:
    if run.changed is not None:
        say(f"{title}: the run in {run.folder} has other settings ({run.changed}); it is trained afresh")
    if run.state == "scored":
        say(f"{title}: done before")
        return
    if run.state != "trained":
        say(f"{title}: {'goes on' if run.state == 'interrupted' and run.changed is None else 'trains'}")
        run.train(show_progress=show_progress)
    trained = run.record.trained
    if trained is not None:
        say(f"{title}: {trained.steps:,} steps, {trained.tokens:,} tokens, {trained.seconds:,.0f} s; is scored")
    run.score()


def _check_names(grid: AblationGrid, only: Sequence[str]) -> None:
    names = [arm.name for arm in grid.arms]
    for name in only:
        if name not in names:
            raise ConfigError(
                f"--only names {name}, the arms of {grid.source} are {', '.join(names)}; name one of them"
            )


def _heldout_splits(grid: AblationGrid) -> list[HeldoutSplit]:
    evaluation = grid.evaluation
    files = [pairs_file(name, grid.arms[0].config.data) for name in evaluation.heldout]
    return [
        make_split(
            path,
            queries=evaluation.queries,
            documents=evaluation.documents,
            seed=evaluation.seed,
            symmetric=file_stem(path) in SYMMETRIC_PAIRS,
        )
        for path in files
    ]
