"""Layouts of an index by size: memory, disk, time to build and to query at 1, 10 and 100 million chunks.

    python benchmarks/scale.py --data DIR --output runs/scale [--only statistics,scan,chroma,local,training,report]
    python benchmarks/scale.py --quick     # tiny sizes and a tiny random model: a smoke test, writes no document

DIR holds the training files. Stages:

    statistics  embeds passages of real manuals, fits a generator of vectors to them, and compares the two
    scan        exact and quantised scans of generated vectors, with rescoring, up to 1 million
    chroma      a Chroma server, one collection and shards, through `ShardedCollection`
    local       an index folder filled with real texts, as by `epic-rag index --from-parquet`
    training    tokens of the recipe 7b-lora, and its memory and hours on 8 GPUs
    report      tables and plot of what was measured, into docs/scale.md

What fits is measured. Larger sizes are computed from the slopes between the measured ones, and marked so. Each stage
writes NAME.json to the output folder, which `report` reads.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import run_main, say
from measuring import machine
from scale_report import layouts, plot, tables, training_table
from scale_vectors import NEAREST, Generator, Quantised, effective_dimension, neighbour_cosines

from epic_rag import EpicEncoder
from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.errors import ConfigError, DataError
from epic_rag.evaluation.report import versions
from epic_rag_chroma import ChromaIndexer, ChromaServer, ModelInfo, Record, Shards, WriteCounts

Array = np.ndarray[Any, Any]

STAGES = ("statistics", "scan", "chroma", "local", "training", "report")
ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "scale.md"
PICTURE = ROOT / "docs" / "images" / "scale.svg"
PAIRS = "docs_sections.jsonl.gz"
RESCORED = (100, 1000)


@dataclass(frozen=True)
class Counts:
    """Counts of what is measured."""

    passages: int = 16_000
    clusters: int = 256
    queries: int = 50
    scans: tuple[int, ...] = (100_000, 300_000, 1_000_000)
    chroma: tuple[int, ...] = (10_000, 20_000, 40_000, 60_000)
    shards: int = 4
    local: int = 20_000
    rows_of_a_task: int = 300


QUICK = Counts(
    passages=200, clusters=8, queries=5, scans=(1000, 2000), chroma=(100, 200), shards=2, local=100, rows_of_a_task=20
)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--data", type=Path, default=os.environ.get("EPIC_RAG_DATA"), help="training files")
    options.add_argument("--model", help="default: the shipped checkpoint")
    options.add_argument("--only", default=",".join(STAGES), help="stages, comma-separated")
    options.add_argument("--output", type=Path, default=Path("runs/scale"), metavar="DIR")
    options.add_argument("--quick", action="store_true")
    return options


def statistics(options: argparse.Namespace, counts: Counts) -> dict[str, Any]:
    vectors, queries, passages, seconds = embedded(options, counts.passages)
    generator = Generator.fit(vectors, (queries, passages), counts.clusters)
    np.savez(options.output / "generator.npz", **{name: np.asarray(v) for name, v in generator.__dict__.items()})
    drawn = generator.draw(len(vectors), 1)
    made_queries = generator.queries(drawn, len(queries))
    kinds = {}
    for name, some, asked in (("real", vectors, queries), ("generated", drawn, made_queries)):
        cosines = neighbour_cosines(some)
        best = (asked @ some.T).max(axis=1).mean()
        codes = Quantised(some)
        kinds[name] = {
            "cosine to neighbour 1": cosines[0],
            "to neighbour 10": cosines[1],
            "to neighbour 100": cosines[2],
            "of a query to its best passage": float(best),
            "effective dimension": effective_dimension(some),
            "recall@10 of int8": codes.recall("int8", asked, 0),
            f"recall@10 of binary, {RESCORED[0]} rescored": codes.recall("binary", asked, RESCORED[0]),
        }
    return {"passages": len(vectors), "seconds": seconds, "shared": generator.shared, "kinds": kinds}


def embedded(options: argparse.Namespace, count: int) -> tuple[Array, Array, Array, float]:
    """Return vectors of passages, of queries and of the passages of these; from the cache if they are there."""
    encoder = EpicEncoder.from_pretrained(options.model)
    cache = options.output / f"vectors-{encoder.fingerprint}-{count}.npz"
    if cache.is_file():
        with np.load(cache) as stored:
            return stored["passages"], stored["queries"], stored["answers"], float(stored["seconds"])
    rows = read_rows(options.data, PAIRS, count)
    say(f"embedding {len(rows):,} passages")
    started = time.perf_counter()
    passages = encoder.encode_document([row["positive"] for row in rows])
    seconds = time.perf_counter() - started
    some = list(range(0, len(rows), max(1, len(rows) // 500)))
    queries = encoder.encode_query([rows[place]["query"] for place in some])
    np.savez(cache, passages=passages, queries=queries, answers=passages[some], seconds=seconds)
    return passages, queries, passages[some], seconds


def read_rows(data: Path | None, name: str, count: int) -> list[dict[str, Any]]:
    """Return rows at even distances of a training file."""
    path = (
        None if data is None else next((each for each in (data / name, data / "train" / name) if each.is_file()), None)
    )
    if path is None:
        raise DataError(f"{data}/{name} is missing. Pass the folder of the training files with --data.")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return rows[:: max(1, len(rows) // count)][:count]


def load_generator(output: Path) -> Generator:
    path = output / "generator.npz"
    if not path.is_file():
        raise ConfigError(f"{path} is missing. Run the stage statistics first.")
    with np.load(path) as stored:
        values = {name: stored[name] for name in stored.files}
    return Generator(**{**values, "shared": float(values["shared"]), "mixing": float(values["mixing"])})


# -- scans -------------------------------------------------------------------------------------------------------------


def scan(options: argparse.Namespace, counts: Counts) -> dict[str, Any]:
    generator = load_generator(options.output)
    found = []
    ways = [("float32", 0), ("float16", 0), ("int8", 0), ("int8", RESCORED[0])]
    ways += [("binary", 0), *(("binary", rescored) for rescored in RESCORED)]
    for size in counts.scans:
        say(f"scans of {size:,} vectors")
        vectors = generator.draw(size, 1)
        started = time.perf_counter()
        codes = Quantised(vectors)
        seconds = time.perf_counter() - started
        queries = generator.queries(vectors, counts.queries)
        exact = [set(codes.nearest("float32", query, 0)) for query in queries]
        for kind, rescored in ways:
            times, shared = [], []
            for query, true in zip(queries, exact, strict=True):
                started = time.perf_counter()
                rows = codes.nearest(kind, query, rescored)
                times.append(time.perf_counter() - started)
                shared.append(len(true & set(rows)) / len(true))
            found.append(
                {
                    "rows": size,
                    "kind": kind,
                    "rescored": rescored,
                    "bytes": codes.nbytes(kind) / size,
                    "rescoring_bytes": codes.nbytes("float16") / size if rescored else 0.0,
                    "ms": float(np.median(times)) * 1e3,
                    "recall": float(np.mean(shared)),
                    "quantise_seconds": seconds,
                }
            )
        del codes, vectors
    return {"dimension": int(generator.centres.shape[1]), "queries": counts.queries, "scans": found}


# -- Chroma ------------------------------------------------------------------------------------------------------------


class ChromaProcess:
    """`chroma run` on a folder, on a free port of this machine."""

    def __init__(self, folder: Path) -> None:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        code = "import sys, chromadb_rust_bindings; chromadb_rust_bindings.cli(['chroma', *sys.argv[1:]])"
        command = [sys.executable, "-c", code, "run", "--path", str(folder), "--host", "127.0.0.1"]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.server = ChromaServer(f"http://127.0.0.1:{self.port}")
        self.folder = folder
        Shards(self.server, "probe", patience=120.0).close() if self._answers() else None

    def _answers(self) -> bool:
        import httpx

        for _ in range(1200):
            try:
                httpx.get(f"{self.server.url}/api/v2/heartbeat", timeout=5).raise_for_status()
                return True
            except httpx.HTTPError:
                time.sleep(0.05)
        raise ConfigError("`chroma run` does not answer. Check the installation of chromadb.")

    def memory(self) -> int:
        import psutil

        return int(psutil.Process(self.process.pid).memory_info().rss)

    def disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def __enter__(self) -> ChromaProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def chroma(options: argparse.Namespace, counts: Counts) -> dict[str, Any]:
    generator = load_generator(options.output)
    largest = counts.chroma[-1]
    vectors = generator.draw(largest, 2)
    queries = generator.queries(vectors, counts.queries)
    dim = int(vectors.shape[1])
    info = ModelInfo("scale", "generated", "", dim)
    rows = [Record(f"{n:012x}", f"chunk {n} " * 40, {"path": f"{n // 8}.md"}, vectors[n]) for n in range(largest)]
    found = []
    for name, shards, writers in (("one collection", 1, 1), (f"{counts.shards} shards", counts.shards, 2)):
        say(f"Chroma, {name}")
        with tempfile.TemporaryDirectory() as place, ChromaProcess(Path(place)) as server:
            idle, done, seconds = server.memory(), 0, 0.0
            with Shards(server.server, "docs") as opened:
                opened.begin(info, shards, has_all_rows=True)
            for size in counts.chroma if shards == 1 else counts.chroma[-1:]:
                started = time.perf_counter()
                written = write(server.server, info, rows[done:size], writers)
                seconds += time.perf_counter() - started
                assert written.written == size - done, written
                done = size
                with Shards(server.server, "docs") as opened:
                    opened.open()
                    times, shared = [], []
                    for query in queries:
                        started = time.perf_counter()
                        ranking = opened.nearest(query, NEAREST)
                        times.append(time.perf_counter() - started)
                        scores = vectors[:size] @ query
                        best = np.argpartition(-scores, NEAREST)[:NEAREST]
                        shared.append(len({row for row, _ in ranking} & {rows[n].id for n in best}) / NEAREST)
                found.append(
                    {
                        "layout": name,
                        "shards": shards,
                        "writers": writers,
                        "rows": size,
                        "seconds": seconds,
                        "memory": server.memory() - idle,
                        "disk": server.disk(),
                        "ms": float(np.median(times)) * 1e3,
                        "recall": float(np.mean(shared)),
                    }
                )
    return {"dimension": dim, "text_bytes": len(rows[0].text), "layouts": found}


def write(server: ChromaServer, info: ModelInfo, rows: Sequence[Record], writers: int) -> WriteCounts:
    """Write rows with several connections at a time."""
    total: list[WriteCounts] = []

    def run(number: int) -> None:
        with Shards(server, "docs") as opened:
            opened.join(info)
            starts = range(number * 1000, len(rows), writers * 1000)
            total.append(sum((opened.write(rows[start : start + 1000]) for start in starts), WriteCounts()))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(total, WriteCounts())


# -- an index folder ---------------------------------------------------------------------------------------------------


def local(options: argparse.Namespace, counts: Counts) -> dict[str, Any]:
    texts = [row["positive"] for row in read_rows(options.data, PAIRS, counts.local)]
    vectors = load_generator(options.output).draw(len(texts), 3)
    info = ModelInfo("scale", "generated", "", int(vectors.shape[1]))

    def rows() -> Iterator[list[Record]]:
        for start in range(0, len(texts), 4000):
            yield [
                Record(
                    f"{n:032x}",
                    texts[n],
                    {"path": f"{n // 8}.md", "root": "/", "doc_id": f"{n // 8}", "kind": "markdown"},
                    vectors[n],
                )
                for n in range(start, min(start + 4000, len(texts)))
            ]

    with tempfile.TemporaryDirectory() as place:
        with ChromaIndexer(Path(place) / "index", chroma="none") as indexer:
            first = indexer.load_rows(rows(), info, parts="generated")
            again = indexer.load_rows(rows(), info, parts="generated")
            query = vectors[0]
            indexer.query("x", embedded=query, mode="dense")
            times = []
            for n in range(1, 1 + counts.queries):
                started = time.perf_counter()
                indexer.query(" ".join(texts[n % len(texts)].split()[:4]), embedded=vectors[n % len(texts)])
                times.append(time.perf_counter() - started)
        folder = Path(place) / "index"
        sizes = {name: (folder / name).stat().st_size for name in ("index.sqlite", "vectors.bin")}
    return {
        "rows": len(texts),
        "text_bytes": sum(len(text.encode()) for text in texts) / len(texts),
        "seconds": first.seconds,
        "unchanged_seconds": again.seconds,
        "sqlite_bytes": sizes["index.sqlite"] / len(texts),
        "vectors_bytes": sizes["vectors.bin"] / len(texts),
        "hybrid_ms": float(np.median(times)) * 1e3,
    }


# -- training on 8 GPUs ------------------------------------------------------------------------------------------------

# Mistral-7B-v0.1, from its config.json.
HIDDEN, LAYERS, KEY_VALUE, INNER, VOCABULARY = 4096, 32, 1024, 14_336, 32_000
GPUS = 8
# Dense bfloat16, from the makers' data sheets, and the share of it that training reaches (assumed).
PEAK = {"A100 80 GB": 312e12, "H100 80 GB": 989e12}
UTILISATION = 0.35


def training(options: argparse.Namespace, counts: Counts) -> dict[str, Any]:
    from epic_rag.training import load_recipe

    recipe = load_recipe("7b-lora")
    # WordPieces, 30,522; the tokenizer of Mistral is not shipped.
    tokenizer = EpicEncoder.from_pretrained(options.model).tokenizer
    rows, tokens = 0, {"query": 0.0, "document": 0.0}
    for task in recipe.tasks:
        try:
            some = read_rows(options.data, f"{task}.jsonl.gz", counts.rows_of_a_task)
            number = count_lines(options.data, f"{task}.jsonl.gz")
        except DataError:
            if not options.quick:
                raise
            continue
        limits = {"query": recipe.max_query_tokens, "document": recipe.max_document_tokens}
        for side, key in (("query", "query"), ("document", "positive")):
            lengths = [min(limits[side], len(ids)) for ids in tokenizer([row[key] for row in some])["input_ids"]]
            tokens[side] += number * float(np.mean(lengths))
        rows += number
    # Behind the instruction, and for q1 behind k = 0..K demonstrations: two slots and the words around them.
    instruction = len(tokenizer(f"Instruct: {recipe.default_instruction}\nQuery: ")["input_ids"])
    around = len(tokenizer("\nQuery: \nResponse: ")["input_ids"]) + 2
    query = tokens["query"] / max(1, rows) + instruction
    shown = recipe.max_demonstrations / 2 * around
    documents = 1 + (recipe.hard_negatives or 0)
    step = recipe.batch_size * (2 * query + shown + documents * tokens["document"] / max(1, rows))
    layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY_VALUE + 3 * HIDDEN * INNER
    rank = recipe.lora_rank or 0
    adapters = LAYERS * rank * (2 * 2 * HIDDEN + 2 * (HIDDEN + KEY_VALUE) + 3 * (HIDDEN + INNER)) + HIDDEN * HIDDEN
    weights = LAYERS * layer + VOCABULARY * HIDDEN
    # Forward without activations (GradCache), forward, recomputed forward, backward through frozen weights: 2 N each.
    flops = 8 * LAYERS * layer * step
    micro = recipe.micro_batch_tokens
    memory = {
        "frozen weights, bfloat16": 2 * weights,
        "adapters and projector, float32: weights, gradients, two moments": 16 * adapters,
        "inputs of the layers, bfloat16": 2 * LAYERS * micro * HIDDEN,
        "one layer recomputed, bfloat16": 2 * micro * (6 * HIDDEN + 2 * KEY_VALUE + 4 * INNER),
    }
    return {
        "tokenizer": options.model or DEFAULT_CHECKPOINT,
        "rows": rows,
        "tokens_per_query": query,
        "tokens_of_demonstrations": shown,
        "tokens_per_document": tokens["document"] / max(1, rows),
        "tokens_per_step": step,
        "steps": recipe.steps,
        "parameters": weights,
        "adapters": adapters,
        "flops_per_step": flops,
        "memory": memory,
        "reduced_bytes": 4 * adapters,
        "peak": PEAK,
        "utilisation": UTILISATION,
        "hours": {name: recipe.steps * flops / (GPUS * peak * UTILISATION) / 3600 for name, peak in PEAK.items()},
    }


def count_lines(data: Path, name: str) -> int:
    path = next(each for each in (data / name, data / "train" / name) if each.is_file())
    with gzip.open(path, "rb") as file:
        return sum(1 for _ in file)


# -- report ------------------------------------------------------------------------------------------------------------


def report(options: argparse.Namespace, document: Path | None) -> str:
    """Return the tables of all stages that were run; put them, and the plot, into the document."""
    found = {
        name: json.loads(path.read_text())["result"]
        for name in STAGES[:-1]
        if (path := options.output / f"{name}.json").is_file()
    }
    texts = {"scale": tables(found)}
    if "training" in found:
        texts["training"] = training_table(found["training"])
    markdown = "\n\n".join(text for text in texts.values() if text)
    (options.output / "scale.md").write_text(markdown + "\n", encoding="utf-8")
    plotted = plot(layouts(found), options.output / "scale")
    if document is not None:
        page = document.read_text(encoding="utf-8")
        for name, text in texts.items():
            begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
            if begin in page and text:
                head, rest = page.split(begin, 1)
                picture = (
                    "\n![memory and query time by size](images/scale.svg)\n" if name == "scale" and plotted else ""
                )
                page = f"{head}{begin}\n{text}\n{picture}\n{rest[rest.index(end) :]}"
        document.write_text(page, encoding="utf-8")
        if plotted:
            shutil.copyfile(options.output / "scale.svg", PICTURE)
    return markdown


def measure(options: argparse.Namespace) -> int:
    wanted = [stage for stage in options.only.split(",") if stage]
    unknown = sorted(set(wanted) - set(STAGES))
    if unknown:
        raise ConfigError(f"{unknown[0]} is not a stage. Use {', '.join(STAGES)}.")
    counts = QUICK if options.quick else Counts()
    options.output.mkdir(parents=True, exist_ok=True)
    stages = {"statistics": statistics, "scan": scan, "chroma": chroma, "local": local, "training": training}
    for name in wanted:
        if name == "report":
            sys.stdout.write(report(options, None if options.quick else DOCUMENT) + "\n")
            continue
        say(f"=== {name}")
        started = time.perf_counter()
        result = stages[name](options, counts)
        record = {
            "command": sys.argv,
            "when": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": machine(torch.device("cpu")),
            "versions": versions(),
            "seconds": time.perf_counter() - started,
            "result": result,
        }
        (options.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def quick(options: argparse.Namespace) -> int:
    """Measure with a tiny random model on generated data."""
    from results_quick import make_encoder

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_encoder(place / "model", seed=0, trained=True)
        with gzip.open(place / PAIRS, "wt", encoding="utf-8") as file:
            for n in range(QUICK.passages):
                row = {"query": f"where is thing {n}?", "positive": f"thing {n} is in box {n * 7} " * (1 + n % 4)}
                file.write(json.dumps(row) + "\n")
        options.data, options.model, options.output = place, str(place / "model"), options.output or place / "out"
        return measure(options)


if __name__ == "__main__":
    arguments = parser()
    sys.exit(run_main(arguments, lambda options: quick(options) if options.quick else measure(options)))
