"""Ablations: a loop over overrides of a training recipe, scored on held-out data, in one table.

    report = run_ablation(load_grid("grid.yaml", output=Path("runs/ablation")))

A grid is a YAML file, described in docs/evaluation.md; `grids/` has those of docs/results.md. Every arm trains with
`epic_rag.training.Trainer` and is scored on files that no arm trains on and on rows of trained tasks that training left
out. `arms/NAME/arm.json` keeps an arm's settings and scores; an arm whose settings are those on disk is skipped.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError, DataError, EpicError, PromptError, TrainingError
from epic_rag.evaluation.datasets import content_revision
from epic_rag.evaluation.embedding_store import EmbeddingStore
from epic_rag.evaluation.heldout import Comparison, HeldoutSplit, condition_scores, make_split, split_of_task
from epic_rag.evaluation.report import difference, markdown_table, percent, pool_comparisons, versions
from epic_rag.files import write_atomically
from epic_rag.metrics import mean_and_error
from epic_rag.query_prompt import QueryStrategy
from epic_rag.training import Trainer
from epic_rag.training.config import TrainingConfig, change_setting, first_problem, recipe_values, yaml_module
from epic_rag.training.data import load_datasets

__all__ = ["AblationGrid", "AblationReport", "Arm", "GridEvaluation", "list_grids", "load_grid", "run_ablation"]

_GRIDS = Path(__file__).parent / "grids"
_PARTS = {"trained": "trained tasks", "heldout": "held-out tasks"}


class GridEvaluation(BaseModel):
    """Settings of an ablation's evaluation, explained in docs/evaluation.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    heldout: list[str] = []
    num_demonstrations: list[Annotated[int, Field(ge=0)]] = [8]
    controls: bool = True
    queries: int = Field(default=200, ge=1)
    documents: int = Field(default=1000, ge=1)
    draws: int = Field(default=1, ge=1)
    seed: int = 0

    @property
    def table_k(self) -> int:
        """The k of the table and of the comparison with the reference: 8, or the largest where 8 is not scored."""
        return 8 if 8 in self.num_demonstrations else max(self.num_demonstrations, default=0)


class _GridFile(BaseModel):
    """Contents of a grid's file, unchecked but for their types."""

    model_config = ConfigDict(extra="forbid", strict=True)

    recipe: str | dict[str, Any] = {}
    base: dict[str, Any] = {}
    reference: str | None = None
    evaluation: GridEvaluation = GridEvaluation()
    # An arm's name is a folder.
    arms: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")], dict[str, Any] | None]


@dataclass(frozen=True)
class Arm:
    """Training run: its name, the choice that it varies, its configuration, the strategies that it is scored with."""

    name: str
    axis: str
    config: TrainingConfig
    strategies: tuple[QueryStrategy, ...]


@dataclass(frozen=True)
class AblationGrid:
    """A checked grid: its file or name, the folder of results, its arms, and the arm that others are compared with."""

    source: str
    folder: Path
    arms: tuple[Arm, ...]
    reference: str | None
    evaluation: GridEvaluation


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
    values = {key: value for key, value in recipe_values(str(file)).items() if value is not None}
    overrides = [setting for setting in settings if not setting.startswith("evaluation.")]
    for setting in settings:
        name, _, text = setting.removeprefix("evaluation.").partition("=")
        if setting not in overrides:
            try:
                values["evaluation"] = {**values.get("evaluation", {}), name: yaml_module().safe_load(text)}
            except yaml_module().YAMLError as error:
                raise ConfigError(f"The value of {setting!r} is not valid YAML. Put it in quotes.") from error
    try:
        grid = _GridFile(**values)
    except ValidationError as error:
        raise ConfigError(f"{name_or_path}: {first_problem(error)} docs/evaluation.md has the settings.") from error
    base = _merge(recipe_values(grid.recipe) if isinstance(grid.recipe, str) else grid.recipe, grid.base)
    base.setdefault("model", default_model)
    folder = output if output is not None else Path("runs") / file.stem
    arms = tuple(
        _read_arm(name, entry or {}, base, overrides, folder, grid.evaluation) for name, entry in grid.arms.items()
    )
    if not arms or grid.reference not in (None, *grid.arms):
        raise ConfigError(f"reference is {grid.reference}. The arms are {', '.join(grid.arms) or 'missing'}.")
    if not grid.evaluation.heldout and not (arms[0].config.evaluation_tasks and arms[0].config.evaluation_rows):
        raise ConfigError(f"{name_or_path} scores nothing. Name files in evaluation.heldout or base.evaluation_tasks.")
    return AblationGrid(name_or_path, folder, arms, grid.reference, grid.evaluation)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings; tasks are merged name by name and setting by setting."""
    tasks: dict[str, Any] = {}
    for source in (base.get("tasks") or {}, changes.get("tasks") or {}):
        entries = source if isinstance(source, Mapping) else dict.fromkeys(source)
        for name, entry in entries.items():
            tasks[str(name)] = {**tasks.get(str(name), {}), **(entry or {})}
    return {**base, **changes, "tasks": tasks}


def _read_arm(
    name: str,
    entry: Mapping[str, Any],
    base: Mapping[str, Any],
    overrides: Sequence[str],
    folder: Path,
    evaluation: GridEvaluation,
) -> Arm:
    changes = dict(entry)
    axis, without = str(changes.pop("axis", "")), changes.pop("without", None) or []
    scored = [task for task in base.get("evaluation_tasks") or () if task in base["tasks"]]
    values = _merge(base, changes)
    for task in without:
        if task not in base["tasks"] or task in scored:
            fact = "scores as a trained task" if task in scored else "does not train"
            raise ConfigError(f"Arm {name} leaves out {task}, which the base {fact}. Correct one of the two.")
        values["tasks"].pop(task, None)
    try:
        for override in overrides:
            change_setting(values, override)
        # Arms are scored when they are done, and one that was interrupted starts again.
        values |= {"name": name, "output": str(folder / "arms" / name), "evaluation_tasks": scored}
        values |= {"stop_at_step": None, "evaluate_every": 0, "save_every": 10**9}
        config = TrainingConfig.from_dict(values, origin=f"arm {name}")
    except ConfigError as error:
        raise ConfigError(f"Arm {name}: {error}") from error
    both = sorted(set(evaluation.heldout) & set(config.tasks))
    if both:
        raise ConfigError(f"Arm {name} trains on {', '.join(both)} of evaluation.heldout. Use other files.")
    if config.strategy != "none":
        return Arm(name, axis, config, (config.strategy,))
    # An arm that was trained without demonstrations is scored with vectors and with texts.
    return Arm(name, axis, config, ("epic", "text") if evaluation.table_k else ("epic",))


@dataclass
class AblationReport:
    """Results of an ablation so far.

    Attributes:
        results: Arm -> its part of `arm.json`: "trained" (steps, pairs, tokens without padding, seconds, last loss),
            "fingerprint" of the checkpoint, "scores" (`score_key` -> nDCG@10 of each test query, mean over draws),
            "tests" (task -> hash of queries and corpus) and "skipped" (a line for each test without a score).
        failures: Arm -> why it could not be trained or scored.
    """

    grid: AblationGrid
    command: tuple[str, ...] = ()
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    started: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    )

    def tasks(self, part: str) -> list[str]:
        """Return the names of the tasks of a part, "trained" or "heldout"."""
        keys = [key.split(" ", 2) for result in self.results.values() for key in result["scores"]]
        return list(dict.fromkeys(rest.rsplit(" ", 2)[0] for _, of, rest in keys if of == part))

    def difference(
        self, part: str, ours: tuple[str, str, str, int], theirs: tuple[str, str, str, int]
    ) -> Comparison | None:
        """Return one score minus another, paired by query, as a mean over a part's tasks; None if one is missing.

        Args:
            part: "trained" or "heldout".
            ours: Arm, strategy, condition and k of the first score.
            theirs: The same of the second score.
        """
        found: list[Comparison | None] = []
        for task in self.tasks(part):
            scores, tests = [], []
            for arm, strategy, condition, k in (ours, theirs):
                scores.append(self.results[arm]["scores"].get(score_key(strategy, part, task, condition, k)))
                tests.append(self.results[arm]["tests"].get(task))
            paired = None not in scores and tests[0] == tests[1]
            found.append(Comparison(*mean_and_error(np.subtract(*scores))) if paired else None)
        return pool_comparisons(found)

    def _row(self, arm: Arm, strategy: QueryStrategy) -> dict[str, str]:
        """Return a line of the table, by column; scores times 100."""
        evaluation, result, k = self.grid.evaluation, self.results[arm.name], self.grid.evaluation.table_k
        row = {"axis": arm.axis, "arm": arm.name if len(arm.strategies) == 1 else f"{arm.name}, shown as {strategy}"}
        row |= {column: f"{result['trained'][column]:,.0f}" for column in ("steps", "tokens", "seconds")}
        own = (arm.name, strategy, "own" if k else "none", k)
        others = {f"k = {k} minus k = 0": (arm.name, strategy, "none", 0)} if k else {}
        if k and evaluation.controls:
            others |= {f"own minus {name}": (arm.name, strategy, name, k) for name in ("shuffled", "foreign")}
        for reference in self.grid.arms:
            if reference.name == self.grid.reference and reference.name in self.results:
                others[f"minus {reference.name}"] = (reference.name, reference.strategies[0], *own[2:])
        for part, title in _PARTS.items():
            tasks = self.tasks(part)
            if not tasks:
                continue
            zero = [result["scores"].get(score_key(strategy, part, task, "none", 0)) for task in tasks]
            mean = None if None in zero else sum(float(np.mean(by_query)) for by_query in zero) / len(tasks)
            row[f"{title}: k = 0"] = percent(mean)
            for name, other in others.items():
                row[f"{title}: {name}"] = difference(self.difference(part, own, other)) or percent(None)
        return row

    def to_markdown(self) -> str:
        """Return the table, and below it the tests that were not scored."""
        rows = [self._row(arm, each) for arm in self.grid.arms if arm.name in self.results for each in arm.strategies]
        parts = [f"{title}: {', '.join(self.tasks(part))}" for part, title in _PARTS.items() if self.tasks(part)]
        blocks = [f"nDCG@10 times 100, ± one standard error over queries. {'; '.join(parts)}."]
        if rows:
            blocks.append(markdown_table(list(rows[0]), [list(row.values()) for row in rows], text_columns=2))
        notes = [f"- {arm} failed: {reason}" for arm, reason in self.failures.items()]
        notes += [f"- {arm}: not scored: {line}" for arm, result in self.results.items() for line in result["skipped"]]
        return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; scores are fractions."""
        arms = [
            {"name": arm.name, "axis": arm.axis, "config": arm.config.to_dict(), **self.results[arm.name]}
            for arm in self.grid.arms
            if arm.name in self.results
        ]
        values = {
            "format_version": 2,
            "command": self.command,
            "started": self.started,
            "versions": versions(),
            "grid": self.grid.source,
            "evaluation": self.grid.evaluation.model_dump(),
            "reference": self.grid.reference,
            "failures": self.failures,
            "arms": arms,
        }
        return _json_values(values)

    def write(self) -> None:
        """Write `ablation.json` and `ablation.md` into the grid's folder."""
        self.grid.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), ensure_ascii=False, indent=1)
        write_atomically(self.grid.folder / "ablation.json", text + "\n")
        write_atomically(self.grid.folder / "ablation.md", self.to_markdown() + "\n")

    def check(self) -> None:
        """Raise the error that a command ends with when arms have failed.

        Raises:
            TrainingError: If an arm has failed.
        """
        if self.failures:
            count = f"{len(self.failures)} of {len(self.grid.arms)} arms failed"
            first, reason = next(iter(self.failures.items()))
            raise TrainingError(f"{count}. {first}: {reason} The results of the others are in {self.grid.folder}.")


def score_key(strategy: str, part: str, task: str, condition: str, k: int) -> str:
    """Return the key of a score: "epic heldout nl2bash own 8"."""
    return f"{strategy} {part} {task} {condition} {k}"


def _json_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as JSON reads them back: tuples become lists."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def run_ablation(
    grid: AblationGrid,
    *,
    only: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
    show_progress: bool = False,
    command: tuple[str, ...] = (),
) -> AblationReport:
    """Train and score the arms of a grid; after each arm write `ablation.json` and `ablation.md` into its folder.

    An arm that cannot be trained is reported as failed, and the others are trained nevertheless.

    Args:
        grid: The grid.
        only: Arms to train and score, empty for all; the report also has the others whose results are on disk.
        progress: Called with one line of text for each step.
        show_progress: True to draw the trainer's progress bars.
        command: The command line, for the record.

    Raises:
        ConfigError: If `only` names an unknown arm.
        DataError: If a held-out file is missing or malformed.
    """
    names = [arm.name for arm in grid.arms]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only names {name}. The arms of {grid.source} are {', '.join(names)}.")
    report, settings = AblationReport(grid, command), grid.evaluation
    files = [_pairs_file(name, grid.arms[0].config.data) for name in settings.heldout]
    heldout = [
        make_split(file, queries=settings.queries, documents=settings.documents, seed=settings.seed) for file in files
    ]
    for number, arm in enumerate(grid.arms, start=1):
        title = f"arm {arm.name} ({number} of {len(names)})"
        wanted = not only or arm.name in only
        file = Path(arm.config.output) / "arm.json"
        try:
            # Everything that decides an arm's result.
            inputs = _json_values(
                {
                    "config": {**arm.config.to_dict(), "output": ""},
                    "data": {task: content_revision([_pairs_file(task, arm.config.data)]) for task in arm.config.tasks},
                    "evaluation": settings.model_dump(),
                    "heldout": [[split.name, split.revision, split.instruction] for split in heldout],
                }
            )
            stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
            if stored is not None and stored["inputs"] == inputs:
                report.results[arm.name] = stored["result"]
                progress(f"{title}: done before")
            elif wanted:
                progress(f"{title}: training")
                result = report.results[arm.name] = _train_and_score(arm, settings, heldout, show_progress)
                progress(f"{title}: {result['trained']['steps']:,} steps, {result['trained']['tokens']:,} tokens")
                write_atomically(file, json.dumps({"inputs": inputs, "result": result}, ensure_ascii=False) + "\n")
        except EpicError as error:
            if wanted:
                report.failures[arm.name] = str(error)
                progress(f"{title}: failed: {error}")
        report.write()
    return report


def _pairs_file(name: str, data: str) -> Path:
    """Return the file of a name: a path as it is, or <name>.jsonl[.gz] in the data folder."""
    for path in (Path(name).expanduser(), *(Path(data) / f"{name}{ending}" for ending in (".jsonl.gz", ".jsonl"))):
        if path.is_file():
            return path
    raise DataError(f"No file {name}, and no {name}.jsonl or {name}.jsonl.gz in {data}. Correct the name, or set data.")


def _train_and_score(
    arm: Arm, evaluation: GridEvaluation, heldout: Sequence[HeldoutSplit], show_progress: bool
) -> dict[str, Any]:
    trainer = Trainer(arm.config)
    final = trainer.train(resume=False, show_progress=show_progress)
    encoder = EpicEncoder.from_pretrained(final, device=arm.config.device)
    store = EmbeddingStore(encoder, precision=str(encoder.dtype).removeprefix("torch."))
    left_out = [
        split_of_task(dataset, queries=evaluation.queries, documents=evaluation.documents)
        for dataset in load_datasets(arm.config)[1]
    ]
    parts = {"trained": [split for split in left_out if split is not None], "heldout": list(heldout)}
    every = [split for tests in parts.values() for split in tests]
    scores: dict[str, list[float]] = {}
    hashes: dict[str, str] = {}
    skipped: list[str] = []
    for part, tests in parts.items():
        # Foreign demonstrations are another task's of the same part, where there is one.
        ring = tests if len(tests) > 1 else every
        for split in tests:
            test = json.dumps([split.queries, split.documents])
            hashes[split.name] = hashlib.sha256(test.encode()).hexdigest()[:16]
            foreign = ring[(ring.index(split) + 1) % len(ring)].pool if len(ring) > 1 else ()
            cases = [(strategy, k) for strategy in arm.strategies for k in sorted({0, *evaluation.num_demonstrations})]
            for strategy, k in cases:
                try:
                    found = condition_scores(
                        store,
                        split,
                        ks=[k],
                        draws=evaluation.draws,
                        controls=evaluation.controls,
                        foreign_pool=foreign if len(foreign) >= k else None,
                        strategy=strategy,
                    )
                # Too few rows for k demonstrations, or texts that are longer than the model's positions.
                except (DataError, PromptError) as error:
                    skipped.append(f"{split.name} at k = {k}, shown as {strategy}: {error}")
                    continue
                for (condition, count), values in found.items():
                    by_query = [round(float(value), 6) for value in values.mean(axis=0)]
                    scores[score_key(strategy, part, split.name, condition, count)] = by_query
    for checkpoint in Path(arm.config.output).glob("checkpoint-*"):  # with the optimizer's state, for resuming
        shutil.rmtree(checkpoint)
    trained = {
        "steps": trainer.step,
        "pairs": trainer.pairs,
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds, 1),
        "loss": next(entry["loss"] for entry in reversed(trainer.metrics) if "loss" in entry),
    }
    result = {"trained": trained, "fingerprint": encoder.fingerprint}
    return {**result, "scores": scores, "tests": hashes, "skipped": skipped}
