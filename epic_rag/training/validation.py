"""nDCG@10 on rows that were kept out of training: quick, brute force, for use during a run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from epic_rag.demonstrations import DemonstrationBank
from epic_rag.metrics import ndcg_at_k

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder
    from epic_rag.training.data import Pair, PairDataset

__all__ = ["evaluate_held_out"]


def evaluate_held_out(
    encoder: EpicEncoder,
    dataset: PairDataset,
    ks: Sequence[int],
    *,
    strategy: Literal["epic", "text", "none"] = "epic",
    demonstrations: Sequence[Pair] | None = None,
    instructed: bool = True,
    distractors: int = 300,
) -> dict[str, float]:
    """Rank a task's held-out queries' positives among those of some training rows.

    Demonstrations are training rows, or rows of the held-out sources; never held-out rows.

    Args:
        encoder: In evaluation mode.
        dataset: With held-out rows.
        ks: Numbers of demonstrations.
        strategy: The one of the training run; "none" shows nothing.
        demonstrations: A bank, used from the first on; None for a draw of training rows.
        instructed: True to give queries the task's instruction, False for none.
        distractors: Number of training rows whose positives are ranked, too.

    Returns:
        {"k=0": nDCG@10 in points, ...}
    """
    rng = random.Random(f"evaluation-{dataset.name}")
    rows = dataset.held_out
    pool = dataset.rows if dataset.distractors is None else dataset.distractors
    others = rng.sample(pool, min(len(pool), distractors + 3 * max([*ks, 1])))
    positives = {row.positive for row in rows}
    source = others if demonstrations is None else demonstrations
    shown = [(row.query, row.positive) for row in source if row.positive not in positives or dataset.label_like]
    instruction = (dataset.instruction or "") if instructed else ""
    bank = DemonstrationBank(shown[: max(ks, default=0)], instruction=instruction, symmetric=dataset.symmetric)
    texts = list(dict.fromkeys(row.positive for row in [*rows, *others]))
    column = {text: number for number, text in enumerate(texts)}
    groups: dict[str, set[int]] = {}
    for row in [*rows, *others]:
        groups.setdefault(row.positive if row.group is None else row.group, set()).add(column[row.positive])
    relevant = [list(groups[row.positive if row.group is None else row.group]) for row in rows]
    if dataset.symmetric:
        documents = encoder.encode_query(texts, instruction=instruction)
    else:
        documents = encoder.encode_document(texts)
    scores = {}
    for k in ks:
        queries = encoder.encode_query(
            [row.query for row in rows],
            bank=bank,
            num_demonstrations=0 if strategy == "none" else min(k, len(bank)),
            strategy="epic" if strategy == "none" else strategy,
        )
        scores[f"k={k}"] = round(100 * float(ndcg_at_k(queries, documents, relevant).mean()), 2)
    return scores
