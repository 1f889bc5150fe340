"""`epic-rag index`: bring an index up to date with its folders."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epic_rag.errors import DataError, EpicError
from epic_rag_chroma import IndexNotFoundError, IndexStateError
from epic_rag_cli import results as reports
from epic_rag_cli.options import DEFAULT_DTYPE, Chroma, Device, Dtype, Json, Model
from epic_rag_cli.results import display_path, find_index, index_dir_for
from epic_rag_cli.terminal import (
    IndexingProgress,
    Interrupted,
    Verbosity,
    columns,
    debugging,
    emit,
    emit_json,
    message,
    plural,
    verbosity,
)

if TYPE_CHECKING:
    from epic_rag_chroma import ChangeFilter, ChromaIndexer, IndexReport, IndexSettings, IndexStatus, SkippedFile

__all__ = ["Watch", "index"]


# --- from watching
# `epic-rag index --watch`: index, then again whenever something has changed that counts.

# A round begins when nothing has changed for as long as the first, or things have kept changing for the second.
_QUIET_MS = 300
_LONGEST_MS = 2000
# How often to see to what is no event: a folder that was made anew, and a round that has failed.
_TICK_MS = 500
_RETRY_SECONDS = 30.0

_COUNTS = ("added", "changed", "renamed", "deleted")


class Watch:
    """Rounds of the indexer, one for each burst of changes.

    The encoder is loaded once, in the first round. A round that fails is said, and tried again after the next change
    or half a minute; only a first round that fails ends the watch, since nothing would make the next one better.

    Args:
        indexer: The indexer, which keeps its encoder.
        folder: The index folder.
        places: What the user wants indexed.
        as_json: Print a line of JSON for each round.
    """

    def __init__(self, indexer: ChromaIndexer, folder: Path, places: Sequence[Path], *, as_json: bool) -> None:
        self._indexer = indexer
        self._folder = folder.resolve()
        self._places = [place.resolve() for place in places]
        self._as_json = as_json
        self._rounds = 0
        self._counts: Counter[str] = Counter()
        self._known_skipped: set[SkippedFile] = set()
        self._failed_at: float | None = None
        self._state: IndexStatus | None = None

    def run(self, index: Callable[[bool], IndexReport], *, rebuild: bool) -> None:
        """Index until Ctrl-C.

        Args:
            index: Runs the indexer; told whether to rebuild.
            rebuild: Whether the first round does.

        Raises:
            EpicError: If the first round fails, or the file system cannot be watched.
            Interrupted: If Ctrl-C comes within a round.
        """
        try:
            # The watcher is there before the first round, so that no change falls between the two.
            for changed in self._changes():
                if not changed:
                    continue
                self._round(index, rebuild=rebuild and not self._rounds)
        except KeyboardInterrupt:
            done = ", ".join(f"{self._counts[name]:,} {name}" for name in _COUNTS)
            message("note", f"stopped watching after {plural(self._rounds, 'round')}: {done}")
            raise typer.Exit(0) from None

    def _round(self, index: Callable[[bool], IndexReport], *, rebuild: bool) -> None:
        first = not self._rounds
        try:
            report = index(rebuild)
        except Interrupted:
            raise
        except (EpicError, OSError) as error:
            if first:
                raise
            self._fail(str(error))
        except Exception as error:  # Chroma can raise anything, and a watch outlives one bad round
            if first or debugging():
                raise
            self._fail(f"{type(error).__name__}: {error}")
        else:
            self._rounds += 1
            self._failed_at = None
            self._tell(report, first)

    def _fail(self, text: str) -> None:
        self._rounds += 1
        if self._as_json:
            emit_json({"round": self._rounds, "time": _now(), "error": text}, one_line=True)
        message("error", f"{text} (trying again after the next change)")
        self._failed_at = time.monotonic()

    def _tell(self, report: IndexReport, first: bool) -> None:
        self._counts.update({name: getattr(report, name) for name in _COUNTS})
        reports.tell_skipped([file for file in report.skipped if file not in self._known_skipped], hint=False)
        self._known_skipped = set(report.skipped)
        if self._as_json:
            line = {"round": self._rounds, "time": _now(), "index_dir": str(self._folder)}
            emit_json({**line, **reports.report_json(report)}, one_line=True)
        elif (first or any(getattr(report, name) for name in _COUNTS)) and verbosity() is not Verbosity.QUIET:
            emit([f"{_now()[11:19]}  {reports.report_summary(report)}"])
        if first:
            where = ", ".join(display_path(root) for root in self._roots())
            message("note", f"watching {where}; Ctrl-C ends it")

    def _changes(self) -> Iterator[bool]:
        """Yield whether there is something to do: at once, after changes that count, and when a retry is due."""
        from watchfiles import watch

        while True:
            roots = self._roots()
            watched = _identities(roots)
            events = watch(
                *_to_watch(roots),
                watch_filter=None,
                step=_QUIET_MS,
                debounce=_LONGEST_MS,
                rust_timeout=_TICK_MS,
                yield_on_timeout=True,
                recursive=any(root.is_dir() for root in roots),
                ignore_permission_denied=True,
            )
            try:
                changes = next(events)  # by now, it watches
                yield True
                if self._roots() != roots:
                    continue  # the index had others, or they have come together
                counts = self._filter()
                while True:
                    if changes:
                        counts.refresh()
                        yield any(counts(path) for _, path in changes)
                    elif self._failed_at is not None and time.monotonic() - self._failed_at > _RETRY_SECONDS:
                        yield True
                    elif _identities(roots) != watched:
                        break  # a root was made anew, or has come back
                    changes = next(events)
            except OSError as error:
                raise EpicError(_why_not(error)) from error
            finally:
                events.close()

    def _roots(self) -> list[Path]:
        """The folders and files of the index, and those that it is to get."""
        state = self._status()
        known = [] if state is None else [Path(root) for root in state.roots]
        new = [place for place in self._places if not any(place.is_relative_to(root) for root in known)]
        return [*known, *new]

    def _filter(self) -> ChangeFilter:
        from epic_rag_chroma import ChangeFilter, IndexSettings

        state = self._status()
        return ChangeFilter(self._roots(), IndexSettings() if state is None else state.settings, self._folder)

    def _status(self) -> IndexStatus | None:
        """The index's state; the last one that could be read, since a round says what is wrong with it now."""
        with suppress(IndexStateError):
            self._state = self._indexer.status()
        return self._state


def _to_watch(roots: Sequence[Path]) -> list[Path]:
    """Return what to watch: of a file its folder, since an editor may put a new file in its place."""
    wanted = [root if root.is_dir() else root.parent for root in roots]
    return [place for place in dict.fromkeys(wanted) if place.is_dir()]


def _identities(roots: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Return what each folder is on its disk; another folder of the same name is another."""
    found: list[tuple[int, int] | None] = []
    for root in _to_watch(roots):
        try:
            info = os.stat(root)
        except OSError:
            found.append(None)
        else:
            found.append((info.st_dev, info.st_ino))
    return found


def _why_not(error: OSError) -> str:
    text = error.strerror or str(error)
    return (
        f"the folders cannot be watched ({text}); raise fs.inotify.max_user_watches if there are many, or run the "
        "command again with WATCHFILES_FORCE_POLLING=1"
    )


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def index(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH",
            help="Folders and files to index. Without any: those of the index in --index-dir, or of the nearest one.",
            show_default=False,
        ),
    ] = None,
    index_dir: Annotated[
        Path | None,
        typer.Option(
            "--index-dir",
            metavar="DIR",
            envvar="EPIC_RAG_INDEX",
            help="The index folder. Without it: .epic-rag in the first PATH.",
        ),
    ] = None,
    model: Model = None,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = None,
    chroma: Chroma = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="PATTERN", help="Index only files that match; can be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Leave out files that match; can be repeated."),
    ] = None,
    follow_links: Annotated[
        bool | None,
        typer.Option(
            "--follow-links/--no-follow-links",
            help="Also read what symbolic links lead to outside of the folders. The index remembers it.",
            show_default=False,
        ),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option("--chunk-tokens", metavar="N", min=1, help="The most tokens of a passage."),
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Embed everything again, with the model and settings given now.")
    ] = False,
    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            min=0,
            help="How long to wait for another process that writes to the index; `inf` for as long as it takes.",
            show_default="not at all",
        ),
    ] = 0.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done: nothing is written, no model is loaded.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on, and index again whenever something has changed, until Ctrl-C.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Index folders and files, or bring their index up to date.

    Only new and changed files are embedded, and of these only passages that are new; files that are gone leave the
    index. Files named by .gitignore or .epicignore are not read; patterns are written as in these files.
    The exit status is 1 when nothing could be indexed.

    Examples:
        epic-rag index docs
        epic-rag index docs notes.md --exclude 'drafts/**' --json
        epic-rag index docs --chunk-tokens 120 --rebuild
        epic-rag index --dry-run
    """
    if math.isnan(wait):
        raise typer.BadParameter("nan is no number of seconds", param_hint="'--wait'")
    if watch and dry_run:
        raise typer.BadParameter("it says what one run would do; leave out --watch", param_hint="'--dry-run'")
    if dry_run and rebuild:
        raise typer.BadParameter("a rebuild embeds every file; leave out --rebuild", param_hint="'--dry-run'")
    places = paths or []
    _require(places)
    # Imported here, as in every command, so that --help answers at once.
    from epic_rag_chroma import ChromaIndexer
    from epic_rag_cli.loading import encoder_for

    folder = index_dir_for(index_dir, places[0]) if places else find_index(index_dir)
    indexer = ChromaIndexer(
        folder, encoder=encoder_for(model, dtype, device), chroma=chroma, dtype=dtype, device=device
    )
    settings = _settings(indexer, rebuild, include=include, exclude=exclude, follow=follow_links, tokens=chunk_tokens)
    if dry_run:
        _tell_plan(indexer, folder, places, settings, as_json)
        return

    def run(rebuild: bool) -> IndexReport:
        progress = IndexingProgress()
        try:
            with progress:
                return indexer.index(
                    places,
                    settings=settings,
                    rebuild=rebuild,
                    progress=progress,
                    wait=None if math.isinf(wait) else wait,
                )
        except KeyboardInterrupt:
            raise Interrupted(_interrupted_line(progress, folder, rebuild)) from None

    if watch:
        Watch(indexer, folder, places, as_json=as_json).run(run, rebuild=rebuild)
        return
    report = run(rebuild)
    if as_json:
        emit_json({"index_dir": str(folder), **reports.report_json(report)})
    reports.tell_skipped(report.skipped, hint=not as_json)
    if report.chunks_total == 0 and report.deleted == 0:
        raise _nothing(places or [folder], report)
    if not as_json and verbosity() is not Verbosity.QUIET:
        emit([reports.report_summary(report)])


def _require(paths: list[Path]) -> None:
    """Fail before a model is loaded or a folder made, which for a mistyped path is all that can happen."""
    for path in paths:
        if not path.exists():
            raise DataError(f"no such file or folder: {path}; check the path and run `epic-rag index` again")


def _settings(
    indexer: ChromaIndexer,
    rebuild: bool,
    *,
    include: list[str] | None,
    exclude: list[str] | None,
    follow: bool | None,
    tokens: int | None,
) -> IndexSettings | None:
    """Return the settings to ask for: None (the index's own) or those of the index with what is given now."""
    given: dict[str, Any] = {}
    if include:
        given["include"] = tuple(include)
    if exclude:
        given["exclude"] = tuple(exclude)
    if follow is not None:
        given["follow_links"] = follow
    if tokens is not None:
        given["chunk_tokens"] = tokens
    if not given:
        return None
    from epic_rag_chroma import IndexSettings

    base = IndexSettings()
    try:
        base = indexer.status().settings
    except IndexNotFoundError:
        pass
    except IndexStateError:
        # A broken index is what --rebuild is for.
        if not rebuild:
            raise
    if tokens is not None and tokens != base.chunk_tokens:
        # There is no option for the overlap: short passages share less than the default.
        given["chunk_overlap"] = min(IndexSettings().chunk_overlap, tokens // 10)
    return dataclasses.replace(base, **given)


def _tell_plan(
    indexer: ChromaIndexer, folder: Path, places: list[Path], settings: IndexSettings | None, as_json: bool
) -> None:
    plan = indexer.plan(places, settings=settings)
    if as_json:
        emit_json({"index_dir": str(folder), "dry_run": True, **reports.plan_json(plan)})
        return
    reports.tell_skipped(plan.skipped, hint=True)
    lines = reports.plan_lines(plan)
    emit([*(columns(lines, styles=("bold",)) if lines else ()), reports.plan_summary(plan)])


def _nothing(places: list[Path], report: IndexReport) -> EpicError:
    shown = ", ".join(display_path(path) for path in places)
    return EpicError(
        f"nothing to index: {shown} holds no file with text ({len(report.skipped)} skipped); "
        "check the path, --include, --exclude, .gitignore and .epicignore, then run `epic-rag index` again"
    )


def _interrupted_line(progress: IndexingProgress, folder: Path, rebuild: bool) -> str:
    last = progress.last
    if last is None:
        return "interrupted before anything was stored; run the same command again"
    done = f"interrupted at {last.stage} {last.done:,} of {last.total:,}"
    if rebuild:
        return f"{done}; {display_path(folder)} is what it was; run the same command again to start over"
    return f"{done}; {display_path(folder)} keeps what was stored; run the same command again to go on"
