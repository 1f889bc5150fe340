"""What `index` says of a run, or of what a run would do: for people, and as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from epic_rag_cli.defaults import MAX_SKIPPED_SHOWN
from epic_rag_cli.output import message
from epic_rag_cli.text import plural
from epic_rag_cli.verbosity import Verbosity, verbosity

if TYPE_CHECKING:
    from epic_rag_chroma import IndexPlan, IndexReport, SkippedFile

__all__ = ["plan_json", "plan_lines", "plan_summary", "report_json", "report_summary", "tell_skipped"]


def report_json(report: IndexReport) -> dict[str, Any]:
    """Return a report with its rate."""
    return {**dataclasses.asdict(report), "chunks_per_second": _rate(report)}


def report_summary(report: IndexReport) -> str:
    """Return the last line of a run."""
    counts = (
        f"{report.added:,} added, {report.changed:,} changed, {report.renamed:,} renamed, {report.deleted:,} deleted, "
        f"{report.unchanged:,} unchanged, {len(report.skipped):,} skipped"
    )
    reused = f", {report.chunks_reused:,} reused" if report.chunks_reused else ""
    embedded = f"{plural(report.chunks_embedded, 'passage')} embedded{reused} in {report.seconds:.1f} s"
    rate = f" ({_rate(report):,.1f} a second)" if report.chunks_embedded else ""
    return f"{counts}; {embedded}{rate}"


def plan_json(plan: IndexPlan) -> dict[str, Any]:
    """Return a plan; a renamed file has its two names."""
    return {
        **dataclasses.asdict(plan),
        "renamed": [{"from": old, "to": new} for old, new in plan.renamed],
    }


def plan_lines(plan: IndexPlan) -> list[tuple[str, str]]:
    """Return what would happen to each file: the verb and the path."""
    lines = [("add", path) for path in plan.added]
    lines += [("change", path) for path in plan.changed]
    lines += [("rename", f"{old} -> {new}") for old, new in plan.renamed]
    lines += [("delete", path) for path in plan.deleted]
    return lines


def plan_summary(plan: IndexPlan) -> str:
    """Return the last line of a plan."""
    return (
        f"would add {len(plan.added):,}, change {len(plan.changed):,}, rename {len(plan.renamed):,}, "
        f"delete {len(plan.deleted):,}, leave {plan.unchanged:,} as they are, skip {len(plan.skipped):,}"
    )


def tell_skipped(skipped: Sequence[SkippedFile], *, hint: bool) -> None:
    """Say on stderr what was skipped: a few by name (all with --verbose), many by reason.

    Args:
        skipped: The files.
        hint: Whether to say that --json lists all.
    """
    if len(skipped) <= MAX_SKIPPED_SHOWN or verbosity() is Verbosity.VERBOSE:
        for file in skipped:
            message("skipped", f"{file.path}: {file.reason}")
        return
    counted = ", ".join(f"{count:,} {reason}" for reason, count in _by_reason(skipped))
    message("skipped", f"{plural(len(skipped), 'file')}: {counted}" + ("; --json lists all" if hint else ""))


def _by_reason(skipped: Iterable[SkippedFile]) -> list[tuple[str, int]]:
    """Return how often each reason occurs, without what it says of the single file, the most frequent first."""
    counts = Counter(file.reason.partition(":")[0] for file in skipped)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _rate(report: IndexReport) -> float:
    return round(report.chunks_embedded / max(report.seconds, 1e-9), 1)
