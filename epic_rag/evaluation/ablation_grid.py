"""What an ablation is made of: a YAML file of arms that differ in a few training settings and share everything else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.errors import ConfigError, DataError
from epic_rag.prompt import STRATEGIES, Strategy
from epic_rag.training._values import yaml_module
from epic_rag.training.config import TrainingConfig
from epic_rag.training.recipe import change_setting, recipe_values

__all__ = ["AblationGrid", "Arm", "Budget", "GridEvaluation", "list_grids", "load_grid", "pairs_file"]

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
