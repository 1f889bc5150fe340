"""Losses of a step, computed from its vectors.

    loss = c * (InfoNCE(q1, d) + w * InfoNCE(q0, d)) + teacher_weight * distillation([q0; d])

c is `contrastive_weight`, w is `zero_shot_weight`. With `reverse_weight` r, each InfoNCE(q, d) is that of queries among
documents plus r times that of positives among queries. EPIC (arXiv 2605.01372) is c = 1 without a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from epic_rag.errors import ConfigError
from epic_rag.training.config import TrainingConfig
from epic_rag.training.inputs import StepInputs

__all__ = [
    "Objective",
    "Terms",
    "cosine_distillation",
    "info_nce",
    "margin_mask",
    "matryoshka_info_nce",
    "vector_distillation",
]


def info_nce(
    queries: torch.Tensor,
    documents: torch.Tensor,
    *,
    temperature: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Compute the contrastive loss InfoNCE (van den Oord et al. 2018).

        L = mean_i  -log  exp(q_i . d_i / t) / sum_j exp(q_i . d_j / t)

    Args:
        queries: (n, dim) unit vectors.
        documents: (m, dim) unit vectors; document i is the positive of query i.
        temperature: t, divides the cosines.
        mask: (n, m) bool, True where a document is not a negative of a query although it is not its positive
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
        mask = mask.clone()
        mask[targets, targets] = False
        scores = scores.masked_fill(mask, float("-inf"))
    return nn.functional.cross_entropy(scores, targets)


def matryoshka_info_nce(
    queries: torch.Tensor,
    documents: torch.Tensor,
    *,
    widths: Sequence[int],
    temperature: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute InfoNCE at several widths (Kusupati et al. 2022, "Matryoshka Representation Learning").

        L = 1/|W| sum_{w in W} InfoNCE(q[:w] / |q[:w]|, d[:w] / |d[:w]|)

    The full width is always in W, so that vectors can be truncated to any of the widths.

    Args:
        queries: (n, dim) unit vectors.
        documents: (m, dim) unit vectors.
        widths: Widths besides the full one.
        temperature: See `info_nce`.
        mask: See `info_nce`.

    Returns:
        Scalar mean loss.

    Example:
        >>> eye = torch.eye(4)
        >>> whole = info_nce(eye, eye, temperature=1.0)
        >>> bool(matryoshka_info_nce(eye, eye, widths=[], temperature=1.0) == whole)
        True
    """
    full = queries.shape[1]
    losses = [info_nce(queries, documents, temperature=temperature, mask=mask)]
    for width in sorted(set(widths) - {full}):
        left, right = (nn.functional.normalize(side[:, :width], dim=-1) for side in (queries, documents))
        losses.append(info_nce(left, right, temperature=temperature, mask=mask))
    return torch.stack(losses).mean()


def cosine_distillation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared difference of two encoders' cosines between the same texts.

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
    """Compute the mean cosine distance of an encoder's vectors to another one's of the same texts.

        L = 1 - 1/n sum_i s_i . t_i

    (Reimers and Gurevych 2020, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation",
    with the squared distance, which for unit vectors is twice this.)

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


def margin_mask(scores: torch.Tensor, hard: torch.Tensor, margin: float) -> torch.Tensor:
    """Mark in-batch documents that score too close to the positive to be certain negatives.

    (Moreira et al. 2024, "NV-Retriever", and Solatorio 2024, "GISTEmbed": a negative counts if it scores below the
    positive's score minus a margin. A negative margin excludes only what exceeds the positive's score by more.)

    Args:
        scores: (n, m) cosines without demonstrations; document i is query i's positive.
        hard: (n, m) bool, a row's own hard negatives, which always count.
        margin: Difference of cosines.

    Returns:
        (n, m) bool, True where a document is excluded.

    Example:
        >>> scores = torch.tensor([[0.8, 0.79, 0.2], [0.1, 0.9, 0.95]])
        >>> margin_mask(scores, torch.zeros(2, 3, dtype=torch.bool), 0.05).tolist()
        [[False, True, False], [False, False, True]]
    """
    positives = scores.diagonal().unsqueeze(1)  # (n, 1)
    close = scores > positives - margin
    rows = torch.arange(len(scores), device=scores.device)
    close[rows, rows] = False
    return close & ~hard


@dataclass(frozen=True)
class Terms:
    """A step's loss and its terms, each a scalar; all but `loss` without gradients.

    Attributes:
        loss: The weighted sum.
        with_demonstrations: InfoNCE(q1, d); 0 for strategy "none".
        zero_shot: InfoNCE(q0, d).
        teacher: Distillation; None without a teacher.
        retention: Distance to the start's vectors on other texts; None without `retention_texts`.
    """

    loss: torch.Tensor
    with_demonstrations: torch.Tensor
    zero_shot: torch.Tensor
    teacher: torch.Tensor | None = None
    retention: torch.Tensor | None = None


class Objective:
    """The loss of a batch.

    Args:
        config: Temperature, weights, widths, margin.
        dimension: Width of the vectors.

    Raises:
        ConfigError: If a Matryoshka width is larger than the vectors.
    """

    def __init__(self, config: TrainingConfig, dimension: int) -> None:
        if any(width > dimension for width in config.matryoshka_dims):
            raise ConfigError(
                f"matryoshka_dims is {list(config.matryoshka_dims)}, and the model's vectors have {dimension} "
                "dimensions. Give smaller widths."
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
        """Compute the loss.

        Args:
            inputs: Counts and masks.
            q0: (queries, dim) zero-shot queries; the first `inputs.pairs` are the batch's.
            d: (documents, dim); the first `inputs.counted` are the batch's.
            q1: (pairs, dim) queries with demonstrations; None for strategy "none".
            teacher: (pairs + counted, width) the teacher's vectors of the batch's texts.
        """
        config = self.config
        q0, d = q0[: inputs.pairs], d[: inputs.counted]
        mask = inputs.mask.to(d.device, non_blocking=True)
        if config.false_negative_margin is not None:
            hard = inputs.hard.to(d.device, non_blocking=True)
            mask = mask | margin_mask(q0.detach() @ d.detach().T, hard, config.false_negative_margin)
        if config.near_duplicate_cosine is not None:
            mask = mask | (d[: inputs.pairs] @ d.T).detach().ge(config.near_duplicate_cosine)
        zero_shot = self._contrast(q0, d, mask)
        if q1 is None:
            with_demonstrations = torch.zeros((), device=d.device)
            loss = config.contrastive_weight * zero_shot
        else:
            with_demonstrations = self._contrast(q1, d, mask)
            loss = config.contrastive_weight * (with_demonstrations + config.zero_shot_weight * zero_shot)
        distilled = None
        if teacher is not None:
            distil = vector_distillation if config.teacher_loss == "vectors" else cosine_distillation
            term = distil(torch.cat([q0, d]), teacher)
            loss = loss + config.teacher_weight * term
            distilled = term.detach()
        return Terms(loss, with_demonstrations.detach(), zero_shot.detach(), distilled)

    def _contrast(self, queries: torch.Tensor, documents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        config = self.config
        widths, temperature = config.matryoshka_dims, config.temperature
        loss = matryoshka_info_nce(queries, documents, widths=widths, temperature=temperature, mask=mask)
        if config.reverse_weight:
            # Positives among the batch's queries; hard negatives belong to no query.
            positives, mask = documents[: len(queries)], mask[:, : len(queries)].T
            reverse = matryoshka_info_nce(positives, queries, widths=widths, temperature=temperature, mask=mask)
            loss = loss + config.reverse_weight * reverse
        return loss
