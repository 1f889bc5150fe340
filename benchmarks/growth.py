"""Scaling of an index: first run, unchanged run, one file changed, one query, at growing numbers of chunks.

    python benchmarks/growth.py --sizes 100,1000,10000,100000 --output DIR

Files of synthetic text (words of a Zipf distribution, seeded), ten chunks each. Up to --model-up-to chunks the
checkpoint embeds them; and at every size a stub of the same width and tokenizer makes vectors of the texts' hashes, so
that the first run is everything but the model. Queries are encoded by the checkpoint in both cases. Each size runs in a
new process, whose peak memory is recorded; one query also runs as `epic-rag query`, in a new process. Writes
growth.json, growth.md and a log-log plot to DIR.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import Bar, bars_table, say, write
from measuring import require_matplotlib, spread_of

from epic_rag import EpicEncoder
from epic_rag.errors import EpicError
from epic_rag.evaluation.report import markdown_table
from epic_rag_chroma import ChromaIndexer

CHUNKS_PER_FILE = 10
WORDS_PER_CHUNK = 25
QUERIES = 7
STOP_WORDS = 100
# How much more a query may cost at the largest size than at the smallest, and be called flat.
FLAT = 2.0
MEASURED = {
    "first": "first run",
    "unchanged": "unchanged run",
    "one_changed": "one file changed",
    "query": "one dense query",
    "hybrid_query": "one hybrid query",
    "common_query": "the same with words of most chunks",
    "command": "epic-rag query, a new process",
}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--sizes", default="100,1000,10000,100000", help="numbers of chunks")
    options.add_argument("--model-up-to", type=int, default=10000, metavar="N", help="sizes that the model embeds")
    options.add_argument("--model", help="default: the shipped checkpoint")
    options.add_argument("--output", required=True, type=Path, metavar="DIR")
    options.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options.add_argument("--encoder", choices=("model", "hashed"), default="model", help=argparse.SUPPRESS)
    return options


class HashedEncoder:
    """Encoder whose document vectors are made of hashes."""

    def __init__(self, encoder: EpicEncoder) -> None:
        self._encoder = encoder
        self.name, self.source, self.fingerprint = encoder.name, encoder.source, encoder.fingerprint
        self.dimension, self.truncate_dim = encoder.dimension, None
        self.max_document_tokens = encoder.max_document_tokens
        self.folder, self.config = encoder.folder, encoder.config

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._encoder.count_tokens(texts)

    def encode_document(self, texts: Sequence[str], **_: Any) -> np.ndarray[Any, Any]:
        return np.stack([self._vector(text) for text in texts]) if texts else np.zeros((0, self.dimension), np.float32)

    def encode_query(self, *arguments: Any, **options: Any) -> np.ndarray[Any, Any]:
        return self._encoder.encode_query(*arguments, **options)

    def _vector(self, text: str) -> np.ndarray[Any, Any]:
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        drawn = np.random.default_rng(seed).standard_normal(self.dimension).astype(np.float32)
        result: np.ndarray[Any, Any] = drawn / np.linalg.norm(drawn)
        return result


def vocabulary(draw: random.Random) -> list[str]:
    """Return words, the most frequent first."""
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(20000)]


def questions() -> list[str]:
    """Return queries of three words, as frequent as in the files, without the most frequent ones."""
    words = vocabulary(random.Random(0))[STOP_WORDS:]
    weights = [1 / rank for rank in range(STOP_WORDS + 1, STOP_WORDS + len(words) + 1)]
    draw = random.Random(1)
    return [" ".join(draw.choices(words, weights, k=3)) for _ in range(QUERIES + 1)]


def make_files(folder: Path, chunks: int) -> None:
    """Write files of `CHUNKS_PER_FILE` sections, each of which makes one chunk."""
    draw = random.Random(0)
    words = vocabulary(draw)
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    for number in range(-(-chunks // CHUNKS_PER_FILE)):
        sections = min(CHUNKS_PER_FILE, chunks - number * CHUNKS_PER_FILE)
        text = "".join(
            f"# Section {number} {section}\n\n{' '.join(body)}.\n\n"
            for section in range(sections)
            for body in [draw.choices(words, cum_weights=weights, k=WORDS_PER_CHUNK)]
        )
        place = folder / f"{number // 1000:03d}"
        place.mkdir(exist_ok=True)
        (place / f"{number:06d}.md").write_text(text, encoding="utf-8")


def measure_one(chunks: int, how: str, model: str | None) -> dict[str, Any]:
    """Measure everything at one size."""
    encoder: Any = EpicEncoder.from_pretrained(model, dtype="auto")
    if how == "hashed":
        encoder = HashedEncoder(encoder)
    encoder.encode_document(["warm up"])
    found: dict[str, Any] = {"chunks": chunks, "encoder": how}
    with tempfile.TemporaryDirectory() as place:
        docs = Path(place) / "docs"
        docs.mkdir()
        make_files(docs, chunks)
        time.sleep(2.1)  # the time of a file that was written just now is not trusted
        with ChromaIndexer(Path(place) / "index", encoder=encoder) as indexer:

            def index() -> float:
                started = time.perf_counter()
                report = indexer.index([docs])
                found["stored"] = report.chunks_total
                return time.perf_counter() - started

            found["first"] = index()
            index()  # records the files' times, which were too young before
            found["unchanged"] = spread_of([index() for _ in range(3)]).median
            changed = next(iter(sorted(docs.rglob("*.md"))))
            changed.write_text(changed.read_text(encoding="utf-8") + "\nOne more line.\n", encoding="utf-8")
            found["one_changed"] = index()
            found["query"] = median_of(lambda text: indexer.query(text, mode="dense"))
            found["hybrid_query"] = median_of(lambda text: indexer.query(text, mode="hybrid"))
            found["common_query"] = median_of(lambda text: indexer.query(f"section 1 {text}", mode="hybrid"))
            found["encoding"] = median_of(encoder.encode_query)
            found["index_bytes"] = indexer.status().size_bytes
        command = [sys.executable, "-m", "epic_rag_cli", "query", "--index-dir", str(Path(place) / "index")]
        found["command"] = median_of(lambda text: subprocess.run([*command, text], check=True, capture_output=True))
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def median_of(ask: Callable[[str], object]) -> float:
    """Return the median seconds of some queries, after a first one."""
    first, *others = questions()
    ask(first)
    times = []
    for text in others:
        started = time.perf_counter()
        ask(text)
        times.append(time.perf_counter() - started)
    return spread_of(times).median


def in_a_process(chunks: int, how: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run `measure_one` in a new process."""
    command = [sys.executable, __file__, "--one", str(chunks), "--encoder", how, "--output", str(options.output)]
    if options.model is not None:
        command += ["--model", options.model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EpicError(f"{chunks} chunks ended with status {done.returncode}: {done.stderr.strip()[-600:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Plot all times against the number of chunks, both axes logarithmic, as PATH.svg and PATH.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, label in MEASURED.items():
        axes.plot([each["stored"] for each in found], [each[name] for each in found], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="chunks", ylabel="seconds", title="A growing index, without the model")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for ending in ("svg", "png"):
        figure.savefig(f"{path}.{ending}", dpi=150)


def measure(options: argparse.Namespace) -> int:
    require_matplotlib()
    found = []
    for chunks in sorted(int(size) for size in options.sizes.split(",")):
        for how in ("model", "hashed"):
            if how == "model" and chunks > options.model_up_to:
                continue
            say(f"{chunks:,} chunks, {how}")
            found.append(in_a_process(chunks, how, options))
    model = [each for each in found if each["encoder"] == "model"]
    hashed = [each for each in found if each["encoder"] == "hashed"]
    largest, middle = hashed[-1], model[-1]
    bars = [
        Bar(
            f"unchanged run / first run, {middle['chunks']:,} chunks embedded by the model",
            middle["unchanged"] / middle["first"],
            0.02,
            True,
        ),
        *(
            Bar(
                f"{MEASURED[name]} at {largest['chunks']:,} chunks / at {hashed[0]['chunks']:,}",
                largest[name] / hashed[0][name],
                FLAT,
                True,
            )
            for name in ("query", "hybrid_query", "command")
        ),
        Bar(f"peak memory at {largest['chunks']:,} chunks, GB", largest["peak_bytes"] / 1e9, 2.5, True),
    ]
    rows = [
        [
            f"{each['encoder']}",
            f"{each['stored']:,}",
            f"{each['first']:.2f}",
            f"{each['unchanged']:.3f}",
            f"{each['one_changed']:.3f}",
            f"{1e3 * each['query']:.1f}",
            f"{1e3 * each['hybrid_query']:.1f}",
            f"{1e3 * each['common_query']:.1f}",
            f"{1e3 * each['encoding']:.1f}",
            f"{1e3 * each['command']:,.0f}",
            f"{each['index_bytes'] / 1e6:,.0f}",
            f"{each['peak_bytes'] / 1e9:.2f}",
        ]
        for each in found
    ]
    header = ["encoder", "chunks", "first, s", "unchanged, s", "one changed, s", "dense query, ms", "hybrid query, ms"]
    header += [
        "with words of most chunks, ms",
        "of it encoding, ms",
        "epic-rag query, ms",
        "index, MB",
        "peak memory, GB",
    ]
    table = markdown_table(header, rows, text_columns=1)
    options.output.mkdir(parents=True, exist_ok=True)
    plot(hashed, options.output / "growth")
    write(
        options.output,
        "growth",
        "\n\n".join([table, bars_table(bars)]),
        bars,
        torch.device("cpu"),
        sizes=found,
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.one is not None:
            sys.stdout.write(json.dumps(measure_one(options.one, options.encoder, options.model)) + "\n")
            return 0
        return measure(options)
    except EpicError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
