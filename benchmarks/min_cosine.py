"""Cosines of best hits: of questions that a collection answers, and of questions about something else.

    python benchmarks/min_cosine.py --pairs foldoc.jsonl.gz nl2bash.jsonl.gz ... [--model NAME] [--passages 300]
                                    [--queries 60] [--limits 0.2,0.25,0.3,0.35]

Each file of pairs is a collection of its first passages. Questions of the same rows are answered by it, those of the
other files are not. Prints the share of each for which a limit of the cosine leaves a hit: the default of
`epic-rag ask --min-cosine` should keep nearly all of the former.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from bench_common import run_main

from epic_rag import EpicEncoder
from epic_rag.errors import DataError
from epic_rag.evaluation.report import markdown_table
from epic_rag.files import read_jsonl

SEED = 0
Array = npt.NDArray[np.float32]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--pairs", nargs="+", type=Path, required=True, metavar="FILE", help="two or more files")
    options.add_argument("--model", help="default: the shipped checkpoint")
    options.add_argument("--passages", type=int, default=300, help="of each file")
    options.add_argument("--queries", type=int, default=60, help="of each file")
    options.add_argument("--limits", default="0.2,0.25,0.3,0.35", metavar="X,...")
    return options


def best_cosines(encoder: EpicEncoder, files: Sequence[Path], passages: int, queries: int) -> tuple[Array, Array]:
    """Return the best cosine of each question in its own collection, and of each in every other one."""
    asked, collections = [], []
    for file in files:
        rows = [row for _, row in itertools.islice(read_jsonl(file), passages)]
        collections.append(encoder.encode_document([row["positive"] for row in rows]))
        texts = sorted({row["query"] for row in rows})
        asked.append(encoder.encode_query(random.Random(SEED).sample(texts, min(queries, len(texts)))))
    best = [[(some @ collection.T).max(axis=1) for collection in collections] for some in asked]
    own = [row[number] for number, row in enumerate(best)]
    others = [part for number, row in enumerate(best) for place, part in enumerate(row) if place != number]
    return np.concatenate(own), np.concatenate(others)


def measure(options: argparse.Namespace) -> int:
    if len(options.pairs) < 2:
        raise DataError("--pairs names one file. Name at least two, so that there are questions about something else.")
    encoder = EpicEncoder.from_pretrained(options.model, device="cpu")
    own, others = best_cosines(encoder, options.pairs, options.passages, options.queries)
    rows = [
        [f"{limit:g}", f"{100 * (own >= limit).mean():.1f}", f"{100 * (others >= limit).mean():.1f}"]
        for limit in map(float, options.limits.split(","))
    ]
    header = ["least cosine", f"answered questions with a hit, % of {len(own)}", f"other questions, % of {len(others)}"]
    print(markdown_table(header, rows, text_columns=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
