"""Containers that are broken, encrypted or hostile, or that need a missing package."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import pytest

from epic_rag.errors import MissingExtraError
from epic_rag_chroma.reading.document import BrokenFileError
from epic_rag_chroma.reading.file_types import unread_format
from epic_rag_chroma.reading.reader import read_document
from tests.helpers.sample_files import SAMPLES, zipped

CONTAINERS = ("docx", "pptx", "xlsx", "epub", "odt", "ipynb", "eml", "mbox", "rtf", "pdf")


def with_member(data: bytes, member: str, change: Mapping[str, str]) -> bytes:
    """Replace text in one member of an archive."""
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    text = members[member].decode()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new, 1)
    members[member] = text.encode()
    return zipped(members)


EXPANDING = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>'
READING = '<!DOCTYPE x [<!ENTITY c SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize("doctype", [EXPANDING, READING])
def test_xml_entities(doctype: str) -> None:
    for name, member, place, first in [
        ("a.odt", "content.xml", "Reset", "<office:document-content"),
        ("a.docx", "word/document.xml", "Delete the folder.", "<w:document"),
        ("a.pptx", "ppt/slides/slide1.xml", "Reset softly", "<p:sld"),
        ("a.epub", "OEBPS/content.opf", "Moby-Dick", "<package"),
        ("a.epub", "OEBPS/text/one.xhtml", "Call me", "<html"),
    ]:
        data = with_member(
            SAMPLES[name],
            member,
            {place: "Before &c; after", first: doctype + first}
            if member[-5:] != "xhtml"
            else {place: "Before &c; after", "<!DOCTYPE html>": doctype},
        )
        try:
            text = "\n".join(read_document(name, data).lines)
        except BrokenFileError:
            continue
        assert "aaaaaaaaaa" not in text.replace("&a;", "").partition("Before")[2]
        assert "root:" not in text


@pytest.mark.parametrize("name", [name for name in SAMPLES if name.split(".")[1] in CONTAINERS])
@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"\0" * 100, b"<p>text</p>", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600]
)
def test_wrong_format(name: str, data: bytes) -> None:
    assert not unread_format(name)
    with pytest.raises(BrokenFileError) as caught:
        read_document(name, data)
    assert "\n" not in str(caught.value)


def test_encrypted_office_files() -> None:
    data = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600 + "EncryptedPackage".encode("utf-16-le")
    for name in ("a.docx", "a.pptx"):
        with pytest.raises(BrokenFileError, match="an encrypted"):
            read_document(name, data)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lxml", "a.docx"),
        ("lxml", "a.pptx"),
        ("lxml", "a.xlsx"),
        ("striprtf.striprtf", "a.rtf"),
        ("lxml", "a.epub"),
        ("lxml", "a.odt"),
        ("justhtml", "a.epub"),
    ],
)
def test_missing_package(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"epic-rag\[index\]"):
        read_document(name, SAMPLES[name])
