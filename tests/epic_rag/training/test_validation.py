"""nDCG@10 by hand, and the evaluation on held-out rows against the same computed step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.metrics import ndcg_at_k
from epic_rag.training import PairDataset, Trainer, TrainingConfig
from epic_rag.training.data import Pair
from epic_rag.training.validation import evaluate_held_out


class Spy:
    """Vectors that are looked up, and a list of what was encoded as what."""

    def __init__(self, queries: dict[str, list[float]], documents: dict[str, list[float]]) -> None:
        self.vectors = (queries, documents)
        self.calls: list[tuple[Any, ...]] = []

    def encode_query(self, texts: list[str], **options: Any) -> np.ndarray:
        bank = options.get("bank")
        instruction = bank.instruction if bank is not None else options["instruction"]
        self.calls.append(("query", instruction, options.get("num_demonstrations"), options.get("strategy")))
        self.bank = bank
        return np.array([self.vectors[0][text] for text in texts], dtype=np.float32)

    def encode_document(self, texts: list[str]) -> np.ndarray:
        self.calls.append(("document",))
        return np.array([self.vectors[1][text] for text in texts], dtype=np.float32)


def test_evaluation_by_hand() -> None:
    # q0 finds its document, q1 finds another's first; p2 belongs to q2's group and so to nobody's here.
    queries = {"q0": [1.0, 0.0], "q1": [0.8, 0.6]}
    documents = {"p0": [1.0, 0.0], "p1": [0.0, 1.0], "p2": [-1.0, 0.0], "p3": [-1.0, 0.0]}
    dataset = PairDataset(
        "t", [Pair("q2", "p2"), Pair("q3", "p3")], "Go", held_out=[Pair("q0", "p0"), Pair("q1", "p1")]
    )
    spy = Spy(queries, documents)
    scores = evaluate_held_out(spy, dataset, (0, 1, 8), strategy="text", distractors=2)  # type: ignore[arg-type]
    expected = round(100 * (1 + 1 / math.log2(3)) / 2, 2)
    assert scores == {"k=0": expected, "k=1": expected, "k=8": expected}
    # Two spare rows can demonstrate, so 8 becomes 2; they are training rows.
    assert spy.calls == [
        ("document",),
        ("query", "Go", 0, "text"),
        ("query", "Go", 1, "text"),
        ("query", "Go", 2, "text"),
    ]
    assert {item.query for item in spy.bank.demonstrations} == {"q2", "q3"}


def test_symmetric_tasks_are_evaluated_on_queries() -> None:
    vectors = {"q0": [1.0, 0.0], "p0": [1.0, 0.0], "p1": [0.0, 1.0]}
    dataset = PairDataset("t", [Pair("q1", "p1")], "Go", symmetric=True, held_out=[Pair("q0", "p0")])
    spy = Spy(vectors, {})
    assert evaluate_held_out(spy, dataset, (0,)) == {"k=0": 100.0}  # type: ignore[arg-type]
    assert [call[:2] for call in spy.calls] == [("query", "Go"), ("query", "Go")]


def test_rows_of_one_group_are_relevant() -> None:
    vectors = {"q0": [1.0, 0.0], "p0": [0.0, 1.0], "p1": [1.0, 0.0]}
    rows = [Pair("q1", "p1", group="g")]
    dataset = PairDataset("t", rows, held_out=[Pair("q0", "p0", group="g")])
    assert evaluate_held_out(Spy(vectors, vectors), dataset, (0,)) == {"k=0": 100.0}  # type: ignore[arg-type]


def test_the_trainer_evaluates_what_the_encoder_gives(config: Callable[..., TrainingConfig]) -> None:
    trainer = Trainer(config(evaluation_tasks=["up"], evaluation_rows=4, evaluation_demonstrations=[0, 2]))
    scores = trainer.evaluate()
    dataset = trainer.evaluation[0]
    texts = sorted({row.positive for row in [*dataset.rows, *dataset.held_out]})
    encoder = EpicEncoder(trainer.encoder.backbone, trainer.prompt)
    documents = encoder.encode_document(texts)
    relevant = [[texts.index(row.positive)] for row in dataset.held_out]
    queries = encoder.encode_query([row.query for row in dataset.held_out], instruction="Go up")
    zero_shot = round(100 * float(ndcg_at_k(queries, documents, relevant).mean()), 2)
    assert scores == {"up": {"k=0": zero_shot, "k=2": pytest.approx(50, abs=50)}}
    # With demonstrations the vectors are others, whatever the score is.
    bank = DemonstrationBank([("a", "b")], instruction="Go up")
    shown = encoder.encode_query([row.query for row in dataset.held_out], bank=bank)
    assert not np.allclose(queries, shown, atol=1e-3)
    assert trainer.metrics[-1] == {"step": 0, "evaluation": scores}
