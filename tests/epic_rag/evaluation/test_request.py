from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from epic_rag.errors import ConfigError, PromptError
from epic_rag.evaluation.runner import (
    COLLECTIONS,
    EvaluationRequest,
    ModelSpec,
    parse_banks,
    parse_choices,
    parse_ks,
    parse_models,
    split_names,
)


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([], [("epic-minilm", "epic-minilm", "auto")]),
        (["epic-minilm", "runs/a/final"], [("epic-minilm", "epic-minilm", "auto"), ("runs/a/final", "final", "auto")]),
        (
            ["runs/a/final", "runs/b/final"],
            [("runs/a/final", "runs/a/final", "auto"), ("runs/b/final", "runs/b/final", "auto")],
        ),
        (
            ["a=runs/x/final:prompted", "b=runs/x/final:plain"],
            [("runs/x/final", "a", "prompted"), ("runs/x/final", "b", "plain")],
        ),
        (["runs/lr=1e-4/final"], [("runs/lr=1e-4/final", "final", "auto")]),
        (
            ["sentence-transformers/all-MiniLM-L6-v2:plain"],
            [("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2", "plain")],
        ),
        (["bm25", "words=bm25"], [("bm25", "bm25", "bm25"), ("bm25", "words", "bm25")]),
        (["./bm25", "a/bm25:prompted"], [("./bm25", "./bm25", "auto"), ("a/bm25", "a/bm25", "prompted")]),
    ],
)
def test_models(specs: list[str], expected: list[tuple[str, str, Any]]) -> None:
    assert parse_models(specs) == tuple(ModelSpec(*item) for item in expected)


@pytest.mark.parametrize("specs", [["a=x", "a=y"], ["x", "x"], ["a="], [":plain"]])
def test_models_that_cannot_be_told_apart_or_are_none(specs: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"two models are called|names no model"):
        parse_models(specs)


def test_small_languages() -> None:
    assert parse_ks("8, 0,1,8") == (0, 1, 8)
    assert parse_banks(["Cranfield=papers", "x=a=b"]) == {"Cranfield": "papers", "x": "a=b"}
    assert split_names(" a, b,,") == ("a", "b")
    assert parse_choices(["pooled, own", "pooled"], COLLECTIONS, "--x") == ("pooled", "own")
    for text in ("", "a", "-1", "1.5"):
        with pytest.raises(ConfigError, match="no list of numbers"):
            parse_ks(text)
    for text in ("Cranfield", "=papers", "Cranfield="):
        with pytest.raises(ConfigError, match="is no SET=SOURCE"):
            parse_banks([text])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": ()}, "no model was named"),
        ({"num_demonstrations": ()}, "numbers of demonstrations"),
        ({"num_demonstrations": (-1,)}, "numbers of demonstrations"),
        ({"strategy": "magic"}, "strategy is 'magic', known are"),
        ({"draws": 0}, "0 draws"),
        ({"data": None}, "nothing to evaluate on"),
        ({"kinds": ("retrieval", "poems")}, '--kinds names "poems"; use one or more of retrieval, reranking'),
        ({"heldout_collections": ()}, "--heldout-collection names nothing; use one or more of own, pooled"),
        ({"heldout_instructions": ("mine",)}, '--heldout-instruction names "mine"; use one or more of own, default'),
    ],
)
def test_requests_that_cannot_work(changes: dict[str, Any], said: str) -> None:
    good: dict[str, Any] = {"models": (ModelSpec("m", "m"),), "data": Path("data")}
    assert EvaluationRequest(**good).record()["data"] == "data"
    with pytest.raises((ConfigError, PromptError), match=said):
        EvaluationRequest(**{**good, **changes})
