"""Zip-based formats: opened in memory, within limits, and never unpacked into the file system.

What an archive says of itself is checked before anything is decompressed; `zipfile` never gives more of a member than
its header announces, so a header that lies costs no memory and fails the member's checksum.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from types import TracebackType

from epic_rag_chroma.document import BrokenFileError

__all__ = ["MAX_MEMBERS", "MAX_MEMBER_BYTES", "MAX_RATIO", "MAX_TOTAL_BYTES", "Archive"]

# A large presentation has a few thousand members, a workbook or a book fewer.
MAX_MEMBERS = 20_000
# The longest part that is worth reading: a tree of a part's XML takes about ten times its size in memory.
MAX_MEMBER_BYTES = 128 * 2**20
MAX_TOTAL_BYTES = 512 * 2**20
# Deflate cannot reach more than 1032; documents are at 5 to 50, sparse sheets at 100.
MAX_RATIO = 250
# Below this size a ratio says nothing: a part of blanks is small whatever its ratio.
_RATIO_COUNTS_FROM = 4 * 2**20

_CENTRAL_ENTRY = b"PK\x01\x02"
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_ENCRYPTED_PACKAGE = "EncryptedPackage".encode("utf-16-le")


class Archive:
    """A zip file that has been found to be within the limits.

    Args:
        data: The file's bytes.
        what: What it ought to be, for messages ("Word document").

    Raises:
        BrokenFileError: If it is none, is encrypted, or is beyond a limit.
    """

    def __init__(self, data: bytes, what: str) -> None:
        self._what = what
        if data.startswith(_OLE):
            if _ENCRYPTED_PACKAGE in data:
                raise BrokenFileError(f"an encrypted {what}")
            raise BrokenFileError(f"an older format than that of a {what}, which its name says it is")
        # Before zipfile makes an object of each.
        if data.count(_CENTRAL_ENTRY) > MAX_MEMBERS:
            raise BrokenFileError(f"more than {MAX_MEMBERS} parts in this {what}")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
            raise BrokenFileError(f"a broken {what}: {_said(error)}") from error
        self._members = {info.filename: info for info in self._zip.infolist()}
        self._check()

    def _check(self) -> None:
        total = 0
        for info in self._zip.infolist():
            if info.flag_bits & 0x1:
                raise BrokenFileError(f"an encrypted {self._what}")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # The other methods are not of these formats, and decompress without a bound on what comes out.
                raise BrokenFileError(f"an unknown compression ({info.compress_type}) in this {self._what}")
            if info.file_size > MAX_MEMBER_BYTES:
                raise BrokenFileError(f"a part above {MAX_MEMBER_BYTES // 2**20} MiB in this {self._what}")
            if info.file_size > _RATIO_COUNTS_FROM and info.file_size > MAX_RATIO * max(1, info.compress_size):
                raise BrokenFileError(f"a part that is compressed more than {MAX_RATIO} times in this {self._what}")
            total += info.file_size
        if total > MAX_TOTAL_BYTES:
            raise BrokenFileError(f"more than {MAX_TOTAL_BYTES // 2**20} MiB in the parts of this {self._what}")

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> bytes:
        """The content of a member.

        Raises:
            BrokenFileError: If it is missing or damaged.
        """
        info = self._members.get(name)
        if info is None:
            raise BrokenFileError(f"a broken {self._what}: {name[:80]} is missing")
        try:
            with self._zip.open(info) as member:
                # One more than announced: zipfile itself stops there, and this does not depend on it.
                content = member.read(info.file_size + 1)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError, OSError) as error:
            raise BrokenFileError(f"a broken {self._what}: {_said(error)}") from error
        if len(content) > info.file_size:
            raise BrokenFileError(f"a broken {self._what}: {name[:80]} is longer than it says")
        return content

    def close(self) -> None:
        """Let go of the bytes."""
        self._zip.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
