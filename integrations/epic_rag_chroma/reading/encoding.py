"""Decode bytes: by byte order mark, as UTF-8, by the declared encoding, or by detection, in this order."""

from __future__ import annotations

import codecs
import re

from epic_rag_chroma.reading.document import NotTextError

__all__ = ["decode", "is_utf16"]


_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SNIFFED = 8192
# Control characters outside of text: all but backspace, tab, line ends, form feed, DOS's end of file and escape.
_CONTROLS = bytes(set(range(32)) - {8, 9, 10, 12, 13, 26, 27})
_ASCII = bytes(range(128))
# XML's declaration, Python's and Emacs' coding lines, CSS' @charset, all near the top of a file.
_DECLARED = re.compile(rb"""(?:coding|encoding|charset)\s*[:=]?\s*["']?([A-Za-z][\w.:-]*)""", re.IGNORECASE)
_DECLARED_WITHIN = 1024
# Encodings of text files. charset-normalizer knows forty more (EBCDIC and the like), which short texts resemble too.
_CANDIDATES = (
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874", "koi8_r",
    "cp866", "iso8859_2", "iso8859_5", "iso8859_7", "mac_roman", "cp932", "euc_jp", "gb18030", "big5", "cp949",
)  # fmt: skip
_FAMILIES = ("iso8859", "koi8", "cp", "euc", "gb", "shift", "big5", "mac")
# With fewer non-ASCII characters detection is not reliable, and Windows-1252 is assumed.
_ENOUGH_EVIDENCE = 16
_DETECTED_WITHIN = 32 * 1024
_ALIKE = 0.06


def is_utf16(data: bytes) -> bool:
    """Return whether the bytes begin with a byte order mark of UTF-16 or UTF-32."""
    return data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))


def decode(data: bytes) -> str:
    """Decode a text file.

    A byte order mark takes precedence, then valid UTF-8, then the encoding that the file declares, then detection. In a
    UTF-8 file with a few broken characters, U+FFFD replaces them.

    Raises:
        NotTextError: If the bytes are not text.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            try:
                text = data.decode(encoding)
            except UnicodeDecodeError as error:
                raise NotTextError(f"not text: begins as {encoding} and is not") from error
            if "\0" in text:  # breaks SQLite's full-text index, in which Chroma keeps documents
                raise NotTextError("not text: it has null characters")
            return text
    if b"\0" in data:
        return _decode_wide(data)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return _decode_legacy(data)
    if "\x1b$" in text and text.isascii():  # the 7-bit encoding of Japanese mail
        text = _try_decode(data, "iso2022_jp") or text
    return text


def _try_decode(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _decode_wide(data: bytes) -> str:
    """Decode UTF-16 or UTF-32 without a byte order mark, recognised by the positions of null bytes."""
    sample = data[: _SNIFFED - _SNIFFED % 4]
    shares = [sample[offset::4].count(0) / max(1, len(sample[offset::4])) for offset in range(4)]
    guesses = {
        "utf-32-le": len(data) % 4 == 0 and min(shares[2:]) > 0.9,
        "utf-32-be": len(data) % 4 == 0 and min(shares[:2]) > 0.9,
        "utf-16-le": len(data) % 2 == 0 and min(shares[1::2]) > 0.4 and max(shares[0::2]) < 0.05,
        "utf-16-be": len(data) % 2 == 0 and min(shares[0::2]) > 0.4 and max(shares[1::2]) < 0.05,
    }
    for encoding, likely in guesses.items():
        text = _try_decode(data, encoding) if likely else None
        if text is None or "\0" in text:
            continue
        beginning = text[:_SNIFFED]
        if sum(not (char.isprintable() or char.isspace()) for char in beginning) <= len(beginning) // 100:
            return text
    raise NotTextError("not text: it has null bytes")


def _decode_legacy(data: bytes) -> str:
    """Decode text that is not valid UTF-8."""
    sample = data[:_SNIFFED]
    if len(sample) - len(sample.translate(None, _CONTROLS)) > len(sample) // 100:
        raise NotTextError("not text")
    repaired = data.decode("utf-8", "replace")
    beyond = data.translate(None, _ASCII)
    if repaired.count("\ufffd") * 20 < len(beyond):
        return repaired
    declared = _DECLARED.search(data[:_DECLARED_WITHIN])
    if declared is not None:
        text = _decode_as_declared(data, declared.group(1).decode("ascii"))
        if text is not None:
            return text
    encoding = _detect(data) if len(beyond) >= _ENOUGH_EVIDENCE else "cp1252"
    for guess in (encoding, "cp1252"):
        text = _try_decode(data, guess)
        if text is not None:
            return text
    return data.decode("latin-1")


def _decode_as_declared(data: bytes, name: str) -> str | None:
    try:
        encoding = codecs.lookup(name).name.replace("-", "_")
    except LookupError:
        return None
    # A file cannot select codecs that are not for text files (base64, unicode_escape, UTF-7).
    known = encoding in _CANDIDATES or encoding.startswith(_FAMILIES)
    return _try_decode(data, encoding) if known else None


def _detect(data: bytes) -> str:
    import logging

    from charset_normalizer import from_bytes

    logging.getLogger("charset_normalizer").setLevel(logging.ERROR)
    # Only lines with non-ASCII characters are evidence; a long English preamble must not hide them.
    evidence = b"\n".join(line for line in data[: 2**20].splitlines() if line.translate(None, _ASCII))
    sample = evidence[:_DETECTED_WITHIN]
    for threshold in (0.2, 0.4):  # share that may look garbled: the library's default, then a laxer one
        matches = list(
            from_bytes(sample, threshold=threshold, cp_isolation=list(_CANDIDATES), preemptive_behaviour=False)
        )
        if matches:
            break
    else:
        return "cp1252"
    # Encodings of the same alphabet differ in a few letters. Among similar matches prefer the most coherent text, then
    # the most common encoding.
    good = [match for match in matches if match.chaos <= matches[0].chaos + _ALIKE]
    return min(good, key=lambda match: (-match.coherence, _CANDIDATES.index(match.encoding))).encoding
