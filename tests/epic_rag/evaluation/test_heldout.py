from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epic_rag.errors import ConfigError, DataError
from epic_rag.evaluation.datasets import normalised
from epic_rag.evaluation.heldout import (
    GENERIC_INSTRUCTION,
    Pair,
    draw_demonstrations,
    file_stem,
    load_pairs,
    make_split,
    mismatch,
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
        if "all share" in str(error) or "no row whose query differs" in str(error):
            return
        raise
    assert 1 <= len(split.queries) <= queries
    assert len({normalised(query) for query in split.queries}) == len(split.queries)
    assert len(set(split.documents)) == len(split.documents)

    def key(text: str) -> str:
        return " ".join(text.split())

    asked = {normalised(query) for query in split.queries}
    answers = {key(split.documents[row]) for relevant in split.relevant for row in relevant}
    groups = {row.get("group") for row in rows if normalised(row["query"]) in asked} - {None}
    for pair in split.pool:
        assert normalised(pair.query) not in asked
        assert key(pair.passage) not in answers
        assert pair.group is None or pair.group not in groups
    for query, relevant, excluded in zip(split.queries, split.relevant, split.excluded, strict=True):
        positives = {key(row["positive"]) for row in rows if row["query"] == query}
        assert any(key(split.documents[row]) in positives for row in relevant)
        assert not {*excluded} & {*relevant}
        for number, document in enumerate(split.documents):
            assert (number in excluded) == (normalised(document) == normalised(query))
    others = [normalised(query) for query in split.other_queries]
    assert len(others) == len({*others}) <= documents
    assert not {*others} & (asked | {normalised(pair.query) for pair in split.pool})
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
    with pytest.raises(DataError, match=r'has no instruction for "other", it has terms'):
        make_split(jsonl(tmp_path / "other.jsonl", _pairs(4)))
    alone = tmp_path / "alone"
    assert make_split(jsonl(alone / "mine.jsonl", _pairs(8))).instruction == GENERIC_INSTRUCTION
    assert "instructions.json" in caplog.text
    assert file_stem(Path("a/b.c.jsonl.gz")) == "b.c"


def test_what_counts_as_relevant(tmp_path: Path, jsonl: Callable[[Path, Any], Path]) -> None:
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
            found.setdefault(normalised(query), set()).update(texts)
            if query == "Echo" and "echo" in split.documents:
                assert excluded == (split.documents.index("echo"),), "the query itself may not come first"
    assert found["same question"] == {"answer one", "answer two"}
    assert found["other words"] == {"answer one"}
    assert found["asks for red"] == found["asks for red too"] == {"red one", "red two"}
    assert found["echo"] == {"the echo's answer"}


def test_files_that_cannot_be_split(tmp_path: Path, jsonl: Callable[[Path, Any], Path]) -> None:
    one = [{"query": f"q{number}", "positive": "p"} for number in range(5)]
    with pytest.raises(DataError, match=r"has 5 rows that all share a query, a positive or a group"):
        make_split(jsonl(tmp_path / "a.jsonl", one), instruction="x")
    echoes = [{"query": f"q{number}", "positive": f"Q{number}"} for number in range(5)]
    with pytest.raises(DataError, match="no row whose query differs"):
        make_split(jsonl(tmp_path / "b.jsonl", echoes), instruction="x")
    with pytest.raises(DataError, match=r'c\.jsonl, line 1: "query" and "positive" may not be empty'):
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
    with pytest.raises(DataError, match="7 demonstrations were asked, 6 rows are free"):
        draw_demonstrations(pool, 7, seed=0)


@settings(max_examples=200, deadline=None)
@given(components=st.lists(st.integers(0, 3), min_size=1, max_size=10), k=st.integers(1, 10), seed=st.integers(0, 3))
def test_shuffled_passages_are_wrong(components: list[int], k: int, seed: int) -> None:
    pool = [Pair(f"q{number}", f"p{number}", None, component) for number, component in enumerate(components)]
    drawn = draw_demonstrations(pool, min(k, len(pool)), seed=seed)
    wrong = mismatch(drawn, pool, seed=seed)
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
