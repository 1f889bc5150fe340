"""Retention: its loss by hand, its texts, and a run that stays nearer to the start."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag.training import Trainer, TrainingConfig, retention
from epic_rag.training.retention import retention_loss
from epic_rag.training.sampling import sample_batch
from tests.helpers.training import WORDS

Config = Callable[..., TrainingConfig]


def test_docstring_example() -> None:
    assert doctest.testmod(retention).failed == 0


def test_loss_by_hand() -> None:
    start = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    now = torch.tensor([[0.0, 1.0], [0.8, 0.6], [0.0, 1.0]])

    def others(vectors: torch.Tensor, row: int) -> torch.Tensor:
        kept = [column for column in range(3) if column != row]
        return torch.stack([vectors[row] @ vectors[column] / 0.05 for column in kept]).softmax(dim=0)

    divergence = sum((others(start, row) * (others(start, row) / others(now, row)).log()).sum() for row in range(3))
    assert float(retention_loss(now, start)) == pytest.approx(float(2 / 3 + divergence / 3), rel=1e-4)


def test_texts_of_a_step(config: Config, data: Path, write_task: Callable[..., Path]) -> None:
    write_task(data, "prose", [{"query": f"q{n}", "positive": f"First {n}. Second {n}!"} for n in range(16)])
    run = config(tasks=["up", "prose"], retention_texts=40, generic_instructions=["Find"])
    trainer = Trainer(run)
    assert trainer.retention is not None
    drawn = [item for step in range(20) for item in trainer.retention.draw(step)]
    assert drawn[:40] == trainer.retention.draw(0)
    assert {instruction for _, instruction in drawn} == {None, "Find", "Go up"}
    assert 0.15 < sum(instruction is not None for _, instruction in drawn) / len(drawn) < 0.35
    texts = {text for text, _ in drawn}
    assert {WORDS[0], f"+ {WORDS[0]}", "q0", "First 0.", "Second 0!", "First 0. Second 0!"} <= texts


@pytest.mark.parametrize("cached", [False, True])
def test_training_stays_near_the_start(config: Config, tiny_bidirectional_encoder: EpicEncoder, cached: bool) -> None:
    words = [*WORDS, *(f"+ {word}" for word in WORDS)]
    before = tiny_bidirectional_encoder.encode_document(words)
    moved = {}
    for texts in (0, 32):
        run = config(retention_texts=texts, retention_weight=5.0, grad_cache=cached, strategy="none", steps=30)
        trainer = Trainer(run, copy.deepcopy(tiny_bidirectional_encoder))
        for trainer.step in range(30):
            result = trainer.train_step(sample_batch(trainer.datasets, run, trainer.step))
        trainer.encoder.backbone.eval()
        moved[texts] = float(((trainer.encoder.encode_document(words) - before) ** 2).sum(axis=1).mean())
        assert (result.retention is None) == (texts == 0)
        assert result.loss == pytest.approx(
            result.with_demonstrations + result.zero_shot + (result.retention or 0.0), rel=1e-4
        )
    assert moved[32] < 0.5 * moved[0]


def test_not_with_lora(config: Config) -> None:
    with pytest.raises(ConfigError, match="lora_rank is 4 and retention_texts is 8"):
        config(lora_rank=4, retention_texts=8)
