"""Sources of a corpus: local folders, folders on object stores, and archives with many documents in a file.

An archive is a WARC file (`.warc`, `.warc.gz`: pages of a crawl) or compressed JSON lines (`.jsonl.gz`, `.jsonl.zst`: a
document a line). A line has its text under "text", "content" or "body", and perhaps a name ("id", "_id", "docid",
"path", "url"), a "title" and "metadata". Other files are read as an index reads them.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from epic_rag.errors import DataError, MissingExtraError, reason_of
from epic_rag_chroma import DocumentSplitter, FoundFile, IndexSettings, SkippedFile, find_documents, select_documents
from epic_rag_ray.storage import is_remote_address, open_filesystem

__all__ = ["ArchivedDocument", "SourceFile", "Sources", "find_sources", "is_archive", "read_archive", "read_source"]

_JSON_LINES = (".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst")
_WARC = (".warc", ".warc.gz")
_TEXT_KEYS = ("text", "content", "contents", "body")
_NAME_KEYS = ("id", "_id", "docid", "path", "url")
# Formats of web pages by their media type; pages of other types are not read.
_SUFFIXES = {
    "text/html": ".html",
    "application/xhtml+xml": ".html",
    "text/plain": ".txt",
    "text/markdown": ".md",
    "application/pdf": ".pdf",
}
_MOST_LINE_BYTES = 32 * 2**20
# What is read at a time; as much is lost before the damage of an archive.
_BUFFER = 2**16


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus.

    Args:
        address: Its full path or address.
        root: The folder that `path` is relative to; the address itself for an archive.
        path: Relative to the root, with slashes.
        size: In bytes.
        stamp: What changes when the file does: its modification time.
        named: Whether the user named it; then no content excludes it.
    """

    address: str
    root: str
    path: str
    size: int
    stamp: str
    named: bool = False


@dataclass
class Sources:
    """Result of listing a corpus; the files below `unreadable` addresses are unknown."""

    files: list[SourceFile] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ArchivedDocument:
    """A document of an archive, or the reason why one cannot be read.

    Args:
        path: Its name in the archive.
        data: Its bytes.
        name: A name whose suffix selects the reader.
        title: Its title.
        metadata: Its metadata.
        reason: "" if it was read.
    """

    path: str
    data: bytes = b""
    name: str = ""
    title: str = ""
    metadata: Mapping[str, str | list[str]] = field(default_factory=dict)
    reason: str = ""


def is_archive(path: str) -> bool:
    """Return whether a file holds many documents, by its name."""
    return path.lower().endswith((*_JSON_LINES, *_WARC))


def find_sources(roots: Sequence[str], settings: IndexSettings) -> Sources:
    """List the files of a corpus, sorted by root and path.

    Args:
        roots: Absolute local paths, and addresses of other file systems.
        settings: The rules for files.

    Raises:
        DataError: If a root does not exist or cannot be listed.
    """
    result = Sources()
    for root in roots:
        (_find_remote if is_remote_address(root) else _find_local)(root, settings, result)
    return result


def _find_local(root: str, settings: IndexSettings, result: Sources) -> None:
    location = Path(root)
    if not location.exists():
        raise DataError(f"No such file or folder: {root}. Check the path.")
    found = find_documents(location, settings)
    base = location if location.is_dir() else location.parent
    files = list(found.files)
    for skipped in found.skipped:
        # The walk knows archives of programs only.
        if is_archive(skipped.path) and skipped.reason.startswith("not text"):
            files.append(FoundFile(skipped.path, base / skipped.path))
        else:
            result.skipped.append(SkippedFile(f"{base}/{skipped.path}", skipped.reason))
    result.unreadable += [f"{base}/{path}" if path else str(base) for path in found.unreadable]
    for file in sorted(files, key=lambda each: each.path):
        try:
            info = file.location.stat()
        except OSError as error:
            result.skipped.append(SkippedFile(f"{base}/{file.path}", f"cannot be read: {error.strerror}"))
            continue
        address = str(file.location)
        archive = is_archive(file.path)
        result.files.append(
            SourceFile(
                address,
                f"{base}/{file.path}" if archive else str(base),
                file.path,
                info.st_size,
                str(info.st_mtime_ns),
                file.named,
            )
        )


def _find_remote(root: str, settings: IndexSettings, result: Sources) -> None:
    filesystem, base = open_filesystem(root)
    scheme = root.partition("://")[0]
    try:
        info = filesystem.get_file_info(base)
        if info.type == fs.FileType.NotFound:
            raise DataError(f"No such file or folder: {root}. Check the address.")
        entries = [info] if info.type == fs.FileType.File else None
        if entries is None:
            entries = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
    except OSError as error:
        raise DataError(f"{root} cannot be listed ({reason_of(error)}). Check address and credentials.") from error
    folder = base.rpartition("/")[0] if len(entries) == 1 and entries[0].path == base else base
    by_name = {entry.path[len(folder) + 1 :]: entry for entry in entries if entry.type == fs.FileType.File}
    names, skipped = select_documents(by_name, settings)
    archives = {each.path for each in skipped if is_archive(each.path)}
    result.skipped += [
        SkippedFile(f"{scheme}://{folder}/{each.path}", each.reason) for each in skipped if each.path not in archives
    ]
    for name in sorted({*names, *archives}):
        entry = by_name[name]
        address = f"{scheme}://{entry.path}"
        own_root = address if is_archive(name) else f"{scheme}://{folder}"
        result.files.append(SourceFile(address, own_root, name, entry.size or 0, str(entry.mtime_ns or ""), False))


def read_source(source: SourceFile) -> bytes:
    """Read a file of another file system.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is larger than its format allows.
    """
    limit = DocumentSplitter.byte_limit(source.path)
    filesystem, path = open_filesystem(source.address)
    with filesystem.open_input_stream(path, compression=None) as stream:
        data = bytes(stream.read(limit + 1))
    if len(data) > limit:
        raise ValueError(f"larger than {limit // 2**20} MiB")
    return data


def read_archive(source: SourceFile) -> Iterator[ArchivedDocument]:
    """Yield the documents of an archive.

    A document that cannot be read is yielded with the reason. A damaged archive ends with one whose path is "": the
    documents before the damage were yielded.
    """
    is_warc = source.path.lower().endswith(_WARC)
    read: Callable[[Any], Iterator[ArchivedDocument]] = _read_warc if is_warc else _read_json_lines
    count = 0
    try:
        filesystem, path = open_filesystem(source.address)
        with filesystem.open_input_stream(path, compression=None if is_warc else "detect") as stream:
            for document in read(stream):
                count += 1
                yield document
    except (OSError, EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException, ValueError) as error:
        yield ArchivedDocument("", reason=f"the archive is damaged behind document {count}: {reason_of(error)}")


def _read_json_lines(stream: pa.NativeFile) -> Iterator[ArchivedDocument]:
    lines = io.BufferedReader(_Raw(stream), _BUFFER)
    number = 0
    while line := lines.readline(_MOST_LINE_BYTES):
        number += 1
        if not line.strip():
            continue
        if len(line) == _MOST_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = lines.readline(_MOST_LINE_BYTES)
            yield ArchivedDocument(str(number), reason=f"line {number} is longer than {_MOST_LINE_BYTES // 2**20} MiB")
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield ArchivedDocument(str(number), reason=f"line {number} is not valid JSON ({reason_of(error)})")
            continue
        texts = [row[key] for key in _TEXT_KEYS if isinstance(row.get(key), str)] if isinstance(row, dict) else []
        if not texts:
            yield ArchivedDocument(str(number), reason=f'line {number} has no "text"')
            continue
        name = next((str(row[key]) for key in _NAME_KEYS if isinstance(row.get(key), (str, int))), str(number))
        title = row.get("title")
        yield ArchivedDocument(
            _valid(name),
            _valid(texts[0]).encode(),
            "document.txt",
            _valid(title) if isinstance(title, str) else "",
            _metadata(row.get("metadata")),
        )


def _read_warc(stream: pa.NativeFile) -> Iterator[ArchivedDocument]:
    try:
        from warcio.archiveiterator import ArchiveIterator
    except ImportError as error:
        raise MissingExtraError("warcio", "ray", "reading WARC files") from error
    limit = max(DocumentSplitter.byte_limit(f"page{suffix}") for suffix in _SUFFIXES.values())
    number = 0
    for record in ArchiveIterator(io.BufferedReader(_Raw(stream), _BUFFER)):
        number += 1
        if record.rec_type not in ("response", "resource", "conversion"):
            continue
        address = _valid(record.rec_headers.get_header("WARC-Target-URI") or str(number)).strip("<>")
        headers = record.http_headers or record.rec_headers
        if record.http_headers is not None and not str(record.http_headers.get_statuscode()).startswith("2"):
            continue
        kind = (headers.get_header("Content-Type") or "text/plain").split(";")[0].strip().lower()
        if kind not in _SUFFIXES:
            if not kind.startswith(("image/", "video/", "audio/", "font/")):
                yield ArchivedDocument(address, reason=f"not text: {kind}")
            continue
        data = record.content_stream().read(limit + 1)
        if len(data) > limit:
            yield ArchivedDocument(address, reason=f"larger than {limit // 2**20} MiB")
            continue
        suffix = _SUFFIXES[kind]
        known = urlsplit(address).path.lower().endswith((".md", ".rst"))
        name = urlsplit(address).path.rpartition("/")[2] if known and suffix == ".txt" else f"page{suffix}"
        yield ArchivedDocument(address, data, name)


class _Raw(io.RawIOBase):
    """A pyarrow stream as a raw stream of Python, for readers that want one."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _metadata(value: object) -> dict[str, str | list[str]]:
    """Return the entries of a JSON object that front matter may have: strings, numbers and lists of strings."""
    found: dict[str, str | list[str]] = {}
    for key, entry in value.items() if isinstance(value, dict) else ():
        if isinstance(entry, (str, int, float)):
            found[str(key)] = _valid(str(entry))
        elif isinstance(entry, list) and all(isinstance(each, str) for each in entry):
            found[str(key)] = [_valid(each) for each in entry]
    return found


def _valid(text: str) -> str:
    """Replace lone surrogates, which JSON may escape and UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
