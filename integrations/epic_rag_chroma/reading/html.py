"""The text of an HTML page, in lines that know which lines of the source they come from. Nothing in it is executed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from epic_rag.errors import MissingExtraError
from epic_rag_chroma.reading.document import Break, Document, Heading, Repeat, clean_title
from epic_rag_chroma.reading.encoding import decode, is_utf16

if TYPE_CHECKING:
    from bs4 import Tag

__all__ = ["html"]


_DROPPED = ("script", "style", "noscript", "template", "svg", "math", "iframe", "nav", "head", "title", "select")
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCK_NAMES = (
    "p div section article main aside header footer ul ol li dl dt dd table thead tbody tr pre blockquote figure "
    "figcaption details summary form fieldset address hr h1 h2 h3 h4 h5 h6 body html caption"
)
_BLOCKS = frozenset(_BLOCK_NAMES.split())
_WHOLE = ("table", "li")


class _Lines:
    """Collects text into lines; a line's span is that of the source lines its words stand in."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.breaks: list[Break] = []
        self.spans: list[tuple[int, int]] = []
        self.wholes: list[tuple[int, int]] = []
        self.repeats: list[Repeat] = []
        self._opened: list[tuple[int, bool]] = []
        self._words: list[str] = []
        self._span: tuple[int, int] | None = None
        self._next = Break.BLOCK

    def add(self, text: str, source: int) -> None:
        """Add running text that begins at a source line."""
        leading = len(text) - len(text.lstrip())
        if text.strip():
            first = source + text[:leading].count("\n")
            last = first + text.strip().count("\n")
            self._span = (first, last) if self._span is None else (self._span[0], max(last, self._span[1]))
        self._words.append(text)

    def mark(self, text: str, *, inside: bool = False) -> None:
        """Add a mark of ours, which is nothing by itself; `inside`: only after other text."""
        if not inside or self._span is not None:
            self._words.append(text)

    def end(self, following: Break = Break.BLOCK) -> None:
        """End the line, if it has any text."""
        text = " ".join("".join(self._words).split())
        if text and self._span is not None:
            self._append(text, self._span, self._next)
            self._next = following
        else:
            self._next = min(self._next, following)
        self._words, self._span = [], None

    def open(self, node: Tag) -> None:
        """A table or list item begins, after `end`."""
        outermost = node.name == "table" and not self._opened
        row = node.find("tr") if outermost and node.find("caption") is None else None
        self._opened.append((len(self.lines), row is not None and row.find("th") is not None))

    def close(self) -> None:
        """The last one that began ends, after `end`."""
        first, has_header = self._opened.pop()
        if first and first < len(self.lines) and not self.lines[first]:
            first += 1  # the empty line before it
        end = len(self.lines)
        if end - first > 1:
            self.wholes.append((first, end))
            if has_header:
                self.breaks[first + 1] = Break.INSIDE
                self.repeats.append(Repeat(first + 1, end, self.lines[first]))

    def preformatted(self, text: str, source: int) -> None:
        """Add the lines of a <pre>, their indentation kept."""
        self.end()
        following = Break.BLOCK
        for offset, line in enumerate(text.rstrip().split("\n")):
            if line.strip() or following is not Break.BLOCK:
                self._append(line.rstrip(), (source + offset, source + offset), following)
                following = Break.INSIDE
        self._next = Break.BLOCK

    def _append(self, text: str, span: tuple[int, int], cost: Break) -> None:
        if self.lines and cost is Break.BLOCK:
            # Blocks are set apart by an empty line, as paragraphs are in text.
            self.lines.append("")
            self.breaks.append(Break.BLOCK)
            self.spans.append((self.spans[-1][1], self.spans[-1][1]))
        self.lines.append(text)
        self.breaks.append(cost)
        self.spans.append(span)


def html(data: bytes) -> Document:
    """Extract the text of a page: its main part if it names one, without scripts, navigation and markup.

    Raises:
        MissingExtraError: If beautifulsoup4 is not installed.
    """
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise MissingExtraError("beautifulsoup4", "files", "reading HTML files") from error
    with warnings.catch_warnings():
        # bs4 warns of XML, of markup that looks like a file name and the like; all of it is text to us.
        warnings.simplefilter("ignore")
        source = decode(data).encode() if is_utf16(data) else data
        soup = BeautifulSoup(source.replace(b"\r\n", b"\n").replace(b"\r", b"\n"), "html.parser")
    title = clean_title(soup.title.get_text()) if soup.title is not None else ""
    for tag in soup.find_all(_DROPPED):
        tag.extract()
    main = soup.find("main") or soup.find(role="main") or soup.find("article") or soup.body or soup
    collected = _Lines()
    headings = _collect(main, collected)
    if title and collected.lines and not any(heading.level == 1 for heading in headings):
        headings.insert(0, Heading(0, 0, title, 0))
    return Document(
        collected.lines,
        collected.breaks,
        headings,
        spans=collected.spans,
        wholes=collected.wholes,
        repeats=collected.repeats,
    )


def _collect(main: Tag, out: _Lines) -> list[Heading]:
    """Walk the tree without recursion, however deep it is."""
    from bs4.element import NavigableString, Tag

    headings: list[Heading] = []
    line = main.sourceline or 1
    stack: list[object] = [main]
    while stack:
        node = stack.pop()
        if isinstance(node, str) and not isinstance(node, NavigableString):
            out.end(Break.ITEM if node in ("li", "dt", "dd", "tr") else Break.BLOCK)
            if node in _WHOLE:
                out.close()
        elif isinstance(node, Tag):
            line = node.sourceline or line
            if node.name in _HEADINGS:
                out.end()
                text = clean_title(node.get_text(" ", strip=True))
                if text:
                    at = len(out.lines) + (1 if out.lines else 0)
                    out.add(text, line)
                    out.end()
                    headings.append(Heading(at, _HEADINGS[node.name], text))
                continue
            if node.name == "pre":
                text = node.get_text()
                out.preformatted(text, line)
                line += text.count("\n")
                continue
            if node.name == "br":
                out.end(Break.LINE)
            elif node.name in ("td", "th"):
                out.mark(" | ", inside=True)
            elif node.name in _BLOCKS:
                out.end(Break.ITEM if node.name in ("li", "dt", "dd", "tr") else Break.BLOCK)
                if node.name in _WHOLE:
                    out.open(node)
                if node.name == "li":
                    out.mark("- ")
                stack.append(str(node.name))
            stack.extend(reversed(list(node.children)))
        elif isinstance(node, NavigableString):
            if type(node) is NavigableString:
                out.add(str(node), line)
            line += str(node).count("\n")
    out.end()
    return headings
