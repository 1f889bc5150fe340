"""The start of a head whose vectors are to be a teacher's.

What the transformer makes of some of the run's texts, against what the teacher makes of them, by ridge regression:

    W, b = argmin sum_i |W h_i + b - t_i|^2 + lambda |W|^2

A head that starts there is already some way to the teacher before the first step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from epic_rag.backbone import Backbone
from epic_rag.errors import ConfigError
from epic_rag.training._inputs import zero_shot_rows
from epic_rag.training.distributed import World
from epic_rag.training.sampling import sample_batch

if TYPE_CHECKING:
    from epic_rag.training.teacher import Teacher
    from epic_rag.training.trainer import Trainer

__all__ = ["fit_head", "new_head", "paired_states", "require_width"]

_TEXTS = 8192
# Of a batch of few pairs there are no more than this, so fewer texts: tests and trials need not wait.
_MOST_BATCHES = 128
# Of the regression: the penalty as a share of the states' mean square.
_RIDGE = 1e-3


def new_head(backbone: Backbone, dimension: int) -> None:
    """Put an untrained head on a backbone: it keeps the first numbers of what the transformer makes."""
    head = nn.Linear(backbone.width, dimension)
    with torch.no_grad():
        head.weight.copy_(torch.eye(dimension, backbone.width))
        head.bias.zero_()
    backbone.put_head(head)


def require_width(trainer: Trainer) -> None:
    """Check that vectors can be compared with the teacher's, if they are to be.

    Raises:
        ConfigError: If the widths differ.
    """
    if trainer.teacher is None:
        return
    if trainer.config.teacher_loss == "vectors":
        setting, otherwise = "teacher_loss is 'vectors'", "teacher_loss to cosines"
    elif trainer.config.teacher_covariance:
        setting, otherwise = "teacher_covariance is true", "teacher_covariance to false"
    else:
        return
    mine, goal = trainer.encoder.backbone.dimension, trainer.teacher.encoder.backbone.dimension
    if mine != goal:
        raise ConfigError(
            f"{setting}, the model's vectors have {mine} dimensions and the teacher's {goal}; "
            f"set output_dimension to {goal}, or {otherwise}"
        )


@torch.no_grad()
def fit_head(trainer: Trainer) -> None:
    """Fit a new head to the teacher's vectors of some batches.

    Nothing happens if the run has no new head, or does not imitate vectors.
    """
    config, backbone = trainer.config, trainer.encoder.backbone.eval()
    head, teacher = backbone.head, trainer.teacher
    if config.output_dimension is None or head is None or teacher is None or config.teacher_loss != "vectors":
        return
    states, goals = paired_states(trainer, teacher, _TEXTS)
    found, goal = states.double(), goals.double()
    mean, wanted = found.mean(dim=0), goal.mean(dim=0)
    centred = found - mean
    alike = centred.T @ centred  # (width, width)
    penalty = _RIDGE * found.square().sum() / backbone.width
    weight = torch.linalg.solve(alike + penalty * torch.eye(len(alike), dtype=alike.dtype), centred.T @ (goal - wanted))
    head.weight.copy_(weight.T)
    head.bias.copy_(wanted - mean @ weight)
    trainer.encoder.forget_fingerprint()


def paired_states(trainer: Trainer, teacher: Teacher, texts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the transformer makes of the texts of some batches, and what the teacher makes of them.

    The batches' numbers are below 0, so no step has the same.

    Returns:
        (texts, width) float32 states behind the pooling, and (texts, dim) float32 unit vectors, both on the CPU: not
        every device has the float64 that they are made into.
    """
    config = trainer.config
    states: list[torch.Tensor] = []
    goals: list[torch.Tensor] = []
    for number in range(min(_MOST_BATCHES, math.ceil(texts / (2 * config.batch_size)))):
        batch = sample_batch(trainer.datasets, config, -1 - number)
        queries, documents = zero_shot_rows(batch, trainer.prompt)
        states.append(trainer.forward.pooled([*queries, *documents]).cpu())
        goals.append(teacher(batch, World()).cpu())
    return torch.cat(states), torch.cat(goals)
