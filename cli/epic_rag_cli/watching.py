"""`epic-rag index --watch`: index, then again whenever something has changed that counts."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from epic_rag.errors import EpicError, IndexStateError
from epic_rag_cli import reports
from epic_rag_cli.interrupt import Interrupted
from epic_rag_cli.locate import display_path
from epic_rag_cli.output import emit, emit_json, message
from epic_rag_cli.quiet import debugging
from epic_rag_cli.text import plural
from epic_rag_cli.verbosity import Verbosity, verbosity

if TYPE_CHECKING:
    from epic_rag_chroma import ChromaIndexer, IndexReport, IndexStatus, SkippedFile
    from epic_rag_chroma.changes import ChangeFilter

__all__ = ["Watch"]

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
        from epic_rag_chroma import IndexSettings
        from epic_rag_chroma.changes import ChangeFilter

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
