"""Documents outside an index: found, read and split as an index would do it, with the ids and metadata of its chunks.

For programs that store chunks elsewhere: `find_documents` walks a folder, `select_documents` applies the same rules to
a list of names, and a `DocumentSplitter` turns bytes into `ChunkRecord`s.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epic_rag.errors import MissingExtraError
from epic_rag_chroma.chunking import Chunk, chunk_document
from epic_rag_chroma.indexing.compatibility import chunk_sizes
from epic_rag_chroma.reading.document import HEADING_SEPARATOR, BrokenFileError, Document, Heading, NotTextError
from epic_rag_chroma.reading.file_types import byte_limit, kind_of, language_of, unread_format
from epic_rag_chroma.reading.worker import IsolatedReader
from epic_rag_chroma.store.paths import DocumentKey
from epic_rag_chroma.types import IndexSettings, SkippedFile
from epic_rag_chroma.walk.files import FoundFile, Scan, read_file, scan
from epic_rag_chroma.walk.generated import left_out
from epic_rag_chroma.walk.ignore import IgnorePatterns

if TYPE_CHECKING:
    from epic_rag import EpicEncoder

__all__ = [
    "DIGEST_LENGTH",
    "ChunkRecord",
    "DocumentSplitter",
    "SplitDocument",
    "chunk_records",
    "document_id",
    "find_documents",
    "select_documents",
    "text_hash",
]

logger = logging.getLogger(__name__)

DIGEST_LENGTH = 32
"""Hexadecimal digits of ids and hashes."""
Metadata = Mapping[str, "str | list[str]"]


@dataclass(frozen=True)
class ChunkRecord:
    """A chunk with its id and metadata.

    Args:
        id: Derived from the document, the embedded text and the shown text, so an unchanged chunk keeps its id.
        chunk: Its texts.
        metadata: As an index stores it, without None.
        embedded_hash: Hash of the text for the encoder.
    """

    id: str
    chunk: Chunk
    metadata: dict[str, Any]
    embedded_hash: str


@dataclass(frozen=True)
class SplitDocument:
    """The chunks of a document, or the reason why there are none.

    Args:
        digest: Hash of the document's bytes; "" if they could not be read.
        records: Its chunks.
        reason: Why it has none; "" if it was read.
        keep: Whether chunks of an earlier version stay: it may be readable again.
    """

    digest: str
    records: list[ChunkRecord] = field(default_factory=list)
    reason: str = ""
    keep: bool = False


def find_documents(root: Path, settings: IndexSettings) -> Scan:
    """Find the files below a local folder, by the rules of an index; see `epic_rag_chroma.walk.files.scan`."""
    return scan(root, settings)


def select_documents(names: Iterable[str], settings: IndexSettings) -> tuple[list[str], list[SkippedFile]]:
    """Apply the rules of an index to names alone, for files that are not on this machine.

    Args:
        names: Paths relative to a root, with slashes.
        settings: Its `include` and `exclude` patterns.

    Returns:
        The names to index, and the others that a user may look for, each with the reason. Hidden names and those that
        patterns exclude are in neither.
    """
    include = IgnorePatterns(settings.include, "include") if settings.include else None
    exclude = IgnorePatterns(settings.exclude, "exclude") if settings.exclude else None
    chosen: list[str] = []
    skipped: list[SkippedFile] = []
    for name in names:
        parts = name.split("/")
        if any(part.startswith(".") for part in parts) or (exclude is not None and exclude.decide(name, False)):
            continue
        reason = f"not text: {unread_format(name)}" if unread_format(name) else ""
        if include is not None:
            if not include.selects(name):
                continue
        elif not reason and (rule := left_out(name, False)):
            reason = f"{rule}; --include reads it"
        if reason:
            skipped.append(SkippedFile(name, reason))
        else:
            chosen.append(name)
    return chosen, skipped


class DocumentSplitter:
    """Splits documents into chunks; a context manager. Damaged and hostile documents are read in a worker process.

    Args:
        encoder: Counts tokens.
        settings: Chunk sizes; None for the defaults.

    Raises:
        ConfigError: If the chunks are longer than the model's input.
    """

    def __init__(self, encoder: EpicEncoder, settings: IndexSettings | None = None) -> None:
        self._encoder = encoder
        self._max_tokens, self._overlap, self._window = chunk_sizes(settings or IndexSettings(), encoder)
        self._reader = IsolatedReader()

    def __enter__(self) -> DocumentSplitter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker process, if there is one; the next document starts another."""
        self._reader.close()

    @staticmethod
    def byte_limit(name: str) -> int:
        """Return the size above which a document of that name is not read."""
        return byte_limit(name)

    def split_file(self, root: str, file: FoundFile) -> SplitDocument:
        """Read and split a file that `find_documents` found.

        Args:
            root: The folder that its path is relative to, as it is to stand in the metadata.
            file: The file.
        """
        try:
            data, _ = read_file(file)
        except FileNotFoundError:
            return SplitDocument("", reason="deleted while the run was at work")
        except OSError as error:
            return SplitDocument("", reason=f"cannot be read: {error.strerror}", keep=True)
        except NotTextError as error:
            return SplitDocument("", reason=str(error))
        return self.split(root, file.path, data, named=file.named)

    def split(
        self,
        root: str,
        path: str,
        data: bytes,
        *,
        name: str | None = None,
        title: str = "",
        metadata: Metadata | None = None,
        named: bool = False,
    ) -> SplitDocument:
        """Split a document.

        Args:
            root: The folder or archive that it is from.
            path: Its path there, or any name that is unique there.
            data: Its bytes.
            name: A file name whose suffix selects the reader; None takes `path`.
            title: A heading above all of its text.
            metadata: Added to what its front matter says.
            named: Whether the user asked for it; see `read_document`.
        """
        name = name or path
        digest = hashlib.sha256(data).hexdigest()[:DIGEST_LENGTH]
        try:
            document = self._reader.read(name, data, named=named)
        except NotTextError as error:
            return SplitDocument(digest, reason=str(error))
        except (BrokenFileError, MissingExtraError) as error:
            return SplitDocument(digest, reason=str(error), keep=True)
        except Exception as error:  # a parser's bug with one document must not stop the run
            logger.warning("cannot parse %s", path, exc_info=True)
            return SplitDocument(digest, reason=f"cannot be parsed: {type(error).__name__}: {error}", keep=True)
        if title:
            document = _with_title(document, title)
        chunks = chunk_document(
            document,
            max_tokens=self._max_tokens,
            overlap=self._overlap,
            window=self._window,
            count_tokens=self._encoder.count_tokens,
        )
        front_matter = {**document.metadata, **(metadata or {})}
        return SplitDocument(digest, list(chunk_records((root, path), digest, chunks, front_matter, name=name)))


def chunk_records(
    key: DocumentKey, digest: str, chunks: Sequence[Chunk], front_matter: Metadata, *, name: str | None = None
) -> Iterator[ChunkRecord]:
    """Yield the chunks of a document with ids and metadata.

    Args:
        key: Root and path of the document.
        digest: Hash of its bytes.
        chunks: All of its chunks.
        front_matter: Metadata of the document.
        name: A name whose suffix selects the format; None takes the path.
    """
    root, path = key
    document = document_id(key)
    kind, lang = kind_of(name or path), language_of(name or path)
    seen: Counter[tuple[str, str]] = Counter()
    for position, chunk in enumerate(chunks, start=1):
        content = (chunk.embedded, chunk.text)
        chunk_id = text_hash(document, *content, str(seen[content]))
        seen[content] += 1
        embedded_hash = text_hash(chunk.embedded)
        metadata: dict[str, Any] = {
            "path": path,
            "root": root,
            "doc_id": document,
            "content_hash": digest,
            "chunks": len(chunks),
            "position": position,
            "heading_path": HEADING_SEPARATOR.join(chunk.heading_path),
            "first_line": chunk.first_line,
            "last_line": chunk.last_line,
            "page": chunk.page,
            "kind": kind,
            "lang": lang,
            "embedded_hash": embedded_hash,
            "front_matter": json.dumps(front_matter, ensure_ascii=False) if front_matter else None,
            # What is searched, where that is not the shown text: escapes decoded, without markup.
            "words": chunk.words if chunk.words != chunk.text else None,
        }
        # Chroma cannot store None, and stored metadata is compared with this.
        metadata = {name: value for name, value in metadata.items() if value is not None}
        yield ChunkRecord(chunk_id, chunk, metadata, embedded_hash)


def document_id(key: DocumentKey) -> str:
    """Return the id of a document in an index."""
    return text_hash(*key)


def text_hash(*parts: str) -> str:
    """Return the hash of texts, hexadecimal."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:DIGEST_LENGTH]


def _with_title(document: Document, title: str) -> Document:
    return replace(document, headings=[Heading(0, 0, " ".join(title.split()), 0), *document.headings])
