"""Cost of the reader of demonstrations: `reader.py --output DIR`.

Seconds to build a bank of 1 to 10,000 pairs whose texts are embedded (preparing its demonstrations, adapted gains
included, and saving it), to load it and answer a query, which reads neither texts nor vectors, and to read those; and
the share of a single query's latency that the reader adds.
`few_shot_index.py` compares an index's files by hash before and after.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from bench_common import Bar, bars_table, interleaved, ratio, run_main, write

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.demonstrations import Vectors
from epic_rag.evaluation.report import markdown_table
from epic_rag.metrics import unit_rows

SIZES = (1, 8, 100, 1_000, 10_000)
LARGEST_SHARE = 1.05
BUILT, LONGEST_BUILD = 1_000, 5.0


class RandomVectors:
    """An encoder's fingerprint with random vectors, because only their number and width decide the cost."""

    def __init__(self, encoder: EpicEncoder) -> None:
        self.fingerprint, self.reader = encoder.fingerprint, encoder.reader
        self._width = encoder.dimension

    def embed_demonstrations(self, bank: DemonstrationBank) -> Vectors:
        chance = np.random.default_rng(0)
        queries = chance.standard_normal((len(bank), self._width))
        passages = queries + 0.5 * chance.standard_normal((len(bank), self._width))
        rows = [unit_rows(side.astype(np.float32)) for side in (queries, passages, queries)]
        return np.stack(rows, axis=1)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="epic-minilm")
    options.add_argument(
        "--sizes", default=",".join(map(str, SIZES)), metavar="N,...", help="numbers of demonstrations"
    )
    options.add_argument("--runs", type=int, default=15, metavar="N")
    options.add_argument("--output", required=True, type=Path, metavar="DIR")
    return options


def measure(options: argparse.Namespace) -> int:
    encoder = EpicEncoder.from_pretrained(options.model, device="cpu", dtype="auto")
    query = "how do I rotate the log files of the server every night?"
    encoder.encode_query(query, instruction="")
    rows, bars = [], list[Bar]()
    for n in map(int, options.sizes.split(",")):
        bank = DemonstrationBank([(f"query {row}", f"passage {row}") for row in range(n)], instruction="")
        bank.embed(RandomVectors(encoder))
        with tempfile.TemporaryDirectory() as folder:
            times = [time.perf_counter()]
            bank.prepare(RandomVectors(encoder))
            times.append(time.perf_counter())
            bank.save(folder)
            times.append(time.perf_counter())
            bank = DemonstrationBank.load(folder)
            encoder.encode_query(query, bank=bank, strategy="reader")
            times.append(time.perf_counter())
            assert len(bank.demonstrations) == len(bank.embeddings_for(encoder.fingerprint)) == n
            times.append(time.perf_counter())
            bank = DemonstrationBank.load(folder)
            seconds = [after - before for before, after in pairwise(times)]
        if n == BUILT:
            bars.append(Bar("seconds to build a bank of 1,000 embedded pairs", sum(seconds[:2]), LONGEST_BUILD, True))
        timings = interleaved(
            {
                "zero-shot": partial(encoder.encode_query, query, instruction=""),
                "reader": partial(encoder.encode_query, query, bank=bank, strategy="reader"),
            },
            options.runs,
            encoder.device,
        )
        bar = ratio(
            f"seconds of a query with {n:,} demonstrations / without",
            timings["reader"],
            timings["zero-shot"],
            LARGEST_SHARE,
            at_most=True,
        )
        bars.append(bar)
        rows.append([f"{n:,}", *(f"{each:.3f}" for each in seconds)])
    header = ["demonstrations", "seconds to prepare", "to save", "to load and query", "to read texts and vectors"]
    table = markdown_table(header, rows, text_columns=0)
    markdown = f"{encoder.name}, one query.\n\n{table}\n\n{bars_table(bars)}"
    write(options.output, "reader", markdown, bars, torch.device("cpu"))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
