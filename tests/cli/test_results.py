"""Snippets, marked words, hits as lines, and reports."""

from __future__ import annotations

import contextlib
import io
import re
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from epic_rag_chroma import Hit, QueryWords, SkippedFile
from epic_rag_chroma.store.database import IndexDatabase, Record
from epic_rag_cli.results import hit_lines, print_skipped, snippet
from epic_rag_cli.terminal import Verbosity, columns, emit, message, printable, request_verbosity, reset_verbosity
from tests.helpers.fake_indexer import hit


def marked(text: str, query: str, width: int = 1000) -> list[str]:
    shown = snippet(text, QueryWords(query), width)
    return [shown.text[start:end] for start, end in shown.spans]


@pytest.mark.parametrize(
    ("text", "query", "width", "expected"),
    [
        ("Short text.", "anything", 50, "Short text."),
        ("", "anything", 50, ""),
        (" \n ", "anything", 50, ""),
        ("One two three four five six.", "", 15, "One two three …"),
        # Around the sentence with the query's words.
        (
            "Nothing here at all. The last commit is undone with reset. And more words follow it here.",
            "reset the last commit",
            40,
            "… The last commit is undone with reset. …",
        ),
        # It is in the middle of whole sentences, as far as there is room.
        ("Aa aa. Bb bb. The commit. Cc cc. Dd dd.", "commit", 26, "… Bb bb. The commit. Cc cc. …"),
        # The rest is filled with words.
        ("The commit. One long sentence that does not fit.", "commit", 30, "The commit. One long sentence …"),
        ("One long sentence that does not fit. The commit.", "commit", 30, "… that does not fit. The commit."),
        # The first of two equal sentences.
        ("Reset it now today. Reset it now today. Reset it now today.", "reset", 20, "Reset it now today. …"),
        # More different words count, not the same word often.
        ("Reset, reset, reset and reset. Reset a commit.", "reset commit", 16, "… Reset a commit."),
        # Of a long sentence, the part with most words, in the middle.
        (
            "It goes on and on, and on, and then there is a commit to reset, and so on and on and on",
            "reset commit",
            24,
            "… a commit to reset, and …",
        ),
        # Paragraphs and list items are sentences, too.
        ("Nothing\n\n- one commit\n- two resets\n", "reset", 12, "… - two resets"),
        # A closing quotation mark stays with its sentence.
        ('He said "reset." Then he left the room.', "reset", 16, 'He said "reset." …'),
        # A word without spaces is cut hard.
        ("x" * 30, "", 10, "x" * 10 + " …"),
        ("\x1b[2J" + "y" * 30, "", 10, "\\x1b[2J" + "y" * 7 + " …"),
        # Widths are those of a terminal.
        ("删除文件夹。一切照旧。", "照旧", 10, "… 一切照旧。"),
        ("世" * 30, "", 10, "世" * 5 + " …"),
    ],
)  # fmt: skip
def test_snippet(text: str, query: str, width: int, expected: str) -> None:
    assert snippet(text, QueryWords(query), width).text == expected


def test_lines_are_sentences_of_source_code() -> None:
    code = "def one():\n    return 1\n\ndef reset(commit):\n    return commit\n"
    assert snippet(code, QueryWords("reset"), 18, by_line=True).text == "… def reset(commit): …"


@pytest.mark.parametrize(
    ("text", "query", "expected"),
    [
        ("Undo a commit, COMMIT or Commits; committing.", "commit", ["commit", "COMMIT", "Commits", "committing"]),
        ("The installation was installed by the installer", "installing", ["installation", "installed", "installer"]),
        ("Élan and café", "elan CAFE", ["Élan", "café"]),
        # Parts of names, and names by their parts.
        ("def get_user_name(userName):", "user", ["user", "user"]),
        ("call getUserName() now", "user name", ["UserName"]),
        ("python3 and python", "python", ["python", "python"]),
        # Stop words tell nothing.
        ("how do I do it in the way that it is", "how do I do it", []),
        ("what do I undo", "what do I undo", ["undo"]),
        ("删除文件夹，一切照旧", "文件夹", ["文件夹"]),
        ("word", "", []),
        ("", "word", []),
        # Not inside of other words.
        ("reincarnation of a car", "car", ["car"]),
    ],
)
def test_marked_words(text: str, query: str, expected: list[str]) -> None:
    assert marked(text, query) == expected


def test_words_are_marked_as_keyword_search_finds_them(tmp_path: Any) -> None:
    """What FTS5 finds by one word is marked, and nothing else is."""
    texts = ["Installing files", "a filing", "the installer", "files", "INSTALLED", "fílés", "instal", "unrelated"]
    database = IndexDatabase.open(tmp_path / "index.sqlite")
    with database.transaction():
        database.put([Record(str(number), text, {}, np.ones(2, np.float32)) for number, text in enumerate(texts)])
    for query in ("install", "file", "installation", "filed"):
        found = {int(each) for each, _ in database.match(query, 100)}
        assert {number for number, text in enumerate(texts) if marked(text, query)} == found, query
    database.close()


TEXT = st.text(st.characters() | st.sampled_from("a b.\n\x1b\u202e世é_"), max_size=200)


@given(TEXT, TEXT, st.integers(1, 60), st.booleans())
def test_any_text(text: str, query: str, width: int, by_line: bool) -> None:
    shown = snippet(text, QueryWords(query), width, by_line=by_line)
    assert shown.text == printable(shown.text) or shown.text.strip() == printable(shown.text)
    ends = [0, *(place for span in shown.spans for place in span), len(shown.text)]
    assert ends == sorted(ends)
    assert all(shown.text[start:end].strip() for start, end in shown.spans)
    core = shown.text.removeprefix("… ").removesuffix(" …")
    # It is a part of the passage, apart from white space.
    assert "".join(core.split()) in "".join(printable(text).split())
    if core.isascii() and "\\" not in core:
        assert cell_len(core) <= max(width, 1)
    if unicodedata.normalize("NFC", text).isascii() and len(" ".join(text.split())) <= width:
        assert core == printable(text)


ROWS = "\n".join(f"| Z{number} | up to {number} kg | {3 * number} EUR |" for number in range(12))
CODE = "def reset(commit):\n    if commit:\n\n        return undo(commit)\n    return None"


@pytest.mark.parametrize(
    ("values", "query", "expected"),
    [
        # Code keeps its lines and indentation, without blank lines; source code, and code in a text.
        ({"text": CODE, "lang": "python"}, "undo", [line for line in CODE.split("\n") if line]),
        ({"text": f"Some words.\n\n```python\n{CODE}\n```\nMore words."}, "undo", CODE.replace("\n\n", "\n").split("\n")),
        ({"text": "Run this:\n\n    make\n    make test\n\nand wait."}, "test", ["make", "make test"]),
        ({"text": "class A:\n\tdef b(self):\n\t\tpass", "lang": "python"}, "b", ["class A:", "    def b(self):", "        pass"]),
        # Lines of a table around the best one, with its header and without its rule.
        (
            {"text": f"Prices.\n\n| Zone | Weight | Price |\n|---|---:|---|\n{ROWS}\n\nMore."},
            "up to 7 kg",
            ["| Zone | Weight | Price |", *ROWS.split("\n")[5:9]],
        ),
        ({"text": "Zone | Price\nNorth | 3\nWest | 4", "kind": "docx"}, "west", ["Zone | Price", "North | 3", "West | 4"]),
        ({"text": "name;city\nAnn;Rome\nBob;Oslo", "kind": "csv"}, "oslo", ["name;city", "Ann;Rome", "Bob;Oslo"]),
        # Running text does not, also beside a table, or with a bar in it; what it introduces follows it.
        ({"text": "A commit\nis undone.\n\n| a | b |\n|---|---|\n| c | d |"}, "commit undone", ["A commit is undone.", "| a | b |", "| c | d |"]),
        ({"text": "One | two are\nwords of a text.\nAnd more."}, "words", ["One | two are words of a text. And more."]),
        # A long line is cut to the query's words.
        ({"text": "a = 1\n    b = '" + "x " * 60 + "needle y'", "lang": "python"}, "needle", None),
    ],
)  # fmt: skip
def test_code_and_tables_keep_their_lines(values: dict[str, Any], query: str, expected: list[str] | None) -> None:
    lines = [line.plain for line in hit_lines([hit(**values)], query, "hybrid", links=False)][1:]
    assert all(line.startswith("    ") for line in lines)
    if expected is not None:
        assert [line[4:] for line in lines] == expected
    else:
        assert "needle" in lines[-1]
    assert max(map(cell_len, lines)) <= 100


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
    kind=st.sampled_from(["", "csv"]),
    before=ANY,
    after=ANY,
)
# What this command writes for a terminal itself: styles and links.
OWN = re.compile(r"\x1b\[[\d;]*m|\x1b\]8;(id=[\d-]+)?;(file://[\w.~%/-]*)?\x1b\\")
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


@given(
    st.lists(HITS, min_size=1, max_size=3), ANY, st.sampled_from(["hybrid", "keyword"]), st.booleans(), st.booleans()
)
def test_no_text_reaches_a_terminal_with_its_codes(
    hits: list[Hit], query: str, mode: Any, links: bool, whole: bool
) -> None:
    """Paths, headings, texts, near-duplicates: whatever they are, a terminal gets text, our styles and our links."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="standard", soft_wrap=True, highlight=False)
    for line in hit_lines(hits, query, mode, links=links, whole=whole):
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


SKIPPED = [
    *(SkippedFile(f"{number}.png", "not text") for number in range(1204)),
    *(SkippedFile(f"{number}.log", "larger than 16 MiB") for number in range(3)),
    SkippedFile("a.pdf", "cannot be parsed: ValueError: page 3"),
    SkippedFile("b.pdf", "cannot be parsed: ValueError: page 4"),
]


def test_many_skipped_files_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    reset_verbosity()
    print_skipped(SKIPPED, hint=True)
    assert capsys.readouterr().err == (
        "skipped: 1,209 files: 1,204 not text, 3 larger than 16 MiB, 2 cannot be parsed. --json lists all.\n"
    )
    print_skipped(SKIPPED[-2:], hint=True)
    assert capsys.readouterr().err == (
        "skipped: a.pdf: cannot be parsed: ValueError: page 3\nskipped: b.pdf: cannot be parsed: ValueError: page 4\n"
    )
    request_verbosity(Verbosity.VERBOSE, explicit=True)
    print_skipped(SKIPPED, hint=True)
    assert len(capsys.readouterr().err.splitlines()) == len(SKIPPED)
    reset_verbosity()
