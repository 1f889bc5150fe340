"""Hostile zip archives: bombs, false headers, sparse sheets, deep trees. Each costs only its own file, and little time."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from epic_rag_chroma.reading import containers as limits
from epic_rag_chroma.reading.containers import Archive
from epic_rag_chroma.reading.document import BrokenFileError
from epic_rag_chroma.reading.reader import read_document
from epic_rag_chroma.reading.worker import IsolatedReader
from tests.helpers.sample_files import SAMPLES, make_book, make_odt, zipped

ARCHIVES = ("a.docx", "a.pptx", "a.xlsx", "a.epub", "a.odt")


CORNERS = '<row r="1"><c r="A1"><v>1</v></c></row><row r="1048576"><c r="XFD1048576"><v>2</v></c></row>'


@pytest.fixture(scope="module")
def reader() -> Iterator[IsolatedReader]:
    with IsolatedReader() as made:
        yield made


def members_of(data: bytes) -> dict[str, str | bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SAMPLES[name]
    sizes = [len(content) for content in members_of(data).values()]
    for limit, value, reason in [
        ("MAX_MEMBERS", len(sizes) - 1, "more than .* parts"),
        ("MAX_MEMBER_BYTES", max(sizes) - 1, "a part above"),
        ("MAX_TOTAL_BYTES", sum(sizes) - 1, "MiB in the parts"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(limits, limit, value)
            with pytest.raises(BrokenFileError, match=reason):
                read_document(name, data)
            patch.setattr(limits, limit, value + 1)
            read_document(name, data)


@pytest.mark.parametrize("name", ARCHIVES)
def test_zip_bomb(name: str) -> None:
    bomb = zipped({**members_of(SAMPLES[name]), "word/media/a.xml": b"\0" * (64 * 2**20)})
    assert len(bomb) < 200_000
    with pytest.raises(BrokenFileError, match="compressed more than 250 times"):
        read_document(name, bomb)


def test_long_member() -> None:
    body = "".join(f"<text:p>Line {number} of a long report.</text:p>" for number in range(150_000))
    assert len(read_document("a.odt", make_odt(body)).lines) == 299_999


def test_nested_archive() -> None:
    inner = make_book({"secret.xhtml": "<p>nested</p>"})
    document = read_document("a.epub", make_book({"one.xhtml": "<p>outer</p>"}, extra={"OEBPS/inner.epub": inner}))
    assert "nested" not in "".join(document.lines)


def lying(data: bytes, name: str, size: int) -> bytes:
    """Change the size of one member in the directory of an archive."""
    at = data.rindex(name.encode()) - 46
    assert data[at : at + 4] == b"PK\x01\x02"
    return data[: at + 24] + struct.pack("<I", size) + data[at + 28 :]


@pytest.mark.parametrize("size", [0, 10, 200, 2**32 - 2])
def test_false_directory(size: int) -> None:
    with pytest.raises(BrokenFileError):
        read_document("a.odt", lying(make_odt(), "content.xml", size))


def test_false_member_size() -> None:
    data = lying(zipped({"big": b"x" * 10**7}), "big", 1000)
    archive = Archive(data, "archive")
    with pytest.raises(BrokenFileError, match="CRC"):
        archive.read("big")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression(method: int) -> None:
    with pytest.raises(BrokenFileError, match="unknown compression"):
        Archive(zipped({"a": b"x"}, compression=method), "archive")


def test_encrypted_member() -> None:
    data = bytearray(make_odt())
    at = data.rindex(b"content.xml") - 46
    data[at + 8] |= 1
    with pytest.raises(BrokenFileError, match="an encrypted OpenDocument file"):
        read_document("a.odt", bytes(data))


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "C:\\escaped", "a/../../../escaped"])
def test_member_names_touch_no_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    before = sorted(tmp_path.rglob("*"))
    for sample in ARCHIVES:
        read_document(sample, zipped({**members_of(SAMPLES[sample]), name: "<x/>"}))
    assert sorted(tmp_path.rglob("*")) == before


def sheet(cells: str) -> bytes:
    members = members_of(SAMPLES["a.xlsx"])
    space = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    members["xl/worksheets/sheet1.xml"] = f'<worksheet xmlns="{space}"><sheetData>{cells}</sheetData></worksheet>'
    return zipped(members)


def test_sparse_sheet() -> None:
    document = read_document("a.xlsx", sheet(CORNERS))
    assert document.lines[:3] == ["1", "", "2"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("deep.odt", make_odt(f"<text:p>{'<text:span>' * 100_000}x{'</text:span>' * 100_000}</text:p>")),
        ("deep.ipynb", b'{"cells":' + b"[" * 500_000),
        ("deep.pdf", b"%PDF-1.4\n" + b"[" * 500_000),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_worker_limits_hold_for_archives(name: str, data: bytes, reader: IsolatedReader) -> None:
    with pytest.raises(BrokenFileError) as caught:
        reader.read(name, data)
    assert "takes longer" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("deep.epub", make_book({"one.xhtml": "<div>" * 10_000 + "deep"})),
        ("deep.html", b"<div>" * 10_000 + b"deep"),
        ("deep.eml", b"Subject: deep\n" + b"Content-Type: multipart/mixed; boundary=a\n\n--a\n" * 300),
        ("deep.rtf", b"{\\rtf1 deep" + b"{" * 500_000),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_deep_nesting_is_read(name: str, data: bytes, reader: IsolatedReader) -> None:
    assert reader.read(name, data).lines[-1].startswith("deep")
