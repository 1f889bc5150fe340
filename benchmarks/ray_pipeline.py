"""Measure the pipeline of docs/ray.md on a local Ray of two CPUs: scaling, kills, memory, changes, broken files.

    python benchmarks/ray_pipeline.py --texts docs_sections.jsonl.gz

Each part stands alone (`--only scaling,kills,chroma,million,changes,broken`); `--quick` runs all on tiny counts. The
result is a table on standard output, and JSON in the file of `--json`. Parts that need no quality of vectors use a free
encoder, so that what is measured is the pipeline.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from epic_rag import EpicEncoder
from epic_rag.embedding_model import EmbeddingModel, Fact, Role, Vectors
from epic_rag.errors import EpicError
from epic_rag_ray import Cluster, PipelineReport, PipelineSettings, VectorParts, embedding_vectors, run_pipeline

ACTORS = 2
DIMENSION = 384
Facts = dict[str, Any]


class FreeModel(EmbeddingModel):
    """A row of a random matrix for each text, chosen by its hash; a call may be logged and take its time."""

    kind = "free"
    name = "free"
    dimension = DIMENSION
    max_query_tokens = 256
    max_document_tokens = 256

    def __init__(self, log: str, seconds: float) -> None:
        self._log, self._seconds = log, seconds
        self._vectors = np.random.default_rng(0).standard_normal((4096, DIMENSION), np.float32)
        self._vectors /= np.linalg.norm(self._vectors, axis=1, keepdims=True)

    def embed(
        self,
        texts: Sequence[str],
        role: Role,
        *,
        instruction: str | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Vectors:
        if self._log:
            with open(self._log, "a") as log:
                log.write(f"{os.getpid()} {len(texts)}\n")
        if self._seconds:
            time.sleep(self._seconds)
        return self._vectors[[zlib.crc32(text.encode()) % 4096 for text in texts]]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [text.count(" ") + 1 for text in texts]

    def identity(self) -> dict[str, Any]:
        return {"kind": "free"}

    def describe(self) -> list[Fact]:
        return []


def free_encoder(log: str = "", seconds: float = 0.0) -> EpicEncoder:
    return EpicEncoder(FreeModel(log, seconds), None, name="free", source="free")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def write_documents(file: Path, documents: Iterator[tuple[str, str]]) -> Path:
    """Write (id, text) as an archive of JSON lines."""
    with gzip.open(file, "wt", compresslevel=1, encoding="utf-8") as lines:
        for name, text in documents:
            lines.write(json.dumps({"id": name, "text": text}) + "\n")
    return file


def passages(texts: Path | None, count: int) -> list[str]:
    """Return real passages of a file of pairs, or generated ones."""
    if texts is None:
        return [words(number, 40 + number % 60) for number in range(count)]
    found: dict[str, None] = {}
    with gzip.open(texts, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            found.setdefault(row.get("positive") or row.get("text") or "")
            if len(found) >= count:
                break
    return list(found)


VOCABULARY = (
    "the of and to in is for that on with as are this by from file user system can be not has data index query "
    "server option value name path list string number type class method object return error message time memory "
    "process thread network request response client table column row key field document text word vector model "
    "search"
)


def words(seed: int, count: int) -> str:
    """Return a text of common words that no other seed has."""
    chosen = random.Random(seed).choices(VOCABULARY.split(), k=count)
    return f"{' '.join(chosen)} entry{seed}"


def same(one: Path, other: Path) -> bool:
    """Return whether two folders have the same ids, texts and vectors, bit for bit."""

    def rows(folder: Path) -> dict[str, tuple[str, bytes]]:
        found = {}
        for table in VectorParts(folder).tables(["id", "text", "embedding"]):
            vectors = embedding_vectors(table)
            for id_, text, vector in zip(table["id"].to_pylist(), table["text"].to_pylist(), vectors, strict=True):
                assert id_ not in found, "an id occurs twice"
                found[id_] = (text, vector.tobytes())
        return found

    return rows(one) == rows(other)


# 1. Scaling.


def scaling(options: argparse.Namespace, work: Path) -> tuple[Facts, list[list[str]]]:
    texts = passages(options.texts, options.passages)
    docs = work / "scaling"
    docs.mkdir()
    write_documents(docs / "passages.jsonl.gz", ((str(number), text) for number, text in enumerate(texts)))
    rows = options.part_rows or max(1, -(-len(texts) // 24))
    settings = PipelineSettings(model=options.model, duplicates="keep", rows=rows, dtype=options.dtype)
    reports: dict[str, PipelineReport] = {}
    for name, cluster in (
        ("plain loop", None),
        ("1 actor", Cluster("local", actors=1)),
        (f"{ACTORS} actors", Cluster("local", actors=ACTORS)),
    ):
        say(f"scaling: {name}, {len(texts):,} passages")
        arguments = {"settings": settings, "cluster": cluster}
        reports[name] = driver(work, [str(docs)], work / f"scaling-{name.replace(' ', '-')}", arguments)
    seconds = {name: report.seconds["embedding"] for name, report in reports.items()}
    plain, one, two = seconds.values()
    facts = {
        "passages": len(texts),
        "rows": reports["plain loop"].rows,
        "seconds": seconds,
        "rows_per_second": {name: round(reports[name].rows / value, 1) for name, value in seconds.items()},
        "speedup": round(one / two, 3),
        "overhead": round(one / plain - 1, 3),
        "equal": all(
            same(work / "scaling-plain-loop", work / f"scaling-{name}") for name in ("1-actor", f"{ACTORS}-actors")
        ),
    }
    return facts, [
        ["2 actors against one, times", f"{one / two:.2f}", "at least 1.8", verdict(one / two >= 1.8)],
        [
            "1 actor against the plain loop, time",
            f"{one / plain - 1:+.1%}",
            "at most +10%",
            verdict(one / plain <= 1.1),
        ],
        ["the vectors of all three are the same", str(facts["equal"]), "True", verdict(facts["equal"])],
    ]


# 2. Kills.


def kills(options: argparse.Namespace, work: Path) -> tuple[Facts, list[list[str]]]:
    count = options.kill_documents
    docs = work / "kills"
    docs.mkdir()
    for part in range(4):
        some = range(part * count // 4, (part + 1) * count // 4)
        write_documents(docs / f"{part}.jsonl.gz", ((str(n), words(n, 30)) for n in some))
    rows = 64
    say("kills: an undisturbed run")
    whole = work / "kills-whole"
    run_pipeline([docs], whole, PipelineSettings(model=free_encoder, rows=rows))
    chance = random.Random(7)
    done = {"worker": 0, "driver": 0}
    twice: list[tuple[str, int]] = []
    equal, run, lost_rows = True, 0, 0
    planned = [("worker", "driver")[number % 2] for number in range(options.kills)]
    while planned:
        out, log = work / f"kills-{run}", work / f"kills-{run}.log"
        run += 1
        model = partial(free_encoder, str(log), options.kill_seconds)
        arguments = {
            "settings": PipelineSettings(model=model, rows=rows),
            "cluster": Cluster("local", actors=ACTORS),
        }
        process = start_driver(work, [str(docs)], out, arguments)
        killed: list[str] = []
        while process.poll() is None:
            # At a random moment of what is left: also while files are read, or a cluster starts.
            deadline = time.monotonic() + chance.uniform(0, options.kill_within)
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            if process.poll() is not None:
                break
            if not planned:
                process.wait()
                break
            if planned[0] == "driver":
                stop_tree(process)
                killed.append(planned.pop(0))
                process = start_driver(work, [str(docs)], out, arguments)
            elif actors := actors_of(process.pid):
                with suppress(psutil.NoSuchProcess):
                    chance.choice(actors).kill()
                    killed.append(planned.pop(0))
            else:
                continue
            say(f"kills: {len(killed)} in this run, {len(planned)} left")
        if process.returncode != 0:
            raise RuntimeError((work / "driver.err").read_text()[-3000:])
        for kind in killed:
            done[kind] += 1
        embedded = sum(int(line.split()[1]) for line in log.read_text().splitlines())
        total = VectorParts(out).count()
        again = embedded - total
        allowed = rows * sum(ACTORS if kind == "driver" else 1 for kind in killed)
        twice.append((f"{again} rows with {len(killed)} kills", again - allowed))
        equal = equal and same(whole, out)
        lost_rows += count - total
        shutil.rmtree(out)
    facts = {
        "kills": done,
        "runs": run,
        "embedded_twice": [text for text, _ in twice],
        "batch_rows": rows,
        "within_a_batch_for_each_killed_actor": all(over <= 0 for _, over in twice),
        "lost_rows": lost_rows,
        "equal": equal,
    }
    return facts, [
        [
            f"ids, texts, vectors after {sum(done.values())} kills ({done['worker']} actors, {done['driver']} drivers)",
            "equal" if equal else "differ",
            "equal",
            verdict(equal),
        ],
        [
            "rows embedded twice, at most a batch for each killed actor",
            "; ".join(text for text, _ in twice),
            f"batch of {rows}",
            verdict(facts["within_a_batch_for_each_killed_actor"]),
        ],
    ]


def chroma(options: argparse.Namespace, work: Path) -> tuple[Facts, list[list[str]]]:
    """Kill a Chroma server while collections are filled from Parquet."""
    from epic_rag_ray import fill_chroma

    docs = work / "docs"
    docs.mkdir()
    write_documents(docs / "0.jsonl.gz", ((str(n), words(n, 30)) for n in range(options.kill_documents)))
    parts = work / "parts"
    run_pipeline([docs], parts, PipelineSettings(model=free_encoder, rows=512))
    expected = {
        id_: (text, vector)
        for table in VectorParts(parts).tables(["id", "text", "embedding"])
        for id_, text, vector in zip(
            table["id"].to_pylist(), table["text"].to_pylist(), embedding_vectors(table), strict=True
        )
    }
    chance = random.Random(11)
    kills, right, failed = 0, True, 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    for number in range(options.chroma_kills):
        server = start_chroma(work / "chroma", port)
        errors: list[str] = []
        ended = threading.Event()

        def fill(name: str, errors: list[str] = errors, ended: threading.Event = ended) -> None:
            while not ended.is_set():
                try:
                    fill_chroma(parts, url, name, shards=2)
                    ended.set()
                except EpicError as error:
                    errors.append(str(error))

        thread = threading.Thread(target=fill, args=(f"docs{number}",))
        thread.start()
        if not ended.wait(chance.uniform(0, options.chroma_within)):
            server.kill()
            server.wait()
            kills += 1
            server = start_chroma(work / "chroma", port)
        thread.join()
        failed += len(errors)
        found = chroma_rows(url, f"docs{number}")
        right = right and found.keys() == expected.keys()
        right = right and all(
            text == expected[id_][0] and np.allclose(vector, expected[id_][1], atol=1e-6)
            for id_, (text, vector) in found.items()
        )
        server.kill()
        server.wait()
        say(f"chroma: {kills} kills, {len(found):,} rows, {'right' if right else 'WRONG'}")
    facts = {"kills": kills, "fills": options.chroma_kills, "rows": len(expected), "right": right, "errors": failed}
    return facts, [
        [
            f"ids, texts, vectors in Chroma after {kills} kills of the server",
            "equal" if right else "differ",
            "equal",
            verdict(right),
        ]
    ]


def start_chroma(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start `chroma run` and wait for its first answer."""
    command = [str(Path(sys.executable).with_name("chroma")), "run", "--path", str(folder), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v2/heartbeat", timeout=5):
            return server
        time.sleep(0.05)
    raise RuntimeError("the Chroma server does not answer")


def chroma_rows(url: str, name: str) -> dict[str, tuple[str, Any]]:
    """Return the rows of the collections whose names begin with one."""
    import chromadb

    client = chromadb.HttpClient(host="127.0.0.1", port=int(url.rpartition(":")[2]))
    found: dict[str, tuple[str, Any]] = {}
    for listed in client.list_collections():
        if not listed.name.startswith(f"{name}."):  # its shards
            continue
        collection = client.get_collection(listed.name)
        for start in range(0, collection.count(), 1000):
            page = collection.get(limit=1000, offset=start, include=["documents", "embeddings"])
            rows = zip(page["ids"], page["documents"] or (), page["embeddings"], strict=True)
            found.update({id_: (text, vector) for id_, text, vector in rows})
    return found


# 3. A million rows.


def million(options: argparse.Namespace, work: Path) -> tuple[Facts, list[list[str]]]:
    docs = work / "million"
    docs.mkdir()
    say(f"million: {options.rows:,} documents")
    files = max(2, min(20, options.rows // 1000))
    for part in range(files):
        some = range(part * options.rows // files, (part + 1) * options.rows // files)
        write_documents(docs / f"{part:02d}.jsonl.gz", ((str(n), words(n, 25)) for n in some))
    say("million: the run")
    out = work / "million-out"
    arguments = {
        "settings": PipelineSettings(model=free_encoder, vectors="float16", rows=2048),
        "cluster": Cluster("local", actors=ACTORS),
    }
    with peaks() as memory:
        report = driver(work, [str(docs)], out, arguments, watch=memory)
    size = sum(file.stat().st_size for file in out.rglob("*.parquet"))
    facts = {
        "rows": report.rows,
        "seconds": report.seconds,
        "driver_gb": round(memory["driver"] / 1e9, 3),
        "actor_gb": round(memory["actor"] / 1e9, 3),
        "parquet_gb": round(size / 1e9, 3),
        "duplicates": [report.exact_duplicates, report.near_duplicates],
    }
    total, driver_gb, actor_gb = report.seconds["total"], facts["driver_gb"], facts["actor_gb"]
    table = [[f"{name}", f"{value:.0f} s", f"{value / total:.0%}", ""] for name, value in report.seconds.items()]
    return facts, [
        [f"{report.rows:,} rows, memory of the driver", f"{driver_gb} GB", "under 1 GB", verdict(driver_gb < 1)],
        [f"{report.rows:,} rows, memory of an actor", f"{actor_gb} GB", "under 1.5 GB", verdict(actor_gb < 1.5)],
        *table,
    ]


# 4. Changes.


def changes(options: argparse.Namespace, work: Path) -> tuple[Facts, list[list[str]]]:
    docs, count = work / "changes", options.documents
    say(f"changes: {count:,} files")
    for number in range(count):
        folder = docs / f"{number // 1000:03d}"
        if number % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{number}.txt").write_text(words(number, 20))
    out, log = work / "changes-out", work / "changes.log"
    settings = PipelineSettings(model=partial(free_encoder, str(log)), vectors="float16", rows=2048)
    arguments = {"settings": settings, "cluster": Cluster("local", actors=ACTORS)}
    say("changes: the first run")
    first = driver(work, [str(docs)], out, arguments)
    log.unlink()
    before = {file: (file.stat().st_mtime_ns, zlib.crc32(file.read_bytes())) for file in (out / "parts").iterdir()}
    changed = random.Random(3).sample(range(count), count // 20)
    for number in changed:
        (docs / f"{number // 1000:03d}" / f"{number}.txt").write_text(words(number + 10**9, 20))
    say("changes: the second run")
    second = driver(work, [str(docs)], out, arguments)
    embedded = sum(int(line.split()[1]) for line in log.read_text().splitlines())
    untouched = all(
        file.exists() and (file.stat().st_mtime_ns, zlib.crc32(file.read_bytes())) == stamp
        for file, stamp in before.items()
    )
    texts = {text for table in VectorParts(out).tables(["text"]) for text in table["text"].to_pylist()}
    news = set(changed)
    expected = {words(number + 10**9 if number in news else number, 20) for number in range(count)}
    facts = {
        "documents": count,
        "changed": len(changed),
        "embedded": embedded,
        "untouched": untouched,
        "right": texts == expected,
        "near_duplicates": [first.near_duplicates, second.near_duplicates],
        "seconds": [first.seconds, second.seconds],
    }
    good = embedded == len(changed) and untouched and facts["right"]
    return facts, [
        [
            f"{len(changed):,} of {count:,} documents changed, embedded again",
            f"{embedded:,}",
            f"{len(changed):,}",
            verdict(good),
        ],
        ["files of the first run", "untouched" if untouched else "changed", "untouched", verdict(untouched)],
        [
            "seconds of the first and the second run",
            f"{first.seconds['total']:.0f}, {second.seconds['total']:.0f}",
            "",
            "",
        ],
    ]


# 5. Broken files.


def broken(options: argparse.Namespace, work: Path) -> tuple[Facts, list[list[str]]]:
    docs, count = work / "broken", options.files
    docs.mkdir()
    bad = {number: number // 100 % 5 for number in range(0, count, 100)}
    contents: list[tuple[str, bytes]] = [
        ("pdf", b"%PDF-1.7 broken"),
        ("docx", b"PK\x03\x04 broken"),
        ("ipynb", b"{broken"),
        ("txt", b"\x00\x01\x02\x03" * 50),
        ("jsonl.gz", gzip.compress(b"x" * 1000)[:-20]),
    ]
    for number in range(count):
        if number in bad:
            suffix, data = contents[bad[number]]
            (docs / f"{number}.{suffix}").write_bytes(data)
        else:
            (docs / f"{number}.md").write_text(f"# Page {number}\n\n{words(number, 20)}\n")
    out = work / "broken-out"
    say(f"broken: {count:,} files")
    command = [sys.executable, "-m", "epic_rag_cli", "index", str(docs), "--to", str(out), "--ray", "local"]
    command += ["--actors", str(ACTORS), "--model", str(options.model), "--duplicates", "exact", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout, result.stderr[-2000:]
    report = json.loads(result.stdout)
    listed = {Path(each["path"]).name.partition(".")[0].rpartition("!")[2] for each in report["skipped"]}
    found = {Path(path).stem for table in VectorParts(out).tables(["path"]) for path in table["path"].to_pylist()}
    good = {str(number) for number in range(count) if number not in bad}
    index = work / "broken-index"
    command = [sys.executable, "-m", "epic_rag_cli", "index", "--from-parquet", str(out), "--index-dir", str(index)]
    filled = subprocess.run([*command, "--chroma", "none"], capture_output=True, text=True, check=False)
    assert filled.returncode == 0, filled.stderr[-2000:]
    from epic_rag_chroma import ChromaIndexer

    sample = random.Random(5).sample(sorted(good), min(100, len(good)))
    with ChromaIndexer(index) as indexer:
        hits = indexer.query_many([words(int(name), 20) for name in sample], k=1)
    hit = sum(bool(some) and Path(some[0].path).stem == name for some, name in zip(hits, sample, strict=True))
    facts = {
        "files": count,
        "broken": len(bad),
        "status": result.returncode,
        "listed": len(listed & {str(number) for number in bad}),
        "indexed": len(found & good),
        "found_by_their_text": f"{hit} of {len(sample)}",
    }
    right = result.returncode == 0 and listed == {str(number) for number in bad} and found == good
    return facts, [
        [
            f"{len(bad):,} broken of {count:,} files",
            f"exit status {result.returncode}, {facts['listed']:,} listed, {facts['indexed']:,} indexed",
            f"0, {len(bad):,}, {len(good):,}",
            verdict(right),
        ],
        ["documents found by their own text", facts["found_by_their_text"], "all", verdict(hit == len(sample))],
    ]


# The driver in a process of its own.


def start_driver(work: Path, roots: list[str], out: Path, arguments: Facts) -> subprocess.Popen[bytes]:
    """Start `run_pipeline` in a new process; its report is pickled into a file."""
    from ray import cloudpickle

    task = work / "driver.task"
    task.write_bytes(cloudpickle.dumps((roots, str(out), arguments)))
    result = work / "driver.result"
    result.unlink(missing_ok=True)
    with (work / "driver.err").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, __file__, "--driver", str(task), str(result)],
            # Ray's workers are nice otherwise, and the plain loop is not.
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_worker_niceness": "0"},
            stdout=errors,
            stderr=errors,
        )


def driver(work: Path, roots: list[str], out: Path, arguments: Facts, *, watch: Facts | None = None) -> PipelineReport:
    """Run `run_pipeline` in a new process and return its report."""
    process = start_driver(work, roots, out, arguments)
    if watch is not None:
        watch["process"] = process.pid
    if process.wait() != 0:
        raise RuntimeError((work / "driver.err").read_text()[-3000:])
    return PipelineReport(**json.loads((work / "driver.result").read_text()))


def run_driver(task: str, result: str) -> None:
    import pickle

    roots, out, arguments = pickle.loads(Path(task).read_bytes())
    report = run_pipeline(roots, out, **arguments)
    Path(result).write_text(json.dumps({**asdict(report), "skipped": []}))


@contextmanager
def peaks() -> Iterator[Facts]:
    """Yield a dictionary that gets the largest memory of the driver and of any actor, sampled twice a second."""
    found: Facts = {"driver": 0, "actor": 0, "process": None}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.5):
            if found["process"] is None:
                continue
            with suppress(psutil.Error):
                main = psutil.Process(found["process"])
                found["driver"] = max(found["driver"], main.memory_info().rss)
                for actor in actors_of(main.pid):
                    with suppress(psutil.Error):
                        found["actor"] = max(found["actor"], actor.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def actors_of(driver: int) -> list[psutil.Process]:
    """Return the actors of a driver that work on its tasks."""
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.Error):
                if "MapWorker" in " ".join(child.cmdline()):
                    found.append(child)
    return found


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a driver with SIGKILL, and wait until the cluster that it started has ended."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        with suppress(psutil.Error):
            child.kill()


def verdict(good: bool) -> str:
    return "met" if good else "MISSED"


PARTS: dict[str, Callable[[argparse.Namespace, Path], tuple[Facts, list[list[str]]]]] = {
    "scaling": scaling,
    "kills": kills,
    "chroma": chroma,
    "million": million,
    "changes": changes,
    "broken": broken,
}
QUICK = {
    "passages": 200,
    "kills": 2,
    "chroma_kills": 1,
    "kill_documents": 1000,
    "rows": 4000,
    "documents": 1000,
    "files": 200,
}


def main() -> None:
    if sys.argv[1:2] == ["--driver"]:
        run_driver(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--texts", type=Path, help="JSON lines with real passages under 'positive' or 'text'")
    parser.add_argument("--model", default="epic-minilm", help="model of scaling and broken")
    parser.add_argument("--dtype", default="auto", help="number format that the model computes in, in scaling")
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--part-rows", type=int, default=0, help="rows of a part in scaling; 0 for 24 parts")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kill-documents", type=int, default=4000)
    parser.add_argument("--kill-seconds", type=float, default=0.15, help="time that a batch takes")
    parser.add_argument("--kill-within", type=float, default=20.0, help="longest time until the next kill")
    parser.add_argument("--chroma-kills", type=int, default=10)
    parser.add_argument("--chroma-within", type=float, default=4.0, help="longest time until the server is killed")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="tiny counts")
    parser.add_argument("--work", type=Path, help="a folder for the data; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    for name, value in QUICK.items() if options.quick else ():
        setattr(options, name, value)
    unknown = sorted(set(options.only.split(",")) - set(PARTS))
    if unknown:
        parser.error(f"unknown parts: {', '.join(unknown)}")
    if options.texts is not None and not options.texts.is_file():
        parser.error(f"no such file: {options.texts}")
    facts: Facts = {"cpus": os.cpu_count()}
    rows: list[list[str]] = []
    for name in options.only.split(","):
        work = Path(tempfile.mkdtemp(prefix="ray-pipeline-", dir=options.work))
        started = time.monotonic()
        try:
            facts[name], bars = PARTS[name](options, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        facts[name]["benchmark_seconds"] = round(time.monotonic() - started, 1)
        rows += [[name, *row] for row in bars]
        say(f"{name}: {json.dumps(facts[name])}")
        if options.json is not None:
            options.json.write_text(json.dumps(facts, indent=2) + "\n")
    print("| part | what | measured | limit | |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
