"""The walk: order, links, loops, devices, odd names, permissions, files that change meanwhile."""

from __future__ import annotations

import os
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from epic_rag_chroma import ChromaIndexer
from epic_rag_chroma.reading.document import NotTextError
from epic_rag_chroma.store.database import IndexDatabase
from epic_rag_chroma.store.paths import DATABASE_FILE
from epic_rag_chroma.types import IndexSettings
from epic_rag_chroma.walk.files import FoundFile, Scan, read_file, scan
from epic_rag_chroma.walk.safe_read import NotRegularError, TooLargeError, read_regular
from tests.helpers.users import as_another_user, make_readable

Tree = Callable[[Path, dict[str, str | bytes]], Path]
FOLLOW = IndexSettings(follow_links=True)


def paths(result: Scan) -> list[str]:
    return [file.path for file in result.files]


def reasons(result: Scan) -> dict[str, str]:
    return {file.path: file.reason for file in result.skipped}


@pytest.fixture
def linked(tmp_path: Path, tree: Tree) -> Path:
    """A folder with every kind of link, and a folder outside."""
    root = tree(tmp_path / "root", {"a.md": "x", "sub/b.md": "x", ".hidden/c.md": "x", ".git/d.md": "x"})
    outside = tree(tmp_path / "outside", {"o.md": "x", "deep/p.md": "x", ".git/q.md": "x", ".gitignore": "deep/r.md\n",
                                          "deep/r.md": "x"})  # fmt: skip
    for name, target in {
        "copy.md": root / "a.md",
        "hidden.md": root / ".hidden/c.md",
        "version.md": root / ".git/d.md",
        "inside": root / "sub",
        "loop": root,
        "sub/up": "..",
        "out.md": outside / "o.md",
        "outside": outside,
        "outside-again": outside / "deep",
        "outside-version": outside / ".git",
        "broken.md": "nowhere",
        "self": "self",
        "null": "/dev/null",
        "ignored-link": outside / "deep",
    }.items():
        (root / name).symlink_to(target)
    (outside / "back").symlink_to(root)
    (outside / "loop").symlink_to(outside / "deep")
    (root / ".gitignore").write_text("ignored-link\n")
    return root.resolve()


def test_order(tmp_path: Path, tree: Tree) -> None:
    tree(tmp_path, {"b.md": "x", "a/z.md": "x", "a/b/c.md": "x", "LICENSE": "x"})
    assert paths(scan(tmp_path.resolve(), IndexSettings())) == ["LICENSE", "a/b/c.md", "a/z.md", "b.md"]


def test_never_read(tmp_path: Path, tree: Tree) -> None:
    tree(
        tmp_path,
        {".git/a.md": "x", ".hg/a.md": "x", "CVS/a.md": "x", ".epicignore": "!.git\n!.hg\n", "photo.png": b"\x89PNG",
         "idx/index.json": '{"format": "epic-rag-index"}', "idx/a.md": "x", "db/chroma.sqlite3": "x", "db/a.md": "x",
         "mine/index.json": '{"a": 1}', "given/a.md": "x"},
    )  # fmt: skip
    result = scan(tmp_path.resolve(), IndexSettings(), index_dir=tmp_path.resolve() / "given")
    assert paths(result) == ["mine/index.json"]
    assert reasons(result) == {"photo.png": "not text: a picture"}


def test_index_folders_under_any_name(tmp_path: Path, tree: Tree) -> None:
    """An index is recognised while its first run has not finished, a database of another program is not one."""
    tree(tmp_path, {"finished/a.md": "x", "running/a.md": "x", "mine/a.md": "x"})
    IndexDatabase.open(tmp_path / "finished" / DATABASE_FILE).close()
    with closing(sqlite3.connect(tmp_path / "mine" / DATABASE_FILE)) as other:
        other.execute("CREATE TABLE mine (x)")
    with closing(IndexDatabase.open(tmp_path / "running" / DATABASE_FILE)):
        assert paths(scan(tmp_path.resolve(), IndexSettings())) == ["mine/a.md"]


def test_links_inside_the_root(linked: Path) -> None:
    result = scan(linked, IndexSettings())
    assert paths(result) == ["a.md", "hidden.md", "sub/b.md"]
    leaves = "a symbolic link that leaves the indexed folder"
    assert reasons(result) == {
        **dict.fromkeys(("out.md", "outside", "outside-again", "outside-version", "null"), leaves),
        **dict.fromkeys(("broken.md", "self"), "a broken symbolic link"),
    }


def test_follow_links(linked: Path) -> None:
    result = scan(linked, FOLLOW)
    # Each file once; no loop is entered, and version control's folders stay closed.
    assert paths(result) == ["a.md", "hidden.md", "out.md", "outside/deep/p.md", "sub/b.md"]
    assert reasons(result) == {
        **dict.fromkeys(("broken.md", "self"), "a broken symbolic link"),
        "null": "a symbolic link to neither a file nor a folder",
    }
    assert all(not file.location.is_symlink() for file in result.files)


def test_link_to_a_parent(tmp_path: Path, tree: Tree) -> None:
    root = tree(tmp_path / "top/root", {"a.md": "x"})
    tree(tmp_path / "top", {"beside.md": "x"})
    (root / "up").symlink_to(root.parent)
    assert paths(scan(root.resolve(), FOLLOW)) == ["a.md", "up/beside.md"]


def test_link_to_another_root(tmp_path: Path, tree: Tree) -> None:
    one, two = tree(tmp_path / "one", {"a.md": "x"}), tree(tmp_path / "two", {"b.md": "x"})
    (one / "two").symlink_to(two)
    (one / "b.md").symlink_to(two / "b.md")
    for settings in (IndexSettings(), FOLLOW):
        result = scan(one.resolve(), settings, elsewhere=[one.resolve(), two.resolve()])
        assert (paths(result), reasons(result)) == (["a.md"], {})


def test_link_to_an_index(tmp_path: Path, tree: Tree) -> None:
    root = tree(tmp_path / "root", {"a.md": "x"})
    mine = tree(tmp_path / "mine", {"x.md": "x"})
    other = tree(tmp_path / "other", {"index.json": '{"format": "epic-rag-index"}', "y.md": "x"})
    (root / "mine").symlink_to(mine)
    (root / "other").symlink_to(other)
    assert paths(scan(root.resolve(), FOLLOW, index_dir=mine.resolve())) == ["a.md"]


def test_special_files(tmp_path: Path, indexer: ChromaIndexer, docs: Path) -> None:
    os.mkfifo(docs / "pipe.md")
    os.mkfifo(docs / "index.json")
    os.mkfifo(docs / "src/.gitignore")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(docs / "socket.md"))
        report = indexer.index([docs])
    assert report.added == 3
    assert {file.path: file.reason for file in report.skipped} == dict.fromkeys(
        ("pipe.md", "index.json", "socket.md"), "neither a file nor a folder"
    )


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/tty"])
def test_device_as_root(indexer: ChromaIndexer, device: str) -> None:
    if not os.path.exists(device):
        pytest.skip("there is no such device")
    report = indexer.index([device])
    assert [file.reason for file in report.skipped] == ["neither a file nor a folder"]


ODD = (
    "new\nline.md", "tab\t.md", "bell\x07.md", "\x1b[31mred.md", " space .md", "-rf.md", "a*b?.md", "'quoted\".md",
    "back\\slash.md", "\u202egnp.md", "é.md", "e\u0301.md", "世界.md", "🙂.md", "UPPER.md", "upper.md", "x" * 252 + ".md",
)  # fmt: skip


def test_odd_names(docs: Path, indexer: ChromaIndexer) -> None:
    for number, name in enumerate(ODD):
        (docs / name).write_text(f"Text of file number {number}.\n")
    assert indexer.index([docs]).added == 3 + len(ODD)
    again = indexer.index([docs])
    assert (again.unchanged, again.skipped) == (3 + len(ODD), ())
    found = {hit.path for hit in indexer.query("Text of file", k=200)}
    assert set(ODD) <= found


def test_undecodable_names(tmp_path: Path) -> None:
    top = os.fsencode(tmp_path)
    os.mkdir(os.path.join(top, b"d\xff"))
    for name in (b"d\xff/a.md", b"f\xfe.md", b"ok.md"):
        with open(os.path.join(top, name), "wb") as file:
            file.write(b"x")
    result = scan(tmp_path.resolve(), IndexSettings())
    assert paths(result) == ["ok.md"]
    assert reasons(result) == dict.fromkeys(("d\\xff", "f\\xfe.md"), "its name is not valid UTF-8")


def test_long_paths(tmp_path: Path) -> None:
    (tmp_path / "ok.md").write_text("x")
    handle = os.open(tmp_path, os.O_RDONLY)
    for _ in range(25):  # 25 * 201 characters, and 4,096 are allowed
        os.mkdir("d" * 200, dir_fd=handle)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)
    result = scan(tmp_path.resolve(), IndexSettings())
    assert paths(result) == ["ok.md"]
    assert list(reasons(result).values()) == ["cannot be listed: File name too long"]


def test_hard_links(docs: Path, indexer: ChromaIndexer) -> None:
    os.link(docs / "notes.txt", docs / "again.txt")
    report = indexer.index([docs])
    assert report.added == 4


def test_permissions(tmp_path: Path, tree: Tree) -> None:
    tree(tmp_path, {"a.md": "x", "closed/b.md": "x", "unlisted/c.md": "x", "secret.md": "x"})
    make_readable(tmp_path)
    (tmp_path / "closed").chmod(0o000)
    (tmp_path / "unlisted").chmod(0o311 if os.geteuid() == 0 else 0o100)
    (tmp_path / "secret.md").chmod(0o000)
    with as_another_user():
        result = scan(tmp_path.resolve(), IndexSettings())
        assert paths(result) == ["a.md", "secret.md"]
        assert reasons(result) == dict.fromkeys(("closed", "unlisted"), "cannot be listed: Permission denied")
        # What cannot be seen is not gone.
        assert sorted(result.unreadable) == ["closed/", "unlisted/"]
        with pytest.raises(PermissionError):
            read_file(FoundFile("secret.md", tmp_path.resolve() / "secret.md"))
    (tmp_path / "closed").chmod(0o700)


def test_file_replaced_by_a_link(docs: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    file = next(file for file in scan(docs.resolve(), IndexSettings()).files if file.path == "notes.txt")
    file.location.unlink()
    file.location.symlink_to(tmp_path / "secret")
    with pytest.raises(NotTextError, match="neither a file nor a folder"):
        read_file(file)
    file.location.unlink()
    os.mkfifo(file.location)
    with pytest.raises(NotTextError, match="neither a file nor a folder"):
        read_file(file)


def test_files_that_change_during_a_run(docs: Path, indexer: ChromaIndexer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epic_rag_chroma.walk.files.byte_limit", lambda name: 4096)
    (docs / "zz-vanishes.md").write_text("x\n")
    (docs / "zz-grows.md").write_text("x\n")
    (docs / "zz-folder/a.md").parent.mkdir()
    (docs / "zz-folder/a.md").write_text("x\n")

    def meanwhile(event: Any) -> None:
        if event.path == "guide.md":
            (docs / "zz-vanishes.md").unlink(missing_ok=True)
            (docs / "zz-grows.md").write_text("word " * 4096)
            (docs / "zz-folder/a.md").unlink(missing_ok=True)

    report = indexer.index([docs], progress=meanwhile)
    assert report.added == 3
    assert {file.path: file.reason for file in report.skipped} == {"zz-grows.md": "larger than 0 MiB"}
    assert indexer.index([docs]).unchanged == 3


def test_file_with_a_false_size(tmp_path: Path) -> None:
    """As those in /proc do; no more than the limit is read of it."""
    data, info = read_regular("/proc/self/status", 2**20)
    assert (info.st_size, data.startswith(b"Name:")) == (0, True)
    with pytest.raises(TooLargeError):
        read_regular("/proc/self/status", 10)
    assert len(read_regular("/proc/self/status", 10, whole=False)[0]) == 10
    with pytest.raises(NotRegularError):
        read_regular(tmp_path, 10)
