"""EPUB: every document of the spine, in order, of every package."""

from __future__ import annotations

import pytest

from epic_rag_chroma.reading.document import BrokenFileError
from epic_rag_chroma.reading.reader import read_document
from tests.helpers.sample_files import make_book, zipped

POEMS = [f"The heron of verse {number} stands still." for number in range(15)]


def text_of(book: bytes) -> list[str]:
    return [line for line in read_document("a.epub", book).lines if line]


@pytest.mark.parametrize("element", ["article", "section", "div"])
def test_all_parts_of_one_document(element: str) -> None:
    body = "".join(f"<{element}><p>{poem}</p></{element}>" for poem in POEMS)
    assert text_of(make_book({"poems.xhtml": body}))[1:] == POEMS


def test_many_documents_in_the_order_of_the_spine() -> None:
    chapters = {f"{15 - number}.xhtml": f"<p>{poem}</p>" for number, poem in enumerate(POEMS)}
    assert text_of(make_book({**chapters, "empty.xhtml": "<p/>"}))[1:] == POEMS


def package(title: str, items: str, spine: str = "") -> str:
    return f'<package xmlns="http://www.idpf.org/2007/opf"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title></metadata><manifest>{items}</manifest><spine>{spine}</spine></package>'


def item(key: str, href: str, kind: str = "application/xhtml+xml") -> str:
    return f'<item id="{key}" href="{href}" media-type="{kind}"/>'


def test_several_packages_other_types_and_names() -> None:
    files = "".join(f'<rootfile full-path="{name}.opf"/>' for name in ("one", "two", "gone"))
    members = {
        "META-INF/container.xml": f'<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>{files}</rootfiles></container>',
        "one.opf": package(
            "First",
            item("a", "A%20b.xhtml") + item("x", "x.HTML", "application/octet-stream"),
            '<itemref idref="x"/><itemref idref="a"/>',
        ),
        "two.opf": package("Second", item("a", "a b.xhtml") + item("c", "c.xhtml")),
        "a b.xhtml": "<p>Shared</p>",
        "x.html": "<p>By its name</p>",
        "c.xhtml": "<p>Without a spine</p>",
    }
    assert text_of(zipped(members)) == ["First", "By its name", "Shared", "Second", "Without a spine"]
    del members["META-INF/container.xml"]
    assert "Shared" in text_of(zipped(members))
    with pytest.raises(BrokenFileError, match="names no package"):
        text_of(zipped({"c.xhtml": "<p>x</p>"}))
