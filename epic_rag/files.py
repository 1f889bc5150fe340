"""Files: JSON lines in; atomic writes and tensors out, with the permissions of the user's umask."""

from __future__ import annotations

import gzip
import json
import os
import secrets
import stat
import zlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from epic_rag.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = [
    "apply_umask",
    "default_mode",
    "describe_os_error",
    "read_jsonl",
    "save_tensors",
    "user_name",
    "write_atomically",
]


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
    except PermissionError as error:
        raise DataError(f"{describe_os_error(error)}. Make it readable or pass another file.") from error
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
    beside = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as stream:  # not made by tempfile, whose files only their owner can read
            stream.write(data.encode("utf-8") if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileNotFoundError):
            os.chmod(beside, file.stat().st_mode & 0o777)
        os.replace(beside, file)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    with suppress(OSError):  # a folder cannot be opened on Windows, where the rename is durable by itself
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_tensors(
    tensors: dict[str, torch.Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of the user's umask.

    A file that exists is replaced by a new one: other encoders may have it memory-mapped.

    Args:
        tensors: Contiguous tensors by name.
        path: The file; its folder must exist.
        metadata: Strings for the file's header.

    Raises:
        OSError: If the file cannot be written.
    """
    from safetensors.torch import save_file

    Path(path).unlink(missing_ok=True)
    save_file(tensors, path, metadata=metadata)
    apply_umask(path)


def apply_umask(*paths: str | os.PathLike[str]) -> None:
    """Set the permissions of files to those that the user's umask gives a new file.

    safetensors, and with it transformers, makes files that only their owner can read.
    """
    mode = default_mode()
    for path in paths:
        os.chmod(path, mode)


def default_mode() -> int:
    """Return the permissions of new files: 0o666 without the bits of the user's umask."""
    # The umask can only be read by setting it. A file that another thread makes meanwhile gets too few permissions
    # rather than too many.
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


def describe_os_error(error: OSError) -> str:
    """Return the file and the reason of an error; for a missing permission also mode and owner of what lacks it."""
    reason = error.strerror or str(error)
    if not isinstance(error.filename, (str, bytes, os.PathLike)):
        return reason
    file = Path(os.fsdecode(error.filename))
    described = f"{file}: {reason}"
    if not isinstance(error, PermissionError) or not hasattr(os, "geteuid"):
        return described
    for path in (file.absolute(), *file.absolute().parents):
        with suppress(OSError):  # not in a folder that may be read; then the folder is what lacks the permission
            info = path.stat()
            mode, owner = f"{stat.S_IMODE(info.st_mode):o}", user_name(info.st_uid)
            return f"{described} ({path} has mode {mode} and belongs to {owner}, you are {user_name(os.geteuid())})"
    return described


def user_name(number: int) -> str:
    """Return the name of a user, or the number of one without a name."""
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
