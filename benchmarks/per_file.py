"""Limits of hits of one file, on manuals: what a limit costs those who seek one passage, and how many files they see.

    python benchmarks/per_file.py --set eval/manuals_git_apache [--model NAME] [--dtype bfloat16] [--cache-dir DIR]
                                  [--output DIR] [--document benchmarks/README.md]

Passages of a manual that follow one another are taken for a file, 5, 20 or 80 of them; each is a section of its own.
Rankings are those of hybrid search (`benchmarks/hybrid.py`), and the places are given by `choose`, as in an index. A
query's answer is usually one passage, so a limit can only cost nDCG; it buys the hits of other files.

Writes per_file.json and per_file.md to the output folder, and the table between the markers of the document.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import hybrid
import numpy as np
from bench_common import run_main
from hybrid import Ranked, fused, rank
from results_report import replace_between

from epic_rag import EpicEncoder
from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.errors import DataError
from epic_rag.evaluation.datasets import load_local_set
from epic_rag.evaluation.embedding_store import EmbeddingStore
from epic_rag.evaluation.report import markdown_table, versions
from epic_rag_chroma.search.passages import Candidate, choose
from epic_rag_chroma.store.database import Record

LIMITS = (0, 1, 2, 3, 5)
SIZES = (5, 20, 80)
HITS = 10


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--set", required=True, type=Path, metavar="DIR", help="a BEIR folder in the manuals' order")
    options.add_argument("--model", default=DEFAULT_CHECKPOINT)
    options.add_argument("--dtype")
    options.add_argument("--cache-dir", type=Path, metavar="DIR", help="where vectors are kept between runs")
    options.add_argument("--output", type=Path, default=Path("runs/per_file"), metavar="DIR")
    options.add_argument("--document", type=Path, metavar="FILE", help="a document with the markers `per_file`")
    return options


def limited(ranked: Ranked, size: int, limit: int) -> tuple[list[list[int]], float]:
    """Return the rankings of all queries under a limit, and the mean number of files among their hits."""
    rankings, files = [], []
    no_vector = np.zeros(1, np.float32)
    for ranking in fused(ranked):
        candidates = [
            Candidate(
                Record(
                    str(name), "", {"path": str(name // size), "position": name, "heading_path": str(name)}, no_vector
                ),
                -float(place),
                None,
                None,
            )
            for place, name in enumerate(ranking)
        ]
        chosen, _ = choose(candidates, HITS, per_file=limit, merge=True)
        numbers = [int(passage.best.row.id) for passage in chosen]
        rankings.append(numbers)
        files.append(len({number // size for number in numbers}))
    return rankings, float(np.mean(files))


def measure(options: argparse.Namespace) -> int:
    """Print and write the table."""
    local = load_local_set(options.set)
    encoder = EpicEncoder.from_pretrained(options.model, dtype=options.dtype)
    store = EmbeddingStore(encoder, folder=options.cache_dir, precision=options.dtype or "float32", show_progress=False)
    hybrid.duplicates = lambda *_: (0, [])  # takes longer than all else, and is not needed
    ranked = rank(local, store)
    found = {
        str(size): {
            str(limit): (ranked.ndcg(rankings), files)
            for limit in LIMITS
            for rankings, files in [limited(ranked, size, limit)]
        }
        for size in SIZES
    }
    rows = [
        [f"{size} passages", *(f"{score:.2f} ({files:.1f})" for score, files in limits.values())]
        for size, limits in found.items()
    ]
    heads = ["no limit", *(f"at most {limit}" for limit in LIMITS[1:])]
    table = markdown_table(["a file is", *heads], rows, text_columns=1)
    text = (
        f"{encoder.name}, {local.name}, {len(ranked.dense)} queries; nDCG@{HITS} (files among {HITS} hits).\n\n{table}"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "per_file.md").write_text(text + "\n", encoding="utf-8")
    record = {"scores": found, "versions": versions()}
    (options.output / "per_file.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.document is not None:
        replaced = replace_between(options.document.read_text("utf-8"), "per_file", text)
        if replaced is None:
            raise DataError(f"{options.document} has no markers `per_file`. Add them.")
        options.document.write_text(replaced, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
