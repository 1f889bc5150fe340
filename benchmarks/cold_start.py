"""Start-up time of commands: `epic-rag --help` and `epic-rag query`, compared with the imports they need.

    python benchmarks/cold_start.py --output DIR

Every run starts a new process of each kind, in turn. The index is made of this project's own documents. Writes
cold_start.json and cold_start.md to DIR.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from bench_common import bars_table, interleaved, milliseconds, ratio, run_main, write

from epic_rag.checkpoints import resolve
from epic_rag.errors import EpicError
from epic_rag.evaluation.report import markdown_table

DOCS = Path(__file__).parent.parent / "docs"
# Every byte of the weights, as a process that opens them must read them.
READ = "import pathlib, sys; [path.read_bytes() for path in pathlib.Path(sys.argv[1]).glob('*.safetensors')]"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--model", help="default: the shipped checkpoint")
    options.add_argument("--docs", type=Path, default=DOCS, help="what is indexed")
    options.add_argument("--runs", type=int, default=9, metavar="N")
    options.add_argument("--output", required=True, type=Path, metavar="DIR")
    return options


def run(command: Sequence[str]) -> None:
    """Run a command; its output is only used if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EpicError(f"`{' '.join(command)}` ended with status {done.returncode}: {done.stderr.strip()[-300:]}")


def measure(options: argparse.Namespace) -> int:
    python = [sys.executable, "-c"]
    epic = [sys.executable, "-m", "epic_rag_cli"]
    chosen = [] if options.model is None else ["--model", options.model]
    weights = str(resolve(options.model))
    with tempfile.TemporaryDirectory() as folder:
        index = str(Path(folder) / "index")
        run([*epic, "index", str(options.docs), "--index-dir", index, *chosen])
        ask = [*epic, "query", "how do I make an index?", "--index-dir", index]
        imports = "import torch, transformers, chromadb"
        commands = {
            "import torch": [*python, "import torch"],
            "epic-rag --help": [*epic, "--help"],
            "imports and weights": [*python, f"{imports}\n{READ}", weights],
            "epic-rag query": ask,
            "epic-rag query --mode keyword": [*ask, "--mode", "keyword"],
        }
        calls: dict[str, Callable[[], object]] = {name: partial(run, command) for name, command in commands.items()}
        seconds = interleaved(calls, options.runs, torch.device("cpu"))
    bars = [
        ratio(
            "epic-rag --help / import torch", seconds["epic-rag --help"], seconds["import torch"], 0.35, at_most=True
        ),
        ratio(
            "epic-rag query / import torch, transformers, chromadb and the weights' read",
            seconds["epic-rag query"],
            seconds["imports and weights"],
            1.6,
            at_most=True,
        ),
    ]
    table = markdown_table(
        ["process", "ms: median (quartiles)"],
        [[name, milliseconds(each)] for name, each in seconds.items()],
        text_columns=1,
    )
    head = f"New processes, {options.runs} runs; an index of {options.docs.name}/."
    write(
        options.output,
        "cold_start",
        "\n\n".join([head, table, bars_table(bars)]),
        bars,
        torch.device("cpu"),
        seconds=seconds,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
