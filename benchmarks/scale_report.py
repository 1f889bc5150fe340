"""Tables and plot of `scale.py`: what was measured, and larger sizes computed from the slopes between measured ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from measuring import require_matplotlib

from epic_rag.evaluation.report import markdown_table

__all__ = ["layouts", "plot", "tables", "training_table"]

SIZES = (1_000_000, 10_000_000, 100_000_000)
ROWS_PER_SHARD = 5_000_000


@dataclass(frozen=True)
class Layout:
    """Memory, disk and time of a layout, each as a function of the number of rows; bytes and seconds."""

    name: str
    memory: Callable[[int], float]
    disk: Callable[[int], float]
    build: Callable[[int], float]
    query_ms: Callable[[int], float]
    recall: float


def layouts(found: dict[str, Any]) -> list[Layout]:
    """Return the layouts with functions fitted to what was measured."""
    made: list[Layout] = []
    index = found.get("local")
    for each in ways_of(found.get("scan")):
        last = each[-1]
        slope = slope_of([(row["rows"], row["ms"]) for row in each])
        rescored = f", {last['rescored']} rescored" if last["rescored"] else ""
        name = f"scan, {last['kind']}{rescored}"
        in_index = last["kind"] == "float32" and index is not None
        made.append(
            Layout(
                f"{name} (an index folder)" if in_index else name,
                lambda n, size=last["bytes"]: n * size,
                (lambda n: n * (index["sqlite_bytes"] + index["vectors_bytes"]))
                if in_index
                else (lambda n, last=last: n * (last["bytes"] + last["rescoring_bytes"])),
                (lambda n: n * index["seconds"] / index["rows"])
                if in_index
                else (lambda n, last=last: n * last["quantise_seconds"] / last["rows"]),
                lambda n, slope=slope: slope[0] + slope[1] * n,
                last["recall"],
            )
        )
    measured = (found.get("chroma") or {}).get("layouts", [])
    one = [row for row in measured if row["shards"] == 1]
    if len(one) > 1:
        memory = slope_of([(row["rows"], row["memory"]) for row in one])
        disk = slope_of([(row["rows"], row["disk"]) for row in one])
        # The time of a row grows with the logarithm of the number of rows before it.
        steps = [
            (math.log2((a["rows"] + b["rows"]) / 2), (b["seconds"] - a["seconds"]) / (b["rows"] - a["rows"]))
            for a, b in pairwise(one)
        ]
        base, growth = slope_of(steps) if len(steps) > 1 else (steps[0][1], 0.0)
        growth = max(0.0, growth)
        base = float(np.mean([seconds - growth * log for log, seconds in steps]))
        query = slope_of([(math.log2(row["rows"]), row["ms"]) for row in one])
        query = (float(np.mean([row["ms"] for row in one])), 0.0) if query[1] < 0 else query

        def build(n: int) -> float:
            return n * (base + growth * (math.log2(n) - 1 / math.log(2)))

        def ask(n: int) -> float:
            return query[0] + query[1] * math.log2(n)

        recall = one[-1]["recall"]
        made.append(
            Layout("Chroma, one collection", lambda n: memory[1] * n, lambda n: disk[1] * n, build, ask, recall)
        )
        several = [row for row in measured if row["shards"] > 1]
        if several:
            made.append(
                Layout(
                    f"Chroma, shards of {ROWS_PER_SHARD // 10**6} million, one of the servers",
                    lambda n: memory[1] * min(n, ROWS_PER_SHARD),
                    lambda n: disk[1] * min(n, ROWS_PER_SHARD),
                    lambda n: build(min(n, ROWS_PER_SHARD)),
                    lambda n: ask(min(n, ROWS_PER_SHARD)),
                    several[-1]["recall"],
                )
            )
    return made


def ways_of(stage: dict[str, Any] | None) -> list[list[dict[str, Any]]]:
    """Return the scans of each way, by size."""
    ways: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in [] if stage is None else stage["scans"]:
        ways.setdefault((row["kind"], row["rescored"]), []).append(row)
    return list(ways.values())


def slope_of(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return intercept and slope of the least-squares line, the former at least 0 for a rising line."""
    x, y = np.asarray(points, dtype=float).T
    if len(x) < 2:
        return 0.0, float(y[0] / x[0])
    slope, intercept = np.polyfit(x, y, 1)
    return float(intercept), float(slope)


def amount(value: float, units: Sequence[str], step: float) -> str:
    place = 0
    while value >= step and place + 1 < len(units):
        value /= step
        place += 1
    return f"{value:.0f} {units[place]}" if value >= 100 else f"{value:.2g} {units[place]}"


def size_text(value: float) -> str:
    return amount(value, ("B", "kB", "MB", "GB", "TB"), 1000)


def time_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def tables(found: dict[str, Any]) -> str:
    """Return everything that was measured as Markdown."""
    parts = []
    if stage := found.get("statistics"):
        names = list(stage["kinds"]["real"])
        rows = []
        for name in names:
            digits = 1 if "dimension" in name else 3
            rows.append([name, *(f"{stage['kinds'][kind][name]:.{digits}f}" for kind in ("real", "generated"))])
        parts.append(
            f"**Vectors.** {stage['passages']:,} passages of manuals, and as many generated vectors:\n\n"
            + markdown_table(["", "real", "generated"], rows, text_columns=1)
        )
    made = layouts(found)
    if made:
        largest = {
            "scan": max((row["rows"] for each in ways_of(found.get("scan")) for row in each), default=0),
            "Chroma": max((row["rows"] for row in (found.get("chroma") or {}).get("layouts", [])), default=0),
        }
        rows = []
        for layout in made:
            known = largest["Chroma" if layout.name.startswith("Chroma") else "scan"]
            for size in SIZES:
                rows.append(
                    [
                        layout.name if size == SIZES[0] else "",
                        f"{size // 10**6} million" + ("" if size <= known else "*"),
                        size_text(layout.memory(size)),
                        size_text(layout.disk(size)),
                        time_text(layout.build(size)),
                        f"{ms:,.0f} ms" if (ms := layout.query_ms(size)) < 10_000 else time_text(ms / 1e3),
                        f"{layout.recall:.3f}",
                    ]
                )
        head = ["layout", "chunks", "memory", "disk", "build", "a query", "recall@10"]
        notes = ", ".join(f"{kind} up to {number:,}" for kind, number in largest.items() if number)
        parts.append(
            f"**Layouts.** Measured: {notes}. * computed from the measured slopes; recall is that of the largest "
            f"measured size.\n\n{markdown_table(head, rows, text_columns=2)}"
        )
    if stage := found.get("chroma"):
        rows = [
            [
                row["layout"],
                f"{row['rows']:,}",
                f"{row['rows'] / row['seconds']:,.0f}",
                f"{row['memory'] / row['rows']:,.0f}",
                f"{row['disk'] / row['rows']:,.0f}",
                f"{row['ms']:.1f}",
                f"{row['recall']:.3f}",
            ]
            for row in stage["layouts"]
        ]
        head = ["Chroma", "rows", "rows/s", "memory, B/row", "disk, B/row", "a query, ms", "recall@10"]
        parts.append(
            f"**Chroma as measured**, {stage['dimension']} dimensions, texts of {stage['text_bytes']} bytes, the "
            f"shards on one server with 2 writers:\n\n{markdown_table(head, rows, text_columns=1)}"
        )
    if stage := found.get("local"):
        parts.append(
            f"**An index folder as measured**, {stage['rows']:,} passages of {stage['text_bytes']:,.0f} bytes: filled "
            f"at {stage['rows'] / stage['seconds']:,.0f} rows a second, an unchanged run "
            f"{stage['rows'] / stage['unchanged_seconds']:,.0f} rows a second; {stage['sqlite_bytes']:,.0f} bytes a "
            f"row in the database and {stage['vectors_bytes']:,.0f} in `vectors.bin`; a hybrid query "
            f"{stage['hybrid_ms']:.0f} ms."
        )
    return "\n\n".join(parts)


def training_table(stage: dict[str, Any]) -> str:
    """Return memory and hours of the recipe as Markdown."""
    memory = [[name, size_text(value)] for name, value in stage["memory"].items()]
    memory.append(["together", size_text(sum(stage["memory"].values()))])
    facts = (
        f"A step is {stage['tokens_per_step'] / 1e3:,.0f} thousand tokens: 512 rows of two queries "
        f"({stage['tokens_per_query']:.0f} tokens with the instruction; {stage['tokens_of_demonstrations']:.0f} more "
        f"for demonstrations in one of them) and 8 documents ({stage['tokens_per_document']:.0f}). With 8 FLOPs for "
        f"each of {stage['parameters'] / 1e9:.2f} billion parameters and each token: "
        f"{stage['flops_per_step'] / 1e15:,.0f} PFLOPs a step, "
        f"{stage['flops_per_step'] * stage['steps'] / 1e18:,.1f} EFLOPs in {stage['steps']:,} steps."
    )
    hours = [
        [f"8 x {name}", f"{stage['peak'][name] / 1e12:.0f}", f"{value:.1f}"] for name, value in stage["hours"].items()
    ]
    return "\n\n".join(
        [
            markdown_table(["memory of a GPU", ""], memory, text_columns=1),
            facts,
            markdown_table(["", "peak, TFLOP/s", f"hours at {stage['utilisation']:.0%} of it"], hours, text_columns=1),
        ]
    )


def plot(made: Sequence[Layout], path: Path) -> bool:
    """Plot memory and query time of each layout by size, as PATH.svg and PATH.png."""
    if not made:
        return False
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [int(10 ** (exponent / 4)) for exponent in range(20, 33)]
    for layout in made:
        left.plot(sizes, [layout.memory(size) / 1e9 for size in sizes], label=layout.name)
        right.plot(sizes, [layout.query_ms(size) for size in sizes])
    left.set(xscale="log", yscale="log", xlabel="chunks", ylabel="GB", title="Memory")
    right.set(xscale="log", yscale="log", xlabel="chunks", ylabel="ms", title="A query")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    for ending in ("svg", "png"):
        figure.savefig(f"{path}.{ending}", dpi=150)
    return True
