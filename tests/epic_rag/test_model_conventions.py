"""`epic_rag.model_conventions`: prompts by name, and instructions in prompts."""

from __future__ import annotations

import pytest

from epic_rag.model_conventions import (
    CONVENTIONS,
    fill_instruction,
    find_convention,
    find_languages,
    has_instruction,
)


@pytest.mark.parametrize(
    ("name", "query", "document"),
    [
        ("intfloat/multilingual-e5-small", "query: ", "passage: "),
        ("intfloat/e5-base-v2", "query: ", "passage: "),
        ("/models/E5-Large-v2/", "query: ", "passage: "),
        ("BAAI/bge-small-en-v1.5", "Represent this sentence for searching relevant passages: ", ""),
        ("bge-m3", "", ""),
        ("bge-m3:latest", "", ""),
        ("nomic-embed-text:v1.5", "search_query: ", "search_document: "),
        ("Snowflake/snowflake-arctic-embed-m-v2.0", "query: ", ""),
        ("snowflake-arctic-embed2", "query: ", ""),
        ("snowflake-arctic-embed:335m", "Represent this sentence for searching relevant passages: ", ""),
        ("mxbai-embed-large", "Represent this sentence for searching relevant passages: ", ""),
        ("embeddinggemma:300m", "task: search result | query: ", "title: none | text: "),
    ],
)
def test_names_of_a_family(name: str, query: str, document: str) -> None:
    found = find_convention(name)
    assert found is not None
    assert (found.query, found.document) == (query, document)


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "text-embedding-3-small", "gte-small", "me5", "", "some5-model"])
def test_other_names(name: str) -> None:
    assert find_convention(name) is None


def test_instruct_models_take_instructions_and_others_do_not() -> None:
    e5 = find_convention("intfloat/e5-mistral-7b-instruct")
    assert e5 is not None
    assert has_instruction(e5.query)
    assert fill_instruction(e5.query, "Find the answer") == "Instruct: Find the answer\nQuery: "
    assert fill_instruction("task: search result | query: ", "code") == "task: code | query: "
    assert fill_instruction("query: ", "Find the answer") == "query: "
    assert fill_instruction(e5.query, None) == fill_instruction(e5.query, "") == e5.query


def test_every_convention_names_its_source() -> None:
    assert all(entry.source for entry in CONVENTIONS)


@pytest.mark.parametrize(
    ("name", "languages"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", ("en",)),
        ("BAAI/bge-small-en-v1.5", ("en",)),
        ("BAAI/bge-base-zh-v1.5", ("zh",)),
        ("bge-m3:latest", ("multilingual",)),
        ("intfloat/e5-small-v2", ("en",)),
        ("/models/multilingual-e5-small/", ("multilingual",)),
        ("sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2", ("multilingual",)),
        ("snowflake-arctic-embed2", ("multilingual",)),
        ("Snowflake/snowflake-arctic-embed-m-v1.5", ("en",)),
        ("nomic-embed-text-v2-moe", ("multilingual",)),
        ("ibm-granite/granite-embedding-small-english-r2", ("en",)),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", ("en",)),
        ("my-model", ()),
        ("zhongguo", ()),
        ("", ()),
    ],
)
def test_languages_by_name(name: str, languages: tuple[str, ...]) -> None:
    assert find_languages(name) == languages
