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

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from epic_rag.backbone import Backbone
from epic_rag.cpu_kernels import has_bfloat16_instructions
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag.training.config import TrainingConfig
from epic_rag.training.data import TrainingBatch
from epic_rag.training.distributed import World
from epic_rag.training.inputs import Forward, zero_shot_rows
from epic_rag.training.sampling import sample_batch

if TYPE_CHECKING:
    from epic_rag.training.trainer import Trainer

__all__ = ["Teacher", "fit_head", "match_covariance", "new_head", "paired_states", "require_width", "transport"]


# --- from teacher
# A frozen encoder that the student imitates.


class Teacher:
    """Embeds a batch's texts as the teacher reads them: its own tokenizer, prompt and pooling.

    Queries get their task's instruction if the teacher was trained with instructions, that is, if its checkpoint has a
    training record; any other model would only be confused by one.

    Args:
        config: Names the teacher and the longest texts.
        device: Where it runs.

    Raises:
        CheckpointError: If there is no such encoder.
    """

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self.encoder = EpicEncoder.from_pretrained(
            config.teacher,
            device=str(device),
            dtype=_dtype(config.dtype, device),
            max_query_tokens=config.max_query_tokens,
            max_document_tokens=config.max_document_tokens,
        )
        self.encoder.backbone.requires_grad_(False)
        self.instructions = bool(self.encoder.config.training)
        self._forward = Forward(
            self.encoder.backbone, pad_id=self.encoder.prompt.pad_id, max_tokens=config.micro_batch_tokens
        )

    def __call__(self, batch: TrainingBatch, world: World) -> torch.Tensor:
        """(pairs + documents, width) unit vectors: queries, positives, hard negatives."""
        queries, documents = zero_shot_rows(batch, self.encoder.prompt, instructions=self.instructions)
        rows = [*queries, *documents]
        out = torch.zeros((len(rows), self.encoder.backbone.dimension), device=self.encoder.device)
        # inference_mode would give tensors that no loss can keep; no_grad costs the same here.
        with torch.no_grad():
            for chunk in self._forward.chunks(rows, world.share([len(row.ids) for row in rows])):
                out[torch.tensor(chunk).to(out.device)] = self._forward.chunk(rows, chunk)
        return world.gathered(out)


def _dtype(dtype: str, device: torch.device) -> str:
    """The run's own, unless a CPU would be slow in it."""
    fast = device.type != "cpu" or (dtype == "bfloat16" and has_bfloat16_instructions())
    return dtype if fast else "float32"


# --- from _head
# The start of a head whose vectors are to be a teacher's.
#
# What the transformer makes of some of the run's texts, against what the teacher makes of them, by ridge regression:
#
#     W, b = argmin sum_i |W h_i + b - t_i|^2 + lambda |W|^2
#
# A head that starts there is already some way to the teacher before the first step.

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
    backbone.set_head(head)


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
    trainer.encoder.invalidate_caches()


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


_COVARIANCE_TEXTS = 16384
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
    states, goals = paired_states(trainer, trainer.teacher, _COVARIANCE_TEXTS)
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
    trainer.encoder.invalidate_caches()


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
    backbone.set_head(head)
    backbone.projector = projector
    # As what is trained: weights that LoRA freezes may have fewer bits.
    return head.float()
