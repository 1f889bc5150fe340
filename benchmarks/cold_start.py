"""Commands in new processes, side by side with the imports of the libraries that they do without.

    python benchmarks/cold_start.py --output DIR

Every run starts one process of each kind in turn; a process is timed from outside, and the system reports its peak
memory. The index holds documentation: the docstrings of Python's standard library, one page a module. "In one process"
are queries that follow a first one. The two indexes at the end hold synthetic files (`growth.py`) and random vectors,
so that one can be a hundred times the size of the other. "With a server" are queries that a running `epic-rag serve` of
the index answers; all others are answered without one. Writes cold_start.json and cold_start.md to DIR.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from bench_common import Bar, bars_table, milliseconds, ratio, run_main, say, write
from growth import HashedEncoder, make_files, questions
from measuring import spread_of

from epic_rag import EpicEncoder
from epic_rag.errors import EpicError
from epic_rag.evaluation.report import markdown_table
from epic_rag_chroma import ChromaIndexer

IMPORTS = "import torch, transformers, chromadb"
QUESTION = "how do I read a file line by line?"
# Characters of docstrings that make one chunk, nearly enough.
CHARACTERS = 305
SHORTEST = 80
FEW_CHUNKS = 20
# A small process between: the peak memory of a process begins with that of the one that starts it.
RUNNER = """
import os, sys, time
started = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
used = usage.ru_utime + usage.ru_stime
sys.stderr.write(f"\\n{time.perf_counter() - started} {used} {usage.ru_maxrss}\\n")
sys.exit(os.waitstatus_to_exitcode(status))
"""
WARM = """
import json, sys, time
from pathlib import Path
from epic_rag_cli.options import open_indexer
index, *texts = sys.argv[1:]
seconds = []
with open_indexer(Path(index), model=None, dtype="auto", device=None, chroma=None) as indexer:
    for text in texts * 5:
        started = time.perf_counter()
        indexer.query(text)
        seconds.append(time.perf_counter() - started)
seconds = sorted(seconds[len(texts):])
print(seconds[len(seconds) // 2])
"""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--model", help="default: the shipped checkpoint")
    options.add_argument(
        "--large", metavar="MODEL", help="a larger model, which needs torch; its rows are left out without"
    )
    options.add_argument("--chunks", type=int, default=3000, metavar="N", help="chunks of documentation, about")
    options.add_argument("--sizes", default="1000,100000", help="chunks of the two synthetic indexes")
    options.add_argument("--runs", type=int, default=9, metavar="N")
    options.add_argument("--output", required=True, type=Path, metavar="DIR")
    return options


def pages() -> Iterator[tuple[str, str]]:
    """Yield a name and a Markdown page for each documented module of the standard library."""
    library = Path(os.__file__).parent
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        if {"site-packages", "test", "tests", "idlelib"} & set(parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef)))
        entries = [(node.name, ast.get_docstring(node) or "") for node in nodes]
        sections = [f"## {name}\n\n{text}\n" for name, text in entries if len(text) >= SHORTEST]
        if sections:
            name = ".".join(parts)
            yield name, "\n".join([f"# {name}\n\n{ast.get_docstring(tree) or ''}\n", *sections])


def write_manual(folder: Path, chunks: int) -> None:
    """Write pages that make about so many chunks."""
    folder.mkdir()
    left = chunks * CHARACTERS
    for name, text in pages():
        if left <= 0:
            return
        (folder / f"{name}.md").write_text(text[:left], encoding="utf-8")
        left -= len(text)


def make_synthetic(folder: Path, chunks: int, encoder: EpicEncoder) -> Path:
    """Index synthetic files with random vectors; return the index folder."""
    folder.mkdir()
    make_files(folder, chunks)
    index = folder / ".epic-rag"
    with ChromaIndexer(index, encoder=HashedEncoder(encoder), chroma="none") as indexer:  # type: ignore[arg-type]
        say(f"{indexer.index([folder]).chunks_total:,} synthetic chunks")
    return index


class Run(NamedTuple):
    """A process that has ended: wall time and processor time in seconds, peak memory in bytes, standard output."""

    seconds: float
    cpu: float
    peak: int
    out: str


def run(command: Sequence[str]) -> Run:
    """Run a command in a new process.

    Raises:
        EpicError: If it fails.
    """
    # Installed packages have their bytecode on disk.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", RUNNER, *command], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        message = f"ended with status {done.returncode}: {done.stderr.strip()[-300:]}"
        raise EpicError(f"`{' '.join(command)[:200]}` {message}")
    *_, last = done.stderr.splitlines()
    seconds, cpu, peak = last.split()
    # macOS counts bytes, Linux kilobytes.
    return Run(float(seconds), float(cpu), int(peak) * (1 if sys.platform == "darwin" else 1024), done.stdout)


@contextlib.contextmanager
def serving(folder: str) -> Iterator[None]:
    """Run `epic-rag serve` of an index.

    Raises:
        EpicError: If it does not start.
    """
    command = [sys.executable, "-m", "epic_rag_cli", "serve", "--index-dir", folder, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            if "is served at" not in line:
                raise EpicError(f"`epic-rag serve` did not start: {line.strip()}")
            yield
        finally:
            process.terminate()


def measure(options: argparse.Namespace) -> int:
    small, large = (int(size) for size in options.sizes.split(","))
    epic = [sys.executable, "-m", "epic_rag_cli"]
    chosen = [] if options.model is None else ["--model", options.model]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        manual = place / "manual"
        write_manual(manual, options.chunks)
        index = [*epic, "index", str(manual), *chosen]
        run(index)
        run(index)  # records the files' times, which were too young before
        encoder = EpicEncoder.from_pretrained(options.model, device="cpu")
        sizes = {size: str(make_synthetic(place / str(size), size, encoder)) for size in (small, large)}
        folder = str(manual / ".epic-rag")
        ask = [*epic, "query", QUESTION, "--no-server", "--index-dir"]
        served = [*epic, "query", QUESTION, "--index-dir"]
        large_model = None
        if options.large is not None:
            few = place / "few"
            write_manual(few, FEW_CHUNKS)
            run([*epic, "index", str(few), "--model", options.large])
            large_model = str(few / ".epic-rag")
        commands = {
            "imports": [sys.executable, "-c", IMPORTS],
            "query": [*ask, folder],
            "query with demonstrations": [*ask, folder, "--bank", "docs", "-n", "16"],
            "threads": [str(shutil.which("env")), f"OPENBLAS_NUM_THREADS={os.cpu_count()}", *ask, folder],
            "served query": [*served, folder],
            "keyword query": [*ask, folder, "--mode", "keyword"],
            "index": index,
            "status": [*epic, "status", "--index-dir", folder],
            "help": [*epic, "--help"],
            "warm": [sys.executable, "-c", WARM, folder, *questions(), QUESTION],
            "warm_torch": [sys.executable, "-c", f"import torch\n{WARM}", folder, *questions(), QUESTION],
            "small": [*ask, sizes[small]],
            "large": [*ask, sizes[large]],
        }
        if large_model is not None:
            commands |= {"large model": [*ask, large_model], "large model served": [*served, large_model]}
        found: dict[str, list[Run]] = {name: [] for name in commands}
        with serving(folder), contextlib.nullcontext() if large_model is None else serving(large_model):
            for number in range(options.runs + 1):
                say(f"run {number} of {options.runs}" if number else "warm-up")
                for name, command in commands.items():
                    done = run(command)
                    if number:
                        found[name].append(done)
        with ChromaIndexer(folder) as indexer:
            chunks = indexer.status().chunks
    seconds = {name: [each.seconds for each in runs] for name, runs in found.items()}
    for name in ("warm", "warm_torch"):
        seconds[name] = [float(each.out) for each in found[name]]
    peaks = {name: max(each.peak for each in runs) for name, runs in found.items()}
    labels = {
        "imports": f'python -c "{IMPORTS}"',
        "query": f"epic-rag query, {chunks:,} chunks",
        "query with demonstrations": "the same with --bank docs",
        "threads": "the same with a thread of OpenBLAS for each core",
        "served query": "the same with a server",
        "keyword query": "epic-rag query with --mode keyword",
        "index": "epic-rag index, nothing has changed",
        "status": "epic-rag status",
        "help": "epic-rag --help",
        "warm": "a further query in one process",
        "warm_torch": "the same in a process that has imported torch",
        "small": f"epic-rag query, {small:,} synthetic chunks",
        "large": f"epic-rag query, {large:,} synthetic chunks",
    }
    bars = [
        ratio("epic-rag query / the imports", seconds["query"], seconds["imports"], 0.30, at_most=True),
        ratio("unchanged epic-rag index / the imports", seconds["index"], seconds["imports"], 0.25, at_most=True),
        ratio("epic-rag query with a server / without", seconds["served query"], seconds["query"], 0.8, at_most=True),
        Bar("peak memory of epic-rag query, MB", peaks["query"] / 1e6, 260, True),
        Bar("a further query in one process, ms", 1e3 * spread_of(seconds["warm"]).median, 10, True),
        ratio(
            f"epic-rag query at {large:,} chunks / at {small:,}", seconds["large"], seconds["small"], 1.5, at_most=True
        ),
        Bar(f"peak memory at {large:,} chunks, MB", peaks["large"] / 1e6, 400, True),
    ]
    if options.large is not None:
        shown = Path(options.large).name
        labels |= {"large model": f"epic-rag query with {shown}", "large model served": "the same with a server"}
        with_server, without = seconds["large model served"], seconds["large model"]
        bars.append(ratio(f"a query with a server / without, {shown}", with_server, without, 0.3, at_most=True))
    rows = []
    for name, label in labels.items():
        part = spread_of([a / b for a, b in zip(seconds[name], seconds["imports"], strict=True)]).median
        cpu = "" if name.startswith("warm") else f"{1e3 * spread_of([each.cpu for each in found[name]]).median:.0f}"
        rows.append([label, milliseconds(seconds[name]), f"{part:.3f}", cpu, f"{peaks[name] / 1e6:.0f}"])
    header = ["process", "ms: median (quartiles)", "part of the imports", "processor time, ms", "peak memory, MB"]
    table = markdown_table(header, rows, text_columns=1)
    write(
        options.output,
        "cold_start",
        "\n\n".join([f"{options.runs} runs.", table, bars_table(bars)]),
        bars,
        torch.device("cpu"),
        chunks=chunks,
        seconds=seconds,
        peak_bytes=peaks,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
