"""From bytes to text: marks, UTF-8, what the file says of itself, and detection; in this order."""

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
# Controls that text does not have: all but tab, the line ends, form feed, backspace, escape and DOS's end of file.
_CONTROLS = bytes(set(range(32)) - {8, 9, 10, 12, 13, 26, 27})
_ASCII = bytes(range(128))
# XML's declaration, Python's and Emacs' coding lines, CSS' @charset; what a file says about itself stands at its top.
_DECLARED = re.compile(rb"""(?:coding|encoding|charset)\s*[:=]?\s*["']?([A-Za-z][\w.:-]*)""", re.IGNORECASE)
_DECLARED_WITHIN = 1024
# What files are written in. charset-normalizer knows forty more (EBCDIC and the like), which short texts resemble too.
_CANDIDATES = (
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874", "koi8_r",
    "cp866", "iso8859_2", "iso8859_5", "iso8859_7", "mac_roman", "cp932", "euc_jp", "gb18030", "big5", "cp949",
)  # fmt: skip
_FAMILIES = ("iso8859", "koi8", "cp", "euc", "gb", "shift", "big5", "mac")
# Fewer letters beyond ASCII say nothing about the encoding; then it is the commonest one.
_ENOUGH_EVIDENCE = 16
_DETECTED_WITHIN = 32 * 1024
_ALIKE = 0.06


def is_utf16(data: bytes) -> bool:
    """Whether a byte order mark says UTF-16 (or 32), in which every other byte may be null."""
    return data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))


def decode(data: bytes) -> str:
    """Text from bytes: a byte order mark decides, then UTF-8, then what the file declares, then detection.

    A UTF-8 file with a few broken characters stays one, with U+FFFD in their place.

    Raises:
        NotTextError: If the bytes are no text.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            try:
                return _without_nul(data.decode(encoding))
            except UnicodeDecodeError as error:
                raise NotTextError(f"not text: begins as {encoding} and is not") from error
    if b"\0" in data:
        return _wide(data)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return _legacy(data)
    if "\x1b$" in text and text.isascii():  # the 7-bit encoding of Japanese mail
        text = _decoded(data, "iso2022_jp") or text
    return text


def _without_nul(text: str) -> str:
    if "\0" in text:  # SQLite's full-text index, where Chroma keeps documents, breaks on it
        raise NotTextError("not text: it has null characters")
    return text


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _wide(data: bytes) -> str:
    """UTF-16 or UTF-32 without a mark, which the places of the null bytes in a text give away."""
    sample = data[: _SNIFFED - _SNIFFED % 4]
    shares = [sample[offset::4].count(0) / max(1, len(sample[offset::4])) for offset in range(4)]
    guesses = {
        "utf-32-le": len(data) % 4 == 0 and min(shares[2:]) > 0.9,
        "utf-32-be": len(data) % 4 == 0 and min(shares[:2]) > 0.9,
        "utf-16-le": len(data) % 2 == 0 and min(shares[1::2]) > 0.4 and max(shares[0::2]) < 0.05,
        "utf-16-be": len(data) % 2 == 0 and min(shares[0::2]) > 0.4 and max(shares[1::2]) < 0.05,
    }
    for encoding, likely in guesses.items():
        text = _decoded(data, encoding) if likely else None
        if text is not None and "\0" not in text and not _is_garbled(text):
            return text
    raise NotTextError("not text: it has null bytes")


def _is_garbled(text: str) -> bool:
    sample = text[:_SNIFFED]
    return sum(not (char.isprintable() or char.isspace()) for char in sample) > len(sample) // 100


def _legacy(data: bytes) -> str:
    """Text that is not UTF-8."""
    sample = data[:_SNIFFED]
    if len(sample) - len(sample.translate(None, _CONTROLS)) > len(sample) // 100:
        raise NotTextError("not text")
    repaired = data.decode("utf-8", "replace")
    beyond = data.translate(None, _ASCII)
    if repaired.count("\ufffd") * 20 < len(beyond):
        return repaired
    declared = _DECLARED.search(data[:_DECLARED_WITHIN])
    if declared is not None:
        text = _declared(data, declared.group(1).decode("ascii"))
        if text is not None:
            return text
    encoding = _detected(data) if len(beyond) >= _ENOUGH_EVIDENCE else "cp1252"
    for guess in (encoding, "cp1252"):
        text = _decoded(data, guess)
        if text is not None:
            return text
    return data.decode("latin-1")


def _declared(data: bytes, name: str) -> str | None:
    try:
        encoding = codecs.lookup(name).name.replace("-", "_")
    except LookupError:
        return None
    # Codecs that no text file is written in (base64, unicode_escape, UTF-7) are not for a file to choose.
    known = encoding in _CANDIDATES or encoding.startswith(_FAMILIES)
    return _decoded(data, encoding) if known else None


def _detected(data: bytes) -> str:
    import logging

    from charset_normalizer import from_bytes

    logging.getLogger("charset_normalizer").setLevel(logging.ERROR)
    # The lines with letters beyond ASCII are what tells; a long English preamble must not hide them.
    telling = b"\n".join(line for line in data[: 2**20].splitlines() if line.translate(None, _ASCII))
    sample = telling[:_DETECTED_WITHIN]
    for threshold in (0.2, 0.4):  # how much of it may look garbled; the library's own, then a laxer one
        matches = list(
            from_bytes(sample, threshold=threshold, cp_isolation=list(_CANDIDATES), preemptive_behaviour=False)
        )
        if matches:
            break
    else:
        return "cp1252"
    # Encodings of the same alphabet differ in a few letters: of those that look alike, the most like a language, then
    # the commonest.
    good = [match for match in matches if match.chaos <= matches[0].chaos + _ALIKE]
    return min(good, key=lambda match: (-match.coherence, _CANDIDATES.index(match.encoding))).encoding
