"""What `query` prints for given hits: a table of hits and lines, with no model and no index behind it."""

from __future__ import annotations

import contextlib
import io
import json
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from epic_rag_chroma import Hit, SearchFilters
from epic_rag_cli.results import hit_lines, passage_lines
from epic_rag_cli.terminal import columns, emit, message
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
        ({"score": -0.05, "text": "x"}, "1  cosine -0.050  guide/install.md:3-9  Guide > Install\n    x\n"),
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
        ([], {"cosine": 0.71234, "bm25": 6.2}, "cosine 0.712, bm25 6.20"),
        ([], {"cosine": 0.71234}, "cosine 0.712"),
        (["--mode", "dense"], {"cosine": 0.71234, "bm25": None}, "cosine 0.712"),
        (["--mode", "keyword"], {"score": 6.2, "bm25": 6.2}, "bm25 6.20"),
        (["--rerank", "model"], {"rerank_score": 4.5}, "rerank 4.500, cosine 0.712"),
        (["--rerank", "model", "--mode", "keyword"], {"score": 6.2, "rerank_score": 4.5}, "rerank 4.500, bm25 6.20"),
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


ANY = st.text(st.characters() | st.sampled_from("\x1b[]0;\x07\x9b\u202e\u2066\n\ta :"), max_size=40)
HITS = st.builds(
    hit,
    path=ANY,
    heading_path=st.lists(ANY, max_size=2).map(tuple),
    text=ANY,
    root=ANY,
    first_line=st.none() | st.integers(1, 9),
    page=st.none() | st.integers(1, 9),
    duplicates=st.lists(ANY, max_size=3).map(tuple),
    lang=st.sampled_from(["", "python"]),
)
# What this command writes for a terminal itself: styles and links.
OWN = re.compile(r"\x1b\[[\d;]*m|\x1b\]8;(id=[\d-]+)?;(file://[\w.~%/-]*)?\x1b\\")
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


@given(st.lists(HITS, min_size=1, max_size=3), ANY, st.sampled_from(["hybrid", "keyword"]), st.booleans())
def test_no_text_reaches_a_terminal_with_its_codes(hits: list[Hit], query: str, mode: Any, links: bool) -> None:
    """Paths, headings, texts, near-duplicates: whatever they are, a terminal gets text, our styles and our links."""
    for lines in (hit_lines(hits, query, mode, links=links), passage_lines(hits[0], query)):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=True, color_system="standard", soft_wrap=True, highlight=False)
        for line in lines:
            console.print(line)
        assert not UNSAFE.search(OWN.sub("", stream.getvalue()))


@given(ANY, ANY)
def test_messages_and_tables_are_safe_for_any_text(kind: str, text: str) -> None:
    """Errors, notes, what is skipped and why, and the tables of `status`, `models` and `bank list`."""
    err, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        message("skipped", f"{kind}: {text}")
        emit(columns([("path", text), (kind, text)], styles=("bold",)))
    assert not UNSAFE.search(err.getvalue())
    assert not UNSAFE.search(out.getvalue())
    assert err.getvalue().count("\n") == 1
    assert out.getvalue().count("\n") == 2


def test_json(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = (hit(text="\x1b[31m\nred 世界", cosine=0.71234, duplicates=("b.md:1",)),)
    result = cli("query", "installer", "--index-dir", "anywhere", "--json")
    assert result.status == 0
    assert "\x1b" not in result.out
    assert json.loads(result.out) == {
        "query": "installer",
        "index_dir": "anywhere",
        "task": "docs",
        "bank": None,
        "mode": "hybrid",
        "hits": [
            {
                "rank": 1,
                "score": 0.71234,
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
        ([], "anywhere holds no passages; run `epic-rag index PATH` to add some"),
        (["--json"], "anywhere holds no passages; run `epic-rag index PATH` to add some"),
        (["--mode", "keyword"], "no passage has a word of the query; ask in other words, or with --mode hybrid"),
        (["--path", "*.py"], "no passage satisfies all of --where, --path and --since; leave one out, or ask less of it"),
    ],
)  # fmt: skip
def test_no_hits_is_a_note(fake: type[FakeIndexer], cli: Any, options: list[str], expected: str) -> None:
    result = cli("query", "installer", "--index-dir", "anywhere", *options)
    assert (result.status, result.err) == (0, f"note: {expected}\n")
    assert (json.loads(result.out)["hits"] == []) if "--json" in options else (result.out == "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["-k", "3"], {"k": 3}),
        (["--task", "qa"], {"task": "qa"}),
        (["-n", "4"], {"num_demonstrations": 4}),
        (["--strategy", "task-vector"], {"strategy": "task-vector"}),
        # A bank brings its own instruction, so no task is put beside it.
        (["--bank", "mine"], {"task": None, "bank": "mine"}),
        (
            ["--bank", "mine", "--task", "qa", "--num-demonstrations", "0"],
            {"task": "qa", "bank": "mine", "num_demonstrations": 0},
        ),
        (["--mode", "keyword"], {"mode": "keyword"}),
        (["--all"], {"collapse": False}),
        (["--rerank", "folder"], {"reranker": "folder"}),
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
def test_what_the_indexer_is_asked(
    fake: type[FakeIndexer], cli: Any, arguments: list[str], expected: dict[str, Any]
) -> None:
    fake.hits = (hit(),)
    assert cli("query", "the text", "--index-dir", "anywhere", *arguments).status == 0
    plain = {
        "k": 5,
        "task": "docs",
        "bank": None,
        "num_demonstrations": None,
        "strategy": None,
        "mode": "hybrid",
        "filters": None,
        "collapse": True,
        "reranker": None,
    }
    where = {"index_dir": Path("anywhere"), "encoder": None, "chroma": None}
    assert fake.asked == {**where, "text": "the text", **plain, **expected}


def test_bytes_that_are_no_text_do_not_reach_a_tokenizer(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = (hit(),)
    result = cli("query", "a\udcff\ud800b 🙂", "--index-dir", "anywhere", "--json")
    assert result.status == 0
    assert fake.asked["text"] == "a\ufffd\ufffdb 🙂"
    assert json.loads(result.out)["query"] == "a\udcff\ud800b 🙂"


def test_keyword_search_says_that_a_bank_is_for_nothing(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = (hit(),)
    result = cli("query", "x", "--index-dir", "anywhere", "--mode", "keyword", "--bank", "docs")
    assert result.err == "note: keyword search reads no demonstrations; --bank changes nothing\n"


def test_model_is_loaded_by_the_indexer_only(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = (hit(),)
    assert cli("query", "x", "--index-dir", "anywhere", "--model", "no-such-model").status == 0
    assert callable(fake.asked["encoder"])
