"""`epic-rag index`: bring an index up to date with its folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epic_rag.errors import DataError, EpicError, IndexNotFoundError, IndexStateError
from epic_rag_cli.defaults import MAX_SKIPPED_SHOWN
from epic_rag_cli.interrupt import Interrupted
from epic_rag_cli.locate import display_path, index_dir_for
from epic_rag_cli.options import Json, Model
from epic_rag_cli.output import emit, emit_json, message
from epic_rag_cli.progress import IndexingProgress
from epic_rag_cli.text import plural

if TYPE_CHECKING:
    from epic_rag_chroma import ChromaIndexer, IndexReport, IndexSettings

__all__ = ["index"]


def index(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Folders and files to index.")],
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
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="PATTERN", help="Index only files that match; can be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Leave out files that match; can be repeated."),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option("--chunk-tokens", metavar="N", min=1, help="The most tokens of a passage."),
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Embed everything again, with the model and settings given now.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Index folders and files, or bring their index up to date.

    Only new and changed files are embedded; files that are gone leave the index. Files named by .gitignore or
    .epicignore are not read; patterns are written as in these files.
    The exit status is 1 when nothing could be indexed.

    Examples:
        epic-rag index docs
        epic-rag index docs notes.md --exclude 'drafts/**' --json
        epic-rag index docs --chunk-tokens 120 --rebuild
    """
    _require(paths)
    # Imported here, as in every command, so that --help answers at once.
    from epic_rag_chroma import ChromaIndexer
    from epic_rag_cli.loading import encoder_for

    folder = index_dir_for(index_dir, paths[0])
    indexer = ChromaIndexer(folder, encoder=encoder_for(model))
    settings = _settings(indexer, include, exclude, chunk_tokens, rebuild)
    progress = IndexingProgress()
    try:
        with progress:
            report = indexer.index(paths, settings=settings, rebuild=rebuild, progress=progress)
    except KeyboardInterrupt:
        raise Interrupted(_interrupted_line(progress, folder, rebuild)) from None
    if as_json:
        emit_json({"index_dir": str(folder), **dataclasses.asdict(report), **_rates(report)})
    _tell_skipped(report, as_json)
    if report.chunks_total == 0 and report.deleted == 0:
        places = ", ".join(display_path(path) for path in paths)
        raise EpicError(
            f"nothing to index: {places} holds no file with text ({len(report.skipped)} skipped); "
            "check the path, --include, --exclude, .gitignore and .epicignore, then run `epic-rag index` again"
        )
    if not as_json:
        emit([_summary(report)])


def _require(paths: list[Path]) -> None:
    """Fail before a model is loaded or a folder made, which for a mistyped path is all that can happen."""
    for path in paths:
        if not path.exists():
            raise DataError(f"no such file or folder: {path}; check the path and run `epic-rag index` again")


def _settings(
    indexer: ChromaIndexer,
    include: list[str] | None,
    exclude: list[str] | None,
    chunk_tokens: int | None,
    rebuild: bool,
) -> IndexSettings | None:
    """Return the settings to ask for: None (the index's own) or those of the index with what is given now."""
    given: dict[str, tuple[str, ...] | int] = {}
    if include:
        given["include"] = tuple(include)
    if exclude:
        given["exclude"] = tuple(exclude)
    if chunk_tokens is not None:
        given["chunk_tokens"] = chunk_tokens
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
    if chunk_tokens is not None and chunk_tokens != base.chunk_tokens:
        # There is no option for the overlap: short passages share less than the default.
        given["chunk_overlap"] = min(IndexSettings().chunk_overlap, chunk_tokens // 10)
    return dataclasses.replace(base, **given)  # type: ignore[arg-type]  # names and types are those of the fields


def _rates(report: IndexReport) -> dict[str, float]:
    seconds = max(report.seconds, 1e-9)
    return {"chunks_per_second": round(report.chunks_embedded / seconds, 1)}


def _summary(report: IndexReport) -> str:
    counts = (
        f"{report.added:,} added, {report.changed:,} changed, {report.deleted:,} deleted, "
        f"{report.unchanged:,} unchanged, {len(report.skipped):,} skipped"
    )
    rate = _rates(report)["chunks_per_second"]
    embedded = f"{plural(report.chunks_embedded, 'passage')} embedded in {report.seconds:.1f} s"
    return f"{counts}; {embedded}" + (f" ({rate:,.1f} a second)" if report.chunks_embedded else "")


def _tell_skipped(report: IndexReport, as_json: bool) -> None:
    for file in report.skipped[:MAX_SKIPPED_SHOWN]:
        message("skipped", f"{file.path}: {file.reason}")
    more = len(report.skipped) - MAX_SKIPPED_SHOWN
    if more > 0:
        message("skipped", f"{more:,} more" + ("" if as_json else "; --json lists all"))


def _interrupted_line(progress: IndexingProgress, folder: Path, rebuild: bool) -> str:
    last = progress.last
    if last is None:
        return "interrupted before anything was stored; run the same command again"
    done = f"interrupted at {last.stage} {last.done:,} of {last.total:,}"
    if rebuild:
        return f"{done}; {display_path(folder)} is what it was; run the same command again to start over"
    return f"{done}; {display_path(folder)} keeps what was stored; run the same command again to go on"
