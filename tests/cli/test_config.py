"""Configuration files: search, precedence, errors, restrictions, `epic-rag config`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from epic_rag_cli.config import SHARED_KEYS, find_project_file, user_file


def values(result: Any) -> dict[str, tuple[Any, str]]:
    """What `epic-rag config --json` says: "command.option" -> (value, source)."""
    assert result.status == 0, result.err
    return {
        f"{row['command']}.{row['option']}": (row["value"], row["source"]) for row in json.loads(result.out)["values"]
    }


@pytest.mark.parametrize(
    ("files", "start", "expected"),
    [
        ({}, "a/b", None),
        ({"epic-rag.toml": ""}, ".", "epic-rag.toml"),
        ({"epic-rag.toml": ""}, "a/b", "epic-rag.toml"),
        ({"epic-rag.toml": "", "a/epic-rag.toml": ""}, "a/b", "a/epic-rag.toml"),
        ({"epic-rag.toml": "", "a/pyproject.toml": "[tool.epic-rag]\n"}, "a/b", "a/pyproject.toml"),
        ({"a/epic-rag.toml": "", "a/pyproject.toml": "[tool.epic-rag]\n"}, "a/b", "a/epic-rag.toml"),
        # A project that has nothing to say is passed by, also when nobody can read what it says.
        ({"epic-rag.toml": "", "a/pyproject.toml": "[project]\nname = 'epic-rag-fan'\n"}, "a/b", "epic-rag.toml"),
        ({"epic-rag.toml": "", "a/pyproject.toml": "not toml ["}, "a/b", "epic-rag.toml"),
        # The search ends at a repository's top.
        ({"epic-rag.toml": "", "a/.git/config": ""}, "a/b", None),
        ({"a/epic-rag.toml": "", "a/.git/config": ""}, "a/b", "a/epic-rag.toml"),
    ],
)
def test_project_file(tmp_path: Path, files: dict[str, str], start: str, expected: str | None) -> None:
    (tmp_path / ".git").mkdir()  # nothing above this test's folder
    top = tmp_path / "top"
    (top / "a/b").mkdir(parents=True)
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    assert find_project_file(top / start) == (None if expected is None else top / expected)


def test_search_ends_at_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "epic-rag.toml").write_text("")
    (tmp_path / "home/me/docs").mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home/me")
    assert find_project_file(tmp_path / "home/me/docs") is None
    (tmp_path / "home/me/epic-rag.toml").write_text("")
    assert find_project_file(tmp_path / "home/me/docs") == tmp_path / "home/me/epic-rag.toml"


def test_fifos_are_ignored(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "epic-rag.toml")
    os.mkfifo(tmp_path / "pyproject.toml")
    (tmp_path / ".git").mkdir()
    assert find_project_file(tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner here")
def test_file_of_another_user(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("epic-rag.toml").write_text("[query]\ntop-k = 3\n")
    owner = Path("epic-rag.toml").stat().st_uid
    if owner == 0:
        os.chown("epic-rag.toml", 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    result = cli("config", "--json")
    assert json.loads(result.out) == {"file": None, "files": [], "values": []}
    assert re.fullmatch(
        r"warning: .*epic-rag\.toml belongs to another user and is ignored\. .*--config\.\n", result.err
    )
    assert values(cli("config", "--json", "--config", "epic-rag.toml"))["query.top-k"][0] == 3


def test_precedence(cli: Any, docs: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("epic-rag.toml").write_text(
        f'model = "{tiny_checkpoint}"\nindex-dir = "from-file"\n[index]\nexclude = ["drafts/"]\nchunk-tokens = 40\n'
    )
    assert cli("index", "docs").status == 0
    state = json.loads(cli("status", "--json").out)
    assert state["index_dir"] == str(Path("from-file").resolve())
    assert (state["files"], state["settings"]["exclude"], state["settings"]["chunk_tokens"]) == (3, ["drafts/"], 40)
    monkeypatch.setenv("EPIC_RAG_INDEX", "from-environment")
    assert cli("index", "docs", "--exclude", "*.txt").status == 0
    state = json.loads(cli("status", "--json").out)
    assert state["index_dir"] == str(Path("from-environment").resolve())
    assert (state["files"], state["settings"]["exclude"]) == (3, ["*.txt"])
    assert cli("index", "docs", "--index-dir", "from-command-line").status == 0
    assert Path("from-command-line").is_dir()


def test_sources(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("sub").mkdir()
    Path("sub/epic-rag.toml").write_text('model = "shared"\nindex-dir = "idx"\n[query]\nmodel = "own"\ntop-k = 7\n')
    monkeypatch.chdir("sub")
    file = str(Path("epic-rag.toml").resolve())
    assert values(cli("config", "--json")) == {
        "index.index-dir": (str(Path("idx").resolve()), file),
        "index.model": ("shared", file),
        "query.top-k": (7, file),
        "query.model": ("own", file),
        "query.index-dir": (str(Path("idx").resolve()), file),
        "status.index-dir": (str(Path("idx").resolve()), file),
        "clear.index-dir": (str(Path("idx").resolve()), file),
    }
    monkeypatch.setenv("EPIC_RAG_MODEL", "variable")
    shown = values(cli("config", "--json", "--all"))
    assert shown["query.model"] == ("variable", "EPIC_RAG_MODEL")
    assert shown["index.rebuild"] == (False, "default")
    lines = cli("config").out.splitlines()
    assert "query --top-k      7         epic-rag.toml" in [
        re.sub(r"  +\S*idx", "  idx", line) for line in lines
    ] or any(re.fullmatch(r"query --top-k +7 +epic-rag\.toml", line) for line in lines)


def test_without_a_file(cli: Any) -> None:
    result = cli("config")
    assert (result.status, result.out) == (0, "")
    assert result.err.startswith("note: No configuration file.")


def test_named_file(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3):
        Path(f"{number}.toml").write_text(f"[query]\ntop-k = {number}\n")
    Path("pyproject.toml").write_text("[tool.epic-rag.query]\ntop-k = 9\n")

    def top_k(*arguments: str) -> Any:
        return values(cli(*arguments, "--json"))["query.top-k"][0]

    assert top_k("config") == 9
    monkeypatch.setenv("EPIC_RAG_CONFIG", "1.toml")
    assert top_k("config") == 1
    assert top_k("--config", "2.toml", "config") == 2
    assert top_k("--config", "2.toml", "config", "--config", "3.toml") == 3
    assert top_k("config", "--config", "pyproject.toml") == 9
    assert json.loads(cli("config", "--config", os.devnull, "--json").out)["values"] == []


def test_several_indexes_of_the_variable(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def value() -> object:
        rows = json.loads(cli("config", "--all", "--json").out)["values"]
        return next(row["value"] for row in rows if (row["command"], row["option"]) == ("query", "index-dir"))

    assert value() is None
    monkeypatch.setenv("EPIC_RAG_INDEX", "one")
    assert value() == "one"
    monkeypatch.setenv("EPIC_RAG_INDEX", os.pathsep.join(["one", "two"]))
    assert value() == ["one", "two"]


def test_paths_are_relative_to_the_file(cli: Any, tiny_checkpoint: Path, docs: Path) -> None:
    (docs / "tiny").symlink_to(tiny_checkpoint)
    (docs / "epic-rag.toml").write_text('model = "tiny"\nindex-dir = "here/idx"\n')
    assert cli("index", "docs", "--config", "docs/epic-rag.toml").status == 0
    assert (docs / "here/idx/index.sqlite").is_file()


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("[", ["not valid TOML"]),
        ("\xff", ["not valid TOML"]),
        ("colour = true", ["unknown key 'colour'", "index-dir", r"\[query\]"]),
        ("[search]\nk = 1", ["unknown key 'search'", r"\[query\]"]),
        ("top-k = 3", ["unknown key 'top-k'"]),
        ("[query]\ntopk = 3", ["unknown key 'topk'", r"\[query\]", "top-k"]),
        ("query = 3", ["query is 3", "table"]),
        ('[query]\nbank = ""', ["bank is empty"]),
        ("[query]\nmode = ['a']", ["mode is", "Use a string"]),
        ("[index]\nexclude = [[1]]", ["exclude is", "Use a string"]),
        ("[index]\nrebuild = true", ["unknown key 'rebuild'"]),
        ("[index]\nwatch = true", ["unknown key 'watch'"]),
        ("[clear]\nyes = true", ["unknown key 'clear'"]),
        ("[index]\nquiet = true", ["unknown key 'quiet'"]),
        ("x = '''\n" + "y" * 2**20 + "'''", ["larger than 1 MiB"]),
    ],
)
def test_malformed_files(cli: Any, text: str, facts: list[str]) -> None:
    Path("epic-rag.toml").write_text(text, encoding="latin-1")
    for command in (["config"], ["index", "."], ["query", "x"], ["status"]):
        check_error(cli(*command), r"epic-rag\.toml", *facts)
    # Other commands do not read it, and help is printed in any case.
    assert cli("models").status == cli("query", "--help").status == cli("--help").status == 0


@pytest.mark.parametrize(
    ("text", "command", "facts"),
    [
        ('[query]\ntop-k = "many"', ["query", "x"], ["top-k is 'many'", "'--top-k'", "valid int"]),
        ("[query]\ntop-k = 0", ["query", "x"], ["top-k is '0'", "1"]),
        ("[query]\ntop-k = true", ["query", "x"], ["top-k is 'true'", "valid int"]),
        ("[query]\ntop-k = 1.5", ["query", "x"], ["top-k is '1.5'", "valid int"]),
        ('[query]\nmode = "sparse"', ["query", "x"], ["mode is 'sparse'", "is not one of"]),
        ("[query]\njson = 3", ["query", "x"], ["json is '3'", "valid bool"]),
        ("[index]\nwait = -1", ["index", "."], ["wait is '-1'", "0"]),
        ('quiet = "x"', ["status"], ["quiet is 'x'", "valid bool"]),
    ],
)
def test_wrong_values(cli: Any, text: str, command: list[str], facts: list[str]) -> None:
    Path("epic-rag.toml").write_text(text)
    for line in (command, ["config"]):
        check_error(cli(*line), *facts, r"epic-rag\.toml")


def check_error(result: Any, *facts: str) -> None:
    assert (result.status, result.out) == (1, ""), result
    assert result.err.startswith("error: "), result.err
    assert result.err.count("\n") == 1, result.err
    for fact in facts:
        assert re.search(fact, result.err), f"no {fact!r} in {result.err!r}"


def test_users_file(cli: Any) -> None:
    user_file().parent.mkdir(parents=True)
    user_file().write_text('chroma = "http://mine:8000"\nquiet = true\n[query]\ntop-k = 1\nbank = "docs"\n')
    Path("epic-rag.toml").write_text("[query]\ntop-k = 2\nwhere = 'lang=python'\n")
    project, user = str(Path("epic-rag.toml").resolve()), str(user_file())
    found = values(cli("config", "--json"))
    assert found["query.top-k"] == (2, project)
    assert found["query.where"] == (["lang=python"], project)
    assert found["query.bank"] == ("docs", user)
    assert found["status.chroma"] == ("http://mine:8000", user)
    assert found["status.quiet"] == (True, user)
    assert json.loads(cli("config", "--json", "--config", os.devnull).out)["values"] == []


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('chroma = "http://evil.example:8000"', "chroma"),
        ('[query]\nchroma = "http://evil.example:8000"', "chroma"),
        ("[index]\nfollow-links = true", "follow-links"),
        ('index-dir = "../elsewhere"', "index-dir"),
        ('index-dir = "/etc"', "index-dir"),
    ],
)
def test_restrictions(cli: Any, text: str, key: str) -> None:
    Path("epic-rag.toml").write_text(text)
    result = cli("config", "--json")
    assert (result.status, result.out) == (1, "")
    assert re.search(rf"{key} is .*If you trust the file, run with --config \S*epic-rag\.toml", result.err)
    # A file that the user names is not restricted.
    named = values(cli("config", "--json", "--config", "epic-rag.toml"))
    assert any(option.endswith(f".{key}") for option in named)


def test_index_dir_through_a_link(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Path("link").symlink_to(tmp_path / "elsewhere")
    Path("epic-rag.toml").write_text('index-dir = "link/idx"')
    assert "outside" in cli("config").err


def test_no_key_for_editors_or_code(cli: Any) -> None:
    known = {row["option"] for row in json.loads(cli("config", "--all", "--json").out)["values"]} | set(SHARED_KEYS)
    assert not {option for option in known if "trust" in option or "editor" in option or "code" in option}
    for text in ('editor = "x"', "trust-remote-code = true", "[query]\nopen = 1", "[query]\ntrust-remote-code = true"):
        Path("epic-rag.toml").write_text(text)
        assert "unknown key" in cli("config").err


def test_through_the_entry_point(one_process: Any, docs: Path, tiny_checkpoint: Path) -> None:
    Path("pyproject.toml").write_text(
        f'[tool.epic-rag]\nmodel = "{tiny_checkpoint}"\n[tool.epic-rag.query]\ntop-k = 2\njson = true\n'
    )
    indexed, found = one_process(["-q", "index", "docs"], ["query", "cats", "--index-dir", "docs/.epic-rag"])
    assert (indexed.status, indexed.out, indexed.err) == (0, "", "")
    assert len(json.loads(found.out)["hits"]) == 2
