"""`epic-rag index` in this process: counts, settings, paths, plans, links, waiting, verbosity."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from epic_rag_cli.main import run

SUMMARY = re.compile(
    r"(\d+) added, (\d+) changed, \d+ renamed, (\d+) deleted, (\d+) unchanged, (\d+) skipped; "
    r"(\d+) chunks? embedded(?:, \d+ reused)? in \d+\.\d s( \(\d[\d,.]* a second\))?\n"
)


def counts(text: str) -> tuple[int, ...]:
    """Return added, changed, deleted, unchanged, skipped and embedded of the last line of `index`."""
    found = SUMMARY.fullmatch(text)
    assert found, text
    return tuple(map(int, found.groups()[:6]))


def test_counts(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    first = cli("index", "docs", "--model", tiny_checkpoint)
    assert (first.status, first.err) == (0, "")
    assert counts(first.out)[:5] == (4, 0, 0, 0, 0)
    (docs / "undo.md").unlink()
    (docs / "notes.txt").write_text("Dogs sleep at night.\n")
    (docs / "new.md").write_text("# New\n\nSomething new.\n")
    # No model given: the index knows its own.
    second = cli("index", "docs")
    assert (second.status, second.err) == (0, "")
    assert counts(second.out)[:5] == (1, 1, 1, 2, 0)
    third = cli("index", "docs")
    assert counts(third.out) == (0, 0, 0, 4, 0, 0)
    assert "a second" not in third.out


def test_json(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    result = cli("index", "docs", "--model", tiny_checkpoint, "--json")
    report = json.loads(result.out)
    assert {key: report[key] for key in ("index_dir", "added", "changed", "deleted", "unchanged", "skipped")} == {
        "index_dir": "docs/.epic-rag",
        "added": 4,
        "changed": 0,
        "deleted": 0,
        "unchanged": 0,
        "skipped": [],
    }
    assert report["chunks_embedded"] == report["chunks_total"] >= 4
    assert report["chunks_per_second"] > 0


def test_skipped_files(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    for number in range(12):
        (docs / f"broken{number:02}.pdf").write_bytes(b"%PDF-1.4 broken")
    result = cli("index", "docs", "--model", tiny_checkpoint, "--json")
    assert result.status == 0
    skipped = json.loads(result.out)["skipped"]
    assert [Path(file["path"]).name for file in skipped] == [f"broken{number:02}.pdf" for number in range(12)]
    assert all(file["reason"] for file in skipped)
    reason = skipped[0]["reason"].partition(":")[0]
    assert result.err == f"skipped: 12 files: 12 {reason}.\n"
    assert cli("index", "docs").err == f"skipped: 12 files: 12 {reason}. --json lists all.\n"
    for number in range(3, 12):
        (docs / f"broken{number:02}.pdf").unlink()
    lines = cli("index", "docs").err.splitlines()
    assert lines == [f"skipped: {file['path']}: {file['reason']}" for file in skipped[:3]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--exclude", "drafts/**"], 3),
        (["--include", "*.txt"], 1),
        (["--include", "*.txt", "--include", "undo.md"], 2),
    ],
)
def test_include_and_exclude(cli: Any, docs: Path, tiny_checkpoint: Path, options: list[str], expected: int) -> None:
    result = cli("index", "docs", "--model", tiny_checkpoint, *options)
    assert counts(result.out)[0] == expected


def test_settings(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    assert cli("index", "docs", "--model", tiny_checkpoint, "--exclude", "drafts/**").status == 0
    rebuilt = cli("index", "docs", "--chunk-tokens", "12", "--rebuild")
    assert rebuilt.status == 0
    settings = json.loads(cli("status", "--index-dir", "docs/.epic-rag", "--json").out)["settings"]
    assert settings["chunk_tokens"] == 12
    assert settings["chunk_overlap"] < 12
    assert settings["exclude"] == ["drafts/**"]
    assert cli("index", "docs", "--chunk-tokens", "200", "--rebuild").status == 0
    back = json.loads(cli("status", "--index-dir", "docs/.epic-rag", "--json").out)["settings"]
    assert (back["chunk_tokens"], back["chunk_overlap"], back["exclude"]) == (200, 20, ["drafts/**"])


def test_several_paths(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    Path("more").mkdir()
    Path("more/extra.md").write_text("# Extra\n\nText from elsewhere.\n")
    result = cli("index", "docs", "more", "--model", tiny_checkpoint, "--index-dir", "one-index")
    assert counts(result.out)[0] == 5
    assert not Path("docs/.epic-rag").exists()
    hits = json.loads(cli("query", "elsewhere", "-k", "5", "--index-dir", "one-index", "--json").out)["hits"]
    assert any(hit["path"].endswith("extra.md") for hit in hits)


def paths_of(cli: Any, *options: str) -> set[str]:
    """The files with chunks in the index, by a keyword that all have."""
    result = cli("query", "the", "-k", "50", "--mode", "keyword", "--all", "--json", *options)
    assert result.status == 0, result.err
    return {hit["path"] for hit in json.loads(result.out)["hits"]}


@pytest.fixture
def three(cli: Any, tiny_checkpoint: Path) -> tuple[str, ...]:
    """An index of two folders and a file, and the option for it."""
    for name in ("a/one.md", "b/two.md", "b/sub/three.md", "c/four.md", "c/five.md"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"The text of {name}.\n")
    option = ("--index-dir", "idx")
    assert cli("index", "a", "b", "c/four.md", *option, "--model", tiny_checkpoint).status == 0
    assert paths_of(cli, *option) == {"one.md", "two.md", "sub/three.md", "four.md"}
    return option


@pytest.mark.parametrize(
    ("removed", "left"),
    [
        (["b"], {"one.md", "four.md"}),
        (["c/four.md"], {"one.md", "two.md", "sub/three.md"}),
        (["a", "b"], {"four.md"}),
        (["c"], {"one.md", "two.md", "sub/three.md"}),  # a folder of a root
    ],
)
@pytest.mark.parametrize("gone", [False, True])
def test_remove(cli: Any, three: tuple[str, ...], removed: list[str], left: set[str], gone: bool) -> None:
    if gone:
        for path in map(Path, removed):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    options = [word for path in removed for word in ("--remove", path)]
    plan = json.loads(cli("index", *options, *three, "--dry-run", "--json").out)
    assert set(plan["deleted"]) == {"one.md", "two.md", "sub/three.md", "four.md"} - left
    assert len(paths_of(cli, *three)) == 4
    report = json.loads(cli("index", *options, *three, "--json").out)
    assert (report["deleted"], report["unchanged"], report["chunks_embedded"]) == (4 - len(left), len(left), 0)
    assert paths_of(cli, *three) == left
    roots = json.loads(cli("status", *three, "--json").out)["roots"]
    assert not {str(Path(path).absolute()) for path in removed} & set(roots)
    # It stays out, and may come back.
    assert json.loads(cli("index", *three, "--json").out)["added"] == 0
    if not gone:
        assert json.loads(cli("index", removed[0], *three, "--json").out)["added"] > 0


def test_remove_and_add_in_one_run(cli: Any, three: tuple[str, ...]) -> None:
    report = json.loads(cli("index", "b/sub", "c/five.md", "--remove", "b", *three, "--json").out)
    assert (report["deleted"], report["renamed"], report["added"]) == (1, 1, 1)
    assert paths_of(cli, *three) == {"one.md", "three.md", "four.md", "five.md"}
    assert json.loads(cli("index", "--remove", "c/four.md", "--rebuild", *three, "--json").out)["deleted"] == 0
    assert paths_of(cli, *three) == {"one.md", "three.md", "five.md"}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--remove", "b/sub"], 1, "{here}/b/sub is inside {here}/b, which stays in the index. Leave it out with --exclude /sub, or with a line in .epicignore."),
        (["--remove", "b/no such"], 1, "{here}/b/no such is inside {here}/b, which stays in the index. Leave it out with --exclude '/no such', or with a line in .epicignore."),
        ([".", "--remove", "b"], 1, "{here}/b is inside {here}, which stays in the index. Leave it out with --exclude /b, or with a line in .epicignore."),
        (["a", "--remove", "a"], 1, "{here}/a is to be added and to be removed. Name it once."),
        (["--remove", "d"], 1, "{here}/d is not in the index. It holds {here}/a, {here}/b, {here}/c/four.md."),
        (["--remove", "."], 1, "The index would be empty. Run `epic-rag clear --index-dir {here}/idx` to delete it."),
        (["--remove", "a", "--watch"], 2, "--remove and --watch exclude each other. Remove first, then watch. See `epic-rag index --help`."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry", [False, True])
def test_what_cannot_be_removed(
    cli: Any, three: tuple[str, ...], arguments: list[str], status: int, message: str, dry: bool
) -> None:
    if "--watch" in arguments and dry:
        return
    result = cli("index", *arguments, *three, *(["--dry-run"] if dry else []))
    assert (result.status, result.out, result.err) == (status, "", f"error: {message.format(here=Path.cwd())}\n")
    assert len(paths_of(cli, *three)) == 4


def test_single_file(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    result = cli("index", "docs/undo.md", "--model", tiny_checkpoint)
    assert counts(result.out)[0] == 1
    assert Path("docs/.epic-rag").is_dir()


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Times and sizes of all files but those that SQLite makes beside a database to read it."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal")))
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in files}


def test_plan_without_an_index(cli: Any, docs: Path) -> None:
    before = tree(docs)
    result = cli("index", "docs", "--dry-run", "--model", "no/such/model")
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines() == [
        "add  drafts/idea.md",
        "add  install.md",
        "add  notes.txt",
        "add  undo.md",
        "would add 4, change 0, rename 0, delete 0, leave 0 unchanged, skip 0",
    ]
    assert tree(docs) == before


def test_plan_equals_the_run(cli: Any, indexed: Path) -> None:
    (indexed / "notes.txt").unlink()
    (indexed / "undo.md").write_text("# Undo\n\nWritten otherwise.\n")
    (indexed / "drafts/idea.md").rename(indexed / "new-idea.md")
    (indexed / "\x1b[31mnew.md").write_text("# New\n\nNew.\n")
    (indexed / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    before = tree(indexed)
    text = cli("index", "docs", "--dry-run")
    assert tree(indexed) == before
    assert (text.status, text.out.splitlines()) == (
        0,
        [
            "add     \\x1b[31mnew.md",
            "change  undo.md",
            "rename  drafts/idea.md -> new-idea.md",
            "delete  notes.txt",
            "would add 1, change 1, rename 1, delete 1, leave 1 unchanged, skip 1",
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
    assert nothing == "would add 0, change 0, rename 0, delete 0, leave 4 unchanged, skip 1\n"


def test_without_a_path(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_links(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    Path("outside").mkdir()
    Path("outside/secret.md").write_text("# Secret\n\nA secret text.\n")
    (docs / "outside").symlink_to(Path("outside").resolve())
    (docs / "loop").symlink_to(docs)
    first = cli("index", "docs", "--model", tiny_checkpoint)
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


def test_without_chroma(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    assert cli("index", "docs", "--model", tiny_checkpoint, "--no-chroma").status == 0
    assert not (docs / ".epic-rag/chroma").exists()
    assert json.loads(cli("status", "--index-dir", "docs", "--json").out)["chroma"] == "none"
    assert cli("index", "docs").status == 0  # the index remembers it
    assert not (docs / ".epic-rag/chroma").exists()
    assert cli("query", "cats", "--index-dir", "docs", "--mode", "dense").status == 0
    assert cli("index", "docs", "--chroma", "folder").status == 0
    assert (docs / ".epic-rag/chroma/chroma.sqlite3").is_file()
    assert cli("index", "docs", "--no-chroma").status == 0
    assert not (docs / ".epic-rag/chroma").exists()
    both = cli("index", "docs", "--no-chroma", "--chroma", "folder")
    assert (both.status, "exclude each other" in both.err) == (2, True)


def test_waiting_for_another_process(cli: Any, indexed: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(indexed / ".epic-rag")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for options in ([], ["--wait", "0"], ["--wait", "0.3"]):
            result = cli("index", "docs", *options)
            assert result.status == 1
            assert re.search(rf"process {holder.pid} ", result.err), result.err
        statuses: list[int] = []
        waiting = threading.Thread(target=lambda: statuses.append(run(["index", "docs", "--wait", "inf"])))
        waiting.start()
        waiting.join(0.7)
        assert waiting.is_alive()
        holder.stdin.write("\n")
        holder.stdin.flush()
        waiting.join(180)
    assert statuses == [0]


def test_quiet_and_verbose(one_process: Any, docs: Path, tiny_checkpoint: Path) -> None:
    (docs / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    quiet, as_json, error = one_process(
        ["index", "docs", "--model", tiny_checkpoint, "-q"],
        ["--quiet", "index", "docs", "--json"],
        ["-q", "index", "nowhere"],
    )
    assert (quiet.status, quiet.out, quiet.err) == (0, "", "")
    assert (json.loads(as_json.out)["unchanged"], as_json.err) == (4, "")
    assert (error.status, error.err[:7]) == (1, "error: ")
    (docs / "new.md").write_text("# New\n\nSomething new.\n")
    (docs / "undo.md").write_text("# Undo\n\nWritten otherwise.\n")
    (docs / "notes.txt").unlink()
    shutil.move(docs / "drafts/idea.md", docs / "idea.md")
    (verbose,) = one_process(["index", "docs", "--verbose"])
    assert verbose.status == 0
    lines = verbose.err.splitlines()
    for expected in (
        r"info: new\.md: new, 1 (chunk|passage)s",
        r"info: undo\.md: changed, 1 (chunk|passage)s",
        r"info: idea\.md: renamed, 1 (chunk|passage)s",
        r"info: notes\.txt: (gone|deleted)",
        r"info: embedded 2 (chunk|passage)s in \d+\.\d\d s",
        r"info: times: scanning .* s, indexing .* s.*",
        r"skipped: broken\.pdf: .*",
    ):
        assert any(re.fullmatch(expected, line) for line in lines), (expected, lines)
    # No other library prints anything.
    assert all(line.startswith(("info: ", "skipped: ")) for line in lines), lines


@pytest.mark.parametrize("arguments", [["-q", "status"], ["status", "-q"], ["-v", "status"], ["status", "--verbose"]])
def test_before_and_after_the_command(cli: Any, indexed: Path, arguments: list[str]) -> None:
    result = cli(*arguments, "--index-dir", "docs/.epic-rag", "--json")
    assert (result.status, json.loads(result.out)["files"]) == (0, 4)


GERMAN = "# Ordner\n\nDie Dateien liegen in einem Ordner, und man kann sie mit diesem Befehl kopieren.\n"
CODE = "def copy(source, target):\n    return shutil.copytree(source, target)\n"


@pytest.mark.parametrize(
    ("trained_on", "files", "language"),
    [
        (["en"], {"a.md": GERMAN}, "German"),
        (["en", "fr"], {"a.md": GERMAN, "b.md": "# Ordner\n\nFür die Dateien, die nicht kopiert sind.\n", "c.py": CODE}, "German"),
        (["en"], {"a.md": "# 目录\n\n可以使用此命令复制目录中的文件。\n"}, "Chinese"),
        (["en"], {"a.md": "# फ़ोल्डर\n\nफ़ाइलें इस फ़ोल्डर में हैं।\n"}, "Hindi"),
        (["en", "de"], {"a.md": GERMAN}, None),
        (["multilingual"], {"a.md": GERMAN}, None),
        (None, {"a.md": GERMAN}, None),
        (["en"], {"a.md": GERMAN, "b.py": CODE}, None),
        (["en"], {"a.md": "# Folder\n\nThe files are in a folder, and this command copies them.\n"}, None),
    ],
)  # fmt: skip
def test_a_language_that_the_model_was_not_trained_on(
    cli: Any, tiny_checkpoint: Path, trained_on: list[str] | None, files: dict[str, str], language: str | None
) -> None:
    shutil.copytree(tiny_checkpoint, "model")
    epic = json.loads(Path("model/epic.json").read_text())
    Path("model/epic.json").write_text(json.dumps({**epic, "languages": trained_on}))
    Path("folder").mkdir()
    for name, text in files.items():
        Path("folder", name).write_text(text)
    result = cli("index", "folder", "--model", "model", "--json")
    found = json.loads(result.out)["language_mismatch"]
    if language is None:
        assert (found, result.err) == (None, "")
        return
    assert found["model_languages"] == trained_on
    assert found["share"] > 0.5
    assert result.err.startswith(
        f"note: About {found['share']:.0%} of the text is {language}, and tiny was trained on English"
    )
    assert result.err.endswith("--model intfloat/multilingual-e5-small`.\n")
    # A run that embeds nothing does not repeat it.
    assert cli("index", "folder").err == ""
