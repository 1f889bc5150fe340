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
from epic_rag.evaluation.heldout import HeldoutSplit, in_collection, make_split, passage_key, with_instruction


def _split(name: str, **changes: Any) -> HeldoutSplit:
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
    first = _split("a", documents=("a one", "shared text", "B  QUERY"), relevant=((1,),), other_queries=("hidden",))
    second = _split(
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
    splits = [_split("a"), _split("b", symmetric=True)]
    assert in_collection(splits, "own") == splits
    with pytest.raises(
        ConfigError, match=r"the documents of b are .* leave the file out, or use --heldout-collection own"
    ):
        in_collection(splits, "pooled")


def test_whose_instruction() -> None:
    split = _split("a")
    assert with_instruction(split, "own", default="d") is split
    default = with_instruction(split, "default", default="find what fits")
    assert (default.instruction, default.instruction_source) == ("find what fits", "default")
    assert with_instruction(split, "default", default=None).instruction == ""
    none = with_instruction(split, "none", default="find what fits")
    assert (none.instruction, none.instruction_source) == ("", "none")


ROWS = st.lists(
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
@given(first=ROWS, second=ROWS, seed=st.integers(0, 3))
def test_what_holds_of_every_pooled_collection(
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
    asked = {normalised(query) for split in splits for query in split.queries}
    assert not {normalised(text) for text in added} & asked
    assert added <= {query for split in splits for query in split.other_queries}
    for own, split in zip(splits, pooled, strict=True):
        for query, before, after, skipped in zip(
            split.queries, own.relevant, split.relevant, split.excluded, strict=True
        ):
            wanted = {passage_key(own.documents[row]) for row in before}
            assert {passage_key(corpus[row]) for row in after} == wanted
            assert {*skipped} == {row for row, text in enumerate(corpus) if normalised(text) == normalised(query)}
