"""Tokens, FLOPs and seconds of one training step, with each strategy, on the same pairs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epic_rag.demonstrations import Demonstration
from epic_rag.errors import ConfigError, PromptError
from epic_rag.evaluation.measuring import Spread, count_flops, spread_of, timed
from epic_rag.prompt import STRATEGIES, Strategy

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder

__all__ = ["TrainingCost", "measure_training"]


@dataclass(frozen=True)
class TrainingCost:
    """What one step costs.

    Attributes:
        strategy: "none", "epic" or "text".
        max_demonstrations: K; each row of the batch is shown 0..K others, the same ones with "epic" and "text".
        pairs: Pairs in the step.
        tokens: Real tokens through the model, padding not counted.
        flops: Of the whole step: forward, backward; a multiply-add is two.
        seconds: Wall time.
        why_not: Why it could not be measured, otherwise empty.
        config: The settings of the step.
    """

    strategy: Strategy
    max_demonstrations: int
    pairs: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: Spread | None = None
    why_not: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def row(self) -> list[str]:
        """A line of the table."""
        name = {"none": "no demonstrations", "epic": "EPIC", "text": "text"}[self.strategy]
        label = name if self.strategy == "none" else f"{name}, K = {self.max_demonstrations}"
        seconds = ""
        if self.seconds is not None:
            seconds = self.seconds.text(".3f")
        return [label, str(self.pairs), f"{self.tokens:,}", f"{self.flops / 1e9:,.4g}", seconds]


def measure_training(
    encoder: EpicEncoder,
    pairs: Sequence[Demonstration],
    *,
    instruction: str,
    max_demonstrations: int = 8,
    runs: int = 5,
    max_query_tokens: int = 64,
    max_document_tokens: int = 128,
    progress: Callable[[str], None] | None = None,
) -> list[TrainingCost]:
    """Measure a training step of each strategy on one fixed batch: all of the pairs.

    Args:
        encoder: The model, in float32; it is copied and stays as it is.
        pairs: The batch, at least two pairs.
        instruction: Of the task.
        max_demonstrations: K.
        runs: Measurements of the seconds, after one that warms up.
        max_query_tokens: Longest query in the step.
        max_document_tokens: Longest passage in the step, and longest text of a text demonstration.
        progress: Called with one line of text for each step.

    Raises:
        ConfigError: A number cannot work.
    """
    from epic_rag.training import Trainer, TrainingConfig
    from epic_rag.training.sampling import sample_batch

    if len(pairs) < 2 or runs < 2:
        raise ConfigError(f"{len(pairs)} pairs and {runs} runs were given; a training step needs at least 2 of each")
    say = progress or (lambda line: None)
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        rows = [json.dumps({"query": pair.query, "positive": pair.passage}) for pair in pairs]
        (Path(folder) / "pairs.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        for strategy in STRATEGIES:
            say(f"training step, {strategy}")
            settings = {
                "strategy": strategy,
                "batch_size": len(pairs),
                "max_demonstrations": max_demonstrations,
                "max_query_tokens": max_query_tokens,
                "max_document_tokens": max_document_tokens,
                "separators": encoder.prompt.template.separators,
                "device": str(encoder.device),
            }
            config = TrainingConfig.from_dict(
                {
                    **settings,
                    "model": encoder.source or encoder.name,
                    "output": str(Path(folder) / "run"),
                    "data": folder,
                    "tasks": {"pairs": {"instruction": instruction}},
                }
            )
            trainer = Trainer(config, deepcopy(encoder))
            batch = sample_batch(trainer.datasets, config, 0)
            try:
                result = trainer.train_step(batch)  # warm-up
            except PromptError as error:
                costs.append(TrainingCost(strategy, max_demonstrations, why_not=str(error), config=settings))
                continue
            step = partial(trainer.train_step, batch)
            seconds = [timed(encoder.device, step) for _ in range(runs)]
            costs.append(
                TrainingCost(
                    strategy,
                    max_demonstrations if strategy != "none" else 0,
                    pairs=result.pairs,
                    tokens=result.tokens,
                    flops=count_flops(step),
                    seconds=spread_of(seconds),
                    config=settings,
                )
            )
    return costs
