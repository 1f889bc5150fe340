"""The history of an interactive session, and options whose value may be left out."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from epic_rag_cli.commands.query import History, history_file
from epic_rag_cli.terminal import _filled


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert history_file() == tmp_path / "state/epic-rag/query_history"
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("relative/folder", ""):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert history_file() == tmp_path / ".local/state/epic-rag/query_history"


def test_what_is_kept() -> None:
    history = History()
    assert history.load() == []
    for line in ("one", "", " secret", "  ", "zwei é", "\x1b[2J", "\u202e", "x" * 10_001, ":k 3"):
        history.add(line)
    assert history_file().read_text(encoding="utf-8") == "one\nzwei é\n:k 3\n"
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600
    assert History().load() == ["one", "zwei é", ":k 3"]


def test_a_long_or_odd_file_is_put_right() -> None:
    history_file().parent.mkdir(parents=True)
    history_file().write_bytes(
        b"\x1b[2J\nbroken \xff\n" + b"".join(b"line %d\n" % number for number in range(3000)) + b"cut o"
    )
    assert History().load() == [f"line {number}" for number in range(2000, 3000)]
    assert history_file().read_text() == "".join(f"line {number}\n" for number in range(2000, 3000))
    history_file().write_bytes(b"broken \xff\n")
    assert History().load() == ["broken \ufffd"]


def test_one_warning_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    os.makedirs(history_file())
    history = History()
    assert history.load() == []
    history.add("one")
    history.add("two")
    assert capsys.readouterr().err.count("what you type is not kept for the next time") == 1


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
def test_a_number_is_put_in_where_it_is_left_out(given: list[str], expected: list[str]) -> None:
    assert _filled(given, "--open", "1") == expected
