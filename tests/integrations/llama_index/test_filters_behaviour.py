"""MetadataFilters of LlamaIndex on an index: the meaning of each operator, errors, and exact results."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag_chroma import KNOWN_KEYS, ChromaIndexer, Comparison, SearchFilters
from epic_rag_chroma.search.conditions import fields_of
from llama_index.retrievers.epic import EpicRetriever, to_search_filters

SOAK = os.environ.get("EPIC_RAG_SOAK") == "1"

ROWS: list[dict[str, Any]] = [
    {"path": "guide.md", "kind": "markdown", "lang": "", "heading_path": "Guide > Install", "first_line": 1, "last_line": 9},
    {"path": "guide.md", "kind": "markdown", "lang": "", "heading_path": "Guide > Remove", "first_line": 10, "last_line": 12},
    {"path": "src/Tool.py", "kind": "code", "lang": "python", "heading_path": "", "first_line": 1, "last_line": 40},
    {"path": "src/tool.c", "kind": "code", "lang": "c", "heading_path": "", "first_line": 3, "last_line": 3},
    {"path": "paper.pdf", "kind": "pdf", "lang": "", "heading_path": "Results", "page": 3},
    {"path": "paper.pdf", "kind": "pdf", "lang": "", "heading_path": "", "page": 12},
]  # fmt: skip


def one(key: str, operator: str, value: Any = None) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, operator=FilterOperator(operator), value=value)])


def found(filters: MetadataFilters) -> list[int]:
    condition = to_search_filters(filters).condition
    assert condition is not None
    return [
        number
        for number, row in enumerate(ROWS)
        if condition.matches(fields_of({"root": "../docs", **row}, "/home/me/.epic-rag"))
    ]


@pytest.mark.parametrize(
    ("key", "operator", "value", "expected"),
    [
        ("lang", "==", "python", [2]),
        ("kind", "!=", "code", [0, 1, 4, 5]),
        ("page", "==", 3, [4]),
        ("page", "==", 3.0, [4]),
        ("page", "!=", 3, [0, 1, 2, 3, 5]),
        ("page", ">", 3, [5]),
        ("page", ">=", 3, [4, 5]),
        ("page", "<", 3.5, [4]),
        ("first_line", "<=", 3, [0, 2, 3]),
        ("kind", "in", ["pdf", "code"], [2, 3, 4, 5]),
        ("kind", "in", [], []),
        ("page", "nin", [3], [0, 1, 2, 3, 5]),
        ("path", "text_match", "tool", [3]),
        ("path", "text_match_insensitive", "TOOL", [2, 3]),
        ("path", "text_match", "src/", [2, 3]),
        ("heading_path", "==", "Guide > Install", [0]),
        ("heading_path", "contains", "Guide", [0, 1]),
        ("heading_path", "contains", "Gui", []),
        ("heading_path", "any", ["Install", "Results"], [0, 4]),
        ("heading_path", "all", ["Install", "Guide"], [0]),
        ("heading_path", "all", ["Install", "Results"], []),
        ("heading_path", "is_empty", None, [2, 3, 5]),
        ("page", "is_empty", None, [0, 1, 2, 3]),
        ("lang", "is_empty", None, [0, 1, 4, 5]),
        ("file_name", "==", "Tool.py", [2]),
        ("file_path", "==", "/home/me/docs/src/tool.c", [3]),
        ("root", "==", "../docs", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_operators(key: str, operator: str, value: Any, expected: list[int]) -> None:
    assert found(one(key, operator, value)) == expected


PYTHON, PDF = one("lang", "==", "python"), one("kind", "==", "pdf")
LATE = one("page", ">", 10)


@pytest.mark.parametrize(
    ("condition", "parts", "expected"),
    [
        ("and", [PDF, LATE], [5]),
        (None, [PDF, LATE], [5]),
        ("or", [PYTHON, LATE], [2, 5]),
        ("not", [PYTHON, PDF], [0, 1, 3]),
        ("not", [PYTHON], [0, 1, 3, 4, 5]),
        ("and", [PDF, MetadataFilters(filters=[LATE], condition=FilterCondition.NOT)], [4]),
        ("or", [PYTHON, MetadataFilters(filters=[PDF, LATE], condition=FilterCondition.AND)], [2, 5]),
        ("and", [], [0, 1, 2, 3, 4, 5]),
        ("or", [], [0, 1, 2, 3, 4, 5]),
        ("not", [], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_nesting(condition: str | None, parts: list[MetadataFilters], expected: list[int]) -> None:
    joined = None if condition is None else FilterCondition(condition)
    assert found(MetadataFilters(filters=parts, condition=joined)) == expected


@pytest.mark.parametrize(
    ("key", "operator", "value", "message"),
    [
        ("author?", "==", "me", "Cannot filter by 'author?'. The keys of an index are chunks, content_hash"),
        ("page", "==", "3", "page == '3' is invalid: page is a number, '3' is not"),
        ("path", "==", 3, "path == 3 is invalid: path is a text, 3 is not"),
        ("page", "in", ["3"], "page in ('3',) is invalid: page is a number, '3' is not"),
        ("path", ">", "a", "path > 'a' is invalid: path is a text. Use ==, in or text_match"),
        ("path", "contains", "a", "path contains 'a' is invalid: path is not a list"),
        ("path", "all", ["a"], "path all ('a',) is invalid: path is not a list"),
        ("page", "text_match", "3", "page text_match '3' is invalid: page is a number"),
        ("lang", "in", "python", "lang in 'python' is invalid: it takes a list of values"),
        ("lang", "==", ["python"], "lang == ('python',) is invalid: it takes one value. Use in"),
        ("lang", "==", None, "lang == None is invalid: it takes one value. Use is_empty"),
    ],
)
def test_filters_without_meaning(key: str, operator: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        EpicRetriever("nowhere", filters=one(key, operator, value))
    assert message in str(error.value)


def test_all_operators_are_known() -> None:
    # A new operator of a later version must fail here, not as a KeyError during a search.
    for operator in FilterOperator:
        several = operator in (FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL)
        number = operator in (FilterOperator.GT, FilterOperator.GTE, FilterOperator.LT, FilterOperator.LTE)
        value: Any = ["a"] if several else 1 if number else "a"
        found(one("page" if number else "heading_path", operator.value, value))
    with pytest.raises(ConfigError, match="Unknown operator '~'"):
        Comparison("path", "~", "a")  # type: ignore[arg-type]


# -- against LlamaIndex's own evaluation --------------------------------------------------------------------


def expected_by_llama_index(filters: MetadataFilters, row: dict[str, Any]) -> bool:
    """Evaluate a filter as SimpleVectorStore does; it does not support nesting, so leaf by leaf."""
    verdicts = []
    for part in filters.filters:
        if isinstance(part, MetadataFilters):
            verdicts.append(expected_by_llama_index(part, row))
        else:
            lists = part.operator in (FilterOperator.CONTAINS, FilterOperator.ANY, FilterOperator.ALL)
            headings = row["heading_path"].split(" > ") if row["heading_path"] else []
            seen = {**row, "heading_path": headings} if lists else row
            verdicts.append(build_metadata_filter_fn(lambda _, seen=seen: seen, MetadataFilters(filters=[part]))("id"))
    if not verdicts:
        return True
    if filters.condition == FilterCondition.OR:
        return any(verdicts)
    return not any(verdicts) if filters.condition == FilterCondition.NOT else all(verdicts)


TEXTS = {
    "path": ["guide.md", "src/Tool.py", "src/tool.c", "tool", ".md", "", "src"],
    "kind": ["markdown", "code", "pdf", "e"],
    "lang": ["", "python", "c"],
    "heading_path": ["", "Guide", "Install", "Guide > Install", "Results", "Gui"],
}
NUMBERS = st.one_of(st.integers(0, 14), st.sampled_from([2.5, 3.0, 9.5]))


def leaves(some: dict[str, list[str]]) -> st.SearchStrategy[MetadataFilter]:
    def made(key: str, operator: str, value: Any) -> MetadataFilter:
        return MetadataFilter(key=key, operator=FilterOperator(operator), value=value)

    number_keys = st.sampled_from(["page", "first_line", "last_line"])
    text_keys = st.sampled_from(sorted(some))
    texts = text_keys.flatmap(lambda key: st.tuples(st.just(key), st.sampled_from(some[key])))
    text_lists = text_keys.flatmap(
        lambda key: st.tuples(st.just(key), st.lists(st.sampled_from(some[key]), max_size=3))
    )
    headings = st.lists(st.sampled_from(some["heading_path"]), max_size=3)
    return st.one_of(
        st.builds(made, number_keys, st.sampled_from(["==", "!=", ">", ">=", "<", "<="]), NUMBERS),
        st.builds(made, number_keys, st.sampled_from(["in", "nin"]), st.lists(st.integers(0, 14), max_size=4)),
        st.builds(
            lambda pair, operator: made(pair[0], operator, pair[1]),
            texts,
            st.sampled_from(["==", "!=", "text_match", "text_match_insensitive"]),
        ),
        st.builds(lambda pair, operator: made(pair[0], operator, pair[1]), text_lists, st.sampled_from(["in", "nin"])),
        st.builds(
            lambda operator, value: made("heading_path", operator, value), st.sampled_from(["any", "all"]), headings
        ),
        st.builds(lambda value: made("heading_path", "contains", value), st.sampled_from(some["heading_path"])),
        st.builds(lambda key: made(key, "is_empty", None), st.sampled_from(["page", "first_line", *some])),
    )


def trees(some: dict[str, list[str]]) -> st.SearchStrategy[MetadataFilters]:
    def joined(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[MetadataFilters]:
        return st.builds(
            lambda inside, condition: MetadataFilters(filters=inside, condition=condition),
            st.lists(parts, max_size=3),
            st.sampled_from([None, *FilterCondition]),
        )

    return joined(st.recursive(leaves(some), joined, max_leaves=6))


@settings(max_examples=5000 if SOAK else 300, deadline=None)
@given(trees(TEXTS))
def test_same_matches_as_llama_index(filters: MetadataFilters) -> None:
    assert found(filters) == [number for number, row in enumerate(ROWS) if expected_by_llama_index(filters, row)]


def test_filters_are_values() -> None:
    filters = to_search_filters(MetadataFilters(filters=[PYTHON, PDF], condition=FilterCondition.OR))
    assert pickle.loads(pickle.dumps(filters)) == filters == copy.deepcopy(filters)
    assert filters
    assert not SearchFilters()
    assert len(set(KNOWN_KEYS)) == len(KNOWN_KEYS)


# -- on a real index --------------------------------------------------------------------------------------------

WORDS = ["install", "remove", "folder", "cats", "sleep", "manual", "tool"]


def corpus() -> dict[str, str]:
    """Files that share words, so that keyword and hybrid search find everything, in several formats."""
    files = {}
    for number in range(6):
        text = " ".join(WORDS[(number + step) % 7] for step in range(7))
        files[f"guide/{number}.md"] = (
            f"# Guide\n\n## Install {number}\n\n{text}.\n\n## Remove\n\n{text} again {number}.\n"
        )
        files[f"src/tool{number}.py"] = f"def tool{number}(folder):\n    return 'remove install {number}'\n"
        files[f"{number}.txt"] = f"Cats sleep in folder {number}; remove and install the tool, says the manual.\n"
    return files


@pytest.fixture(scope="module")
def retriever(
    tmp_path_factory: pytest.TempPathFactory,
    tree: Callable[[Path, dict[str, Any]], Path],
    tiny_encoder: EpicEncoder,
) -> Iterator[EpicRetriever]:
    folder = tmp_path_factory.mktemp("filters")
    tree(folder / "docs", dict(corpus()))
    with ChromaIndexer(folder / "index", encoder=tiny_encoder) as indexer:
        indexer.index([folder / "docs"])
    with EpicRetriever(folder / "index", encoder=tiny_encoder, collapse=False) as made:
        yield made


TEXTS_OF_INDEX = {
    "path": ["guide/1.md", "src/tool2.py", "3.txt", "tool", "guide/", "missing"],
    "kind": ["markdown", "code", "text", "m"],
    "lang": ["", "python"],
    "heading_path": ["", "Guide", "Guide > Remove", "Install 3"],
}


@pytest.mark.parametrize("mode", ["dense", "hybrid", "keyword"])
@settings(max_examples=200 if SOAK else 15, deadline=None)
@given(filters=trees(TEXTS_OF_INDEX), k=st.integers(1, 30))
def test_search_finds_the_best_matches(retriever: EpicRetriever, mode: Any, filters: MetadataFilters, k: int) -> None:
    best = retriever.with_settings(mode=mode, similarity_top_k=k)
    everything = retriever.with_settings(mode=mode, similarity_top_k=99).retrieve("remove install")
    # Rows have no key where nodes leave out what is empty.
    bare = {"lang": "", "heading_path": ""}
    expected = [node for node in everything if expected_by_llama_index(filters, {**bare, **node.node.metadata})]
    found = best.with_settings(filters=filters).retrieve("remove install")
    if mode == "hybrid":  # ranks are counted among the matches, so fusion may order them differently
        assert len(found) == min(k, len(expected))
        assert {node.node.node_id for node in found} <= {node.node.node_id for node in expected}
    else:
        assert [node.node.node_id for node in found] == [node.node.node_id for node in expected[:k]]
    assert len(everything) == 24
