"""`epic-rag index`: bring an index up to date with its folders."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epic_rag.errors import DataError, EpicError, IndexNotFoundError, IndexStateError
from epic_rag_cli import reports
from epic_rag_cli.defaults import DEFAULT_DTYPE
from epic_rag_cli.interrupt import Interrupted
from epic_rag_cli.locate import display_path, find_index, index_dir_for
from epic_rag_cli.options import Chroma, Device, Dtype, Json, Model
from epic_rag_cli.output import columns, emit, emit_json
from epic_rag_cli.progress import IndexingProgress
from epic_rag_cli.verbosity import Verbosity, verbosity

if TYPE_CHECKING:
    from epic_rag_chroma import ChromaIndexer, IndexReport, IndexSettings

__all__ = ["index"]


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
        from epic_rag_cli.watching import Watch

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
