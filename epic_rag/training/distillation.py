"""Distillation: a frozen teacher, a head fitted to its vectors, and covariance matching.

A student that cannot tell which of several vectors a text has does best with their mean. So its vectors lie closer
together than the teacher's, most of all along the directions that it knows least about, and these weigh too little in
a cosine. `match_covariance` undoes that after the last step, with the linear map that gives vectors of covariance S the
covariance T and moves them least: optimal transport between two Gaussians (Peyre and Cuturi 2019, "Computational
Optimal Transport", remark 2.31),

    A = S^-1/2 (S^1/2 T S^1/2)^1/2 S^-1/2

It becomes part of the head and costs nothing in use. It raised the mean of epic-smollm2 on 16 sets from 60.42 to 62.20
(docs/results.md, "How epic-smollm2 was trained": `epic-rag eval --data data/eval` before and after).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from epic_rag.backbone import Backbone
from epic_rag.cpu_kernels import has_bfloat16_instructions
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag.prompt import PromptBuilder
from epic_rag.training.config import TrainingConfig
from epic_rag.training.data import PairDataset, TrainingBatch
from epic_rag.training.distributed import World
from epic_rag.training.inputs import Forward, zero_shot_rows
from epic_rag.training.sampling import sample_batch

__all__ = [
    "Teacher",
    "add_head",
    "fit_head",
    "fitting_batches",
    "match_covariance",
    "paired_states",
    "require_equal_widths",
    "transport",
]

# Most batches to fit on: with few pairs a batch they hold fewer texts, but take seconds.
_MOST_BATCHES = 128
# Ridge penalty of the head's fit, as a share of the states' mean square.
_RIDGE = 1e-3
# Share of the mean variance that is added to all variances: few texts leave directions without any.
_COVARIANCE_FLOOR = 1e-3


class Teacher:
    """A frozen encoder that embeds a batch's texts with its own tokenizer, prompt and pooling.

    Queries get their task's instruction if the teacher's checkpoint has a training record. Other models were not
    trained with instructions.

    Args:
        config: Names the teacher and the longest texts.
        device: Device of the teacher.

    Raises:
        CheckpointError: If there is no such encoder.
    """

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        # bfloat16 and float16 are slow on a CPU without instructions for them.
        fast = device.type != "cpu" or (config.dtype == "bfloat16" and has_bfloat16_instructions())
        self.encoder = EpicEncoder.from_pretrained(
            config.teacher,
            device=str(device),
            dtype=config.dtype if fast else "float32",
            max_query_tokens=config.max_query_tokens,
            max_document_tokens=config.max_document_tokens,
            backend="native",
        )
        self.encoder.backbone.requires_grad_(False)
        self.instructions = bool(self.encoder.config.training)
        self._forward = Forward(
            self.encoder.backbone, pad_id=self.encoder.prompt.pad_id, max_tokens=config.micro_batch_tokens
        )

    def __call__(self, batch: TrainingBatch, world: World) -> torch.Tensor:
        """Return (pairs + documents, width) unit vectors: queries, positives, hard negatives."""
        queries, documents = zero_shot_rows(batch, self.encoder.prompt, instructions=self.instructions)
        rows = [*queries, *documents]
        out = torch.zeros((len(rows), self.encoder.backbone.dimension), device=self.encoder.device)
        # Not inference_mode, whose tensors cannot take part in a loss.
        with torch.no_grad():
            for chunk in self._forward.chunks(rows, world.shard([len(row.ids) for row in rows])):
                out[torch.tensor(chunk).to(out.device)] = self._forward.chunk(rows, chunk)
        return world.all_reduce(out)


def require_equal_widths(config: TrainingConfig, student: int, teacher: int) -> None:
    """Check that vectors can be compared with the teacher's, if the run compares them.

    Raises:
        ConfigError: If the widths differ.
    """
    if config.teacher_loss == "vectors":
        setting, remedy = "teacher_loss is 'vectors'", "teacher_loss to cosines"
    elif config.teacher_covariance:
        setting, remedy = "teacher_covariance is true", "teacher_covariance to false"
    else:
        return
    if student != teacher:
        raise ConfigError(
            f"{setting}, the model's vectors have {student} dimensions and the teacher's {teacher}. "
            f"Set output_dimension to {teacher}, or {remedy}."
        )


def fitting_batches(datasets: Sequence[PairDataset], config: TrainingConfig, texts: int) -> Iterator[TrainingBatch]:
    """Yield batches with about this many texts; their numbers are below 0, so they are not those of a step."""
    for number in range(min(_MOST_BATCHES, math.ceil(texts / (2 * config.batch_size)))):
        yield sample_batch(datasets, config, -1 - number)


@torch.no_grad()
def paired_states(
    batches: Iterator[TrainingBatch], prompt: PromptBuilder, forward: Forward, teacher: Teacher
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed the texts of some batches by the student and the teacher.

    Returns:
        (texts, width) float32 states after pooling, and (texts, dim) float32 unit vectors of the teacher. Both are on
        the CPU: not every device has float64.
    """
    states: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    for batch in batches:
        queries, documents = zero_shot_rows(batch, prompt)
        states.append(forward.pooled([*queries, *documents]).cpu())
        targets.append(teacher(batch, World()).cpu())
    return torch.cat(states), torch.cat(targets)


@torch.no_grad()
def add_head(backbone: Backbone, dimension: int) -> None:
    """Put an untrained head on a backbone: it keeps the first components of the pooled state."""
    head = nn.Linear(backbone.width, dimension)
    head.weight.copy_(torch.eye(dimension, backbone.width))
    head.bias.zero_()
    backbone.set_head(head)


@torch.no_grad()
def fit_head(head: nn.Linear, states: torch.Tensor, targets: torch.Tensor) -> None:
    """Fit a head to the teacher's vectors by ridge regression, a start for the first step.

        W, b = argmin sum_i |W h_i + b - t_i|^2 + lambda |W|^2

    Args:
        head: Is changed.
        states: (texts, width) the student's pooled states, h.
        targets: (texts, dim) the teacher's vectors, t.
    """
    states, targets = states.double(), targets.double()
    mean, target_mean = states.mean(dim=0), targets.mean(dim=0)
    centred = states - mean
    gram = centred.T @ centred  # (width, width)
    penalty = _RIDGE * states.square().sum() / states.shape[1]
    identity = torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram + penalty * identity, centred.T @ (targets - target_mean))
    head.weight.copy_(weight.T)
    head.bias.copy_(target_mean - mean @ weight)


@torch.no_grad()
def match_covariance(backbone: Backbone, states: torch.Tensor, targets: torch.Tensor) -> None:
    """Map the vectors linearly to the covariance of the teacher's, by changing the head.

    Slots receive the vectors after the map. A linear projector gets its inverse, so that the model reads demonstrations
    as before.

    Args:
        backbone: Is changed; gets a head if it has none.
        states: (texts, width) its pooled states.
        targets: (texts, dim) the teacher's vectors; dim is the backbone's dimension.
    """
    head = backbone.head or _add_identity_head(backbone)
    weight, bias = head.weight.double().cpu(), head.bias.double().cpu()
    raw = states.double() @ weight.T + bias  # (texts, dim)
    unit = nn.functional.normalize(raw, dim=-1)
    matrix = transport(_covariance(unit), _covariance(targets.double()))
    head.weight.copy_(matrix @ weight)
    head.bias.copy_(matrix @ bias)
    projector = backbone.projector
    if projector.kind == "linear":
        length = (unit @ matrix.T).norm(dim=-1).mean()
        old = projector.linear.weight.double().cpu()
        projector.linear.weight.copy_(length * torch.linalg.solve(matrix, old, left=False))


def transport(start: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Return the symmetric matrix A with A start A = goal.

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
    floor = _COVARIANCE_FLOOR * covariance.diagonal().mean()
    return covariance + floor * torch.eye(len(covariance), dtype=covariance.dtype)


def _add_identity_head(backbone: Backbone) -> nn.Linear:
    """Add a head that changes nothing; the projector stays."""
    projector = backbone.projector
    add_head(backbone, backbone.width)
    backbone.projector = projector
    # In float32, as everything that is trained: weights that LoRA freezes may have fewer bits.
    assert backbone.head is not None
    return backbone.head.float()
