"""InfoNCE against a value computed by hand, and which documents are no negatives."""

from __future__ import annotations

import math

import pytest
import torch

from epic_rag.training import info_nce
from epic_rag.training.data import Pair, TaskRows, TrainingBatch
from epic_rag.training.losses import false_negatives

QUERIES = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
# Two positives and a hard negative.
DOCUMENTS = torch.tensor([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]])


def by_hand(scores: list[list[float]], temperature: float) -> float:
    """Mean of -log softmax; the positive of row i is its first score."""
    return sum(
        -row[0] / temperature + math.log(sum(math.exp(score / temperature) for score in row)) for row in scores
    ) / len(scores)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.05])
def test_info_nce_by_hand(temperature: float) -> None:
    loss = info_nce(QUERIES, DOCUMENTS, temperature=temperature)
    expected = by_hand([[0.6, 0.8, 1.0], [0.6, 0.8, 0.0]], temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_masked_documents_do_not_count() -> None:
    mask = torch.tensor([[True, False, True], [True, True, False]])  # the positives' own entries are ignored
    loss = info_nce(QUERIES, DOCUMENTS, temperature=0.5, mask=mask)
    assert float(loss) == pytest.approx(by_hand([[0.6, 0.8], [0.6, 0.0]], 0.5), rel=1e-5)
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert float(info_nce(QUERIES, DOCUMENTS, temperature=0.5, mask=everything)) == 0.0
    assert everything.all(), "the caller's mask was changed"


def test_gradients_stay_finite_under_a_full_mask() -> None:
    queries = QUERIES.clone().requires_grad_()
    info_nce(queries, DOCUMENTS, temperature=0.05, mask=torch.ones(2, 3, dtype=torch.bool)).backward()
    assert torch.isfinite(queries.grad).all()


def batch(*tasks: tuple[str, list[Pair]], symmetric: bool = False) -> TrainingBatch:
    return TrainingBatch(tuple(TaskRows(name, None, symmetric, tuple(rows), ((),) * len(rows)) for name, rows in tasks))


def masked(value: TrainingBatch) -> list[list[int]]:
    """For each row the columns that are no negatives, its own positive included."""
    return [torch.nonzero(row).flatten().tolist() for row in false_negatives(value)]


def test_unrelated_rows_are_negatives() -> None:
    rows = [Pair("a", "1"), Pair("b", "2", ("3",)), Pair("c", "4")]
    mask = false_negatives(batch(("t", rows)))
    assert mask.shape == (3, 4)
    assert mask.dtype == torch.bool
    assert masked(batch(("t", rows))) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # The same positive.
        ([Pair("a", "1"), Pair("b", "1"), Pair("c", "2")], [[0, 1], [0, 1], [2]]),
        # The same group, other texts.
        ([Pair("a", "1", group="g"), Pair("b", "2", group="g"), Pair("c", "3", group="h")], [[0, 1], [0, 1], [2]]),
        # The same query, another positive.
        ([Pair("a", "1"), Pair("a", "2"), Pair("c", "3")], [[0, 1], [0, 1], [2]]),
        # A hard negative that is this query's positive, or another's: false for its own query only.
        ([Pair("a", "1", ("2",)), Pair("b", "2", ("9",))], [[0], [1, 2]]),
        # A hard negative of one row is a negative of all others, and its own row's hard negatives are never masked.
        ([Pair("a", "1", ("8",), group="g"), Pair("b", "2", ("9",), group="g")], [[0, 1], [0, 1]]),
        # A text that is a positive of the row's group, wherever it stands.
        ([Pair("a", "1", group="g"), Pair("b", "2", group="g"), Pair("c", "2")], [[0, 1, 2], [0, 1, 2], [1, 2]]),
    ],
)
def test_false_negatives(rows: list[Pair], expected: list[list[int]]) -> None:
    assert masked(batch(("t", rows))) == expected


def test_false_negatives_across_tasks() -> None:
    one = [Pair("a", "1", group="g"), Pair("b", "2")]
    two = [Pair("a", "3", group="g"), Pair("c", "2", ("1",))]
    # A query or a group of another task says nothing: there, another document is wanted. An equal text is no negative.
    assert masked(batch(("x", one), ("y", two))) == [[0, 4], [1, 3], [2], [1, 3]]
    # Rows of one task in two parts of a batch, as with sources, still know each other.
    assert masked(batch(("x", one), ("x", two))) == [[0, 2, 4], [1, 3], [0, 2, 4], [1, 3]]


def test_a_query_is_no_negative_of_itself_in_a_symmetric_task() -> None:
    rows = [Pair("a", "b"), Pair("c", "a")]
    assert masked(batch(("t", rows), symmetric=True)) == [[0, 1], [1]]
    assert masked(batch(("t", rows))) == [[0], [1]]
