"""Files: JSON lines in, atomic writes out."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from epic_rag.errors import DataError

__all__ = ["default_mode", "read_jsonl", "write_atomically"]


def read_jsonl(path: str | os.PathLike[str], *, stream: BinaryIO | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number (from 1) and object of each line of a `.jsonl` or `.jsonl.gz` file; skip blank lines.

    Args:
        path: The file.
        stream: An open binary stream to read instead; `path` is then its name in messages.

    Raises:
        DataError: If the file cannot be read, or a line is not a JSON object; names file and line.
    """
    file = Path(path)
    opener: Any = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        with opener(file, "rb") if stream is None else nullcontext(stream) as lines:
            for number, raw in enumerate(lines, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"{file}:{number} is not valid JSON ({error}). Correct or delete the line."
                    ) from error
                if not isinstance(row, dict):
                    raise DataError(
                        f"{file}:{number} is not a JSON object ({type(row).__name__}). Correct or delete the line."
                    )
                yield number, row
    except UnicodeDecodeError as error:
        raise DataError(f"{file}:{number} is not UTF-8 (byte {error.start}). Save the file as UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read ({error}). Check the path and the file.") from error


def write_atomically(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Replace a file's content, so that at every moment and after a crash it is all old or all new.

    Permissions are those of the file that is replaced, or the user's default (umask) for a new one.

    Args:
        path: The file; its folder must exist.
        data: Text (written as UTF-8) or bytes.

    Raises:
        OSError: If the file cannot be written; the old content stays.
    """
    file = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data.encode("utf-8") if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, _mode(file))
        os.replace(name, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    with suppress(OSError):  # a folder cannot be opened on Windows, where the rename is durable by itself
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _mode(file: Path) -> int:
    try:
        return file.stat().st_mode & 0o777
    except OSError:
        return default_mode()


def default_mode() -> int:
    """Return the permissions of new files: 0o666 without the bits of the user's umask."""
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return 0o666 & ~mask
