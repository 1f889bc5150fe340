"""Ignore files outside of the working tree, compared with git."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from epic_rag_chroma.types import IndexSettings
from epic_rag_chroma.walk.files import scan

Tree = Callable[[Path, dict[str, str | bytes]], Path]
GIT = shutil.which("git")
pytestmark = pytest.mark.skipif(GIT is None, reason="git is not installed")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without settings of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith(("GIT_", "XDG_"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    return home


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        [str(GIT), "-c", "protocol.file.allow=always", "-C", str(folder), *arguments],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip


def repository(folder: Path, tree: Tree) -> Path:
    tree(
        folder,
        {"public/a.md": "x", "private/b.md": "x", "note.local": "x", "deep/private/c.md": "x", "keep.local": "x"},
    )
    git(folder, "init", "-q")
    return folder.resolve()


def same_as_git(folder: Path) -> list[str]:
    """Paths that the walk finds, which are those of git."""
    found = [file.path for file in scan(folder, IndexSettings()).files]
    listed = git(folder, "ls-files", "--others", "--cached", "--exclude-standard").split("\n")
    assert sorted(found) == sorted(filter(None, listed))
    return found


@pytest.mark.parametrize("line", ["private/", "/private", "*.local", "**/private/**", "private/\n!deep/private/"])
def test_info_exclude(line: str, home: Path, tmp_path: Path, tree: Tree) -> None:
    top = repository(tmp_path / "top", tree)
    (top / ".git/info/exclude").write_text(line + "\n")
    same_as_git(top)
    # A .gitignore takes precedence.
    (top / ".gitignore").write_text("!private/\n!keep.local\n.gitignore\n")
    same_as_git(top)


def test_root_below_the_repository(home: Path, tmp_path: Path, tree: Tree) -> None:
    top = repository(tmp_path / "top", tree)
    (top / ".git/info/exclude").write_text("deep/private/\n/c.md\n")
    tree(top, {"deep/c.md": "x", "deep/other/c.md": "x"})
    found = [file.path for file in scan(top / "deep", IndexSettings()).files]
    assert found == ["c.md", "other/c.md"]


@pytest.mark.parametrize(
    "config",
    [
        '[core]\n\texcludesFile = "{file}"\n',
        "[core] ; comment\nEXCLUDESFILE={file} # comment\n",
        "[core]\n\texcludesfile = /nowhere\n[core]\n\texcludesfile = ~/my ignore\n",
        "[core]\n\texcludesfile = ~/\\\nmy ignore\n",
        "[include]\n\tpath = other\n",
        '[includeIf "gitdir:~/../top/"]\n\tpath = other\n',
        '[includeIf "gitdir:top/.git"]\n\tpath = ~/other\n',
        '[includeIf "gitdir:elsewhere/"]\n\tpath = other\n',
        '[core "x"]\n\texcludesfile = ~/my ignore\n',
    ],
)
def test_excludes_file(config: str, home: Path, tmp_path: Path, tree: Tree) -> None:
    top = repository(tmp_path / "top", tree)
    (home / "my ignore").write_text("*.local\nprivate\n")
    (home / "other").write_text('[core]\n\texcludesFile = "~/my ignore"\n')
    (home / ".gitconfig").write_text(config.replace("{file}", str(home / "my ignore")))
    same_as_git(top)


def test_default_excludes_file(home: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    top = repository(tmp_path / "top", tree)
    tree(home, {".config/git/ignore": "*.local\n", "elsewhere/git/ignore": "private/\n"})
    assert "note.local" not in same_as_git(top)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "elsewhere"))
    assert "note.local" in same_as_git(top)


def test_repository_setting(home: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    top = repository(tmp_path / "top", tree)
    (home / "mine").write_text("private/\n")
    (home / "global").write_text("[core]\nexcludesFile = /nowhere\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(home / "global"))
    assert "private/b.md" in same_as_git(top)
    git(top, "config", "core.excludesFile", "~/mine")
    assert "private/b.md" not in same_as_git(top)


def test_worktree(home: Path, tmp_path: Path, tree: Tree) -> None:
    top = repository(tmp_path / "top", tree)
    git(top, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-q", "--allow-empty", "-m", "x")
    git(top, "worktree", "add", "-q", "../beside")
    (top / ".git/info/exclude").write_text("private/\n")
    beside = tree(tmp_path / "beside", {"private/b.md": "x", "a.md": "x"}).resolve()
    assert same_as_git(beside) == ["a.md"]


def test_outside_of_a_repository(home: Path, tmp_path: Path, tree: Tree) -> None:
    tree(home, {".config/git/ignore": "*.local\n"})
    folder = tree(tmp_path / "plain", {"note.local": "x"}).resolve()
    assert [file.path for file in scan(folder, IndexSettings()).files] == ["note.local"]


@pytest.mark.parametrize("content", ["", "gitdir:", "gitdir: /nowhere", "gitdir: ../nowhere", "\0", "nonsense"])
def test_broken_git_file(content: str, home: Path, tmp_path: Path, tree: Tree) -> None:
    folder = tree(tmp_path / "top", {".git": content, "a.md": "x"}).resolve()
    assert [file.path for file in scan(folder, IndexSettings()).files] == ["a.md"]


@pytest.mark.parametrize(("pattern", "name"), [("Übersicht.md", "Ubersicht.md"), ("café/", "cafe/a.md")])
def test_composed_and_decomposed_names(pattern: str, name: str, tmp_path: Path, tree: Tree) -> None:
    """The names are written decomposed, as macOS and archives bring them; the patterns as they are typed."""
    decomposed = name.replace("U", "U\u0308").replace("cafe", "cafe\u0301")
    folder = tree(tmp_path / "top", {decomposed: "x", "b.md": "x"}).resolve()
    assert [f.path for f in scan(folder, IndexSettings(exclude=(pattern,))).files] == ["b.md"]
    assert [f.path for f in scan(folder, IndexSettings(include=(pattern,))).files] == [decomposed]
