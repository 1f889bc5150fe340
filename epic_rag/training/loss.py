"""InfoNCE over in-batch documents, with false negatives masked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from epic_rag.training.data import TrainingBatch

__all__ = ["false_negatives", "info_nce"]


def info_nce(
    queries: torch.Tensor, documents: torch.Tensor, *, temperature: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Contrastive loss (van den Oord et al. 2018; EPIC, arXiv 2605.01372, section 3).

    Args:
        queries: (n, dim) unit vectors.
        documents: (m, dim) unit vectors, m >= n; document i is query i's positive.
        temperature: Divides the cosines.
        mask: (n, m) bool, True where a document is no negative of a query although it is not its positive
            (same text, same group). The positive itself is never masked.

    Returns:
        Scalar mean loss.

    Example:
        >>> eye = torch.eye(3)
        >>> bool(info_nce(eye, eye, temperature=0.05) < 1e-6)
        True
    """
    scores = queries @ documents.T / temperature  # (n, m)
    targets = torch.arange(len(queries), device=queries.device)
    if mask is not None:
        keep = mask.clone()
        keep[targets, targets] = False
        scores = scores.masked_fill(keep, float("-inf"))
    return nn.functional.cross_entropy(scores, targets)


def false_negatives(batch: TrainingBatch) -> torch.Tensor:
    """Which documents are no negatives of which queries.

    Columns are the batch's positives, row by row, and then its hard negatives. No negatives of a row are the texts of
    its own positive, of the positives of its task's rows that have its group or its query, and, in a symmetric task,
    of its query itself.

    Returns:
        (pairs, pairs + hard negatives) bool. True for a row's own positive, too.
    """
    rows = [(task, row) for task in batch.tasks for row in task.rows]
    texts = [row.positive for _, row in rows] + [text for _, row in rows for text in row.negatives]
    columns: dict[str, list[int]] = {}
    for column, text in enumerate(texts):
        columns.setdefault(text, []).append(column)
    related: dict[tuple[str, str, str], set[str]] = {}
    for task, row in rows:
        for kind, value in (("query", row.query), ("group", row.group)):
            if value is not None:
                related.setdefault((task.name, kind, value), set()).add(row.positive)
    mask = torch.zeros((len(rows), len(texts)), dtype=torch.bool)
    for index, (task, row) in enumerate(rows):
        excluded = {row.positive} | related[task.name, "query", row.query]
        if row.group is not None:
            excluded |= related[task.name, "group", row.group]
        if task.symmetric:
            excluded.add(row.query)
        for text in excluded:
            for column in columns.get(text, ()):
                mask[index, column] = True
    return mask
