from __future__ import annotations

import math

import numpy as np
import pytest

from epic_rag.metrics import mean_and_error, ndcg_at_k, ndcg_of_scores


def _rows(*angles: float) -> np.ndarray:
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_ndcg_by_hand() -> None:
    documents = _rows(0, 30, 60)
    queries = _rows(-5, 51, 90)  # rankings: 0 1 2, then 2 1 0, then 2 1 0
    scores = ndcg_at_k(queries, documents, [[1], {0: 2, 2: 1}, []])
    second = (1 + 2 / math.log2(4)) / (2 + 1 / math.log2(3))
    assert scores == pytest.approx([1 / math.log2(3), second, 0.0])


def gain(*ranks: int) -> float:
    """Discounted gain of relevant documents at these ranks, from 1."""
    return sum(1 / math.log2(rank + 1) for rank in ranks)


@pytest.mark.parametrize(
    ("scores", "relevant", "expected"),
    [
        ([[3, 2, 1]], [[1, 0, 0]], 1.0),
        ([[3, 2, 1]], [[0, 1, 0]], gain(2)),
        ([[3, 2, 1]], [[0, 0, 1]], 0.5),
        ([[3, 2, 1]], [[0, 1, 1]], gain(2, 3) / gain(1, 2)),
        ([[3, 2, 1], [1, 2, 3]], [[1, 0, 0], [1, 0, 0]], 0.75),
        ([list(range(12, 0, -1))], [[0] * 10 + [1, 0]], 0.0),
        ([list(range(12, 0, -1))], [[1] * 12], 1.0),
        ([[1, 1, 1]], [[0, 1, 0]], gain(2)),  # ties in the order of the documents
    ],
)
def test_binary_relevance(scores: list[list[int]], relevant: list[list[int]], expected: float) -> None:
    rows = [np.flatnonzero(row).tolist() for row in relevant]
    assert ndcg_of_scores(np.array(scores, dtype=np.float32), rows).mean() == pytest.approx(expected)


def test_only_the_first_k_ranks_count() -> None:
    documents = _rows(0, 30, 60)
    assert ndcg_at_k(_rows(0), documents, [[2]], k=2) == [0.0]
    assert ndcg_at_k(_rows(0), documents, [[2]], k=3) == pytest.approx([0.5])
    # Three relevant documents, two ranks: the ideal ranking has two as well.
    assert ndcg_at_k(_rows(0), documents, [[0, 1, 2]], k=2) == pytest.approx([1.0])


def test_ties_keep_the_order_of_the_documents() -> None:
    documents = np.repeat(_rows(10), 30, axis=0)
    assert ndcg_at_k(_rows(0), documents, [[0]], k=10) == pytest.approx([1.0])
    assert ndcg_at_k(_rows(0), documents, [[9]], k=10) == pytest.approx([1 / math.log2(11)])
    assert ndcg_at_k(_rows(0), documents, [[10]], k=10) == [0.0]


def test_an_excluded_document_has_no_rank() -> None:
    documents = _rows(0, 30, 60)
    assert ndcg_at_k(_rows(0, 0), documents, [[1], [1]], excluded=[[0], []]) == pytest.approx([1, 1 / math.log2(3)])
    assert ndcg_at_k(_rows(0), documents[:1], [[0]], excluded=[[0]]) == [0.0]
    assert ndcg_at_k(_rows(0), documents, [[2]], excluded=[[0, 1]]) == [1.0]


def test_what_is_not_found_has_no_rank() -> None:
    rows = [np.array([-np.inf, 2.0, 1.0], dtype=np.float32), np.full(3, -np.inf, dtype=np.float32)]
    assert ndcg_of_scores(rows, [[0, 2], [1]]) == pytest.approx([(1 / math.log2(3)) / (1 + 1 / math.log2(3)), 0.0])


def test_ndcg_is_trec_evals() -> None:
    import pytrec_eval

    rng = np.random.default_rng(0)
    queries = rng.normal(size=(300, 8)).astype(np.float32)  # more than one block of queries
    documents = rng.normal(size=(50, 8)).astype(np.float32)
    grades = [
        {int(row): int(grade) for row, grade in zip(rng.choice(50, 6, False), rng.integers(0, 4, 6), strict=True)}
        for _ in queries
    ]
    grades = [{**row, next(iter(row)): 1} for row in grades]
    run = {
        str(number): {str(column): float(value) for column, value in enumerate(row)}
        for number, row in enumerate(queries @ documents.T)
    }
    qrels = {str(number): {str(row): grade for row, grade in item.items()} for number, item in enumerate(grades)}
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    expected = [found[str(number)]["ndcg_cut_10"] for number in range(len(grades))]
    assert ndcg_at_k(queries, documents, grades) == pytest.approx(expected)


def test_mean_and_standard_error() -> None:
    assert mean_and_error(np.array([1.0, 2.0, 3.0])) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert mean_and_error(np.array([4.0])) == (4.0, 0.0)
