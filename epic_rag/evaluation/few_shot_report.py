"""Report of the few-shot evaluation: its settings, its cells, tables and a plot."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from epic_rag.errors import ConfigError
from epic_rag.evaluation.few_shot_methods import METHODS
from epic_rag.evaluation.heldout import Collection
from epic_rag.evaluation.report import markdown_table, versions
from epic_rag.files import write_atomically

__all__ = ["CONTROLS", "WORDINGS", "Control", "FewShotCell", "FewShotReport", "FewShotRequest"]

Control = Literal["none", "shuffled", "foreign", "wrong-10", "wrong-25"]
CONTROLS: tuple[Control, ...] = ("none", "shuffled", "foreign", "wrong-10", "wrong-25")
WORDINGS = (
    "Given a query, retrieve the text that belongs to it",
    "Retrieve relevant passages for the query",
    "Represent this query for searching a collection",
    "Find the document that a person who asks this is looking for",
    "Given a short text, find the entry of the collection that matches it best",
    "",
)
"""Wordings of the instruction that fit any task; the last one is none."""
_LOSS = 0.5


@dataclass(frozen=True)
class FewShotRequest:
    """Settings of a few-shot evaluation.

    Args:
        sizes: Numbers of demonstrations; those that exceed a task's pool are left out there.
        draws: Draws of demonstrations for each number; a draw's smaller number is a prefix of its larger one.
        collections: Collections that queries are ranked in.
        methods: Names from `METHODS`.
        controls: Names from `CONTROLS`, which are scored for "reader-against", or for "reader" if it is not a method.
        seed: Seed of the draws.
        bm25: Also score rankings that are fused with BM25.
        wordings: Also score the reader with other wordings of the instruction, and without one.

    Raises:
        ConfigError: A value cannot work.
    """

    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1500)
    draws: int = 5
    collections: tuple[Collection, ...] = ("own", "pooled", "pooled-with-queries")
    methods: tuple[str, ...] = METHODS
    controls: tuple[Control, ...] = ()
    seed: int = 0
    bm25: bool = True
    wordings: bool = False

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ConfigError(f"The numbers of demonstrations are {list(self.sizes)}. Use 1 or more.")
        if self.draws < 1:
            raise ConfigError(f"draws is {self.draws}. Use 1 or more.")
        for given, known in ((self.methods, METHODS), (self.controls, CONTROLS)):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ConfigError(f"Unknown name {unknown[0]!r}. Choose from {', '.join(known)}.")


@dataclass(frozen=True)
class FewShotCell:
    """Gain over zero-shot of one method by n demonstrations on one task in one collection, in points of nDCG@10.

    Args:
        ranking: "dense" or "hybrid" (fused with BM25; compared with zero-shot fused in the same way).
        gains: Mean gain of each test query over the draws.
        by_draw: Mean gain of each draw over the queries.
    """

    task: str
    collection: Collection
    ranking: str
    method: str
    control: Control
    n: int
    gains: tuple[float, ...]
    by_draw: tuple[float, ...]

    @property
    def gain(self) -> float:
        """Mean gain over queries and draws."""
        return float(np.mean(self.by_draw))


@dataclass
class FewShotReport:
    """Gains of a few-shot evaluation.

    Attributes:
        request: The settings.
        model: The model's revision.
        tasks: Name, instruction and sizes of each task.
        cells: One for each task, collection, ranking, method, control and number of demonstrations.
        zero_shot: nDCG@10 times 100 without demonstrations, by "task/collection/ranking".
        seconds: Wall time.
    """

    request: FewShotRequest
    model: str
    tasks: list[dict[str, object]]
    cells: list[FewShotCell] = field(default_factory=list)
    zero_shot: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def summary(self, cells: Sequence[FewShotCell], *, samples: int = 1000) -> dict[str, float]:
        """Return mean over tasks, its 95% interval, the worst task, and the share of tasks and draws that lose 0.5.

        The interval is a paired bootstrap: queries are drawn again within each task, and means of tasks averaged.
        """
        rng = np.random.default_rng(0)
        means = np.zeros(samples)
        for cell in cells:
            gains = np.array(cell.gains)
            means += gains[rng.integers(len(gains), size=(samples, len(gains)))].mean(axis=1) / len(cells)
        low, high = np.percentile(means, [2.5, 97.5])
        draws = np.concatenate([np.array(cell.by_draw) for cell in cells])
        return {
            "tasks": len(cells),
            "gain": float(np.mean([cell.gain for cell in cells])),
            "low": float(low),
            "high": float(high),
            "worst": min(cell.gain for cell in cells),
            "losses": float((draws < -_LOSS).mean()),
        }

    def summaries(self) -> list[dict[str, object]]:
        """Return `summary` of the cells of each collection, ranking, method, control and number of demonstrations.

        "same" is the mean gain of the tasks that have enough pairs for every number; None if there is no such task.
        """
        groups: dict[tuple[object, ...], list[FewShotCell]] = {}
        for cell in self.cells:
            groups.setdefault((cell.collection, cell.ranking, cell.method, cell.control, cell.n), []).append(cell)
        sizes: dict[tuple[object, ...], set[int]] = {}
        for cell in self.cells:
            sizes.setdefault((cell.task, cell.method, cell.control), set()).add(cell.n)
        every = {key: max((found for other, found in sizes.items() if other[1:] == key[1:]), key=len) for key in sizes}
        found = []
        for key, cells in groups.items():
            same = [
                cell.gain
                for cell in cells
                if sizes[cell.task, cell.method, cell.control] == every[cell.task, cell.method, cell.control]
            ]
            named = dict(zip(("collection", "ranking", "method", "control", "n"), key, strict=True))
            values = {name: round(value, 4) for name, value in self.summary(cells).items()}
            found.append({**named, **values, "same": round(float(np.mean(same)), 4) if same else None})
        return found

    def select(self, **wanted: object) -> list[FewShotCell]:
        """Return the cells whose fields have these values."""
        return [cell for cell in self.cells if all(getattr(cell, name) == value for name, value in wanted.items())]

    def to_markdown(self) -> str:
        """Return the tables: gains of all methods, details of the reader, controls, and the reader on each task."""
        parts = []
        for collection in self.request.collections:
            for ranking in dict.fromkeys(cell.ranking for cell in self.cells):
                found = [cell for cell in self.select(collection=collection, ranking=ranking) if cell.method in METHODS]
                parts.append(f"**{collection}, {ranking}**: gain in nDCG@10, mean of tasks")
                parts.append(self._methods_table(found))
                parts.append(self._reader_table(found))
        dense = self.select(ranking="dense", method="reader", control="none")
        parts.append("**The reader on each task**, dense")
        rows = [
            [
                task,
                collection,
                f"{self.zero_shot[f'{task}/{collection}/dense']:.2f}",
                *self._line(dense, task, collection),
            ]
            for task in dict.fromkeys(cell.task for cell in dense)
            for collection in self.request.collections
        ]
        parts.append(markdown_table(["task", "collection", "n = 0", *self._sizes()], rows, text_columns=2))
        if self.request.wordings:
            parts.append("**Wordings of the instruction**, dense: zero-shot minus the task's own, gains of the reader")
            parts.append(self._wordings_table())
        return "\n\n".join(parts)

    def _sizes(self) -> list[str]:
        return [f"n = {n}" for n in self.request.sizes]

    def _line(self, cells: Sequence[FewShotCell], task: str, collection: str) -> list[str]:
        gains = {cell.n: cell.gain for cell in cells if (cell.task, cell.collection) == (task, collection)}
        return [f"{gains[n]:+.2f}" if n in gains else "" for n in self.request.sizes]

    def _methods_table(self, cells: Sequence[FewShotCell]) -> str:
        arms = dict.fromkeys((cell.method, cell.control) for cell in cells)
        rows = []
        for method, control in arms:
            line = [method if control == "none" else f"{method}, {control}"]
            for n in self.request.sizes:
                found = [cell for cell in cells if (cell.method, cell.control, cell.n) == (method, control, n)]
                line.append(f"{np.mean([cell.gain for cell in found]):+.2f}" if found else "")
            rows.append(line)
        return markdown_table(["method", *self._sizes()], rows, text_columns=1)

    def _wordings_table(self) -> str:
        sizes = sorted({cell.n for cell in self.cells if cell.method.startswith("wording-")})
        rows = []
        for number, wording in enumerate(WORDINGS, start=1):
            for collection in self.request.collections:
                found = self.select(collection=collection, method=f"wording-{number}")
                means = [np.mean([cell.gain for cell in found if cell.n == n]) for n in sizes]
                rows.append([wording or "(none)", collection, *(f"{mean:+.2f}" for mean in means)])
        columns = ["zero-shot" if n == 0 else f"n = {n}" for n in sizes]
        return markdown_table(["instruction", "collection", *columns], rows, text_columns=2)

    def _reader_table(self, cells: Sequence[FewShotCell]) -> str:
        names = ("tasks", "95% interval", "worst task", "loss of 0.5 or more", "mean of tasks with every n")
        rows: dict[str, list[str]] = {name: [] for name in names}
        reader = [cell for cell in cells if (cell.method, cell.control) == ("reader", "none")]
        counts = Counter(cell.task for cell in reader)
        whole = {task for task, count in counts.items() if count == len(self.request.sizes)}
        for n in self.request.sizes:
            found = [cell for cell in reader if cell.n == n]
            values = self.summary(found) if found else None
            rows["tasks"].append(f"{values['tasks']:.0f}" if values else "")
            same = [cell.gain for cell in found if cell.task in whole]
            rows["mean of tasks with every n"].append(f"{np.mean(same):+.2f}" if same else "")
            rows["95% interval"].append(f"{values['low']:+.2f} to {values['high']:+.2f}" if values else "")
            rows["worst task"].append(f"{values['worst']:+.2f}" if values else "")
            rows["loss of 0.5 or more"].append(f"{100 * values['losses']:.0f}%" if values else "")
        return markdown_table(
            ["reader", *self._sizes()], [[name, *line] for name, line in rows.items()], text_columns=1
        )

    def to_json(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return {
            "format_version": 1,
            "model": self.model,
            "seconds": round(self.seconds, 1),
            "versions": versions(),
            "settings": dataclasses.asdict(self.request),
            "tasks": self.tasks,
            "wordings": list(WORDINGS) if self.request.wordings else [],
            "summary": self.summaries(),
            "zero_shot": {name: round(value, 3) for name, value in self.zero_shot.items()},
            "cells": [
                {
                    **{
                        name: getattr(cell, name)
                        for name in ("task", "collection", "ranking", "method", "control", "n")
                    },
                    "gain": round(cell.gain, 4),
                    "by_draw": [round(value, 4) for value in cell.by_draw],
                }
                for cell in self.cells
            ],
        }

    def write(self, path: Path) -> None:
        """Write the JSON, and beside it the tables (`.md`) and, where matplotlib is installed, a plot (`.svg`)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")
        write_atomically(path.with_suffix(".md"), self.to_markdown() + "\n")
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(5.0 * len(self.request.collections), 3.6), layout="constrained")
        for number, collection in enumerate(self.request.collections, start=1):
            axes = figure.add_subplot(1, len(self.request.collections), number)
            for method in self.request.methods:
                found = self.select(collection=collection, ranking="dense", method=method, control="none")
                points = [(n, [cell.gain for cell in found if cell.n == n]) for n in self.request.sizes]
                known = [(n, float(np.mean(gains))) for n, gains in points if gains]
                style = {"linewidth": 2.2} if method == "reader" else {"linewidth": 1.0, "linestyle": "--"}
                axes.plot(*zip(*known, strict=True), marker="o", markersize=3, label=method, **style)
            axes.set_xscale("log")
            axes.axhline(0.0, color="grey", linewidth=0.5)
            axes.set_title(collection, fontsize=9)
            axes.set_xlabel("demonstrations")
            axes.set_ylabel("gain in nDCG@10")
        figure.axes[0].legend(fontsize=7)
        figure.savefig(path.with_suffix(".svg"), format="svg", metadata={"Date": None})
