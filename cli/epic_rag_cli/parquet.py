"""`epic-rag index --from-parquet`: fill an index folder or a Chroma server from Parquet files, without a model."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from epic_rag_chroma import NO_CHROMA, IndexProgress
from epic_rag_cli.options import DEFAULT_DTYPE, open_indexer
from epic_rag_cli.results import display_path, find_index, report_json
from epic_rag_cli.terminal import (
    IndexingProgress,
    Interrupted,
    Verbosity,
    emit,
    emit_json,
    plural,
    usage_error,
    verbosity,
)

__all__ = ["fill_from_parquet"]


def fill_from_parquet(
    parts: str,
    index_dir: list[Path] | None,
    *,
    chroma: str | None,
    collection: str | None,
    shards: int | None,
    rebuild: bool,
    wait: float,
    as_json: bool,
) -> None:
    """Fill an index folder, or collections on a server, and print the counts.

    Args:
        parts: Folder or address of the Parquet files.
        index_dir: The value of `--index-dir`.
        chroma: The value of `--chroma`.
        collection: Name of the collection on the server; None for an index folder.
        shards: Number of shards.
        rebuild: Replace an index of another model, or of folders.
        wait: Seconds to wait for another process that writes to the index.
        as_json: Print JSON.
    """
    from epic_rag_ray import VectorParts, fill_chroma, fill_index

    if collection is not None and (chroma in (None, NO_CHROMA) or index_dir or rebuild):
        raise usage_error("--collection needs --chroma URL, and neither --index-dir nor --rebuild")
    if collection is None and not index_dir:
        raise usage_error("--from-parquet needs --index-dir DIR, or --chroma URL with --collection NAME")
    live = VectorParts(parts)
    total = live.count()
    progress = IndexingProgress()

    def show(done: int) -> None:
        progress(IndexProgress("loading", done, total, None))

    place = parts
    try:
        with progress:
            if collection is not None:
                assert chroma is not None
                place = f"{collection} on {chroma}"
                counts = fill_chroma(live, chroma, collection, shards=shards, progress=show)
            else:
                folder = find_index(index_dir)
                place = display_path(folder)
                indexer = open_indexer(folder, model=None, dtype=DEFAULT_DTYPE, device=None, chroma=chroma)
                report = fill_index(
                    live, indexer, rebuild=rebuild, progress=show, wait=None if math.isinf(wait) else wait
                )
    except KeyboardInterrupt:
        done = 0 if progress.last is None else progress.last.done
        raise Interrupted(
            f"Interrupted at row {done:,} of {total:,}. {place} keeps what was stored. Run the same command again."
        ) from None
    if collection is not None:
        values = {name: value for name, value in asdict(counts).items() if name != "left_out"}
        if as_json:
            emit_json({"chroma": chroma, "collection": collection, "rows": total, **values})
        elif verbosity() is not Verbosity.QUIET:
            emit([f"{plural(total, 'row')} in {place}: {', '.join(f'{n:,} {name}' for name, n in values.items())}"])
        return
    if as_json:
        emit_json({"index_dir": str(folder), **report_json(report)})
    elif verbosity() is not Verbosity.QUIET:
        emit(
            [
                f"{report.added:,} documents added, {report.changed:,} changed, {report.deleted:,} deleted, "
                f"{report.unchanged:,} unchanged; {plural(report.chunks_reused, 'chunk')} stored of "
                f"{report.chunks_total:,} in {report.seconds:.1f} s"
            ]
        )
