from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epic_rag.errors import ConfigError, DataError
from epic_rag.evaluation.datasets import normalize_text
from epic_rag.evaluation.embedding_store import EmbeddingStore
from epic_rag.evaluation.heldout import (
    GENERIC_INSTRUCTION,
    HeldoutSplit,
    Pair,
    draw_demonstrations,
    file_stem,
    in_collection,
    load_pairs,
    make_split,
    passage_key,
    score_heldout,
    score_heldout_bm25,
    shuffle_passages,
    with_instruction,
)

ROWS = st.lists(
    st.builds(
        lambda query, passage, group: {"query": query, "positive": passage, **({"group": group} if group else {})},
        st.sampled_from([f"query {number}" for number in range(8)] + ["Query  1", "same"]),
        st.sampled_from([f"passage {number}" for number in range(8)] + ["passage  2", "same"]),
        st.sampled_from([None, None, None, "red", "blue"]),
    ),
    min_size=1,
    max_size=16,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, queries=st.integers(1, 6), documents=st.integers(1, 8), seed=st.integers(0, 5))
def test_demonstrations_share_nothing_with_test_queries(
    tmp_path: Path, rows: list[dict[str, str]], queries: int, documents: int, seed: int
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        split = make_split(path, queries=queries, documents=documents, seed=seed, instruction="find it")
    except DataError as error:
        if "are connected" in str(error) or "No row of" in str(error):
            return
        raise
    assert 1 <= len(split.queries) <= queries
    assert len({normalize_text(query) for query in split.queries}) == len(split.queries)
    assert len(set(split.documents)) == len(split.documents)

    def key(text: str) -> str:
        return " ".join(text.split())

    asked = {normalize_text(query) for query in split.queries}
    answers = {key(split.documents[row]) for relevant in split.relevant for row in relevant}
    groups = {row.get("group") for row in rows if normalize_text(row["query"]) in asked} - {None}
    for pair in split.pool:
        assert normalize_text(pair.query) not in asked
        assert key(pair.passage) not in answers
        assert pair.group is None or pair.group not in groups
    for query, relevant, excluded in zip(split.queries, split.relevant, split.excluded, strict=True):
        positives = {key(row["positive"]) for row in rows if row["query"] == query}
        assert any(key(split.documents[row]) in positives for row in relevant)
        assert not {*excluded} & {*relevant}
        for number, document in enumerate(split.documents):
            assert (number in excluded) == (normalize_text(document) == normalize_text(query))
    others = [normalize_text(query) for query in split.other_queries]
    assert len(others) == len({*others}) <= documents
    assert not {*others} & (asked | {normalize_text(pair.query) for pair in split.pool})
    assert split == make_split(path, queries=queries, documents=documents, seed=seed, instruction="find it")


def _pairs(count: int) -> list[dict[str, str]]:
    return [{"query": f"query {number}", "positive": f"passage {number}"} for number in range(count)]


def test_sizes_and_instruction(
    tmp_path: Path, jsonl: Callable[[Path, Any], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl(tmp_path / "terms.jsonl.gz", _pairs(100))
    (tmp_path / "instructions.json").write_text('{"terms": "Given a term, find it"}', encoding="utf-8")
    split = make_split(path, queries=20, documents=50)
    assert (split.name, split.instruction) == ("terms", "Given a term, find it")
    assert (len(split.queries), len(split.documents), len(split.pool)) == (20, 50, 25)
    # Never fewer documents than answers, never more than the rows outside the pool have.
    assert len(make_split(path, queries=20, documents=1).documents) == 20
    assert len(make_split(path, queries=500, documents=500).documents) == 75
    assert make_split(path, queries=20, seed=1).queries != split.queries
    with pytest.raises(ConfigError, match="0 test queries"):
        make_split(path, queries=0)
    with pytest.raises(DataError, match=r'has no instruction for "other". Add one'):
        make_split(jsonl(tmp_path / "other.jsonl", _pairs(4)))
    alone = tmp_path / "alone"
    assert make_split(jsonl(alone / "mine.jsonl", _pairs(8))).instruction == GENERIC_INSTRUCTION
    assert "instructions.json" in caplog.text
    assert file_stem(Path("a/b.c.jsonl.gz")) == "b.c"


def test_relevant_documents(tmp_path: Path, jsonl: Callable[[Path, Any], Path]) -> None:
    rows = [
        {"query": "same question", "positive": "answer one"},
        {"query": "Same  question", "positive": "answer two"},
        {"query": "asks for red", "positive": "red one", "group": "red"},
        {"query": "asks for red too", "positive": "red two", "group": "red"},
        {"query": "other words", "positive": "answer  one"},
        {"query": "Echo", "positive": "the echo's answer"},
        {"query": "asks for echo", "positive": "echo"},
    ]
    found: dict[str, set[str]] = {}
    for seed in range(20):  # until every component has been on the test side
        split = make_split(
            jsonl(tmp_path / "rows.jsonl", rows), queries=50, documents=50, seed=seed, instruction="find it"
        )
        for query, relevant, excluded in zip(split.queries, split.relevant, split.excluded, strict=True):
            texts = {" ".join(split.documents[row].split()) for row in relevant}
            found.setdefault(normalize_text(query), set()).update(texts)
            if query == "Echo" and "echo" in split.documents:
                assert excluded == (split.documents.index("echo"),), "the query itself may not come first"
    assert found["same question"] == {"answer one", "answer two"}
    assert found["other words"] == {"answer one"}
    assert found["asks for red"] == found["asks for red too"] == {"red one", "red two"}
    assert found["echo"] == {"the echo's answer"}


def test_files_that_cannot_be_split(tmp_path: Path, jsonl: Callable[[Path, Any], Path]) -> None:
    one = [{"query": f"q{number}", "positive": "p"} for number in range(5)]
    with pytest.raises(DataError, match=r"All 5 rows of .*a.jsonl are connected by a query"):
        make_split(jsonl(tmp_path / "a.jsonl", one), instruction="x")
    echoes = [{"query": f"q{number}", "positive": f"Q{number}"} for number in range(5)]
    with pytest.raises(DataError, match=r"No row of .*b.jsonl has a query that differs"):
        make_split(jsonl(tmp_path / "b.jsonl", echoes), instruction="x")
    with pytest.raises(DataError, match=r'c\.jsonl:1 has no text for "query"'):
        load_pairs(jsonl(tmp_path / "c.jsonl", [{"query": " ", "positive": "p"}]))


def test_draws_are_nested_seeded_and_varied() -> None:
    # Two rows of each of three components; two components have the same passage in both rows.
    pool = [
        Pair(f"q{number}", f"p{number // 2}" if number < 4 else f"p{number}", None, number // 2) for number in range(6)
    ]
    for seed in range(10):
        drawn = draw_demonstrations(pool, 6, seed=seed)
        assert sorted(pair.query for pair in drawn) == [f"q{number}" for number in range(6)]
        assert draw_demonstrations(pool, 3, seed=seed) == drawn[:3]
        assert {pair.component for pair in drawn[:3]} == {0, 1, 2}
        assert len({pair.passage for pair in drawn[:4]}) == 4
    assert len({tuple(draw_demonstrations(pool, 3, seed=seed)) for seed in range(10)}) > 3
    with pytest.raises(DataError, match="6 rows are free for 7 demonstrations"):
        draw_demonstrations(pool, 7, seed=0)


@settings(max_examples=200, deadline=None)
@given(components=st.lists(st.integers(0, 3), min_size=1, max_size=10), k=st.integers(1, 10), seed=st.integers(0, 3))
def test_shuffled_passages_are_wrong(components: list[int], k: int, seed: int) -> None:
    pool = [Pair(f"q{number}", f"p{number}", None, component) for number, component in enumerate(components)]
    drawn = draw_demonstrations(pool, min(k, len(pool)), seed=seed)
    wrong = shuffle_passages(drawn, pool, seed=seed)
    if len(set(components)) == 1:
        assert wrong is None
        return
    assert wrong is not None
    component_of = {pair.passage: pair.component for pair in pool}
    for pair, shown in zip(drawn, wrong, strict=True):
        assert shown.query == pair.query
        assert component_of[shown.passage] != pair.component
    if len(drawn) > 1 and len({pair.component for pair in drawn}) == len(drawn):
        assert {shown.passage for shown in wrong} == {pair.passage for pair in drawn}, "the same passages, shuffled"


def _file(name: str, **changes: Any) -> HeldoutSplit:
    fields: dict[str, Any] = {
        "name": name,
        "instruction": f"find {name}",
        "revision": "1",
        "queries": (f"{name} query",),
        "documents": (f"{name} one", f"{name} two"),
        "relevant": ((1,),),
        "excluded": ((),),
        "pool": (),
    }
    return HeldoutSplit(**{**fields, **changes})


def test_one_corpus_of_all_documents() -> None:
    first = _file("a", documents=("a one", "shared text", "B  QUERY"), relevant=((1,),), other_queries=("hidden",))
    second = _file(
        "b",
        documents=("b one", "shared  text", "A query"),
        relevant=((0, 1),),
        # Kept out: a test query of the other file, in other case; a document; and what the first file has added.
        other_queries=("A  Query", "B one", "Hidden", "what else"),
    )
    assert in_collection([first, second], "own") == [first, second]
    for collection in ("pooled", "pooled-with-queries"):
        pooled = in_collection([first, second], collection)
        corpus = ("a one", "shared text", "B  QUERY", "b one", "A query")
        if collection == "pooled-with-queries":
            corpus += ("hidden", "what else")
        assert [split.documents for split in pooled] == [corpus, corpus]
        assert [split.relevant for split in pooled] == [((1,),), ((1, 3),)], "the shared text answers both"
        assert [split.excluded for split in pooled] == [((4,),), ((2,),)], "whichever file a query's own text is from"
        assert {split.collection for split in pooled} == {collection}
        assert {text for split in pooled for part in split.parts for text in part} >= {*corpus}
        assert [(split.name, split.queries, split.instruction) for split in pooled] == [
            ("a", ("a query",), "find a"),
            ("b", ("b query",), "find b"),
        ]


def test_symmetric_files_are_refused() -> None:
    splits = [_file("a"), _file("b", symmetric=True)]
    assert in_collection(splits, "own") == splits
    with pytest.raises(ConfigError, match=r"Documents of b are .* Leave the file out, or use --heldout-collection own"):
        in_collection(splits, "pooled")


def test_instruction_sources() -> None:
    split = _file("a")
    assert with_instruction(split, "own", default="d") is split
    default = with_instruction(split, "default", default="find what fits")
    assert (default.instruction, default.instruction_source) == ("find what fits", "default")
    assert with_instruction(split, "default", default=None).instruction == ""
    none = with_instruction(split, "none", default="find what fits")
    assert (none.instruction, none.instruction_source) == ("", "none")


OVERLAPPING_ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "query": st.sampled_from([f"text {number}" for number in range(9)] + ["Text  1"]),
            "positive": st.sampled_from([f"passage {number}" for number in range(9)] + ["text 2", "TEXT 3"]),
        }
    ),
    min_size=3,
    max_size=14,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=OVERLAPPING_ROWS, second=OVERLAPPING_ROWS, seed=st.integers(0, 3))
def test_properties_of_pooled_collections(
    tmp_path: Path, jsonl: Callable[[Path, Any], Path], first: Any, second: Any, seed: int
) -> None:
    try:
        splits = [
            make_split(jsonl(tmp_path / f"{name}.jsonl", rows), queries=4, documents=6, seed=seed, instruction=name)
            for name, rows in (("first", first), ("second", second))
        ]
    except DataError:  # too few components, or no query that differs from its positive
        return
    pooled = in_collection(splits, "pooled-with-queries")
    (corpus,) = {split.documents for split in pooled}
    assert len({*corpus}) == len(corpus)
    assert json.dumps(corpus) == json.dumps(in_collection(splits, "pooled-with-queries")[0].documents)
    documents = {passage_key(text) for split in splits for text in split.documents}
    added = {text for text in corpus if passage_key(text) not in documents}
    asked = {normalize_text(query) for split in splits for query in split.queries}
    assert not {normalize_text(text) for text in added} & asked
    assert added <= {query for split in splits for query in split.other_queries}
    for own, split in zip(splits, pooled, strict=True):
        for query, before, after, skipped in zip(
            split.queries, own.relevant, split.relevant, split.excluded, strict=True
        ):
            wanted = {passage_key(own.documents[row]) for row in before}
            assert {passage_key(corpus[row]) for row in after} == wanted
            assert {*skipped} == {
                row for row, text in enumerate(corpus) if normalize_text(text) == normalize_text(query)
            }


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


def test_demonstrations_of_each_condition(written: Any) -> None:
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


def test_plain_models(written: Any) -> None:
    encoder = written(VECTORS)
    result = score_heldout(EmbeddingStore(encoder), _split(), ks=(0, 4), controls=True, plain=True)
    assert [(score.condition, score.k) for score in result.scores] == [("none", 0)]
    assert result.instruction is None
    assert [call.instruction for call in encoder.calls if call.role == "query"] == [""]


def test_documents_of_symmetric_tasks(written: Any) -> None:
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


def test_shared_lists_are_encoded_once(written: Any) -> None:
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
