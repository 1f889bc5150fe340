"""`epic-rag query` with a fake index: the request, the output, batches, the prompt's history, editors."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from epic_rag.errors import DataError, EpicError
from epic_rag.query_prompt import QueryPrompt
from epic_rag_chroma import Hit, SearchFilters, SearchRequest
from epic_rag_cli.commands.query import editor_command, fill_open_number, open_hit, run_prompt
from tests.helpers.fake_indexer import FakeIndexer, hit


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "1  cosine 0.712  guide/install.md:3-9  Guide > Install\n    Run the installer. Then read the manual.\n"),
        (
            {"last_line": 3, "heading_path": (), "text": "One line."},
            "1  cosine 0.712  guide/install.md:3\n    One line.\n",
        ),
        (
            {"path": "a.pdf", "page": 4, "first_line": None, "last_line": None, "heading_path": ()},
            "1  cosine 0.712  a.pdf:page 4\n    Run the installer. Then read the manual.\n",
        ),
        (
            {"first_line": None, "last_line": None, "heading_path": (), "text": "x"},
            "1  cosine 0.712  guide/install.md\n    x\n",
        ),
        ({"cosine": -0.05, "text": "x"}, "1  cosine -0.050  guide/install.md:3-9  Guide > Install\n    x\n"),
        # Nothing from a document is markup, an emoji code or an escape sequence.
        (
            {"heading_path": ("[bold]A[/bold]",), "text": "[red]x[/] :smile: [link=http://e]y"},
            "1  cosine 0.712  guide/install.md:3-9  [bold]A[/bold]\n    [red]x[/] :smile: [link=http://e]y\n",
        ),
        (
            {"path": "a\x1b[2J.md", "heading_path": ("\x1b]0;t\x07",), "text": "\x9b31m \u202etxt"},
            "1  cosine 0.712  a\\x1b[2J.md:3-9  \\x1b]0;t\\x07\n    \\x9b31m \\u202etxt\n",
        ),
        # A name that cannot be decoded.
        ({"path": "\udcff.md", "text": "x"}, "1  cosine 0.712  \\udcff.md:3-9  Guide > Install\n    x\n"),
        # A long path stays whole; a long passage becomes three lines.
        (
            {"path": "d/" * 100 + "f.md", "heading_path": (), "text": "word " * 200},
            "1  cosine 0.712  " + "d/" * 100 + "f.md:3-9\n" + ("    " + " ".join(["word"] * 19) + "\n") * 2
            + "    " + " ".join(["word"] * 15) + " …\n",
        ),
    ],
)  # fmt: skip
def test_lines(fake: type[FakeIndexer], cli: Any, changes: dict[str, Any], expected: str) -> None:
    fake.hits = (hit(**changes),)
    result = cli("query", "installer", "--index-dir", "anywhere")
    assert (result.status, result.out, result.err) == (0, expected, "")


def test_two_hits_are_apart_and_ranks_are_aligned(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = tuple(hit(rank=rank, heading_path=(), text="x") for rank in range(1, 11))
    lines = cli("query", "installer", "--index-dir", "anywhere").out.splitlines()
    assert lines[:3] == [" 1  cosine 0.712  guide/install.md:3-9", "    x", ""]
    assert lines[-2:] == ["10  cosine 0.712  guide/install.md:3-9", "    x"]


def test_terminal_gets_colours_but_no_codes_of_documents(
    fake: type[FakeIndexer], cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    fake.hits = (hit(text="\x1b[5mblink\x1b[0m"),)
    out = cli("query", "installer", "--index-dir", "anywhere").out
    assert "\x1b[1;36mguide/install.md:3-9\x1b[0m" in out
    assert "\x1b[5m" not in out
    assert "\\x1b[5mblink\\x1b[0m" in out


def test_paths_can_be_opened_from_the_working_directory(
    fake: type[FakeIndexer], cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.hits = (hit(root=str(tmp_path / "work/docs"), heading_path=(), text="x"),)
    assert cli("query", "x", "--index-dir", "anywhere").out == "1  cosine 0.712  docs/guide/install.md:3-9\n    x\n"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    path = tmp_path / "work/docs/guide/install.md"
    assert cli("query", "x", "--index-dir", "anywhere").out == f"1  cosine 0.712  {path}:3-9\n    x\n"


@pytest.mark.parametrize(
    ("options", "changes", "expected"),
    [
        ([], {"bm25": 6.2}, "cosine 0.712, bm25 6.20"),
        ([], {"bm25": 0.0051}, "cosine 0.712, bm25 0.01"),
        ([], {"bm25": 1e-6}, "cosine 0.712, bm25 <0.01"),
        (["--mode", "keyword"], {"cosine": None, "bm25": 1e-6}, "bm25 <0.01"),
        ([], {}, "cosine 0.712"),
        (["--mode", "dense"], {"bm25": None}, "cosine 0.712"),
        (["--mode", "keyword"], {"cosine": None, "bm25": 6.2}, "bm25 6.20"),
        (["--rerank", "model"], {"rerank_score": 4.5}, "rerank 4.500, cosine 0.712"),
        (["--rerank", "model", "--mode", "keyword"], {"bm25": 6.2, "rerank_score": 4.5}, "rerank 4.500, bm25 6.20"),
    ],
)
def test_numbers_have_names(
    fake: type[FakeIndexer], cli: Any, options: list[str], changes: dict[str, Any], expected: str
) -> None:
    fake.hits = (hit(heading_path=(), text="x", **changes),)
    result = cli("query", "installer", "--index-dir", "anywhere", *options)
    assert result.out == f"1  {expected}  guide/install.md:3-9\n    x\n"


def test_near_duplicates_are_named_under_the_best(fake: type[FakeIndexer], cli: Any, tmp_path: Path) -> None:
    own, others = "guide/install.md:3", ("old/a.md:12", "old/a.md:12", "b\x1b.md:page 3", "elsewhere.md:4")
    fake.hits = (
        hit(text="x", heading_path=(), duplicates=(own, *others)),
        hit(rank=2, text="y", heading_path=(), duplicates=(own,)),
    )
    expected = "    also in old/a.md:12, b\\x1b.md:page 3, elsewhere.md:4\n"
    head = "cosine 0.712  guide/install.md:3-9\n"
    assert cli("query", "z", "--index-dir", "anywhere").out == f"1  {head}    x\n{expected}\n2  {head}    y\n"
    # Those that are there can be opened from the working directory.
    root = tmp_path / "work/docs"
    (root / "old").mkdir(parents=True)
    (root / "old/a.md").write_text("a")
    fake.hits = (hit(root=str(root), text="x", duplicates=others),)
    shown = cli("query", "z", "--index-dir", "anywhere").out.splitlines()[-1]
    assert shown == "    also in docs/old/a.md:12, b\\x1b.md:page 3, elsewhere.md:4"


@pytest.mark.parametrize("columns", [1, 40, 57, 100, 300])
def test_lines_fit_the_terminal(
    fake: type[FakeIndexer], cli: Any, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    fake.hits = (hit(text="世界 words of 世界 " * 60 + "x" * 400),)
    lines = cli("query", "words", "--index-dir", "anywhere").out.splitlines()[1:]
    width = max(40, min(columns, 100))
    assert lines
    assert max(map(cell_len, lines)) <= width
    assert len(lines) <= 4


def test_words_of_the_query_are_marked(fake: type[FakeIndexer], cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    fake.hits = (hit(text="It was installed by the INSTALLER."),)
    out = cli("query", "installing", "--index-dir", "anywhere").out
    assert "    It was \x1b[1;33minstalled\x1b[0m by the \x1b[1;33mINSTALLER\x1b[0m.\n" in out
    # A pipe is no terminal: what is in it is not a link.
    assert "\x1b]8" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    out = cli("query", "installing", "--index-dir", "anywhere").out
    assert "    It was \x1b[1minstalled\x1b[0m by" in out
    assert not re.search(r"\x1b\[[\d;]*3\dm", out)
    monkeypatch.delenv("FORCE_COLOR")
    assert "\x1b" not in cli("query", "installing", "--index-dir", "anywhere").out


def test_json(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = (hit(text="\x1b[31m\nred 世界", duplicates=("b.md:1",)),)
    result = cli("query", "installer", "--index-dir", "anywhere", "--json")
    assert result.status == 0
    assert "\x1b" not in result.out
    assert json.loads(result.out) == {
        "query": "installer",
        "index_dir": "anywhere",
        "index_dirs": ["anywhere"],
        "task": "docs",
        "bank": None,
        "mode": "hybrid",
        "hits": [
            {
                "rank": 1,
                "score": 0.033,
                "path": "guide/install.md",
                "first_line": 3,
                "last_line": 9,
                "page": None,
                "heading_path": ["Guide", "Install"],
                "text": "\x1b[31m\nred 世界",
                "id": "abc",
                "document_id": "",
                "root": "",
                "kind": "",
                "lang": "",
                "cosine": 0.71234,
                "bm25": None,
                "rerank_score": None,
                "duplicates": ["b.md:1"],
                "stale": None,
                "before": "",
                "after": "",
                "marked": None,
            }
        ],
    }


def test_json_lines(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = (hit(text="\x1b\u2028\n"), hit(rank=2))
    result = cli("query", "installer", "--index-dir", "anywhere", "--jsonl")
    lines = [json.loads(line) for line in result.out.split("\n")[:-1]]
    assert [(line["query"], line["rank"]) for line in lines] == [("installer", 1), ("installer", 2)]
    assert lines[0]["text"] == "\x1b\u2028\n"
    assert "query_id" not in lines[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "anywhere holds no chunks. Run `epic-rag index PATH` to add some."),
        (["--json"], "anywhere holds no chunks. Run `epic-rag index PATH` to add some."),
        (["--mode", "keyword"], "No chunk has a word of the query. Use other words or --mode hybrid."),
        (["--path", "*.py"], "No chunk matches --where, --path and --since. Relax a filter."),
    ],
)  # fmt: skip
def test_no_hits_is_a_note(fake: type[FakeIndexer], cli: Any, options: list[str], expected: str) -> None:
    result = cli("query", "installer", "--index-dir", "anywhere", *options)
    assert (result.status, result.err) == (0, f"note: {expected}\n")
    assert (json.loads(result.out)["hits"] == []) if "--json" in options else (result.out == "")


PLAIN = SearchRequest(prompt=QueryPrompt(task="docs"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["-k", "3"], {"k": 3}),
        (["--task", "qa"], {"prompt": QueryPrompt(task="qa")}),
        (["--strategy", "task-vector"], {"prompt": QueryPrompt(task="docs", strategy="task-vector")}),
        (["-n", "0"], {"prompt": QueryPrompt(task="docs", num_demonstrations=0)}),
        # A bank has its own instruction, so the default task is not added.
        (["--bank", "qa"], {"prompt": QueryPrompt(bank="qa")}),
        (
            ["--bank", "qa", "--task", "qa", "--num-demonstrations", "4", "--strategy", "epic"],
            {"prompt": QueryPrompt(task="qa", bank="qa", num_demonstrations=4, strategy="epic")},
        ),
        (["--mode", "keyword"], {"mode": "keyword"}),
        (["--all"], {"collapse": False}),
        (["--rerank", "folder"], {"reranker": "folder"}),
        (["--per-file", "0"], {"per_file": 0}),
        (["--files", "--per-file", "4"], {"per_file": 1}),
        (["--min-score", "0.25"], {"min_score": 0.25}),
        (["-A", "1", "-B", "2"], {"after": 1, "before": 2}),
        (["-C", "3"], {"after": 3, "before": 3}),
        (["-C", "3", "--after-context", "1"], {"after": 1, "before": 3}),
        (["--full-section"], {"full_section": True}),
        (
            ["--where", "lang=python", "--where", "page>=3", "--path", "guide/**", "--path", "*.md"],
            {"filters": SearchFilters(where=("lang=python", "page>=3"), paths=("guide/**", "*.md"))},
        ),
        (
            ["--since", "2026-01-31T12:30Z"],
            {"filters": SearchFilters(since=datetime(2026, 1, 31, 12, 30, tzinfo=timezone.utc))},
        ),
    ],
)
def test_request(fake: type[FakeIndexer], cli: Any, arguments: list[str], expected: dict[str, Any]) -> None:
    fake.hits = (hit(),)
    assert cli("query", "the text", "--index-dir", "anywhere", *arguments).status == 0
    assert fake.opened == {"index_dir": Path("anywhere"), "encoder": None, "chroma": None}
    assert (fake.texts, fake.request) == (["the text"], replace(PLAIN, **expected))


def test_names_of_files(fake: type[FakeIndexer], cli: Any) -> None:
    """Each file once, in the order of its best hit."""
    fake.hits = tuple(hit(rank=rank, path=path) for rank, path in enumerate(["b.md", "a\x1b.md", "b.md", "c.md"], 1))
    assert cli("query", "words", "--index-dir", "anywhere", "--files").out == "b.md\na\\x1b.md\nc.md\n"
    answer = json.loads(cli("query", "words", "--index-dir", "anywhere", "--files", "--json").out)
    assert [(each["rank"], each["path"]) for each in answer["hits"]] == [(1, "b.md"), (2, "a\x1b.md"), (4, "c.md")]


def test_lines_around_a_hit_are_printed_as_they_are(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = (hit(text="if installed:\n\trun()\n\n    stop()", before="# before", after="after\x1b[2J"),)
    for options in (["-C", "1"], ["--full-section"]):
        out = cli("query", "install", "--index-dir", "anywhere", *options).out
        shown = "    # before\n    if installed:\n        run()\n    \n        stop()\n    after\\x1b[2J\n"
        assert out.partition("\n")[2] == shown


def test_no_hit_reaches_the_lowest_score(fake: type[FakeIndexer], cli: Any) -> None:
    result = cli("query", "words", "--index-dir", "anywhere", "--min-score", "0.9")
    assert (result.status, result.out) == (0, "")
    assert "No hit has a score of 0.9 or more." in result.err


def test_lone_surrogates_are_replaced(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = (hit(),)
    result = cli("query", "a\udcff\ud800b 🙂", "--index-dir", "anywhere", "--json")
    assert result.status == 0
    assert fake.texts[0] == "a\ufffd\ufffdb 🙂"
    assert json.loads(result.out)["query"] == "a\udcff\ud800b 🙂"


def test_bank_in_keyword_mode(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = (hit(),)
    result = cli("query", "x", "--index-dir", "anywhere", "--mode", "keyword", "--bank", "docs")
    assert (
        result.err
        == "note: Keyword search uses no demonstrations. --bank only puts known answers of this query first.\n"
    )


def test_model_is_loaded_by_the_indexer_only(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = (hit(),)
    assert cli("query", "x", "--index-dir", "anywhere", "--model", "no-such-model").status == 0
    assert callable(fake.opened["encoder"])


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
    assert fake.texts == ["one", "two \x1b", "three"]
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

    def query_many(self: FakeIndexer, texts: Sequence[str], request: SearchRequest) -> list[list[Hit]]:
        sizes.append(len(texts))
        return real(self, texts, request)

    monkeypatch.setattr(fake, "query_many", query_many)
    fake.hits = (hit(),)
    file = batch_file("".join(f'{{"query": "q{number}"}}\n' for number in range(600)))
    lines = cli("query", "--batch", file, "--jsonl", "--index-dir", "anywhere").out.splitlines()
    assert [json.loads(line)["query"] for line in lines] == [f"q{number}" for number in range(600)]
    assert sizes == [256, 256, 88]


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ('{"query": "a"}\nnonsense\n', "questions.jsonl:2 is not valid JSON (Expecting value"),
        ('{"query": "a"}\n{"query": ', "questions.jsonl:2 is not valid JSON"),
        ("[" * 100_000, "questions.jsonl:1 is not valid JSON"),
        ('{"query": "a", "id": ' + "9" * 5000 + "}", "questions.jsonl:1 is not valid JSON"),
        ("[1]\n", "questions.jsonl:1 is not a JSON object (list)"),
        ('\n\n"text"\n', "questions.jsonl:3 is not a JSON object (str)"),
        ("{}\n", 'questions.jsonl:1: "query" must be a string with text'),
        ('{"query": 3}', 'questions.jsonl:1: "query" must be a string with text'),
        ('{"query": null}', 'questions.jsonl:1: "query" must be a string with text'),
        ('{"query": " "}', 'questions.jsonl:1: "query" must be a string with text'),
        ('{"query": "a", "id": {}}', 'questions.jsonl:1: "id" must be a string or a finite number'),
        ('{"query": "a", "id": true}', 'questions.jsonl:1: "id" must be a string or a finite number'),
        ('{"query": "a", "id": NaN}', 'questions.jsonl:1: "id" must be a string or a finite number'),
        (b'{"query": "a"}\n{"query": "\xff"}', "questions.jsonl:2 is not UTF-8"),
        ("", "questions.jsonl holds no queries"),
        (" \n\n", "questions.jsonl holds no queries"),
    ],
)
def test_malformed_batch(fake: type[FakeIndexer], cli: Any, text: str | bytes, fact: str) -> None:
    """The error comes before a model is loaded or an index opened."""
    fake.hits = (hit(),)
    result = cli("query", "--batch", batch_file(text), "--index-dir", "anywhere")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"error: {fact}")
    assert result.err.count("\n") == 1
    assert not hasattr(fake, "opened")


def test_batch_that_is_not_there(fake: type[FakeIndexer], cli: Any) -> None:
    for name, why in (("no-file", "No such file or directory"), (".", "Is a directory")):
        result = cli("query", "--batch", name, "--index-dir", "anywhere")
        assert (result.status, result.out) == (1, "")
        assert result.err.startswith(f"error: {name} cannot be read (")
        assert why in result.err


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["x", "--json", "--jsonl"], "--json and --jsonl exclude each other"),
        (["x", "--batch", "f"], "--batch excludes TEXT"),
        (["--batch", "f", "--open"], "--batch excludes --open"),
        (["--open"], "Missing argument 'TEXT'"),
        (["x", "-n", "4"], "-n needs demonstrations. Pass --bank"),
        (["x", "--open", "0"], "--open"),
        (["x", "--mode", "sparse"], "--mode"),
        (["-", "x"], "`-` (standard input) and TEXT exclude each other"),
        (["how", "--depth", "3"], "No such option: --depth"),
    ],
)
def test_wrong_command_lines(fake: type[FakeIndexer], cli: Any, arguments: list[str], facts: str) -> None:
    result = cli("query", *arguments, "--index-dir", "anywhere")
    assert (result.status, result.out) == (2, "")
    assert facts in result.err
    assert result.err.endswith("See `epic-rag query --help`.\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["how", "do", "I", "undo"], "how do I undo"),
        (["how do I", "undo"], "how do I undo"),
        (["undo", "-k", "3", "the", "last", "--all", "commit"], "undo the last commit"),
        (["-k", "3", "undo", "--", "--soft", "-q"], "undo --soft -q"),
        (["--", "--soft", "-", "undo"], "--soft - undo"),
        (["undo", "--open", "the", "commit"], "undo the commit"),
        (["two  spaces"], "two  spaces"),
    ],
)
def test_words_are_one_query(fake: type[FakeIndexer], cli: Any, arguments: list[str], expected: str) -> None:
    assert cli("query", "--index-dir", "anywhere", *arguments).status == 0
    assert fake.texts == [expected]


@pytest.mark.parametrize(
    "options", [["--where", "nonsense"], ["--where", "page>=x"], ["--path", "#"], ["--since", "soon"]]
)
def test_filters_that_cannot_be_understood(fake: type[FakeIndexer], cli: Any, options: list[str]) -> None:
    result = cli("query", "x", "--index-dir", "anywhere", *options)
    assert (result.status, result.out) == (1, "")
    assert options[1].partition(">")[0] in result.err
    assert not hasattr(fake, "opened")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--open"], ["--open", "1"]),
        (["--open", "text"], ["--open", "1", "text"]),
        (["--open", "2"], ["--open", "2"]),
        (["--open", "2", "text"], ["--open", "2", "text"]),
        (["--open", "2 words"], ["--open", "1", "2 words"]),
        (["--open=3", "text"], ["--open=3", "text"]),
        (["--open", "--json"], ["--open", "1", "--json"]),
        (["text", "--", "--open"], ["text", "--", "--open"]),
        (["--open", "--", "7"], ["--open", "1", "--", "7"]),
        ([], []),
    ],
)
def test_open_without_a_number(given: list[str], expected: list[str]) -> None:
    assert fill_open_number(given) == expected


def test_history_file_is_trimmed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def typed(*lines: str) -> None:
        answers = iter(lines)
        monkeypatch.setattr("builtins.input", lambda _: next(answers))
        with contextlib.suppress(StopIteration):
            run_prompt(lambda _: None)

    file = Path(os.environ["XDG_STATE_HOME"]) / "epic-rag/query_history"
    typed("one", "", " secret", "  ", "zwei é", "\x1b[2J", "\u202e", "x")
    assert file.read_text(encoding="utf-8") == "one\nzwei é\nx\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_bytes(b"\x1b[2J\nbroken \xff\n" + b"".join(b"line %d\n" % number for number in range(3000)))
    typed("last")
    assert file.read_text() == "".join(f"line {number}\n" for number in range(2000, 3000)) + "last\n"
    file.unlink()
    file.mkdir()
    typed("one", "two")
    assert capsys.readouterr().err.count("The history of this session is not kept.") == 1


@pytest.mark.parametrize(
    ("setting", "line", "expected"),
    [
        ("vi", 7, ["vi", "+7", "/d/a b.md"]),
        ("/usr/bin/nvim", 7, ["/usr/bin/nvim", "+7", "/d/a b.md"]),
        ("emacsclient -t", 7, ["emacsclient", "-t", "+7", "/d/a b.md"]),
        ("nano", None, ["nano", "/d/a b.md"]),
        ("code --wait", 7, ["code", "--wait", "--goto", "/d/a b.md:7"]),
        ("'/opt/My Editor/code'", 7, ["/opt/My Editor/code", "--goto", "/d/a b.md:7"]),
        ("flatpak run org.editor", 7, ["flatpak", "run", "org.editor", "/d/a b.md"]),
    ],
)
def test_editor_command(monkeypatch: pytest.MonkeyPatch, setting: str, line: int | None, expected: list[str]) -> None:
    monkeypatch.setenv("VISUAL", " ")
    monkeypatch.setenv("EDITOR", setting)
    assert editor_command("/d/a b.md", line) == expected
    monkeypatch.setenv("VISUAL", "ed")
    assert editor_command("/d/a b.md", line) == ["ed", "/d/a b.md"]


@pytest.mark.parametrize(
    ("platform", "programs", "expected"),
    [("darwin", [], ["open", "-t"]), ("linux", ["nano"], ["nano", "+3"]), ("linux", [], ["vi", "+3"])],
)
def test_default_editor(
    monkeypatch: pytest.MonkeyPatch, platform: str, programs: list[str], expected: list[str]
) -> None:
    """Text is never passed to the system's opener, which would run a script."""
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.delenv("EDITOR", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: name if name in programs else None)
    monkeypatch.setattr(sys, "platform", platform)
    assert editor_command("/d/a.sh", 3) == [*expected, "/d/a.sh"]


def here(path: str, **changes: Any) -> Hit:
    return hit(path=path, root=str(Path.cwd()), **changes)


@pytest.fixture
def bin_folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path.cwd() / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def program(file: Path, status: int = 0) -> Path:
    log = file.parent / f"{file.name}.log"
    file.write_text(f'#!/bin/sh\necho "$@" > "{log}"\nexit {status}\n')
    file.chmod(0o755)
    return log


@pytest.mark.skipif(sys.platform != "linux", reason="xdg-open is Linux's")
def test_documents_go_to_the_system(monkeypatch: pytest.MonkeyPatch, bin_folder: Path) -> None:
    opened, edited = program(bin_folder / "xdg-open"), program(bin_folder / "vim")
    monkeypatch.setenv("EDITOR", "vim")
    for name in ("a.pdf", "a.docx", "a.py"):
        Path(name).write_text("x\n" * 5)
    open_hit([here("a.pdf", kind="pdf", first_line=None, page=3)], 1)
    assert opened.read_text() == f"{Path.cwd()}/a.pdf\n"
    open_hit([here("a.docx", kind="docx", first_line=None)], 1)
    assert opened.read_text() == f"{Path.cwd()}/a.docx\n"
    assert not edited.exists()
    open_hit([here("a.py", kind="code")], 1)
    assert edited.read_text() == f"+3 {Path.cwd()}/a.py\n"
    program(bin_folder / "xdg-open", status=4)
    with pytest.raises(EpicError, match=r"No program opens a\.pdf \(status 4\)\. Open the file by hand\."):
        open_hit([here("a.pdf", kind="pdf")], 1)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EpicError, match=r"No program opens a\.pdf"):
        open_hit([here("a.pdf", kind="pdf")], 1)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../secret"])
def test_open_nothing_outside_the_folder(path: str) -> None:
    (Path.cwd() / "root/a").mkdir(parents=True)
    Path("secret").write_text("x")
    with pytest.raises(DataError, match="is outside the indexed folder"):
        open_hit([hit(path=path, root=str(Path.cwd() / "root"))], 1)


def test_open_a_file_that_is_gone() -> None:
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for name in ("gone.md", "folder", "pipe"):
        with pytest.raises(DataError, match=f"{name} no longer exists. Run `epic-rag index`"):
            open_hit([here(name)], 1)


def test_functions_between_the_entry_point_and_the_index(
    fake: type[FakeIndexer], cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`main`, `run` and the command: a query reaches the index in four calls."""
    stack: list[str] = []

    def query(*_: object) -> list[Hit]:
        stack.extend(frame.function for frame in inspect.stack() if "epic_rag_cli" in Path(frame.filename).parts)
        return []

    monkeypatch.setattr(fake, "query", query)
    cli("query", "x", "--index-dir", "anywhere")
    assert stack == ["query", "run"]
