"""A prompt is checked when it is made, and resolves instruction and bank in one order."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from epic_rag import ConfigError, DemonstrationBank, PromptError, QueryPrompt, get_task
from epic_rag.query_prompt import QUERY_STRATEGIES

BANK = DemonstrationBank([("printer jams", "Open the rear cover.")], instruction="of the bank")
SILENT = DemonstrationBank([("printer jams", "Open the rear cover.")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "none"}, "Unknown strategy 'none'"),
        ({"selection": "best"}, "Unknown selection 'best'"),
        ({"num_demonstrations": -1, "bank": BANK}, "num_demonstrations is -1"),
        ({"num_demonstrations": 2}, "num_demonstrations is 2, but there is no bank"),
        ({"num_demonstrations": 2, "task": "docs"}, "but there is no bank"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        QueryPrompt(**settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "default"),
        ({"bank": SILENT}, "default"),
        ({"bank": BANK}, "of the bank"),
        ({"bank": BANK, "task": "docs"}, get_task("docs").instruction),
        ({"bank": BANK, "task": "docs", "instruction": "mine"}, "mine"),
        ({"bank": BANK, "instruction": ""}, ""),
    ],
)
def test_precedence_of_instructions(settings: dict[str, Any], expected: str) -> None:
    prompt = QueryPrompt(**settings)
    assert prompt.resolve_instruction(prompt.resolve_bank(), "default") == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"bank": BANK}, False),
        ({"bank": "sts"}, True),
        ({"task": "sts"}, True),
        ({"task": "docs", "bank": "sts"}, False),
        ({"task": "intent", "bank": BANK}, True),
        ({"task": "sts", "instruction": "mine"}, False),
        ({"bank": "sts", "instruction": ""}, False),
    ],
)
def test_texts_of_one_kind_without_an_instruction_in_words(settings: dict[str, Any], expected: bool) -> None:
    prompt = QueryPrompt(**settings)
    assert prompt.is_bare(prompt.resolve_bank()) is expected


def test_a_bank_is_loaded_by_name_or_passed_through() -> None:
    assert QueryPrompt().resolve_bank() is None
    assert QueryPrompt(bank=BANK).resolve_bank() is BANK
    loaded = QueryPrompt(bank="docs").resolve_bank()
    assert loaded is not None
    assert loaded.fingerprint == DemonstrationBank.load("docs").fingerprint


def test_of_takes_a_prompt_or_settings() -> None:
    prompt = QueryPrompt(bank=BANK, strategy="text")
    assert QueryPrompt.of(prompt, {}) is prompt
    assert QueryPrompt.of(None, {"bank": BANK, "strategy": "text"}) == prompt
    assert QueryPrompt.of(None, {}) == QueryPrompt()
    with pytest.raises(ConfigError, match="Both a prompt and task are given"):
        QueryPrompt.of(prompt, {"task": "docs"})
    with pytest.raises(ConfigError, match="Unknown setting banks"):
        QueryPrompt.of(None, {"banks": "docs"})  # type: ignore[typeddict-unknown-key]


def test_importing_it_loads_no_model_library() -> None:
    code = (
        "import sys; from epic_rag.query_prompt import QueryPrompt; QueryPrompt(task='docs', bank='docs');"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    assert QUERY_STRATEGIES == ("reader", "task-vector", "epic", "text")
