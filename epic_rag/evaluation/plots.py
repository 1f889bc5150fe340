"""Plots of ablations and efficiency measurements, as SVG and PNG. Needs matplotlib (`pip install 'epic-rag[eval]'`).

Figures are made without pyplot: no global state, no window, no display.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from epic_rag.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from epic_rag.evaluation.ablation import AblationReport, Line
    from epic_rag.evaluation.heldout import Condition

__all__ = ["Curve", "plot_ablation", "plot_curves", "require_matplotlib"]

# Okabe and Ito's palette, which people with any colour vision tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_DODGE = 0.04
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Curve:
    """One curve of a plot against k.

    Attributes:
        label: For the legend.
        ks: Numbers of demonstrations.
        values: One for each k.
        low: Lower ends of the bars around the values; empty for no bars.
        high: Upper ends.
    """

    label: str
    ks: Sequence[int]
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def require_matplotlib() -> None:
    """Find out whether plots can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", "eval", "drawing plots") from error


def plot_ablation(report: AblationReport, folder: Path) -> list[Path]:
    """Draw an ablation: nDCG@10 against k, a figure an axis, and differences to the reference arm.

    Args:
        report: With at least one scored arm.
        folder: Made if it is missing.

    Returns:
        The files: `<axis>.svg|png` and `differences.svg|png`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib()
    lines = report.lines()
    files = []
    axes = [axis for axis in dict.fromkeys(line.arm.axis for line in lines) if axis]
    for axis in axes or [""]:
        chosen = [line for line in lines if line.arm.axis == axis or line.arm.name == report.grid.reference]
        files += _save(_quality_figure(report, chosen, axis), folder / (_file_name(axis) or "quality"))
    if any(line.arm.name != report.grid.reference for line in lines) and report.grid.reference in report.records:
        files += _save(_difference_figure(report, lines), folder / "differences")
    return files


def plot_curves(
    curves: Sequence[Curve], path: Path, *, title: str, y_label: str, logarithmic: bool = False
) -> list[Path]:
    """Draw curves against k.

    Args:
        curves: At least one.
        path: Without an ending; `.svg` and `.png` are written.
        title: Above the plot.
        y_label: What the values are, with their unit.
        logarithmic: Whether the values' axis is logarithmic.

    Returns:
        Both files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.ticker import LogFormatter, StrMethodFormatter

    figure, [ax] = _figure(1, height=4.0)
    _draw_curves(ax, curves)
    if logarithmic:
        ax.set_yscale("log")
        # 300 and not 3 x 10^2, between the powers of ten, too.
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    ax.set_title(title)
    ax.set_ylabel(y_label)
    ax.legend(frameon=False)
    return _save(figure, path)


def _quality_figure(report: AblationReport, lines: Sequence[Line], axis: str) -> Figure:
    from epic_rag.evaluation.ablation import PARTS

    parts = [part for part in PARTS if report.tasks(part)]
    figure, axes = _figure(len(parts), height=4.0)
    for ax, part in zip(axes, parts, strict=True):
        curves = []
        for line in lines:
            found = [
                (k, mean)
                for k in report.grid.evaluation.num_demonstrations
                if (mean := report.mean(line, part, "own" if k else "none", k)) is not None
            ]
            means = [mean for _, mean in found]
            curves.append(
                Curve(
                    line.label,
                    [k for k, _ in found],
                    [100 * mean.ndcg_at_10 for mean in means],
                    [100 * (mean.ndcg_at_10 - mean.standard_error) for mean in means],
                    [100 * (mean.ndcg_at_10 + mean.standard_error) for mean in means],
                )
            )
        _draw_curves(ax, [curve for curve in curves if curve.ks])
        ax.set_title(f"{axis}: {PARTS[part]}" if axis else PARTS[part])
        ax.set_ylabel("nDCG@10, ± standard error")
    axes[-1].legend(frameon=False)
    return figure


def _difference_figure(report: AblationReport, lines: Sequence[Line]) -> Figure:
    from epic_rag.evaluation.ablation import PARTS

    parts = [part for part in PARTS if report.tasks(part)]
    k = report.grid.evaluation.table_k
    others = [line for line in lines if line.arm.name != report.grid.reference]
    figure, axes = _figure(len(parts), height=1.5 + 0.4 * len(others))
    shown: list[tuple[Condition, int]] = [("none", 0), ("own", k)] if k else [("none", 0)]
    for ax, part in zip(axes, parts, strict=True):
        for offset, (condition, count) in enumerate(shown):
            found = [
                (row, mean.versus_reference)
                for row, line in enumerate(others)
                if (mean := report.mean(line, part, condition, count)) is not None and mean.versus_reference is not None
            ]
            ax.barh(
                [row + 0.4 * offset - 0.2 * (len(shown) - 1) for row, _ in found],
                [100 * comparison.difference for _, comparison in found],
                xerr=[100 * comparison.standard_error for _, comparison in found],
                height=0.36,
                color=_COLOURS[offset],
                label=f"k = {count}",
            )
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_yticks(range(len(others)), [line.label for line in others])
        ax.invert_yaxis()
        ax.set_title(PARTS[part])
        ax.set_xlabel(f"nDCG@10 minus {report.grid.reference}, ± standard error")
    axes[-1].legend(frameon=False)
    return figure


def _draw_curves(ax: Axes, curves: Sequence[Curve]) -> None:
    places = {k: place for place, k in enumerate(sorted({k for curve in curves for k in curve.ks}))}
    for number, curve in enumerate(curves):
        bars = None
        if curve.low and curve.high:
            bars = [
                [value - low for value, low in zip(curve.values, curve.low, strict=True)],
                [high - value for value, high in zip(curve.values, curve.high, strict=True)],
            ]
        ax.errorbar(
            # Evenly spaced: 0, 1, 2, 4, 8, 16 would crowd on the left. Side by side, so that bars do not hide bars.
            [places[k] + _DODGE * (number - (len(curves) - 1) / 2) for k in curve.ks],
            curve.values,
            yerr=bars,
            label=curve.label,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            capsize=2,
            linewidth=1.2,
        )
    ax.set_xticks(list(places.values()), [str(k) for k in places])
    ax.set_xlabel("demonstrations k")


def _figure(columns: int, *, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="both", linewidth=0.3)
        ax.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: Path) -> list[Path]:
    """Write both formats; equal data gives an equal SVG."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.parent / f"{path.name}.svg", path.parent / f"{path.name}.png"]
    with matplotlib.rc_context({"svg.hashsalt": "epic-rag", "svg.fonttype": "none"}):
        figure.savefig(files[0], metadata={"Date": None})
        figure.savefig(files[1], dpi=150)
    return files


def _file_name(axis: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in axis.lower()).strip("-")
