"""Folders, indexes of them, and what is in an index as plain Chroma sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def read_rows(index_dir: Path) -> Rows:
    """All rows of an index through a client of Chroma's own: id -> text, metadata, vector."""
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


def make_pdf(pages: list[str]) -> bytes:
    """A PDF with a line of text on each page."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    kids = []
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for text in pages:
        stream = b"BT /F1 12 Tf 72 720 Td (" + text.encode("latin-1") + b") Tj ET"
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R"
            b" /Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(pages))
    out = b"%PDF-1.4\n"
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    return out + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], Rows]:
    return read_rows


@pytest.fixture(scope="session")
def tree() -> Callable[[Path, dict[str, str | bytes]], Path]:
    return write_tree


@pytest.fixture(scope="session")
def pdf() -> Callable[[list[str]], bytes]:
    return make_pdf


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder of three files."""
    return write_tree(tmp_path / "docs", dict(FILES))


@pytest.fixture
def indexer(docs: Path, tiny_encoder: EpicEncoder) -> Iterator[ChromaIndexer]:
    """An indexer for docs/.epic-rag, which does not exist yet."""
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as made:
        yield made
