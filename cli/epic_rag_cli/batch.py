"""Many queries from a file: JSON lines, read and checked before any model is loaded."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from epic_rag.errors import DataError

__all__ = ["BatchQuery", "read_batch", "read_stdin"]

STDIN = "-"
_STDIN_NAME = "standard input"
_EXAMPLE = '{"query": "..."}'


@dataclass(frozen=True)
class BatchQuery:
    """A query of a batch, and the `id` that came with it."""

    text: str
    id: str | int | float | None = None


def read_stdin() -> str:
    """Return what standard input holds, as text.

    Raises:
        DataError: It is closed, or is not UTF-8.
    """
    try:
        return _stdin().read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{_STDIN_NAME} is not UTF-8 (byte {error.start}); send it as UTF-8") from None


def read_batch(source: str) -> list[BatchQuery]:
    """Read queries from JSON lines: an object with `query` and perhaps `id` on each; empty lines do not count.

    Args:
        source: A file, or "-" for standard input.

    Raises:
        DataError: It cannot be read, a line is malformed (the message names it), or there is no query.
    """
    if source == STDIN:
        queries = list(_queries(_STDIN_NAME, _stdin()))
    else:
        try:
            with Path(source).open("rb") as file:
                queries = list(_queries(source, file))
        except OSError as error:
            raise DataError(
                f"{source} cannot be read ({error.strerror or error}); give --batch a file of lines {_EXAMPLE}"
            ) from None
    if not queries:
        name = _STDIN_NAME if source == STDIN else source
        raise DataError(f"{name} holds no queries; give --batch a file of lines {_EXAMPLE}")
    return queries


def _stdin() -> BinaryIO:
    if sys.stdin is None or not hasattr(sys.stdin, "buffer"):
        raise DataError(f"{_STDIN_NAME} is closed; send the text through a pipe, or give it on the command line")
    return sys.stdin.buffer


def _queries(name: str, file: BinaryIO) -> Iterator[BatchQuery]:
    for number, raw in enumerate(file, start=1):
        place = f"{name}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{place} is not UTF-8 (byte {error.start}); save the file as UTF-8") from None
        if line.strip():
            yield _query(place, line)


def _query(place: str, line: str) -> BatchQuery:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", None) or str(error)
        raise DataError(f"{place} is no JSON ({why}); write a line like {_EXAMPLE}") from None
    if not isinstance(value, dict):
        raise DataError(f"{place} is {_kind(value)}, not an object; write a line like {_EXAMPLE}")
    text = value.get("query")
    if not isinstance(text, str):
        said = f'"query" is {_kind(text)}' if "query" in value else 'there is no "query"'
        raise DataError(f"{place}: {said}, it must be a string; write a line like {_EXAMPLE}")
    if not text.strip():
        raise DataError(f'{place}: "query" is empty; write a line like {_EXAMPLE}')
    given = value.get("id")
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given)
    if given is not None and not isinstance(given, str) and not is_number:
        raise DataError(f'{place}: "id" is {_kind(given)}; it must be a string or a number')
    return BatchQuery(text, given)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number that JSON does not have" if value != value else "a number")
