"""Tasks run by Ray Data on the actors of a cluster, or one after another in this process without Ray.

A `Worker` is made once an actor and called with a task, a dictionary of plain values; it returns another. Ray runs a
task again if its actor dies, so a worker that writes must be idempotent. Tasks and results are small: the rows
themselves go from file to file and never through Ray's object store.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from epic_rag.errors import ConfigError, EpicError, MissingExtraError, reason_of

__all__ = ["Cluster", "Task", "Worker", "run_tasks"]

Task = dict[str, Any]
# A node that does not start within half a minute is given up by Ray; on a busy machine the next one may.
_STARTS = 3
# Tasks and results alone are in the object store of a local cluster.
_STORE_BYTES = 512 * 2**20


class Worker(Protocol):
    """Runs tasks."""

    def __call__(self, task: Task) -> Task:
        """Run a task and return its result."""

    def close(self) -> None:
        """Release what the worker holds."""


@dataclass(frozen=True)
class Cluster:
    """A place to run tasks: a Ray cluster, or this process.

    Args:
        address: A Ray cluster ("auto", "ray://host:10001", "host:6379"), "local" for a cluster that is started on this
            machine for the run, or None for this process, without Ray. A process that is connected to a cluster
            already uses that one.
        actors: Number of models at work; None for one a GPU, or one a CPU of the cluster.
        cpus: CPUs of an actor, which uses as many threads.
        gpus: GPUs of an actor.

    Raises:
        ConfigError: If a number cannot work.
    """

    address: str | None = None
    actors: int | None = None
    cpus: int = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if self.actors is not None and self.actors < 1:
            raise ConfigError(f"actors is {self.actors}. Use 1 or more.")
        if self.cpus < 1 or self.gpus < 0:
            raise ConfigError(f"An actor has {self.cpus} CPUs and {self.gpus} GPUs. Use at least one CPU.")

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Connect to the cluster for the block; a local one ends with it.

        Raises:
            MissingExtraError: If Ray is not installed.
            EpicError: If the cluster cannot be reached.
        """
        if self.address is None:
            yield
            return
        # Read when Ray is imported: nothing is reported to its makers.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self.address == "local":  # its processes print to the terminal
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise MissingExtraError("ray", "ray", "--ray") from error
        if ray.is_initialized():
            yield
            return
        options: dict[str, Any] = {"address": self.address}
        if self.address == "local":
            wanted = None if self.actors is None else max(self.actors * self.cpus, _cpus())
            options |= {"include_dashboard": False, "num_cpus": wanted, "object_store_memory": _STORE_BYTES}
        attempts = _STARTS if self.address == "local" else 1
        for attempt in range(1, attempts + 1):
            try:
                with _silent_stderr():
                    ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
                break
            except Exception as error:  # Ray raises its own and plain ones
                ray.shutdown()
                if attempt == attempts:
                    raise EpicError(
                        f"The Ray cluster {self.address} cannot be reached ({reason_of(error)}). Check the address and "
                        "that it runs, or use --ray local."
                    ) from error
        for handler in logging.getLogger("ray.data").handlers:
            if type(handler).__name__ == "PlainRayHandler":  # that of the terminal; the others write to files
                handler.setLevel(logging.ERROR)
        try:
            yield
        finally:
            ray.shutdown()

    def size(self) -> int:
        """Return the number of actors; call it within `connected`."""
        if self.address is None:
            return 1
        if self.actors is not None:
            return self.actors
        import ray

        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        if self.gpus:
            return max(1, int(resources.get("GPU", 0) / self.gpus))
        return max(1, int(resources.get("CPU", 1)) // self.cpus)


def run_tasks(
    worker: Callable[..., Worker],
    arguments: dict[str, Any],
    tasks: Sequence[Task],
    cluster: Cluster,
    *,
    gpus: float = 0,
) -> Iterator[Task]:
    """Run tasks and yield their results as they are ready, in any order.

    Args:
        worker: A class of workers; called once an actor.
        arguments: Its keyword arguments.
        tasks: The tasks.
        cluster: Where to run; must be connected.
        gpus: GPUs of an actor.

    Raises:
        EpicError: As a worker raises it; or if a worker raises something else, with its message.
    """
    if not tasks:
        return
    if cluster.address is None:
        with closing(worker(**arguments)) as run:
            yield from map(run, tasks)
        return
    import ray.data

    # Each table is a block, and each block a task of its own.
    tables = [pa.table({"task": pa.array([pickle.dumps(task)], pa.binary())}) for task in tasks]
    try:
        with warnings.catch_warnings():
            # Ray reads its own deprecated settings.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.raise_original_map_exception = True
            dataset = ray.data.from_arrow(tables).map_batches(
                _Actor,
                fn_constructor_kwargs={"worker": worker, "arguments": arguments},
                # A task waits for whichever actor is idle first: tasks take seconds, and handing one over does not.
                compute=ray.data.ActorPoolStrategy(
                    size=min(cluster.size(), len(tasks)), max_tasks_in_flight_per_actor=1
                ),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=cluster.cpus,
                num_gpus=gpus or None,
                udf_modifying_row_count=False,
            )
            for row in dataset.iter_rows():
                yield pickle.loads(row["result"])
    except Exception as error:
        origin = _origin(error)
        if isinstance(origin, EpicError):
            raise origin from error
        raise EpicError(
            f"The run on Ray failed: {type(origin).__name__}: {reason_of(origin)}. What was stored stays; run the same "
            "command again to go on."
        ) from error


def _origin(error: BaseException) -> BaseException:
    """Return the error of the project inside those that Ray wraps around it, or else the innermost one."""
    from ray.exceptions import RayError

    # Ray's errors are instances of the class of their cause, too.
    while isinstance(error, RayError) or not isinstance(error, EpicError):
        inner = getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException) or inner is error:
            break
        error = inner
    return error


class _Actor:
    """A worker behind Ray's interface of tables."""

    def __init__(self, worker: Callable[..., Worker], arguments: dict[str, Any]) -> None:
        self._run = worker(**arguments)

    def __call__(self, table: pa.Table) -> pa.Table:
        results = [pickle.dumps(self._run(pickle.loads(task))) for task in table["task"].to_pylist()]
        return pa.table({"result": pa.array(results, pa.binary())})


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what native code writes to file descriptor 2 during the block."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _cpus() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
