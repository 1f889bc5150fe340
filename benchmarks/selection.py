"""How near the demonstrations are that each way of choosing shows; what they cost is in benchmarks/prompt_cache.py.

    python benchmarks/selection.py --pairs docs_questions.jsonl.gz,medquad.jsonl.gz --output DIR

Of each file the first pairs are the bank, and queries of the next ones ask. Writes selection.json and selection.md to
DIR.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from bench_common import run_main, say, write

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.demonstrations import Selection
from epic_rag.errors import DataError
from epic_rag.evaluation.heldout import file_stem, load_pairs
from epic_rag.evaluation.report import markdown_table

WAYS: tuple[Selection, ...] = ("first", "nearest-early", "nearest")
INSTRUCTION = "Given a query, retrieve what belongs to it"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--pairs", required=True, metavar="FILE,...", help="JSON lines of pairs")
    options.add_argument("--model", help="default: the shipped checkpoint")
    options.add_argument("--bank", type=int, default=200, metavar="N", help="pairs of each bank")
    options.add_argument("--queries", type=int, default=100, metavar="N")
    options.add_argument("--k", type=int, default=8)
    options.add_argument("--output", required=True, type=Path, metavar="DIR")
    return options


def measure(options: argparse.Namespace) -> int:
    encoder = EpicEncoder.from_pretrained(options.model, device="cpu", dtype="float32")
    rows = []
    for place in map(Path, options.pairs.split(",")):
        say(file_stem(place))
        pairs = load_pairs(place)
        if len(pairs) < options.bank + options.queries:
            raise DataError(
                f"{place} has {len(pairs)} pairs, {options.bank} + {options.queries} are needed; pass smaller --bank"
            )
        bank = DemonstrationBank(
            [(pair.query, pair.passage) for pair in pairs[: options.bank]], instruction=INSTRUCTION
        ).build(encoder)
        texts = [pair.query for pair in pairs[options.bank : options.bank + options.queries]]
        vectors = encoder.encode_query(texts, instruction=INSTRUCTION)
        chosen = {way: encoder.choose_demonstrations(texts, bank, options.k, selection=way) for way in WAYS}
        # Each query's cosine with the queries of the demonstrations that it is shown.
        near = {}
        for way, banks in chosen.items():
            shown = np.stack([each.require(encoder.fingerprint)[:, 0] for each in banks])  # (queries, k, dim)
            near[way] = float(np.einsum("qkd,qd->qk", shown, vectors).mean())
        both = zip(chosen["nearest"], chosen["nearest-early"], strict=True)
        same = np.mean([len({*a.demonstrations} & {*b.demonstrations}) / options.k for a, b in both])
        gained = (near["nearest-early"] - near["first"]) / (near["nearest"] - near["first"])
        rows.append([file_stem(place), *(f"{near[way]:.3f}" for way in WAYS), f"{same:.0%}", f"{gained:.0%}"])
    head = (
        f"{encoder.name}, {options.k} of {options.bank} demonstrations, {options.queries} queries a file: mean cosine "
        "of a query with the queries of its demonstrations."
    )
    header = ["pairs", *WAYS, "the same as nearest", "of nearest's gain over first"]
    table = markdown_table(header, rows, text_columns=1)
    write(options.output, "selection", f"{head}\n\n{table}", [], torch.device("cpu"), rows=rows, header=header)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
