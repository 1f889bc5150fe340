"""nDCG@10 on rows that were kept out of training: quick, brute force, for use during a run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from epic_rag.demonstrations import DemonstrationBank
from epic_rag.metrics import ndcg_at_k
from epic_rag.prompt import Strategy

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder
    from epic_rag.training.data import Pair, PairDataset

__all__ = ["evaluate_held_out"]


_DISTRACTORS = 300


def evaluate_held_out(
    encoder: EpicEncoder,
    dataset: PairDataset,
    ks: Sequence[int],
    *,
    strategy: Strategy = "epic",
    demonstrations: Sequence[Pair] | None = None,
) -> dict[str, float]:
    """Score a task's held-out queries among their positives and a few training documents.

    Demonstrations are training rows, never held-out ones.

    Args:
        encoder: In evaluation mode.
        dataset: With held-out rows.
        ks: Numbers of demonstrations.
        strategy: How they are shown; the one that the encoder is trained with.
        demonstrations: What is shown, from the first on; None for a draw of training rows.

    Returns:
        {"k=0": nDCG@10 in points, ...}
    """
    rng = random.Random(f"evaluation-{dataset.name}")
    rows = dataset.held_out
    spare = rng.sample(dataset.rows, min(len(dataset.rows), _DISTRACTORS + 3 * max([*ks, 1])))
    positives = {row.positive for row in rows}
    source = spare if demonstrations is None else demonstrations
    shown = [(row.query, row.positive) for row in source if row.positive not in positives or dataset.label_like]
    bank = DemonstrationBank(
        shown[: max(ks, default=0)], instruction=dataset.instruction or "", symmetric=dataset.symmetric
    )
    texts = list(dict.fromkeys([*(row.positive for row in rows), *(row.positive for row in spare)]))
    groups: dict[str, set[str]] = {}
    for row in [*rows, *spare]:
        groups.setdefault(row.group if row.group is not None else row.positive, set()).add(row.positive)
    row_of = {text: number for number, text in enumerate(texts)}
    relevant = [[row_of[text] for text in groups[row.group if row.group is not None else row.positive]] for row in rows]
    documents = (
        encoder.encode_query(texts, instruction=dataset.instruction or "")
        if dataset.symmetric
        else encoder.encode_document(texts)
    )
    scores = {}
    for k in ks:
        queries = encoder.encode_query(
            [row.query for row in rows], bank=bank, num_demonstrations=min(k, len(bank)), strategy=strategy
        )
        scores[f"k={k}"] = round(100 * float(ndcg_at_k(queries, documents, relevant).mean()), 2)
    return scores
