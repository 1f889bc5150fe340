"""Read HTML: the text that a browser shows, in lines that carry the source lines they come from. Nothing is executed.

justhtml builds the tree as browsers do, so omitted tags and misplaced elements lose no text, and its text nodes carry
their place in the source. Of a page, the <main> element is read, or the whole body if there is none or it holds less
than half of the text; without navigation, and without what is not shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from epic_rag_chroma.reading.containers import requires
from epic_rag_chroma.reading.document import Document, Heading, RepeatedHeader, SplitCost, plain_title
from epic_rag_chroma.reading.encoding import decode

if TYPE_CHECKING:
    from justhtml import Element, Text

__all__ = ["read_html"]


_DROPPED_NAMES = (
    "script style noscript template iframe object audio video canvas nav head title select datalist rp frameset "
    "annotation annotation-xml"
)
_DROPPED = frozenset(_DROPPED_NAMES.split())
# Of inline SVG, only what it shows is read; icons have titles that nobody sees.
_DROPPED_IN_SVG = frozenset({"title", "desc", "metadata", "defs", "style", "script"})
_DROPPED_ROLES = frozenset({"navigation", "search", "menu", "menubar", "toolbar"})
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCK_NAMES = (
    "p div section article main aside header footer ul ol li dl dt dd table thead tbody tfoot tr pre blockquote figure "
    "figcaption details summary form fieldset legend address hr h1 h2 h3 h4 h5 h6 html body caption center dir menu "
    "search hgroup listing xmp optgroup option text"
)
_BLOCKS = frozenset(_BLOCK_NAMES.split())
# Inline elements that a browser draws apart from their neighbours.
_APART = frozenset({"button", "textarea", "label", "input", "img", "td", "th"})
_ITEMS = frozenset({"li", "dt", "dd", "tr"})
_KEPT_TOGETHER = ("table", "li")
# In a table with one of these, or with longer cells, the cells are layout rather than data.
_LAYOUT = frozenset({"table", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "article", "section", "form"})
_MAX_CELL = 400
_MAX_SPAN = 1000
_MAX_TABLE_CELLS = 200_000
_MAIN_SHARE = 0.5

# Markup that browsers take for comments: processing instructions, declarations, end tags without a name. justhtml keeps
# it as text when it tracks places. What ends with `--` may be the end of a comment around it.
_BOGUS = re.compile(r"<(?:[?!](?!--)|/(?![a-zA-Z]))[^<>]*(?<!--)>")
_CDATA = re.compile(r"<!\[CDATA\[|\]\]>")
# In XHTML, any element may be empty; HTML's parser would take the rest of the page for the title of `<title/>`.
_XHTML = re.compile(r"<\?xml\s|xmlns\s*=\s*[\"']http://www.w3.org/1999/xhtml")
_XHTML_WITHIN = 2000
_VOID = "br|hr|img|input|meta|link|col|area|base|embed|source|track|wbr|param"
_EMPTY = re.compile(rf"<(?!(?:{_VOID})\b)([a-zA-Z][\w:-]*)((?:\s[^<>]*)?)/>")

_Span = tuple[int, int]


class _Lines:
    """Collects text into lines; the span of a line is that of the source lines of its words."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.costs: list[SplitCost] = []
        self.spans: list[_Span] = []
        self.keep_together: list[tuple[int, int]] = []
        self.repeated_headers: list[RepeatedHeader] = []
        self._opened: list[int] = []
        self._words: list[str] = []
        self._span: _Span | None = None
        self._next = SplitCost.BLOCK

    def add(self, text: str, source: int) -> None:
        """Add running text that begins on a source line."""
        if text.strip():
            first = source + text[: len(text) - len(text.lstrip())].count("\n")
            last = first + text.strip().count("\n")
            self._span = (first, last) if self._span is None else (min(first, self._span[0]), max(last, self._span[1]))
        self._words.append(text)

    def add_line(self, text: str, span: _Span) -> None:
        """Add a line of its own."""
        self._words, self._span = [text], span
        self.end()

    def add_marker(self, text: str, *, inside: bool = False) -> None:
        """Add a bullet or separator, which alone is not a line; `inside`: only after other text."""
        if not inside or self._span is not None:
            self._words.append(text)

    def end(self, following: SplitCost = SplitCost.BLOCK) -> None:
        """End the line, if it has text; `following` is the split cost of the next one."""
        text = " ".join("".join(self._words).split())
        if text and self._span is not None:
            self._append(text, self._span, self._next)
            self._next = following
        else:
            self._next = min(self._next, following)
        self._words, self._span = [], None

    def open(self) -> None:
        """Open a table or list item, after `end`."""
        self._opened.append(len(self.lines))

    def close(self, header: int | None = None) -> None:
        """Close the innermost table or list item, after `end`; the header of an outermost table is a line of it."""
        first = self._opened.pop()
        if first and first < len(self.lines) and not self.lines[first]:
            first += 1  # the empty line before the block
        end = len(self.lines)
        if end - first > 1:
            self.keep_together.append((first, end))
        if header is not None and not self._opened and header + 1 < end:
            self.costs[header + 1] = SplitCost.INSIDE
            self.repeated_headers.append(RepeatedHeader(header + 1, end, self.lines[header]))

    def row(self, cells: list[str], span: _Span) -> int | None:
        """Add a row of a table; return its line, None if it is empty."""
        self.end(SplitCost.ITEM)
        text = " | ".join(cells).strip(" |")
        if not text:
            return None
        self._append(text, span, self._next)
        self._next = SplitCost.ITEM
        return len(self.lines) - 1

    def preformatted(self, lines: list[tuple[str, _Span]]) -> None:
        """Add the lines of a <pre> with their indentation."""
        self.end()
        while lines and not lines[-1][0].strip():
            lines.pop()
        following = SplitCost.BLOCK
        for line, span in lines:
            if line.strip() or following is not SplitCost.BLOCK:
                self._append(line.rstrip(), span, following)
                following = SplitCost.INSIDE
        self._next = SplitCost.BLOCK

    def _append(self, text: str, span: _Span, cost: SplitCost) -> None:
        if self.lines and cost is SplitCost.BLOCK:
            # Blocks are separated by an empty line.
            self.lines.append("")
            self.costs.append(SplitCost.BLOCK)
            self.spans.append((self.spans[-1][1], self.spans[-1][1]))
        self.lines.append(text)
        self.costs.append(cost)
        self.spans.append(span)


def read_html(data: bytes | str) -> Document:
    """Extract the text of a page, from its bytes or its characters."""
    with requires("justhtml", "reading HTML files"):
        from justhtml import JustHTML
    xml = data if isinstance(data, str) else decode(data)
    text = _BOGUS.sub(_line_ends, _CDATA.sub("", xml.replace("\r\n", "\n").replace("\r", "\n")))
    if _XHTML.search(xml[:_XHTML_WITHIN]):
        text = _EMPTY.sub(r"<\1\2></\1>", text)
    reader = _Reader(text.split("\n"))
    root = cast("Element", JustHTML(text, sanitize=False, track_node_locations=True).root)
    title = next((element for element in _elements(root) if element.name == "title"), None)
    for part in _main_parts(root):
        reader.read(part)
    out, headings = reader.out, reader.headings
    name = "" if title is None else plain_title(_text_of(title))
    if name and out.lines and not any(heading.level == 1 for heading in headings):
        headings.insert(0, Heading(0, 0, name, 0))
    return Document(
        out.lines,
        out.costs,
        headings,
        spans=out.spans,
        keep_together=out.keep_together,
        repeated_headers=out.repeated_headers,
    )


def _line_ends(match: re.Match[str]) -> str:
    return "\n" * match.group().count("\n")


def _children(node: Element) -> list[Any]:
    """Return the child nodes; of a declarative shadow root, which browsers show, those of its template."""
    if node.name == "template" and "shadowrootmode" in (node.attrs or {}):
        content = getattr(node, "template_content", None)
        return list(content.children or ()) if content is not None else []
    return list(node.children or ())


def _elements(root: Element) -> Iterator[Element]:
    """Yield the elements below a node in order, without those that are not read, and without recursion."""
    stack = [root]
    while stack:
        node = stack.pop()
        if node is not root:
            yield node
        stack.extend(child for child in reversed(_children(node)) if child.name[0] not in "#!?")


def _is_dropped(node: Element) -> bool:
    """Return whether an element is not shown, or is no part of a page's text."""
    if node.namespace == "svg":
        return node.name in _DROPPED_IN_SVG
    attrs: dict[str, str | None] = node.attrs or {}
    if not attrs:
        return node.name in _DROPPED
    if node.name in _DROPPED:
        return node.name != "template" or "shadowrootmode" not in attrs
    if (attrs.get("role") or "").strip().lower() in _DROPPED_ROLES:
        return True
    if "hidden" in attrs and (attrs["hidden"] or "").lower() != "until-found" and attrs.get("role") != "tabpanel":
        return True  # what scripts show on a click is usually hidden by its style
    if node.name == "a" and (attrs.get("href") or "").startswith("#"):
        # The sign beside a heading that links to it: a pilcrow, a number sign, a picture.
        return not any(map(str.isalnum, _text_of(node, whole=True)))
    return "katex-html" in (attrs.get("class") or "")  # repeats the formula before it, letter by letter


def _text_of(root: Element, *, whole: bool = False) -> str:
    """Return the text of an element on one line; `whole` includes what is not shown."""
    parts: list[str] = []
    stack: list[Any] = list(reversed(_children(root)))
    while stack:
        node = stack.pop()
        if node is None:
            parts.append(" ")
        elif node.name == "#text":
            parts.append(node.data or "")
        elif node.name[0] not in "#!?" and (whole or not _is_dropped(node)):
            apart = node.name in _BLOCKS or node.name in _APART or node.name == "br"
            stack.extend([None] if apart else ())
            parts.append(" " if apart else "")
            stack.extend(reversed(_children(node)))
    return " ".join("".join(parts).split())


def _main_parts(root: Element) -> list[Element]:
    """Return the main elements of a page, or the page if they hold less than half of its text."""
    parts: list[Element] = []
    lengths: list[int] = []
    total = 0
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, inside = stack.pop()
        if node.name == "#text":
            length = len("".join((node.data or "").split()))
            total += length
            if inside:
                lengths[-1] += length
        elif node.name in ("#document", "#document-fragment") or node.name[0] not in "#!?":
            if node is not root and _is_dropped(node):
                continue
            if not inside and (node.name == "main" or ((node.attrs or {}).get("role") or "").lower() == "main"):
                parts.append(node)
                lengths.append(0)
                inside = True
            stack.extend((child, inside) for child in reversed(_children(node)))
    return parts if parts and sum(lengths) >= total * _MAIN_SHARE else [root]


class _Reader:
    """Walks elements, without recursion because of their depth, and collects lines and headings."""

    def __init__(self, source: list[str]) -> None:
        self.out = _Lines()
        self.headings: list[Heading] = []
        self._source = source

    def read(self, part: Element) -> None:
        """Add the text of an element."""
        out = self.out
        stack: list[Any] = [part]
        while stack:
            node = stack.pop()
            if isinstance(node, str):  # the end of a block
                if node in _APART:
                    out.add_marker(" ")
                    continue
                out.end(SplitCost.ITEM if node in _ITEMS else SplitCost.BLOCK)
                if node in _KEPT_TOGETHER:
                    out.close()
                continue
            name = node.name
            if name == "#text":
                out.add(node.data or "", self._line(node))
                continue
            if name[0] in "!?" or name == "#comment" or (node is not part and _is_dropped(node)):
                continue
            if name in _HEADINGS:
                self._heading(node)
            elif name == "pre" or name == "listing" or name == "xmp":
                self._preformatted(node)
            elif name == "table" and self._table(node):
                pass
            elif name == "ruby":
                self._ruby(node)
            elif name == "br":
                out.end(SplitCost.LINE)
            else:
                if name in ("td", "th"):
                    out.add_marker(" | ", inside=True)
                elif name in _APART:
                    out.add_marker(" ")
                    stack.append(name)
                elif name in _BLOCKS:
                    out.end(SplitCost.ITEM if name in _ITEMS else SplitCost.BLOCK)
                    if name in _KEPT_TOGETHER:
                        out.open()
                    if name == "li":
                        out.add_marker("- ")
                    stack.append(name)
                stack.extend(reversed(_children(node)))
        out.end()

    def _line(self, text: Text) -> int:
        """Return the source line on which a text begins."""
        line = text.origin_line or 1
        # The line end after <pre> is in the source and not in the text.
        if line <= len(self._source) and not self._source[line - 1][(text.origin_col or 1) - 1 :]:
            line += not (text.data or "").startswith("\n")
        return line

    def _texts(self, root: Element) -> Iterator[Text]:
        """Yield the text nodes of an element that are shown."""
        stack: list[Any] = [root]
        while stack:
            node = stack.pop()
            if node.name == "#text":
                yield node
            elif node.name[0] not in "#!?" and (node is root or not _is_dropped(node)):
                stack.extend(reversed(_children(node)))

    def _span_of(self, root: Element) -> _Span | None:
        """Return the source lines of an element's text; None without any."""
        span: _Span | None = None
        for text in self._texts(root):
            data = text.data or ""
            if data.strip():
                first = self._line(text) + data[: len(data) - len(data.lstrip())].count("\n")
                last = first + data.strip().count("\n")
                span = (first, last) if span is None else (min(span[0], first), max(span[1], last))
        return span

    def _heading(self, node: Element) -> None:
        self.out.end()
        text = _text_of(node)
        title, span = plain_title(text), self._span_of(node)
        if title and span is not None:
            self.headings.append(Heading(len(self.out.lines) + bool(self.out.lines), _HEADINGS[node.name], title))
            self.out.add_line(text, span)

    def _preformatted(self, node: Element) -> None:
        lines: list[tuple[str, _Span]] = []
        for text in self._texts(node):
            for number, part in enumerate((text.data or "").split("\n"), start=self._line(text)):
                if lines and number == self._line(text):
                    before, span = lines[-1]
                    lines[-1] = (before + part, (span[0], max(span[1], number)))
                else:
                    lines.append((part, (number, number)))
        self.out.preformatted(lines)

    def _ruby(self, node: Element) -> None:
        """Add the base text as one word, then its reading in brackets."""
        readings = [element for element in _elements(node) if element.name == "rt"]
        inside = {id(text) for reading in readings for text in self._texts(reading)}
        for text in self._texts(node):
            if id(text) not in inside:
                self.out.add(text.data or "", self._line(text))
        reading = "".join(_text_of(element) for element in readings)
        span = self._span_of(node)
        if reading and span is not None:
            self.out.add(f" ({reading})", span[1])

    def _table(self, table: Element) -> bool:
        """Add a table of data, a line for each row; return False for one that is layout.

        A cell counts for each row and column that it spans, so that every row is complete.
        """
        rows: list[list[tuple[Element, str, int, int]]] = []
        caption: Element | None = None
        stack: list[Any] = list(reversed(_children(table)))
        while stack:
            node = stack.pop()
            if node.name[0] in "#!?" or _is_dropped(node):
                continue
            if node.name in _LAYOUT:
                return False
            if node.name == "caption":
                caption = node
            elif node.name in ("td", "th") and rows:
                text = _text_of(node)
                if len(text) > _MAX_CELL or any(inner.name in _LAYOUT for inner in _elements(node)):
                    return False
                rows[-1].append((node, text, _spanned(node, "colspan"), _spanned(node, "rowspan")))
            else:
                if node.name == "tr":
                    rows.append([])
                stack.extend(reversed(_children(node)))
        out = self.out
        out.end()
        out.open()
        if caption is not None:
            self.read(caption)
        header: int | None = None
        above: dict[int, tuple[str, int, _Span | None]] = {}  # by column: text, rows left, and source lines
        added = 0
        for number, row in enumerate(rows):
            cells: list[str] = []
            spans: list[_Span] = []
            column = 0
            below: dict[int, tuple[str, int, _Span | None]] = {}
            pending = list(row)
            while pending or any(place >= column for place in above):
                if column in above:
                    text, left, span = above[column]
                    cells.append(text)
                    spans += [span] if span is not None and text else []
                    if left > 1:
                        below[column] = (text, left - 1, span)
                    column += 1
                elif pending:
                    node, text, across, down = pending.pop(0)
                    span = self._span_of(node)
                    spans += [span] if span is not None else []
                    # A title over the whole table is not repeated for each column.
                    across = 1 if len(row) == 1 and not above else across
                    for place in range(column, column + across):
                        cells.append(text)
                        if down > 1:
                            below[place] = (text, down - 1, span)
                    column += across
                else:
                    cells.append("")
                    column += 1
            above = below
            added += len(cells)
            if added > _MAX_TABLE_CELLS:
                break
            if spans:
                line = out.row(cells, (min(first for first, _ in spans), max(last for _, last in spans)))
                if number == 0 and any(node.name == "th" for node, _, _, _ in row):
                    header = line
        out.end()
        out.close(header)
        return True


def _spanned(node: Element, name: str) -> int:
    """Return the number of rows or columns of a cell."""
    value = (node.attrs or {}).get(name) or "1"
    number = int(value) if value.isascii() and value.isdigit() and len(value) < 6 else 1
    return min(max(1, number), _MAX_SPAN)
