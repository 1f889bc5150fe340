"""Electronic books (.epub): the documents of the spine in reading order, each read as HTML; the book's title on top.

A book has no pages and no lines of its own: a passage is found by its headings.
"""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING
from urllib.parse import unquote

from epic_rag_chroma.document import BrokenFileError, Document
from epic_rag_chroma.formats import safe_xml
from epic_rag_chroma.formats.archive import Archive
from epic_rag_chroma.formats.building import DocumentBuilder, parsing
from epic_rag_chroma.formats.safe_xml import attribute, children, local_name
from epic_rag_chroma.html import html

if TYPE_CHECKING:
    from lxml.etree import _Element

__all__ = ["read"]

_WHAT = "EPUB book"
_PURPOSE = "reading EPUB books"
_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_TEXT_TYPES = frozenset({"application/xhtml+xml", "text/html", "application/x-dtbook+xml"})
_BOOK_LEVEL = -1


def read(data: bytes) -> Document:
    """Read an .epub file. A damaged chapter costs itself, not the others.

    Raises:
        BrokenFileError: If it is damaged, encrypted or beyond a limit.
        NotTextError: If there is no text in it.
        MissingExtraError: If lxml or beautifulsoup4 is not installed.
    """
    out = DocumentBuilder(_WHAT)
    with Archive(data, _WHAT) as archive, parsing(_WHAT):
        package_name = _package_name(archive)
        package = safe_xml.parse(archive.read(package_name), _PURPOSE)
        chapters = _spine(package, posixpath.dirname(package_name))
        if _encrypted(archive).intersection(chapters):
            raise BrokenFileError(f"an encrypted {_WHAT} (DRM)")
        title = _metadata(package, "title")
        creator = _metadata(package, "creator")
        if title:
            out.heading(f"{title} ({creator})" if creator else title, _BOOK_LEVEL)
        broken: BrokenFileError | None = None
        read_any = False
        for chapter in chapters:
            try:
                with parsing(f"chapter {chapter[:80]} of an {_WHAT}"):
                    out.document_of(html(archive.read(chapter)))
                read_any = True
            except BrokenFileError as error:
                broken = broken or error
        if not read_any:
            raise broken or BrokenFileError(f"a broken {_WHAT}: no document in its spine")
        return out.with_pages()


def _package_name(archive: Archive) -> str:
    container = safe_xml.parse(archive.read(_CONTAINER), _PURPOSE)
    for rootfile in container.iter("{*}rootfile"):
        name = attribute(rootfile, "full-path")
        if name:
            return name
    raise BrokenFileError(f"a broken {_WHAT}: {_CONTAINER} names no package")


def _spine(package: _Element, folder: str) -> list[str]:
    """Names of the documents in reading order, each once."""
    items: dict[str, str] = {}
    order: list[str] = []
    for part in package:
        if local_name(part) == "manifest":
            for item in children(part, "item"):
                if attribute(item, "media-type") in _TEXT_TYPES:
                    items[attribute(item, "id")] = _resolved(folder, attribute(item, "href"))
        elif local_name(part) == "spine":
            order += [attribute(item, "idref") for item in children(part, "itemref")]
    return list(dict.fromkeys(items[key] for key in order if key in items))


def _resolved(folder: str, reference: str) -> str:
    """The member that a reference means. It is only ever looked up in the archive."""
    return posixpath.normpath(posixpath.join(folder, unquote(reference.partition("#")[0])))


def _metadata(package: _Element, name: str) -> str:
    for metadata in children(package, "metadata"):
        for element in metadata.iter(f"{{*}}{name}"):
            text = " ".join("".join(map(str, element.itertext())).split())
            if text:
                return text
    return ""


def _encrypted(archive: Archive) -> set[str]:
    """Members that are encrypted; fonts often are, in books that anyone can read."""
    if _ENCRYPTION not in archive:
        return set()
    root = safe_xml.parse(archive.read(_ENCRYPTION), _PURPOSE)
    return {unquote(attribute(reference, "URI")) for reference in root.iter("{*}CipherReference")}
