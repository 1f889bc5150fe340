"""Decode bytes: by byte order mark, as UTF-8, by the declared encoding, or by detection, in this order."""

from __future__ import annotations

import codecs
import re
from contextlib import suppress

from epic_rag_chroma.reading.document import NotTextError

__all__ = ["decode", "decode_labelled", "is_utf16"]


_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SNIFFED = 8192
# Pictures and other markup in a manual of Info; no other text has null characters.
_INFO_MARKUP = re.compile(rb"\0\x08\[(?:image|index|[a-z]+)\b[^\0]{0,100000}\0\x08\]")
# Control characters outside of text: all but backspace, tab, line ends, form feed, DOS's end of file and escape.
_CONTROLS = bytes(set(range(32)) - {8, 9, 10, 12, 13, 26, 27})
_ASCII = bytes(range(128))
# XML's declaration, Python's and Emacs' coding lines, CSS' @charset, HTML's <meta>, all near the top of a file.
_DECLARED = re.compile(rb"""(?:coding|encoding|charset)\s*[:=]?\s*["']?([A-Za-z][\w.:-]*)""", re.IGNORECASE)
_DECLARED_WITHIN = 1024
# Encodings in which two bytes may be a character and happen to be valid UTF-8.
_DOUBLE_BYTE = frozenset({"gb18030", "big5hkscs", "cp949", "cp932", "euc_jp"})
_THREE_BYTES = re.compile(rb"[\xe0-\xef][\x80-\xbf]{2}")
_WITHOUT_ASCII = dict.fromkeys(range(128))
# With fewer non-ASCII bytes, text is Windows-1252 unless the result is sure.
_FEW = 5
_SURE = 0.07
_DETECTED_WITHIN = 32 * 1024
# Windows-1252 as browsers read it: five bytes without a character are control characters.
_WINDOWS = {byte: bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(0x80, 0xA0)}


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
    if b"\0\b[" in data:
        data = _INFO_MARKUP.sub(lambda match: b"\n" * match.group().count(b"\n"), data)
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
    except (UnicodeDecodeError, LookupError):
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
    text = None if declared is None else _decode_as(data, declared.group(1).decode("ascii"))
    if text is None:
        text = _try_decode(data, _detect(data))
    return data.decode("latin-1").translate(_WINDOWS) if text is None else text


def decode_labelled(data: bytes, label: str | None) -> str:
    """Decode text whose container names a charset, as e-mail does; never fails.

    The label means what browsers take it for: iso-8859-1 is Windows-1252, gb2312 is GB 18030. Bytes that contradict it
    take precedence: a byte order mark, valid UTF-8 beyond ASCII, bytes that the charset does not have.
    """
    label = (label or "").strip()
    with suppress(NotTextError):
        text = _try_decode(data, "utf-8-sig")
        double_byte = _codec_of(label) in _DOUBLE_BYTE and not _THREE_BYTES.search(data)
        if text is None or text.isascii() or double_byte:
            named = _decode_as(data, label)
            text = named if named is not None else text
        return decode(data) if text is None else text
    return data.decode("utf-8", "replace")


def _codec_of(label: str) -> str | None:
    """Return Python's codec for a charset label as the WHATWG's Encoding Standard defines it; None if unknown."""
    from webencodings import lookup  # type: ignore[import-untyped]

    encoding = lookup(label)
    if (
        encoding is None
    ):  # charsets of mail that browsers do not know; a file cannot select codecs that are not for text
        try:
            name = codecs.lookup(label).name
        except (LookupError, ValueError):
            return None
        known = name.startswith(("cp", "iso8859", "koi8", "mac", "iso2022")) or name in ("tis-620", "hz", "johab")
        return name if known else None
    if encoding.name in ("replacement", "x-user-defined"):
        return None
    codec = str(encoding.codec_info.name).replace("-", "_")
    return {"gbk": "gb18030"}.get(codec, codec)


def _decode_as(data: bytes, label: str) -> str | None:
    """Decode with a labelled charset; None if it is unknown or does not have these bytes."""
    codec = _codec_of(label)
    return None if codec is None or codec.startswith("utf_16") else _try_decode(data, codec)


def _detect(data: bytes) -> str:
    """Return the codec that the statistics of languages suggest."""
    from chardet import EncodingEra, detect

    # Only lines with non-ASCII characters are evidence; a long English preamble must not hide them.
    evidence = b"\n".join(line for line in data[: 2**20].splitlines() if line.translate(None, _ASCII))
    sample = evidence[:_DETECTED_WITHIN]
    beyond = len(sample.translate(None, _ASCII))
    as_windows = sample.decode("latin-1").translate(_WINDOWS)
    if beyond < 3 or not any(map(str.isalpha, as_windows.translate(_WITHOUT_ASCII))):
        return "cp1252"  # signs such as ° and ©, and single letters
    eras = EncodingEra.ALL & ~EncodingEra.MAINFRAME  # whose text has no ASCII
    found = detect(sample, encoding_era=eras, prefer_superset=False, compat_names=False)
    encoding = str(found["encoding"])
    if beyond < _FEW and found["confidence"] < _SURE:
        return "cp1252"
    return _codec_of(encoding) or encoding  # Windows-1252 for iso8859-1
