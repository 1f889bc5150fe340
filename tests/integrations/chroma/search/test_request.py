"""`SearchRequest`: keyword settings sorted into request and prompt."""

from __future__ import annotations

from typing import Any

import pytest

from epic_rag.errors import ConfigError, PromptError
from epic_rag.query_prompt import PromptSettings, QueryPrompt
from epic_rag_chroma import SearchRequest, SearchSettings, parse_filters


def test_settings_are_the_fields_of_request_and_prompt() -> None:
    of_request, of_prompt = set(SearchRequest.__dataclass_fields__), set(QueryPrompt.__dataclass_fields__)
    assert set(SearchSettings.__annotations__) == of_request | of_prompt
    assert set(PromptSettings.__annotations__) == of_prompt
    assert not of_request & of_prompt


def test_flat_settings() -> None:
    filters = parse_filters(["lang=go"], [], None)
    request = SearchRequest.of(None, {"k": 3, "bank": "docs", "mode": "dense", "filters": filters, "strategy": "epic"})
    assert request == SearchRequest(QueryPrompt(bank="docs", strategy="epic"), 3, "dense", filters)
    assert SearchRequest.of(request, {}) is request
    assert SearchRequest.of(None, {}) == SearchRequest()


def test_with_settings_changes_only_what_is_given() -> None:
    request = SearchRequest(QueryPrompt(bank="docs"), k=3)
    assert request.with_settings(num_demonstrations=2, collapse=False) == SearchRequest(
        QueryPrompt(bank="docs", num_demonstrations=2), k=3, collapse=False
    )
    assert request.with_settings(prompt=QueryPrompt()) == SearchRequest(k=3)
    assert request == SearchRequest(QueryPrompt(bank="docs"), k=3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"k": 0}, ConfigError, r"k is 0\. Use 1 or more\."),
        ({"mode": "sparse"}, ConfigError, r"Unknown mode 'sparse'\. Choose one of dense, hybrid, keyword\."),
        ({"mode": None}, ConfigError, "Unknown mode None"),
        ({"colour": 1}, ConfigError, r"Unknown setting colour\. Known are "),
        ({"prompt": QueryPrompt(), "task": "qa"}, ConfigError, "Both a prompt and task are given"),
        ({"num_demonstrations": 2}, PromptError, "there is no bank"),
        ({"strategy": "none"}, PromptError, "Unknown strategy 'none'"),
    ],
)
def test_invalid_settings(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SearchRequest.of(None, settings)


def test_a_request_and_settings() -> None:
    with pytest.raises(ConfigError, match="Both a request and k are given"):
        SearchRequest.of(SearchRequest(), {"k": 3})
