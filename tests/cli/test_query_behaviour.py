"""`epic-rag query` on a real index: models, modes, filters, standard input, batches, terminals, editors, the prompt."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from epic_rag import EpicEncoder
from epic_rag.checkpoint_io import parse_dtype
from tests.helpers.model_files import save_cross_encoder
from tests.helpers.terminals import MODULE, Terminal, plain

INDEX = ("--index-dir", "docs/.epic-rag")
QUERY = ("query", "cats sleep", *INDEX)


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


def test_text_is_exact(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(indexed / "drafts")
    result = cli("query", "A draft that nobody has read.", "-k", "2", "--json")
    assert (result.status, result.err) == (0, "")
    answer = json.loads(result.out)
    assert answer["index_dir"] == str(indexed / ".epic-rag")
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2]
    assert answer["hits"][0]["score"] >= answer["hits"][1]["score"]
    for hit in answer["hits"]:
        lines = (indexed / hit["path"]).read_text().splitlines()
        assert hit["text"].strip().splitlines()[0] in lines[hit["first_line"] - 1 : hit["last_line"]]


def test_text_output(cli: Any, indexed: Path) -> None:
    result = cli("query", "cats", "--index-dir", "docs/.epic-rag", "-k", "50")
    assert (result.status, result.err) == (0, "")
    heads = [
        line for line in result.out.splitlines() if re.match(r" *\d+  cosine -?\d\.\d{3}(, bm25 \d+\.\d\d)?  ", line)
    ]
    assert heads[0].startswith(" 1  ") or heads[0].startswith("1  ")
    assert any(re.search(r"  docs/notes\.txt:1-2$", line) for line in heads)
    assert any(re.search(r"  docs/install\.md:\d+(-\d+)?  Guide > Install$", line) for line in heads)


def test_changed_and_deleted_files_are_marked(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    query = ("query", "the", *INDEX, "--mode", "keyword", "-k", "9", "--all")
    fresh = cli(*query)
    assert fresh.err == ""
    assert "since the last run" not in fresh.out
    (indexed / "undo.md").write_text("# Undo\n\nOther text.\n")
    (indexed / "install.md").unlink()
    (indexed / "drafts/idea.md").touch()  # with the same content, but a stat cannot know that
    (indexed / "new.md").write_text("the")
    note = (
        "note: Since the last run: 2 files changed, 1 file deleted. Run `epic-rag index{option}` to update the index.\n"
    )
    result = cli(*query)
    assert (result.status, result.err) == (0, note.format(option=" --index-dir docs/.epic-rag"))
    marked = re.findall(r"  (docs/\S+?):\S+  (changed|deleted) since the last run", result.out)
    assert set(marked) == {("docs/undo.md", "changed"), ("docs/install.md", "deleted")}
    answer = cli(*query, "--json")
    assert answer.err == result.err
    states = {hit["path"]: hit["stale"] for hit in json.loads(answer.out)["hits"]}
    assert states == {"undo.md": "changed", "install.md": "deleted", "notes.txt": None}
    assert cli(*query, "--quiet").err == ""
    Path("queries.jsonl").write_text('{"query": "the"}\n{"query": "cats"}\n')
    batch = cli("query", "--batch", "queries.jsonl", *INDEX, "--mode", "keyword", "--jsonl")
    assert batch.err == result.err
    # Of more files than can be compared in no time, only those of the hits count.
    monkeypatch.setattr("epic_rag_cli.commands.query._COMPARED_FILES", 3)
    few = cli("query", "reset", *INDEX, "--mode", "keyword", "-k", "1")
    assert few.err.startswith("note: Since the last run: 1 file changed. Run ")
    monkeypatch.undo()
    monkeypatch.chdir(indexed)
    assert cli("query", "the", "--mode", "keyword").err == note.format(option="")
    assert cli("index").status == 0
    assert cli("query", "the", "--mode", "keyword").err == ""


def test_a_copied_folder_is_not_stale(cli: Any, indexed: Path) -> None:
    """Other inodes and change times are no changes, nor is a file that has been read."""
    shutil.copytree(indexed, "copy")
    Path("copy/notes.txt").chmod(0o600)
    assert cli("query", "cats", "--index-dir", "copy", "--mode", "keyword").err == ""


def test_demonstrations_change_the_scores(cli: Any, indexed: Path, pairs: Path, tiny_checkpoint: Path) -> None:
    built = cli("bank", "build", pairs, "--out", "mine", "--instruction", "Find it", "--model", tiny_checkpoint)
    assert built.status == 0

    def scores(*options: str) -> list[float]:
        result = cli("query", "undo", "--index-dir", "docs/.epic-rag", "--json", *options)
        assert (result.status, result.err) == (0, "")
        return [hit["score"] for hit in json.loads(result.out)["hits"]]

    with_none, with_one, with_all = (scores("--bank", "mine", "-n", str(n)) for n in (0, 1, 2))
    assert with_none != with_one != with_all
    assert scores("--bank", "mine") == with_all
    assert scores("--task", "qa") != scores("--task", "docs") == scores()


def test_environment(cli: Any, docs: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPIC_RAG_INDEX", "elsewhere")
    monkeypatch.setenv("EPIC_RAG_MODEL", str(tiny_checkpoint))
    assert cli("index", "docs").status == 0
    assert Path("elsewhere").is_dir()
    assert not Path("docs/.epic-rag").exists()
    assert cli("query", "cats").status == 0
    assert json.loads(cli("status", "--json").out)["files"] == 4


def test_dtype_and_device(cli: Any, docs: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    load = EpicEncoder.from_pretrained

    def seen(*arguments: Any, **options: Any) -> EpicEncoder:
        encoder = load(*arguments, **options)
        used.append(str(encoder.dtype))
        return encoder

    monkeypatch.setattr(EpicEncoder, "from_pretrained", seen)
    fastest = str(parse_dtype("auto", torch.device("cpu")))
    assert cli("index", "docs", "--model", tiny_checkpoint).status == 0
    assert cli("query", "cats", "--index-dir", "docs/.epic-rag", "--dtype", "float32").status == 0
    monkeypatch.setenv("EPIC_RAG_DTYPE", "bfloat16")
    assert cli("query", "cats", "--index-dir", "docs/.epic-rag", "--model", tiny_checkpoint).status == 0
    assert used == [fastest, "torch.float32", "torch.bfloat16"]
    assert cli("query", "cats", "--index-dir", "docs/.epic-rag", "--dtype", "int1").status == 2
    assert cli("query", "cats", "--index-dir", "docs/.epic-rag", "--device", "cpu,cpu").status == 0
    nowhere = cli("query", "cats", "--index-dir", "docs/.epic-rag", "--device", "nowhere")
    assert nowhere.status == 1
    assert nowhere.err.startswith("error: Device 'nowhere' is not available")


def test_text_from_standard_input(indexed: Path) -> None:
    status, out, err = fed("cats\n  sleep\n", "query", "-", *INDEX, "--mode", "keyword", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["query"] == "cats\n  sleep"
    for text, code, said in (
        (" \n", 2, "error: Invalid value for 'TEXT': it is empty. See `epic-rag query --help`.\n"),
        (b"\xff", 1, "error: Standard input is not UTF-8 (byte 0). Send it as UTF-8.\n"),
    ):
        assert fed(text, "query", "-", *INDEX) == (code, "", said)


def test_without_text_and_without_a_terminal(indexed: Path) -> None:
    expected = (2, "", "error: Missing argument 'TEXT'. See `epic-rag query --help`.\n")
    assert fed("cats\n", "query", *INDEX) == expected


def test_batch(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def feed(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    lines = '{"query": "cats sleep", "id": 1}\n{"query": "delete the folder"}\n'
    feed(lines)
    result = cli("query", "--batch", "-", *INDEX, "--jsonl", "-k", "2")
    assert (result.status, result.err) == (0, "")
    hits = [json.loads(line) for line in result.out.splitlines()]
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
    # A single query has the same hits.
    single = json.loads(cli("query", "delete the folder", *INDEX, "--json", "-k", "2").out)
    assert [hit["id"] for hit in single["hits"]] == [hits[2]["id"], hits[3]["id"]]
    feed("nonsense")
    result = cli("query", "--batch", "-", *INDEX)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("error: standard input:1 is not valid JSON")


def test_modes_and_filters(cli: Any, indexed: Path) -> None:
    def paths(*options: str) -> list[str]:
        result = cli("query", "a folder to read", *INDEX, "--json", "-k", "20", *options)
        assert result.status == 0, result.err
        answer = json.loads(result.out)
        assert answer["mode"] == (options[1] if options[0] == "--mode" else "hybrid")
        return sorted({hit["path"] for hit in answer["hits"]})

    everything = ["drafts/idea.md", "install.md", "notes.txt", "undo.md"]
    keyword = ("--mode", "keyword")
    assert paths("--mode", "dense") == everything
    assert paths(*keyword) == ["drafts/idea.md", "install.md"]
    assert paths(*keyword, "--path", "drafts/**", "--where", "first_line>=1") == ["drafts/idea.md"]
    assert paths("--where", "kind=text") == ["notes.txt"]
    assert paths("--path", "*.md", "--path", "!drafts/**", "--where", "kind!=text") == ["install.md", "undo.md"]
    assert paths("--since", "1d") == everything
    result = cli("query", "folder", *INDEX, *keyword, "--since", "2999-01-01")
    assert (result.status, result.out) == (0, "")
    assert result.err.startswith("note: No chunk matches --where, --path and --since.")


def test_near_duplicates(cli: Any, indexed: Path) -> None:
    (indexed / "copy.txt").write_text((indexed / "notes.txt").read_text())
    assert cli("index", "docs").status == 0
    # The better of two equal ones is the one whose id comes first.
    shown = cli(*QUERY, "--mode", "keyword").out.splitlines()
    assert len(shown) == 3
    assert sorted((shown[0].split()[3], shown[2].split()[2])) in (
        ["docs/copy.txt:1", "docs/notes.txt:1-2"],
        ["docs/copy.txt:1-2", "docs/notes.txt:1"],
    )
    answer = json.loads(cli(*QUERY, "--mode", "keyword", "--all", "--json").out)
    assert sorted(hit["path"] for hit in answer["hits"]) == ["copy.txt", "notes.txt"]


def test_reranking(cli: Any, indexed: Path, tmp_path: Path) -> None:
    model = save_cross_encoder(tmp_path / "cross-encoder")
    result = cli(*QUERY, "--rerank", model, "--json")
    assert result.status == 0, result.err
    scores = [hit["rerank_score"] for hit in json.loads(result.out)["hits"]]
    assert len(scores) > 1
    assert scores == sorted(scores, reverse=True)
    missing = cli(*QUERY, "--rerank", "./no-such-folder")
    assert (missing.status, missing.out) == (1, "")
    assert missing.err.startswith("error: There is no folder ./no-such-folder")


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
        ("code", ["--open", "1"], ["--goto", "{}/notes.txt:1"]),
        ("some-editor", ["--open=1"], ["{}/notes.txt"]),
    ],
)
def test_open(
    cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: list[str], expected: list[str]
) -> None:
    program, log = editor(name)
    monkeypatch.setenv("EDITOR", str(program))
    result = cli("query", *options, "cats sleep", *INDEX, "--mode", "keyword")
    assert (result.status, result.err) == (0, "")
    assert "notes.txt:1-2" in result.out
    assert json.loads(log.read_text())[0] == [word.replace("{}", str(indexed)) for word in expected]


def test_editor_without_a_shell(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, log = editor("my vim")
    (indexed / "; touch pwned; $(touch pwned).txt").write_text("Zebras graze.\n")
    assert cli("index", "docs").status == 0
    monkeypatch.setenv("VISUAL", f"'{program}' --wait ';' touch pwned")
    monkeypatch.setenv("EDITOR", "/bin/false")
    result = cli("query", "zebras", *INDEX, "--mode", "keyword", "--open")
    assert (result.status, result.err) == (0, "")
    (arguments, _) = json.loads(log.read_text())
    assert arguments == ["--wait", ";", "touch", "pwned", f"{indexed}/; touch pwned; $(touch pwned).txt"]
    assert not Path("pwned").exists()


def test_editor_gets_the_terminal(indexed: Path) -> None:
    program, log = editor("vim")
    command = f"echo cats | {' '.join(MODULE)} query - {' '.join(INDEX)} --mode keyword --open"
    with Terminal(env={"EDITOR": str(program)}, command=["sh", "-c", command]) as terminal:
        assert terminal.finish() == 0
    assert json.loads(log.read_text()) == [["+1", f"{indexed}/notes.txt"], True]


def test_open_errors(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = ("query", "cats", *INDEX, "--mode", "keyword")
    program, _ = editor("vim", status=3)
    for setting, options, status, expected in (
        ("no-such-editor", ["--open"], 1, "error: The editor no-such-editor cannot be started (No such file or"),
        ("'", ["--open"], 1, 'error: The editor "\'" is not a command line (No closing quotation). Set EDITOR to'),
        (str(indexed), ["--open"], 1, f"error: The editor {indexed} cannot be started (Permission denied). Set"),
        (str(program), ["--open", "2"], 1, "error: There is no hit 2, only 1 hit. Raise -k."),
        (str(program), ["--open"], 0, f"warning: {program} ended with status 3.\n"),
    ):
        monkeypatch.setenv("EDITOR", setting)
        result = cli(*search, *options)
        assert result.status == status, result
        assert result.err.startswith(expected)
        assert result.err.count("\n") == 1
        assert "notes.txt:1-2" in result.out
    (indexed / "notes.txt").unlink()
    result = cli(*search, "--open")
    assert result.status == 1
    assert "error: docs/notes.txt no longer exists. Run `epic-rag index`" in result.err


def test_prompt(indexed: Path, tmp_path: Path) -> None:
    with Terminal("query", *INDEX) as terminal:
        terminal.wait_for(r"note: \d+ chunks of 4 files\. Ctrl-D quits\.")
        terminal.wait_for("epic-rag> ")
        terminal.type("cats sleep\r")
        terminal.wait_for(r"1  .*cosine .*\x1b\]8;.*notes\.txt:1-2.*epic-rag> ")
        terminal.type("\r last commit\r")
        terminal.wait_for(r"cosine .*undo\.md:.*epic-rag> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.type("\x03")
        terminal.type("\r")  # Python notices a signal that comes just before it waits for keys with the next key
        terminal.wait_for("epic-rag> ")
        terminal.type("\x04")
        assert terminal.finish() == 0
    assert "Traceback" not in terminal.shown
    history = tmp_path / "state/epic-rag/query_history"
    assert history.read_text() == "cats sleep\n"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (history.parent, history)] == [0o700, 0o600]
    # The next session has the history; an error ends a search, not the session.
    history.chmod(0o644)
    with Terminal("query", *INDEX, "--mode", "keyword") as terminal:
        terminal.wait_for("epic-rag> ")
        terminal.type("\x1b[A\r")
        terminal.wait_for(r"notes\.txt:1-2.*epic-rag> ")
        terminal.type("nothingofthekind\r")
        terminal.wait_for("note: No chunk has a word of the query.*epic-rag> ")
        (indexed / ".epic-rag/index.sqlite").unlink()
        terminal.type("cats\r")
        terminal.wait_for("error: .*epic-rag> ")
        terminal.type("\x04")
        assert terminal.finish() == 0
    assert history.read_text() == "cats sleep\ncats sleep\nnothingofthekind\ncats\n"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_ctrl_c_ends_a_search(indexed: Path, tmp_path: Path) -> None:
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
        terminal.wait_for("note: Interrupted. Ctrl-D quits.*epic-rag> ")
        terminal.type("\x04")
        assert terminal.finish() == 0


def test_history_that_cannot_be_kept(indexed: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    env = {"XDG_STATE_HOME": str(tmp_path / "state")}
    with Terminal("query", *INDEX, "--mode", "keyword", env=env) as terminal:
        terminal.wait_for(
            "warning: .*query_history: Not a directory. The history of this session is not kept.*epic-rag> "
        )
        terminal.type("cats\r")
        terminal.wait_for(r"notes\.txt:1-2.*epic-rag> ")
        terminal.type("\x04")
        assert terminal.finish() == 0
    assert terminal.shown.count("warning") == 1


def test_no_prompt_with_json(indexed: Path) -> None:
    with Terminal("query", *INDEX, "--json") as terminal:
        assert terminal.finish() == 2
    assert "error: Missing argument 'TEXT'" in terminal.shown


@pytest.fixture
def two(cli: Any, indexed: Path, tiny_checkpoint: Path) -> tuple[str, ...]:
    """The options for two indexes: that of `docs`, and one of another folder."""
    Path("more").mkdir()
    Path("more/dogs.md").write_text("# Dogs\n\nDogs sleep most of the night.\n")
    Path("more/undo.md").write_text((indexed / "undo.md").read_text())
    assert cli("index", "more", "--model", tiny_checkpoint).status == 0
    return ("--index-dir", "docs", "--index-dir", "more/.epic-rag")


def test_two_indexes_are_one_ranking(
    cli: Any, two: tuple[str, ...], indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = json.loads(cli("query", "sleep most", *two, "--json", "-k", "9").out)
    assert (answer["index_dir"], answer["index_dirs"]) == ("docs/.epic-rag", ["docs/.epic-rag", "more/.epic-rag"])
    assert [hit["rank"] for hit in answer["hits"]] == list(range(1, len(answer["hits"]) + 1))
    assert {Path(hit["root"]).name for hit in answer["hits"][:2]} == {"docs", "more"}
    text = cli("query", "sleep most", *two, "--mode", "keyword")
    assert (text.status, text.err) == (0, "")
    assert set(re.findall(r"  (\w+/\w+\.\w+):", text.out)) == {"docs/notes.txt", "more/dogs.md"}
    one = json.loads(cli("query", "softly", *two, "--mode", "keyword", "--json").out)["hits"]
    assert (len(one), len(one[0]["duplicates"])) == (1, 1)
    only = cli("query", "softly", *two, "--path", "dogs*")
    assert re.findall(r"\w+/\w+\.md", only.out) == ["more/dogs.md"]
    Path("queries.jsonl").write_text('{"query": "sleep"}\n{"query": "cats"}\n')
    batch = cli("query", "--batch", "queries.jsonl", *two, "--mode", "keyword", "--jsonl")
    assert [json.loads(line)["query"] for line in batch.out.splitlines()] == ["sleep", "sleep", "cats"]
    # The variable names several as PATH does, and a file can be gone from one of them.
    monkeypatch.setenv("EPIC_RAG_INDEX", os.pathsep.join(["docs", "more"]))
    Path("more/dogs.md").unlink()
    stale = cli("query", "sleep", "--mode", "keyword")
    assert "more/dogs.md:1-3  deleted since the last run" in stale.out
    assert stale.err == (
        "note: Since the last run: 1 file deleted. Run `epic-rag index --index-dir docs` and `epic-rag index "
        "--index-dir more` to update the index.\n"
    )
    states = json.loads(cli("status", "--json").out)
    assert [state["files"] for state in states] == [4, 2]
    shown = cli("status").out.split("\n\n")
    assert [part.splitlines()[0].split()[-1] for part in shown] == [str(indexed / ".epic-rag"), str(Path("more/.epic-rag").absolute())]  # fmt: skip
    with Terminal("query", "--mode", "keyword") as terminal:
        terminal.wait_for(r"\d+ chunks of 6 files.*epic-rag> ")
        terminal.type("sleep\r")
        terminal.wait_for(r"notes\.txt:1-2.*epic-rag> |dogs.*epic-rag> ")
        terminal.type("\x04")
        assert terminal.finish() == 0


def test_what_two_indexes_cannot_do(
    cli: Any, two: tuple[str, ...], tiny_bidirectional_encoder: EpicEncoder, tmp_path: Path
) -> None:
    for command in (["index"], ["index", "docs"], ["clear", "--yes"]):
        result = cli(*command, *two)
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith(
            "error: --index-dir names 2 folders (docs/.epic-rag, more/.epic-rag), this command"
        )
    missing = cli("query", "x", "--index-dir", "docs", "--index-dir", "none", "--mode", "keyword")
    assert (missing.status, missing.err) == (
        1, f"error: No index in {Path('none').absolute()}. Run `epic-rag index PATH` to create one.\n",
    )  # fmt: skip
    tiny_bidirectional_encoder.save_pretrained(tmp_path / "other")
    assert cli("index", "more", "--index-dir", "other", "--model", tmp_path / "other").status == 0
    refused = cli("query", "x", "--index-dir", "docs", "--index-dir", "other")
    assert (refused.status, refused.out) == (1, "")
    assert "their cosines cannot be compared. Rebuild one of them" in refused.err
    assert cli("query", "cats", "--index-dir", "docs", "--index-dir", "other", "--mode", "keyword").status == 0
