"""Metrics for TensorBoard, read back from its files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

from epic_rag.errors import MissingExtraError
from epic_rag.training import Trainer, TrainingConfig

Config = Callable[..., TrainingConfig]

# The reader's own protobuf files ask for names that are to go away.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_what_the_metrics_have_is_on_the_board(config: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = {"tensorboard": True, "evaluation_tasks": ["up"], "evaluate_every": 3, "evaluation_demonstrations": [0, 2]}
    Trainer(config(**run, stop_after=3)).train(show_progress=False)
    trainer = Trainer(config(**run))
    trainer.train(show_progress=False)
    board = EventAccumulator(str(trainer.folder / "tensorboard"))
    board.Reload()
    losses = [entry for entry in trainer.metrics if "loss" in entry]
    for name in ("loss", "zero_shot", "with_demonstrations", "tokens", "gradient_norm"):
        seen = board.Scalars(f"training/{name}")
        assert [event.step for event in seen] == [1, 2, 3, 4, 5, 6]
        assert [event.value for event in seen] == pytest.approx([entry[name] for entry in losses], rel=1e-5)
    assert {event.step for event in board.Scalars("ndcg@10/up/k=2")} == {0, 3, 6}


def test_without_tensorboard_the_extra_is_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name, *rest)
    )
    with pytest.raises(MissingExtraError, match=r"the setting tensorboard needs tensorboard.*epic-rag\[train\]"):
        Trainer(config(tensorboard=True))
