"""Ablations: a loop over overrides of a training recipe, scored on held-out data, in one table.

    report = run_ablation(load_grid("grid.yaml", output=Path("runs/ablation")))

A grid is a YAML file. `recipe` and `base` are the training settings that all arms share, `arms` maps names to the
settings that differ, `evaluation` says how every arm is scored:

    recipe: own-data
    base: {data: my-pairs, tasks: [faq, tickets], evaluation_tasks: [faq], evaluation_rows: 20, steps: 60}
    reference: epic
    evaluation: {heldout: [wiki], num_demonstrations: [0, 8]}
    arms:
      epic: {axis: strategy}
      none: {axis: strategy, strategy: none}
      faq-only: {axis: tasks, without: [tickets]}

Every arm trains with `epic_rag.training.Trainer` and is scored on files that no arm trains on and on rows of trained
tasks that training left out. `arms/NAME/arm.json` keeps an arm's settings and scores; an arm whose settings are those
on disk is skipped.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError, DataError, EpicError, PromptError, TrainingError
from epic_rag.evaluation.datasets import SYMMETRIC_PAIRS, content_revision, normalize_text
from epic_rag.evaluation.embedding_store import EmbeddingStore
from epic_rag.evaluation.heldout import (
    Comparison,
    HeldoutSplit,
    Pair,
    assemble_split,
    condition_scores,
    file_stem,
    make_split,
    query_rows,
    with_components,
)
from epic_rag.evaluation.report import difference, markdown_table, percent, pool_comparisons, versions
from epic_rag.files import write_atomically
from epic_rag.metrics import mean_and_error
from epic_rag.training import Trainer
from epic_rag.training.config import TrainingConfig, change_setting, recipe_values, yaml_module
from epic_rag.training.data import load_datasets

if TYPE_CHECKING:
    from epic_rag.training.data import PairDataset

__all__ = [
    "AblationGrid",
    "AblationReport",
    "Arm",
    "ArmResult",
    "GridEvaluation",
    "failed_arms",
    "list_grids",
    "load_grid",
    "run_ablation",
    "split_of_task",
]

_GRIDS = Path(__file__).parent / "grids"
_KEYS = ("recipe", "base", "reference", "evaluation", "arms")
_PREFIX = "evaluation."
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

PARTS = {"trained": "trained tasks", "heldout": "held-out tasks"}
"""Rows of trained tasks that training left out, and files never trained on; and their names in tables."""
Shown = Literal["epic", "text"]
"""Form of the demonstrations: vectors or texts."""


class GridEvaluation(BaseModel):
    """Settings of an ablation's evaluation.

    Attributes:
        heldout: Files that no arm trains on: names in the data folder, or paths.
        num_demonstrations: Values of k; 0 is always scored.
        controls: Also score shuffled demonstrations and another task's.
        queries: Most test queries from each file or task.
        documents: Documents wanted in each corpus.
        draws: Draws of demonstrations for each k.
        seed: Seed of the splits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    heldout: list[str] = Field(default_factory=list)
    num_demonstrations: list[Annotated[int, Field(ge=0)]] = Field(default=[8])
    controls: bool = True
    queries: int = Field(default=200, ge=1)
    documents: int = Field(default=1000, ge=1)
    draws: int = Field(default=1, ge=1)
    seed: int = 0

    @property
    def table_k(self) -> int:
        """The k of the table and of the comparison with the reference: 8, or the largest where 8 is not scored."""
        return 8 if 8 in self.num_demonstrations else max(self.num_demonstrations, default=0)


@dataclass(frozen=True)
class Arm:
    """One training run of a grid.

    Attributes:
        name: Its key in the file, and its folder.
        axis: The choice that it varies; groups the table.
        config: The run.
        strategies: How demonstrations are shown when it is scored: as in its training; both ways for an arm that was
            trained without demonstrations.
    """

    name: str
    axis: str
    config: TrainingConfig
    strategies: tuple[Shown, ...]


@dataclass(frozen=True)
class AblationGrid:
    """A grid, read and checked.

    Attributes:
        source: The file, or the name of a shipped grid.
        folder: Folder of runs and results.
        arms: In the order of the file.
        reference: The arm that the others are compared with; None for no comparison.
        evaluation: How every arm is scored.
    """

    source: str
    folder: Path
    arms: tuple[Arm, ...]
    reference: str | None
    evaluation: GridEvaluation


class ArmResult(TypedDict):
    """Training and scores of an arm, as `arm.json` has them.

    Attributes:
        trained: Steps, pairs, tokens (padding not counted), seconds of the steps, and the last loss.
        fingerprint: Of the checkpoint that was scored.
        scores: Key of `score_key` -> nDCG@10 of each test query, mean over draws.
        tests: Task or file -> hash of its test queries and corpus; scores of two arms are paired where it is equal.
        skipped: A line for each test that could not be scored.
    """

    trained: dict[str, Any]
    fingerprint: str
    scores: dict[str, list[float]]
    tests: dict[str, str]
    skipped: list[str]


def score_key(shown: str, part: str, task: str, condition: str, k: int) -> str:
    """Return the key of a score: "epic heldout nl2bash own 8"."""
    return f"{shown} {part} {task} {condition} {k}"


def list_grids() -> list[str]:
    """Return the names of the grids that ship with the package, sorted."""
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
        name_or_path: A YAML or JSON file, or the name of a shipped grid. A file takes precedence.
        settings: Overrides of every arm such as "model=...", "steps=50" or "tasks.faq.weight=2", and of the evaluation
            such as "evaluation.queries=100".
        output: Folder of the ablation; None takes runs/NAME.
        default_model: The backbone where recipe, base and settings name none.

    Raises:
        ConfigError: If there is no such grid, or a setting cannot work; the message names the arm.
        MissingExtraError: If PyYAML is needed and not installed.
    """
    file = Path(name_or_path).expanduser()
    if not file.is_file():
        if name_or_path not in list_grids():
            raise ConfigError(f"No file {name_or_path}. Pass a file, or one of the grids {', '.join(list_grids())}.")
        file = _GRIDS / f"{name_or_path}.yaml"
    values = recipe_values(str(file))
    unknown = sorted(str(key) for key in values if key not in _KEYS)
    if unknown:
        raise ConfigError(f"{name_or_path} has {', '.join(unknown)}. Known are {', '.join(_KEYS)}.")
    entries, recipe = values.get("arms"), values.get("recipe") or {}
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"{name_or_path} has no arms. Write arms: {{NAME: {{SETTING: VALUE}}}}.")
    base = _merged(recipe_values(recipe) if isinstance(recipe, str) else recipe, values.get("base") or {})
    base.setdefault("model", default_model)
    evaluation = _evaluation(values.get("evaluation") or {}, [item for item in settings if item.startswith(_PREFIX)])
    overrides = [item for item in settings if not item.startswith(_PREFIX)]
    folder = output if output is not None else Path("runs") / file.stem
    arms = tuple(_arm(str(name), entry, base, overrides, folder) for name, entry in entries.items())
    if not evaluation.table_k:  # without demonstrations there is nothing to show
        arms = tuple(replace(arm, strategies=arm.strategies[:1]) for arm in arms)
    reference = values.get("reference")
    if reference is not None and reference not in entries:
        raise ConfigError(f"reference is {reference}. The arms are {', '.join(arm.name for arm in arms)}.")
    if not evaluation.heldout and not (arms[0].config.evaluation_tasks and arms[0].config.evaluation_rows):
        raise ConfigError(f"{name_or_path} scores nothing. Name files in evaluation.heldout or base.evaluation_tasks.")
    for arm in arms:
        both = sorted(set(evaluation.heldout) & set(arm.config.tasks))
        if both:
            raise ConfigError(f"Arm {arm.name} trains on {', '.join(both)} of evaluation.heldout. Use other files.")
    return AblationGrid(name_or_path, folder, arms, reference, evaluation)


def _evaluation(section: Mapping[str, Any], settings: Sequence[str]) -> GridEvaluation:
    values = dict(section)
    for setting in settings:
        name, _, text = setting.removeprefix(_PREFIX).partition("=")
        try:
            values[name] = yaml_module().safe_load(text)
        except yaml_module().YAMLError as error:
            raise ConfigError(f"The value of {setting!r} is not valid YAML. Put it in quotes.") from error
    try:
        return GridEvaluation(**values)
    except ValidationError as error:
        first = error.errors()[0]
        fact = f"evaluation.{'.'.join(map(str, first['loc']))} is {first['input']!r} ({first['msg']})"
        raise ConfigError(f"{fact}. Settings are {', '.join(GridEvaluation.model_fields)}.") from error


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """Merge settings; tasks are merged name by name and setting by setting."""
    merged = {**base, **changes}
    tasks = _tasks(base.get("tasks"))
    for name, entry in _tasks(changes.get("tasks")).items():
        tasks[name] = {**(tasks.get(name) or {}), **(entry or {})}
    merged["tasks"] = {name: entry for name, entry in tasks.items() if name not in without}
    return merged


def _tasks(value: Any) -> dict[str, Any]:
    return {str(name): {} for name in value} if isinstance(value, (list, tuple)) else dict(value or {})


def _arm(name: str, entry: Any, base: Mapping[str, Any], overrides: Sequence[str], folder: Path) -> Arm:
    if not _ARM_NAME.fullmatch(name):
        raise ConfigError(f"An arm is called {name!r}, and its name is a folder. Use letters, digits and . _ + -.")
    if not isinstance(entry, (dict, type(None))):
        raise ConfigError(f"Arm {name} is {entry!r}. Write {name}: {{SETTING: VALUE}}.")
    changes = dict(entry or {})
    axis, without = str(changes.pop("axis", "")), changes.pop("without", None) or []
    tasks = _tasks(base.get("tasks"))
    scored = [task for task in base.get("evaluation_tasks") or () if task in tasks]
    for task in without:
        if task not in tasks or task in scored:
            fact = "scores as a trained task" if task in scored else "does not train"
            raise ConfigError(f"Arm {name} leaves out {task}, which the base {fact}. Correct one of the two.")
    values = _merged(base, changes, without)
    try:
        for override in overrides:
            change_setting(values, override)
        # Arms are scored when they are done, and one that was interrupted starts again.
        values |= {"name": name, "output": str(folder / "arms" / name)}
        values |= {"stop_at_step": None, "evaluate_every": 0, "save_every": 10**9}
        config = TrainingConfig.from_dict({**values, "evaluation_tasks": scored}, origin=f"arm {name}")
    except ConfigError as error:
        raise ConfigError(f"Arm {name}: {error}") from error
    shown: tuple[Shown, ...] = ("epic", "text") if config.strategy == "none" else (config.strategy,)
    return Arm(name, axis, config, shown)


@dataclass
class AblationReport:
    """Results of an ablation so far.

    Attributes:
        grid: The grid.
        results: Arm -> result; arms without one are missing.
        failures: Arm -> why it could not be trained or scored.
        command: The command line.
        started: ISO time.
    """

    grid: AblationGrid
    results: dict[str, ArmResult] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    started: str = ""

    def tasks(self, part: str) -> list[str]:
        """Return the names of a part's tasks."""
        keys = [key.split(" ", 2) for result in self.results.values() for key in result["scores"]]
        return list(dict.fromkeys(rest.rsplit(" ", 2)[0] for _, of, rest in keys if of == part))

    def difference(
        self, part: str, ours: tuple[str, str, str, int], theirs: tuple[str, str, str, int]
    ) -> Comparison | None:
        """Return one score minus another, paired by query, as a mean over a part's tasks; None if one is missing.

        Args:
            part: "trained" or "heldout".
            ours: Arm, how demonstrations were shown, condition and k of the first score.
            theirs: The same of the second score.
        """
        found: list[Comparison | None] = []
        for task in self.tasks(part):
            pair = []
            for arm, shown, condition, k in (ours, theirs):
                result = self.results[arm]
                score = result["scores"].get(score_key(shown, part, task, condition, k))
                pair.append((score, result["tests"].get(task)))
            (a, test), (b, other_test) = pair
            same = a is not None and b is not None and test == other_test
            found.append(Comparison(*mean_and_error(np.array(a) - np.array(b))) if same else None)
        return pool_comparisons(found)

    def row(self, arm: Arm, shown: Shown) -> dict[str, str]:
        """Return a line of the table, by column; scores times 100."""
        evaluation, result = self.grid.evaluation, self.results[arm.name]
        trained, k = result["trained"], evaluation.table_k
        row = {"axis": arm.axis, "arm": arm.name if len(arm.strategies) == 1 else f"{arm.name}, shown as {shown}"}
        row |= {"steps": f"{trained['steps']:,}", "tokens": f"{trained['tokens']:,}"}
        row |= {"seconds": f"{trained['seconds']:,.0f}"}
        for part, title in PARTS.items():
            tasks = self.tasks(part)
            if not tasks:
                continue
            zero = [result["scores"].get(score_key(shown, part, task, "none", 0)) for task in tasks]
            means = [float(np.mean(by_query)) for by_query in zero if by_query is not None]
            row[f"{title}: k = 0"] = percent(sum(means) / len(means) if len(means) == len(tasks) else None)
            own = (arm.name, shown, "own" if k else "none", k)
            others = {}
            if k:
                others[f"k = {k} minus k = 0"] = (arm.name, shown, "none", 0)
            if k and evaluation.controls:
                others["own minus shuffled"] = (arm.name, shown, "shuffled", k)
                others["own minus foreign"] = (arm.name, shown, "foreign", k)
            for reference in self.grid.arms:
                if reference.name == self.grid.reference and reference.name in self.results:
                    others[f"minus {reference.name}"] = (reference.name, reference.strategies[0], *own[2:])
            for name, other in others.items():
                row[f"{title}: {name}"] = difference(self.difference(part, own, other)) or percent(None)
        return row

    def to_markdown(self) -> str:
        """Return the table, and below it the tests that were not scored."""
        arms = [arm for arm in self.grid.arms if arm.name in self.results]
        rows = [self.row(arm, shown) for arm in arms for shown in arm.strategies]
        tasks = "; ".join(
            f"{title}: {', '.join(self.tasks(part))}" for part, title in PARTS.items() if self.tasks(part)
        )
        blocks = [f"nDCG@10 times 100, ± one standard error over queries. {tasks}."]
        if rows:
            blocks.append(markdown_table(list(rows[0]), [list(row.values()) for row in rows], text_columns=2))
        notes = [f"- {arm} failed: {reason}" for arm, reason in self.failures.items()]
        notes += [f"- {arm}: not scored: {line}" for arm, result in self.results.items() for line in result["skipped"]]
        return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; scores are fractions."""
        grid = self.grid
        arms = [
            {"name": arm.name, "axis": arm.axis, "config": _plain(arm.config.to_dict()), **self.results[arm.name]}
            for arm in grid.arms
            if arm.name in self.results
        ]
        head = {"format_version": 2, "command": list(self.command), "started": self.started, "versions": versions()}
        evaluation = {"evaluation": grid.evaluation.model_dump(), "reference": grid.reference}
        return {**head, "grid": grid.source, **evaluation, "failures": self.failures, "arms": arms}

    def write(self) -> None:
        """Write `ablation.json` and `ablation.md` into the grid's folder."""
        self.grid.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), ensure_ascii=False, indent=1)
        write_atomically(self.grid.folder / "ablation.json", text + "\n")
        write_atomically(self.grid.folder / "ablation.md", self.to_markdown() + "\n")


def _plain(values: Any) -> Any:
    return json.loads(json.dumps(values))


def run_ablation(
    grid: AblationGrid,
    *,
    only: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
    show_progress: bool = False,
    command: tuple[str, ...] = (),
) -> AblationReport:
    """Train and score the arms of a grid; after each arm write `ablation.json` and `ablation.md` into its folder.

    An arm that cannot be trained is reported as failed, and the others are trained nevertheless.

    Args:
        grid: The grid.
        only: Names of arms to train and score; the report also has the others whose results are on disk. Empty for
            all.
        progress: Called with one line of text for each step.
        show_progress: Whether the trainer draws progress bars.
        command: The command line, for the record.

    Returns:
        The report.

    Raises:
        ConfigError: `only` names an unknown arm.
        DataError: A held-out file is missing or malformed.
    """
    say = progress or (lambda line: None)
    names = [arm.name for arm in grid.arms]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only names {name}. The arms of {grid.source} are {', '.join(names)}.")
    now = datetime.datetime.now(datetime.timezone.utc)
    report = AblationReport(grid, command=command, started=now.isoformat(timespec="seconds"))
    settings = grid.evaluation
    files = [_pairs_file(name, grid.arms[0].config.data) for name in settings.heldout]
    heldout = [
        make_split(
            file,
            queries=settings.queries,
            documents=settings.documents,
            seed=settings.seed,
            symmetric=file_stem(file) in SYMMETRIC_PAIRS,
        )
        for file in files
    ]
    for arm in grid.arms:
        title = f"arm {arm.name} ({names.index(arm.name) + 1} of {len(names)})"
        wanted = not only or arm.name in only
        file = Path(arm.config.output) / "arm.json"
        try:
            inputs = _inputs(arm, settings, heldout)
            stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
            if stored is not None and stored["inputs"] == inputs:
                report.results[arm.name] = stored["result"]
                say(f"{title}: done before")
            elif wanted:
                say(f"{title}: training")
                result = report.results[arm.name] = _train_and_score(arm, settings, heldout, show_progress)
                say(f"{title}: {result['trained']['steps']:,} steps, {result['trained']['tokens']:,} tokens")
                write_atomically(file, json.dumps({"inputs": inputs, "result": result}, ensure_ascii=False) + "\n")
        except EpicError as error:
            if wanted:
                report.failures[arm.name] = str(error)
                say(f"{title}: failed: {error}")
        report.write()
    return report


def failed_arms(report: AblationReport) -> TrainingError | None:
    """Return the error that a command ends with when arms have failed; None if none has."""
    if not report.failures:
        return None
    count = f"{len(report.failures)} of {len(report.grid.arms)} arms failed"
    first, reason = next(iter(report.failures.items()))
    return TrainingError(f"{count}. {first}: {reason} The results of the others are in {report.grid.folder}.")


def _pairs_file(name: str, data: str) -> Path:
    """Return the file of a name: a path as it is, or <name>.jsonl[.gz] in the data folder."""
    for path in (Path(name).expanduser(), *(Path(data) / f"{name}{ending}" for ending in (".jsonl.gz", ".jsonl"))):
        if path.is_file():
            return path
    raise DataError(f"No file {name}, and no {name}.jsonl or {name}.jsonl.gz in {data}. Correct the name, or set data.")


def _inputs(arm: Arm, evaluation: GridEvaluation, heldout: Sequence[HeldoutSplit]) -> Any:
    """Return everything that decides an arm's result, as JSON values."""
    files = {name: content_revision([_pairs_file(name, arm.config.data)]) for name in arm.config.tasks}
    tests = [[split.name, split.revision, split.instruction] for split in heldout]
    config = {**arm.config.to_dict(), "output": ""}
    return _plain({"config": config, "data": files, "evaluation": evaluation.model_dump(), "heldout": tests})


def _train_and_score(
    arm: Arm, evaluation: GridEvaluation, heldout: Sequence[HeldoutSplit], show_progress: bool
) -> ArmResult:
    trainer = Trainer(arm.config)
    final = trainer.train(resume=False, show_progress=show_progress)
    encoder = EpicEncoder.from_pretrained(final, device=arm.config.device)
    store = EmbeddingStore(encoder, precision=str(encoder.dtype).removeprefix("torch."))
    trained = {
        "steps": trainer.step,
        "pairs": trainer.pairs,
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds, 1),
        "loss": next(entry["loss"] for entry in reversed(trainer.metrics) if "loss" in entry),
    }
    result = ArmResult(trained=trained, fingerprint=encoder.fingerprint, scores={}, tests={}, skipped=[])
    left_out = [
        split_of_task(dataset, queries=evaluation.queries, documents=evaluation.documents)
        for dataset in load_datasets(arm.config)[1]
    ]
    parts = {"trained": [split for split in left_out if split is not None], "heldout": list(heldout)}
    every = [split for tests in parts.values() for split in tests]
    for part, tests in parts.items():
        # Foreign demonstrations are another task's of the same part, where there is one.
        ring = tests if len(tests) > 1 else every
        for split in tests:
            other = ring[(ring.index(split) + 1) % len(ring)]
            test = json.dumps([split.queries, split.documents])
            result["tests"][split.name] = hashlib.sha256(test.encode()).hexdigest()[:16]
            for shown in arm.strategies:
                foreign = other.pool if other is not split else None
                _score_split(result, store, split, foreign, part, shown, evaluation)
    for checkpoint in Path(arm.config.output).glob("checkpoint-*"):  # with the optimizer's state, for resuming
        shutil.rmtree(checkpoint)
    return result


def _score_split(
    result: ArmResult,
    store: EmbeddingStore,
    split: HeldoutSplit,
    foreign: Sequence[Pair] | None,
    part: str,
    shown: Shown,
    evaluation: GridEvaluation,
) -> None:
    for k in sorted({0, *evaluation.num_demonstrations}):
        where = f"{split.name} at k = {k}, shown as {shown}"
        if k > len(split.pool):
            result["skipped"].append(f"{where}: {len(split.pool)} rows are free for demonstrations")
            continue
        try:
            scores = condition_scores(
                store,
                split,
                ks=[k],
                draws=evaluation.draws,
                controls=evaluation.controls,
                foreign_pool=foreign if foreign is not None and len(foreign) >= k else None,
                strategy=shown,
            )
        except PromptError as error:  # the texts are longer than the model's positions
            result["skipped"].append(f"{where}: {error}")
            continue
        for (condition, count), values in scores.items():
            by_query = [round(float(value), 6) for value in values.mean(axis=0)]
            result["scores"][score_key(shown, part, split.name, condition, count)] = by_query


def split_of_task(dataset: PairDataset, *, queries: int, documents: int) -> HeldoutSplit | None:
    """Make a retrieval test of the rows that training left out.

    The pool of demonstrations is made of trained rows that share nothing with a test query. In a task with few targets
    (labels), where every label is in the pool, they share no query with one.

    Args:
        dataset: With held-out rows.
        queries: Most test queries.
        documents: Documents wanted in the corpus.

    Returns:
        The test; None if no held-out row can be a query.
    """
    pairs = with_components([(row.query, row.positive, row.group) for row in [*dataset.held_out, *dataset.rows]])
    held, trained = pairs[: len(dataset.held_out)], pairs[len(dataset.held_out) :]
    test = query_rows(held, queries)
    if not test:
        return None
    random.Random(f"ablation-{dataset.name}").shuffle(trained)
    if dataset.label_like:
        tested = {normalize_text(pair.query) for pair in test}
        pool = [pair for pair in trained if normalize_text(pair.query) not in tested]
    else:
        components = {pair.component for pair in held}
        pool = [pair for pair in trained if pair.component not in components]
    return assemble_split(
        dataset.name,
        test=test,
        rest=[*held, *trained],
        pool=pool,
        documents=documents,
        instruction=dataset.instruction or "",
        revision=dataset.sha256[:16],
        symmetric=dataset.symmetric,
    )
