"""`index --to` and `status --to`: a corpus of any size into Parquet files, on a Ray cluster or in this process."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from epic_rag.errors import EpicError
from epic_rag_cli.results import print_skipped
from epic_rag_cli.terminal import (
    Interrupted,
    Verbosity,
    columns,
    emit,
    emit_json,
    plural,
    printable,
    verbosity,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from epic_rag_chroma import IndexSettings
    from epic_rag_ray import Cluster, PipelineReport, RunProgress

__all__ = ["address_of", "index_to_parquet", "progress_line", "show_run"]

_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]+):/(?=[^/])")
_COUNTS = ("added", "changed", "deleted", "unchanged")


def address_of(path: str | Path) -> str:
    """Return a path of the command line as text; an address has the second slash again that Path removes."""
    return _SCHEME.sub(r"\1://", str(path))


def index_to_parquet(
    paths: Sequence[Path],
    to: str,
    *,
    model: str | None,
    dtype: str,
    device: str | None,
    settings: IndexSettings,
    vectors: Any,
    duplicates: Any,
    cluster: Cluster,
    chroma: str | None,
    collection: str | None,
    shards: int | None,
    as_json: bool,
) -> None:
    """Bring a folder of vectors up to date, then the collection on a Chroma server if there is one."""
    from epic_rag_ray import PipelineSettings, fill_chroma, run_pipeline

    options = PipelineSettings(
        model=model, index=settings, vectors=vectors, duplicates=duplicates, dtype=dtype, device=device
    )
    progress = _PipelineProgress()
    try:
        with progress:
            report = run_pipeline([address_of(path) for path in paths], to, options, cluster=cluster, progress=progress)
            written = None
            if chroma is not None and collection is not None and report.rows:
                written = dataclasses.asdict(fill_chroma(to, chroma, collection, shards=shards))
    except KeyboardInterrupt:
        shown = printable(to)
        raise Interrupted(f"Interrupted. {shown} keeps what was stored. Run the same command again to go on.") from None
    if as_json:
        emit_json({"to": to, **dataclasses.asdict(report), **({} if written is None else {"stored": written})})
    print_skipped(report.skipped, hint=not as_json)
    if not report.rows:
        raise EpicError(
            f"Nothing to index: no file with text was found ({len(report.skipped)} skipped). Check the paths, "
            "--include and --exclude."
        )
    if not as_json and verbosity() is not Verbosity.QUIET:
        emit([_summary(report)])
        if written is not None:
            counts = ", ".join(f"{count:,} {name}" for name, count in written.items() if isinstance(count, int))
            emit([f"{collection} on {chroma}: {counts}"])


def show_run(to: str, *, as_json: bool) -> None:
    """Print the state of the last run of a folder of vectors."""
    from epic_rag_ray import Storage, VectorParts, read_progress

    storage = Storage(to)
    progress = read_progress(storage)
    rows = [("vectors", storage.address)]
    facts: dict[str, Any] = {"to": storage.address, **dataclasses.asdict(progress)}
    if storage.list("runs", ".json"):
        parts = VectorParts(storage)
        info = parts.info
        facts |= {"model": info.model, "fingerprint": info.fingerprint, "rows": parts.count()}
        rows += [
            ("model", f"{info.model} ({info.fingerprint}, {info.dimension} dimensions, {info.dtype})"),
            ("rows", f"{facts['rows']:,} of {plural(len(parts.generations), 'run')}"),
        ]
    if as_json:
        emit_json(facts)
        return
    rows += [("run", f"{progress.state}: {progress_line(progress)}"), ("updated", progress.updated)]
    if progress.state == "interrupted":
        rows.append(("state", "`epic-rag index --to` with the same folder continues it"))
    emit(columns(rows, styles=("bold",)))


def progress_line(event: RunProgress) -> str:
    """Return the state of a run as a line: stage, rows, speed, time left, failures by reason."""
    noun = "documents" if event.stage in ("listing", "reading") else "rows"
    words = [f"{event.stage} {event.done:,} of {event.total:,} {noun}" if event.total else event.stage]
    if event.tokens_per_second:
        actors = "" if event.actors == 1 else " an actor"
        words.append(f"{event.tokens_per_second:,.0f} tokens/s{actors}")
    if event.seconds_left is not None and event.done < event.total:
        words.append(f"{_duration(event.seconds_left)} left")
    if event.failures:
        kinds = sorted(event.failures.items(), key=lambda item: (-item[1], item[0]))
        words.append(
            f"{sum(event.failures.values()):,} failed ({', '.join(f'{count:,} {kind}' for kind, count in kinds[:4])})"
        )
    return ", ".join(words)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _summary(report: PipelineReport) -> str:
    words = [f"{getattr(report, name):,} {name}" for name in _COUNTS]
    words.append(f"{len(report.skipped):,} skipped")
    text = f"{', '.join(words)}; {plural(report.rows, 'row')}, {report.embedded:,} embedded"
    if report.copied:
        text += f", {report.copied:,} with the vector of the same text"
    left_out = report.exact_duplicates + report.near_duplicates
    if left_out:
        text += f", {left_out:,} duplicates left out ({report.near_duplicates:,} near)"
    return f"{text} in {report.seconds.get('total', 0.0):.1f} s"


class _PipelineProgress:
    """One line on a terminal that follows a run; a context manager that is passed as `progress`."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> _PipelineProgress:
        import sys

        if sys.stderr.isatty() and verbosity() is not Verbosity.QUIET:
            from rich.console import Console
            from rich.progress import Progress, TextColumn

            # markup=False: reasons of failures are text from outside.
            column = TextColumn("{task.description}", markup=False)
            self._bar = Progress(column, console=Console(file=sys.stderr), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: RunProgress) -> None:
        """Show the event."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=printable(progress_line(event)))
