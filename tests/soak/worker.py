"""Runs an index's commands in processes that cost next to nothing to start, for tests that kill many.

As a script it imports everything once and forks for each command; a command is a line of JSON on its input, and the
answer, the child's process id, a line on its output. What the child found is in a file of its own.

The encoder makes a vector of a text's hash: no model, the same vector in every process and every batch.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

# Small batches, so that a run of a few hundred chunks has as many steps as a large one.
BATCH_CHUNKS = 16
DIMENSION = 48


class HashEncoder:
    """What the indexer needs of an encoder; a text's vector depends on the text alone."""

    name = "hash"
    source = "hash"
    fingerprint = "0123456789ab"
    dimension = DIMENSION
    truncate_dim = None
    max_document_tokens = 128

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.texts = 0

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def encode_document(self, texts: Sequence[str]) -> np.ndarray:
        time.sleep(self.pause)  # a model takes most of a run's time
        self.texts += len(texts)
        return np.stack([self._vector(text) for text in texts])

    def encode_query(self, texts: str | Sequence[str], **_: Any) -> np.ndarray:
        if isinstance(texts, str):
            return self._vector(texts)
        return np.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        vector = np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)
        return (vector / np.linalg.norm(vector)).astype(np.float32)


def prepare() -> None:
    """Let Chroma write its graph often."""
    from epic_rag_chroma.store import collection as store

    store._HNSW.update(batch_size=10, sync_threshold=20)  # how often Chroma writes its graph


def do_index(folder: Path, *, rebuild: bool = False, pause: float = 0.0, wait: float | None = 0.0) -> dict[str, Any]:
    import dataclasses

    from epic_rag_chroma import ChromaIndexer, IndexSettings

    with ChromaIndexer(folder / ".epic-rag", encoder=HashEncoder(pause), batch_chunks=BATCH_CHUNKS) as indexer:
        settings = IndexSettings(chunk_tokens=30, chunk_overlap=0)
        return dataclasses.asdict(indexer.index([folder], settings=settings, rebuild=rebuild, wait=wait))


def do_find(folder: Path, texts: list[str], modes: Sequence[str] = ("dense", "keyword")) -> dict[str, Any]:
    """For each mode and text, (path, text) of the best hits."""
    from epic_rag_chroma import ChromaIndexer

    with ChromaIndexer(folder / ".epic-rag", encoder=HashEncoder(), batch_chunks=BATCH_CHUNKS) as indexer:
        found = {}
        for mode in modes:
            hits = indexer.query_many(texts, k=4, mode=mode, collapse=False)
            found[mode] = [[(hit.path, hit.text) for hit in each] for each in hits]
        return found


def do_keep_indexing(folder: Path, *, until: float, pause: float, rebuild_every: int) -> dict[str, int]:
    """Index again and again, in one process; every so often, make the index anew."""
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


def do_keep_asking(folder: Path, *, until: float, kept: dict[str, str], seed: int) -> dict[str, Any]:
    """Ask again and again, in one process, now and then with a new indexer, as a new process would."""
    import random

    from epic_rag_chroma import ChromaIndexer

    chance = random.Random(seed)
    seen: set[tuple[str, str]] = set()
    missing: list[str] = []
    queries = 0
    slowest = 0.0
    while time.time() < until:
        with ChromaIndexer(folder / ".epic-rag", encoder=HashEncoder(), batch_chunks=BATCH_CHUNKS) as indexer:
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


COMMANDS = {"index": do_index, "find": do_find, "keep_indexing": do_keep_indexing, "keep_asking": do_keep_asking}


def _child(command: dict[str, Any]) -> None:
    limits = command.get("limits", {})
    for name, value in limits.items():
        # Address space is counted from what the process has already.
        least = _address_space() if name == "RLIMIT_AS" else 0
        resource.setrlimit(getattr(resource, name), (least + value, resource.RLIM_INFINITY))
    answer: dict[str, Any]
    try:
        answer = {"result": COMMANDS[command["do"]](Path(command["folder"]), **command.get("options", {}))}
    except BaseException as error:
        from epic_rag.errors import EpicError

        answer = {"error": type(error).__name__, "message": str(error), "expected": isinstance(error, EpicError)}
        answer["trace"] = traceback.format_exc()
    for name in limits:
        resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    _say(json.dumps(answer))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def serve() -> None:
    """Fork for each line of the input."""
    # Everything is imported before the forks; no client, hence no thread, is made.
    for name in (
        "chromadb.api.rust",
        "epic_rag_chroma.indexing.run",
        "epic_rag_chroma.search.searcher",
        "epic_rag_chroma.store.collection",
    ):
        importlib.import_module(name)
    prepare()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _say("ready")
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
            _child(command)
            os._exit(0)
        _say(str(process))


class Job:
    """A command that goes on in a process of its own."""

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
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120.0) -> dict[str, Any] | None:
        """What it answered; None if it died first."""
        until = time.monotonic() + seconds
        while self.is_alive():
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"process {self.pid} does not end")
            time.sleep(0.002)
        text = self._answer.read_text()
        return json.loads(text) if text.endswith("\n") else None

    def errors(self) -> str:
        return Path(f"{self._answer}.err").read_text()


class Pool:
    """The process that forks."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._number = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def start(self, do: str, folder: Path, *, limits: dict[str, int] | None = None, **options: Any) -> Job:
        self._number += 1
        answer = self._place / f"answer{self._number}"
        command = {"do": do, "folder": str(folder), "answer": str(answer), "options": options, "limits": limits or {}}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer.write_text("")
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return Job(int(self._process.stdout.readline()), answer)

    def run(self, do: str, folder: Path, **options: Any) -> Any:
        job = self.start(do, folder, **options)
        answer = job.wait()
        assert answer is not None, f"{do} died: {job.errors()}"
        assert "result" in answer, answer.get("trace")
        return answer["result"]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@contextmanager
def pool(place: Path) -> Iterator[Pool]:
    made = Pool(place)
    try:
        yield made
    finally:
        made.close()


if __name__ == "__main__":
    serve()
