"""Folders on any file system: local ones, S3, GCS and HDFS through pyarrow, others through fsspec.

A file appears under its name when it is complete. Local files are written beside their place and renamed; object
stores show an object when its upload ends.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from epic_rag.errors import DataError, MissingExtraError, reason_of

__all__ = ["Storage", "is_remote_address", "open_filesystem"]

_TEMPORARY = ".tmp"


def is_remote_address(address: str | os.PathLike[str]) -> bool:
    """Return whether an address has a scheme, `s3://bucket/folder` for instance."""
    return "://" in os.fspath(address)


def open_filesystem(address: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """Return the file system of an address and the path on it.

    Args:
        address: A local path, or `s3://bucket/path`, `gs://...`, `hdfs://...`, or the address of a file system that
            fsspec knows. Credentials come from the environment, as the libraries of these stores find them.

    Raises:
        DataError: If there is no such file system.
        MissingExtraError: If fsspec is needed and not installed.
    """
    text = os.fspath(address)
    if not is_remote_address(text):
        return fs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    scheme, _, path = text.partition("://")
    try:
        filesystem, path = fs.FileSystem.from_uri(text)
        return filesystem, path.rstrip("/")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        first = reason_of(error)
    try:
        import fsspec
    except ImportError as error:
        raise MissingExtraError("fsspec", "ray", f"reading {scheme}://") from error
    try:
        found = fsspec.filesystem(scheme)
    except (ValueError, ImportError) as error:
        raise DataError(f"{text} cannot be opened ({first}; {reason_of(error)}). Check the address.") from error
    return fs.PyFileSystem(fs.FSSpecHandler(found)), path.rstrip("/")


class Storage:
    """A folder on any file system. Picklable, so that actors open it by themselves.

    Args:
        address: See `open_filesystem`; the folder is made with the first file.

    Attributes:
        address: The address; absolute for a local folder.

    Raises:
        DataError: If there is no such file system.
    """

    def __init__(self, address: str | os.PathLike[str]) -> None:
        self._filesystem, self._base = open_filesystem(address)
        self.address = os.fspath(address).rstrip("/") if is_remote_address(address) else self._base

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return type(self), (self.address,)

    def __repr__(self) -> str:
        return f"Storage({self.address!r})"

    @property
    def is_local(self) -> bool:
        """True for a folder of this machine."""
        return isinstance(self._filesystem, fs.LocalFileSystem)

    def exists(self, name: str) -> bool:
        """Return whether there is a file of that name."""
        return bool(self._filesystem.get_file_info(self._path(name)).type == fs.FileType.File)

    def list(self, folder: str = "", suffix: str = "") -> list[str]:
        """Return the names of the complete files of a subfolder, sorted; none if there is no such folder."""
        selector = fs.FileSelector(self._path(folder).rstrip("/"), allow_not_found=True)
        prefix = f"{folder}/" if folder else ""
        return sorted(
            prefix + info.base_name
            for info in self._filesystem.get_file_info(selector)
            if info.type == fs.FileType.File
            and info.base_name.endswith(suffix)
            and not info.base_name.endswith(_TEMPORARY)
        )

    def delete(self, name: str) -> None:
        """Delete a file, if there is one."""
        with suppress(FileNotFoundError):
            self._filesystem.delete_file(self._path(name))

    def read_bytes(self, name: str) -> bytes:
        """Read a file.

        Raises:
            DataError: If it cannot be read.
        """
        try:
            with self._filesystem.open_input_stream(self._path(name)) as stream:
                return bytes(stream.read())
        except OSError as error:
            raise DataError(f"{self.address}/{name} cannot be read ({reason_of(error)}). Check the address.") from error

    def read_json(self, name: str, *keys: str) -> dict[str, Any]:
        """Read a file that holds a JSON object.

        Args:
            name: The file.
            *keys: Keys that it must have.

        Raises:
            DataError: If it cannot be read, is no JSON object, or lacks a key.
        """
        data = self.read_bytes(name)
        try:
            found = json.loads(data)
            if not isinstance(found, dict) or not all(key in found for key in keys):
                raise ValueError("it is not what was written")
        except ValueError as error:
            raise DataError(
                f"{self.address}/{name} is damaged ({reason_of(error)}). Restore it from a copy, or write to another "
                "folder."
            ) from error
        return found

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file atomically.

        Raises:
            OSError: If it cannot be written; a previous file of that name stays.
        """
        with self._written(name) as path, self._filesystem.open_output_stream(path) as stream:
            stream.write(data)

    def read_schema(self, name: str) -> pa.Schema:
        """Return the schema of a Parquet file, with its metadata.

        Raises:
            DataError: If it is no Parquet file.
        """
        with self._parquet(name) as file:
            return file.schema_arrow

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a Parquet file, or some of its columns.

        Raises:
            DataError: If it cannot be read.
        """
        with self._parquet(name) as file:
            known = set(file.schema_arrow.names)
            wanted = None if columns is None else [column for column in columns if column in known]
            return file.read(columns=wanted, use_threads=False)

    def read_rows(self, name: str, rows: npt.NDArray[np.integer[Any]], columns: Sequence[str]) -> pa.Table:
        """Read some rows of a Parquet file, in their order; only the row groups that hold them are read.

        Raises:
            DataError: If it cannot be read.
        """
        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        with self._parquet(name) as file:
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            edges = np.concatenate([[0], np.cumsum(sizes)])
            groups = np.searchsorted(edges, wanted, side="right") - 1
            tables = [file.schema_arrow.empty_table().select(columns)]
            for number in np.unique(groups):
                group = file.read_row_group(int(number), columns=list(columns), use_threads=False)
                tables.append(group.select(columns).take(pa.array(wanted[groups == number] - edges[number])))
        places = np.empty(len(rows), np.int64)
        places[order] = np.arange(len(rows))
        return pa.concat_tables(tables).take(pa.array(places))

    def read_batches(self, name: str, rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield a Parquet file in tables of at most `rows` rows; errors are those of `read_table`."""
        with self._parquet(name) as file:
            known = set(file.schema_arrow.names)
            wanted = None if columns is None else [column for column in columns if column in known]
            for batch in file.iter_batches(batch_size=rows, columns=wanted, use_threads=False):
                yield pa.Table.from_batches([batch])

    def write_tables(self, name: str, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
        """Write tables to a Parquet file, atomically and one row group each; return the number of rows.

        Raises:
            OSError: If it cannot be written.
        """
        rows = 0
        # Vectors hardly compress, and a dictionary of unique values costs memory.
        options: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["root", "doc_id", "kind", "lang"]}
        with (
            self._written(name) as path,
            pq.ParquetWriter(path, schema, filesystem=self._filesystem, **options) as writer,
        ):
            for table in tables:
                if table.num_rows:
                    writer.write_table(table.cast(schema) if table.schema != schema else table)
                    rows += table.num_rows
        return rows

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base

    @contextmanager
    def _parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        try:
            with self._filesystem.open_input_file(self._path(name)) as stream, pq.ParquetFile(stream) as file:
                yield file
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{self.address}/{name} is not a readable Parquet file ({reason_of(error)}). Restore it from a copy, "
                "or write to another folder."
            ) from error

    @contextmanager
    def _written(self, name: str) -> Iterator[str]:
        """Yield a path to write to; what is written appears under the name if the block succeeds."""
        final = self._path(name)
        if not self.is_local:
            with suppress(OSError, NotImplementedError):  # object stores have no folders to make
                self._filesystem.create_dir(final.rpartition("/")[0], recursive=True)
            yield final
            return
        os.makedirs(os.path.dirname(final), exist_ok=True)
        beside = f"{final}-{secrets.token_hex(4)}{_TEMPORARY}"
        try:
            yield beside
            file = os.open(beside, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(beside, final)
        except BaseException:
            with suppress(OSError):
                os.unlink(beside)
            raise
