"""Read EPUB: the documents of the spine in reading order, read as HTML, below the title of the book."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING
from urllib.parse import unquote

from epic_rag_chroma.reading.containers import (
    Archive,
    DocumentBuilder,
    Parts,
    attribute,
    children,
    local_name,
    parse_xml,
    parsing,
)
from epic_rag_chroma.reading.document import BrokenFileError, Document
from epic_rag_chroma.reading.html import read_html

if TYPE_CHECKING:
    from lxml.etree import _Element

__all__ = ["read_epub"]


_EPUB = "EPUB book"
_EPUB_PURPOSE = "reading EPUB books"
_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_TEXT_TYPES = frozenset({"application/xhtml+xml", "text/html", "application/x-dtbook+xml"})
_BOOK_LEVEL = -1


def read_epub(data: bytes) -> Document:
    """Read an .epub file; damaged chapters are skipped."""
    out = DocumentBuilder(_EPUB)
    archive = Archive(data, _EPUB)
    with parsing(_EPUB):
        container = parse_xml(archive.read(_CONTAINER), _EPUB_PURPOSE)
        package_name = next(filter(None, (attribute(file, "full-path") for file in container.iter("{*}rootfile"))), "")
        if not package_name:
            raise BrokenFileError(f"a broken {_EPUB}: {_CONTAINER} names no package")
        package = parse_xml(archive.read(package_name), _EPUB_PURPOSE)
        chapters = _spine(package, posixpath.dirname(package_name))
        if _ENCRYPTION in archive:
            encryption = parse_xml(archive.read(_ENCRYPTION), _EPUB_PURPOSE)
            # In readable books, fonts are often encrypted.
            if any(unquote(attribute(item, "URI")) in chapters for item in encryption.iter("{*}CipherReference")):
                raise BrokenFileError(f"an encrypted {_EPUB} (DRM)")
        title = _metadata(package, "title")
        creator = _metadata(package, "creator")
        if title:
            out.heading(f"{title} ({creator})" if creator else title, _BOOK_LEVEL)
        if not chapters:
            raise BrokenFileError(f"a broken {_EPUB}: no document in its spine")
        parts = Parts()
        for chapter in chapters:
            with parts.part(f"chapter {chapter[:80]} of an {_EPUB}"):
                out.add_document(read_html(archive.read(chapter)))
        parts.check()
        return out.document()


def _spine(package: _Element, folder: str) -> list[str]:
    """Return the names of the documents in reading order, without duplicates."""
    items: dict[str, str] = {}
    order: list[str] = []
    for part in package:
        if local_name(part) == "manifest":
            for item in children(part, "item"):
                if attribute(item, "media-type") in _TEXT_TYPES:
                    reference = unquote(attribute(item, "href").partition("#")[0])
                    # The result is only looked up in the archive, never in the file system.
                    items[attribute(item, "id")] = posixpath.normpath(posixpath.join(folder, reference))
        elif local_name(part) == "spine":
            order += [attribute(item, "idref") for item in children(part, "itemref")]
    return list(dict.fromkeys(items[key] for key in order if key in items))


def _metadata(package: _Element, name: str) -> str:
    for metadata in children(package, "metadata"):
        for element in metadata.iter(f"{{*}}{name}"):
            text = " ".join("".join(map(str, element.itertext())).split())
            if text:
                return text
    return ""
