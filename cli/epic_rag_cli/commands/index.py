"""`epic-rag index`: create an index or update it, once or after each change (`--watch`)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from epic_rag.errors import DataError, EpicError
from epic_rag_chroma import NO_CHROMA, IndexNotFoundError, IndexStateError
from epic_rag_cli.options import (
    DEFAULT_DTYPE,
    Chroma,
    ConfigFile,
    Device,
    Dtype,
    Json,
    Model,
    Quiet,
    Verbose,
    open_indexer,
)
from epic_rag_cli.results import (
    INDEX_FOLDER,
    display_path,
    find_index,
    print_plan,
    print_skipped,
    report_json,
    report_summary,
)
from epic_rag_cli.terminal import (
    IndexingProgress,
    Interrupted,
    Verbosity,
    debugging,
    emit,
    emit_json,
    message,
    plural,
    usage_error,
    verbosity,
)

if TYPE_CHECKING:
    from epic_rag_chroma import ChromaIndexer, IndexReport, IndexSettings, SkippedFile

__all__ = ["index", "watch_index"]

# A burst of changes ends after the first time without one, or after the second in any case.
_STEP_MS = 300
_DEBOUNCE_MS = 2000
_TICK_MS = 500
_RETRY_SECONDS = 30.0


def index(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH",
            help="Folders and files to index. Without any: those of the index in --index-dir, or of the nearest one.",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[
        list[Path] | None,
        typer.Option(
            "--remove",
            metavar="PATH",
            help="A folder or file of an earlier run that leaves the index, also if it no longer exists; can be "
            "repeated.",
        ),
    ] = None,
    index_dir: Annotated[
        list[Path] | None,
        typer.Option(
            "--index-dir",
            metavar="DIR",
            envvar="EPIC_RAG_INDEX",
            help="The index folder, or a folder whose .epic-rag it is. Without it: .epic-rag in the first PATH.",
        ),
    ] = None,
    model: Model = None,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = None,
    chroma: Chroma = None,
    no_chroma: Annotated[
        bool,
        typer.Option("--no-chroma", help="Keep no copy for programs that read Chroma; the same as `--chroma none`."),
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="PATTERN", help="Index only files that match; can be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Skip files that match; can be repeated."),
    ] = None,
    follow_links: Annotated[
        bool | None,
        typer.Option(
            "--follow-links/--no-follow-links",
            help="Also read files that symbolic links reach outside the folders. The index remembers the choice.",
            show_default=False,
        ),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option("--chunk-tokens", metavar="N", min=1, help="Maximum tokens in a chunk."),
    ] = None,
    from_parquet: Annotated[
        str | None,
        typer.Option(
            "--from-parquet",
            metavar="DIR",
            help="Fill the index in --index-dir, or the server's --collection, with the vectors of Parquet files that "
            "`epic-rag index --to DIR` wrote. No model is loaded, and only what differs is written.",
        ),
    ] = None,
    collection: Annotated[
        str | None,
        typer.Option(
            "--collection",
            metavar="NAME",
            help="With --chroma URL: store the rows on the server alone, in collections of that name.",
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(
            "--shards",
            metavar="N",
            min=1,
            help="Number of collections that the rows of --collection are spread over.",
            show_default="those that exist, or 1",
        ),
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
            help="Maximum time to wait for another process that writes to the index; `inf` waits without limit.",
            show_default="no wait",
        ),
    ] = 0.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done. Nothing is written and no model is loaded.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep running and index again after each change, until Ctrl-C.")
    ] = False,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="PATH_OR_URL",
            help="Write vectors to Parquet files in a folder (local, s3://, gs://, ...) instead of an index; PATHs may "
            "be such addresses as well. A run that was interrupted goes on, and a later one embeds only what is new.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="With --to: run on a Ray cluster, `auto` or its address; `local` starts one on this machine.",
            show_default="this process",
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(
            "--actors", metavar="N", min=1, help="With --ray: number of models.", show_default="one a GPU or a CPU"
        ),
    ] = None,
    cpus: Annotated[
        int, typer.Option("--cpus", metavar="N", min=1, help="With --ray: CPUs, and threads, of a model.")
    ] = 1,
    gpus: Annotated[float, typer.Option("--gpus", metavar="N", min=0, help="With --ray: GPUs of a model.")] = 0,
    vectors: Annotated[
        Literal["float32", "float16"], typer.Option("--vectors", help="With --to: number format of the stored vectors.")
    ] = "float32",
    duplicates: Annotated[
        Literal["near", "exact", "keep"],
        typer.Option(
            "--duplicates",
            help="With --to: leave out chunks whose text another one has, or nearly has (near), those with the same "
            "text (exact), or none (keep).",
        ),
    ] = "near",
    as_json: Json = False,
    config_file: ConfigFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Index folders and files, or update their index.

    Only new and changed files are read again, and of these only new chunks are embedded; deleted files leave the
    index. Files that .gitignore or .epicignore match are skipped; patterns are written as in these files.
    The exit status is 1 when nothing could be indexed.

    Examples:
        epic-rag index docs
        epic-rag index docs notes.md --exclude 'drafts/**' --json
        epic-rag index docs --chunk-tokens 120 --rebuild
        epic-rag index --remove notes.md --index-dir docs
        epic-rag index --dry-run
        epic-rag index docs --to vectors
        epic-rag index --from-parquet vectors --index-dir vectors.index
    """
    if math.isnan(wait):
        raise typer.BadParameter("nan is not a number of seconds", param_hint="'--wait'")
    if ray is not None and to is None:
        raise usage_error("--ray needs --to PATH_OR_URL, the folder of the vectors")
    if to is not None:
        if remove or rebuild or dry_run or watch:
            raise usage_error("--to excludes --remove, --rebuild, --dry-run and --watch, which change an index folder")
        if from_parquet is not None:
            raise usage_error("--to and --from-parquet exclude each other. Use one of them.")
        if (collection is None) != (chroma is None) or (shards is not None and collection is None):
            raise usage_error("With --to, name both --chroma URL and --collection NAME, or neither")
        from epic_rag_chroma import IndexSettings
        from epic_rag_cli.pipeline import index_to_parquet
        from epic_rag_ray import Cluster

        reading = IndexSettings(
            include=tuple(include or ()), exclude=tuple(exclude or ()), follow_links=bool(follow_links)
        )
        if chunk_tokens is not None:
            overlap = min(reading.chunk_overlap, chunk_tokens // 10)
            reading = dataclasses.replace(reading, chunk_tokens=chunk_tokens, chunk_overlap=overlap)
        index_to_parquet(
            paths or [],
            to,
            model=model,
            dtype=dtype,
            device=device,
            settings=reading,
            vectors=vectors,
            duplicates=duplicates,
            cluster=Cluster(ray, actors, cpus, gpus),
            chroma=chroma,
            collection=collection,
            shards=shards,
            as_json=as_json,
        )
        return
    if watch and dry_run:
        raise usage_error("--dry-run and --watch exclude each other. Use one of them.")
    if no_chroma and chroma not in (None, NO_CHROMA):
        raise usage_error("--no-chroma and --chroma exclude each other. Use one of them.")
    if watch and remove:
        raise usage_error("--remove and --watch exclude each other. Remove first, then watch.")
    if dry_run and rebuild:
        raise usage_error("--dry-run and --rebuild exclude each other: a rebuild embeds every file.")
    if from_parquet is None and (collection is not None or shards is not None):
        raise usage_error("--collection and --shards belong to --from-parquet and --to")
    if from_parquet is not None:
        if paths or remove or watch or dry_run or model or include or exclude or chunk_tokens:
            raise usage_error("--from-parquet takes no paths, and no options for reading or embedding files")
        from epic_rag_cli.parquet import fill_from_parquet

        fill_from_parquet(
            from_parquet,
            index_dir,
            chroma=NO_CHROMA if no_chroma else chroma,
            collection=collection,
            shards=shards,
            rebuild=rebuild,
            wait=wait,
            as_json=as_json,
        )
        return
    places = paths or []
    for path in places:  # before a model is loaded or a folder is made
        if not path.exists():
            raise DataError(f"No such file or folder: {path}. Check the path.")
    if not index_dir and places:
        folder = (places[0] if places[0].is_dir() else places[0].parent) / INDEX_FOLDER
    else:
        folder = find_index(index_dir)
    indexer = open_indexer(folder, model=model, dtype=dtype, device=device, chroma=NO_CHROMA if no_chroma else chroma)
    settings = _settings(
        indexer, rebuild, include=include, exclude=exclude, follow_links=follow_links, chunk_tokens=chunk_tokens
    )
    if dry_run:
        print_plan(indexer.plan(places, remove=remove or (), settings=settings), folder, as_json=as_json)
        return

    def update(rebuild: bool) -> IndexReport:
        progress = IndexingProgress()
        try:
            with progress:
                return indexer.index(
                    places,
                    remove=remove or (),
                    settings=settings,
                    rebuild=rebuild,
                    progress=progress,
                    wait=None if math.isinf(wait) else wait,
                )
        except KeyboardInterrupt:
            raise Interrupted(_interrupted_line(progress, folder, rebuild)) from None

    if watch:
        watch_index(indexer, folder, places, update, rebuild=rebuild, as_json=as_json)
        return
    report = update(rebuild)
    if as_json:
        emit_json({"index_dir": str(folder), **report_json(report)})
    print_skipped(report.skipped, hint=not as_json)
    if report.chunks_total == 0 and report.deleted == 0:
        shown = ", ".join(display_path(path) for path in places or [folder])
        raise EpicError(
            f"Nothing to index: {shown} holds no file with text ({len(report.skipped)} skipped). Check the path, "
            "--include, --exclude, .gitignore and .epicignore."
        )
    if not as_json and verbosity() is not Verbosity.QUIET:
        emit([report_summary(report)])
    _note_language(indexer, report)


def _note_language(indexer: ChromaIndexer, report: IndexReport) -> None:
    """Print a note if most of the index is in a language that its model was not trained on."""
    found = report.language_mismatch
    if found is None:
        return
    from epic_rag.model_conventions import LANGUAGE_NAMES

    known = " and ".join(LANGUAGE_NAMES.get(code, code) for code in found.model_languages)
    message(
        "note",
        f"About {found.share:.0%} of the text is {LANGUAGE_NAMES[found.language]}, and {indexer.encoder.name} was "
        f"trained on {known}. Use `--mode keyword`, or index again with a multilingual model: "
        "`epic-rag index --rebuild --model intfloat/multilingual-e5-small`.",
    )


def _settings(
    indexer: ChromaIndexer,
    rebuild: bool,
    *,
    include: list[str] | None,
    exclude: list[str] | None,
    follow_links: bool | None,
    chunk_tokens: int | None,
) -> IndexSettings | None:
    """Return the index's settings with the given options changed; None if there are none to change."""
    given: dict[str, Any] = {
        "include": tuple(include) if include else None,
        "exclude": tuple(exclude) if exclude else None,
        "follow_links": follow_links,
        "chunk_tokens": chunk_tokens,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    from epic_rag_chroma import IndexSettings

    base = IndexSettings()
    try:
        base = indexer.status().settings
    except IndexNotFoundError:
        pass
    except IndexStateError:
        if not rebuild:  # a rebuild repairs a broken index
            raise
    if chunk_tokens is not None and chunk_tokens != base.chunk_tokens:
        # There is no option for the overlap: at most a tenth of a chunk.
        given["chunk_overlap"] = min(IndexSettings().chunk_overlap, chunk_tokens // 10)
    return dataclasses.replace(base, **given)


def _interrupted_line(progress: IndexingProgress, folder: Path, rebuild: bool) -> str:
    last = progress.last
    if last is None:
        return "Interrupted before anything was stored. Run the same command again."
    done = f"Interrupted at {last.stage} {last.done:,} of {last.total:,}."
    if rebuild:
        return f"{done} {display_path(folder)} is unchanged. Run the same command again to start over."
    return f"{done} {display_path(folder)} keeps what was stored. Run the same command again to continue."


def watch_index(
    indexer: ChromaIndexer,
    folder: Path,
    places: Sequence[Path],
    update: Callable[[bool], IndexReport],
    *,
    rebuild: bool,
    as_json: bool,
) -> None:
    """Index now, and again after each change of the indexed folders, until Ctrl-C.

    A round that changes nothing takes 25 ms at 1,000 chunks (benchmarks/README.md, measured by growth.py), so every
    change outside the index folder starts one; such rounds print nothing. A failed round is reported and
    repeated after the next change or after half a minute; only a failure of the first round ends the watch.

    Raises:
        EpicError: If the first round fails, or the file system cannot be watched.
        Interrupted: If Ctrl-C comes during a round.
    """
    totals: Counter[str] = Counter()
    skipped: set[SkippedFile] = set()
    rounds = 0
    failed_at: float | None = None
    try:
        for changed in _changes(indexer, folder, places):
            if not changed and (failed_at is None or time.monotonic() - failed_at < _RETRY_SECONDS):
                continue
            failed_at = None
            try:
                report = update(rebuild and rounds == 0)
            except Interrupted:
                raise
            except Exception as error:  # Chroma raises its own kinds of errors
                if rounds == 0 or debugging():
                    raise
                rounds += 1
                failed_at = time.monotonic()
                text = str(error) if isinstance(error, (EpicError, OSError)) else f"{type(error).__name__}: {error}"
                if as_json:
                    emit_json({"round": rounds, "time": _now(), "error": text}, one_line=True)
                message("error", f"{text} (Trying again after the next change.)")
                continue
            counts = {name: getattr(report, name) for name in ("added", "changed", "renamed", "deleted")}
            print_skipped([file for file in report.skipped if file not in skipped], hint=False)
            skipped = set(report.skipped)
            if rounds > 0 and not any(counts.values()):
                continue
            rounds += 1
            totals.update(counts)
            if as_json:
                line = {"round": rounds, "time": _now(), "index_dir": str(folder.resolve()), **report_json(report)}
                emit_json(line, one_line=True)
            elif verbosity() is not Verbosity.QUIET:
                emit([f"{_now()[11:19]}  {report_summary(report)}"])
            if rounds == 1:
                _note_language(indexer, report)
                roots = ", ".join(display_path(root) for root in _roots(indexer, places))
                message("note", f"Watching {roots}. Press Ctrl-C to stop.")
    except KeyboardInterrupt:
        done = ", ".join(f"{count:,} {name}" for name, count in totals.items())
        message("note", f"Stopped watching after {plural(rounds, 'round')}: {done}.")
        raise typer.Exit(0) from None


def _changes(indexer: ChromaIndexer, folder: Path, places: Sequence[Path]) -> Iterator[bool]:
    """Yield True at once and after each burst of changes, False at least every half second otherwise.

    The watcher starts before the first True. It is replaced, with another True, when a root joins the index, is
    replaced or comes back.
    """
    from watchfiles import watch

    index = folder.resolve()
    roots: list[Path] = []
    while True:
        roots = _roots(indexer, places) or roots
        # An editor may replace a file that is a root, so its folder is watched.
        folders = sorted({root if root.is_dir() else root.parent for root in roots})
        watched = [_identity(path) for path in folders]
        events = watch(
            *[path for path in folders if path.is_dir()],
            watch_filter=lambda _, path: not Path(path).is_relative_to(index),
            step=_STEP_MS,
            debounce=_DEBOUNCE_MS,
            rust_timeout=_TICK_MS,
            yield_on_timeout=True,
            recursive=any(root.is_dir() for root in roots),
            ignore_permission_denied=True,
        )
        try:
            next(events)
            yield True
            if _roots(indexer, places) not in ([], roots):
                continue
            while [_identity(path) for path in folders] == watched:
                yield bool(next(events))
        except OSError as error:
            raise EpicError(
                f"The folders cannot be watched ({error.strerror or error}). Raise fs.inotify.max_user_watches if "
                "there are many, or set WATCHFILES_FORCE_POLLING=1."
            ) from error
        finally:
            events.close()


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _roots(indexer: ChromaIndexer, places: Sequence[Path]) -> list[Path]:
    """Return the roots of the index, if it can be read, and the places that are to become roots."""
    known: list[Path] = []
    with suppress(IndexStateError):
        known = [Path(root) for root in indexer.status().roots]
    new = [place.resolve() for place in places]
    return [*known, *(place for place in new if not any(place.is_relative_to(root) for root in known))]


def _identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode, which a new folder of the same name does not share."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino
