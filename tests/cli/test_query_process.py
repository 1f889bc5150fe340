"""`epic-rag query` through its real entry point: standard input, batches, modes, filters, terminals, editors."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.model_files import save_cross_encoder
from tests.helpers.terminals import MODULE, Terminal, plain

INDEX = ("--index-dir", "docs/.epic-rag")
QUERY = ("query", "cats sleep", *INDEX)
HEAVY = ("llama_index", "torch", "transformers", "chromadb")
REPORT_IMPORTS = f"""
import sys
from epic_rag_cli.main import run
status = run(sys.argv[1:])
print("imported:", *(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)
sys.exit(status)
"""


def fed(text: str | bytes, *arguments: str) -> tuple[int, str, str]:
    """Run the command with a text on its standard input."""
    done = subprocess.run(
        [*MODULE, *arguments],
        input=text.encode() if isinstance(text, str) else text,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def editor(name: str, status: int = 0) -> tuple[Path, Path]:
    """A program that writes down what it was started with; returns it and the file of its arguments."""
    Path("bin").mkdir(exist_ok=True)
    program, log = Path.cwd() / "bin" / name, Path.cwd() / f"{name}.log"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], sys.stdin.isatty()], open({str(log)!r}, 'w'))\nsys.exit({status})\n"
    )
    program.chmod(0o755)
    return program, log


def test_keyword_search_loads_neither_a_model_nor_chroma(process: Any, indexed: Path) -> None:
    result = process("-c", REPORT_IMPORTS, *QUERY, "--mode", "keyword", command=[sys.executable])
    assert result.status == 0
    assert "notes.txt:1-2" in result.out
    assert result.err == "imported:\n"


def test_text_from_standard_input(indexed: Path) -> None:
    status, out, err = fed("cats\n  sleep\n", "query", "-", *INDEX, "--mode", "keyword", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["query"] == "cats\n  sleep"
    for text, code, said in (
        (" \n", 2, "error: Invalid value for 'TEXT': standard input is empty; see `epic-rag query --help`\n"),
        (b"\xff", 1, "error: standard input is not UTF-8 (byte 0); send it as UTF-8\n"),
    ):
        assert fed(text, "query", "-", *INDEX) == (code, "", said)


def test_without_text_and_without_a_terminal(indexed: Path) -> None:
    expected = (2, "", "error: Missing argument 'TEXT'; see `epic-rag query --help`\n")
    assert fed("cats\n", "query", *INDEX) == expected


def test_batch_from_standard_input_and_from_a_file(cli: Any, indexed: Path) -> None:
    lines = '{"query": "cats sleep", "id": 1}\n{"query": "delete the folder"}\n'
    status, out, err = fed(lines, "query", "--batch", "-", *INDEX, "--jsonl", "-k", "2")
    assert (status, err) == (0, "")
    hits = [json.loads(line) for line in out.splitlines()]
    assert [(hit["query"], hit["query_id"], hit["rank"]) for hit in hits] == [
        ("cats sleep", 1, 1),
        ("cats sleep", 1, 2),
        ("delete the folder", None, 1),
        ("delete the folder", None, 2),
    ]
    Path("batch.jsonl").write_text(lines)
    answers = json.loads(cli("query", "--batch", "batch.jsonl", *INDEX, "--json", "-k", "2").out)
    assert [[hit["id"] for hit in each["hits"]] for each in answers] == [
        [hits[0]["id"], hits[1]["id"]],
        [hits[2]["id"], hits[3]["id"]],
    ]
    # One after the other, the answers are the same.
    single = json.loads(cli("query", "delete the folder", *INDEX, "--json", "-k", "2").out)
    assert [hit["id"] for hit in single["hits"]] == [hits[2]["id"], hits[3]["id"]]
    status, out, err = fed("nonsense", "query", "--batch", "-", *INDEX)
    assert (status, out) == (1, "")
    assert err.startswith("error: standard input:1 is no JSON")


def test_modes_and_filters(cli: Any, process: Any, indexed: Path) -> None:
    def paths(run: Any, *options: str) -> list[str]:
        result = run("query", "a folder to read", *INDEX, "--json", "-k", "20", *options)
        assert result.status == 0, result.err
        answer = json.loads(result.out)
        assert answer["mode"] == (options[1] if options[0] == "--mode" else "hybrid")
        return sorted({hit["path"] for hit in answer["hits"]})

    everything = ["drafts/idea.md", "install.md", "notes.txt", "undo.md"]
    keyword = ("--mode", "keyword")
    assert paths(cli, "--mode", "dense") == everything
    assert paths(process, *keyword) == ["drafts/idea.md", "install.md"]
    assert paths(process, *keyword, "--path", "drafts/**", "--where", "first_line>=1") == ["drafts/idea.md"]
    assert paths(cli, "--where", "kind=text") == ["notes.txt"]
    assert paths(cli, "--path", "*.md", "--path", "!drafts/**", "--where", "kind!=text") == ["install.md", "undo.md"]
    assert paths(cli, "--since", "1d") == everything
    result = process("query", "folder", *INDEX, *keyword, "--since", "2999-01-01")
    assert (result.status, result.out) == (0, "")
    assert result.err.startswith("note: no passage satisfies all of --where, --path and --since")


def test_near_duplicates_fold_and_unfold(cli: Any, process: Any, indexed: Path) -> None:
    (indexed / "copy.txt").write_text((indexed / "notes.txt").read_text())
    assert cli("index", "docs").status == 0
    # The better of two equal ones is the one whose id comes first.
    shown = process(*QUERY, "--mode", "keyword").out.splitlines()
    assert len(shown) == 3
    assert sorted((shown[0].split()[3], shown[2].split()[2])) in (
        ["docs/copy.txt:1", "docs/notes.txt:1-2"],
        ["docs/copy.txt:1-2", "docs/notes.txt:1"],
    )
    answer = json.loads(process(*QUERY, "--mode", "keyword", "--all", "--json").out)
    assert sorted(hit["path"] for hit in answer["hits"]) == ["copy.txt", "notes.txt"]


def test_reranking(process: Any, indexed: Path, tmp_path: Path) -> None:
    model = save_cross_encoder(tmp_path / "cross-encoder")
    result = process(*QUERY, "--rerank", model, "--json")
    assert (result.status, result.err) == (0, "")
    scores = [hit["rerank_score"] for hit in json.loads(result.out)["hits"]]
    assert len(scores) > 1
    assert scores == sorted(scores, reverse=True)
    missing = process(*QUERY, "--rerank", "./no-such-folder")
    assert (missing.status, missing.out) == (1, "")
    assert missing.err.startswith("error: there is no folder ./no-such-folder")


def test_on_a_terminal_places_are_links_and_words_are_marked(indexed: Path) -> None:
    arguments = ("query", "cats", *INDEX, "--mode", "keyword")
    with Terminal(*arguments) as terminal:
        assert terminal.finish() == 0
    uri = f"file://{socket.gethostname()}{indexed}/notes.txt"
    assert f";{uri}\x1b\\" in terminal.shown
    assert "\x1b]8;;\x1b\\" in terminal.shown
    assert "\x1b[1;33mCats\x1b[0m sleep" in terminal.shown
    # What a person sees is what a pipe gets.
    done = subprocess.run([*MODULE, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert plain(terminal.shown) == done.stdout
    for env, styled in (({"TERM": "dumb"}, False), ({"NO_COLOR": "1"}, True)):
        with Terminal(*arguments, env=env) as terminal:
            assert terminal.finish() == 0
        assert ("\x1b]8;" in terminal.shown) is styled
        assert ("\x1b[1mCats\x1b[0m sleep" in terminal.shown) is styled
        assert "\x1b[1;33m" not in terminal.shown
        assert plain(terminal.shown) == done.stdout


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("vim", ["--open"], ["+1", "{}/notes.txt"]),
        ("code", ["--open", "1"], ["-g", "{}/notes.txt:1"]),
        ("hx", ["--open=1"], ["{}/notes.txt:1"]),
        ("kate", ["--open"], ["--line", "1", "{}/notes.txt"]),
        ("some-editor", ["--open"], ["{}/notes.txt"]),
    ],
)
def test_a_hit_opens_in_the_editor(
    process: Any, indexed: Path, name: str, options: list[str], expected: list[str]
) -> None:
    program, log = editor(name)
    result = process("query", *options, "cats sleep", *INDEX, "--mode", "keyword", env={"EDITOR": str(program)})
    assert (result.status, result.err) == (0, "")
    assert "notes.txt:1-2" in result.out
    assert json.loads(log.read_text())[0] == [word.replace("{}", str(indexed)) for word in expected]


def test_the_editor_is_started_without_a_shell(cli: Any, process: Any, indexed: Path) -> None:
    program, log = editor("my vim")
    (indexed / "; touch pwned; $(touch pwned).txt").write_text("Zebras graze.\n")
    assert cli("index", "docs").status == 0
    env = {"VISUAL": f"'{program}' --wait ';' touch pwned", "EDITOR": "/bin/false"}
    result = process("query", "zebras", *INDEX, "--mode", "keyword", "--open", env=env)
    assert (result.status, result.err) == (0, "")
    (arguments, _) = json.loads(log.read_text())
    assert arguments == ["--wait", ";", "touch", "pwned", f"{indexed}/; touch pwned; $(touch pwned).txt"]
    assert not Path("pwned").exists()


def test_an_editor_gets_the_terminal_when_the_text_comes_through_a_pipe(indexed: Path) -> None:
    program, log = editor("vim")
    command = f"echo cats | {' '.join(MODULE)} query - {' '.join(INDEX)} --mode keyword --open"
    with Terminal(env={"EDITOR": str(program)}, command=["sh", "-c", command]) as terminal:
        assert terminal.finish() == 0
    assert json.loads(log.read_text()) == [["+1", f"{indexed}/notes.txt"], True]


def test_what_cannot_be_opened(process: Any, indexed: Path) -> None:
    search = ("query", "cats", *INDEX, "--mode", "keyword")
    program, _ = editor("vim", status=3)
    for env, options, status, said in (
        ({"EDITOR": "no-such-editor"}, ["--open"], 1, "error: there is no editor no-such-editor; set EDITOR to"),
        ({"EDITOR": "'"}, ["--open"], 1, 'error: EDITOR is "\'", which is no command line (No closing quotation)'),
        ({"EDITOR": str(indexed)}, ["--open"], 1, "error: there is no editor"),
        ({"EDITOR": str(program)}, ["--open", "2"], 1, "error: there is no hit 2 to open, only 1 hit; give -k"),
        ({"EDITOR": str(program)}, ["--open"], 0, f"warning: {program} ended with status 3\n"),
        ({"PATH": "/nowhere"}, ["--open"], 1, "error: EDITOR is not set, and there is no nano or vi; set EDITOR"),
    ):
        result = process(*search, *options, env={"VISUAL": "", "EDITOR": "", **env})
        assert result.status == status, result
        assert result.err.startswith(said)
        assert result.err.count("\n") == 1
        assert "notes.txt:1-2" in result.out
    (indexed / "notes.txt").unlink()
    result = process(*search, "--open", env={"EDITOR": str(program)})
    assert result.status == 1
    assert result.err.startswith("error: docs/notes.txt is gone since it was indexed; run `epic-rag index`")


def test_status(process: Any, indexed: Path) -> None:
    lines = process("status", *INDEX).out.splitlines()
    table = {line[:8].strip(): line[10:] for line in lines}
    assert table["kinds"] == "3 markdown, 1 text"
    assert table["last run"].startswith("4 added; ")
    assert "state" not in table
    state = json.loads(process("status", *INDEX, "--json").out)
    assert state["kinds"] == {"markdown": 3, "text": 1}
    assert state["last_run"]["added"] == 4
    assert state["state"] == "complete"
    (indexed / ".epic-rag/running.json").write_text("{}")
    assert process("status", *INDEX).out.splitlines()[-1].startswith("state     the last run did not end; ")


def test_a_conversation(indexed: Path, tmp_path: Path) -> None:
    program, log = editor("vim")
    env = {"EDITOR": str(program), "XDG_STATE_HOME": str(tmp_path / "state")}
    with Terminal("query", *INDEX, env=env) as terminal:
        terminal.wait_for(r"note: \d+ passages of 4 files; :help lists what can be changed, Ctrl-D ends")
        terminal.wait_for("epic-rag> ")
        terminal.type("cats sleep\r")
        terminal.wait_for(r"1  .*cosine .*\x1b\]8;.*notes\.txt:1-2.*epic-rag> ")
        terminal.type(":k 1\r:mode keyword\rlast commit\r")
        terminal.wait_for(r"1  .*bm25 .*undo\.md:.*epic-rag> ")
        terminal.type(":show\r")
        terminal.wait_for(r"     1.*# Undo.*epic-rag> ")
        terminal.type(":open\r")
        terminal.wait_for("epic-rag> ")
        for line, said in (
            (":k 0", "error: :k takes a whole number from 1, not '0'"),
            (":mode sparse", "error: :mode takes dense, hybrid, keyword, not 'sparse'"),
            (":strategy best", "error: :strategy takes epic, text, none, task-vector, not 'best'"),
            (":where nonsense", 'error: "nonsense" is no condition'),
            (":bank docs/notes.txt", "error: docs/notes.txt is a file, a bank is a folder"),
            (":sesame", "error: unknown command :sesame; :help lists those that there are"),
            (":show 2", "error: there is no hit 2, only 1 hit; :k sets how many"),
            ("nothingofthekind", "note: no passage has a word of the query"),
        ):
            terminal.type(f"{line}\r")
            terminal.wait_for(said.replace("(", r"\(").replace(".", r"\.") + ".*epic-rag> ")
        terminal.type(":bank no-such-bank\r:mode dense\rcats\r")
        terminal.wait_for("error: .*no-such-bank.*epic-rag> ")
        terminal.type(":he\t\r")
        terminal.wait_for(r":mode MODE.*now: dense.*epic-rag> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.type("\x03")
        terminal.type("\r")  # Python notices a signal that comes just before it waits for keys with the next key
        terminal.wait_for("epic-rag> ")
        terminal.type(" a secret\r")
        terminal.wait_for("epic-rag> ")
        terminal.type("\x04")
        assert terminal.finish() == 0
    assert json.loads(log.read_text())[0] == ["+1", f"{indexed}/undo.md"]
    assert "Traceback" not in terminal.shown
    history = tmp_path / "state/epic-rag/query_history"
    kept = history.read_text().splitlines()
    assert kept[:5] == ["cats sleep", ":k 1", ":mode keyword", "last commit", ":show"]
    assert kept[-1] == ":help"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (history.parent, history)] == [0o700, 0o600]
    # The next session has it, and Ctrl-C ends a search, not the session.
    history.write_text("cats sleep\n")
    history.chmod(0o644)
    with Terminal("query", *INDEX, "--mode", "keyword", env=env) as terminal:
        terminal.wait_for("epic-rag> ")
        terminal.type("\x1b[A\r")
        terminal.wait_for(r"notes\.txt:1-2.*epic-rag> ")
        terminal.type(":quit\r")
        assert terminal.finish() == 0
    assert history.read_text() == "cats sleep\ncats sleep\n:quit\n"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_ctrl_c_ends_a_search_and_not_the_conversation(indexed: Path, tmp_path: Path) -> None:
    code = (
        "import time, epic_rag_chroma\nfrom epic_rag_cli.main import main\n"
        "def query(*_, **__):\n    print('searching', flush=True)\n    time.sleep(60)\n"
        "epic_rag_chroma.ChromaIndexer.query = query\nmain()\n"
    )
    command = [sys.executable, "-c", code, "query", *INDEX]
    with Terminal(env={"XDG_STATE_HOME": str(tmp_path / "state")}, command=command) as terminal:
        terminal.wait_for("epic-rag> ")
        terminal.type("cats\r")
        terminal.wait_for("searching")
        terminal.type("\x03")
        terminal.wait_for("note: interrupted; Ctrl-D ends the session.*epic-rag> ")
        terminal.type("\x04")
        assert terminal.finish() == 0


def test_a_history_that_cannot_be_kept(indexed: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    env = {"XDG_STATE_HOME": str(tmp_path / "state")}
    with Terminal("query", *INDEX, "--mode", "keyword", env=env) as terminal:
        terminal.wait_for("warning: .*query_history: Not a directory; what you type is not kept.*epic-rag> ")
        terminal.type("cats\r")
        terminal.wait_for(r"notes\.txt:1-2.*epic-rag> ")
        terminal.type("\x04")
        assert terminal.finish() == 0
    assert terminal.shown.count("warning") == 1


def test_no_conversation_in_json(indexed: Path) -> None:
    with Terminal("query", *INDEX, "--json") as terminal:
        assert terminal.finish() == 2
    assert "error: Missing argument 'TEXT'" in terminal.shown
