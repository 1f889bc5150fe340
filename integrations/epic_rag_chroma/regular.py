"""Reading a file that may be anything by now: only a regular one, only as much as is allowed, and never a link."""

from __future__ import annotations

import errno
import os
import stat

__all__ = ["NotRegularError", "TooLargeError", "read_regular"]

# Not following a link closes the gap between the walk, which looks at a name, and the reading, which opens it.
# O_NONBLOCK: opening a FIFO would otherwise wait for somebody to write to it. Windows has neither.
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_PIECE = 2**20


class NotRegularError(OSError):
    """What should be a regular file is something else: a link, a folder, a FIFO, a socket or a device."""


class TooLargeError(OSError):
    """A file with more bytes than are allowed."""


def read_regular(path: str | os.PathLike[str], limit: int, *, whole: bool = True) -> tuple[bytes, os.stat_result]:
    """Read a regular file.

    Args:
        path: The file; its last name may not be a link.
        limit: The most bytes that are read.
        whole: Whether more bytes are an error; otherwise the first ones will do.

    Returns:
        The bytes, and what the file system said of the file before they were read.

    Raises:
        NotRegularError: If it is no regular file.
        TooLargeError: If it has more bytes and was to be read whole.
        OSError: If it cannot be opened or read.
    """
    if not _FLAGS & getattr(os, "O_NONBLOCK", 0) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise _other(path)
    try:
        handle = os.open(path, _FLAGS)
    except OSError as error:
        # A link; a socket, or a device without a driver.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _other(path) from error
        raise
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise _other(path)
        if whole and info.st_size > limit:
            raise TooLargeError(errno.EFBIG, f"larger than {limit} bytes", os.fspath(path))
        pieces = []
        left = limit + 1 if whole else limit
        # In pieces: a file may say less than it has (it grows, or is one of /proc's), and never gets more than allowed.
        while left > 0 and (piece := os.read(handle, min(left, max(_PIECE, info.st_size + 1)))):
            pieces.append(piece)
            left -= len(piece)
    finally:
        os.close(handle)
    if whole and not left:
        raise TooLargeError(errno.EFBIG, f"larger than {limit} bytes", os.fspath(path))
    return b"".join(pieces), info


def _other(path: str | os.PathLike[str]) -> NotRegularError:
    return NotRegularError(errno.EINVAL, "neither a file nor a folder", os.fspath(path))
