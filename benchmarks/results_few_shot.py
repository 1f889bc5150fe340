"""Short tables of a few-shot evaluation for docs/results.md and the README, from the JSON that it wrote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from epic_rag.evaluation.report import markdown_table

SHOWN_SIZES = (1, 8, 32, 128, 512, 1500)
NAMES = {"own": "own documents", "pooled": "mixed", "pooled-with-queries": "mixed, with queries"}
TARGETS = {
    "own": {8: 0.4, 32: 0.7, 128: 1.0, 512: 1.3, 1500: 1.6},
    "pooled-with-queries": {8: 3.5, 32: 4.5, 128: 6.0, 512: 7.0, 1500: 7.5},
}
"""Least gains of the reader, dense, that the project aims at."""
READERS = ("reader-against", "reader")
"""Methods that the tables are about; the first that was scored."""
CONTROLS = ("shuffled", "foreign", "wrong-10", "wrong-25")
_FUSED, _KEPT, _WORST, _SHUFFLED, _FOREIGN, _LEAD = 0.5, 0.7, -0.3, 0.2, -0.3, 0.5

Row = dict[str, Any]


class Gains:
    """Means of an evaluation by collection, ranking, method, control and number of demonstrations.

    Args:
        result: JSON of `epic-rag eval --few-shot`.
    """

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result
        self.collections = [name for name in NAMES if name in result["settings"]["collections"]]
        self.sizes: list[int] = list(result["settings"]["sizes"])
        self.methods: list[str] = list(result["settings"]["methods"])
        self.arm = next(name for name in READERS if name in self.methods)
        self._rows: dict[tuple[str, str, str, str, int], Row] = {
            (row["collection"], row["ranking"], row["method"], row["control"], row["n"]): row
            for row in result["summary"]
        }

    def row(self, collection: str, ranking: str, n: int, method: str = "", control: str = "none") -> Row | None:
        """Return a mean with its interval, of the main arm if no method is named; None if there is none."""
        return self._rows.get((collection, ranking, method or self.arm, control, n))

    def gain(self, *place: Any, **more: Any) -> float | None:
        """Return the mean gain of `row`."""
        found = self.row(*place, **more)
        return None if found is None else float(found["gain"])


def few_shot_tables(result: dict[str, Any]) -> str:
    """Return the reader's gains, all methods, controls, tasks, wordings, and what was aimed at."""
    gains = Gains(result)
    sizes = [n for n in SHOWN_SIZES if n in gains.sizes] or gains.sizes
    columns = [f"n = {n}" for n in sizes]
    parts = [
        f"{len(result['tasks'])} tasks. `{gains.arm}`, mean of tasks, 95% interval:",
        markdown_table(
            ["collection", "ranking", *columns],
            [
                [NAMES[collection], ranking, *(_interval(gains.row(collection, ranking, n)) for n in sizes)]
                for collection in gains.collections
                for ranking in ("dense", "hybrid")
            ],
            text_columns=2,
        ),
        "By all numbers of demonstrations, dense; the worst task; the share of tasks and draws that lose half a point "
        "or more; the mean of the tasks that have enough pairs for every n:",
        markdown_table(
            ["collection", "", *(f"n = {n}" for n in gains.sizes)],
            [
                [NAMES[collection], name, *(_cell(gains.row(collection, "dense", n), key) for n in gains.sizes)]
                for collection in gains.collections
                for name, key in (
                    ("tasks", "tasks"),
                    ("gain", "gain"),
                    ("worst task", "worst"),
                    ("loss of 0.5", "losses"),
                    ("same tasks", "same"),
                )
            ],
            text_columns=2,
        ),
        "All methods and controls, dense:",
        few_shot_methods(result),
        f"`{gains.arm}` on each task, dense:",
        _tasks_table(gains, sizes),
    ]
    wordings = _wordings_table(gains)
    if wordings:
        parts += ["Wordings of the instruction, dense: zero-shot minus that of the default one, gain of the reader:"]
        parts += [wordings]
    targets = _targets_table(gains)
    if targets:
        parts += ["What was aimed at:", targets]
    return "\n\n".join(parts)


def few_shot_methods(result: dict[str, Any]) -> str:
    """Return the gains of all methods and controls, dense, in the smallest and the largest collection."""
    gains = Gains(result)
    sizes = [n for n in SHOWN_SIZES if n in gains.sizes] or gains.sizes
    return markdown_table(
        ["method", "collection", *(f"n = {n}" for n in sizes)],
        [
            [label, NAMES[collection], *(_signed(gains.gain(collection, "dense", n, *arm)) for n in sizes)]
            for label, arm in _arms(gains)
            for collection in _ends(gains)
        ],
        text_columns=2,
    )


def few_shot_summary(result: dict[str, Any]) -> str:
    """Return the README's table: the reader, dense."""
    gains = Gains(result)
    sizes = [n for n in SHOWN_SIZES if n in gains.sizes and n > 1] or gains.sizes
    rows = []
    for collection in gains.collections:
        zero = [value for place, value in result["zero_shot"].items() if place.split("/")[-2:] == [collection, "dense"]]
        line = (_signed(gains.gain(collection, "dense", n)) for n in sizes)
        rows.append([NAMES[collection], f"{sum(zero) / len(zero):.2f}", *line])
    if gains.gain(gains.collections[-1], "dense", sizes[0], "", "shuffled") is not None:
        line = (_signed(gains.gain(gains.collections[-1], "dense", n, "", "shuffled")) for n in sizes)
        rows.append(["the last, passages shuffled", "", *line])
    return markdown_table(["collection", "no examples", *(f"{n:,}" for n in sizes)], rows, text_columns=1)


def _ends(gains: Gains) -> list[str]:
    """Return the smallest and the largest collection."""
    return list(dict.fromkeys([gains.collections[0], gains.collections[-1]]))


def _arms(gains: Gains) -> Iterable[tuple[str, tuple[str, str]]]:
    # A checkpoint without a reader of its own has no scores of "universal", which its "reader" is.
    scored = {(row["method"], row["control"]) for row in gains.result["summary"]}
    yield from ((method, (method, "none")) for method in gains.methods if (method, "none") in scored)
    for control in CONTROLS:
        if any(key == control for key in gains.result["settings"]["controls"]):
            yield f"{gains.arm}, {control}", (gains.arm, control)


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _interval(row: Row | None) -> str:
    return "" if row is None else f"{row['gain']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"


def _cell(row: Row | None, key: str) -> str:
    if row is None or row[key] is None:
        return ""
    forms = {"tasks": "{:.0f}", "losses": "{:.0%}"}
    return forms.get(key, "{:+.2f}").format(row[key])


def _tasks_table(gains: Gains, sizes: Sequence[int]) -> str:
    cells = {
        (cell["task"], cell["collection"], cell["n"]): cell["gain"]
        for cell in gains.result["cells"]
        if (cell["ranking"], cell["method"], cell["control"]) == ("dense", gains.arm, "none")
    }
    rows = []
    for task in (item["name"] for item in gains.result["tasks"]):
        for collection in _ends(gains):
            zero = gains.result["zero_shot"][f"{task}/{collection}/dense"]
            line = (_signed(cells.get((task, collection, n))) for n in sizes)
            rows.append([task, NAMES[collection], f"{zero:.2f}", *line])
    return markdown_table(["task", "collection", "n = 0", *(f"n = {n}" for n in sizes)], rows, text_columns=2)


def _wordings_table(gains: Gains) -> str:
    wordings = gains.result.get("wordings", [])
    sizes = sorted({row["n"] for row in gains.result["summary"] if row["method"].startswith("wording-")})
    rows = []
    for number, wording in enumerate(wordings, start=1):
        for collection in _ends(gains):
            line = (_signed(gains.gain(collection, "dense", n, f"wording-{number}")) for n in sizes)
            rows.append([wording or "(none)", NAMES[collection], *line])
    columns = ["zero-shot" if n == 0 else f"n = {n}" for n in sizes]
    return markdown_table(["instruction", "collection", *columns], rows, text_columns=2) if rows and sizes else ""


def _targets_table(gains: Gains) -> str:
    """Compare with what was aimed at; a line names the place where least, or most, is missing."""
    rows: list[list[str]] = []

    def add(target: str, limit: float, found: Iterable[tuple[float | None, str]], *, at_most: bool = False) -> None:
        known = [(value, place) for value, place in found if value is not None]
        if not known:
            return
        value, place = max(known) if at_most else min(known)
        missing = value - limit if at_most else limit - value
        state = "met" if missing <= 0 else f"missed by {missing:.2f}"
        rows.append([target, f"{'≤' if at_most else '≥'} {limit:g}", f"{value:+.2f} ({place})", state])

    for collection, least in TARGETS.items():
        for n, limit in least.items():
            add(
                f"{NAMES[collection]}, n = {n}",
                limit,
                [(gains.gain(collection, "dense", n), f"n = {n}")],
            )
    for collection in _ends(gains):
        name = NAMES[collection]
        dense = {n: gains.gain(collection, "dense", n) for n in gains.sizes}
        hybrid = {n: gains.gain(collection, "hybrid", n) for n in gains.sizes}
        shares = []
        for n, whole in dense.items():
            fused = hybrid[n]
            if whole is not None and fused is not None and n >= 8 and whole > 0:
                shares.append((fused / whole, f"n = {n}"))
        add(f"{name}: share of the gain after fusion with BM25", _FUSED, shares)
        worst = [
            (cell["gain"], f"{cell['task']}, n = {cell['n']}")
            for cell in gains.result["cells"]
            if (cell["collection"], cell["ranking"], cell["method"], cell["control"])
            == (collection, "dense", gains.arm, "none")
            and cell["n"] >= 32
        ]
        add(f"{name}: worst task from n = 32 on", _WORST, worst)
        same = [(n, gains.row(collection, "dense", n)) for n in gains.sizes]
        falls = []
        for (_, before), (n, after) in pairwise(same):
            if before is not None and after is not None and None not in (before["same"], after["same"]):
                error = (after["high"] - after["low"]) / 3.92
                falls.append((before["same"] - after["same"] - error, f"n = {n}"))
        add(f"{name}: fall of the curve beyond its standard error, same tasks", 0.0, falls, at_most=True)
        for control, limit, most in (("shuffled", _SHUFFLED, True), ("foreign", _FOREIGN, False)):
            found = [(gains.gain(collection, "dense", n, "", control), f"n = {n}") for n in gains.sizes]
            if most:
                found = [(None if value is None else abs(value), place) for value, place in found]
            add(f"{name}: {control}{' (size)' if most else ''}", limit, found, at_most=most)
        kept = []
        for n, whole in dense.items():
            wrong = gains.gain(collection, "dense", n, "", "wrong-25")
            if whole is not None and wrong is not None and whole > 0:
                kept.append((wrong / whole, f"n = {n}"))
        add(f"{name}: share of the gain with 25% wrong pairs", _KEPT, kept)
        leads, adapter = [], []
        for n in gains.sizes:
            for method in gains.methods:
                other = gains.gain(collection, "dense", n, method)
                own = dense[n]
                if method in (*READERS, "universal") or own is None or other is None:
                    continue
                leads.append((own - other, f"{method}, n = {n}"))
                if method.startswith("llama-index") and n == 128:
                    adapter.append((own - other, method))
        add(f"{name}: lead over every baseline", 0.0, leads)
        add(f"{name}: lead over LlamaIndex's adapter, n = 128", _LEAD, adapter)
    return markdown_table(["target", "limit", "measured", ""], rows, text_columns=1) if rows else ""
