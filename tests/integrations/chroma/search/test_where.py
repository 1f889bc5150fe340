"""Filters as Chroma's `where`: rows that a real server returns are those that the conditions select."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epic_rag_chroma import ChromaServer, Combination, Comparison, Condition, Record, Shards
from epic_rag_chroma.search.where import to_where
from tests.helpers.servers import ChromaProcess
from tests.helpers.vector_rows import INFO, make_rows

ROWS = make_rows(60)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shards]:
    with ChromaProcess(tmp_path_factory.mktemp("server")) as server, Shards(ChromaServer(server.url), "rows") as opened:
        opened.begin(INFO, 2, has_all_rows=True)
        opened.write(ROWS)
        opened.end()
        yield opened


NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 2.0, 2.5, 30])
TEXTS = {"kind": ["markdown", "code", "pdf", "none"], "path": ["docs/1.md", "docs/2.md", "x"], "lang": ["python"]}


def comparisons() -> st.SearchStrategy[Comparison]:
    text = st.sampled_from(sorted(TEXTS)).flatmap(
        lambda key: st.one_of(
            st.builds(Comparison, st.just(key), st.sampled_from(["==", "!="]), st.sampled_from(TEXTS[key])),
            st.builds(
                Comparison,
                st.just(key),
                st.sampled_from(["in", "nin"]),
                st.lists(st.sampled_from(TEXTS[key]), max_size=2).map(tuple),
            ),
        )
    )
    keys = st.sampled_from(["page", "first_line", "position"])
    number = st.builds(Comparison, keys, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), NUMBERS)
    part = st.builds(Comparison, st.just("path"), st.just("text_match"), st.sampled_from(["1", "docs"]))
    return st.one_of(text, number, part)


CONDITIONS: st.SearchStrategy[Condition] = st.recursive(
    comparisons(),
    lambda inner: st.builds(Combination, st.sampled_from(["and", "or", "not"]), st.lists(inner, max_size=3).map(tuple)),
    max_leaves=5,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(condition=CONDITIONS)
def test_what_chroma_selects_and_what_is_left_are_the_condition(shards: Shards, condition: Condition) -> None:
    where, rest = to_where((condition,))
    found: list[Record] = ROWS if where is None else shards.where(where)
    passed = {row.id for row in found if all(each.matches(row.metadata) for each in rest)}
    assert passed == {row.id for row in ROWS if condition.matches(row.metadata)}


@pytest.mark.parametrize(
    ("condition", "where"),
    [
        (Comparison("kind", "==", "pdf"), {"kind": {"$eq": "pdf"}}),
        (Comparison("page", ">=", 3.0), {"page": {"$gte": 3}}),
        (Comparison("lang", "nin", ("go", "c")), {"lang": {"$nin": ["go", "c"]}}),
        (
            Combination("not", (Comparison("kind", "==", "pdf"), Comparison("lang", "in", ("c",)))),
            {"$and": [{"kind": {"$ne": "pdf"}}, {"lang": {"$nin": ["c"]}}]},
        ),
        (
            Combination("or", (Comparison("kind", "==", "pdf"), Comparison("kind", "==", "code"))),
            {"$or": [{"kind": {"$eq": "pdf"}}, {"kind": {"$eq": "code"}}]},
        ),
    ],
)
def test_translations(condition: Condition, where: dict[str, Any]) -> None:
    assert to_where((condition,)) == (where, ())


@pytest.mark.parametrize(
    "condition",
    [
        Comparison("page", ">", 2.5),
        Comparison("title", "==", "a title"),
        Comparison("file_name", "==", "a.md"),
        Comparison("path", "text_match", "docs"),
        Comparison("path", "==", "Übersicht.md"),
        Comparison("heading_path", "contains", "Install"),
        Combination("not", (Comparison("page", ">", 2),)),
        Combination("or", (Comparison("kind", "==", "pdf"), Comparison("path", "text_match", "x"))),
    ],
)
def test_what_chroma_cannot_evaluate_is_left(condition: Condition) -> None:
    assert to_where((condition,)) == (None, (condition,))
