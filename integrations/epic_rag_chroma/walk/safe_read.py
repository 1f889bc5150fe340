"""Safe reading of files that may have been replaced: regular files only, up to a limit, never through a link."""

from __future__ import annotations

import errno
import os
import stat

__all__ = ["NotRegularError", "TooLargeError", "read_regular"]

# O_NOFOLLOW closes the race between the walk, which checks a name, and the read, which opens it. O_NONBLOCK: opening a
# FIFO would otherwise block until there is a writer. Windows has neither.
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_READ_SIZE = 2**20


class NotRegularError(OSError):
    """A link, a folder, a FIFO, a socket or a device in the place of a regular file."""


class TooLargeError(OSError):
    """A file above the size limit."""


def read_regular(path: str | os.PathLike[str], limit: int, *, whole: bool = True) -> tuple[bytes, os.stat_result]:
    """Read a regular file.

    Args:
        path: The file; its last component must not be a link.
        limit: The most bytes to read.
        whole: Raise an error if there are more bytes; otherwise return the first ones.

    Returns:
        The bytes, and the file's stat result from before the read.

    Raises:
        NotRegularError: If it is not a regular file.
        TooLargeError: If it has more bytes than `limit` and `whole` is set.
        OSError: If it cannot be opened or read.
    """
    if not _FLAGS & getattr(os, "O_NONBLOCK", 0) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise _not_regular(path)
    try:
        handle = os.open(path, _FLAGS)
    except OSError as error:
        # ELOOP: a link. ENXIO: a socket, or a device without a driver.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _not_regular(path) from error
        raise
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise _not_regular(path)
        if whole and info.st_size > limit:
            raise TooLargeError(errno.EFBIG, f"larger than {limit} bytes", os.fspath(path))
        parts = []
        left = limit + 1 if whole else limit
        # The stat size is not trusted: the file may grow during the read, and files in /proc report a size of 0.
        while left > 0 and (part := os.read(handle, min(left, max(_READ_SIZE, info.st_size + 1)))):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(handle)
    if whole and not left:
        raise TooLargeError(errno.EFBIG, f"larger than {limit} bytes", os.fspath(path))
    return b"".join(parts), info


def _not_regular(path: str | os.PathLike[str]) -> NotRegularError:
    return NotRegularError(errno.EINVAL, "neither a file nor a folder", os.fspath(path))
