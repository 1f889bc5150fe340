"""The progress bar of `index`, on a terminal only, and the count that an interrupted run reports."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from epic_rag_cli.output import message
from epic_rag_cli.text import printable
from epic_rag_cli.verbosity import Verbosity, verbosity

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from epic_rag_chroma import IndexProgress

__all__ = ["IndexingProgress"]


class IndexingProgress:
    """Takes the indexer's events; draws a bar on stderr where that is a terminal.

    With --verbose there is a line with the times of the stages instead, and with --quiet nothing. Use as a context
    manager and hand it over as the indexer's `progress`.
    """

    def __init__(self) -> None:
        self.last: IndexProgress | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stages: list[tuple[str, float]] = []

    def __enter__(self) -> IndexingProgress:
        if sys.stderr.isatty() and verbosity() is Verbosity.NORMAL:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                # markup=False: stage and path are text from outside.
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[path]}", markup=False, style="dim"),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None, path="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._stages and verbosity() is Verbosity.VERBOSE:
            ends = [*(start for _, start in self._stages[1:]), time.monotonic()]
            times = (f"{stage} {end - start:.2f} s" for (stage, start), end in zip(self._stages, ends, strict=True))
            message("info", f"times: {', '.join(times)}")

    def __call__(self, event: IndexProgress) -> None:
        """Show how far the indexer is."""
        if self.last is None or event.stage != self.last.stage:
            self._stages.append((event.stage, time.monotonic()))
        self.last = event
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                description=printable(event.stage),
                completed=event.done,
                total=event.total,
                path=printable(event.path or ""),
            )
