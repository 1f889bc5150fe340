from __future__ import annotations

import math
from typing import Any

import pytest

from epic_rag.evaluation.embedding import EmbeddingStore
from epic_rag.evaluation.heldout import HeldoutSplit, Pair, score_heldout, score_heldout_bm25

VECTORS = {
    "d1": (1.0, 0.0),
    "d2": (0.866, 0.5),
    "d3": (0.5, 0.866),
    "q1": (1.0, -0.1),  # ranks d1, d2, d3
    "q2": (1.0, -0.2),
}
POOL = tuple(Pair(f"shown {number}", f"passage {number}", None, number) for number in range(6))
OTHER = tuple(Pair(f"foreign {number}", f"foreign passage {number}", None, number) for number in range(6))
SECOND, THIRD = 1 / math.log2(3), 1 / math.log2(4)


def _split(**changes: Any) -> HeldoutSplit:
    fields: dict[str, Any] = {
        "name": "terms",
        "instruction": "find it",
        "revision": "1",
        "queries": ("q1", "q2"),
        "documents": ("d1", "d2", "d3"),
        "relevant": ((1,), (2,)),
        "excluded": ((), ()),
        "pool": POOL,
    }
    return HeldoutSplit(**{**fields, **changes})


def _helped(text: str, shown: tuple[tuple[str, str], ...]) -> tuple[float, float]:
    """Right demonstrations put q1's answer first; of more than two of them, q2's too."""
    right = all(passage == query.replace("shown", "passage") for query, passage in shown)
    if right and text == "q1":
        return VECTORS["d2"]
    if right and text == "q2" and len(shown) > 2:
        return VECTORS["d3"]
    return VECTORS[text]


def test_scores_and_paired_differences_by_hand(written: Any) -> None:
    encoder = written(VECTORS, with_demonstrations=_helped)
    result = score_heldout(EmbeddingStore(encoder), _split(), ks=(0, 2, 4), draws=3, controls=True, foreign_pool=OTHER)
    found = {(score.condition, score.k): score for score in result.scores}
    assert list(found) == [
        ("none", 0),
        *((condition, k) for k in (2, 4) for condition in ("own", "shuffled", "foreign")),
    ]
    zero = (SECOND + THIRD) / 2
    assert found["none", 0].ndcg_at_10 == pytest.approx(zero)
    assert found["none", 0].versus_zero is None
    two = found["own", 2]
    assert two.ndcg_at_10 == pytest.approx((1 + THIRD) / 2)
    assert two.draws == pytest.approx([(1 + THIRD) / 2] * 3)
    assert two.spread == pytest.approx(0)
    # The queries gain 1 - SECOND and 0: their mean, and half of their distance as standard error (n = 2).
    assert two.versus_zero is not None
    assert two.versus_zero.difference == pytest.approx((1 - SECOND) / 2)
    assert two.versus_zero.standard_error == pytest.approx((1 - SECOND) / 2)
    assert two.versus_shuffled is not None
    assert two.versus_shuffled.difference == pytest.approx((1 - SECOND) / 2)
    assert found["own", 4].ndcg_at_10 == pytest.approx(1.0)
    for condition in ("shuffled", "foreign"):
        control = found[condition, 4]
        assert control.ndcg_at_10 == pytest.approx(zero)
        assert control.versus_zero is not None
        assert control.versus_zero.difference == pytest.approx(0)
        assert control.versus_shuffled is None


def test_what_the_encoder_is_shown(written: Any) -> None:
    encoder = written(VECTORS, with_demonstrations=_helped)
    score_heldout(EmbeddingStore(encoder), _split(), ks=(2, 4), draws=2, controls=True, foreign_pool=OTHER)
    assert [call.role for call in encoder.calls].count("document") == 1, "documents once, whatever is shown"
    queries = [call for call in encoder.calls if call.role == "query"]
    assert {call.instruction for call in queries} == {"find it"}
    assert len(queries) == 1 + 2 * 3 * 2
    own = [
        call.demonstrations
        for call in queries
        if all(p == q.replace("shown", "passage") for q, p in call.demonstrations)
    ]
    assert [len(shown) for shown in own] == [0, 2, 2, 4, 4]
    assert own[1] == own[3][:2], "a smaller k is a prefix of a larger one"
    assert own[1] != own[2], "draws differ"
    pool_queries = {pair.query for pair in POOL}
    shuffled = [
        call.demonstrations
        for call in queries
        if call.demonstrations not in own and call.demonstrations[0][0] in pool_queries
    ]
    assert {tuple(q for q, _ in shown) for shown in shuffled} == {tuple(q for q, _ in shown) for shown in own[1:]}
    foreign = [call for call in queries if call.demonstrations and call.demonstrations[0][0].startswith("foreign")]
    assert len(foreign) == 4


def test_plain_models_see_nothing(written: Any) -> None:
    encoder = written(VECTORS)
    result = score_heldout(EmbeddingStore(encoder), _split(), ks=(0, 4), controls=True, plain=True)
    assert [(score.condition, score.k) for score in result.scores] == [("none", 0)]
    assert result.instruction is None
    assert [call.instruction for call in encoder.calls if call.role == "query"] == [""]


def test_documents_of_symmetric_tasks_are_queries_without_demonstrations(written: Any) -> None:
    encoder = written(VECTORS, with_demonstrations=_helped)
    score_heldout(EmbeddingStore(encoder), _split(symmetric=True), ks=(2,), draws=1)
    assert {call.role for call in encoder.calls} == {"query"}
    documents = [call for call in encoder.calls if "d1" in call.texts]
    assert [(call.instruction, call.demonstrations) for call in documents] == [("find it", ())]


def test_a_pool_of_one_kind_cannot_be_shuffled(written: Any, caplog: pytest.LogCaptureFixture) -> None:
    pool = tuple(Pair(f"shown {number}", "passage", "label", 0) for number in range(4))
    result = score_heldout(
        EmbeddingStore(written(VECTORS, with_demonstrations=_helped)), _split(pool=pool), ks=(2,), controls=True
    )
    assert [score.condition for score in result.scores] == ["none", "own"]
    assert "no wrong passages" in caplog.text


def test_the_spread_is_over_draws(written: Any) -> None:
    seen: list[tuple[tuple[str, str], ...]] = []

    def by_draw(text: str, shown: tuple[tuple[str, str], ...]) -> tuple[float, float]:
        if shown not in seen:
            seen.append(shown)
        return VECTORS["d2"] if text == "q1" and seen.index(shown) == 0 else VECTORS[text]

    result = score_heldout(EmbeddingStore(written(VECTORS, with_demonstrations=by_draw)), _split(), ks=(2,), draws=2)
    own = result.scores[1]
    first, second = (1 + THIRD) / 2, (SECOND + THIRD) / 2
    assert own.draws == pytest.approx([first, second])
    assert own.ndcg_at_10 == pytest.approx((first + second) / 2)
    assert own.spread == pytest.approx((first - second) / math.sqrt(2))


def test_lists_that_corpora_share_are_encoded_once(written: Any) -> None:
    encoder = written(VECTORS)
    store = EmbeddingStore(encoder)
    own = score_heldout(store, _split(), ks=(0,))
    corpus = ("d3", "d2", "q1", "d1")
    parts = (("d1", "d2", "d3"), ("q1",))
    changes = {"documents": corpus, "parts": parts, "relevant": ((1,), (0,)), "excluded": ((2,), ())}
    pooled = score_heldout(store, _split(**changes, collection="pooled-with-queries"), ks=(0,))
    assert [call.texts for call in encoder.calls if call.role == "document"] == [("d1", "d2", "d3"), ("q1",)]
    # q1 ranks d1, d2, d3 as before, its own text left out; for q2 the text of q1 comes first, so d3 is the fourth.
    assert pooled.scores[0].ndcg_at_10 == pytest.approx((SECOND + 1 / math.log2(5)) / 2)
    assert own.scores[0].ndcg_at_10 == pytest.approx((SECOND + THIRD) / 2)
    assert (own.collection, pooled.collection, pooled.documents) == ("own", "pooled-with-queries", 4)


def test_bm25_ranks_by_words() -> None:
    split = _split(
        queries=("the red apples", "green", "nothing shared", "red apple pies"),
        documents=("An apple is red", "a green pear", "red red wine", "red apple pies"),
        relevant=((0,), (0,), (0, 1, 2), (0,)),
        excluded=((3,), (), (), (3,)),
    )
    result = score_heldout_bm25(split)
    (score,) = result.scores
    # Found first (stems: apples is apple), not found, no word in common, and first with its own text left out.
    assert score.ndcg_at_10 == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert (score.condition, score.k, result.instruction, result.instruction_source) == ("none", 0, None, "plain")
