"""The pipeline: a corpus on any file system to vectors in Parquet, on a cluster or without one.

`run_pipeline` makes a generation (`parts`) in four steps, each of which goes on where a killed run stopped:

1. plan: list the files, compare them with the documents of the last generation, divide what is new into tasks;
2. read: the tasks read and split their files into `chunks/` (`workers.ChunkWriter`);
3. compare: find duplicates, and the rows that are new, changed or gone (`catalogue`);
4. embed: tasks of some thousand rows write `parts/` (`workers.PartWriter`). Then the generation is complete.

The plan is stored, and the other steps depend only on it and on the last generation. A run that continues a killed one
makes the same tasks and skips those whose files are there; its vectors are those of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from epic_rag.errors import ConfigError, DataError, FingerprintError
from epic_rag_chroma import DocumentSplitter, IndexLockedError, IndexSettings, SkippedFile
from epic_rag_ray.catalogue import Rows, compare, find_duplicates, hex_ids, live_rows, stored_rows
from epic_rag_ray.encoder import load_encoder
from epic_rag_ray.engine import Cluster, Task, run_tasks
from epic_rag_ray.parts import VectorDtype, VectorInfo, VectorParts, part_name
from epic_rag_ray.sources import SourceFile, Sources, find_sources, is_archive
from epic_rag_ray.storage import Storage, is_remote_address
from epic_rag_ray.workers import UNCHANGED, ChunkWriter, PartWriter

if TYPE_CHECKING:
    from epic_rag import EpicEncoder

__all__ = ["PipelineReport", "PipelineSettings", "RunProgress", "read_progress", "run_pipeline"]

DuplicateRule = Literal["near", "exact", "keep"]
# Sources of a reading task: few enough to share among actors, enough for few files in `chunks/`.
_TASK_SOURCES = 512
_TASK_BYTES = 16 * 2**20
_TASKS_PER_ACTOR = 4
_SETTINGS = ("vectors", "roots", "chunk_tokens", "chunk_overlap", "duplicates", "rows")
_SHOW_SECONDS, _SAVE_SECONDS, _STALE_SECONDS = 0.5, 2.0, 60.0
_PLAN_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int32()),
        *(pa.field(name, pa.string()) for name in ("address", "root", "path", "stamp", "digest")),
        pa.field("size", pa.int64()),
        pa.field("named", pa.bool_()),
    ]
)
_DOCUMENT_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("address", "root", "path", "stamp", "digest")),
        pa.field("size", pa.int64()),
        pa.field("chunks", pa.int32()),
        # The passages: a file of `chunks/` and the number of the source in it.
        pa.field("file", pa.string()),
        pa.field("source", pa.int32()),
        pa.field("reason", pa.string()),
    ]
)
_FAILURE_SCHEMA = pa.schema([pa.field(name, pa.string()) for name in ("address", "path", "reason")])


@dataclass(frozen=True)
class PipelineSettings:
    """Settings of a run. All but `index.include`, `index.exclude`, `dtype` and `device` are fixed by the first run.

    Args:
        model: A model as `EpicBatchEncoder` takes it; None for that of the last run, or the shipped default.
        index: Rules for files, sizes of chunks.
        vectors: Number format of the vectors.
        duplicates: Passages to leave out: those whose text another one has and near-duplicates ("near"), the former
            only ("exact"), or none ("keep").
        rows: Rows of a part, which an actor embeds at a time.
        dtype: Number format that the model computes in.
        device: Its device.
        truncate_dim: Keep the first N dimensions of the vectors.

    Raises:
        ConfigError: If a setting cannot work.
    """

    model: str | os.PathLike[str] | Callable[[], EpicEncoder] | None = None
    index: IndexSettings = field(default_factory=IndexSettings)
    vectors: VectorDtype = "float32"
    duplicates: DuplicateRule = "near"
    rows: int = 2048
    dtype: str | None = None
    device: str | None = None
    truncate_dim: int | None = None

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"rows is {self.rows}. Use 1 or more.")
        if self.vectors not in ("float32", "float16"):
            raise ConfigError(f"vectors is {self.vectors!r}. Use 'float32' or 'float16'.")
        if self.duplicates not in ("near", "exact", "keep"):
            raise ConfigError(f"duplicates is {self.duplicates!r}. Use 'near', 'exact' or 'keep'.")

    def stored(self) -> dict[str, Any]:
        """Return the settings that decide the content of the parts."""
        return {
            "chunk_tokens": self.index.chunk_tokens,
            "chunk_overlap": self.index.chunk_overlap,
            "duplicates": self.duplicates,
            "rows": self.rows,
        }


@dataclass(frozen=True)
class RunProgress:
    """State of a run, as `progress.json` has it.

    Args:
        state: "running", "complete", or "interrupted" for a run that has not reported for a minute.
        stage: "listing", "reading", "comparing", "embedding" or "storing".
        done: Documents or rows done in the stage.
        total: All of them; 0 if unknown.
        actors: Number of actors.
        tokens_per_second: Tokens that one actor embeds in a second.
        seconds_left: Expected rest of the stage; None if unknown.
        failures: Number of failed documents by reason.
        generation: The generation that it makes.
        updated: When it was reported, ISO 8601.
        host: The machine of the driver.
        pid: Its process.
        seconds: Duration so far.
    """

    state: Literal["running", "complete", "interrupted"]
    stage: str
    done: int
    total: int
    actors: int = 1
    tokens_per_second: float = 0.0
    seconds_left: float | None = None
    failures: dict[str, int] = field(default_factory=dict)
    generation: int = 1
    updated: str = ""
    host: str = ""
    pid: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class PipelineReport:
    """Result of a run.

    Args:
        generation: The last generation; 0 if there is none.
        added: New documents.
        changed: Documents with other content.
        deleted: Documents that are gone.
        unchanged: Documents with the content of the last run.
        skipped: Files and documents without passages, with the reason.
        rows: Live rows.
        embedded: Rows that were embedded.
        copied: Rows that got the vector of a row with the same text.
        rows_deleted: Rows that left.
        exact_duplicates: Passages that are left out because another one has their text.
        near_duplicates: Passages that are left out because another one has nearly their text.
        tokens: Embedded tokens.
        tokens_per_second: Tokens that one actor embedded in a second.
        actors: Number of actors.
        seconds: Duration of each step, and in all ("total").
        resumed: Whether the run continued an interrupted one.
    """

    generation: int = 0
    added: int = 0
    changed: int = 0
    deleted: int = 0
    unchanged: int = 0
    skipped: tuple[SkippedFile, ...] = ()
    rows: int = 0
    embedded: int = 0
    copied: int = 0
    rows_deleted: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0
    actors: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    resumed: bool = False


def read_progress(storage: Storage | str) -> RunProgress:
    """Return the state of the last run of a folder.

    Raises:
        DataError: If there was none.
    """
    storage = storage if isinstance(storage, Storage) else Storage(storage)
    if not storage.exists("progress.json"):
        raise DataError(f"{storage.address} has no run of `epic-rag index --to`. Check the address.")
    found = RunProgress(**storage.read_json("progress.json", "state", "stage", "done", "total", "updated"))
    age = (datetime.now(timezone.utc) - datetime.fromisoformat(found.updated)).total_seconds()
    gone = found.host == socket.gethostname() and not _is_alive(found.pid)
    if found.state == "running" and (age > _STALE_SECONDS or gone):
        return replace(found, state="interrupted", seconds_left=None)
    return found


def run_pipeline(
    roots: Sequence[str | os.PathLike[str]],
    to: str | os.PathLike[str],
    settings: PipelineSettings | None = None,
    *,
    cluster: Cluster | None = None,
    progress: Callable[[RunProgress], None] | None = None,
) -> PipelineReport:
    """Bring a folder of vectors up to date with a corpus.

    Args:
        roots: Files and folders: local paths, or addresses as `Storage` opens them. They are added to those of earlier
            runs.
        to: The folder of the vectors; see `Storage`.
        settings: None for those of the last run, or the defaults.
        cluster: Where to run; None for this process, without Ray.
        progress: Called about twice a second.

    Raises:
        DataError: If a root does not exist.
        ConfigError: If settings cannot work, or differ from those of earlier runs.
        FingerprintError: If the folder has vectors of another model.
        IndexLockedError: If another run is at work on the folder.
        MissingExtraError: If Ray or another library is needed and not installed.
        EpicError: If the cluster cannot be reached or the run fails there.
    """
    settings = settings or PipelineSettings()
    storage = Storage(to)
    addresses = [os.fspath(root) if is_remote_address(root) else str(Path(root).resolve()) for root in roots]
    for address in addresses:
        if not is_remote_address(address) and not Path(address).exists():
            raise DataError(f"No such file or folder: {address}. Check the path.")
    with _lock(storage):
        run = _Run(storage, settings, cluster or Cluster(), progress or (lambda event: None))
        return run.run(addresses)


class _Run:
    """A run of the pipeline; `run` is called once."""

    def __init__(
        self, storage: Storage, settings: PipelineSettings, cluster: Cluster, show: Callable[[RunProgress], None]
    ) -> None:
        self._storage = storage
        self._cluster = cluster
        self._show = show
        self._started = time.monotonic()
        self._shown = self._saved = 0.0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._failures: Counter[str] = Counter()
        self._tokens, self._worker_seconds, self._actors = 0, 0.0, 1
        self._generation = 0
        self._settings, self._info, self._roots = self._open(settings)

    def _open(self, settings: PipelineSettings) -> tuple[PipelineSettings, VectorInfo, list[str]]:
        """Return the settings of the folder and the origin of its vectors; store those of a new folder."""
        known = self._storage.read_json("settings.json", *_SETTINGS) if self._storage.exists("settings.json") else None
        if known is not None and settings.model is None:
            settings = replace(settings, model=known["vectors"]["source"])
        if known is not None and settings.truncate_dim is None and not callable(settings.model):
            settings = replace(settings, truncate_dim=known["vectors"]["truncate_dim"])
        encoder = load_encoder(
            settings.model, dtype=settings.dtype, device=settings.device, truncate_dim=settings.truncate_dim
        )
        DocumentSplitter(encoder, settings.index).close()  # checks the sizes of chunks before anything is read
        info = VectorInfo(
            encoder.fingerprint,
            encoder.name,
            _portable(encoder.source),
            encoder.dimension,
            settings.vectors,
            truncate_dim=encoder.truncate_dim,
        )
        if known is None:
            content = {"vectors": asdict(info), **settings.stored(), "roots": []}
            self._storage.write_bytes("settings.json", json.dumps(content, indent=2).encode())
            return settings, info, []
        stored = VectorInfo(**known["vectors"])
        if stored.fingerprint != info.fingerprint:
            raise FingerprintError(
                f"{self._storage.address} has vectors of {stored.model} ({stored.fingerprint}), not of {info.model} "
                f"({info.fingerprint}). Write to another folder."
            )
        differing = [
            name
            for name, value in {**settings.stored(), "vectors": settings.vectors}.items()
            if value != (known[name] if name != "vectors" else stored.dtype) and name != "rows"
        ]
        if differing:
            old = {**known, "vectors": stored.dtype}
            facts = ", ".join(f"{name} {old[name]}" for name in differing)
            raise ConfigError(f"{self._storage.address} was made with {facts}. Use that, or write to another folder.")
        return replace(settings, rows=known["rows"]), stored, list(known["roots"])

    def run(self, addresses: Sequence[str]) -> PipelineReport:
        with self._cluster.connected():
            self._actors = self._cluster.size()
            interrupted = [name for name in self._storage.list("plan") if self._is_open(name)]
            first: PipelineReport | None = None
            if interrupted:
                first = self._generate(int(interrupted[0].rpartition("/")[2][:6]))
            roots = list(dict.fromkeys([*self._roots, *addresses]))
            if not roots:
                raise ConfigError("There is nothing to index yet. Name files or folders.")
            report = self._plan(roots)
            if first is not None:
                report = _joined(first, report)
        report = replace(
            report,
            actors=self._actors,
            resumed=first is not None,
            seconds={**{name: round(value, 3) for name, value in self._seconds.items()}, "total": self._elapsed()},
            tokens=self._tokens,
            tokens_per_second=round(self._tokens / self._worker_seconds, 1) if self._worker_seconds else 0.0,
        )
        self._generation = report.generation
        self._report("storing", report.rows, report.rows, state="complete")
        return report

    def _is_open(self, plan: str) -> bool:
        """Return whether a plan belongs to a generation that is not complete; delete it otherwise."""
        generation = int(plan.rpartition("/")[2][:6])
        if not self._storage.exists(f"runs/{generation:06d}.json"):
            return True
        self._storage.delete(plan)
        return False

    # Step 1: plan.

    def _plan(self, roots: list[str]) -> PipelineReport:
        """List the sources, store what has to be read, and make the generation."""
        parts = self._parts()
        self._generation = (parts.generations[-1] if parts is not None else 0) + 1
        self._report("listing", 0, 0)
        with self._timed("listing"):
            sources = find_sources(roots, self._settings.index)
            previous = self._documents()
            planned, gone = _compare_sources(sources, previous)
        if roots != self._roots:
            content = self._storage.read_json("settings.json", *_SETTINGS)
            self._storage.write_bytes("settings.json", json.dumps({**content, "roots": roots}, indent=2).encode())
            self._roots = roots
        skipped = tuple(sources.skipped)
        unchanged = len(sources.files) - len(planned)
        if not planned and not gone:
            failures = [_failure(row) for row in self._table("failures", _FAILURE_SCHEMA).to_pylist()]
            report = PipelineReport(self._generation - 1, unchanged=unchanged, skipped=(*skipped, *failures))
            if parts is None:
                return report
            last = self._storage.read_json(_run_file(parts.generations[-1]), "rows")
            return replace(report, **{name: last[name] for name in ("rows", "exact_duplicates", "near_duplicates")})
        table = _plan_table(planned, previous, self._actors)
        schema = _PLAN_SCHEMA.with_metadata({"gone": json.dumps(gone)})
        self._storage.write_tables(_plan_file(self._generation), [table.cast(schema)], schema)
        report = self._generate(self._generation)
        return replace(report, skipped=(*skipped, *report.skipped))

    # Steps 2 to 4.

    def _generate(self, generation: int) -> PipelineReport:
        """Make the generation of a stored plan."""
        storage, settings = self._storage, self._settings
        self._generation = generation
        plan = storage.read_table(_plan_file(generation))
        gone = json.loads(storage.read_schema(_plan_file(generation)).metadata[b"gone"])
        common = {"storage": storage, "model": settings.model, "dtype": settings.dtype}
        arguments = {**common, "settings": settings.index, "near_duplicates": settings.duplicates == "near"}
        with self._timed("reading"):
            for _ in self._run("reading", ChunkWriter, arguments, _reading_tasks(plan, generation, storage), len(plan)):
                pass
        self._report("comparing", 0, 0)
        with self._timed("comparing"):
            previous = self._documents()
            documents, failures, counts = self._outcomes(plan, previous, gone)
            parts = self._parts()
            stored = stored_rows(parts)
            rows = live_rows(storage, _live_sources(documents))
            near = settings.duplicates == "near"
            kept = np.ones(len(rows), bool)
            duplicates = None
            if settings.duplicates != "keep":
                duplicates = find_duplicates(storage, rows, stored, near=near)
                kept[duplicates.row] = False
            delta = compare(rows, np.flatnonzero(kept), stored)
        tasks = _embedding_tasks(rows, stored, delta.write, delta.source, settings.rows, generation)
        existing = set(storage.list("parts", ".parquet"))
        tasks = [task for task in tasks if part_name(generation, task["number"]) not in existing]
        arguments = {**common, "vectors": self._info.dtype, "device": settings.device}
        totals: Counter[str] = Counter()
        lost: list[str] = []
        with self._timed("embedding"):
            for result in self._run("embedding", PartWriter, arguments, tasks, len(delta.write)):
                totals.update({name: result[name] for name in ("embedded", "copied")})
                lost += result["lost"]
        skipped = [
            *(SkippedFile(str(row["address"]), str(row["reason"])) for row in _failed(documents)),
            *(_failure(row) for row in failures.to_pylist()),
            *(SkippedFile(path, "the model returns no finite vector for a part of it") for path in lost),
        ]
        report = PipelineReport(
            generation=generation,
            added=counts["added"],
            changed=counts["changed"],
            deleted=len(gone),
            unchanged=previous.filter(pc.equal(previous["reason"], "")).num_rows - len(gone) - counts["changed"],
            skipped=tuple(skipped),
            rows=int(kept.sum()) - len(lost),
            embedded=totals["embedded"],
            copied=totals["copied"],
            rows_deleted=delta.deleted,
            exact_duplicates=0 if duplicates is None else int((~duplicates.is_near).sum()),
            near_duplicates=0 if duplicates is None else int(duplicates.is_near.sum()),
        )
        with self._timed("storing"):
            if not len(delta.write) and not len(delta.gone) and documents.equals(previous):
                self._discard(generation)  # documents that fail again are no reason for a generation
                return replace(report, generation=generation - 1)
            if duplicates is not None and len(duplicates.row):
                table = pa.table(
                    {
                        "id": hex_ids(rows.id[duplicates.row]),
                        "kept": hex_ids(rows.id[duplicates.kept]),
                        "kind": np.where(duplicates.is_near, "near", "exact"),
                    }
                )
                storage.write_tables(f"duplicates/{generation:06d}.parquet", [table], table.schema)
            if len(delta.gone):
                table = pa.table({"id": hex_ids(stored.id[delta.gone])})
                storage.write_tables(f"deleted/{generation:06d}.parquet", [table], table.schema)
            storage.write_tables(f"failures/{generation:06d}.parquet", [failures], _FAILURE_SCHEMA)
            storage.write_tables(f"documents/{generation:06d}.parquet", [documents], _DOCUMENT_SCHEMA)
            facts = {**asdict(report), "skipped": len(report.skipped), "finished": _now(), "seconds": self._elapsed()}
            storage.write_bytes(_run_file(generation), json.dumps(facts, indent=2).encode())
            self._clean(generation)
        return report

    def _run(
        self, stage: str, worker: Any, arguments: dict[str, Any], tasks: Sequence[Task], total: int
    ) -> Iterator[Task]:
        """Run the tasks of a stage and report its progress; `total` counts what the tasks that are done have, too."""
        done = total - sum(task["size"] for task in tasks)
        started, before = time.monotonic(), done
        self._report(stage, done, total)
        gpus = self._cluster.gpus if stage == "embedding" else 0
        for result in run_tasks(worker, arguments, tasks, self._cluster, gpus=gpus):
            done += result["done"]
            self._failures.update(result["failures"])
            if stage == "embedding":
                self._tokens += result["tokens"]
                self._worker_seconds += result["seconds"]
            left = (time.monotonic() - started) / max(1, done - before) * (total - done)
            self._report(stage, done, total, left=left)
            yield result

    def _outcomes(
        self, plan: pa.Table, previous: pa.Table, gone: Sequence[str]
    ) -> tuple[pa.Table, pa.Table, Counter[str]]:
        """Return the documents after the run, the failures inside archives, and counts of the documents' changes."""
        counts: Counter[str] = Counter()
        known = dict(zip(previous["address"].to_pylist(), range(len(previous)), strict=True))
        rows: list[dict[str, Any]] = []
        failures: list[dict[str, Any]] = []
        numbers = plan["number"].to_numpy()
        for number in np.unique(numbers):
            sources = plan.filter(pa.array(numbers == number)).to_pylist()
            name = part_name(self._generation, int(number), "read")
            for outcome in self._storage.read_table(name).to_pylist():
                source = sources[outcome["source"]]
                address = source["address"]
                if outcome["path"]:
                    failures.append({"address": address, "path": outcome["path"], "reason": outcome["reason"]})
                    continue
                place = known.get(address)
                row = {name: source[name] for name in ("address", "root", "path", "stamp", "size")}
                old = None if place is None else previous.slice(place, 1).to_pylist()[0]
                if old is not None and (outcome["digest"] == UNCHANGED or (outcome["reason"] and outcome["keep"])):
                    row = {**old, **row, "reason": outcome["reason"]}
                else:
                    chunks = part_name(self._generation, int(number), "chunks") if outcome["chunks"] else ""
                    row |= {name: outcome[name] for name in ("digest", "chunks", "reason", "source")}
                    row["file"] = chunks
                    if not outcome["reason"]:
                        counts["added" if old is None or old["reason"] else "changed"] += 1
                rows.append(row)
        gone_or_read = pa.array([*gone, *plan["address"].to_pylist()], pa.string())
        rest = previous.filter(pc.invert(pc.is_in(previous["address"], value_set=gone_or_read)))
        documents = pa.concat_tables([rest, pa.Table.from_pylist(rows, _DOCUMENT_SCHEMA)]).sort_by("address")
        # Failures inside the archives that were not read again stay.
        older = self._table("failures", _FAILURE_SCHEMA)
        older = older.filter(pc.invert(pc.is_in(older["address"], value_set=gone_or_read)))
        failed = pa.concat_tables([older, pa.Table.from_pylist(failures, _FAILURE_SCHEMA)])
        return documents.combine_chunks(), failed, counts

    def _parts(self) -> VectorParts | None:
        return VectorParts(self._storage) if self._storage.list("runs", ".json") else None

    def _documents(self) -> pa.Table:
        return self._table("documents", _DOCUMENT_SCHEMA)

    def _table(self, folder: str, schema: pa.Schema) -> pa.Table:
        """Return a table of the last complete generation."""
        runs = self._storage.list("runs", ".json")
        name = f"{folder}/{runs[-1].rpartition('/')[2][:6]}.parquet" if runs else ""
        return self._storage.read_table(name) if name and self._storage.exists(name) else schema.empty_table()

    def _clean(self, generation: int) -> None:
        """Delete what a complete generation no longer needs."""
        self._storage.delete(_plan_file(generation))
        for name in self._storage.list("read"):
            self._storage.delete(name)
        for folder in ("documents", "failures"):
            for name in self._storage.list(folder):
                if name != f"{folder}/{generation:06d}.parquet":
                    self._storage.delete(name)

    def _discard(self, generation: int) -> None:
        """Delete a generation that changes nothing."""
        for folder in ("chunks", "read"):
            for name in self._storage.list(folder):
                if name.startswith(f"{folder}/{generation:06d}-"):
                    self._storage.delete(name)
        self._storage.delete(_plan_file(generation))

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[step] += time.monotonic() - started

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._started, 3)

    def _report(
        self,
        stage: str,
        done: int,
        total: int,
        *,
        left: float | None = None,
        state: Literal["running", "complete"] = "running",
    ) -> None:
        """Show the progress now and then, and store it less often; a stage's first and last report always."""
        now = time.monotonic()
        is_edge = left is None or done == total
        if not is_edge and now - self._shown < _SHOW_SECONDS:
            return
        self._shown = now
        event = RunProgress(
            state,
            stage,
            done,
            total,
            actors=self._actors,
            tokens_per_second=round(self._tokens / self._worker_seconds, 1) if self._worker_seconds else 0.0,
            seconds_left=None if left is None else round(left, 1),
            failures=dict(self._failures),
            generation=self._generation,
            updated=_now(),
            host=socket.gethostname(),
            pid=os.getpid(),
            seconds=self._elapsed(),
        )
        self._show(event)
        if is_edge or now - self._saved >= _SAVE_SECONDS:
            self._saved = now
            self._storage.write_bytes("progress.json", json.dumps(asdict(event), indent=2).encode())


def _compare_sources(sources: Sources, previous: pa.Table) -> tuple[list[SourceFile], list[str]]:
    """Return the sources to read, and the addresses of documents that are gone."""
    places = dict(zip(previous["address"].to_pylist(), range(len(previous)), strict=True))
    sizes, stamps = previous["size"].to_pylist(), previous["stamp"].to_pylist()
    reasons = previous["reason"].to_pylist()
    planned, found = [], set()
    for source in sources.files:
        found.add(source.address)
        place = places.get(source.address)
        if place is not None and (sizes[place], stamps[place], reasons[place]) == (source.size, source.stamp, ""):
            continue
        planned.append(source)
    unreadable = tuple(sources.unreadable)
    gone = [
        address
        for address in places
        if address not in found and not any(address == each or address.startswith(f"{each}/") for each in unreadable)
    ]
    return planned, gone


def _plan_table(planned: Sequence[SourceFile], previous: pa.Table, actors: int) -> pa.Table:
    """Divide sources into tasks, archives alone."""
    digests = dict(zip(previous["address"].to_pylist(), previous["digest"].to_pylist(), strict=True))
    most = max(1, min(_TASK_SOURCES, -(-len(planned) // (actors * _TASKS_PER_ACTOR))))
    numbers: list[int] = []
    number, count, size = -1, 0, 0
    for source in planned:
        alone = is_archive(source.path)
        if number < 0 or alone or count >= most or size + source.size > _TASK_BYTES:
            number, count, size = number + 1, 0, 0
        # Nothing joins the task of an archive.
        count, size = (most, _TASK_BYTES) if alone else (count + 1, size + source.size)
        numbers.append(number)
    columns: dict[str, list[Any]] = {
        "number": numbers,
        "digest": [digests.get(source.address) or "" for source in planned],
    }
    for each in _PLAN_SCHEMA.names[1:]:
        if each != "digest":
            columns[each] = [getattr(source, each) for source in planned]
    return pa.table([pa.array(columns[each.name], each.type) for each in _PLAN_SCHEMA], schema=_PLAN_SCHEMA)


def _reading_tasks(plan: pa.Table, generation: int, storage: Storage) -> list[Task]:
    """Return the tasks of a plan that are not done."""
    done = set(storage.list("read"))
    numbers = plan["number"].to_numpy()
    edges = np.searchsorted(numbers, np.arange(numbers[-1] + 2)) if len(numbers) else np.zeros(1, int)
    tasks = []
    for number in range(len(edges) - 1):
        if part_name(generation, number, "read") in done:
            continue
        some = plan.slice(edges[number], edges[number + 1] - edges[number])
        digests = some["digest"].to_pylist()
        sources = some.drop_columns(["number", "digest"]).to_pylist()
        tasks.append(
            {"generation": generation, "number": number, "sources": sources, "digests": digests, "size": len(sources)}
        )
    return tasks


def _embedding_tasks(
    rows: Rows, stored: Rows, write: Any, source: Any, rows_per_part: int, generation: int
) -> list[Task]:
    """Divide the rows to write into parts."""
    tasks = []
    for number, start in enumerate(range(0, len(write), rows_per_part)):
        some, from_stored = write[start : start + rows_per_part], source[start : start + rows_per_part]
        files, file = np.unique(rows.file[some], return_inverse=True)
        is_copy = from_stored >= 0
        part = np.full(len(some), -1, np.int32)
        part_row = np.full(len(some), -1, np.int32)
        part_files, part[is_copy] = np.unique(stored.file[from_stored[is_copy]], return_inverse=True)
        part_row[is_copy] = stored.row[from_stored[is_copy]]
        tasks.append(
            {
                "generation": generation,
                "number": number,
                "size": len(some),
                "files": [rows.files[place] for place in files],
                "file": file.astype(np.int32),
                "row": rows.row[some],
                "tokens": rows.tokens[some],
                "parts": [stored.files[place] for place in part_files],
                "part": part,
                "part_row": part_row,
            }
        )
    return tasks


def _live_sources(documents: pa.Table) -> dict[str, Any]:
    """Return the numbers of the current sources of each file of `chunks/`."""
    with_chunks = documents.filter(pc.not_equal(documents["file"], "")).select(["file", "source"]).sort_by("file")
    files = with_chunks["file"].to_numpy()
    sources = with_chunks["source"].to_numpy().astype(np.int32)
    names, starts = np.unique(files.astype(str), return_index=True)
    return dict(zip(names.tolist(), np.split(sources, starts[1:]), strict=True)) if len(names) else {}


def _failed(documents: pa.Table) -> list[dict[str, Any]]:
    return list(documents.filter(pc.not_equal(documents["reason"], "")).select(["address", "reason"]).to_pylist())


def _failure(row: dict[str, Any]) -> SkippedFile:
    return SkippedFile(f"{row['address']}!{row['path']}", str(row["reason"]))


def _joined(first: PipelineReport, second: PipelineReport) -> PipelineReport:
    """Return the report of a generation that was completed and of the one after it."""
    names = ("added", "changed", "deleted", "embedded", "copied", "rows_deleted")
    return replace(second, **{name: getattr(first, name) + getattr(second, name) for name in names})


def _portable(source: str) -> str:
    """Return a model's source so that it holds in any working directory."""
    return str(Path(source).resolve()) if source and "://" not in source and Path(source).exists() else source


def _plan_file(generation: int) -> str:
    return f"plan/{generation:06d}.parquet"


def _run_file(generation: int) -> str:
    return f"runs/{generation:06d}.json"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _lock(storage: Storage) -> Iterator[None]:
    """Keep other runs away from the folder: by a lock on a local one, by the other run's reports elsewhere."""
    if not storage.is_local:
        if storage.exists("progress.json") and read_progress(storage).state == "running":
            raise IndexLockedError(
                f"Another run writes to {storage.address}, or was killed less than a minute ago. Wait a minute."
            )
        yield
        return
    from filelock import FileLock, Timeout

    Path(storage.address).mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{storage.address}/.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise IndexLockedError(f"Another run writes to {storage.address}. Wait for it to end.") from error
    try:
        yield
    finally:
        lock.release()
