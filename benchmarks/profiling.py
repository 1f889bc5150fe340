"""Profile of documents and of a query, by torch.profiler.

    python benchmarks/profiling.py --texts sections.jsonl.gz [--llm FOLDER --num-layers 12] --output DIR

Documents in float32 and in the processor's fastest dtype, one query, and with --llm one query of a causal model behind
demonstrations whose keys and values are kept. An operator's own time counts under its kind; what of the wall time no
operator accounts for is Python, the tokenizer, and copies. The shares are of a profiled run, which is somewhat
slower than one that is not; and one worker has all cores, so that an operator's time is wall time. Writes
profiling.json and profiling.md to DIR.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bench_common import run_main, say, write
from throughput import read_texts
from torch.profiler import ProfilerActivity, profile

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.evaluation.report import markdown_table

# The kind of an operator by a part of its name, the first that fits; the names are torch's.
KINDS = {
    "matrix products": ("linear", "addmm", "mm", "bmm", "matmul", "gemm"),
    "attention": ("attention",),
    "normalisation": ("layer_norm", "rms_norm", "rsqrt", "mean", "pow"),
    "activation": ("gelu", "silu", "tanh"),
    "token embeddings": ("embedding", "index_select"),
    "copies and dtypes": ("copy", "_to_copy", "cat", "clone", "contiguous", "index_put", "stack"),
}
OTHER, OUTSIDE = "other operators", "outside of operators"
QUESTION = "how do I find out which of the settings a program has read?"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--texts", required=True, help="JSON lines with documents as `positive`")
    options.add_argument("--count", type=int, default=400, metavar="N")
    options.add_argument("--model", help="default: the shipped checkpoint")
    options.add_argument("--llm", help="a causal model: a checkpoint, a folder or a hub name")
    options.add_argument("--num-layers", type=int, metavar="N", help="keep the first N layers of --llm")
    options.add_argument("--runs", type=int, default=7, metavar="N")
    options.add_argument("--output", required=True, type=Path, metavar="DIR")
    return options


def kind_of(operator: str) -> str:
    name = operator.rpartition("::")[2]
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return OTHER


def shares(call: Callable[[], object], runs: int) -> tuple[float, dict[str, float]]:
    """Return the median seconds of a profiled run, and the share of each kind of work."""
    call()
    seconds = []
    own: dict[str, float] = {}
    for _ in range(runs):
        started = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
            begun = time.perf_counter()
            call()
            ended = time.perf_counter()
        say(f"  {ended - begun:.3f} s, {time.perf_counter() - started:.1f} s with the profiler")
        seconds.append(ended - begun)
        for event in recorded.key_averages():
            kind = kind_of(event.key)
            own[kind] = own.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    total = sum(seconds)
    found = {kind: own.get(kind, 0.0) / total for kind in (*KINDS, OTHER)}
    found[OUTSIDE] = max(0.0, 1.0 - sum(found.values()))
    return statistics.median(seconds), found


def measure(options: argparse.Namespace) -> int:
    texts = read_texts(options.texts, options.count)
    plain = EpicEncoder.from_pretrained(options.model, device="cpu", dtype="float32")
    fast = EpicEncoder.from_pretrained(options.model, device="cpu", dtype="auto")
    plain.replicas.workers = fast.replicas.workers = 1
    best = str(fast.dtype).removeprefix("torch.")
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        f"{len(texts)} documents, float32": (1, partial(plain.encode_document, texts)),
        f"{len(texts)} documents, {best}": (1, partial(fast.encode_document, texts)),
        f"a query, {best}": (options.runs, partial(fast.encode_query, QUESTION)),
    }
    if options.llm is not None:
        llm = EpicEncoder.from_pretrained(options.llm, device="cpu", dtype="auto", num_layers=options.num_layers)
        pairs = [(text.split("\n")[0][:80] or "a question", text[:400]) for text in texts[:8]]
        bank = DemonstrationBank(pairs, instruction="Find the section")
        bank.embed(llm)
        calls[f"a query of the LLM, 8 demonstrations kept, {best}"] = (
            options.runs,
            partial(llm.encode_query, QUESTION, bank=bank, num_demonstrations=8),
        )
    found = {}
    for name, (runs, call) in calls.items():
        say(name)
        found[name] = shares(call, runs)
    kinds = [*KINDS, OTHER, OUTSIDE]
    rows = [["milliseconds, profiled", *(f"{1e3 * seconds:,.1f}" for seconds, _ in found.values())]]
    rows += [[kind, *(f"{share[kind]:.1%}" for _, share in found.values())] for kind in kinds]
    write(
        options.output,
        "profiling",
        markdown_table(["", *found], rows, text_columns=1),
        [],
        torch.device("cpu"),
        shares={name: {"seconds": seconds, "shares": share} for name, (seconds, share) in found.items()},
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
