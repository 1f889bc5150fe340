"""Results of an evaluation run, as a Markdown table and as JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from epic_rag.evaluation.heldout import CONDITIONS, Comparison, HeldoutResult, HeldoutScore
from epic_rag.files import write_atomically
from epic_rag.query_prompt import QueryStrategy

__all__ = [
    "EvaluationReport",
    "ModelRecord",
    "SetScore",
    "difference",
    "markdown_table",
    "percent",
    "pool_comparisons",
    "versions",
    "write_json",
]

FORMAT_VERSION = 1
_PACKAGES = ("bm25s", "epic-rag", "mteb", "numpy", "scikit-learn", "torch", "transformers")


@dataclass(frozen=True)
class ModelRecord:
    """Model as it was evaluated.

    Args:
        label: Its name in tables.
        source: The name or folder that it was loaded from.
        fingerprint: Hash of everything that decides its vectors.
        plain: True if queries were encoded bare.
        lexical: True for BM25, which has no vectors; dimension and limits are 0 then.
    """

    label: str
    source: str
    fingerprint: str
    dimension: int
    plain: bool
    max_query_tokens: int
    max_document_tokens: int
    device: str
    dtype: str
    lexical: bool = False
    strategy: QueryStrategy = "epic"


@dataclass(frozen=True)
class SetScore:
    """Score of one model on one evaluation set at one k.

    Args:
        revision: A hash of the data, or the hub's revision.
        metric: Name of the main score.
        score: The main score, between 0 and 1 (or -1 and 1).
        instruction: The queries' instruction; None for a plain model.
        demonstrations: Origin of the demonstrations; None without any.
        prompt: Hash of instruction and demonstrations.
        scores: All of mteb's numbers.
    """

    model: str
    set_name: str
    kind: str
    revision: str
    metric: str
    k: int
    score: float
    instruction: str | None
    demonstrations: str | None
    prompt: str
    scores: dict[str, float]
    seconds: float


@dataclass
class EvaluationReport:
    """Results of a run so far.

    Args:
        settings: The request's settings as JSON values.
        command: The command line.
        started: ISO time.
        models: In the order of the table's columns.
        sets: Scores on evaluation sets.
        heldout: (model's label, scores on one held-out file).
        seconds: Wall time so far.
    """

    settings: dict[str, object]
    command: tuple[str, ...] = ()
    started: str = ""
    models: list[ModelRecord] = field(default_factory=list)
    sets: list[SetScore] = field(default_factory=list)
    heldout: list[tuple[str, HeldoutResult]] = field(default_factory=list)
    seconds: float = 0.0

    def columns(self) -> list[tuple[str, int]]:
        """Return the (model, k) pairs that have scores on sets: models as given, k rising."""
        present = {(score.model, score.k) for score in self.sets}
        return [
            (model.label, k) for model in self.models for k in sorted(k for label, k in present if label == model.label)
        ]

    def mean(self, model: str, k: int, kind: str | None = None) -> float | None:
        """Return the mean main score of a column over all sets of a kind; None if the column lacks one of them."""
        wanted = {score.set_name for score in self.sets if kind in (None, score.kind)}
        return self._mean_over(wanted, model, k)

    def _mean_over(self, names: Collection[str], model: str, k: int) -> float | None:
        found = [score.score for score in self.sets if (score.model, score.k) == (model, k) and score.set_name in names]
        return sum(found) / len(found) if found and len(found) == len(names) else None

    def shared_sets(self) -> list[str]:
        """Return the sets that every column has a score on, over which all columns can be compared."""
        columns = self.columns()
        cells = {(score.set_name, score.model, score.k) for score in self.sets}
        names = dict.fromkeys(score.set_name for score in self.sets)
        return [name for name in names if all((name, *column) in cells for column in columns)]

    def shared_mean(self, model: str, k: int) -> float | None:
        """Return the mean main score of a column over `shared_sets`; None if there are none."""
        return self._mean_over(self.shared_sets(), model, k)

    def to_markdown(self) -> str:
        """Return the tables, scores times 100."""
        return "\n\n".join([*([self._set_table()] if self.sets else []), *self._heldout_tables()])

    def _set_table(self) -> str:
        columns = self.columns()
        models = {model.label: model for model in self.models}
        header = ["set", "score", *(_column_title(models[label], k) for label, k in columns)]
        cells = {(score.set_name, score.model, score.k): score.score for score in self.sets}
        metrics = {(score.kind, score.set_name): score.metric for score in self.sets}
        rows: list[list[str]] = []
        kinds = list(dict.fromkeys(kind for kind, _ in metrics))
        for kind in kinds:
            of_kind = [(name, metric) for (other, name), metric in metrics.items() if other == kind]
            rows += [
                [name, metric, *(percent(cells.get((name, *column))) for column in columns)] for name, metric in of_kind
            ]
            if len(of_kind) > 1:
                means = [self.mean(model, k, kind) for model, k in columns]
                rows.append(_mean_row(f"**mean {kind} ({len(of_kind)})**", means))
        if len(kinds) > 1:
            means = [self.mean(model, k) for model, k in columns]
            rows.append(_mean_row(f"**mean of all {len(metrics)} sets**", means))
        shared = self.shared_sets()
        if 1 < len(shared) < len(metrics):
            means = [self.shared_mean(model, k) for model, k in columns]
            rows.append(_mean_row(f"**mean of the {len(shared)} in all columns**", means))
        return markdown_table(header, rows, text_columns=2)

    def _heldout_tables(self) -> list[str]:
        header = [
            "held-out file",
            "model",
            "collection",
            "instruction",
            "demonstrations",
            "k",
            "nDCG@10",
            "sd of draws",
        ]
        rows = []
        groups: dict[tuple[str, str, str], list[HeldoutResult]] = {}
        for label, result in self.heldout:
            place = (label, result.collection, result.instruction_source)
            groups.setdefault(place, []).append(result)
            for score in result.scores:
                spread = percent(score.spread) if len(score.draws) > 1 else ""
                values = [CONDITIONS[score.condition], str(score.k), percent(score.ndcg_at_10), spread]
                gains = [difference(score.versus_zero), difference(_own_minus(result, score))]
                rows.append([result.name, *place, *values, *gains])
        for group, results in groups.items():
            rows += _mean_rows(group, results)
        # A column with the default value in every line is left out.
        hidden = [
            column
            for column, default in ((3, {"own", "plain"}), (2, {"own"}))
            if {row[column] for row in rows} <= default
        ]
        header += ["minus k = 0", "own minus it"]
        for row in (header, *rows):
            for column in hidden:
                del row[column]
        return [markdown_table(header, rows, text_columns=5 - len(hidden))] if rows else []

    def to_json(self) -> dict[str, object]:
        """Return everything as JSON values; scores are fractions."""
        return {
            "format_version": FORMAT_VERSION,
            "command": list(self.command),
            "started": self.started,
            "seconds": round(self.seconds, 1),
            "versions": versions(),
            "settings": self.settings,
            "models": [dataclasses.asdict(model) for model in self.models],
            "means": [
                {"model": model, "k": k, "kind": kind or "all", "score": self.mean(model, k, kind)}
                for model, k in self.columns()
                for kind in (*dict.fromkeys(score.kind for score in self.sets), None)
            ],
            "shared_sets": self.shared_sets(),
            "shared_means": [
                {"model": model, "k": k, "score": self.shared_mean(model, k)} for model, k in self.columns()
            ],
            "sets": [dataclasses.asdict(score) for score in self.sets],
            "heldout": [{"model": label, **dataclasses.asdict(result)} for label, result in self.heldout],
        }


def _column_title(model: ModelRecord, k: int) -> str:
    if model.lexical:
        return model.label
    if model.plain:
        return f"{model.label}, plain"
    return f"{model.label}, k = {k}" + (f", {model.strategy}" if k and model.strategy != "epic" else "")


def _mean_row(title: str, means: Iterable[float | None]) -> list[str]:
    return [title, "", *(f"**{percent(mean)}**" if mean is not None else percent(None) for mean in means)]


def _mean_rows(place: Sequence[str], results: Sequence[HeldoutResult]) -> list[list[str]]:
    """Return the mean lines of one model in one collection with one kind of instruction, for several files."""
    keys = dict.fromkeys((score.condition, score.k) for result in results for score in result.scores)
    rows = []
    for condition, k in keys:
        found = [
            (result, score)
            for result in results
            for score in result.scores
            if (score.condition, score.k) == (condition, k)
        ]
        if len(found) < 2 or len(found) < len(results):
            continue
        mean = sum(score.ndcg_at_10 for _, score in found) / len(found)
        gain = pool_comparisons([score.versus_zero for _, score in found])
        own = pool_comparisons([_own_minus(result, score) for result, score in found])
        title = f"**mean of {len(found)} files**"
        rows.append(
            [title, *place, CONDITIONS[condition], str(k), percent(mean), "", difference(gain), difference(own)]
        )
    return rows


def _own_minus(result: HeldoutResult, score: HeldoutScore) -> Comparison | None:
    """Return the right demonstrations minus a control; None for other lines."""
    own = next((other for other in result.scores if (other.condition, other.k) == ("own", score.k)), None)
    if own is None:
        return None
    return {"shuffled": own.versus_shuffled, "foreign": own.versus_foreign}.get(score.condition)


def pool_comparisons(comparisons: Sequence[Comparison | None]) -> Comparison | None:
    """Return the mean of differences on different files, which are independent samples."""
    known = [comparison for comparison in comparisons if comparison is not None]
    if not known or len(known) < len(comparisons):
        return None
    variance = sum(comparison.standard_error**2 for comparison in known)
    return Comparison(sum(comparison.difference for comparison in known) / len(known), variance**0.5 / len(known))


def percent(value: float | None) -> str:
    """Format a fraction times 100, with two decimals; a dash for None."""
    return "–" if value is None else f"{100 * value:.2f}"  # noqa: RUF001 - the sign for "nothing here"


def difference(comparison: Comparison | None) -> str:
    """Format a difference and its standard error, times 100; empty for None."""
    if comparison is None:
        return ""
    return f"{100 * comparison.difference:+.2f} ± {100 * comparison.standard_error:.2f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> str:
    """Format a Markdown table whose columns also line up as plain text; numbers to the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * width if column < text_columns else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def versions() -> dict[str, str | None]:
    """Return the versions of Python, the system and the packages that decide scores; None for a missing package."""
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def write_json(report: EvaluationReport, path: Path) -> None:
    """Write a report atomically; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(report.to_json(), ensure_ascii=False, indent=1) + "\n")
