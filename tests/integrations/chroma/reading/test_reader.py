"""`read_document`: encodings, file types, HTML, PDF."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

import pytest

from epic_rag.errors import MissingExtraError
from epic_rag_chroma.chunking import chunk_document
from epic_rag_chroma.reading.document import BrokenFileError, NotTextError, split_lines
from epic_rag_chroma.reading.encoding import decode
from epic_rag_chroma.reading.file_types import kind_of, unread_format
from epic_rag_chroma.reading.reader import read_document

PAGE = """<!DOCTYPE html>
<html><head><title>Site | Page</title>
<style>p { color: red }</style></head>
<body>
<nav><a href="/">Home</a></nav>
<main>
<h1>Guide<a class="headerlink" href="#g">¶</a></h1>
<p>First
paragraph with <b>bold</b> text &amp; more.</p>
<script>alert("never")</script>
<h2>Steps</h2>
<ul>
<li>one</li>
<li>two</li>
</ul>
<pre>
$ run it
    indented
</pre>
<table><tr><th>Key</th><th>Value</th></tr>
<tr><td>a</td><td>1</td></tr></table>
<!-- a comment -->
</main>
<footer>imprint</footer>
</body></html>
"""


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("héllo".encode(), "héllo"),
        ("héllo".encode("utf-8-sig"), "héllo"),
        ("héllo".encode("utf-16"), "héllo"),
        ("héllo €".encode("cp1252"), "héllo €"),
        (b"\x81\xe9", "\x81é"),
        (b"", ""),
    ],
)
def test_encodings(data: bytes, text: str) -> None:
    assert decode(data) == text


@pytest.mark.parametrize("data", [b"a\0b", bytes(range(1, 256)), b"\xff\xfea", "a\0".encode("utf-16")])
def test_binary_content(data: bytes) -> None:
    with pytest.raises(NotTextError, match="not text"):
        read_document("notes.txt", data)


def test_names() -> None:
    assert unread_format("photo.PNG")
    assert not unread_format("README")
    kinds = {"a.MD": "markdown", "a.rst": "rst", "a.htm": "html", "a.pdf": "pdf", "a.rs": "code", "LICENSE": "text"}
    assert {name: kind_of(name) for name in kinds} == kinds


def test_line_ends() -> None:
    assert split_lines("a\r\nb\rc\nd\fe\x85f\u2028g") == ["a", "b", "c", "d\fe\x85f\u2028g"]


def test_html() -> None:
    chunks = chunk_document(read_document("p.html", PAGE.encode()), max_tokens=60, overlap=0, count_tokens=count_words)
    assert [(chunk.heading_path, chunk.first_line, chunk.last_line) for chunk in chunks] == [
        (("Guide",), 7, 9),
        (("Guide", "Steps"), 11, 21),
    ]
    assert chunks[0].text == "Guide\n\nFirst paragraph with bold text & more."
    assert chunks[1].text.splitlines() == [
        "Steps", "", "- one", "- two", "", "$ run it", "    indented", "", "Key | Value", "a | 1",
    ]  # fmt: skip
    assert not any(word in chunk.text for chunk in chunks for word in ("never", "Home", "imprint", "comment", "color"))


def test_html_title() -> None:
    data = b"<title>My page</title><p>one<p>two<br>three"
    chunks = chunk_document(read_document("p.html", data), max_tokens=60, overlap=0, count_tokens=count_words)
    assert [(chunk.heading_path, chunk.text) for chunk in chunks] == [(("My page",), "one\n\ntwo\nthree")]


def test_html_lines() -> None:
    body = "\n".join(f"<p>\n  paragraph {number} marker{number}\n</p>" for number in range(40))
    data = f"<body>\n{body}\n</body>".encode()
    source = data.decode().split("\n")
    chunks = chunk_document(read_document("p.html", data), max_tokens=12, overlap=0, count_tokens=count_words)
    assert len(chunks) > 5
    for chunk in chunks:
        shown = "\n".join(source[chunk.first_line - 1 : chunk.last_line])  # type: ignore[operator]
        assert all(word in shown for word in chunk.text.split())


@pytest.mark.parametrize(
    "data", [b"<" * 5000, b"<div>" * 5000 + b"deep", b"\xff\xfe<\0p\0>\0x\0", b"<p", b"", b"<![CDATA["]
)
def test_hostile_html(data: bytes) -> None:
    with suppress(NotTextError):
        read_document("p.html", data)


def test_pdf_pages(pdf: Callable[[list[str]], bytes]) -> None:
    document = read_document("a.pdf", pdf(["Hello from one", "Second page here"]))
    chunks = chunk_document(document, max_tokens=60, overlap=0, count_tokens=count_words)
    assert [(chunk.page, chunk.first_line, chunk.text) for chunk in chunks] == [
        (1, None, "Hello from one"),
        (2, None, "Second page here"),
    ]


@pytest.mark.parametrize("data", [b"", b"%PDF-1.4 broken", b"no pdf at all"])
def test_broken_pdf(data: bytes) -> None:
    with pytest.raises(BrokenFileError, match="broken PDF"):
        read_document("a.pdf", data)


def test_truncated_pdf(pdf: Callable[[list[str]], bytes]) -> None:
    whole = pdf(["Hello from one", "Second page here"])
    for length in range(0, len(whole), 37):
        with suppress(BrokenFileError, NotTextError):
            read_document("a.pdf", whole[:length])


def test_pdf_without_text(pdf: Callable[[list[str]], bytes]) -> None:
    with pytest.raises(NotTextError, match="without text"):
        read_document("a.pdf", pdf([""]))


def test_encrypted_pdf(pdf: Callable[[list[str]], bytes]) -> None:
    import io

    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf(["secret"])))
    writer.encrypt("password", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    with pytest.raises(BrokenFileError, match="encrypted"):
        read_document("a.pdf", out.getvalue())


@pytest.mark.parametrize(("module", "name"), [("pypdfium2", "a.pdf"), ("justhtml", "a.html")])
def test_missing_package(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"epic-rag\[index\]"):
        read_document(name, b"<p>x</p>")
