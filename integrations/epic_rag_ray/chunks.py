"""Reading and splitting: files and archives in, rows of passages and of failures out.

`FileChunker` is a class for `ray.data.Dataset.map_batches`; the pipeline (`job`) uses its `rows`. A document that
cannot be read is a row with the reason.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from epic_rag.errors import EpicError, MissingExtraError, reason_of
from epic_rag_chroma import ChunkRecord, DocumentSplitter, FoundFile, IndexSettings, SplitDocument
from epic_rag_ray.encoder import assigned_threads, load_encoder, use_threads
from epic_rag_ray.parts import CHUNK_FIELDS
from epic_rag_ray.sources import SourceFile, is_archive, read_archive, read_source
from epic_rag_ray.storage import is_remote_address

if TYPE_CHECKING:
    import os

    from epic_rag import EpicEncoder

__all__ = ["BANDS", "CHUNK_SCHEMA", "FileChunker", "Outcome", "band_keys", "chunk_table", "shingles"]

# MinHash of 8 bands of 8 hashes: of two texts that share 0.9 of their shingles, 0.99 have a band in common; of two that
# share half of them, 0.03. Pairs with a band in common are compared by their texts.
BANDS = 8
_BAND_HASHES = 8
_SHINGLE_WORDS = 3
_WORD = re.compile(r"\w+")
CHUNK_SCHEMA = pa.schema(
    [
        *(pa.field(name, kind) for name, kind in CHUNK_FIELDS),
        # The text for the encoder, where it is not the shown text.
        pa.field("embedded", pa.large_string()),
        pa.field("tokens", pa.int32()),
        pa.field("source", pa.int32()),
        *(pa.field(f"band_{number}", pa.uint64()) for number in range(BANDS)),
    ]
)
"""Columns of a file of `chunks/`: those of a part without vector, and what later stages read."""


@dataclass(frozen=True)
class Outcome:
    """Result of reading a source, or a document of an archive.

    Args:
        path: The document's path in an archive; "" for a source as a whole.
        digest: Hash of the bytes of a file; "" for archives.
        chunks: Number of passages.
        reason: Why there are none, or why the rest of an archive is missing; "" if all was read.
        keep: Whether passages of an earlier version stay.
    """

    path: str
    digest: str
    chunks: int
    reason: str = ""
    keep: bool = False


class FileChunker:
    """Reads and splits files, by the project's own readers; one model's tokenizer an actor.

    As a class for `map_batches`, it takes tables with a column "path" (a local path, or an address that
    `Storage` opens) and returns passages: the columns of a part without the vector, "embedded" (the text for an
    encoder) and "reason", which is set in a row for each file that cannot be read.

    Args:
        model: Counts tokens; see `EpicBatchEncoder`.
        settings: Sizes of chunks; None for the defaults.
        near_duplicates: Whether to compute the keys that find near-duplicates (columns "band_0" and following).
        dtype: See `EpicBatchEncoder`.

    Raises:
        ConfigError: If the chunks are longer than the model's input.
        MissingExtraError: If the library for near-duplicates is not installed.

    Example:
        >>> files = ray.data.from_items([{"path": "/docs/a.md"}, {"path": "s3://corpus/b.pdf"}])
        >>> pool = ray.data.ActorPoolStrategy(size=2)
        >>> passages = files.map_batches(FileChunker, batch_format="pyarrow", compute=pool)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Callable[[], EpicEncoder] | None = None,
        *,
        settings: IndexSettings | None = None,
        near_duplicates: bool = False,
        dtype: str | None = None,
    ) -> None:
        use_threads(assigned_threads())
        self._splitter = DocumentSplitter(load_encoder(model, dtype=dtype, device="cpu"), settings)
        self._near_duplicates = near_duplicates

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the passages of the files of a table, and a row for each that cannot be read."""
        parts: list[pa.Table] = []
        for path in table["path"].to_pylist():
            address = str(path)
            root, _, name = address.rpartition("/")
            source = SourceFile(address, address if is_archive(address) else root, name, 0, "", named=True)
            records: list[ChunkRecord] = []
            failures: list[dict[str, Any]] = []
            for item in self.read(source):
                if isinstance(item, ChunkRecord):
                    records.append(item)
                elif item.reason:
                    failures.append({"path": item.path or name, "root": source.root, "reason": item.reason})
            passages = chunk_table(records, [0] * len(records), near_duplicates=self._near_duplicates)
            passages = passages.drop_columns(["source"])
            parts.append(passages.append_column("reason", pa.nulls(len(passages), pa.string())))
            schema = parts[-1].schema
            parts.append(pa.Table.from_pylist(failures, schema))
        return pa.concat_tables(parts)

    def read(self, source: SourceFile) -> Iterator[ChunkRecord | Outcome]:
        """Yield the passages of a source and an outcome for each bad document of an archive; the source's own last."""
        if is_archive(source.path):
            yield from self._read_archive(source)
            return
        if is_remote_address(source.address):
            try:
                split = self._splitter.split(source.root, source.path, read_source(source))
            except ValueError as error:
                split = SplitDocument("", reason=str(error))
            except (OSError, EpicError) as error:
                split = SplitDocument("", reason=f"cannot be read: {reason_of(error)}", keep=True)
        else:
            file = FoundFile(source.path, Path(source.address), source.named)
            split = self._splitter.split_file(source.root, file)
        yield from split.records
        yield Outcome("", split.digest, len(split.records), split.reason, split.keep)

    def _read_archive(self, source: SourceFile) -> Iterator[ChunkRecord | Outcome]:
        chunks, damage = 0, ""
        try:
            for document in read_archive(source):
                if document.reason and not document.path:
                    damage = document.reason
                    continue
                reason = document.reason
                if not reason:
                    split = self._splitter.split(
                        source.root,
                        document.path,
                        document.data,
                        name=document.name,
                        title=document.title,
                        metadata=document.metadata,
                    )
                    reason = split.reason
                    chunks += len(split.records)
                    yield from split.records
                if reason:
                    yield Outcome(document.path, "", 0, reason)
        except MissingExtraError as error:
            damage = str(error)
        yield Outcome("", "", chunks, damage, keep=bool(damage) and not chunks)

    def close(self) -> None:
        """End the process that reads damaged and hostile files."""
        self._splitter.close()


def chunk_table(records: Sequence[ChunkRecord], sources: Sequence[int], *, near_duplicates: bool) -> pa.Table:
    """Return records as a table of `CHUNK_SCHEMA`.

    Args:
        records: The records.
        sources: The number of each one's source.
        near_duplicates: Whether to compute the keys that find near-duplicates, or leave them null.
    """
    columns: dict[str, Any] = {
        "id": [record.id for record in records],
        "text": [record.chunk.text for record in records],
        "embedded": [None if r.chunk.embedded == r.chunk.text else r.chunk.embedded for r in records],
        "tokens": [record.chunk.tokens for record in records],
        "source": np.array(sources, np.int32),
        "row_hash": np.array([_row_hash(record.metadata) for record in records], np.uint64),
    }
    for name, _ in CHUNK_FIELDS:
        if name not in columns:
            columns[name] = [record.metadata.get(name) for record in records]
    if near_duplicates:
        keys = band_keys(record.chunk.embedded for record in records)
        columns |= {f"band_{number}": keys[:, number] for number in range(BANDS)}
    else:
        columns |= {f"band_{number}": pa.nulls(len(records), pa.uint64()) for number in range(BANDS)}
    return pa.table([pa.array(columns[field.name], field.type) for field in CHUNK_SCHEMA], schema=CHUNK_SCHEMA)


def shingles(text: str) -> set[str]:
    """Return the runs of three words of a text, in lower case; the words of a shorter one."""
    words = _WORD.findall(text.lower())
    size = min(_SHINGLE_WORDS, len(words))
    return {" ".join(words[start : start + size]) for start in range(len(words) - size + 1)} if words else set()


def band_keys(texts: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Return the keys (n, BANDS) of texts; texts that share many shingles have a key in common with high probability.

    Raises:
        MissingExtraError: If the library is not installed.
    """
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise MissingExtraError("rensa", "ray", "finding near-duplicates") from error
    rows = []
    for text in texts:
        minhash = RMinHash(num_perm=BANDS * _BAND_HASHES, seed=1)
        minhash.update(sorted(shingles(text)) or [text])
        rows.append(minhash.digest())
    signatures = np.array(rows, np.uint32).reshape(len(rows), BANDS, _BAND_HASHES)
    keys = np.empty((len(rows), BANDS), np.uint64)
    for band in range(BANDS):
        # Horner's rule with an odd multiplier: a hash of the band's values, the same in every process.
        key = np.full(len(rows), band + 1, np.uint64)
        for value in range(_BAND_HASHES):
            key = key * np.uint64(0x9E3779B97F4A7C15) + signatures[:, band, value]
        keys[:, band] = key
    return keys


def _row_hash(metadata: dict[str, Any]) -> int:
    facts = json.dumps(metadata, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest(), "little")
