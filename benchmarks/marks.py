"""When is a query asked again? Ways of deciding it, compared on files of pairs.

    python benchmarks/marks.py --data DIR [--files NAME,...] [--model NAME] [--count N] [--output DIR]

An example of a bank puts its passage first if its query is asked again (`epic_rag_chroma.search.marks`). For each way
and file: how many of the first N queries have another query, with other characters, that counts as the same, and the
share of these for which one of them has the same passage. Files label one passage a row, so the share is a lower bound:
the first column, in which the queries have the same words, shows how low. Writes marks.md to the output folder.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from epic_rag import EpicEncoder
from epic_rag.errors import EpicError
from epic_rag.evaluation.report import markdown_table
from epic_rag.files import read_jsonl
from epic_rag_chroma.search.marks import same_query_key
from epic_rag_chroma.store.tokenizer import STOP_WORDS, words

FILES = ("squad_sentence", "nl2bash", "medquad", "snips_intent")
LEAST = 0.9


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder of NAME.jsonl.gz")
    options.add_argument("--files", default=",".join(FILES), metavar="NAME,...")
    options.add_argument("--model", default="epic-minilm", metavar="NAME")
    options.add_argument("--count", type=int, default=600, metavar="N", help="rows of a file, sorted by passage")
    options.add_argument("--output", type=Path, default=Path("runs/bench"), metavar="DIR")
    return options


def same_by_key(keys: Sequence[Hashable]) -> list[list[int]]:
    """Return for each query the others with its key."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    return [[other for other in groups[key] if other != row] for row, key in enumerate(keys)]


def main() -> int:
    options = parser().parse_args()
    try:
        encoder = EpicEncoder.from_pretrained(options.model)
        table = []
        for name in options.files.split(","):
            rows = [row for _, row in read_jsonl(options.data / f"{name}.jsonl.gz")]
            # Sorted, so that queries of one passage are side by side; the rows are those in the middle of the file.
            rows.sort(key=lambda row: str(row["positive"]))
            start = max(0, (len(rows) - options.count) // 2)
            rows = rows[start : start + options.count]
            queries, passages = [str(row["query"]) for row in rows], [row["positive"] for row in rows]
            vectors = encoder.encode_query(queries, task="docs")
            cosines = vectors @ vectors.T
            ways = {
                "words": same_by_key([tuple(words(each)) for each in queries]),
                "marks": same_by_key([same_query_key(each) for each in queries]),
                "content": same_by_key([tuple(x for x in words(each) if x not in STOP_WORDS) for each in queries]),
                "cosine": [[int(other) for other in np.flatnonzero(row >= LEAST)] for row in cosines],
            }
            plain = [" ".join(each.casefold().split()) for each in queries]
            cells = []
            for same in ways.values():
                others = [[other for other in each if plain[other] != plain[row]] for row, each in enumerate(same)]
                right = [
                    any(passages[other] == passages[row] for other in each) for row, each in enumerate(others) if each
                ]
                cells.append(f"{len(right)}: {np.mean(right):.0%}" if right else "0")
            table.append([name, str(len(rows)), *cells])
            print(" ".join(table[-1]), file=sys.stderr, flush=True)
    except EpicError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    head = [
        "file",
        "queries",
        "same words",
        "without fillers (marks)",
        "without stop words",
        f"cosine of {LEAST} or more",
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    text = markdown_table(head, table, text_columns=1)
    (options.output / "marks.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
