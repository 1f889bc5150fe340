"""The command in its own process: imports, streams, signals, pipes, permissions, terminals."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from epic_rag import DemonstrationBank, __version__
from tests.helpers.cli_pages import commands
from tests.helpers.model_files import save_cross_encoder

HEAVY = ("chromadb", "llama_index", "torch", "transformers")
MODULE = (sys.executable, "-m", "epic_rag_cli")


def test_help_version_and_completion_import_nothing_heavy(process: Any) -> None:
    # One process for all: an import by any of them would be seen at the end.
    lines = [[*name.split()[1:], "--help"] for name, _ in commands()] + [["--version"]]
    code = "import sys\nfrom epic_rag_cli import options\nfrom epic_rag_cli.main import run\n"
    code += "".join(f"assert run({line!r}) == 0\n" for line in lines)
    code += "for name in dir(options):\n    if name.startswith('complete_'): assert getattr(options, name)('')\n"
    code += f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    result = process("-c", code, command=[sys.executable])
    assert (result.status, result.err) == (0, "[]\n")
    assert result.out.count("Usage: epic-rag") == len(lines) - 1
    assert result.out.endswith(f"epic-rag {__version__}\n")


def test_light_commands_import_nothing_heavy(process: Any, indexed: Path) -> None:
    index = ["--index-dir", "docs/.epic-rag"]
    lines = [
        (["bank", "list"], 0),
        (["bank", "show", "docs"], 0),
        (["models"], 0),
        (["query", "cats"], 1),  # no index is found
        (["query", "cats", *index, "--mode", "keyword", "--path", "*.txt"], 0),
    ]
    code = "import sys\nfrom epic_rag_cli.main import run\n"
    code += "".join(f"assert run({line!r}) == {status}\n" for line, status in lines)
    code += f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    result = process("-c", code, command=[sys.executable])
    assert result.status == 0, result.err
    assert result.err.endswith("\n[]\n")
    assert "notes.txt:1-2" in result.out


def test_an_index_of_the_default_model_needs_nothing_heavy(process: Any, docs: Path) -> None:
    lines = [
        # The mirror alone needs chromadb; `index docs` would make it.
        ["index", "docs", "--chroma", "none"],
        ["index", "docs"],
        ["index", "docs", "--dry-run"],
        ["status", "--index-dir", "docs"],
        ["query", "how do I undo a commit?", "--index-dir", "docs"],
        ["query", "undo", "--mode", "dense", "--json", "--index-dir", "docs"],
        ["query", "undo", "--bank", "docs", "-n", "4", "--model", "epic-minilm", "--index-dir", "docs"],
    ]
    code = "import sys\nfrom epic_rag_cli.main import run\n"
    for line in lines:
        code += f"assert run({line!r}) == 0\nassert not [name for name in {HEAVY!r} if name in sys.modules], {line!r}\n"
    # One thread for products is a matter of this process, not of the programs that it starts.
    code += "import os\nassert 'OPENBLAS_NUM_THREADS' not in os.environ\n"
    result = process("-c", code, command=[sys.executable])
    assert result.status == 0, result.err
    assert "undo.md:1-3" in result.out


def test_console_script(process: Any) -> None:
    script = Path(sysconfig.get_path("scripts")) / "epic-rag"
    command = [str(script)] if script.exists() else [*MODULE]
    result = process("--version", command=command)
    assert (result.status, result.out, result.err) == (0, f"epic-rag {__version__}\n", "")


def test_every_command_through_the_entry_point(
    one_process: Any, docs: Path, pairs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    env = {"EPIC_RAG_MODEL": str(tiny_checkpoint), "EPIC_RAG_INDEX": "docs/.epic-rag"}
    lines = [
        ["bank", "build", pairs, "--out", "mine", "--task", "docs"],
        ["index", "docs", "--json"],
        ["query", "cats", "--bank", "mine", "--json"],
        ["query", "cats", "--rerank", save_cross_encoder(tmp_path / "cross-encoder"), "--json"],
        ["status", "--json"],
        ["bank", "list", "--json"],
        ["bank", "show", "mine", "--json"],
        ["models", "--json"],
        ["clear", "--yes"],
    ]
    built, *results, cleared = one_process(*lines, env=env)
    assert (built.status, built.out) == (0, "mine\n")
    assert re.fullmatch(r"note: 2 demonstrations embedded with .*\n", built.err)
    # Nothing on stderr: no progress bars and no warnings of libraries.
    assert [(result.status, result.err) for result in results] == [(0, "")] * len(results)
    indexed, found, reranked, *_ = (json.loads(result.out) for result in results)
    assert indexed["added"] == 4
    assert len(found["hits"]) >= 4
    assert reranked["hits"][0]["rerank_score"] is not None
    assert (cleared.status, cleared.out, cleared.err) == (0, "", "note: Deleted docs/.epic-rag.\n")


def test_errors_have_no_traceback(process: Any, docs: Path) -> None:
    result = process("index", "no-such-folder")
    assert (result.status, result.out) == (1, "")
    assert re.fullmatch(r"error: .*no-such-folder.*\n", result.err)


@pytest.mark.parametrize("arguments", [["bank", "show", "docs"], ["bank", "list", "--json"], ["--help"]])
def test_reader_that_has_gone_away(process: Any, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = process(*arguments, stdout=writing)
    finally:
        os.close(writing)
    assert result.err == ""
    assert result.status == (1 if arguments == ["--help"] else 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is Linux's")
def test_full_disk_behind_stdout(process: Any) -> None:
    with open("/dev/full", "w") as full:
        result = process("bank", "list", stdout=full)
    assert result.status == 1
    assert re.fullmatch(r"error: Standard output cannot be written to \(No space left on device\)\. .*\n", result.err)


def test_closed_streams(process: Any) -> None:
    result = process("-c", 'exec "$@" >&- 2>&-', "sh", *MODULE, "bank", "list", command=["sh"])
    assert (result.status, result.out, result.err) == (0, "", "")


def test_output_in_an_encoding_without_the_characters() -> None:
    DemonstrationBank([("世界", "Héllo")], instruction="x").save("world")
    env = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    for options in ([], ["--json"]):
        command = [*MODULE, "bank", "show", "world", *options]
        done = subprocess.run(command, env=env, capture_output=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"\\u4e16\\u754c" in done.stdout


def test_interrupt_by_signal(docs: Path) -> None:
    code = textwrap.dedent("""
        import time
        import epic_rag_chroma
        from epic_rag_cli.main import main

        def index(self, paths, *, progress, **options):
            progress(epic_rag_chroma.IndexProgress("embedding", 3, 9, "a.md"))
            print("ready", flush=True)
            time.sleep(60)

        epic_rag_chroma.ChromaIndexer.index = index
        main()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", code, "index", "docs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert err == (
        "error: Interrupted at embedding 3 of 9. docs/.epic-rag keeps what was stored. "
        "Run the same command again to continue.\n"
    )


# Root may read everything; without the two capabilities that allow it, it is like anybody else.
AS_ANYBODY = """
import ctypes, os, sys
if os.geteuid() == 0:
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
            raise OSError(ctypes.get_errno(), "cannot drop a capability")
os.execv(sys.executable, [sys.executable, "-m", "epic_rag_cli", *sys.argv[1:]])
"""


def test_unreadable_file_is_skipped_with_its_reason(process: Any, docs: Path, tiny_checkpoint: Path) -> None:
    (docs / "notes.txt").chmod(0)
    result = process("-c", AS_ANYBODY, "index", "docs", "--model", tiny_checkpoint, "--json", command=[sys.executable])
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert report["added"] == 3
    assert [Path(file["path"]).name for file in report["skipped"]] == ["notes.txt"]
    assert re.search("permission", report["skipped"][0]["reason"], re.IGNORECASE)
    assert re.fullmatch(r"skipped: .*notes\.txt: .*\n", result.err)


@pytest.mark.parametrize("what", ["docs", "docs/.epic-rag"])
def test_folder_that_is_not_writable(process: Any, indexed: Path, tiny_checkpoint: Path, what: str) -> None:
    if what == "docs":
        shutil.rmtree("docs/.epic-rag")
    else:
        (indexed / "new.md").write_text("# New\n\nSomething new.\n")
    locked = [Path(what), *(path for path in Path(what).rglob("*") if ".epic-rag" in path.parts)]
    for path in locked:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        result = process("-c", AS_ANYBODY, "index", "docs", "--model", tiny_checkpoint, command=[sys.executable])
    finally:
        for path in locked:
            path.chmod(0o755)
    assert (result.status, result.out) == (1, "")
    assert re.fullmatch(r"error: .*\.epic-rag.*\n", result.err), result.err


def on_terminal(arguments: list[str], env: dict[str, str]) -> tuple[int, str, str]:
    """Run the command with stderr on a pseudo-terminal; return status, stdout, and what the terminal got."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [*MODULE, *arguments],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
    ) as child:
        os.close(slave)
        shown = b""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if select.select([master], [], [], 0.2)[0]:
                try:
                    part = os.read(master, 65536)
                except OSError:  # Linux says so when the other end is closed
                    break
                if not part:
                    break
                shown += part
        out, _ = child.communicate(timeout=60)
    os.close(master)
    return child.returncode, out, shown.decode()


def test_progress_bar_on_a_terminal(docs: Path, tiny_checkpoint: Path) -> None:
    env = {"EPIC_RAG_MODEL": str(tiny_checkpoint), "TERM": "xterm-256color"}
    (docs / "[red]name.md").write_text("# Name\n\nA file with a name like markup.\n")
    status, out, shown = on_terminal(["index", "docs", "--json"], env)
    assert status == 0, shown
    assert json.loads(out)["added"] == 5
    assert re.search(r"\d+/\d+", shown)
