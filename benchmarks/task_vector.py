"""Strength of the task vector by nDCG@10 on pairs that the checkpoint was trained on, and its cost.

    python benchmarks/task_vector.py --pairs squad_sentence.jsonl.gz,medquad.jsonl.gz --output DIR

`epic_rag.task_vector` takes its strength from this table, so none of these files may show how good the result is; that
is what the held-out files of docs/results.md are for. Writes task_vector.json and task_vector.md to DIR.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import Bar, bars_table, interleaved, ratio, run_main, say, write

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.evaluation.embedding_store import EmbeddingStore, Vectors, make_prompt
from epic_rag.evaluation.heldout import (
    Collection,
    HeldoutScore,
    HeldoutSplit,
    in_collection,
    make_split,
    score_heldout,
    with_instruction,
)
from epic_rag.evaluation.report import markdown_table
from epic_rag.evaluation.runner import COLLECTIONS, parse_choices
from epic_rag.metrics import unit_rows
from epic_rag.query_prompt import QueryPrompt
from epic_rag.task_vector import task_vector


class Moving:
    """Encoder with task vectors of another strength.

    Args:
        encoder: Embeds the demonstrations.
        store: Its vectors of everything else, which no strength changes.
        strength: See `epic_rag.task_vector.task_vector`.
    """

    def __init__(self, encoder: EpicEncoder, store: EmbeddingStore, strength: float) -> None:
        self._encoder = encoder
        self._store = store
        self._strength = strength
        self.fingerprint = f"{encoder.fingerprint}-{strength}"
        self.dimension = encoder.dimension

    def encode_query(
        self,
        texts: Sequence[str],
        prompt: QueryPrompt | None = None,
        **options: Any,
    ) -> Vectors:
        prompt = prompt or make_prompt(None)
        bank = prompt.resolve_bank()
        if bank is None:
            return self._store.queries(texts, prompt)
        zero_shot = self._store.queries(texts, make_prompt(bank.instruction))
        copied = bank.copy()
        copied.embed(self._encoder)
        pairs = copied.embeddings_for(self._encoder.fingerprint)
        return unit_rows(zero_shot + task_vector(pairs, strength=self._strength))

    def encode_document(self, texts: Sequence[str], **options: Any) -> Vectors:
        return self._store.documents(texts)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--pairs", required=True, metavar="FILE,...", help="JSON lines of pairs")
    options.add_argument("--model", help="default: the shipped checkpoint")
    options.add_argument("--strengths", default="0.35,0.7,1,1.4", metavar="S,...")
    options.add_argument("--collections", default="own,pooled-with-queries", metavar="NAME,...")
    options.add_argument("--k", type=int, default=8)
    options.add_argument("--queries", type=int, default=200, metavar="N", help="of each file")
    options.add_argument("--documents", type=int, default=1000, metavar="N", help="of each file")
    options.add_argument("--draws", type=int, default=2, metavar="N", help="draws of demonstrations")
    options.add_argument("--runs", type=int, default=15, metavar="N", help="of the timing")
    options.add_argument("--output", required=True, type=Path, metavar="DIR")
    return options


def cost(encoder: EpicEncoder, split: HeldoutSplit, k: int, runs: int) -> list[Bar]:
    """Compare the seconds with and without a task vector, one query after the other and in a batch."""
    texts = list(split.queries[:32])
    bank = DemonstrationBank([(pair.query, pair.passage) for pair in split.pool[:k]], instruction="")
    bank.embed(encoder)

    def zero_shot(given: str | list[str]) -> Vectors:
        return encoder.encode_query(given, instruction="")

    def moved(given: str | list[str]) -> Vectors:
        return encoder.encode_query(given, bank=bank, num_demonstrations=k, strategy="task-vector")

    seconds = interleaved(
        {
            "zero-shot, single": lambda: [zero_shot(text) for text in texts],
            "task vector, single": lambda: [moved(text) for text in texts],
            "zero-shot, batch": lambda: zero_shot(texts),
            "task vector, batch": lambda: moved(texts),
        },
        runs,
        encoder.device,
    )
    return [
        ratio(
            f"seconds with a task vector / without demonstrations, {way}",
            seconds[f"task vector, {way}"],
            seconds[f"zero-shot, {way}"],
            1.05,
            at_most=True,
        )
        for way in ("single", "batch")
    ]


def measure(options: argparse.Namespace) -> int:
    encoder = EpicEncoder.from_pretrained(options.model, device="cpu", dtype="auto")
    wanted: tuple[Collection, ...] = parse_choices([options.collections], COLLECTIONS, "--collections")
    same = EmbeddingStore(encoder)
    files = [
        make_split(Path(place), queries=options.queries, documents=options.documents, seed=0)
        for place in options.pairs.split(",")
    ]
    splits = {collection: in_collection(files, collection) for collection in wanted}
    rows, scores = [], []
    for strength in map(float, options.strengths.split(",")):
        store = EmbeddingStore(Moving(encoder, same, strength))
        for collection, parts in splits.items():
            say(f"strength {strength}, {collection}")
            found: list[dict[tuple[str, int], HeldoutScore]] = []
            for number, part in enumerate(parts):
                result = score_heldout(
                    store,
                    with_instruction(part, "default", default=encoder.default_instruction),
                    ks=[options.k],
                    draws=options.draws,
                    controls=True,
                    foreign_pool=parts[(number + 1) % len(parts)].pool if len(parts) > 1 else None,
                )
                found.append({(score.condition, score.k): score for score in result.scores})
                scores += [
                    {"strength": strength, "collection": collection, "file": part.name, **asdict(score)}
                    for score in result.scores
                ]
            zero = np.mean([each["none", 0].ndcg_at_10 for each in found])
            shown = [
                np.mean([each[condition, options.k].ndcg_at_10 for each in found]) - zero
                for condition in ("own", "shuffled", "foreign")
                if all((condition, options.k) in each for each in found)
            ]
            rows.append([f"{strength:g}", collection, f"{100 * zero:.2f}", *(f"{100 * value:+.2f}" for value in shown)])
    head = (
        f"{encoder.name}, default instruction, means of {len(files)} files ({', '.join(each.name for each in files)}); "
        f"nDCG@10 times 100, and what {options.k} demonstrations add."
    )
    header = ["strength", "collection", "k = 0", "own", "shuffled", "of another task"][: len(rows[0])]
    table = markdown_table(header, rows, text_columns=2)
    bars = cost(encoder, files[0], options.k, options.runs)
    markdown = f"{head}\n\n{table}\n\n{bars_table(bars)}"
    write(options.output, "task_vector", markdown, bars, torch.device("cpu"), scores=scores)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
