"""Read EPUB: the documents of the spine in reading order, read as HTML, below the title of the book."""

from __future__ import annotations

import posixpath
from contextlib import suppress
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
from epic_rag_chroma.reading.document import BrokenFileError, Document, NotTextError
from epic_rag_chroma.reading.html import read_html

if TYPE_CHECKING:
    from lxml.etree import _Element

__all__ = ["read_epub"]


_EPUB = "EPUB book"
_EPUB_PURPOSE = "reading EPUB books"
_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_TEXT_TYPES = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml", "application/xml", "text/xml")
_TEXT_SUFFIXES = (".xhtml", ".html", ".htm", ".xht")
_BOOK_LEVEL = -1


def read_epub(data: bytes) -> Document:
    """Read an .epub file; damaged chapters are skipped."""
    out = DocumentBuilder(_EPUB)
    archive = Archive(data, _EPUB)
    names = {name.lower(): name for name in archive.names()}
    with parsing(_EPUB):
        packages = _packages(archive)
        if not packages:
            raise BrokenFileError(f"a broken {_EPUB}: {_CONTAINER} names no package")
        encrypted: set[str] = set()
        if _ENCRYPTION in archive:
            encryption = parse_xml(archive.read(_ENCRYPTION), _EPUB_PURPOSE)
            encrypted = {unquote(attribute(item, "URI")) for item in encryption.iter("{*}CipherReference")}
        read: set[str] = set()
        parts = Parts()
        for package_name in packages:
            package = parse_xml(archive.read(package_name), _EPUB_PURPOSE)
            chapters = [
                names.get(chapter.lower(), chapter) for chapter in _spine(package, posixpath.dirname(package_name))
            ]
            # In readable books, fonts are often encrypted.
            if encrypted.intersection(chapters):
                raise BrokenFileError(f"an encrypted {_EPUB} (DRM)")
            chapters = [chapter for chapter in chapters if chapter not in read]
            title, creator = _metadata(package, "title"), _metadata(package, "creator")
            if title and chapters:
                out.heading(f"{title} ({creator})" if creator else title, _BOOK_LEVEL)
            for chapter in chapters:
                read.add(chapter)
                with parts.part(f"chapter {chapter[:80]} of an {_EPUB}"), suppress(NotTextError):
                    out.add_document(read_html(archive.read(chapter)))
        if not read:
            raise BrokenFileError(f"a broken {_EPUB}: no document in its spine")
        parts.check()
        return out.document()


def _packages(archive: Archive) -> list[str]:
    """Return the names of the packages: a book may hold several, as other layouts of it or as other books."""
    if _CONTAINER in archive:
        container = parse_xml(archive.read(_CONTAINER), _EPUB_PURPOSE)
        found = [attribute(file, "full-path") for file in container.iter("{*}rootfile")]
        return list(dict.fromkeys(name for name in found if name in archive))
    return [name for name in archive.names() if name.lower().endswith(".opf")]


def _spine(package: _Element, folder: str) -> list[str]:
    """Return the names of the documents in reading order, without duplicates; all if there is no order."""
    items: dict[str, str] = {}
    order: list[str] = []
    for part in package:
        if local_name(part) == "manifest":
            for item in children(part, "item"):
                reference = unquote(attribute(item, "href").partition("#")[0])
                if attribute(item, "media-type") in _TEXT_TYPES or reference.lower().endswith(_TEXT_SUFFIXES):
                    # The result is only looked up in the archive, never in the file system.
                    items[attribute(item, "id")] = posixpath.normpath(posixpath.join(folder, reference))
        elif local_name(part) == "spine":
            order += [attribute(item, "idref") for item in children(part, "itemref")]
    named = [items[key] for key in order if key in items]
    return list(dict.fromkeys(named or items.values()))


def _metadata(package: _Element, name: str) -> str:
    for metadata in children(package, "metadata"):
        for element in metadata.iter(f"{{*}}{name}"):
            text = " ".join("".join(map(str, element.itertext())).split())
            if text:
                return text
    return ""
