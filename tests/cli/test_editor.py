"""How editors are told a line, and what is opened by what."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from epic_rag.errors import DataError, EpicError
from epic_rag_chroma import Hit
from epic_rag_cli.commands import query as editor
from epic_rag_cli.commands.query import editor_command, open_hit


def hit(path: str, root: Path, **changes: Any) -> Hit:
    values: dict[str, Any] = {"first_line": 3, "last_line": 4, "page": None, "heading_path": (), "text": "x", "id": "a"}
    return Hit(**{"rank": 1, "score": 0.5, "path": path, "root": str(root), **values, **changes})


@pytest.mark.parametrize(
    ("setting", "line", "expected"),
    [
        ("vi", 7, ["vi", "+7", "/d/a b.md"]),
        ("/usr/bin/nvim", 7, ["/usr/bin/nvim", "+7", "/d/a b.md"]),
        ("emacsclient -t", 7, ["emacsclient", "-t", "+7", "/d/a b.md"]),
        ("nano", None, ["nano", "/d/a b.md"]),
        ("code --wait", 7, ["code", "--wait", "-g", "/d/a b.md:7"]),
        ("'/opt/My Editor/code'", 7, ["/opt/My Editor/code", "-g", "/d/a b.md:7"]),
        ("subl", 7, ["subl", "/d/a b.md:7"]),
        ("hx", 7, ["hx", "/d/a b.md:7"]),
        ("pycharm", 7, ["pycharm", "--line", "7", "/d/a b.md"]),
        ("mate -w", 7, ["mate", "-w", "-l", "7", "/d/a b.md"]),
        ("flatpak run org.editor", 7, ["flatpak", "run", "org.editor", "/d/a b.md"]),
    ],
)
def test_commands(monkeypatch: pytest.MonkeyPatch, setting: str, line: int | None, expected: list[str]) -> None:
    monkeypatch.setenv("VISUAL", " ")
    monkeypatch.setenv("EDITOR", setting)
    assert editor_command("/d/a b.md", line) == expected
    monkeypatch.setenv("VISUAL", "ed")
    assert editor_command("/d/a b.md", line) == ["ed", "/d/a b.md"]


@pytest.mark.parametrize(
    ("platform", "name", "expected"),
    [("darwin", "posix", ["open", "-t"]), ("win32", "nt", ["notepad.exe"]), ("linux", "posix", ["editor"])],
)
def test_without_a_setting_text_goes_to_an_editor(
    monkeypatch: pytest.MonkeyPatch, platform: str, name: str, expected: list[str]
) -> None:
    """Never to the system's opener, which would run a script."""
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.delenv("EDITOR", raising=False)
    monkeypatch.setattr(editor.shutil, "which", lambda name: None if name == "sensible-editor" else name)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        patch.setattr(os, "name", name)
        command = editor_command("/d/a.sh", 3)
    assert command[: len(expected)] == expected


@pytest.fixture
def bin_folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path.cwd() / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def program(file: Path, status: int = 0) -> Path:
    log = file.parent / f"{file.name}.log"
    file.write_text(f'#!/bin/sh\necho "$@" > "{log}"\nexit {status}\n')
    file.chmod(0o755)
    return log


@pytest.mark.skipif(sys.platform != "linux", reason="xdg-open is Linux's")
def test_documents_go_to_the_system(monkeypatch: pytest.MonkeyPatch, bin_folder: Path) -> None:
    opened, edited = program(bin_folder / "xdg-open"), program(bin_folder / "vim")
    monkeypatch.setenv("EDITOR", "vim")
    for name in ("a.pdf", "a.docx", "a.py"):
        Path(name).write_text("x\n" * 5)
    open_hit(hit("a.pdf", Path.cwd(), kind="pdf", first_line=None, page=3))
    assert opened.read_text() == f"{Path.cwd()}/a.pdf\n"
    open_hit(hit("a.docx", Path.cwd(), kind="docx", first_line=None))
    assert opened.read_text() == f"{Path.cwd()}/a.docx\n"
    assert not edited.exists()
    open_hit(hit("a.py", Path.cwd(), kind="code"))
    assert edited.read_text() == f"+3 {Path.cwd()}/a.py\n"
    program(bin_folder / "xdg-open", status=4)
    with pytest.raises(EpicError, match=r"xdg-open cannot open a\.pdf \(status 4\); open the file by hand"):
        open_hit(hit("a.pdf", Path.cwd(), kind="pdf"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EpicError, match=r"there is no xdg-open to open a\.pdf with"):
        open_hit(hit("a.pdf", Path.cwd(), kind="pdf"))


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../secret"])
def test_nothing_outside_of_the_folder_is_opened(path: str) -> None:
    (Path.cwd() / "root/a").mkdir(parents=True)
    Path("secret").write_text("x")
    with pytest.raises(DataError, match="is no path below the indexed folder"):
        open_hit(hit(path, Path.cwd() / "root"))


def test_a_file_that_is_gone_or_is_none() -> None:
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for name in ("gone.md", "folder", "pipe"):
        with pytest.raises(DataError, match=f"{name} is gone since it was indexed; run `epic-rag index`"):
            open_hit(hit(name, Path.cwd()))
