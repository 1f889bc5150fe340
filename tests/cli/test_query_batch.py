"""epic-rag query with a file of queries, and with what it cannot take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from epic_rag_chroma import Hit
from tests.helpers.fake_indexer import FakeIndexer, hit


def batch_file(text: str | bytes) -> Path:
    file = Path("questions.jsonl")
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


BATCH = '\ufeff{"query": "one", "id": "a"}\n\n{"query": "two \\u001b", "id": 2}\r\n{"query": "three", "more": []}'


def test_batch(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = (hit(text="x", heading_path=()),)
    where = ("--index-dir", "anywhere", "--batch", batch_file(BATCH))
    answers = json.loads(cli("query", *where, "--json").out)
    assert [(each["query"], each["query_id"], len(each["hits"])) for each in answers] == [
        ("one", "a", 1),
        ("two \x1b", 2, 1),
        ("three", None, 1),
    ]
    assert fake.asked["texts"] == ["one", "two \x1b", "three"]
    lines = [json.loads(line) for line in cli("query", *where, "--jsonl").out.splitlines()]
    assert [(line["query"], line["query_id"], line["id"]) for line in lines] == [
        ("one", "a", "abc"),
        ("two \x1b", 2, "abc"),
        ("three", None, "abc"),
    ]
    block = "1  cosine 0.712  guide/install.md:3-9\n    x\n"
    assert cli("query", *where).out == f"a  one\n{block}\n2  two \\x1b\n{block}\nthree\n{block}"


def test_a_large_batch_goes_through_in_parts(
    fake: type[FakeIndexer], cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = fake.query_many

    def query_many(self: FakeIndexer, texts: Sequence[str], **options: Any) -> list[list[Hit]]:
        sizes.append(len(texts))
        return real(self, texts, **options)

    monkeypatch.setattr(fake, "query_many", query_many)
    fake.hits = (hit(),)
    file = batch_file("".join(f'{{"query": "q{number}"}}\n' for number in range(600)))
    lines = cli("query", "--batch", file, "--jsonl", "--index-dir", "anywhere").out.splitlines()
    assert [json.loads(line)["query"] for line in lines] == [f"q{number}" for number in range(600)]
    assert sizes == [256, 256, 88]


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ('{"query": "a"}\nnonsense\n', "questions.jsonl:2 is no JSON (Expecting value)"),
        ('{"query": "a"}\n{"query": ', "questions.jsonl:2 is no JSON"),
        ("[" * 100_000, "questions.jsonl:1 is no JSON"),
        ('{"query": "a", "id": ' + "9" * 5000 + "}", "questions.jsonl:1 is no JSON"),
        ("[1]\n", "questions.jsonl:1 is a list, not an object"),
        ('\n\n"text"\n', "questions.jsonl:3 is a string, not an object"),
        ("{}\n", 'questions.jsonl:1: there is no "query"'),
        ('{"query": 3}', 'questions.jsonl:1: "query" is a number'),
        ('{"query": null}', 'questions.jsonl:1: "query" is null'),
        ('{"query": " "}', 'questions.jsonl:1: "query" is empty'),
        ('{"query": "a", "id": {}}', 'questions.jsonl:1: "id" is an object'),
        ('{"query": "a", "id": true}', 'questions.jsonl:1: "id" is true or false'),
        ('{"query": "a", "id": NaN}', 'questions.jsonl:1: "id" is a number that JSON does not have'),
        (b'{"query": "a"}\n{"query": "\xff"}', "questions.jsonl:2 is not UTF-8"),
        ("", "questions.jsonl holds no queries"),
        (" \n\n", "questions.jsonl holds no queries"),
    ],
)
def test_malformed_batch(fake: type[FakeIndexer], cli: Any, text: str | bytes, fact: str) -> None:
    """It is found before a model is loaded or an index looked for."""
    fake.hits = (hit(),)
    result = cli("query", "--batch", batch_file(text), "--index-dir", "anywhere")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"error: {fact}")
    assert result.err.count("\n") == 1
    assert not hasattr(fake, "asked")


def test_batch_that_is_not_there(fake: type[FakeIndexer], cli: Any) -> None:
    for name, why in (("no-file", "No such file or directory"), (".", "Is a directory")):
        result = cli("query", "--batch", name, "--index-dir", "anywhere")
        assert (result.status, result.out) == (1, "")
        assert result.err.startswith(f"error: {name} cannot be read ({why}); give --batch a file")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["x", "--json", "--jsonl"], "--json and --jsonl exclude each other"),
        (["x", "--batch", "f"], "--batch excludes TEXT"),
        (["--batch", "f", "--open"], "--batch excludes --open"),
        (["--open"], "Missing argument 'TEXT'"),
        (["x", "--open", "0"], "--open"),
        (["x", "--mode", "sparse"], "--mode"),
        (["-", "x"], "x"),
    ],
)
def test_wrong_command_lines(fake: type[FakeIndexer], cli: Any, arguments: list[str], facts: str) -> None:
    result = cli("query", *arguments, "--index-dir", "anywhere")
    assert (result.status, result.out) == (2, "")
    assert facts in result.err
    assert result.err.endswith("see `epic-rag query --help`\n")


@pytest.mark.parametrize(
    "options", [["--where", "nonsense"], ["--where", "page>=x"], ["--path", "#"], ["--since", "soon"]]
)
def test_filters_that_cannot_be_understood(fake: type[FakeIndexer], cli: Any, options: list[str]) -> None:
    result = cli("query", "x", "--index-dir", "anywhere", *options)
    assert (result.status, result.out) == (1, "")
    assert options[1].partition(">")[0] in result.err
    assert not hasattr(fake, "asked")
