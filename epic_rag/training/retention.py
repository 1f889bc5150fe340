"""Retention: training that leaves the vectors of other texts where the start had them.

A contrastive loss over a few tasks moves all vectors, those of texts too that no task is about, and similarity and
clustering of such texts suffer. In each step some texts of the training files (queries, passages, sentences of
passages) are embedded without an instruction by the model as it was before training, and by the one in training: mostly
without an instruction too, and sometimes behind one, so that an instruction does not change what a text is about.

    L = mean_i |s_i - t_i|^2 + mean_i KL(p(t_i) | p(s_i)),    p(v_i)_j = softmax_j (v_i . v_j / 0.05), j != i
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence

import torch
from torch import nn

from epic_rag.backbone import Backbone
from epic_rag.prompt import PromptBuilder
from epic_rag.training.config import TrainingConfig
from epic_rag.training.data import PairDataset
from epic_rag.training.inputs import Forward

__all__ = ["Retention", "retention_loss"]

_TEMPERATURE = 0.05
# Share of the texts that the model in training reads behind an instruction.
_PROMPTED = 0.25
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Retention:
    """The start, frozen, and the texts of each step.

    Args:
        backbone: The model before training; is copied.
        forward: Forward passes of the model in training.
        prompt: Tokenizer, template and limits.
        datasets: The texts are theirs, each file's as often as another's.
        config: `retention_texts`, `retention_weight`, instructions, seed.
    """

    def __init__(
        self,
        backbone: Backbone,
        forward: Forward,
        prompt: PromptBuilder,
        datasets: Sequence[PairDataset],
        config: TrainingConfig,
    ) -> None:
        start = copy.deepcopy(backbone).eval().requires_grad_(False)
        self._start = Forward(start, pad_id=forward.pad_id, max_tokens=forward.max_tokens, dtype=forward.dtype)
        self._forward = forward
        self._prompt = prompt
        self._datasets = datasets
        self._config = config

    def draw(self, step: int) -> list[tuple[str, str | None]]:
        """Return a step's texts, each with the instruction that it is read behind."""
        rng = random.Random(f"{self._config.seed}-{step}-retention")
        drawn = []
        for _ in range(self._config.retention_texts):
            dataset = rng.choice(self._datasets)
            row = rng.choice(dataset.rows)
            sentences = [part for part in _SENTENCE_END.split(row.positive[:2000]) if part.strip()] or [row.positive]
            text = rng.choice([row.query, row.positive, rng.choice(sentences)])
            instructions = [*self._config.generic_instructions, *filter(None, [dataset.instruction])]
            drawn.append((text, rng.choice(instructions) if instructions and rng.random() < _PROMPTED else None))
        return drawn

    def __call__(self, step: int) -> torch.Tensor:
        """Return a step's loss, with gradients into the model in training."""
        drawn = self.draw(step)
        prompt = self._prompt
        with torch.no_grad():
            goal = self._start(prompt.symmetric([text for text, _ in drawn]))
        rows = []
        for text, instruction in drawn:
            bare = instruction is None
            rows += prompt.symmetric([text]) if bare else prompt.queries(prompt.prefix(instruction), [text])
        return retention_loss(self._forward(rows), goal)


def retention_loss(vectors: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Compute the distance of vectors, and of the distributions of their similarities, to those of the start.

    Args:
        vectors: (n, dim) unit vectors, n at least 2.
        goal: (n, dim) unit vectors of the same texts.

    Returns:
        Scalar, 0 for equal vectors.

    Example:
        >>> eye = torch.eye(3)
        >>> float(retention_loss(eye, eye))
        0.0
    """
    itself = torch.eye(len(goal), dtype=torch.bool, device=goal.device)
    # A number instead of minus infinity, whose product with a probability of 0 is not a number.
    ours, theirs = ((side @ side.T / _TEMPERATURE).masked_fill(itself, -1e4) for side in (vectors, goal))
    divergence = nn.functional.kl_div(
        ours.log_softmax(dim=1), theirs.log_softmax(dim=1), reduction="batchmean", log_target=True
    )
    return (vectors - goal).square().sum(dim=1).mean() + divergence
