"""Compare demonstrations with training on the same pairs, the upper bound of what they can teach.

    python benchmarks/fine_tuning.py --heldout FILE [--heldout FILE ...] [--model NAME] [--n 128,1500] [--draw SEED]
                                     [--arms ARM,...] [--set NAME=VALUE ...]

For each file, n pairs are drawn as `epic-rag eval --few-shot` draws them. The reader is given them as demonstrations;
recipe `own-data` trains on them, once its query weights alone (`queries`: nothing is indexed again) and once all
weights (`everything`: all documents are embedded anew). nDCG@10 of the file's test queries, among its own documents and
among those of all files with their other queries.
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

from epic_rag import EpicEncoder
from epic_rag.evaluation.embedding_store import EmbeddingStore
from epic_rag.evaluation.few_shot import load_few_shot_tasks
from epic_rag.evaluation.few_shot_collections import CollectionFamily, TaskVectors, families_of_tasks
from epic_rag.evaluation.heldout import Collection, HeldoutSplit
from epic_rag.evaluation.report import markdown_table
from epic_rag.training import Trainer, load_recipe

ARMS = {"queries": ["freeze_documents=true", "default_instruction="], "everything": []}
"""Settings of recipe own-data by arm."""
COLLECTIONS: dict[Collection, str] = {"own": "own documents", "pooled-with-queries": "mixed, with queries"}


def embed(
    splits: Sequence[HeldoutSplit], encoder: EpicEncoder
) -> tuple[list[TaskVectors], list[list[CollectionFamily]]]:
    """Return the vectors of all tasks, and for each task its collections with the scores without examples."""
    store = EmbeddingStore(encoder, precision=str(encoder.dtype).removeprefix("torch."))
    vectors = [TaskVectors(store, split) for split in splits]
    return vectors, list(families_of_tasks(vectors, tuple(COLLECTIONS), bm25=False))


def score(families: Sequence[CollectionFamily]) -> dict[str, float]:
    """Return the mean nDCG@10 of each collection, times 100."""
    return {
        name: float(100 * ranking.zero["dense"].mean())
        for family in families
        for name, ranking in family.rankings.items()
    }


def train(arm: str, pairs: Sequence[tuple[str, str]], model: str, settings: Sequence[str], folder: Path) -> EpicEncoder:
    """Train on pairs with recipe own-data."""
    folder.mkdir(parents=True)
    with gzip.open(folder / "pairs.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"query": query, "positive": passage}) + "\n" for query, passage in pairs)
    chosen = [f"data={folder}", "tasks=[pairs]", f"model={model}", *ARMS[arm], *settings]
    Trainer(load_recipe("own-data", chosen, output=str(folder / "run"))).train(show_progress=False)
    return EpicEncoder.from_pretrained(folder / "run" / "final", device="cpu", dtype="auto")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/fine_tuning.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--heldout", action="append", required=True, metavar="FILE", help="a file of pairs")
    parser.add_argument("--model", default="epic-minilm", metavar="MODEL")
    parser.add_argument("--n", default="128,1500", metavar="N,...", help="numbers of pairs")
    parser.add_argument("--arms", default=",".join(ARMS), metavar="NAME,...", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--draw", type=int, default=0, metavar="SEED")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the recipe")
    parser.add_argument("--queries", type=int, default=300, metavar="N")
    parser.add_argument("--documents", type=int, default=2000, metavar="N")
    given = parser.parse_args(arguments)
    sizes = [int(part) for part in given.n.split(",")]
    encoder = EpicEncoder.from_pretrained(given.model, device="cpu", dtype="auto")

    def tasks_for(model: EpicEncoder) -> list[HeldoutSplit]:
        return load_few_shot_tasks(
            given.heldout,
            None,
            None,
            queries=given.queries,
            documents=given.documents,
            sizes=sizes,
            instruction="default",
            default_instruction=model.default_instruction,
        )

    vectors, families = embed(tasks_for(encoder), encoder)
    rows: list[list[str]] = []
    for number, task in enumerate(vectors):
        zero = score(families[number])
        for n in (n for n in sizes if n <= len(task.pairs)):
            drawn = task.draw(n, given.draw)
            gains: dict[str, dict[str, float]] = {"reader": {}}
            for family in families[number]:
                for name, ranking in family.rankings.items():
                    documents = family.documents.documents[: ranking.documents]
                    moved = encoder.reader.prepare(task.pairs[drawn], documents).apply(task.queries)
                    found = family.ndcg_in(name, np.asarray(moved @ documents.T, dtype=np.float32))["dense"]
                    gains["reader"][name] = float(100 * found.mean()) - zero[name]
            pairs = [(task.split.pool[row].query, task.split.pool[row].passage) for row in drawn]
            seconds = {"reader": 0.0}
            for arm in given.arms.split(","):
                started = time.monotonic()
                with tempfile.TemporaryDirectory() as temporary:
                    trained = train(arm, pairs, given.model, given.set, Path(temporary) / "own-data")
                seconds[arm] = time.monotonic() - started
                reached = score(embed(tasks_for(trained), trained)[1][number])
                gains[arm] = {name: reached[name] - zero[name] for name in zero}
            for name, label in COLLECTIONS.items():
                line = [f"{gains[arm][name]:+.2f}" for arm in gains]
                rows.append([task.split.name, label, str(n), f"{zero[name]:.2f}", *line])
            took = ", ".join(f"{arm} {seconds[arm]:.0f} s" for arm in gains if arm != "reader")
            print(f"note: {task.split.name}, n = {n}: {took}", file=sys.stderr, flush=True)
    header = ["task", "collection", "n", "n = 0", "reader", *(f"trained: {arm}" for arm in given.arms.split(","))]
    for label in COLLECTIONS.values():
        for n in sizes:
            chosen = [row for row in rows if row[1] == label and row[2] == str(n)]
            if len(chosen) > 1:
                means = [np.mean([float(row[column]) for row in chosen]) for column in range(3, len(header))]
                rows.append(["**mean**", label, str(n), f"{means[0]:.2f}", *(f"{mean:+.2f}" for mean in means[1:])])
    print(markdown_table(header, rows, text_columns=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
