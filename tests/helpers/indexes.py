"""Folders to index, indexes of them, and their rows as plain Chroma returns them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chromadb
import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer

Rows = dict[str, tuple[str, dict[str, Any], list[float]]]

FILES = {
    "guide.md": "# Guide\n\n## Install\n\nRun the installer, then read the manual.\n\n## Remove\n\nDelete the folder.\n",
    "notes.txt": "Cats sleep most of the day.\nThey wake up for food.\n",
    "src/tool.py": "def encode(texts):\n    result = list(texts)\n    return result\n",
}

TEXTS = [
    "",
    "one\n",
    "two\n\nparagraphs of text\n",
    "# A\n\ntext\n\n## B\n\nmore text\n",
    "# A\n\ntext\n\n## B\n\nother text\n\n## C\n\nlast\n",
    "same\n\n# S\n\nsame\n\n# S\n\nsame\n",
    "word " * 150 + "\n",
]


def read_rows(index_dir: Path) -> Rows:
    """Return all rows of an index through a plain Chroma client: id -> text, metadata, vector."""
    client = chromadb.PersistentClient(str(index_dir / "chroma"))
    try:
        rows = client.get_collection("epic_rag", embedding_function=None).get(
            include=["documents", "metadatas", "embeddings"]
        )
    finally:
        client.close()
    return {
        row: (text, dict(metadata), [float(value) for value in vector])
        for row, text, metadata, vector in zip(
            rows["ids"], rows["documents"], rows["metadatas"], rows["embeddings"], strict=True
        )
    }


def write_tree(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def run(folder: Path, encoder: EpicEncoder, *, batch_chunks: int | None = None, **options: Any) -> Any:
    with ChromaIndexer(folder / ".epic-rag", encoder=encoder, batch_chunks=batch_chunks) as indexer:
        return indexer.index([folder], **options)


def start(folder: Path) -> Path:
    """Write five files to a folder."""
    for name, text in {"a.md": TEXTS[3], "grown.md": TEXTS[1], "gone.md": TEXTS[2], "moved.md": TEXTS[4]}.items():
        write(folder, name, text)
    write(folder, "sub/kept.md", TEXTS[5])
    return folder


def assert_same(found: Rows, expected: Rows) -> None:
    assert {row: value[:2] for row, value in found.items()} == {row: value[:2] for row, value in expected.items()}
    for row, value in found.items():
        assert value[2] == pytest.approx(expected[row][2], abs=1e-4)


def texts_found(folder: Path, encoder: EpicEncoder) -> set[tuple[str, str]]:
    """Return path and text of all chunks that queries find."""
    with ChromaIndexer(folder / ".epic-rag", encoder=encoder) as indexer:
        return {(hit.path, hit.text) for hit in indexer.query("x", k=1000, mode="dense", collapse=False)}
