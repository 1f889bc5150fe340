"""The progress bar of `index`, on a terminal only, and the count that an interrupted run reports."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from epic_rag_cli.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from epic_rag_chroma import IndexProgress

__all__ = ["IndexingProgress"]


class IndexingProgress:
    """Takes the indexer's events; draws a bar on stderr where that is a terminal.

    Use as a context manager and hand it over as the indexer's `progress`.
    """

    def __init__(self) -> None:
        self.last: IndexProgress | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> IndexingProgress:
        if sys.stderr.isatty():
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

    def __call__(self, event: IndexProgress) -> None:
        """Show how far the indexer is."""
        self.last = event
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                description=printable(event.stage),
                completed=event.done,
                total=event.total,
                path=printable(event.path or ""),
            )
