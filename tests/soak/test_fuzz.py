"""Damaged files of every format are read or skipped with one reason, within the limits, and with true line numbers.

EPIC_RAG_SOAK=1 reads 2,400 files; the default is a few of each format. A failure names the file's seed.
"""

from __future__ import annotations

import io
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epic_rag import EpicEncoder
from epic_rag_chroma import ChromaIndexer
from epic_rag_chroma.chunking import chunk_document
from epic_rag_chroma.reading.document import BrokenFileError, Document, NotTextError, split_lines
from epic_rag_chroma.reading.encoding import decode
from epic_rag_chroma.reading.worker import IsolatedReader
from tests.helpers.sample_files import SAMPLES, zipped
from tests.helpers.soak import SOAK, report

# Files of each format, and files in the folder that is indexed.
PER_FORMAT = -(-2400 // len(SAMPLES)) if SOAK else 5
IN_FOLDER = 600 if SOAK else 40

# Reasons that mean that no reader noticed the fault.
UNDECLARED = ("cannot be parsed", "crashes its parser", "takes longer", "needs more than", "the process that")
TOKENS = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[31m", b"\r", b"\r\n", b"\x85", b"\x0c", b"\xed\xa0\x80", b"&#0;", b"&#xD800;", b"<!--",
    b"<![CDATA[", b"]]>", b"{" * 3000, b"[" * 3000, b"<a>" * 3000, b"(" * 3000, b">" * 300, b'"', b"\\", b"```", b"\n---\n", b"\nFrom x 2020\n",
    b"\\u0000", b"\\ud800", b"\x00\xd8", b"9" * 400, b" " * 5000, b"\n" * 2000, b"*" * 999, b"\\begin{x}", b"#" * 50, b"\xe2\x80\xa8",
)  # fmt: skip


def mutated(name: str, seed: int) -> bytes:
    """Return a sample file with random damage."""
    rng = random.Random(f"{name}:{seed}")
    data = SAMPLES[name]
    if data.startswith(b"PK") and rng.random() < 0.7:
        data = _inside(data, rng)
        if rng.random() < 0.7:
            return data
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(MUTATIONS)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 4, 16, 64))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _splice(data: bytes, rng: random.Random) -> bytes:
    other = SAMPLES[rng.choice(list(SAMPLES))]
    first, second = rng.randrange(len(data) + 1), rng.randrange(len(other) + 1)
    return data[:first] + other[second : second + rng.choice((10, 100, 10_000))] + data[first:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    block = data[start : start + rng.choice((1, 8, 64, 512))]
    return data[:start] + block * rng.choice((2, 20, 300)) + data[start:]


def _cut(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 8, 64, 512)) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 3))):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(TOKENS) + data[at:]
    return data


def _suffix(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 100, 5000)))


def _replace(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    noise = rng.randbytes(rng.choice((1, 16, 256)))
    return data[:at] + noise + data[at + len(noise) :]


def _other(data: bytes, rng: random.Random) -> bytes:
    """Return the content of another format."""
    return SAMPLES[rng.choice(list(SAMPLES))]


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _flip, _truncate, _truncate, _splice, _repeat, _cut, _insert, _insert, _suffix, _replace, _other,
)  # fmt: skip


def _inside(data: bytes, rng: random.Random) -> bytes:
    """Damage, swap or empty members of an archive and keep it valid, to reach the parsers behind its checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = list(members)
    text = [name for name in names if name.endswith((".xml", ".xhtml", ".opf", ".rels"))]
    for _ in range(rng.choice((1, 2))):
        name, other = rng.choice(text), rng.choice(names)
        if rng.random() < 0.15:
            members[name], members[other] = members[other], members[name]
        elif rng.random() < 0.1:
            members[name] = b""
        else:
            members[name] = rng.choice(MUTATIONS)(members[name], rng)
    return zipped(members)


def is_part(text: str, whole: str) -> bool:
    """Return whether a text is the whole with some characters left out, such as front matter and, as "…", encoded data."""
    characters = iter(whole)
    return text in whole or all(character in characters for character in text.replace("…", ""))


def check(name: str, data: bytes, document: Document) -> None:
    """Check what must hold for every document."""
    lines = document.lines
    assert len(document.split_costs) == len(lines)
    for line in lines:
        assert "\0" not in line
        assert not {"\n", "\r"}.intersection(line)
        line.encode()  # no half of a surrogate pair
    assert [heading.line for heading in document.headings] == sorted(heading.line for heading in document.headings)
    for heading in document.headings:
        assert 0 <= heading.line < len(lines)
        assert "\0" not in heading.title
        assert heading.title == heading.title.strip()
    of_file = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n") + 1
    decoded: list[str] | None = None
    if document.spans is not None:
        assert len(document.spans) == len(lines)
        if data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            assert all(1 <= first <= last <= of_file for first, last in document.spans)
    elif document.pages is not None:
        assert len(document.pages) == len(lines)
        assert min(document.pages, default=0) >= 0
    else:
        decoded = split_lines(decode(data))
        assert len(lines) == len(decoded)
        assert all(map(is_part, lines, decoded))
    for chunk in chunk_document(
        document,
        max_tokens=40,
        overlap=5,
        count_tokens=lambda texts: [len(text.split()) + len(text) // 40 for text in texts],
    ):
        assert chunk.text.strip()
        if document.pages is not None:
            assert chunk.first_line is None
            assert chunk.page is None or 1 <= chunk.page <= max(document.pages)
            continue
        assert chunk.page is None
        assert chunk.first_line is not None
        assert chunk.last_line is not None
        assert 1 <= chunk.first_line <= chunk.last_line
        if decoded is not None:
            assert is_part(chunk.text, "\n".join(decoded[chunk.first_line - 1 : chunk.last_line]))


@pytest.fixture(scope="module")
def reader() -> Iterator[IsolatedReader]:
    with IsolatedReader() as made:
        yield made


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Counter[str]]:
    """Count files that were read and refused, for the report."""
    counted: Counter[str] = Counter()
    yield counted
    report("fuzz", {"formats": len(SAMPLES), **dict(sorted(counted.items()))})


def test_undamaged_samples(reader: IsolatedReader) -> None:
    for name, data in SAMPLES.items():
        document = reader.read(name, data)
        check(name, data, document)
        assert any(line.strip() for line in document.lines), name


@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_files(name: str, reader: IsolatedReader, outcomes: Counter[str]) -> None:
    for seed in range(PER_FORMAT):
        data = mutated(name, seed)
        outcomes["files"] += 1
        try:
            document = reader.read(name, data)
        except (BrokenFileError, NotTextError) as error:
            reason = str(error)
            assert 0 < len(reason) < 400, (seed, reason)
            assert "\n" not in reason, (seed, reason)
            assert not reason.startswith(UNDECLARED), (seed, reason)
            outcomes["refused"] += 1
            continue
        try:
            check(name, data, document)
        except (AssertionError, UnicodeError) as error:
            raise AssertionError(f"mutated({name!r}, {seed})") from error
        outcomes["read"] += 1


def test_index_of_damaged_files(tmp_path: Path, tiny_encoder: EpicEncoder, outcomes: Counter[str]) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    names = list(SAMPLES)
    paths = []
    for number in range(IN_FOLDER):
        name = names[number % len(names)]
        paths.append(f"{number}{name[1:]}")
        (folder / paths[-1]).write_bytes(mutated(name, 10_000 + number))
    with ChromaIndexer(folder / ".epic-rag", encoder=tiny_encoder) as indexer:
        report = indexer.index([folder])
        skipped = [file.path for file in report.skipped]
        assert len(skipped) == len(set(skipped))
        assert set(skipped) <= set(paths)
        assert report.added + len(skipped) == len(paths)
        reasons = {file.path: file.reason for file in report.skipped if file.reason.startswith(UNDECLARED)}
        assert not reasons
        again = indexer.index([folder])
        assert (again.unchanged, again.added, again.changed, again.deleted) == (report.added, 0, 0, 0)
        assert again.chunks_embedded == 0
        assert again.skipped == report.skipped
    outcomes["files of the indexed folder"] = len(paths)
