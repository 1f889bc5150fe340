"""A fork server that runs an index's commands in processes that start in milliseconds, for tests that kill many.

As a script it imports everything once and forks for each command: a command is a line of JSON on its input, the child's
process id a line on its output; the child writes its result to a file. No model is loaded: `HashEncoder` makes a vector
from a text's hash, the same in every process and every batch.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

# Small, so that a run of a few hundred chunks has as many steps as a large one.
BATCH_CHUNKS = 16
DIMENSION = 48


class HashEncoder:
    """The part of an encoder that the indexer needs; a text's vector depends on the text only.

    Args:
        pause: Seconds that a call of `encode_document` takes, as a model takes most of a run's time.
    """

    name = "hash"
    source = "hash"
    fingerprint = "0123456789ab"
    dimension = DIMENSION
    truncate_dim = None
    max_document_tokens = 128
    folder = None
    config = SimpleNamespace(languages=())

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def encode_document(self, texts: Sequence[str]) -> np.ndarray:
        time.sleep(self.pause)
        return np.stack([self._vector(text) for text in texts])

    def encode_query(self, texts: str | Sequence[str], *_: Any, **__: Any) -> np.ndarray:
        return self._vector(texts) if isinstance(texts, str) else np.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        vector = np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)
        return (vector / np.linalg.norm(vector)).astype(np.float32)


# -- commands, run in a forked process --------------------------------------------------------------------------------


def index(
    folder: Path, *, rebuild: bool = False, pause: float = 0.0, wait: float | None = 0.0, chroma: str | None = None
) -> dict[str, Any]:
    import dataclasses

    from epic_rag_chroma import ChromaIndexer, IndexSettings

    indexer = ChromaIndexer(folder / ".epic-rag", encoder=HashEncoder(pause), chroma=chroma, batch_chunks=BATCH_CHUNKS)
    with indexer:
        settings = IndexSettings(chunk_tokens=30, chunk_overlap=0)
        return dataclasses.asdict(indexer.index([folder], settings=settings, rebuild=rebuild, wait=wait))


def search(folder: Path, texts: list[str], modes: Sequence[str] = ("dense", "keyword")) -> dict[str, Any]:
    """Return (path, text) of the best hits for each mode and text."""
    from epic_rag_chroma import ChromaIndexer

    with ChromaIndexer(folder / ".epic-rag", encoder=HashEncoder()) as indexer:
        found = {}
        for mode in modes:
            hits = indexer.query_many(texts, k=4, mode=mode, collapse=False)
            found[mode] = [[(hit.path, hit.text) for hit in each] for each in hits]
        return found


def index_repeatedly(folder: Path, *, until: float, pause: float, rebuild_every: int) -> dict[str, int]:
    """Index again and again with one indexer; rebuild the index every so many runs."""
    from epic_rag_chroma import ChromaIndexer
    from epic_rag_chroma.errors import IndexLockedError

    runs = turned_away = 0
    with ChromaIndexer(folder / ".epic-rag", encoder=HashEncoder(pause), batch_chunks=BATCH_CHUNKS) as indexer:
        while time.time() < until:
            try:
                indexer.index([folder], rebuild=runs % rebuild_every == rebuild_every - 1)
                runs += 1
            except IndexLockedError:
                turned_away += 1
                time.sleep(0.05)
    return {"runs": runs, "turned_away": turned_away}


def search_repeatedly(folder: Path, *, until: float, kept: dict[str, str], seed: int) -> dict[str, Any]:
    """Search again and again, with a new indexer every 20 queries, as a new process would."""
    import random

    from epic_rag_chroma import ChromaIndexer

    chance = random.Random(seed)
    seen: set[tuple[str, str]] = set()
    missing: list[str] = []
    queries = 0
    slowest = 0.0
    while time.time() < until:
        with ChromaIndexer(folder / ".epic-rag", encoder=HashEncoder()) as indexer:
            for _ in range(20):
                mode = chance.choice(["dense", "hybrid", "keyword"])
                path, text = chance.choice(sorted(kept.items()))
                started = time.monotonic()
                hits = indexer.query(text, k=5, mode=mode, collapse=False)
                slowest = max(slowest, time.monotonic() - started)
                queries += 1
                seen.update((hit.path, hit.text) for hit in hits)
                if (path, text) not in {(hit.path, hit.text) for hit in hits}:
                    missing.append(f"{mode}: {path}")
                time.sleep(0.01)
    return {"queries": queries, "slowest": slowest, "missing": missing, "seen": sorted(seen)}


COMMANDS: dict[str, Callable[..., Any]] = {
    command.__name__: command for command in (index, search, index_repeatedly, search_repeatedly)
}


def run_command(command: dict[str, Any]) -> None:
    """Run a command under its limits, and write its result as a line of JSON."""
    limits = command["limits"]
    for name, value in limits.items():
        # The limit on address space counts from what the process has already.
        least = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = value + (least if name == "RLIMIT_AS" else 0)
        resource.setrlimit(getattr(resource, name), (limit, resource.RLIM_INFINITY))
    answer: dict[str, Any]
    try:
        answer = {"result": COMMANDS[command["name"]](Path(command["folder"]), **command["options"])}
    except BaseException as error:
        from epic_rag.errors import EpicError

        answer = {"error": type(error).__name__, "message": str(error), "expected": isinstance(error, EpicError)}
        answer["trace"] = traceback.format_exc()
    for name in limits:
        resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    write_line(json.dumps(answer))


def write_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def serve() -> None:
    """Fork for each line of the input."""
    # Everything is imported before the forks. No client is made, hence no thread, which a fork would lose.
    for name in (
        "chromadb.api.rust",
        "chromadb.telemetry.product.posthog",
        "epic_rag_chroma.indexer",
        "epic_rag_chroma.indexing.run",
        "epic_rag_chroma.reading.text",
        "epic_rag_chroma.search.searcher",
        "epic_rag_chroma.store.collection",
        "numpy.random",
    ):
        importlib.import_module(name)
    from epic_rag_chroma.store import collection

    collection._HNSW.update(batch_size=10, sync_threshold=20)  # Chroma writes its graph often
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    write_line("ready")
    for line in sys.stdin:
        command = json.loads(line)
        process = os.fork()
        if process == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setpgid(0, 0)
            with open(command["answer"], "w") as file, open(command["answer"] + ".err", "w") as errors:
                os.dup2(file.fileno(), 1)
                os.dup2(errors.fileno(), 2)
            run_command(command)
            os._exit(0)
        write_line(str(process))


# -- the test's side --------------------------------------------------------------------------------------------------


class Job:
    """A command that runs in a forked process."""

    def __init__(self, pid: int, answer: Path) -> None:
        self.pid = pid
        self._answer = answer

    def is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def send(self, number: int) -> None:
        """Send a signal, if the process is alive."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120.0) -> dict[str, Any] | None:
        """Wait for the end and return the answer, None if the process died first."""
        until = time.monotonic() + seconds
        while self.is_alive():
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"process {self.pid} does not end")
            time.sleep(0.002)
        text = self._answer.read_text()
        return json.loads(text) if text.endswith("\n") else None

    def result(self, seconds: float = 120.0) -> Any:
        """Wait for the end and return the command's result."""
        answer = self.wait(seconds)
        assert answer is not None, Path(f"{self._answer}.err").read_text()
        assert "result" in answer, answer.get("trace")
        return answer["result"]


class ForkServer:
    """The process that forks.

    Args:
        folder: An existing folder for the answers of commands.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def start(self, name: str, folder: Path, *, limits: dict[str, int] | None = None, **options: Any) -> Job:
        """Start a command on a folder, with resource limits by name."""
        self._number += 1
        answer = self._folder / f"answer{self._number}"
        answer.write_text("")
        command = {"name": name, "folder": str(folder), "answer": str(answer)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**command, "options": options, "limits": limits or {}}) + "\n")
        self._process.stdin.flush()
        return Job(int(self._process.stdout.readline()), answer)

    def run(self, name: str, folder: Path, **options: Any) -> Any:
        """Run a command to its end and return its result."""
        return self.start(name, folder, **options).result()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


if __name__ == "__main__":
    serve()
