"""`epic-rag ablate`: many short trainings at equal budget, one table.

    grid = load_grid("grid.yaml", output=Path("runs/ablation"))
    report = run_ablation(grid)

Each arm trains through `epic_rag.training.Trainer`, is scored on files that no arm trains on and on rows of trained
tasks that training left out, and is compared with the reference arm query by query.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Sequence

from epic_rag.errors import ConfigError, EpicError, TrainingError
from epic_rag.evaluation.ablation_arms import ArmRun
from epic_rag.evaluation.ablation_grid import AblationGrid, load_grid, pairs_file
from epic_rag.evaluation.ablation_report import AblationReport
from epic_rag.evaluation.catalogue import SYMMETRIC_PAIRS
from epic_rag.evaluation.heldout import HeldoutSplit, file_stem, make_split
from epic_rag.evaluation.plots import plot_ablation, require_matplotlib

__all__ = ["AblationReport", "failed_arms", "load_grid", "run_ablation"]

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]


def run_ablation(
    grid: AblationGrid,
    *,
    only: Sequence[str] = (),
    progress: Progress | None = None,
    show_progress: bool = False,
    command: tuple[str, ...] = (),
) -> AblationReport:
    """Train and score the arms of a grid; write tables, JSON and plots into its folder.

    Arms that are done are not trained again, and an interrupted one goes on. An arm that cannot be trained is
    reported as failed, and the others are trained all the same.

    Args:
        grid: What to do.
        only: Names of arms to train and score; the report also has the others that are done. Empty for all.
        progress: Called with one line of text for each step.
        show_progress: Whether the trainer draws progress bars.
        command: The command line, for the record.

    Returns:
        The report. After each arm it is in the grid's folder as `ablation.json` and `ablation.md`, in the end with
        plots in `plots/`.

    Raises:
        ConfigError: `only` names no arm.
        DataError: A held-out file is missing or malformed.
        MissingExtraError: matplotlib is not installed.
    """
    say = progress or (lambda line: None)
    _check_names(grid, only)
    require_matplotlib()  # now, and not after hours of training
    started = time.monotonic()
    report = AblationReport(grid, command=command)
    report.started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    heldout = _heldout_splits(grid)
    runs = [ArmRun(arm, grid.budget, grid.evaluation, heldout) for arm in grid.arms]
    report.records = {run.arm.name: run.record for run in runs if run.state == "scored"}
    wanted = [run for run in runs if not only or run.arm.name in only]
    for number, run in enumerate(wanted, start=1):
        title = f"arm {run.arm.name} ({number} of {len(wanted)})"
        try:
            _train_and_score(run, title, say, show_progress)
        except EpicError as error:
            report.failures[run.arm.name] = str(error)
            say(f"{title}: failed: {error}")
        else:
            report.records[run.arm.name] = run.record
        report.seconds = time.monotonic() - started
        report.write(grid.folder)
    if report.records:
        plot_ablation(report, grid.folder / "plots")
    return report


def failed_arms(report: AblationReport) -> TrainingError | None:
    """The error that a command ends with when arms have failed; None if none has."""
    if not report.failures:
        return None
    first, reason = next(iter(report.failures.items()))
    return TrainingError(
        f"{len(report.failures)} of {len(report.grid.arms)} arms failed, {first} for one: {reason}; the others are in "
        f"{report.grid.folder}: correct the grid and run the same command, which trains what is missing"
    )


def _train_and_score(run: ArmRun, title: str, say: Progress, show_progress: bool) -> None:
    if run.changed is not None:
        say(f"{title}: the run in {run.folder} has other settings ({run.changed}); it is trained afresh")
    if run.state == "scored":
        say(f"{title}: done before")
        return
    if run.state != "trained":
        say(f"{title}: {'goes on' if run.state == 'interrupted' and run.changed is None else 'trains'}")
        run.train(show_progress=show_progress)
    trained = run.record.trained
    if trained is not None:
        say(f"{title}: {trained.steps:,} steps, {trained.tokens:,} tokens, {trained.seconds:,.0f} s; is scored")
    run.score()


def _check_names(grid: AblationGrid, only: Sequence[str]) -> None:
    names = [arm.name for arm in grid.arms]
    for name in only:
        if name not in names:
            raise ConfigError(
                f"--only names {name}, the arms of {grid.source} are {', '.join(names)}; name one of them"
            )


def _heldout_splits(grid: AblationGrid) -> list[HeldoutSplit]:
    evaluation = grid.evaluation
    files = [pairs_file(name, grid.arms[0].config.data) for name in evaluation.heldout]
    return [
        make_split(
            path,
            queries=evaluation.queries,
            documents=evaluation.documents,
            seed=evaluation.seed,
            symmetric=file_stem(path) in SYMMETRIC_PAIRS,
        )
        for path in files
    ]
