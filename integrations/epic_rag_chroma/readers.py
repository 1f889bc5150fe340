"""From a file's bytes to a `Document`, by the kind of file."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable

from epic_rag.errors import MissingExtraError
from epic_rag_chroma import structure
from epic_rag_chroma.document import Break, Document, line_breaks, split_lines
from epic_rag_chroma.html import html

__all__ = ["BrokenFileError", "NotTextError", "byte_limit", "decode", "is_binary_name", "kind_of", "read_document"]

logger = logging.getLogger(__name__)

_TEXT_LIMIT = 16 * 2**20
_PDF_LIMIT = 256 * 2**20
_SNIFFED = 8192
_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
# Controls that text does not have: all but tab, the line ends, form feed, backspace and escape.
_CONTROLS = bytes(set(range(32)) - {8, 9, 10, 12, 13, 27})

_KINDS = {
    "markdown": ".md .markdown .mdown .mkd .mdx .qmd .rmd",
    "rst": ".rst .rest",
    "html": ".html .htm .xhtml",
    "pdf": ".pdf",
    "code": """.py .pyi .pyx .js .mjs .cjs .jsx .ts .tsx .java .kt .kts .scala .groovy .c .h .cc .cpp .cxx .hh .hpp .cs
        .go .rs .swift .m .mm .rb .pl .pm .php .lua .r .jl .hs .ml .mli .ex .exs .erl .clj .sh .bash .zsh .fish .ps1
        .sql .css .scss .less .vue .svelte .tf .cmake .mk .zig .nim .dart .el .lisp .scm .vim .proto .graphql
        .json .jsonc .yaml .yml .toml .ini .cfg .conf .xml""",
}
_KIND_OF = {suffix: kind for kind, suffixes in _KINDS.items() for suffix in suffixes.split()}
_BINARY_SUFFIXES = """
    .png .jpg .jpeg .gif .bmp .tif .tiff .webp .ico .icns .psd .heic .avif .mp3 .wav .flac .ogg .m4a .mp4 .mov .avi
    .mkv .webm .zip .gz .bz2 .xz .zst .7z .rar .tar .tgz .jar .war .whl .egg .deb .rpm .dmg .iso .exe .dll .so .dylib .a
    .lib .o .obj .pyc .pyo .pyd .class .wasm .bin .dat .db .sqlite .sqlite3 .parquet .arrow .npy .npz .pt .pth .onnx
    .safetensors .gguf .pkl .pickle .h5 .ttf .otf .woff .woff2 .eot .doc .xls .ppt .docx .xlsx .pptx .odt .ods .odp
    .epub .mo"""
_BINARY = frozenset(_BINARY_SUFFIXES.split())


class NotTextError(Exception):
    """A file that can be read and holds nothing to index; the message says why."""


class BrokenFileError(Exception):
    """A file that ought to hold text and cannot be read; the message says why."""


def is_binary_name(name: str) -> bool:
    """Whether a file's name says that it holds no text, so that it need not be opened."""
    return os.path.splitext(name)[1].lower() in _BINARY


def kind_of(name: str) -> str:
    """The kind of a file by its name: markdown, rst, html, pdf, code, or text for everything else."""
    return _KIND_OF.get(os.path.splitext(name)[1].lower(), "text")


def byte_limit(name: str) -> int:
    """The most bytes of a file that is read; more is a data dump, and one file must not fill the memory."""
    return _PDF_LIMIT if kind_of(name) == "pdf" else _TEXT_LIMIT


def decode(data: bytes) -> str:
    """Text from bytes: a byte order mark decides, then UTF-8, then Windows-1252.

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
        raise NotTextError("not text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    sample = data[:_SNIFFED]
    if len(sample) - len(sample.translate(None, _CONTROLS)) > len(sample) // 100:
        raise NotTextError("not text")
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _without_nul(text: str) -> str:
    if "\0" in text:  # SQLite's full-text index, where Chroma keeps documents, breaks on it
        raise NotTextError("not text")
    return text


def read_document(name: str, data: bytes) -> Document:
    """Read a file.

    Args:
        name: The file's name; its ending decides how it is read.
        data: The file's bytes.

    Raises:
        NotTextError: If there is nothing to index in it.
        BrokenFileError: If it is damaged or locked.
        MissingExtraError: If the package that reads this kind is not installed.
    """
    kind = kind_of(name)
    if kind == "pdf":
        return _pdf(data)
    if kind == "html":
        if b"\0" in data and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise NotTextError("not text")
        return html(data)
    return _STRUCTURES[kind](split_lines(decode(data)))


_STRUCTURES: dict[str, Callable[[list[str]], Document]] = {
    "markdown": structure.markdown,
    "rst": structure.restructured,
    "code": structure.code,
    "text": structure.plain,
}


def _pdf(data: bytes) -> Document:
    try:
        import pypdf
    except ImportError as error:
        raise MissingExtraError("pypdf", "files", "reading PDF files") from error
    # pypdf logs every oddity of every file; the reason for a file that cannot be read is reported by us.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    lines: list[str] = []
    breaks: list[Break] = []
    pages: list[int] = []
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise BrokenFileError("an encrypted PDF")
        for number, page in enumerate(reader.pages, start=1):
            text = (page.extract_text() or "").replace("\0", "").encode("utf-8", "replace").decode("utf-8")
            of_page = split_lines(text)
            lines += of_page
            breaks += line_breaks(of_page)
            pages += [number] * len(of_page)
    except BrokenFileError:
        raise
    except Exception as error:  # a damaged PDF makes pypdf raise nearly anything
        raise BrokenFileError(f"a broken PDF: {type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    if not any(line.strip() for line in lines):
        raise NotTextError("a PDF without text (scanned pages?)")
    return Document(lines, breaks, pages=pages)
