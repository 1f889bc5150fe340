"""The loss of a step from its vectors.

    loss = c * (InfoNCE(q1, d) + w * InfoNCE(q0, d))             (EPIC, arXiv 2605.01372, section 3, where c = 1)
         + teacher_weight * distillation([q0; d])
         + mismatched_weight * consistency(q1, q0)               rows with deliberately wrong demonstrations

The first term is over the rows whose demonstrations are right; c is `contrastive_weight`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from epic_rag.errors import ConfigError, DataError
from epic_rag.training.config import TrainingConfig

if TYPE_CHECKING:
    from epic_rag.training.config import TrainingConfig
    from epic_rag.training.data import PairDataset, TrainingBatch
    from epic_rag.training.inputs import StepInputs

__all__ = [
    "Objective",
    "Terms",
    "asked_elsewhere",
    "consistency",
    "cosine_distillation",
    "false_negatives",
    "info_nce",
    "margin_mask",
    "matryoshka_info_nce",
    "negatives_mask",
    "own_negatives",
    "require_negatives",
]


# --- from loss
# The losses of a step, and which documents are negatives of which queries.


def info_nce(
    queries: torch.Tensor,
    documents: torch.Tensor,
    *,
    temperature: float,
    mask: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Contrastive loss (van den Oord et al. 2018; EPIC, arXiv 2605.01372, section 3).

        L = mean_i  -log  exp(q_i . d_i / t) / sum_j exp(q_i . d_j / t)

    Args:
        queries: (n, dim) unit vectors.
        documents: (m, dim) unit vectors.
        temperature: t, divides the cosines.
        mask: (n, m) bool, True where a document is no negative of a query although it is not its positive
            (same text, same group). The positive itself is never masked.
        targets: (n,) the position of each query's positive; None where document i is query i's.

    Returns:
        Scalar mean loss.

    Example:
        >>> eye = torch.eye(3)
        >>> bool(info_nce(eye, eye, temperature=0.05) < 1e-6)
        True
    """
    scores = queries @ documents.T / temperature  # (n, m)
    rows = torch.arange(len(queries), device=queries.device)
    targets = rows if targets is None else targets
    if mask is not None:
        keep = mask.clone()
        keep[rows, targets] = False
        scores = scores.masked_fill(keep, float("-inf"))
    return nn.functional.cross_entropy(scores, targets)


def matryoshka_info_nce(
    queries: torch.Tensor,
    documents: torch.Tensor,
    *,
    widths: Sequence[int],
    temperature: float,
    mask: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """InfoNCE at several widths (Kusupati et al. 2022, "Matryoshka Representation Learning").

        L = 1/|W| sum_{w in W} InfoNCE(q[:w] / |q[:w]|, d[:w] / |d[:w]|)

    with the full width always in W, so that vectors may be cut to any of the widths.

    Args:
        queries: (n, dim) unit vectors.
        documents: (m, dim) unit vectors.
        widths: Widths besides the full one.
        temperature: See `info_nce`.
        mask: See `info_nce`.
        targets: See `info_nce`.

    Returns:
        Scalar mean loss.

    Example:
        >>> eye = torch.eye(4)
        >>> whole = info_nce(eye, eye, temperature=1.0)
        >>> bool(matryoshka_info_nce(eye, eye, widths=[], temperature=1.0) == whole)
        True
    """
    full = queries.shape[1]
    losses = [info_nce(queries, documents, temperature=temperature, mask=mask, targets=targets)]
    for width in sorted(set(widths) - {full}):
        left, right = (nn.functional.normalize(side[:, :width], dim=-1) for side in (queries, documents))
        losses.append(info_nce(left, right, temperature=temperature, mask=mask, targets=targets))
    return torch.stack(losses).mean()


def cosine_distillation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of two encoders' cosines between the same texts.

        L = 1/n^2 sum_{i,j} (s_i . s_j - t_i . t_j)^2

    (Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation"; on cosines, so that widths may differ.)

    Args:
        student: (n, dim) unit vectors, with gradients.
        teacher: (n, width) unit vectors of the same texts; no gradients flow into them.

    Returns:
        Scalar, 0 where all cosines agree.

    Example:
        >>> student, teacher = torch.eye(2), torch.eye(3)[:2]
        >>> float(cosine_distillation(student, teacher))
        0.0
    """
    goal = teacher.detach().to(student.dtype)
    return nn.functional.mse_loss(student @ student.T, goal @ goal.T)


def vector_distillation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """How far an encoder's vectors are from another one's of the same texts.

        L = 1 - 1/n sum_i s_i . t_i

    (Reimers and Gurevych 2020, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation",
    section 2, who take the squared distance: for unit vectors twice this.)

    Args:
        student: (n, dim) unit vectors, with gradients.
        teacher: (n, dim) unit vectors of the same texts; no gradients flow into them.

    Returns:
        Scalar, 0 to 2.

    Example:
        >>> eye = torch.eye(2)
        >>> float(vector_distillation(eye, eye)), float(vector_distillation(eye, -eye))
        (0.0, 2.0)
    """
    return (1 - (student * teacher.detach().to(student.dtype)).sum(dim=-1)).mean()


def consistency(prompted: torch.Tensor, zero_shot: torch.Tensor) -> torch.Tensor:
    """How far wrong demonstrations move a query.

        L = mean_i (1 - cos(q1_i, stopgrad(q0_i)))

    A query whose demonstrations say nothing about what it wants should be read as if there were none.

    Args:
        prompted: (n, dim) unit vectors, q1.
        zero_shot: (n, dim) unit vectors, q0; no gradients flow into them.

    Returns:
        Scalar, 0 to 2.

    Example:
        >>> eye = torch.eye(2)
        >>> float(consistency(eye, eye)), float(consistency(eye, -eye))
        (0.0, 2.0)
    """
    return (1 - (prompted * zero_shot.detach()).sum(dim=-1)).mean()


def margin_mask(scores: torch.Tensor, own: torch.Tensor, margin: float) -> torch.Tensor:
    """In-batch documents that score too close to the positive to be sure negatives.

    (Moreira et al. 2024, "NV-Retriever", and Solatorio 2024, "GISTEmbed": a negative counts if it scores below the
    positive's score minus a margin. A negative margin leaves out only what scores above the positive by more.)

    Args:
        scores: (n, m) cosines without demonstrations; document i is query i's positive.
        own: (n, m) bool, a row's own hard negatives, which were chosen for it and always count.
        margin: Difference of cosines.

    Returns:
        (n, m) bool, True where a document is left out.

    Example:
        >>> scores = torch.tensor([[0.8, 0.79, 0.2], [0.1, 0.9, 0.95]])
        >>> margin_mask(scores, torch.zeros(2, 3, dtype=torch.bool), 0.05).tolist()
        [[False, True, False], [False, False, True]]
    """
    positives = scores.diagonal().unsqueeze(1)  # (n, 1)
    close = scores > positives - margin
    rows = torch.arange(len(scores), device=scores.device)
    close[rows, rows] = False
    return close & ~own


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


def asked_elsewhere(batch: TrainingBatch) -> torch.Tensor:
    """Which documents answer a row's query under another task of the batch.

    Without demonstrations nothing says which of the tasks is meant, so there they are no negatives.

    Returns:
        (pairs, pairs + hard negatives) bool.
    """
    rows = [(part, row.query) for part, task in enumerate(batch.tasks) for row in task.rows]
    counts = Counter(query for _, query in rows)
    mask = torch.zeros((len(rows), own_negatives(batch).shape[1]), dtype=torch.bool)
    for index, (part, query) in enumerate(rows):
        if counts[query] > 1:
            for column, (other, text) in enumerate(rows):
                mask[index, column] = other != part and text == query
    return mask


def own_negatives(batch: TrainingBatch) -> torch.Tensor:
    """(pairs, pairs + hard negatives) bool, True at a row's own hard negatives."""
    rows = [row for task in batch.tasks for row in task.rows]
    own = torch.zeros((len(rows), len(rows) + sum(len(row.negatives) for row in rows)), dtype=torch.bool)
    column = len(rows)
    for index, row in enumerate(rows):
        own[index, column : column + len(row.negatives)] = True
        column += len(row.negatives)
    return own


def negatives_mask(batch: TrainingBatch, config: TrainingConfig) -> torch.Tensor:
    """`false_negatives`, and every other row's document where a task has no in-batch negatives."""
    mask = false_negatives(batch)
    alone = [not _in_batch(config, task.name) for task in batch.tasks for _ in task.rows]
    if any(alone):
        mask |= torch.tensor(alone).unsqueeze(1) & ~own_negatives(batch)
    return mask


def require_negatives(datasets: Sequence[PairDataset], config: TrainingConfig) -> None:
    """Check that tasks without in-batch negatives have hard ones.

    Raises:
        DataError: If rows of one have none: they would have nothing to learn from.
    """
    for dataset in datasets:
        without = sum(not row.negatives for row in dataset.rows)
        if without and not _in_batch(config, dataset.name):
            raise DataError(
                f"{dataset.name} has {len(dataset.rows)} rows, {without} of them without hard negatives, and its "
                'in_batch_negatives is false; give each row "negatives", or set in_batch_negatives to true'
            )


def _in_batch(config: TrainingConfig, name: str) -> bool:
    return name not in config.tasks or config.tasks[name].in_batch_negatives


@dataclass(frozen=True)
class Terms:
    """A step's loss and what it is made of, each a scalar; all but `loss` without gradients.

    Attributes:
        loss: The weighted sum.
        with_demonstrations: InfoNCE(q1, d); 0 for strategy "none".
        zero_shot: InfoNCE(q0, d).
        teacher: Distillation; None without a teacher.
        mismatched: Consistency; None if no row of the batch is mismatched.
    """

    loss: torch.Tensor
    with_demonstrations: torch.Tensor
    zero_shot: torch.Tensor
    teacher: torch.Tensor | None = None
    mismatched: torch.Tensor | None = None


class Objective:
    """Computes the loss.

    Args:
        config: Temperature, weights, widths, margin.
        dimension: Width of the vectors.

    Raises:
        ConfigError: If a Matryoshka width is larger than the vectors.
    """

    def __init__(self, config: TrainingConfig, dimension: int) -> None:
        if any(width > dimension for width in config.matryoshka_dims):
            raise ConfigError(
                f"matryoshka_dims is {list(config.matryoshka_dims)}, the model's vectors have {dimension} dimensions; "
                "give smaller widths"
            )
        self.config = config

    def __call__(
        self,
        inputs: StepInputs,
        q0: torch.Tensor,
        d: torch.Tensor,
        q1: torch.Tensor | None,
        teacher: torch.Tensor | None = None,
    ) -> Terms:
        """The loss of a batch.

        Args:
            inputs: Which rows are what.
            q0: (queries, dim) zero-shot queries; the first `inputs.pairs` are the batch's.
            d: (documents, dim); the first `inputs.counted` are the batch's.
            q1: (pairs, dim) queries with demonstrations; None for strategy "none".
            teacher: (pairs + counted, width) the teacher's vectors of the batch's texts.
        """
        q0, d = q0[: inputs.pairs], d[: inputs.counted]
        # The transfer of the masks need not wait for the GPU.
        mask = inputs.mask.to(d.device, non_blocking=True)
        if self.config.false_negative_margin is not None:
            own = inputs.own.to(d.device, non_blocking=True)
            mask = mask | margin_mask(q0.detach() @ d.detach().T, own, self.config.false_negative_margin)
        # Without demonstrations nothing says under which task of the batch a query is asked.
        elsewhere = inputs.elsewhere.to(d.device, non_blocking=True)
        zero_shot = self._contrast(q0, d, mask | elsewhere)
        told_zero_shot = zero_shot.detach()
        nothing = torch.zeros((), device=d.device)
        if q1 is None:
            with_demonstrations, mismatched, loss = nothing, None, self.config.contrastive_weight * zero_shot
        else:
            with_demonstrations, mismatched = self._prompted(
                inputs.mismatched, q0, d, q1, mask | (elsewhere & inputs.bare.to(d.device, non_blocking=True))
            )
            loss = self.config.contrastive_weight * (with_demonstrations + self.config.zero_shot_weight * zero_shot)
            if mismatched is not None:
                loss = loss + self.config.mismatched_weight * mismatched
        distilled = None
        if teacher is not None:
            imitation = vector_distillation if self.config.teacher_loss == "vectors" else cosine_distillation
            distilled = imitation(torch.cat([q0, d]), teacher)
            loss = loss + self.config.teacher_weight * distilled
        return Terms(
            loss,
            with_demonstrations.detach(),
            told_zero_shot,
            None if distilled is None else distilled.detach(),
            None if mismatched is None else mismatched.detach(),
        )

    def _prompted(
        self,
        wrong: Sequence[int],
        q0: torch.Tensor,
        d: torch.Tensor,
        q1: torch.Tensor,
        mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """InfoNCE(q1, d) over the rows with right demonstrations, consistency over the others."""
        if not wrong:
            return self._contrast(q1, d, mask), None
        left_out = set(wrong)
        right = torch.tensor([row for row in range(len(q1)) if row not in left_out], dtype=torch.long).to(d.device)
        rows = torch.tensor(list(wrong), dtype=torch.long).to(d.device)
        kept = self._contrast(q1[right], d, mask[right], right) if len(right) else q1.sum() * 0.0
        return kept, consistency(q1[rows], q0[rows])

    def _contrast(
        self, queries: torch.Tensor, documents: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        return matryoshka_info_nce(
            queries,
            documents,
            widths=self.config.matryoshka_dims,
            temperature=self.config.temperature,
            mask=mask,
            targets=targets,
        )
