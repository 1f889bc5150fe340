"""Compare demonstrations with training on the same pairs, the upper bound of what they can teach.

    python benchmarks/fine_tuning.py --heldout FILE [--heldout FILE ...] [--model NAME] [--n 512] [--draw SEED]
                                     [--arms ARM,...] [--set NAME=VALUE ...]

For each file, n pairs are drawn as `epic-rag eval --few-shot` draws them. The reader is given them as demonstrations;
recipe `own-data` trains on them, once the query weights alone and without an instruction (`queries`: nothing is indexed
again), and once all weights, as the recipe is (`everything`: all documents are embedded anew). nDCG@10 of the file's
test queries, among its own documents and among those of all files with their other queries.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench_common import run_main, split_names
from pair_tasks import COLLECTIONS, embed_tasks, mean_scores, pair_tasks

from epic_rag import EpicEncoder
from epic_rag.evaluation.few_shot_collections import CollectionFamily, TaskVectors
from epic_rag.evaluation.heldout import Collection
from epic_rag.evaluation.report import markdown_table
from epic_rag.training import Trainer, load_recipe

ARMS = {"queries": ["freeze_documents=true", "default_instruction="], "everything": []}
"""Settings of recipe own-data by arm."""

Scores = dict[Collection, float]


def reader_scores(
    encoder: EpicEncoder, task: TaskVectors, families: Sequence[CollectionFamily], rows: Sequence[int]
) -> Scores:
    """Return the mean nDCG@10 in each collection with demonstrations that are read against it."""
    found = {}
    for family in families:
        for name, ranking in family.rankings.items():
            documents = family.documents.documents[: ranking.documents]
            moved = encoder.reader.prepare(task.pairs[rows], documents).apply(task.queries)
            scores = family.ndcg_in(name, np.asarray(moved @ documents.T, dtype=np.float32))
            found[name] = float(100 * scores["dense"].mean())
    return found


def train(arm: str, pairs: Sequence[tuple[str, str]], model: str, settings: Sequence[str]) -> EpicEncoder:
    """Train on pairs with recipe own-data."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with gzip.open(folder / "pairs.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"query": query, "positive": passage}) + "\n" for query, passage in pairs)
        chosen = [f"data={folder}", "tasks=[pairs]", f"model={model}", *ARMS[arm], *settings]
        final = Trainer(load_recipe("own-data", chosen, output=str(folder / "run"))).train(show_progress=False)
        return EpicEncoder.from_pretrained(final, device="cpu", dtype="auto")


def table(found: Sequence[tuple[str, int, Scores, dict[str, Scores]]], arms: Sequence[str]) -> str:
    """Return the gains of tasks, and their means over tasks.

    Args:
        found: Task, number of pairs, scores without them, and scores by arm.
        arms: Names of the arms, in order.
    """
    rows = [
        [
            task,
            COLLECTIONS[name],
            str(n),
            f"{zero[name]:.2f}",
            *(f"{reached[arm][name] - zero[name]:+.2f}" for arm in arms),
        ]
        for task, n, zero, reached in found
        for name in COLLECTIONS
    ]
    for name, label in COLLECTIONS.items():
        for n in dict.fromkeys(n for _, n, _, _ in found):
            of_size = [(zero[name], reached) for _, size, zero, reached in found if size == n]
            if len(of_size) > 1:
                gains = [np.mean([reached[arm][name] - zero for zero, reached in of_size]) for arm in arms]
                score = np.mean([zero for zero, _ in of_size])
                rows.append(["**mean**", label, str(n), f"{score:.2f}", *(f"{gain:+.2f}" for gain in gains)])
    header = ["task", "collection", "n", "n = 0", arms[0], *(f"trained: {arm}" for arm in arms[1:])]
    return markdown_table(header, rows, text_columns=2)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="benchmarks/fine_tuning.py", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--heldout", action="append", required=True, metavar="FILE", help="a file of pairs")
    options.add_argument("--model", default="epic-minilm", metavar="MODEL")
    options.add_argument("--n", default="512", metavar="N,...", help="numbers of pairs")
    options.add_argument("--arms", default=",".join(ARMS), metavar="NAME,...", help=f"of {', '.join(ARMS)}")
    options.add_argument("--draw", type=int, default=0, metavar="SEED")
    options.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the recipe")
    options.add_argument("--queries", type=int, default=300, metavar="N")
    options.add_argument("--documents", type=int, default=2000, metavar="N")
    return options


def measure(given: argparse.Namespace) -> int:
    arms, sizes = split_names(given.arms, list(ARMS)), [int(part) for part in given.n.split(",")]
    limits = {"queries": given.queries, "documents": given.documents}
    encoder = EpicEncoder.from_pretrained(given.model, device="cpu", dtype="auto")
    vectors, families = embed_tasks(pair_tasks(given.heldout, encoder, sizes=sizes, **limits), encoder)
    found = []
    for number, task in enumerate(vectors):
        for n in (n for n in sizes if n <= len(task.pairs)):
            rows = task.draw(n, given.draw)
            pairs = [(task.split.pool[row].query, task.split.pool[row].passage) for row in rows]
            reached = {"reader": reader_scores(encoder, task, families[number], rows)}
            for arm in arms:
                started = time.monotonic()
                trained = train(arm, pairs, given.model, given.set)
                took = time.monotonic() - started
                print(f"note: {task.split.name}, n = {n}: {arm} {took:.0f} s", file=sys.stderr, flush=True)
                splits = pair_tasks(given.heldout, trained, sizes=sizes, **limits)
                reached[arm] = mean_scores(embed_tasks(splits, trained)[1][number])
            found.append((task.split.name, n, mean_scores(families[number]), reached))
    print(table(found, ["reader", *arms]))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
