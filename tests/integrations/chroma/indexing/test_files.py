"""Which files are found: ignore files, patterns, hidden and binary files, links."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from epic_rag_chroma.types import IndexSettings
from epic_rag_chroma.walk.files import Scan, scan

Tree = Callable[[Path, dict[str, str | bytes]], Path]


def found(folder: Path, settings: IndexSettings | None = None) -> list[str]:
    return [file.path for file in scan(folder.resolve(), settings or IndexSettings()).files]


def reasons(result: Scan) -> dict[str, str]:
    return {file.path: file.reason for file in result.skipped}


def test_files_come_in_order_with_slashes(tmp_path: Path, tree: Tree) -> None:
    tree(tmp_path, {"b.md": "x", "a/z.md": "x", "a/b/c.md": "x", "LICENSE": "x"})
    assert found(tmp_path) == ["LICENSE", "a/b/c.md", "a/z.md", "b.md"]


def test_gitignore_nested_and_negated(tmp_path: Path, tree: Tree) -> None:
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


def test_epicignore_decides_before_gitignore(tmp_path: Path, tree: Tree) -> None:
    tree(
        tmp_path,
        {".gitignore": "gen.md\n", ".epicignore": "!gen.md\nsecret.md\n!.github/\n", "gen.md": "x", "secret.md": "x",
         ".github/help.md": "x", ".hidden/help.md": "x", ".env": "KEY=1", "open.md": "x"},
    )  # fmt: skip
    assert found(tmp_path) == [".github/help.md", "gen.md", "open.md"]


def test_the_repository_above_the_root_counts(tmp_path: Path, tree: Tree) -> None:
    tree(tmp_path, {".git/config": "x", ".gitignore": "docs/_build/\n*.bak\n", "docs/_build/a.md": "x",
                    "docs/b.md": "x", "docs/c.bak": "x"})  # fmt: skip
    assert found(tmp_path / "docs") == ["b.md"]


def test_a_root_that_is_ignored_itself_was_asked_for(tmp_path: Path, tree: Tree) -> None:
    tree(tmp_path, {".git/config": "x", ".gitignore": ".venv/\n", ".venv/lib/a.md": "x", ".venv/lib/.gitignore": "b.md",
                    ".venv/lib/b.md": "x"})  # fmt: skip
    assert found(tmp_path / ".venv" / "lib") == ["a.md"]
    assert found(tmp_path / ".venv" / "lib" / "b.md") == ["b.md"]


def test_gitignore_above_without_a_repository_does_not_count(tmp_path: Path, tree: Tree) -> None:
    tree(tmp_path, {".gitignore": "*\n", "docs/a.md": "x"})
    assert found(tmp_path / "docs") == ["a.md"]


def test_broken_patterns_and_bytes_in_ignore_files(tmp_path: Path, tree: Tree) -> None:
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


def test_what_is_never_read(tmp_path: Path, tree: Tree) -> None:
    tree(
        tmp_path,
        {".git/a.md": "x", ".hg/a.md": "x", "CVS/a.md": "x", ".epicignore": "!.git\n!.hg\n", "photo.png": b"\x89PNG",
         "idx/index.json": '{"format": "epic-rag-index"}', "idx/a.md": "x", "db/chroma.sqlite3": "x", "db/a.md": "x",
         "mine/index.json": '{"a": 1}', "given/a.md": "x"},
    )  # fmt: skip
    result = scan(tmp_path.resolve(), IndexSettings(), index_dir=tmp_path.resolve() / "given")
    assert [file.path for file in result.files] == ["mine/index.json"]
    assert reasons(result) == {"photo.png": "not text"}


def test_links(tmp_path: Path, tree: Tree) -> None:
    root = tree(tmp_path / "root", {"a.md": "x", "sub/b.md": "x", ".hidden/c.md": "x"})
    outside = tree(tmp_path / "outside", {"secret.md": "x"})
    (root / "copy.md").symlink_to(root / "a.md")
    (root / "shown.md").symlink_to(root / ".hidden" / "c.md")
    (root / "leak.md").symlink_to(outside / "secret.md")
    (root / "leaks").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "broken.md").symlink_to("nowhere")
    (root / "self.md").symlink_to("self.md")
    result = scan(root.resolve(), IndexSettings())
    assert [file.path for file in result.files] == ["a.md", "shown.md", "sub/b.md"]
    leaves = "a symbolic link that leaves the indexed folder"
    broken = "a broken symbolic link"
    assert reasons(result) == {"leak.md": leaves, "leaks": leaves, "broken.md": broken, "self.md": broken}


def test_special_files_and_odd_names(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "naïve file.md").write_text("x")
    with open(os.path.join(os.fsencode(tmp_path), b"bad\xff.md"), "wb") as file:
        file.write(b"x")
    result = scan(tmp_path.resolve(), IndexSettings())
    assert [file.path for file in result.files] == ["naïve file.md"]
    assert reasons(result) == {
        "pipe.md": "neither a file nor a folder",
        "bad\\xff.md": "its name is not valid UTF-8",
    }


def test_a_folder_that_cannot_be_listed_hides_its_files(
    tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, {"a.md": "x", "closed/b.md": "x"})
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    result = scan(tmp_path.resolve(), IndexSettings())
    assert [file.path for file in result.files] == ["a.md"]
    assert result.unreadable == ["closed/"]
    assert reasons(result) == {"closed": "cannot be listed: Permission denied"}
