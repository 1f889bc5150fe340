"""What `query` prints for given hits: a table of hits and lines, with no model and no index behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import epic_rag_chroma
from epic_rag_chroma import Hit


def hit(**changes: Any) -> Hit:
    values: dict[str, Any] = {
        "rank": 1,
        "score": 0.71234,
        "path": "guide/install.md",
        "first_line": 3,
        "last_line": 9,
        "page": None,
        "heading_path": ("Guide", "Install"),
        "text": "Run the installer.\n\nThen read the manual.",
        "id": "abc",
    }
    return Hit(**{**values, **changes})


class FakeIndexer:
    """Answers with given hits and remembers what it was asked."""

    hits: tuple[Hit, ...] = ()
    asked: dict[str, Any]

    def __init__(self, index_dir: Path, *, encoder: Callable[[], object] | None = None) -> None:
        type(self).asked = {"index_dir": index_dir, "encoder": encoder}

    def query(self, text: str, **options: Any) -> list[Hit]:
        type(self).asked.update(options, text=text)
        return list(self.hits)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeIndexer]:
    class Fake(FakeIndexer):
        pass

    monkeypatch.setattr(epic_rag_chroma, "ChromaIndexer", Fake)
    return Fake


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "1  0.712  guide/install.md:3-9  Guide > Install\n    Run the installer. Then read the manual.\n"),
        (
            {"last_line": 3, "heading_path": (), "text": "One line."},
            "1  0.712  guide/install.md:3\n    One line.\n",
        ),
        (
            {"path": "a.pdf", "page": 4, "first_line": None, "last_line": None, "heading_path": ()},
            "1  0.712  a.pdf:page 4\n    Run the installer. Then read the manual.\n",
        ),
        (
            {"first_line": None, "last_line": None, "heading_path": (), "text": "x"},
            "1  0.712  guide/install.md\n    x\n",
        ),
        ({"score": -0.05, "text": "x"}, "1  -0.050  guide/install.md:3-9  Guide > Install\n    x\n"),
        # Nothing from a document is markup, an emoji code or an escape sequence.
        (
            {"heading_path": ("[bold]A[/bold]",), "text": "[red]x[/] :smile: [link=http://e]y"},
            "1  0.712  guide/install.md:3-9  [bold]A[/bold]\n    [red]x[/] :smile: [link=http://e]y\n",
        ),
        (
            {"path": "a\x1b[2J.md", "heading_path": ("\x1b]0;t\x07",), "text": "\x9b31m \u202etxt"},
            "1  0.712  a\\x1b[2J.md:3-9  \\x1b]0;t\\x07\n    \\x9b31m \\u202etxt\n",
        ),
        # A name that cannot be decoded.
        ({"path": "\udcff.md", "text": "x"}, "1  0.712  \\udcff.md:3-9  Guide > Install\n    x\n"),
        # A long path stays whole; a long passage becomes three lines.
        (
            {"path": "d/" * 100 + "f.md", "heading_path": (), "text": "word " * 200},
            "1  0.712  " + "d/" * 100 + "f.md:3-9\n" + ("    " + " ".join(["word"] * 19) + "\n") * 2
            + "    " + " ".join(["word"] * 17) + " …\n",
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
    assert lines[:3] == [" 1  0.712  guide/install.md:3-9", "    x", ""]
    assert lines[-2:] == ["10  0.712  guide/install.md:3-9", "    x"]


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
    assert cli("query", "x", "--index-dir", "anywhere").out == "1  0.712  docs/guide/install.md:3-9\n    x\n"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    path = tmp_path / "work/docs/guide/install.md"
    assert cli("query", "x", "--index-dir", "anywhere").out == f"1  0.712  {path}:3-9\n    x\n"


def test_json(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = (hit(text="\x1b[31m\nred 世界"),)
    result = cli("query", "installer", "--index-dir", "anywhere", "--json")
    assert result.status == 0
    assert "\x1b" not in result.out
    assert json.loads(result.out) == {
        "query": "installer",
        "index_dir": "anywhere",
        "task": "docs",
        "bank": None,
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
                "root": "",
            }
        ],
    }


def test_no_hits_is_a_note(fake: type[FakeIndexer], cli: Any) -> None:
    result = cli("query", "installer", "--index-dir", "anywhere")
    assert (result.status, result.out) == (0, "")
    assert result.err == "note: anywhere holds no passages; run `epic-rag index PATH` to add some\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"k": 5, "task": "docs", "bank": None, "num_demonstrations": None}),
        (["-k", "3"], {"k": 3, "task": "docs", "bank": None, "num_demonstrations": None}),
        (["--task", "qa"], {"k": 5, "task": "qa", "bank": None, "num_demonstrations": None}),
        (["-n", "4"], {"k": 5, "task": "docs", "bank": None, "num_demonstrations": 4}),
        # A bank brings its own instruction, so no task is put beside it.
        (["--bank", "mine"], {"k": 5, "task": None, "bank": "mine", "num_demonstrations": None}),
        (
            ["--bank", "mine", "--task", "qa", "--num-demonstrations", "0"],
            {"k": 5, "task": "qa", "bank": "mine", "num_demonstrations": 0},
        ),
    ],
)
def test_what_the_indexer_is_asked(
    fake: type[FakeIndexer], cli: Any, arguments: list[str], expected: dict[str, Any]
) -> None:
    fake.hits = (hit(),)
    assert cli("query", "the text", "--index-dir", "anywhere", *arguments).status == 0
    assert fake.asked == {"index_dir": Path("anywhere"), "encoder": None, "text": "the text", **expected}


def test_model_is_loaded_by_the_indexer_only(fake: type[FakeIndexer], cli: Any) -> None:
    fake.hits = (hit(),)
    assert cli("query", "x", "--index-dir", "anywhere", "--model", "no-such-model").status == 0
    assert callable(fake.asked["encoder"])
