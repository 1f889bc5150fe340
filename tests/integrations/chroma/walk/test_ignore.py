"""Ignore patterns and ignore files, compared with git on the same tree."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from epic_rag_chroma.types import IndexSettings
from epic_rag_chroma.walk.files import scan
from epic_rag_chroma.walk.ignore import IgnorePatterns, PatternError, compile_patterns

Tree = Callable[[Path, dict[str, str | bytes]], Path]

GIT = shutil.which("git")
FOLDERS = ("", "a/", "b/", "a/b/", "a/c/", "b/a/", "a/b/c/")
NAMES = ("a", "b", "c.md", "d.txt", "e f.md", "[x].md", "#h", "!n", "ab.md", "xy ")
TREE = tuple(folder + name + suffix for folder in FOLDERS for name in NAMES for suffix in ("", "1"))

# Pieces that meet the names above, and the syntax that goes wrong most easily.
_PIECE = st.sampled_from(
    ["a", "b", "c", "ab", "*", "**", "?", "*.md", "*.txt", "[ab]", "[!a]", "[a-c]*", "c.md", "e f.md", "\\#h1", "#h",
     "\\!n1", "!n", "a1", "b1", "*1", "\\[x\\].md", "[x].md", "xy ", "xy\\ ", ".", "..", "",
     "[]a]", "[^a]", "[a", "[[:alpha:]]", "[[:alpha]", "[[:what:]]", "[a-", "[z-a]", "[--b]", "[\\]a]", "[!]a]*",
     "a**", "**b", "***", "\\a", "a\\", "?1", "[a/b]"]
)  # fmt: skip
_PATTERN = st.builds(
    lambda negated, start, pieces, end, blank: negated + start + "/".join(pieces) + end + blank,
    st.sampled_from(["", "", "", "!"]),
    st.sampled_from(["", "", "/", "**/"]),
    st.lists(_PIECE, min_size=1, max_size=3),
    st.sampled_from(["", "", "/", "/**", "/*"]),
    st.sampled_from(["", "", " ", "\r"]),
)
_FILES = st.dictionaries(
    st.sampled_from(["", "a/", "a/b/", "b/"]), st.lists(_PATTERN, min_size=1, max_size=5), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the tree; no test removes anything but ignore files."""
    folder = tmp_path_factory.mktemp("repository").resolve()
    for name in TREE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        # Where a folder has the name, it holds files itself.
        if not (folder / name).is_dir() and f"{name}/" not in FOLDERS:
            (folder / name).write_text("x")
    subprocess.run([str(GIT), "init", "-q", str(folder)], check=True, env=environment())
    return folder


def environment() -> dict[str, str]:
    """No settings of the person who runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {**kept, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


def listed_by_git(folder: Path) -> set[str]:
    done = subprocess.run(
        [str(GIT), "ls-files", "-z", "--others", "--exclude-per-directory=.gitignore"],
        cwd=folder, env=environment(), capture_output=True, check=True,
    )  # fmt: skip
    return {name.decode() for name in done.stdout.split(b"\0") if name and not name.endswith(b".gitignore")}


@pytest.mark.skipif(GIT is None, reason="git is not installed")
@settings(
    max_examples=3000 if os.environ.get("EPIC_RAG_SOAK") == "1" else 100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(files=_FILES)
@example(files={"": ["*", "!*/", "!*.md"]})
@example(files={"": ["a/*", "!a/b"], "a/": ["b/c"]})
@example(files={"": ["/a"], "a/": ["!b"]})
@example(files={"": ["b", "a**/a"]})
@example(files={"": ["a", "/**", "!a"]})
@example(files={"": ["a/**/c.md", "**/b/", "!b/a/"]})
@example(files={"": ["*.md\r", "xy\\ ", "\\!n", "#h"]})
def test_same_files_as_git(repository: Path, files: dict[str, list[str]]) -> None:
    written = [repository / folder / ".gitignore" for folder in files]
    try:
        for path, patterns in zip(written, files.values(), strict=True):
            path.write_bytes("\n".join(patterns).encode() + b"\n")
        found = {file.path for file in scan(repository, IndexSettings()).files}
        assert found == listed_by_git(repository)
    finally:
        for path in written:
            path.unlink()


@pytest.mark.parametrize(
    ("patterns", "selected"),
    [
        (["guide"], ["guide/a.md", "guide/deep/b.py"]),
        (["guide/**", "*.py"], ["guide/a.md", "guide/deep/b.py", "src/c.py"]),
        (["/c.py"], []),
        (["*.md/"], []),
        (["*", "!*.py"], ["guide/a.md"]),
        (["*", "!src/"], ["guide/a.md", "guide/deep/b.py"]),
        (["!*", "src/"], ["src/c.py"]),
        ([], []),
    ],
)
def test_selection(patterns: list[str], selected: list[str]) -> None:
    compiled = compile_patterns(patterns, "test")
    assert [path for path in ("guide/a.md", "guide/deep/b.py", "src/c.py") if compiled.selects(path)] == selected


@pytest.mark.parametrize("pattern", ["", "  ", "# comment", "!", "/", "[a", "a\\"])
def test_patterns_that_never_match(pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PatternError) as raised:
        compile_patterns(["*.md", pattern], "test")
    assert raised.value.args == (pattern,)
    assert not IgnorePatterns([pattern], "here").selects("a")
    is_comment = not pattern.strip() or pattern.startswith("#")
    assert caplog.messages == ([] if is_comment else [f"here: pattern {pattern!r} can never match and is ignored"])


def test_special_ignore_files(tmp_path: Path) -> None:
    """Links are not followed, FIFOs do not block, and neither stops the walk."""
    (tmp_path / "elsewhere").write_text("*.md\n")
    root = tmp_path / "root"
    for name in ("a", "b", "c"):
        (root / name).mkdir(parents=True)
        (root / name / "x.md").write_text("x")
    (root / "a/.gitignore").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(root / "b/.gitignore")
    (root / "c/.gitignore").mkdir()
    assert [file.path for file in scan(root.resolve(), IndexSettings()).files] == ["a/x.md", "b/x.md", "c/x.md"]


def test_undecodable_ignore_file(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_bytes(b"\xef\xbb\xbfa.md\nb\xff.md\nc.md\x0bd\n")
    for name in (b"a.md", b"b\xff.md", b"c.md", b"d"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"x")
    result = scan(tmp_path.resolve(), IndexSettings())
    assert ([file.path for file in result.files], result.skipped) == (["c.md", "d"], [])


def found(folder: Path, settings: IndexSettings | None = None) -> list[str]:
    return [file.path for file in scan(folder.resolve(), settings or IndexSettings()).files]


def test_nested_gitignore(tmp_path: Path, tree: Tree) -> None:
    tree(
        tmp_path,
        {
            ".gitignore": "*.log\nbuild/\n/only-here.md\n",
            "a.log": "x",
            "build/out.md": "x",
            "only-here.md": "x",
            "sub/.gitignore": "!keep.log\n*.tmp\n",
            "sub/keep.log": "x",
            "sub/drop.log": "x",
            "sub/x.tmp": "x",
            "sub/only-here.md": "x",
            "sub/deep/build/out.md": "x",
            "y.tmp": "x",
        },
    )
    assert found(tmp_path) == ["sub/keep.log", "sub/only-here.md", "y.tmp"]


def test_epicignore_precedence(tmp_path: Path, tree: Tree) -> None:
    tree(
        tmp_path,
        {".gitignore": "gen.md\n", ".epicignore": "!gen.md\nsecret.md\n!.github/\n", "gen.md": "x", "secret.md": "x",
         ".github/help.md": "x", ".hidden/help.md": "x", ".env": "KEY=1", "open.md": "x"},
    )  # fmt: skip
    assert found(tmp_path) == [".github/help.md", "gen.md", "open.md"]


def test_gitignore_above_the_root(tmp_path: Path, tree: Tree) -> None:
    tree(tmp_path, {".git/config": "x", ".gitignore": "docs/_build/\n*.bak\n", "docs/_build/a.md": "x",
                    "docs/b.md": "x", "docs/c.bak": "x"})  # fmt: skip
    assert found(tmp_path / "docs") == ["b.md"]


def test_ignored_root(tmp_path: Path, tree: Tree) -> None:
    tree(tmp_path, {".git/config": "x", ".gitignore": ".venv/\n", ".venv/lib/a.md": "x", ".venv/lib/.gitignore": "b.md",
                    ".venv/lib/b.md": "x"})  # fmt: skip
    assert found(tmp_path / ".venv" / "lib") == ["a.md"]
    assert found(tmp_path / ".venv" / "lib" / "b.md") == ["b.md"]


def test_gitignore_above_without_repository(tmp_path: Path, tree: Tree) -> None:
    tree(tmp_path, {".gitignore": "*\n", "docs/a.md": "x"})
    assert found(tmp_path / "docs") == ["a.md"]


def test_broken_patterns(tmp_path: Path, tree: Tree) -> None:
    tree(tmp_path, {".gitignore": b"\xff\xfe\x00\n!\n/\n[\nb.md\n", "a.md": "x", "b.md": "x"})
    assert found(tmp_path) == ["a.md"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), (), ["a.md", "drafts/b.md", "drafts/c.txt"]),
        (("*.md",), (), ["a.md", "drafts/b.md"]),
        (("*.md",), ("drafts/**",), ["a.md"]),
        ((), ("drafts/",), ["a.md"]),
        (("drafts/",), (), ["drafts/b.md", "drafts/c.txt"]),
        (("yarn.lock", "a.md"), (), ["a.md", "yarn.lock"]),
    ],
)
def test_include_and_exclude(
    tmp_path: Path, tree: Tree, include: tuple[str, ...], exclude: tuple[str, ...], expected: list[str]
) -> None:
    tree(tmp_path, {"a.md": "x", "drafts/b.md": "x", "drafts/c.txt": "x", "yarn.lock": "x", "node_modules/d.md": "x"})
    assert found(tmp_path, IndexSettings(include=include, exclude=exclude)) == expected
