"""Folders, indexes of them, and what is in an index as plain Chroma sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer
from tests.helpers.indexes import FILES, Rows, read_rows, write_tree


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
