"""Read documents of Word, and Rich Text.

Headings by style or outline level with their numbers, paragraphs, lists, tables, text boxes. The text is read from the
XML elements, because python-docx omits content controls and insertions that were not accepted yet, and opens neither
"Strict Open XML" nor documents with macros. Headers come first and footers last; notes, comments, charts and diagrams
follow their paragraph. A Word document has no pages until it is laid out; places are headings. Rich Text is read by
striprtf as plain paragraphs, without images and embedded objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from epic_rag_chroma.reading.containers import (
    EQUATION_MARKS,
    DocumentBuilder,
    attribute,
    children,
    local_name,
    parsing,
    printable,
    requires,
)
from epic_rag_chroma.reading.document import (
    BrokenFileError,
    Document,
    NotTextError,
    SplitCost,
    split_lines,
    text_split_costs,
)
from epic_rag_chroma.reading.drawing import chart_rows, chart_titles, diagram_texts, related_drawings
from epic_rag_chroma.reading.html import read_html
from epic_rag_chroma.reading.package import Package

if TYPE_CHECKING:
    from lxml.etree import _Element

__all__ = ["read_docx", "read_rtf"]


_FORMAT = "Word document"
_PURPOSE = "reading Word documents"
_RTF = "RTF document"
_HEADING = re.compile(r"heading\s*([1-9])\b", re.IGNORECASE)
_CONTENTS = re.compile(r"toc\s*\d|table of (?:figures|authorities)", re.IGNORECASE)
_TITLE_LEVEL = 0
# Deleted text, field codes, properties.
_SKIPPED = frozenset({"del", "moveFrom", "instrText", "delText", "delInstrText", "rPr", "pPr", "sectPr", "rt"})
_WRAPPERS = frozenset({"sdt", "sdtContent", "ins", "moveTo", "customXml", "smartTag"})
# In a table with a longer cell, a heading or another table, the cells are layout rather than data.
_MAX_CELL = 400
_MAX_SPAN = 1000
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_ROMAN = ((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"), (10, "x"))
_ROMAN_UNITS = ("", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix")


def read_docx(data: bytes) -> Document:
    """Read a .docx, .docm, .dotx or .dotm file."""
    with parsing(_FORMAT):
        return _Reader(Package(data, _FORMAT, _PURPOSE, "document")).document()


def read_rtf(data: bytes) -> Document:
    """Read an .rtf file."""
    with requires("striprtf", "reading RTF documents"):
        from striprtf.striprtf import rtf_to_text
    if not data.lstrip().startswith(b"{\\rtf"):
        raise BrokenFileError(f"not an {_RTF}")
    to_text: Callable[..., str] = rtf_to_text  # striprtf is marked as typed, and is not
    out = DocumentBuilder(_RTF)
    with parsing(_RTF):
        text = printable(to_text(data.decode("cp1252", errors="replace"), errors="replace"))
        lines = split_lines(text)
        out.add_document(Document(lines, text_split_costs(lines)))
    return out.document()


class _Text(NamedTuple):
    """The text of a paragraph, and what is anchored in it."""

    text: str
    notes: list[str]
    boxes: list[_Element]
    drawings: list[_Element]


class _Reader:
    def __init__(self, package: Package) -> None:
        self._package = package
        self._part = package.main
        self._styles = _Styles(package)
        self._numbers = _Numbers(package)
        self._notes = _notes(package)
        self._out = DocumentBuilder(_FORMAT)
        self._in_list = False

    def document(self) -> Document:
        body = next(children(self._package.root, "body"), self._package.root)
        self._surroundings("header")
        self._blocks(body)
        self._surroundings("footer")
        return self._out.document()

    def _surroundings(self, kind: str) -> None:
        """Add the headers or the footers of all sections, each text once."""
        seen: set[str] = set()
        for part in dict.fromkeys(self._package.related(self._package.main, kind)):
            root = self._package.xml(part)
            text = " ".join(_paragraphs(root))
            if text.strip("0123456789 ") and text not in seen:
                seen.add(text)
                self._part = part
                self._blocks(root)
        self._part = self._package.main
        self._in_list = False

    def _blocks(self, parent: _Element) -> None:
        for child in parent:
            name = local_name(child)
            if name == "p":
                self._paragraph(child)
            elif name == "tbl":
                self._table(child)
                self._in_list = False
            elif name == "altChunk":
                self._other_document(self._package.target(self._part, attribute(child, "id")))
            elif name in _WRAPPERS:
                self._blocks(child)

    def _paragraph(self, paragraph: _Element) -> None:
        found = _text(paragraph)
        text = found.text.strip()
        properties = next(children(paragraph, "pPr"), None)
        style = self._styles.of(properties)
        if style.is_contents:
            return
        number = self._numbers.next(properties, style) if text else ""
        if text and style.level is not None:
            self._out.heading(f"{number} {text}".strip(), style.level)
        elif number and text:
            self._out.text(f"{number} {text}", cost=SplitCost.ITEM if self._in_list else SplitCost.BLOCK)
        else:
            self._out.text(found.text)
        self._in_list = bool(number) and style.level is None
        self._anchored(found)

    def _anchored(self, found: _Text) -> None:
        """Add the notes, comments, drawings and text boxes of a paragraph."""
        for note in found.notes:
            text = self._notes.get(note, "")
            if text:
                self._out.text(
                    f"Comment{text}" if note.startswith("c") else f"[{note}] {text}", cost=SplitCost.SENTENCE
                )
        for drawing in found.drawings:
            for kind, root in related_drawings(self._package, self._part, drawing):
                for title in chart_titles(root) if kind == "chart" else diagram_texts(root):
                    self._out.text(title)
                if kind == "chart":
                    self._out.rows(chart_rows(root))
        for box in found.boxes:
            self._blocks(box)

    def _table(self, table: _Element) -> None:
        rows = [list(_below(row, "tc")) for row in _below(table, "tr")]
        cells = [[_text_of_cell(cell) for cell in row] for row in rows]
        if any(
            self._is_layout(cell, text)
            for row, texts in zip(rows, cells, strict=True)
            for cell, text in zip(row, texts, strict=True)
        ):
            for row in rows:
                for cell in row:
                    self._blocks(cell)
            return
        above: list[str] = []
        filled: list[list[str]] = []
        for row, texts in zip(rows, cells, strict=True):
            line: list[str] = []
            for cell, text in zip(row, texts, strict=True):
                properties = next(children(cell, "tcPr"), cell)
                merge = next(children(properties, "vMerge"), None)
                if merge is not None and attribute(merge, "val") != "restart" and len(line) < len(above):
                    text = above[len(line)]
                span = next((attribute(child, "val") for child in children(properties, "gridSpan")), "")
                # A title over the whole table is not repeated for each column.
                across = int(span) if span.isdecimal() and len(row) > 1 else 1
                line += [text] * min(max(1, across), _MAX_SPAN)
            above = line
            filled.append(line)
        self._out.rows(filled)
        for row in rows:
            for cell in row:
                for paragraph in cell.iter("{*}p"):
                    self._anchored(_text(paragraph)._replace(boxes=[]))

    def _is_layout(self, cell: _Element, text: str) -> bool:
        return (
            len(text) > _MAX_CELL
            or next(cell.iter("{*}tbl"), None) is not None
            or any(self._styles.of(properties).level is not None for properties in cell.iter("{*}pPr"))
        )

    def _other_document(self, part: str) -> None:
        """Add a part in another format, which Word converts when it opens the document."""
        if part.lower().endswith((".htm", ".html", ".xhtml")):
            try:
                self._out.add_document(read_html(self._package.read(part)))
            except (BrokenFileError, NotTextError):
                return


class _Style(NamedTuple):
    level: int | None = None  # of a heading
    is_contents: bool = False
    is_list: bool = False
    numbering: tuple[str, str] = ("", "")
    key: str = ""


class _Styles:
    """Paragraph styles. Built-in styles have English names in the file, in every display language."""

    def __init__(self, package: Package) -> None:
        self._known: dict[str, _Style] = {}
        parents: dict[str, str] = {}
        for part in package.related(package.main, "styles")[:1]:
            for style in children(package.xml(part), "style"):
                key = attribute(style, "styleId")
                level, is_contents, is_list, numbering = None, False, False, ("", "")
                for child in style:
                    name, value = local_name(child), attribute(child, "val")
                    if name == "name":
                        found = _HEADING.match(value)
                        level = int(found.group(1)) if found else _TITLE_LEVEL if value.lower() == "title" else level
                        is_contents = _CONTENTS.match(value) is not None
                        is_list = value.lower().startswith("list") and not value.lower().startswith("list paragraph")
                    elif name == "basedOn":
                        parents[key] = value
                    elif name == "pPr":
                        outline, numbering = _outline_level(child), _numbering(child)
                        level = outline if level is None else level
                self._known[key] = _Style(level, is_contents, is_list, numbering, key)
        own = dict(self._known)
        for key in own:
            line = [own[key]]
            while line[-1].key in parents and len(line) < 20:
                line.append(own.get(parents[line[-1].key], _Style()))
            self._known[key] = own[key]._replace(
                level=next((one.level for one in line if one.level is not None), None),
                numbering=next((one.numbering for one in line if one.numbering[0]), ("", "")),
                is_list=any(one.is_list for one in line),
            )

    def of(self, properties: _Element | None) -> _Style:
        """Return the style of a paragraph by its properties, which may override it."""
        if properties is None:
            return _Style()
        key = next((attribute(child, "val") for child in children(properties, "pStyle")), "")
        style = self._known.get(key) or _Style(is_list=key.lower().startswith("list"))
        level = _outline_level(properties)
        return style if level is None else style._replace(level=level)


def _outline_level(properties: _Element) -> int | None:
    for outline in children(properties, "outlineLvl"):
        value = attribute(outline, "val")
        if value.isdecimal() and int(value) < 9:  # 9 is body text
            return int(value) + 1
    return None


def _numbering(properties: _Element) -> tuple[str, str]:
    """Return the id and the level of the numbering in the properties of a paragraph or style."""
    for numbering in children(properties, "numPr"):
        values = {local_name(child): attribute(child, "val") for child in numbering}
        return values.get("numId", ""), values.get("ilvl", "")
    return "", ""


class _Level(NamedTuple):
    start: int
    format: str
    text: str
    style: str
    decimal: bool


class _Numbers:
    """Numbers of headings and list items, which are not in the text but counted by Word."""

    def __init__(self, package: Package) -> None:
        self._levels: dict[str, dict[int, _Level]] = {}  # by abstract numbering
        self._abstract: dict[str, str] = {}  # by numbering
        self._starts: dict[str, dict[int, int]] = {}
        self._counters: dict[str, dict[int, int]] = {}
        self._begun: set[tuple[str, int]] = set()
        links: dict[str, str] = {}
        styles: dict[str, str] = {}
        for part in package.related(package.main, "numbering")[:1]:
            root = package.xml(part)
            for abstract in children(root, "abstractNum"):
                key = attribute(abstract, "abstractNumId")
                self._levels[key] = dict(map(_level, children(abstract, "lvl")))
                for link in children(abstract, "numStyleLink"):
                    links[key] = attribute(link, "val")
                for link in children(abstract, "styleLink"):
                    styles[attribute(link, "val")] = key
            for number in children(root, "num"):
                key = attribute(number, "numId")
                self._abstract[key] = next((attribute(child, "val") for child in children(number, "abstractNumId")), "")
                for override in children(number, "lvlOverride"):
                    level = attribute(override, "ilvl")
                    start = next((attribute(child, "val") for child in children(override, "startOverride")), "")
                    if level.isdecimal() and start.isdecimal():
                        self._starts.setdefault(key, {})[int(level)] = int(start)
        for key, style in links.items():
            self._levels[key] = self._levels.get(styles.get(style, ""), {})

    def next(self, properties: _Element | None, style: _Style) -> str:
        """Return the number or bullet of the next paragraph with these properties; "" if it has none."""
        number, level_text = _numbering(properties) if properties is not None else ("", "")
        number = number or style.numbering[0]
        abstract = self._abstract.get(number, "")
        levels = self._levels.get(abstract, {})
        if not levels:
            return "-" if style.is_list and number != "0" and style.level is None else ""
        linked = next((at for at, level in levels.items() if style.key and level.style == style.key), None)
        text = level_text or ("" if linked is not None else style.numbering[1])
        at = int(text) if text.isdecimal() else linked or 0
        level = levels.get(at)
        if level is None:
            return ""
        if level.format in ("bullet", "none", "") or not level.text:
            return "-" if level.format == "bullet" and style.level is None else ""
        counters = self._counters.setdefault(abstract, {})
        override = self._starts.get(number, {}).get(at)
        if override is not None and (number, at) not in self._begun:
            counters[at] = override
        else:
            counters[at] = counters[at] + 1 if at in counters else level.start
        self._begun.add((number, at))
        for lower in [lower for lower in counters if lower > at]:
            del counters[lower]

        def shown(match: re.Match[str]) -> str:
            place = int(match.group(1)) - 1
            of_place = levels.get(place)
            if of_place is None:
                return ""
            return _counted(counters.setdefault(place, of_place.start), "decimal" if level.decimal else of_place.format)

        return re.sub(r"%([1-9])", shown, level.text).strip()


def _level(level: _Element) -> tuple[int, _Level]:
    values = {local_name(child): attribute(child, "val") for child in level}
    at, start = attribute(level, "ilvl"), values.get("start", "1")
    is_legal = "isLgl" in values and values["isLgl"] not in ("0", "false", "off")
    return int(at) if at.isdecimal() else 0, _Level(
        int(start) if start.isdecimal() else 1,
        values.get("numFmt", "decimal"),
        values.get("lvlText", ""),
        values.get("pStyle", ""),
        is_legal,
    )


def _counted(value: int, number_format: str) -> str:
    """Return a number in a format of Word ("lowerRoman")."""
    if number_format.endswith("Letter") and value > 0:
        letter = _LETTERS[(value - 1) % 26] * min((value - 1) // 26 + 1, 20)
        return letter.upper() if number_format.startswith("upper") else letter
    if number_format.endswith("Roman") and 0 < value < 4000:
        text, rest = "", value
        for size, letters in _ROMAN:
            text, rest = text + letters * (rest // size), rest % size
        text += _ROMAN_UNITS[rest]
        return text.upper() if number_format.startswith("upper") else text
    if number_format == "decimalZero":
        return f"{value:02d}"
    return "" if number_format == "none" else str(value)


def _notes(package: Package) -> dict[str, str]:
    """Return the text of footnotes, endnotes ("e" before the mark) and comments ("c" before the id)."""
    notes = {}
    for kind, prefix in (("footnotes", ""), ("endnotes", "e"), ("comments", "c")):
        for part in package.related(package.main, kind):
            for note in package.xml(part):
                if attribute(note, "type") in ("", "normal"):
                    text = _text_of_cell(note)
                    author = attribute(note, "author")
                    if kind == "comments" and text:
                        text = f" by {author}: {text}" if author else f": {text}"
                    notes[prefix + attribute(note, "id")] = text
    return notes


def _below(element: _Element, name: str) -> Iterator[_Element]:
    """Yield the children with a name, also inside wrappers such as content controls."""
    for child in element:
        found = local_name(child)
        if found == name:
            yield child
        elif found in _WRAPPERS:
            yield from _below(child, name)


def _paragraphs(element: _Element) -> Iterator[str]:
    """Yield the paragraphs below an element, those of text boxes too, each on one line."""
    for paragraph in element.iter("{*}p"):
        text = " ".join(_text(paragraph).text.split())
        if text:
            yield text


def _text_of_cell(element: _Element) -> str:
    return " ".join(_paragraphs(element))


def _text(paragraph: _Element) -> _Text:
    parts: list[str] = []
    notes: list[str] = []
    boxes: list[_Element] = []
    drawings: list[_Element] = []
    stack = list(reversed(paragraph))
    while stack:
        element = stack.pop()
        name = local_name(element)
        if name in _SKIPPED or (name == "r" and _is_hidden(element)):
            continue
        if name == "t":
            parts.append(element.text or "")
        elif name in ("tab", "ptab"):
            parts.append("\t")
        elif name in ("br", "cr"):
            parts.append("\n")
        elif name == "noBreakHyphen":
            parts.append("-")
        elif name in ("footnoteReference", "endnoteReference"):
            mark = ("" if name == "footnoteReference" else "e") + attribute(element, "id")
            notes.append(mark)
            parts.append(f"[{mark}]")
        elif name == "commentReference":
            notes.append(f"c{attribute(element, 'id')}")
        elif name == "txbxContent":
            boxes.append(element)
        elif name == "textpath":  # WordArt of old versions
            parts.append(f" {attribute(element, 'string')} ")
        elif name in ("chart", "relIds"):
            drawings.append(element)
        else:
            if name in EQUATION_MARKS and next(element.iter("{*}t"), None) is not None:
                parts.append(EQUATION_MARKS[name])
            stack.extend(reversed(element))
    return _Text("".join(parts), notes, boxes, drawings)


def _is_hidden(run: _Element) -> bool:
    return any(
        attribute(hidden, "val") not in ("0", "false", "off")
        for properties in children(run, "rPr")
        for hidden in children(properties, "vanish")
    )
