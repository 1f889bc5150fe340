"""Errors: one line on stderr with facts and a remedy, an exit status, no traceback."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import epic_rag_chroma
from epic_rag.files import user_name
from epic_rag_cli.main import run


def check(result: Any, status: int, *facts: str) -> None:
    """One `error:` line that holds the facts and a command; nothing on stdout."""
    assert result.status == status, result
    assert result.out == ""
    assert result.err.startswith("error: "), result.err
    assert result.err.count("\n") == 1, result.err
    for fact in facts:
        assert re.search(fact, result.err), f"no {fact!r} in {result.err!r}"


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["index", "x", "--wait", "-1"], ["--wait", "0", "epic-rag index --help"]),
        (["index", "x", "--wait", "nan"], ["--wait", "epic-rag index --help"]),
        (["index", "x", "--dry-run", "--watch"], ["--dry-run", "--watch", "epic-rag index --help"]),
        (["index", "x", "--dry-run", "--rebuild"], ["--dry-run", "--rebuild", "epic-rag index --help"]),
        (["index", "x", "-q", "-v"], ["--quiet", "--verbose", "epic-rag index --help"]),
        (["-q", "status", "-v"], ["--quiet", "--verbose", "epic-rag status --help"]),
        (["index", "x", "--chunk-tokens", "0"], ["--chunk-tokens", "1", "epic-rag index --help"]),
        (["index", "x", "--chunk-tokens", "many"], ["--chunk-tokens", "epic-rag index --help"]),
        (["query"], ["Missing argument 'TEXT", "epic-rag query --help"]),
        (
            ["query", "x", "--mode", "sparse"],
            [r"'--mode'( \(env var: 'EPIC_RAG_MODE'\))?: 'sparse' is not one of 'dense', "],
        ),
        (
            ["query", "x", "--strategy", "best"],
            [
                "'--strategy': 'best' is not one of 'reader', 'task-vector', 'epic', 'text'. See `epic-rag query --help`."
            ],
        ),
        (["query", ""], ["TEXT", "empty", "epic-rag query --help"]),
        (["query", " \n"], ["TEXT", "empty", "epic-rag query --help"]),
        (["query", "x", "-k", "0"], ["-k", "1", "epic-rag query --help"]),
        (["query", "x", "-k", "-3"], ["-k", "1", "epic-rag query --help"]),
        (["query", "x", "-n", "-1"], ["--num-demonstrations", "0", "epic-rag query --help"]),
        (["query", "x", "-n", "2"], ["-n needs demonstrations", "--bank", "epic-rag query --help"]),
        (["query", "x", "--dtype", "int8"], ["--dtype", "epic-rag query --help"]),
        (["query", "x", "--colour"], ["--colour", "epic-rag query --help"]),
        (["qeury", "x"], ["qeury", "epic-rag --help"]),
        (["bank", "shwo"], ["shwo", "epic-rag bank --help"]),
        (["bank", "build", "a", "b", "--out", "c"], ["--out", "2", "epic-rag bank build --help"]),
        (["bank", "build", "a", "--instruction", " "], ["--instruction", "empty", "epic-rag bank build --help"]),
    ],
)
def test_wrong_command_lines(cli: Any, arguments: list[str], facts: list[str]) -> None:
    check(cli(*arguments), 2, *facts)


@pytest.mark.parametrize("arguments", [[], ["bank"]])
def test_no_command_prints_the_help_on_stderr(cli: Any, arguments: list[str]) -> None:
    result = cli(*arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("Usage: epic-rag")


@pytest.mark.parametrize("command", ["index", "query", "status", "clear"])
def test_no_index_anywhere(cli: Any, command: str) -> None:
    arguments = ["x"] if command == "query" else []
    check(cli(command, *arguments), 1, r"No index", re.escape(os.getcwd()), r"`epic-rag index \.`")


@pytest.mark.parametrize("command", ["query", "status", "clear"])
def test_no_index_in_the_given_folder(cli: Any, command: str) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/precious.txt").write_text("mine")
    arguments = {"query": ["x"], "clear": ["--yes"]}.get(command, [])
    check(cli(command, *arguments, "--index-dir", "elsewhere"), 1, "elsewhere", "`epic-rag ")
    assert Path("elsewhere/precious.txt").exists()


def test_missing_path(cli: Any, docs: Path) -> None:
    check(cli("index", "docs", "dosc"), 1, "No such file or folder: dosc. Check the path.")
    assert not (docs / ".epic-rag").exists()


@pytest.mark.parametrize("name", [None, "only.bin", ".hidden-from-index"])
def test_nothing_to_index(cli: Any, tiny_checkpoint: Path, name: str | None) -> None:
    Path("empty").mkdir()
    if name == "only.bin":
        Path("empty/only.bin").write_bytes(bytes(range(256)) * 10)
    elif name:
        Path("empty/.gitignore").write_text("*\n")
        Path("empty/ignored.md").write_text("# Ignored\n")
    for _ in range(2):  # the second run finds what the first may have left
        result = cli("index", "empty", "--model", tiny_checkpoint)
        error = result.err.splitlines()[-1] + "\n"
        check(type(result)(result.status, result.out, error), 1, "Nothing to index: empty", "--include")


def test_emptied_folder_is_no_error(cli: Any, indexed: Path) -> None:
    for path in list(indexed.rglob("*")):
        if path.is_file() and ".epic-rag" not in path.parts:
            path.unlink()
    result = cli("index", "docs")
    assert result.status == 0
    assert result.out.startswith("0 added, 0 changed, 0 renamed, 4 deleted, 0 unchanged")
    query = cli("query", "cats", "--index-dir", "docs/.epic-rag")
    assert (query.status, query.out) == (0, "")
    assert query.err.startswith("note: docs/.epic-rag holds no chunks.")


@pytest.mark.parametrize("command", [["query", "cats", "--index-dir", "docs/.epic-rag"], ["index", "docs"]])
def test_other_model_than_the_index_has(cli: Any, indexed: Path, other_checkpoint: Path, command: list[str]) -> None:
    check(cli(*command, "--model", other_checkpoint), 1, "built with|made by|holds vectors", r"--rebuild|--model")


def test_rebuild_changes_the_model(cli: Any, indexed: Path, other_checkpoint: Path) -> None:
    before = cli("status", "--index-dir", "docs/.epic-rag").out
    assert cli("index", "docs", "--model", other_checkpoint, "--rebuild").status == 0
    assert cli("status", "--index-dir", "docs/.epic-rag").out != before
    assert cli("query", "cats", "--index-dir", "docs/.epic-rag").status == 0


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--task", "dosc"], ["dosc", r"did you mean docs\?"]),
        (["--bank", "no-such-bank"], ["no-such-bank", "docs", "`epic-rag bank list`"]),
        (["--bank", "drafts"], ["drafts", r"bank\.json", "`epic-rag bank list`"]),
        (["--bank", "notes.txt"], ["notes.txt is a file", "`epic-rag bank build notes.txt --out FOLDER --task docs`"]),
        (["--bank", "docs", "-n", "500"], ["500", r"\d+"]),
        (["--model", "no/such/model"], ["no/such/model", "epic-minilm"]),
        (["--model", "drafts"], ["drafts"]),
    ],
)
def test_wrong_names(
    cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], facts: list[str]
) -> None:
    monkeypatch.chdir(indexed)
    check(cli("query", "cats", *options), 1, *facts)


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe" * 1000, b"SQLite format 3\0" + bytes(1000)])
@pytest.mark.parametrize("command", [["query", "cats"], ["status"], ["index", "."]])
def test_broken_index_file(
    cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, command: list[str]
) -> None:
    monkeypatch.chdir(indexed)
    (indexed / ".epic-rag/index.sqlite").write_bytes(content)
    check(cli(*command), 1, r"index\.sqlite", "`epic-rag |`pip ")


def test_rebuild_repairs_a_broken_index(cli: Any, indexed: Path, tiny_checkpoint: Path) -> None:
    (indexed / ".epic-rag/index.sqlite").write_text("{")
    result = cli("index", "docs", "--rebuild", "--chunk-tokens", "50", "--model", tiny_checkpoint)
    assert result.status == 0, result.err
    assert cli("query", "cats", "--index-dir", "docs/.epic-rag").status == 0


@pytest.mark.parametrize(
    ("index_dir", "fact"),
    [("docs/notes.txt/index", "notes.txt"), ("docs/notes.txt", "notes.txt"), ("/proc/epic-rag-index", "/proc")],
)
def test_index_folder_that_cannot_be_written(
    cli: Any, docs: Path, tiny_checkpoint: Path, index_dir: str, fact: str
) -> None:
    result = cli("index", "docs", "--model", tiny_checkpoint, "--index-dir", index_dir)
    check(result, 1, re.escape(fact), "run the command again|`epic-rag ")
    assert (docs / "notes.txt").read_text().startswith("Cats")


@pytest.mark.parametrize(
    ("content", "options", "facts"),
    [
        (None, [], ["no-file", "`epic-rag bank build"]),
        ("", ["--task", "docs", "--out", "b"], ["no demonstrations"]),
        ("{}", ["--task", "docs", "--out", "b"], [r":1 "]),
        ('{"query": "q", "passage": "p"}\nnonsense\n', ["--task", "docs", "--out", "b"], [r":2 "]),
        ('{"query": "q", "passage": "p"}', ["--out", "b"], ["--instruction", "`epic-rag bank build"]),
        ('{"query": "q", "passage": "p"}', ["--task", "docs"], ["--out", "`epic-rag bank build"]),
        ('{"query": "q", "passage": "p"}', ["--task", "dosc", "--out", "b"], ["dosc", "docs"]),
        ('{"query": "q", "passage": "p"}', ["--task", "docs", "--out", "pairs.jsonl"], ["is a file"]),
        ('{"query": "q", "passage": "p"}', ["--task", "docs", "--out", "."], [r"bank\.json"]),
        ('{"query": "q", "passage": "p"}', ["--task", "docs", "--out", "b", "--model", "no/such/m"], ["no/such/m"]),
    ],
)
def test_bank_build(cli: Any, content: str | None, options: list[str], facts: list[str]) -> None:
    name = "no-file.jsonl" if content is None else "pairs.jsonl"
    if content is not None:
        Path(name).write_text(content)
    check(cli("bank", "build", name, *options), 1, *facts)
    assert not Path("b").exists()


def test_bank_show_of_a_missing_bank(cli: Any) -> None:
    check(cli("bank", "show", "nothing"), 1, "nothing", "`epic-rag bank list`")


def test_clear_without_a_terminal(cli: Any, indexed: Path) -> None:
    check(cli("clear", "--index-dir", "docs/.epic-rag"), 1, "4 files", "Pass --yes")
    assert (indexed / ".epic-rag").is_dir()


def test_messages_are_safe_for_a_terminal(cli: Any) -> None:
    result = cli("index", "a\x1b[2J\nb")
    check(result, 1, re.escape("a\\x1b[2J b"))


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "error: Interrupted before anything was stored. Run the same command again.\n"),
        (PermissionError(13, "Permission denied", "docs/x"), 1, "error: docs/x: Permission denied ({docs} has mode 750 and belongs to {user}, you are {user}). Make it accessible or use another path, then run the command again.\n"),
        (RuntimeError("boom\nsecond line"), 1, "error: Unexpected error (RuntimeError: boom second line). Run the command again with EPIC_RAG_DEBUG=1 for the traceback.\n"),
    ],
)  # fmt: skip
def test_unexpected_errors(
    cli: Any, docs: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: int, line: str
) -> None:
    def index(*_: object, **__: object) -> None:
        raise raised

    docs.chmod(0o750)
    monkeypatch.setattr(epic_rag_chroma.ChromaIndexer, "index", index)
    result = cli("index", "docs")
    assert (result.status, result.out, result.err) == (status, "", line.format(docs=docs, user=user_name(os.geteuid())))


def test_interrupted_query(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def query(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(epic_rag_chroma.ChromaIndexer, "query", query)
    result = cli("query", "cats", "--index-dir", "docs/.epic-rag")
    assert (result.status, result.out, result.err) == (130, "", "error: Interrupted.\n")


@pytest.mark.parametrize(
    ("options", "rest"),
    [
        ([], "keeps what was stored. Run the same command again to continue."),
        (["--rebuild"], "is unchanged. Run the same command again to start over."),
    ],
)
def test_interrupted_index(
    cli: Any, docs: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], rest: str
) -> None:
    def index(*_: object, progress: Callable[[object], None], **__: object) -> None:
        progress(epic_rag_chroma.IndexProgress("indexing", 12, 40, "a.md"))
        raise KeyboardInterrupt

    monkeypatch.setattr(epic_rag_chroma.ChromaIndexer, "index", index)
    error = cli("index", "docs", *options).err
    assert error == f"error: Interrupted at indexing 12 of 40. docs/.epic-rag {rest}\n"


def test_debugging_shows_the_traceback(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def index(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(epic_rag_chroma.ChromaIndexer, "index", index)
    monkeypatch.setenv("EPIC_RAG_DEBUG", "1")
    with pytest.raises(RuntimeError, match="boom"):
        run(["index", "docs"])
