"""The lines of indexed files, the encoder and the fingerprint of an index."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from epic_rag import DataError, EpicEncoder
from epic_rag_chroma import NO_CHROMA, ChromaIndexer, IndexNotFoundError, IndexSettings
from tests.conftest import make_encoder


def indexed(folder: Path, *paths: Path, settings: IndexSettings | None = None) -> ChromaIndexer:
    indexer = ChromaIndexer(folder / ".epic-rag", encoder=make_encoder(), chroma=NO_CHROMA)
    indexer.index(paths or [folder], settings=settings)
    return indexer


def test_line_numbers_of_hits_refer_to_these_lines(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"# Caf\xe9\r\n\r\nIt is open.\x0cUntil late.\r\n\r\n## Bar\r\n\r\nClosed.\r\n")
    with indexed(tmp_path) as indexer:
        lines = indexer.read_lines("a.md")
        assert lines[0] == "# Caf\xe9"
        for hit in indexer.query("open", mode="keyword"):
            assert hit.first_line is not None
            assert hit.last_line is not None
            assert hit.text == "\n".join(lines[hit.first_line - 1 : hit.last_line])


def test_a_file_as_root(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("One line.\n")
    (tmp_path / "two.txt").write_text("Not indexed.\n")
    with indexed(tmp_path, tmp_path / "one.txt") as indexer:
        (hit,) = indexer.query("line", mode="keyword")
        assert indexer.read_lines(hit.path) == ["One line.", ""]
        with pytest.raises(DataError, match="not a file of the index"):
            indexer.read_lines("two.txt")


def test_files_without_lines_and_files_that_are_gone(tmp_path: Path, pdf: Callable[[list[str]], bytes]) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf(["A page of words."]))
    (tmp_path / "b.txt").write_text("Words.\n")
    with indexed(tmp_path) as indexer:
        with pytest.raises(DataError, match="has no lines"):
            indexer.read_lines("a.pdf")
        (tmp_path / "b.txt").unlink()
        with pytest.raises(DataError, match="cannot be read any more"):
            indexer.read_lines("b.txt")
        (tmp_path / "b.txt").write_bytes(b"\0\1\2")
        with pytest.raises(DataError, match="cannot be read any more"):
            indexer.read_lines("b.txt")


def test_links_out_of_the_root_are_read_only_if_the_index_follows_them(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.txt").write_text("Outside.\n")
    (tmp_path / "docs").mkdir()
    os.symlink(tmp_path / "outside", tmp_path / "docs" / "linked")
    with indexed(tmp_path / "docs", settings=IndexSettings(follow_links=True)) as indexer:
        (hit,) = indexer.query("outside", mode="keyword")
        assert indexer.read_lines(hit.path) == ["Outside.", ""]
        os.symlink("/etc/hostname", tmp_path / "docs" / "b.txt")
        with pytest.raises(DataError):
            indexer.read_lines("b.txt")


def test_encoder_and_fingerprint(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "a.txt").write_text("Words.\n")
    loaded: list[EpicEncoder] = []

    def load() -> EpicEncoder:
        loaded.append(make_encoder())
        return loaded[-1]

    with ChromaIndexer(tmp_path / ".epic-rag", encoder=load, chroma=NO_CHROMA) as indexer:
        with pytest.raises(IndexNotFoundError):
            _ = indexer.fingerprint
        assert indexer.encoder is indexer.encoder is loaded[0]
        indexer.index([tmp_path])
        assert indexer.fingerprint == loaded[0].fingerprint
    assert len(loaded) == 1
