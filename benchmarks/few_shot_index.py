"""Measure the gain by demonstrations through an index, as `epic-rag query` answers, and the cost of a bank.

    python benchmarks/few_shot_index.py --heldout FILE [--model NAME] [--n 8,128,512] [--strategies reader,task-vector]

Each document of the task becomes a file, and the folder is indexed. Its queries are searched in modes dense and hybrid,
first with the instruction alone, then with banks of n demonstrations. The contents of the index folder are compared by
hash before and after: demonstrations change queries only.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench_common import run_main
from pair_tasks import pair_tasks

from epic_rag import DemonstrationBank, EpicEncoder, QueryPrompt
from epic_rag.evaluation.heldout import HeldoutSplit
from epic_rag.evaluation.report import markdown_table
from epic_rag_chroma import NO_CHROMA, ChromaIndexer, SearchMode, SearchRequest

MODES: tuple[SearchMode, ...] = ("dense", "hybrid")
CUT = 10


def ndcg(task: HeldoutSplit, rankings: Sequence[Sequence[int]]) -> np.ndarray:
    """Return nDCG@10 of each query, times 100."""
    discounts = 1.0 / np.log2(np.arange(2, CUT + 2))
    found = []
    for ranking, relevant, skipped in zip(rankings, task.relevant, task.excluded, strict=True):
        rows = [row for row in dict.fromkeys(ranking) if row not in skipped][:CUT]
        gain = sum(discounts[rank] for rank, row in enumerate(rows) if row in relevant)
        found.append(100 * gain / discounts[: max(1, min(CUT, len(relevant)))].sum())
    return np.array(found)


def folder_hash(folder: Path) -> str:
    """Hash the names and contents of an index folder's files, but for locks and SQLite's shared memory."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.suffix != ".lock" and not file.name.endswith(("-shm", "-wal")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def measure(task: HeldoutSplit, encoder: EpicEncoder, sizes: Sequence[int], strategies: Sequence[str]) -> str:
    """Index a task's documents, search, and return the tables."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "documents"
        folder.mkdir()
        for row, text in enumerate(task.documents):
            (folder / f"{row:06}.txt").write_text(text, encoding="utf-8")
        index = folder / ".epic-rag"
        with ChromaIndexer(index, encoder=encoder, chroma=NO_CHROMA) as indexer:
            indexer.index([folder])

            def search(mode: SearchMode, prompt: QueryPrompt) -> np.ndarray:
                request = SearchRequest(prompt=prompt, k=3 * CUT, mode=mode, collapse=False)
                answers = indexer.query_many(task.queries, request)
                return ndcg(task, [[int(Path(hit.path).stem) for hit in hits] for hits in answers])

            zero = {mode: search(mode, QueryPrompt(instruction=task.instruction)) for mode in MODES}
            before = folder_hash(index)
            rows, costs = [], []
            pool = [(pair.query, pair.passage) for pair in task.pool]
            random.Random(0).shuffle(pool)
            for n in (n for n in sizes if n <= len(pool)):
                bank = DemonstrationBank(pool[:n], instruction=task.instruction)
                bank.embed(encoder)
                started = time.perf_counter()
                if n >= 10:
                    bank.evaluate(encoder)
                bank.save(Path(temporary) / "bank")
                costs.append([str(n), f"{time.perf_counter() - started:.2f}"])
                for strategy in strategies:
                    for mode in MODES:
                        gains = search(mode, QueryPrompt(bank=bank, strategy=strategy)) - zero[mode]
                        error = gains.std(ddof=1) / len(gains) ** 0.5
                        score = f"{zero[mode].mean():.2f}"
                        rows.append([task.name, strategy, mode, str(n), score, f"{gains.mean():+.2f} ± {error:.2f}"])
            if folder_hash(index) != before:
                raise SystemExit("The index changed while queries were answered.")
    header = ["task", "strategy", "mode", "demonstrations", "k = 0", "gain"]
    return "\n\n".join(
        [
            markdown_table(header, rows, text_columns=3),
            markdown_table(["pairs", "seconds to measure and save an embedded bank"], costs, text_columns=0),
            f"The index folder has the same contents before and after: SHA-256 {before[:16]}.",
        ]
    )


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="benchmarks/few_shot_index.py", description=(__doc__ or "").partition("\n")[0]
    )
    options.add_argument("--heldout", action="append", required=True, metavar="FILE", help="a file of pairs")
    options.add_argument("--model", default=None, metavar="MODEL")
    options.add_argument("--n", default="8,128,512", metavar="N,...", help="numbers of demonstrations")
    options.add_argument("--strategies", default="reader,task-vector", metavar="NAME,...")
    options.add_argument("--queries", type=int, default=200, metavar="N")
    options.add_argument("--documents", type=int, default=2000, metavar="N")
    return options


def report(given: argparse.Namespace) -> int:
    encoder = EpicEncoder.from_pretrained(given.model, device="cpu", dtype="auto")
    sizes = [int(part) for part in given.n.split(",")]
    limits = {"queries": given.queries, "documents": given.documents}
    for task in pair_tasks(given.heldout, encoder, sizes=sizes, **limits):
        print(measure(task, encoder, sizes, given.strategies.split(",")))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(parser(), report, arguments)


if __name__ == "__main__":
    sys.exit(main())
