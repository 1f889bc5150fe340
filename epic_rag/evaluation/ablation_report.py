"""Results of an ablation: JSON with everything, one Markdown table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from epic_rag.evaluation.ablation_arms import ArmRecord
from epic_rag.evaluation.ablation_grid import AblationGrid, Arm
from epic_rag.evaluation.ablation_scores import ArmScores, Part, Score
from epic_rag.evaluation.heldout_scores import Comparison, Condition
from epic_rag.evaluation.report import difference, markdown_table, percent, pool_comparisons, versions
from epic_rag.prompt import Strategy

__all__ = ["PARTS", "AblationReport", "Line"]

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
