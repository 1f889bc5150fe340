"""Give a student's vectors the spread of its teacher's.

Where a student cannot tell which of several vectors a text has, the best imitation is their mean. So its vectors come
to lie closer together than the teacher's, most of all along the directions that it knows least about, and what is
left of these weighs too little in a cosine. The linear map that gives vectors of covariance S the covariance T and
moves them least is the one of optimal transport between two Gaussians (Peyre and Cuturi 2019, "Computational Optimal
Transport", remark 2.31):

    A = S^-1/2 (S^1/2 T S^1/2)^1/2 S^-1/2

It becomes a part of the head, so that nothing is added to what encoding costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from epic_rag.backbone import Backbone
from epic_rag.training._head import paired_states

if TYPE_CHECKING:
    from epic_rag.training.trainer import Trainer

__all__ = ["match_covariance", "transport"]

_TEXTS = 16384
# Of the mean variance, added to all: the covariance of few texts has directions without any.
_FLOOR = 1e-3


@torch.no_grad()
def match_covariance(trainer: Trainer) -> None:
    """Map the vectors linearly, so that those of some batches have the covariance of the teacher's.

    Slots are given the vectors as they are after the map; a linear projector takes it back, so that the model reads
    demonstrations as before.

    Args:
        trainer: Of a run with a teacher whose vectors have the student's width.
    """
    assert trainer.teacher is not None
    backbone = trainer.encoder.backbone.eval()
    states, goals = paired_states(trainer, trainer.teacher, _TEXTS)
    head = backbone.head or _put_identity(backbone)
    weight, bias = head.weight.double().cpu(), head.bias.double().cpu()
    raw = states.double() @ weight.T + bias  # (texts, dim)
    unit = nn.functional.normalize(raw, dim=-1)
    matrix = transport(_covariance(unit), _covariance(goals.double()))
    head.weight.copy_(matrix @ weight)
    head.bias.copy_(matrix @ bias)
    projector = backbone.projector
    if projector.kind == "linear":
        longer = (unit @ matrix.T).norm(dim=-1).mean()
        old = projector.linear.weight.double().cpu()
        projector.linear.weight.copy_(longer * torch.linalg.solve(matrix, old, left=False))
    trainer.encoder.forget_fingerprint()


def transport(start: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix A with A start A = goal.

    Args:
        start: (dim, dim) a covariance, positive definite.
        goal: (dim, dim) another one.

    Returns:
        (dim, dim) float64.
    """
    root, inverse = _power(start, 0.5), _power(start, -0.5)
    return inverse @ _power(root @ goal @ root, 0.5) @ inverse


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    power: torch.Tensor = (vectors * values.clamp(min=1e-12) ** exponent) @ vectors.T
    return power


def _covariance(vectors: torch.Tensor) -> torch.Tensor:
    covariance = torch.cov(vectors.T)
    return covariance + _FLOOR * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)


def _put_identity(backbone: Backbone) -> nn.Linear:
    """A head that changes nothing, before the projector that there is."""
    projector = backbone.projector
    head = nn.Linear(backbone.width, backbone.width)
    head.weight.copy_(torch.eye(backbone.width))
    head.bias.zero_()
    backbone.put_head(head)
    backbone.projector = projector
    # As what is trained: weights that LoRA freezes may have fewer bits.
    return head.float()
