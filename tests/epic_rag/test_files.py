"""JSON lines are read with their line numbers; a file is replaced whole or not at all."""

from __future__ import annotations

import errno
import gzip
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from epic_rag import DataError
from epic_rag.files import describe_os_error, read_jsonl, save_tensors, user_name, write_atomically


def test_rows_have_their_line_numbers(tmp_path: Path) -> None:
    text = '\ufeff{"a": 1}\n\n  \n{"b": "line\u2028separator"}\n'.encode()
    for name, content in (("rows.jsonl", text), ("rows.jsonl.gz", gzip.compress(text))):
        (tmp_path / name).write_bytes(content)
        assert list(read_jsonl(tmp_path / name)) == [(1, {"a": 1}), (4, {"b": "line\u2028separator"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a":\n', r"rows\.jsonl:2 is not valid JSON"),
        (b"[1]\n", r"rows\.jsonl:1 is not a JSON object \(list\)"),
        (b'{"a": "\xe9"}\n', r"rows\.jsonl:1 is not UTF-8 \(byte 7\)"),
        (b"[" * 100_000, r"rows\.jsonl:1 is not valid JSON"),
        (None, r"rows\.jsonl cannot be read"),
    ],
)
def test_a_bad_line_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_jsonl(file))


def test_a_damaged_archive_is_an_error(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"a": 1}\n' * 1000)
    file = tmp_path / "rows.jsonl.gz"
    for content in (b"plain", packed[:-9]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"rows\.jsonl\.gz cannot be read"):
            list(read_jsonl(file))


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "new", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_tensors_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_tensors({"x": torch.zeros(2)}, tmp_path / "new.safetensors", {"format": "pt"})
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.safetensors").stat().st_mode) == 0o640
    assert load_file(tmp_path / "new.safetensors")["x"].shape == (2,)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="other systems have no owners and modes")
def test_errors_in_words(tmp_path: Path) -> None:
    user = user_name(os.geteuid())
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o640)
    tmp_path.chmod(0o750)
    for path, denied in (
        (tmp_path / "file", "file has mode 640"),
        (tmp_path / "no/such/file", f"{tmp_path} has mode 750"),
    ):
        described = describe_os_error(PermissionError(errno.EACCES, "Permission denied", str(path)))
        assert described.startswith(f"{path}: Permission denied (")
        assert described.endswith(f"{denied} and belongs to {user}, you are {user})")
    assert describe_os_error(OSError(errno.ENOSPC, "No space left", b"a")) == "a: No space left"
    assert describe_os_error(OSError(errno.ENOSPC, "No space left")) == "No space left"
    assert describe_os_error(OSError("odd")) == "odd"
    assert user_name(2**31 - 7) == str(2**31 - 7)


def test_permissions_of_a_replaced_file_stay(tmp_path: Path) -> None:
    file = tmp_path / "old"
    file.write_text("old")
    file.chmod(0o600)
    write_atomically(file, b"new")
    assert file.read_text() == "new"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "old"
    file.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
