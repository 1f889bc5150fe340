"""`epic-rag index` beyond the plain run: a plan, waiting, links, several roots, no path, and what it says of skipped files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from epic_rag_chroma.types import SkippedFile
from epic_rag_cli import results as reports
from epic_rag_cli.terminal import Verbosity, ask, reset


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


def test_a_plan_for_a_folder_without_an_index(cli: Any, docs: Path) -> None:
    before = tree(docs)
    result = cli("index", "docs", "--dry-run", "--model", "no/such/model")
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines() == [
        "add  drafts/idea.md",
        "add  install.md",
        "add  notes.txt",
        "add  undo.md",
        "would add 4, change 0, rename 0, delete 0, leave 0 as they are, skip 0",
    ]
    assert tree(docs) == before


def test_a_plan_says_what_a_run_then_does(cli: Any, process: Any, indexed: Path) -> None:
    (indexed / "notes.txt").unlink()
    (indexed / "undo.md").write_text("# Undo\n\nWritten otherwise.\n")
    (indexed / "drafts/idea.md").rename(indexed / "new-idea.md")
    (indexed / "\x1b[31mnew.md").write_text("# New\n\nNew.\n")
    (indexed / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    before = tree(indexed)
    text = process("index", "docs", "--dry-run")
    assert tree(indexed) == before
    assert (text.status, text.out.splitlines()) == (
        0,
        [
            "add     \\x1b[31mnew.md",
            "change  undo.md",
            "rename  drafts/idea.md -> new-idea.md",
            "delete  notes.txt",
            "would add 1, change 1, rename 1, delete 1, leave 1 as they are, skip 1",
        ],
    )
    assert text.err.startswith("skipped: broken.pdf: ")
    plan = json.loads(cli("index", "docs", "--dry-run", "--json").out)
    assert plan == {
        "index_dir": "docs/.epic-rag",
        "dry_run": True,
        "added": ["\x1b[31mnew.md"],
        "changed": ["undo.md"],
        "deleted": ["notes.txt"],
        "renamed": [{"from": "drafts/idea.md", "to": "new-idea.md"}],
        "unchanged": 1,
        "skipped": plan["skipped"],
    }
    done = json.loads(cli("index", "docs", "--json").out)
    assert {name: done[name] for name in ("added", "changed", "deleted", "renamed", "unchanged")} == {
        name: value if isinstance(value, int) else len(value)
        for name, value in plan.items()
        if name in ("added", "changed", "deleted", "renamed", "unchanged")
    }
    assert done["skipped"] == plan["skipped"]
    assert done["chunks_reused"] >= 1
    nothing = cli("index", "docs", "--dry-run", "-q").out
    assert nothing == "would add 0, change 0, rename 0, delete 0, leave 4 as they are, skip 1\n"


def test_without_a_path_it_is_the_index_that_is_found(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (indexed / "new.md").write_text("# New\n\nSomething new.\n")
    monkeypatch.chdir(indexed / "drafts")
    assert cli("index", "--dry-run").out.startswith("add  new.md\n")
    assert cli("index").out.startswith("1 added, ")
    monkeypatch.chdir(indexed.parent)
    assert cli("index").status == 1
    (indexed / "new.md").unlink()
    assert re.match("0 added, 0 changed, 0 renamed, 1 deleted", cli("index", "--index-dir", "docs/.epic-rag").out)


@pytest.mark.parametrize(
    ("calls", "files"),
    [
        ([["docs", "more"]], 5),
        ([["more", "docs"]], 5),
        ([["docs", "docs", "docs/"]], 4),
        ([["docs", "docs/drafts"]], 4),
        ([["docs/drafts", "docs"]], 4),
        ([["docs/undo.md", "docs"]], 4),
        ([["docs", "docs/undo.md"]], 4),
        ([["docs/undo.md", "docs/notes.txt", "more/extra.md"]], 3),
        ([["docs/drafts"], ["docs"]], 4),
        ([["docs"], ["docs/drafts"]], 4),
        ([["docs"], ["more"], []], 5),
        ([["docs"], ["link"]], 4),
        ([["more/extra.md"], ["more"], ["docs", "more"]], 5),
        ([["."]], 5),
    ],
)
def test_roots_in_all_combinations(
    cli: Any, docs: Path, tiny_checkpoint: Path, calls: list[list[str]], files: int
) -> None:
    Path("more").mkdir()
    Path("more/extra.md").write_text("# Extra\n\nText from elsewhere.\n")
    Path("link").symlink_to("docs")
    for number, paths in enumerate(calls):
        model = ["--model", tiny_checkpoint] if not number else []
        assert cli("index", *paths, "--index-dir", "idx", *model).status == 0
    state = json.loads(cli("status", "--index-dir", "idx", "--json").out)
    assert state["files"] == files
    roots = [Path(root) for root in state["roots"]]
    assert not any(one != other and one.is_relative_to(other) for one in roots for other in roots)
    again = json.loads(cli("index", "--index-dir", "idx", "--json").out)
    assert (again["unchanged"], again["added"], again["deleted"], again["changed"]) == (files, 0, 0, 0)


def test_links_are_followed_when_asked_and_the_index_remembers(
    cli: Any, process: Any, docs: Path, tiny_checkpoint: Path
) -> None:
    Path("outside").mkdir()
    Path("outside/secret.md").write_text("# Secret\n\nA secret text.\n")
    (docs / "outside").symlink_to(Path("outside").resolve())
    (docs / "loop").symlink_to(docs)
    first = process("index", "docs", "--model", tiny_checkpoint)
    assert first.err == "skipped: outside: a symbolic link that leaves the indexed folder\n"
    assert first.out.startswith("4 added")
    assert cli("index", "docs", "--follow-links").out.startswith(
        "1 added, 0 changed, 0 renamed, 0 deleted, 4 unchanged"
    )
    assert cli("index", "docs").out.startswith("0 added, 0 changed, 0 renamed, 0 deleted, 5 unchanged, 0 skipped")
    assert cli("index", "docs", "--no-follow-links").out.startswith("0 added, 0 changed, 0 renamed, 1 deleted")


HOLDER = """
    import sys, time
    from pathlib import Path
    from epic_rag_chroma.store.lock import write_lock
    with write_lock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
"""


def test_waiting_for_another_process(cli: Any, process: Any, indexed: Path) -> None:
    index_dir = str(indexed / ".epic-rag")
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), index_dir],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for options in ([], ["--wait", "0"], ["--wait", "0.3"]):
            result = cli("index", "docs", *options)
            assert result.status == 1
            assert re.search(rf"process {holder.pid} ", result.err), result.err
        waiting = subprocess.Popen(
            [sys.executable, "-m", "epic_rag_cli", "index", "docs", "--wait", "inf"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(3)
        holder.stdin.write("\n")
        holder.stdin.flush()
        out, _ = waiting.communicate(timeout=180)
    assert waiting.returncode == 0
    assert out.startswith("0 added")


SKIPPED = [
    *(SkippedFile(f"{number}.png", "not text") for number in range(1204)),
    *(SkippedFile(f"{number}.log", "larger than 16 MiB") for number in range(3)),
    SkippedFile("a.pdf", "cannot be parsed: ValueError: page 3"),
    SkippedFile("b.pdf", "cannot be parsed: ValueError: page 4"),
]


def test_many_skipped_files_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    reset()
    reports.tell_skipped(SKIPPED, hint=True)
    assert capsys.readouterr().err == (
        "skipped: 1,209 files: 1,204 not text, 3 larger than 16 MiB, 2 cannot be parsed; --json lists all\n"
    )
    reports.tell_skipped(SKIPPED[-2:], hint=True)
    assert capsys.readouterr().err == (
        "skipped: a.pdf: cannot be parsed: ValueError: page 3\nskipped: b.pdf: cannot be parsed: ValueError: page 4\n"
    )
    ask(Verbosity.VERBOSE, firm=True)
    reports.tell_skipped(SKIPPED, hint=True)
    assert len(capsys.readouterr().err.splitlines()) == len(SKIPPED)
    reset()


def test_quiet_and_verbose(process: Any, docs: Path, tiny_checkpoint: Path) -> None:
    (docs / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    quiet = process("index", "docs", "--model", tiny_checkpoint, "-q")
    assert (quiet.status, quiet.out, quiet.err) == (0, "", "")
    as_json = process("--quiet", "index", "docs", "--json")
    assert (json.loads(as_json.out)["unchanged"], as_json.err) == (4, "")
    error = process("-q", "index", "nowhere")
    assert (error.status, error.err[:7]) == (1, "error: ")
    (docs / "new.md").write_text("# New\n\nSomething new.\n")
    (docs / "undo.md").write_text("# Undo\n\nWritten otherwise.\n")
    (docs / "notes.txt").unlink()
    shutil.move(docs / "drafts/idea.md", docs / "idea.md")
    verbose = process("index", "docs", "--verbose")
    assert verbose.status == 0
    lines = verbose.err.splitlines()
    for expected in (
        r"info: new\.md: new, 1 passages",
        r"info: undo\.md: changed, 1 passages",
        r"info: idea\.md: renamed, 1 passages",
        r"info: notes\.txt: gone",
        r"info: embedded 2 passages in \d+\.\d\d s",
        r"info: times: scanning .* s, indexing .* s.*",
        r"skipped: broken\.pdf: .*",
    ):
        assert any(re.fullmatch(expected, line) for line in lines), (expected, lines)
    # Nobody else has something to say.
    assert all(line.startswith(("info: ", "skipped: ")) for line in lines), lines


@pytest.mark.parametrize("arguments", [["-q", "status"], ["status", "-q"], ["-v", "status"], ["status", "--verbose"]])
def test_before_and_after_the_command(cli: Any, indexed: Path, arguments: list[str]) -> None:
    result = cli(*arguments, "--index-dir", "docs/.epic-rag", "--json")
    assert (result.status, json.loads(result.out)["files"]) == (0, 4)
