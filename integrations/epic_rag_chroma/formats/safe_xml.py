"""XML that others wrote: no entity is expanded, no DTD is loaded, nothing is fetched, and libxml2's own limits hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from epic_rag.errors import MissingExtraError

if TYPE_CHECKING:
    from lxml.etree import _Element

__all__ = ["attribute", "children", "local_name", "parse"]


def parse(data: bytes, purpose: str) -> _Element:
    """The root element of a document.

    Args:
        data: The XML.
        purpose: What it is read for, if lxml is missing ("reading EPUB files").

    Raises:
        MissingExtraError: If lxml is not installed.
        lxml.etree.XMLSyntaxError: If it is not well-formed.
    """
    try:
        from lxml import etree
    except ImportError as error:
        raise MissingExtraError("lxml", "files", purpose) from error
    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        remove_comments=True,
        remove_pis=True,
        huge_tree=False,
    )
    return etree.fromstring(data, parser)


def local_name(element: _Element) -> str:
    """The element's name without its namespace; "" for what is no element (an entity that was not expanded)."""
    tag: object = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def attribute(element: _Element, name: str) -> str:
    """An attribute by its name without namespace; "" if there is none."""
    for key, value in element.attrib.items():
        if str(key).rpartition("}")[2] == name:
            return str(value)
    return ""


def children(element: _Element, *names: str) -> Iterator[_Element]:
    """The children with one of these names (without namespace)."""
    for child in element:
        if local_name(child) in names:
            yield child
