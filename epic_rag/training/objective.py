"""The loss of a step from its vectors.

    loss = c * (InfoNCE(q1, d) + w * InfoNCE(q0, d))             (EPIC, arXiv 2605.01372, section 3, where c = 1)
         + teacher_weight * distillation([q0; d])
         + mismatched_weight * consistency(q1, q0)               rows with deliberately wrong demonstrations

The first term is over the rows whose demonstrations are right; c is `contrastive_weight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from epic_rag.errors import ConfigError
from epic_rag.training._inputs import StepInputs
from epic_rag.training.config import TrainingConfig
from epic_rag.training.loss import (
    consistency,
    cosine_distillation,
    margin_mask,
    matryoshka_info_nce,
    vector_distillation,
)

__all__ = ["Objective", "Terms"]


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
