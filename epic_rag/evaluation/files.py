"""Reading the plain files that evaluation data comes in: JSON lines, gzipped or not, and tab-separated text.

Every complaint names the file and the line, because such files are written by other people's scripts.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO, cast

from epic_rag.errors import DataError

__all__ = ["JsonRow", "content_revision", "read_jsonl", "read_mapping", "read_tsv"]


class JsonRow:
    """One line of a JSON lines file that knows where it came from.

    Args:
        values: The decoded JSON object.
        path: The file it was read from.
        line: Its 1-based line number.
    """

    def __init__(self, values: dict[str, object], path: Path, line: int) -> None:
        self.values = values
        self.path = path
        self.line = line

    def error(self, problem: str) -> DataError:
        """Return a `DataError` that says where the problem is."""
        return DataError(f"{self.path}, line {self.line}: {problem}")

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string field.

        Raises:
            DataError: The field is missing (and no default is given) or is no string.
        """
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.error(f'"{key}" must be a string, found {value!r}; correct this line')
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a field that holds a list of strings.

        Raises:
            DataError: The field is missing or is no list of strings.
        """
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f'"{key}" must be a list of strings, found {value!r}; correct this line')
        return tuple(cast("list[str]", value))

    def label(self, key: str) -> str | int:
        """Return a class label: a string or an integer.

        Raises:
            DataError: The field is missing or something else.
        """
        value = self.values.get(key)
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise self.error(f'"{key}" must be a string or an integer, found {value!r}; correct this line')
        return value


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
    return path.open("r", encoding="utf-8-sig", newline="\n")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (1-based number, line without its end); turn every reading problem into a `DataError`."""
    number = 0
    try:
        with _open_text(path) as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.rstrip("\r\n")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}; check the path with `ls {path.parent}`") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read after line {number} ({error}); write the file again") from error


def read_jsonl(path: Path) -> Iterator[JsonRow]:
    """Yield the objects of a JSON lines file; blank lines are skipped.

    Args:
        path: A `.jsonl` file, or `.jsonl.gz`.

    Raises:
        DataError: The file is missing, is broken, or a line is no JSON object.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: no valid JSON ({error}); correct this line") from error
        if not isinstance(values, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found {type(values).__name__}")
        yield JsonRow(values, path, number)


def read_tsv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (1-based line number, the wanted columns) of a tab-separated file with a header line.

    Quotes mean nothing in it, as in the STS and BEIR files.

    Args:
        path: The file.
        columns: Names in the header, in the order in which they are wanted.

    Raises:
        DataError: The file is missing, lacks one of the columns, or a line is too short.
    """
    positions: list[int] = []
    for number, line in _lines(path):
        cells = line.split("\t")
        if not positions:
            missing = [name for name in columns if name not in cells]
            if missing:
                raise DataError(f"{path}, line 1: the header {cells} lacks {missing}; add these columns")
            positions = [cells.index(name) for name in columns]
        elif line.strip():
            if len(cells) <= max(positions):
                raise DataError(f"{path}, line {number}: {len(cells)} columns, needs {max(positions) + 1}")
            yield number, tuple(cells[position] for position in positions)


def read_mapping(path: Path) -> dict[str, str]:
    """Read a JSON file that maps names to strings, such as `instructions.json`.

    Raises:
        DataError: The file is missing or holds something else.
    """
    text = "\n".join(line for _, line in _lines(path))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: no valid JSON ({error}); correct the file") from error
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise DataError(f"{path}: expected one JSON object that maps names to strings; correct the file")
    return cast("dict[str, str]", values)


def content_revision(paths: Sequence[Path]) -> str:
    """Return a short hash over the bytes of some files, so that a result says which data it belongs to."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}); check the path") from error
    return digest.hexdigest()[:16]
