"""Parts of an Office Open XML package (.docx, .pptx, .xlsx) and the relations between them.

Names of elements and relations are compared without their namespaces, so that the format "Strict Open XML", which has
others, is read as well.
"""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING
from urllib.parse import unquote

from epic_rag_chroma.reading.containers import Archive, attribute, children, local_name, parse_xml
from epic_rag_chroma.reading.document import BrokenFileError

if TYPE_CHECKING:
    from lxml.etree import _Element

__all__ = ["Package"]


class Package:
    """An Office Open XML package.

    Args:
        data: The file's bytes.
        format_name: The expected format, for messages ("Word document").
        purpose: What lxml is needed for, for the message if it is missing.
        main: The name of the root element of the main part ("document").

    Attributes:
        main: The name of the main part.

    Raises:
        BrokenFileError: If it is damaged, encrypted, of another format or above a limit.
    """

    def __init__(self, data: bytes, format_name: str, purpose: str, main: str) -> None:
        self._archive = Archive(data, format_name)
        self._names = {name.lower(): name for name in self._archive.names()}
        self._purpose = purpose
        self._relations: dict[str, dict[str, tuple[str, str]]] = {}
        names = self.related("", "officeDocument")
        if not names:
            raise BrokenFileError(f"a broken {format_name}: it names no main part")
        self.main = names[0]
        self.root = self.xml(self.main)
        if local_name(self.root) != main:
            raise BrokenFileError(f"another format than a {format_name}, in spite of its name")

    def __contains__(self, part: str) -> bool:
        return part.lower() in self._names

    def read(self, part: str) -> bytes:
        """Return the content of a part; names of parts are compared without case."""
        return self._archive.read(self._names.get(part.lower(), part))

    def xml(self, part: str) -> _Element:
        """Return the root element of a part, with one branch of each alternative."""
        root = parse_xml(self.read(part), self._purpose)
        for alternative in list(root.iter("{*}AlternateContent")):
            _choose(alternative)
        return root

    def related(self, part: str, kind: str) -> list[str]:
        """Return the parts that a part refers to by relations of a kind ("footnotes"), in order."""
        return [target for found, target in self._relations_of(part).values() if found == kind and target in self]

    def target(self, part: str, key: str) -> str:
        """Return the part that a part refers to by the id of a relation; "" if there is none."""
        target = self._relations_of(part).get(key, ("", ""))[1]
        return target if target in self else ""

    def _relations_of(self, part: str) -> dict[str, tuple[str, str]]:
        """Return the kinds and targets of the relations of a part by id; those of the package for ""."""
        if part not in self._relations:
            folder, name = posixpath.split(part)
            file = posixpath.join(folder, "_rels", f"{name}.rels")
            relations: dict[str, tuple[str, str]] = {}
            for relation in children(parse_xml(self.read(file), self._purpose), "Relationship") if file in self else ():
                if attribute(relation, "TargetMode") != "External":
                    target = unquote(attribute(relation, "Target")).replace("\\", "/").partition("#")[0]
                    # The result is only looked up in the archive, never in the file system.
                    target = posixpath.normpath(posixpath.join("/", folder, target)).lstrip("/")
                    kind = attribute(relation, "Type").rstrip("/").rpartition("/")[2]
                    relations[attribute(relation, "Id")] = (kind, target)
            self._relations[part] = relations
        return self._relations[part]


def _choose(alternative: _Element) -> None:
    """Replace alternatives by the first one, or by the fallback if only that has text."""
    parent = alternative.getparent()
    choices = [*children(alternative, "Choice"), *children(alternative, "Fallback")]
    if parent is None or not choices:
        return
    shows = ("{*}t", "{*}chart", "{*}relIds", "{*}imagedata", "{*}blip")
    chosen = next((choice for choice in choices if next(choice.iter(*shows), None) is not None), choices[0])
    at = parent.index(alternative)
    for child in reversed(list(chosen)):
        parent.insert(at, child)
    parent.remove(alternative)
